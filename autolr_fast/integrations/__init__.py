"""AutoLR inside of frameworks: one file for each, imported by those who use it alone."""
