"""SPAR as a distributed pretraining system: the models, the stages and the one trainer.

`SparPipeline` is imported when it is first used, because its libraries take seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spar_scale.inference.pipeline import SparPipeline

__all__ = ["SparPipeline"]


def __getattr__(name: str) -> Any:
    if name != "SparPipeline":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spar_scale.inference.pipeline import SparPipeline

    return SparPipeline
