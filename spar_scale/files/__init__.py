"""Output files of commands, and the JSON files that they read."""
