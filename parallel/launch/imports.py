"""The import of DeepSpeed, with what it does not need left out: 1.5 s of 7 that a rank needs to start."""

from __future__ import annotations

import sys


def import_deepspeed() -> None:
    """Import DeepSpeed, and MLflow only where a caller has imported it before.

    DeepSpeed 0.19.8 always imports its autotuner, which nothing here uses and which imports MLflow where it is
    installed. An entry of None makes that import fail as if it were not, which the autotuner expects.
    """
    hides = "mlflow" not in sys.modules
    if hides:
        sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    try:
        import deepspeed  # noqa: F401
    finally:
        if hides:
            del sys.modules["mlflow"]
