"""Training: the one loop, its optimizers and schedules, what guards it and what it tells."""
