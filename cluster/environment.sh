# shellcheck shell=bash
# The environment of every spar_scale job. Values that are set already are kept, so that a site or a single sbatch
# command can override them. The checkout and its Python:
export SPAR_HOME="${SPAR_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
export SPAR_PYTHON="${SPAR_PYTHON:-$SPAR_HOME/.venv/bin/python}"

# cuda: one process per GPU of the job. cpu: SPAR_PROCESSES processes per node, without GPU checks.
export SPAR_DEVICE="${SPAR_DEVICE:-cuda}"
export SPAR_PROCESSES="${SPAR_PROCESSES:-1}"

# One thread per process: more would compete with the neighbouring ranks and the loader workers.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Unbuffered output keeps log lines in order, and complete if a process is killed.
export PYTHONUNBUFFERED=1
# All models are on the disk. Without this, a node without internet access hangs while it contacts the hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

# A failed collective ends its process; the heartbeat of the other ranks then reports it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# torch's watchdog kills without a message after this time. The heartbeat reports first, after guards.timeout_s (default 600).
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-1800}"
# NCCL's warnings name the host and the adapter; more verbose output would hide them.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Texts of many lengths fragment the memory in long runs; expandable segments prevent that.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
# The network between nodes differs by site: set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME if a node has several.

cd "$SPAR_HOME" || exit 2
if ! [[ -x $SPAR_PYTHON ]]; then
    echo "error: SPAR_PYTHON: no such file: $SPAR_PYTHON; run 'make venv' in $SPAR_HOME, or set SPAR_PYTHON (and SPAR_HOME)" >&2
    exit 2
fi
