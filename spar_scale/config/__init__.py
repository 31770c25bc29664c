"""The recipe: its schema, its reading, the rules between its keys."""
