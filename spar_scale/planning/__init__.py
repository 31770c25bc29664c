"""Estimates of the costs of a recipe's layouts."""
