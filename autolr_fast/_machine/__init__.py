"""What this machine has: memory, time, other ranks; and a word with the user."""
