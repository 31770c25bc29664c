"""Distributed training: process groups, parallelism, the engine and checkpoints. Imports nothing of spar_scale."""
