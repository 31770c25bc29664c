"""What every test and every process that it starts shares: the working tree, one thread, no accelerator guessing."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

_TESTS = Path(__file__).resolve().parent
for _folder in (str(_TESTS), str(_TESTS.parent)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)
_PATHS = [str(_TESTS.parent), str(_TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

LONGEST = (
    "slurm/test_jobs.py",
    "world/test_phases.py",
    "world/test_rehearse.py",
    "world/test_adversary.py",
    "docs/test_readme.py",
    "world/test_learning.py",
    "world/test_layouts.py",
)
"""Files that take a minute or more: they run first, so that no worker is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {_TESTS / name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


def pytest_collection_finish() -> None:
    gc.freeze()  # full collections leave out the modules that all tests import: 0.5 s each
