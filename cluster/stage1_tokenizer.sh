#!/usr/bin/env bash
#SBATCH --job-name=spar-tokenizer
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Training stage 1: a phase of the tokenizer (tokenizer_init, tokenizer_decoder, tokenizer_encoder,
# tokenizer_high_resolution).
# The variables RECIPE and RUN_DIR select the recipe and the run directory; nodes, GPUs and time are options of sbatch;
# arguments after the script are overrides of the recipe:
#   RECIPE=recipes/spar_1b/tokenizer_init.yaml sbatch --nodes=8 --gres=gpu:8 cluster/stage1_tokenizer.sh train.log_every=20
# USR1 comes 300 s before the time limit, up to 30 s late: enough time to end a step and save.
set -euo pipefail
source "${SPAR_HOME:-${SLURM_SUBMIT_DIR:-.}}/cluster/environment.sh"
exec "$SPAR_PYTHON" -m spar_scale.cli cluster job "${RECIPE:-recipes/spar_1b/tokenizer_init.yaml}" ${RUN_DIR:+"run_dir=$RUN_DIR"} "$@"
