"""Jobs of SLURM: what the scripts under `cluster/` hand to Python."""
