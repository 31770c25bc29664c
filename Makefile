# VENV, OUT, SIZE, SEED, PORT, WORKERS, TESTS and PYTHON can be given: `make demo OUT=runs/other SEED=1`.

VENV ?= .venv
OUT ?= runs/demo
SIZE ?= demo
PORT ?= 5000
WORKERS ?= 2
CONSTRAINTS ?= constraints/cpu.txt
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

# One rule for every pip below, also inside the builds that it starts: no version that the file does not allow.
export PIP_CONSTRAINT = $(abspath $(CONSTRAINTS))
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export DS_ACCELERATOR ?= cpu

.PHONY: venv demo ui test test-fast lint

venv: $(STAMP)

$(STAMP): setup.py $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found on PATH; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments (on Debian: install python3-venv)" >&2; exit 2; }
	@test ! -e $(VENV) || test -e $(VENV)/.ours || test -e $@ || { echo "error: $(VENV) is there and was not made here; it would be emptied. Name another: make $(MAKECMDGOALS) VENV=/path" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $(VENV)/.ours
	$(BIN)/python constraints/announce.py torch
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/spar-scale demo --out $(OUT) --size $(SIZE) $(if $(SEED),--seed $(SEED))

# What MLflow shows of the runs in OUT, to this machine only.
ui: venv
	@test -f "$(OUT)/mlflow.db" || { echo "error: $(OUT)/mlflow.db is not there; runs make it in the directory that holds theirs: make ui OUT=runs/tiny" >&2; exit 2; }
	@echo "MLflow shows $(OUT) at http://127.0.0.1:$(PORT)/#/experiments/1/runs?workflowType=machine_learning (Ctrl-C ends it)"
	@cd "$(OUT)" && MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(abspath $(BIN))/mlflow server \
		--backend-store-uri sqlite:///mlflow.db --artifacts-destination mlartifacts --host 127.0.0.1 --port $(PORT) --workers 1

# Test files run side by side, each file on one worker, because its fixtures train; the longest first (tests/conftest.py).
# `make test TESTS=tests/unit/test_recipe.py` runs a part.
test: venv
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(TESTS)

# The properties that break most: recipes, imports, phases, sample order, shards, checkpoints, layers and their cuts.
FAST = tests/unit/test_recipe.py tests/unit/test_core_yaml.py tests/unit/test_imports.py tests/unit/test_phases.py \
	tests/unit/test_boxes.py tests/unit/test_checkpoint.py tests/unit/test_files.py tests/unit/test_stages.py \
	tests/unit/test_training.py tests/data/test_order.py tests/data/test_loader.py tests/data/test_tar_index.py \
	tests/data/test_shard_forms.py tests/world/test_tensor.py
test-fast: venv
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(FAST)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	@if command -v shellcheck >/dev/null; then shellcheck -x cluster/*.sh .ci/run; \
	elif [ -n "$$SPAR_REQUIRE_SLURM" ]; then echo "error: shellcheck is not installed" >&2; exit 2; \
	else echo "shellcheck is not installed: the scripts of cluster/ were not checked"; fi
