"""Benchmarks of autolr_fast; not part of the installed package."""
