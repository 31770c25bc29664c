"""Files of a person: what commands write, and JSON that they read."""
