# shellcheck shell=bash
# What every job of spar_scale finds in its environment. A value that is set already stays, so a site or a single
# sbatch can have its own. Where the checkout and its Python are:
export SPAR_HOME="${SPAR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
export SPAR_PYTHON="${SPAR_PYTHON:-$SPAR_HOME/.venv/bin/python}"

# cuda: a process for each GPU that the job has. cpu: SPAR_PROCESSES for each node, GPU checks skipped.
export SPAR_DEVICE="${SPAR_DEVICE:-cuda}"
export SPAR_PROCESSES="${SPAR_PROCESSES:-1}"

# A process has one core for itself; more threads would take those of its neighbours and of the loaders.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Log lines in the order in which they came, and all of them when a process is killed.
export PYTHONUNBUFFERED=1
# What is asked for is on the disk; a node that asks the hub hangs where there is no way out.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# A collective that fails ends its process, which the heartbeat of the others then names.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# torch's own watchdog kills silently after this; ours speaks first, after guards.timeout_s (600 unless the recipe says).
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-1800}"
# Warnings of NCCL name the host and the adapter; its chatter would hide them.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Long runs with images of one size and texts of many fragment the memory; segments that grow do not.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# Which network the nodes meet on differs by site: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME where a node has several.

cd "$SPAR_HOME" || exit 2
if ! [[ -x $SPAR_PYTHON ]]; then
    echo "error: $SPAR_PYTHON is not there; run 'make venv' in $SPAR_HOME, or set SPAR_PYTHON (and SPAR_HOME)" >&2
    exit 2
fi
