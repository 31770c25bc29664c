"""SLURM jobs: the Python part of the scripts in `cluster/`."""
