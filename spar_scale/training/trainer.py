"""The training loop of every training stage, phase and layout: `train`.

Read `Trainer.run` first. No code here synchronises with the device between fetching a batch and the update; metrics
stay on the device until a log step or a checkpoint (`metrics.py`).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel import checkpoint
from parallel.checkpoint.manifest import read_manifest
from parallel.errors import UserError
from parallel.launch.agreement import run_on_all_ranks, run_on_first_rank
from parallel.launch.environment import read_environment
from parallel.launch.exit_codes import STOPPED
from parallel.launch.heartbeat import WAITING, Heartbeat
from parallel.launch.world import Launch, start
from parallel.optimizers import OPTIMIZERS
from parallel.pipeline import layers_of_rank
from parallel.tensor import apply_tensor_parallel
from parallel.topology import Layout, Topology
from parallel.zero.engine import Engine, name_parameters
from spar_scale.config.recipe import Recipe
from spar_scale.config.schedule import learning_rate
from spar_scale.data.loader import Loader
from spar_scale.data.spec import sources_of
from spar_scale.models.published import forget_values, read_weights
from spar_scale.models.sharding import tensor_plan
from spar_scale.stages import Stage
from spar_scale.stages.costs import pipeline_costs
from spar_scale.stages.parts import preset_of
from spar_scale.training.admission import check_layout, check_shards
from spar_scale.training.attention_choice import attention_of
from spar_scale.training.encode import frozen_digests, open_encoded
from spar_scale.training.engine_settings import engine_settings
from spar_scale.training.export import export
from spar_scale.training.guards import NonFiniteGuard
from spar_scale.training.metrics import FinishedStep, StepMetrics
from spar_scale.training.mlflow_mirror import Mirror
from spar_scale.training.optimizers import parameter_groups
from spar_scale.training.parent import choose_parent, started_stage
from spar_scale.training.preemption import StopRequest, WaitInterrupted
from spar_scale.training.progress import Progress
from spar_scale.training.run_directory import RunDirectory
from spar_scale.training.tracking import RunLog, run_id

log = logging.getLogger(__name__)

STATE_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""Version 1 stored only the optimizer's step counts, as `optimizer_steps`."""


def train(recipe: Recipe) -> int:
    """Train a recipe to its last step, from its newest intact checkpoint if there is one; return exit code 0.

    Raises SystemExit(STOPPED) after a signal, when the trained steps are saved.
    """
    # Both checks come before the process group exists: their errors then need no agreement of the ranks.
    check_layout(recipe, read_environment()[1])
    layout = Layout(recipe.parallel.tensor, recipe.parallel.pipeline, recipe.parallel.zero)
    with attention_of(recipe):
        launch = start(recipe.guards.timeout_s)
        topology = Topology(layout)
        heartbeat = Heartbeat(topology, recipe.guards.timeout_s)
        with StopRequest(topology) as stop, heartbeat:
            # Before the run directory takes the recipe, so that a recipe with wrong paths leaves nothing behind.
            run_on_first_rank(topology.agreement_group, lambda: check_shards(recipe))
            with RunDirectory(recipe, topology) as directory:
                trainer = Trainer(recipe, launch, topology, directory, heartbeat, stop)
                try:
                    done = trainer.run()
                finally:
                    trainer.close()
    if not done:
        raise SystemExit(STOPPED)
    return 0


class Trainer:
    """One run: model, engine, data and logs, starting from its newest checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        launch: Launch,
        topology: Topology,
        directory: RunDirectory,
        heartbeat: Heartbeat,
        stop: StopRequest | None = None,
    ):
        # The order matters: a comment names what a line must follow or precede. Several lines run collectives, so every
        # rank comes through here alike.
        self.recipe, self.topology, self.directory, self.heartbeat = recipe, topology, directory, heartbeat
        self.stop = stop or StopRequest(topology)
        self.in_step = False
        choose_parent(recipe, topology.files_group)  # writes the record that started_stage reads
        self.stage = started_stage(recipe, read=False)
        self.encoded = open_encoded(recipe, self.stage)
        if self.encoded is not None:
            self.stage = self.stage.encoded()
        # Of whole tensors: _build_engine shards them. One rank reads them all, the others what they keep.
        self.frozen = run_on_first_rank(topology.agreement_group, lambda: _frozen_digests(self.stage))
        self.engine = self._build_engine(launch)
        topology.limit_waits(recipe.guards.timeout_s)  # after DeepSpeed has made its groups, which have no limit
        for companion in self.stage.companions:
            companion.bind(topology, launch.device, recipe.optimizer.betas)
        self.non_finite = NonFiniteGuard(recipe.guards.max_skipped_steps)
        self.tracked: str | None = None  # the id that MLflow knows the run by
        self.step, shards = self._resume()  # into the engine, the companions, the guard and the id
        self.saved = self.step
        self.loader = self._build_loader()  # from the resumed step on
        if shards not in (None, self.loader.digest):
            raise UserError("data.sources: the shards are not those that this run was trained on; restore them")
        self.log, self.mirror = self._open_logs()  # after every refusal: they cut the logs back to the resumed step
        self.metrics = StepMetrics(recipe, self.stage.terms, topology, self.log)

    def run(self) -> bool:
        """Train up to the recipe's last step, save, and export the model if the training stage has a published layout.

        Returns False if a signal stopped the run earlier; it is then saved too.
        """
        steps, every = self.recipe.train.steps, self.recipe.checkpoint.every
        title = f"{self.recipe.stage}/{self.recipe.phase}"
        progress = Progress(title, self.step, steps, enabled=self.topology.rank == 0)
        try:
            batches = iter(self.loader)
            while self.step < steps:
                batch = self._first_batch(batches)
                # All ranks decide together here: a rank that stopped alone would leave the others in a collective.
                stop_signal, any_all_bad = self.stop.agree(self.metrics.all_bad)
                if any_all_bad:
                    self.metrics.write()  # raises UserError if all samples of all ranks were bad in the last step
                if stop_signal or batch is None or not self._train_step(itertools.chain([batch], batches)):
                    self._stop(stop_signal or self.stop.agree()[0])
                    return False
                saves = self.step % every == 0 or self.step == steps
                if saves or self.step % self.recipe.train.log_every == 0:
                    progress.show(self.metrics.write())
                if saves:
                    self._save()
        finally:
            progress.close()
        self._export()
        return True

    def close(self) -> None:
        """End the loader's workers, close the logs and release the engine."""
        self.loader.close()
        if self.log is not None:
            self.log.close()
        if self.mirror is not None:
            self.mirror.close(finished=self.step >= self.recipe.train.steps)
        self.engine.close()

    # -- one step -------------------------------------------------------------------------------

    def _first_batch(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
        """Return the first batch of the next step, or None if a signal arrived while waiting for it.

        It is fetched before the ranks agree to continue, so that a rank whose data hangs can still stop with the
        others.
        """
        self.in_step = False
        self.heartbeat.place = f"step {self.step + 1}, {WAITING}"
        try:
            return next(batches)
        except WaitInterrupted:
            return None

    def _while_waiting(self) -> None:
        self.stop.check_wait(self.heartbeat.place, self.in_step)

    def _train_step(self, batches: Iterator[dict[str, Any]]) -> bool:
        """Train one step. Return False if a signal interrupted it before the update, which needs a world size of 1."""
        self.in_step = True
        self.step += 1
        place = self.heartbeat.place = f"step {self.step}"
        lr = learning_rate(self.recipe.optimizer, self.step, self.recipe.train.steps)
        samples: list[int] = []
        bad: list[dict[str, Any]] = []

        def counted() -> Iterator[dict[str, Any]]:
            for _ in range(self.micro_steps):
                self.heartbeat.place = f"{place}, {WAITING}"
                batch = next(batches)
                self.heartbeat.place = place
                samples.extend(number for number in batch["sample"].tolist() if number >= 0)
                bad.extend(batch["errors"])
                yield batch

        for companion in self.stage.companions:
            companion.begin_step(self.step)
        feed = counted()
        try:
            record = self.engine.step(feed, {name: lr * factor for name, factor in self.multipliers.items()})
        except WaitInterrupted:
            self.step -= 1
            return False
        for _ in feed:  # a middle pipeline stage reads no batches: skip them to keep the loader's position
            pass
        for companion in self.stage.companions:
            factor = self.recipe.optimizer.groups.get(companion.name, 1.0)
            companion.end_step(lr * factor, self.recipe.optimizer.clip)
        self.metrics.add(FinishedStep(self.step, lr, record, samples, bad))
        self.non_finite.observe(self.step, record.skipped)
        return True

    # -- saving and resuming ----------------------------------------------------------------------

    def _stop(self, signal_name: str | None) -> None:
        """Save the steps that are not saved yet."""
        self._announce(f"stops on {signal_name} after step {self.step}; the same command resumes from there")
        if self.step > self.saved:
            self.metrics.write()
            self._save()

    def _save(self) -> None:
        self.heartbeat.place = f"the save of step {self.step}"
        began = time.monotonic()
        if self.log is not None:
            self.log.flush()  # before the checkpoint: a resume needs the lines of all steps up to it
        state = {
            "version": STATE_VERSION,
            "step": self.step,
            "samples": self.step * self.recipe.global_batch,
            "seed": self.recipe.seed,
            "recipe": self.recipe.model_dump(mode="json"),
            "shards": self.loader.digest,
            "frozen": self.frozen,
            "text": self._text_digest(),
            "references": {name: str(path) for name, path in self.stage.references.items()},
            "optimizer_scalars": self._optimizer_scalars(),
            "non_finite": self.non_finite.state_dict(),
            "tracking": self.tracked,
        }
        checkpoint.save(
            self.directory.checkpoints,
            self.step,
            self.engine.state.fragments(),
            state,
            tensors=self._companion_tensors(),
            group=self.topology.files_group,
            keep=self.recipe.checkpoint.keep,
        )
        self._announce(f"saved step {self.step} in {time.monotonic() - began:.1f} s")
        self.saved = self.step

    def _resume(self) -> tuple[int, str | None]:
        """Load the newest intact checkpoint; return its step and shard digest, or (0, None) for a new run."""
        path = self.directory.newest_checkpoint()
        if path is None:
            self._announce("starts at step 0: the run directory has no checkpoint")
            return 0, None
        # The version comes first: the tensors of an unknown one would be refused as those of another model.
        state = run_on_all_ranks(self.topology.agreement_group, lambda: _readable_state(path))
        fragments = self.engine.state.fragments(loading=True)
        tensors = self._companion_tensors()
        # `newest_checkpoint` has verified the hashes already.
        checkpoint.load(path, fragments, tensors, group=self.topology.files_group, verify=False)
        for part, digest in self.frozen.items():
            if state["frozen"].get(part) != digest:
                raise UserError(f"{path}: the frozen part '{part}' differs from the one that this run trained with")
        if state.get("text") not in (None, self._text_digest()):
            raise UserError(f"{path}: the language model's tokenizer differs from the one that this run trained with")
        self.engine.state.restore(_optimizer_scalars_of(state))
        self.non_finite.load_state_dict(state["non_finite"])
        self.tracked = state.get("tracking")
        self._announce(f"resumes from {path}, step {state['step']}")
        return state["step"], state["shards"]

    def _text_digest(self) -> str | None:
        text = self.stage.sample.text
        return None if text is None else text.digest

    def _companion_tensors(self) -> dict[str, torch.Tensor]:
        """Return the checkpoint tensors that are not sharded: those of the companions and their optimizers."""
        return {name: tensor for companion in self.stage.companions for name, tensor in companion.tensors().items()}

    def _optimizer_scalars(self) -> dict[str, dict[str, float]]:
        """Return the optimizer's scalars by parameter group, gathered from all pipeline stages."""
        merged: dict[str, dict[str, float]] = {}
        for scalars in self.topology.gather(self.engine.state.scalars()):
            merged.update(scalars)
        return merged

    def _export(self) -> None:
        """Write the EMA weights in the published layout, if the training stage has one."""
        if self.stage.export is None:
            return

        def report(progress: str) -> None:
            self.heartbeat.place = f"the export, {progress}"

        report("finding the checkpoint")
        path = self.directory.newest_checkpoint()
        assert path is not None
        export(self.recipe, path, self.stage.export.calibrated, self.topology, self.engine.device, report)

    # -- pieces of the constructor ----------------------------------------------------------------

    def _build_engine(self, launch: Launch) -> Engine:
        """Shard the model over the tensor ranks and build its engine; set `multipliers` and `micro_steps`."""
        recipe, stage, topology = self.recipe, self.stage, self.topology
        # Before the sharding: costs are those of the whole layers.
        costs = run_on_first_rank(topology.agreement_group, lambda: pipeline_costs(recipe, stage))
        plan = tensor_plan(preset_of(recipe))
        apply_tensor_parallel(stage.model, stage.layers, plan, topology.tensor_group)
        kept = nn.ModuleList(layers_of_rank(stage.layers, topology, costs))
        forget_values(stage.model, {id(parameter) for parameter in kept.parameters()})
        read_weights(kept)  # after the sharding: of a sharded weight this rank's part
        name_parameters(stage.model)  # after the sharding, which replaces parameters
        groups = parameter_groups(stage, recipe.optimizer)
        self.multipliers = {group["name"]: group.pop("multiplier") for group in groups}
        settings = engine_settings(recipe, topology.data_size)
        self.micro_steps = settings.micro_steps
        optimizer = OPTIMIZERS[recipe.optimizer.name]
        return Engine(
            stage.layers, stage.inputs, stage.terms, groups, optimizer, topology, launch.device, settings, costs
        )

    def _open_logs(self) -> tuple[RunLog | None, Mirror | None]:
        """Open the logs, cut back to the step, and their mirror; only rank 0 has them."""
        writes, path = self.topology.rank == 0, self.directory.path
        log = run_on_all_ranks(self.topology.agreement_group, lambda: RunLog(path, self.step) if writes else None)
        if not writes or not self.recipe.tracking.mirror:
            return log, None
        self.tracked = run_id(path, self.tracked)
        return log, Mirror(path, self.recipe.tracking)  # after the log: it measures what is already there

    def _build_loader(self) -> Loader:
        recipe = self.recipe
        return Loader(
            sources_of(recipe),
            self.stage.sample,
            seed=recipe.seed,
            global_batch=recipe.global_batch,
            task_block=recipe.data.task_block,
            micro_batch=recipe.parallel.micro_batch,
            dp_rank=self.topology.data_rank,
            dp_size=self.topology.data_size,
            workers=recipe.data.workers,
            first_step=self.step,
            steps=recipe.train.steps - self.step,
            encoded=self.encoded,
            timeout_s=recipe.guards.timeout_s,
            while_waiting=self._while_waiting,
        )

    def _announce(self, text: str) -> None:
        if self.topology.rank == 0:
            log.info("%s/%s %s", self.recipe.stage, self.recipe.phase, text)


def _frozen_digests(stage: Stage) -> dict[str, str]:
    """Return the digests of the frozen parts of a stage, also of those that stand beside the engine."""
    digests = frozen_digests(stage.model)
    for module in (module for layer in stage.layers for module in layer.beside):
        digests |= frozen_digests(module)
    return digests


def _readable_state(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint. Raises UserError for a version that this program does not read."""
    state = read_manifest(path).state
    version = state.get("version")
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"{path}: found state version {version}, expected {' or '.join(map(str, READABLE_VERSIONS))}; resume with "
            "the version of the program that wrote it, or give the recipe another run_dir"
        )
    return state


def _optimizer_scalars_of(state: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the optimizer's scalars of a checkpoint's state, of any readable version."""
    if state["version"] == 1:  # also had a count, always 0, for Muon's matrices, which count no steps
        steps = state["optimizer_steps"].items()
        return {group: {} if group.endswith(".muon") else {"step": count} for group, count in steps}
    return state["optimizer_scalars"]
