"""Recipes: the schema, reading and validation, and the rules between keys."""
