"""Checks of a machine and of a recipe before training."""
