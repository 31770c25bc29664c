#!/usr/bin/env bash
#SBATCH --job-name=spar-evaluate
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --requeue
# Evaluate the phases in RUN_DIR and write the report; arguments of the script are options of `spar-scale evaluate`.
set -euo pipefail
source "${SPAR_HOME:-${SLURM_SUBMIT_DIR:-.}}/cluster/environment.sh"
"$SPAR_PYTHON" -m spar_scale.cli evaluate "${RUN_DIR:-runs/tiny}" "$@"
exec "$SPAR_PYTHON" -m spar_scale.cli report "${RUN_DIR:-runs/tiny}"
