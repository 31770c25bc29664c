"""What each layout of a recipe costs."""
