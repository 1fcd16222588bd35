"""Doctests of optional parts run where what they need is installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("matplotlib") else ["autolr_fast/plotting.py"]
