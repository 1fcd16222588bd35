"""A study of where a learning rate ends up from any start, and what that is worth."""
