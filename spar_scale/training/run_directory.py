"""The directory of a run: its lock, its recipe and its checkpoints.

When a run resumes, its recipe may differ only in keys that do not change the run. A run without a checkpoint has
trained nothing that is kept, so another recipe may replace its recipe. Rank 0 holds the lock; every refusal is raised
on all ranks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType

from parallel import checkpoint
from parallel.checkpoint.manifest import list_checkpoints
from parallel.errors import UserError
from parallel.launch.agreement import run_on_first_rank
from parallel.launch.run_lock import RunLock
from parallel.topology import Topology
from spar_scale.config.recipe import Recipe, differences, load_recipe, may_change_at_resume

log = logging.getLogger(__name__)


class RunDirectory:
    """The directory of one run. A context manager that holds the run's lock."""

    def __init__(self, recipe: Recipe, topology: Topology):
        self.path = recipe.run_dir
        self.checkpoints = self.path / "checkpoints"
        self._recipe, self._topology = recipe, topology
        self._lock: RunLock | None = None

    def __enter__(self) -> RunDirectory:
        try:
            run_on_first_rank(self._topology.agreement_group, self._open)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._release()

    def resolve(self, relative: str) -> Path:
        """Return a path that the recipe gives relative to the run directory."""
        return (self.path / relative).resolve()

    def newest_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint, verified by all ranks; newer damaged ones are logged."""
        return checkpoint.find(self.checkpoints, self._topology.files_group)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _open(self) -> None:
        self._lock = RunLock(self.path)
        file = self.path / "recipe.yaml"
        refuse_another(file, self._recipe)
        self._recipe.save(file)
        checkpoint.remove_leftovers(self.checkpoints)


def has_trained(run_dir: Path) -> bool:
    """Return whether a run directory holds a checkpoint, damaged or not, or a published model."""
    return bool(list_checkpoints(run_dir / "checkpoints")) or (run_dir / "pretrained").exists()


def refuse_another(file: Path, recipe: Recipe) -> None:
    """Raise UserError if `file` holds the recipe of another run, that is, differs in keys that must not change."""
    if not file.exists() or not has_trained(file.parent):
        return
    changed = [key for key in differences(load_recipe(file), recipe) if not may_change_at_resume(key)]
    changed = [key for key in changed if key != "run_dir"]
    if changed:
        raise UserError(
            f"{file.parent}: holds a run of another recipe; it differs in {', '.join(changed)}. "
            "Give the recipe another run_dir, or restore these values to continue"
        )
