"""Short programs that use the package; run them from the top of the repository."""
