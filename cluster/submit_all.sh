#!/usr/bin/env bash
# Submit all phases of a folder of recipes as a chain of jobs: cluster/submit_all.sh [--dry-run] RECIPE_DIR RUN_DIR [OPTIONS]
# OPTIONS are options of sbatch for every job. SIZE=smoke with recipes/tiny selects the smallest recipes of the miniature.
set -euo pipefail
SPAR_HOME="${SPAR_HOME:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}"
source "$SPAR_HOME/cluster/environment.sh"
exec "$SPAR_PYTHON" -m spar_scale.cli cluster submit "$@"
