#!/usr/bin/env bash
#SBATCH --job-name=spar-world
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --requeue
# Make the miniature's data: write the world of RECIPE as shards in RUN_DIR.
set -euo pipefail
source "${SPAR_HOME:-${SLURM_SUBMIT_DIR:-.}}/cluster/environment.sh"
exec "$SPAR_PYTHON" -m spar_scale.cli data make "${RECIPE:-recipes/tiny/world.yaml}" --out "${RUN_DIR:-data/tiny}"
