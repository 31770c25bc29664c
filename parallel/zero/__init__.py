"""The engine: DeepSpeed ZeRO around a program, its configuration, its state and the bytes of it."""
