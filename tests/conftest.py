"""What every test and every process that it starts shares: the working tree, one thread, no accelerator guessing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
for _folder in (str(_TESTS), str(_TESTS.parent)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)
_PATHS = [str(_TESTS.parent), str(_TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
