"""How training is spread over processes: knows torch and DeepSpeed, imports nothing of spar_scale."""
