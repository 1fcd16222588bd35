"""Losses that have no minimum, or only a game's equilibrium: whether AutoLR ends as plain Adam does."""
