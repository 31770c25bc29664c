"""The engine, which runs a program under DeepSpeed ZeRO: configuration, state, and the bytes of the state."""
