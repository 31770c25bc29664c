"""Training: the training loop, optimizers and schedules, guards, metrics and tracking."""
