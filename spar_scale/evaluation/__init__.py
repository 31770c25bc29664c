"""Measuring trained models and drawing what they do."""
