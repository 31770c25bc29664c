"""Evaluation of trained models on held-out data, and the HTML report of a chain."""
