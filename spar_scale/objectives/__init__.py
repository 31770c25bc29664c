"""Objectives: functions of tensors that return one fp32 value per sample."""
