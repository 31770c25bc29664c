"""What every test shares: imports from the working tree, one thread, no accelerator guessing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent
for _folder in (str(_TESTS), str(_TESTS.parent)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
