"""Load the micro-batches of one data-parallel rank from shards.

A micro-batch is identified by its number over the whole run. The number determines everything in it: the samples
(order.py), their pixels and their random draws. So a worker process has no state, a run resumes by passing
`first_step`, and the numbers of ranks and workers and the micro-batch size only change which process loads a sample.

There are two kinds of errors. A bad sample (not an image, a member is missing) keeps its number, gets weight 0 and is
reported in the batch; the trainer counts bad samples. A system error (a shard vanished, a disk fails) is raised as
UserError with the file's name. Worker processes return it as a value, because torch (2.13) would hide its message in a
traceback.

Waiting for a worker is bounded. The parent waits in short intervals, calls `while_waiting` between them, and raises
UserError after `timeout_s`. With `workers=0` the calling process reads the data itself, without a time limit.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from parallel.errors import UserError
from parallel.launch.children import end_with_parent
from spar_scale.data.encoded import Encoded, EncodedShard
from spar_scale.data.images import BadSample
from spar_scale.data.order import PADDING, BatchLayout, Blocks, Order, SourceShape, draw_generator
from spar_scale.data.spec import Draw, SampleSpec, Source, shards_of
from spar_scale.data.storage import ShardReader
from spar_scale.data.tar_index import ShardIndex, check_fresh, digest, read_header, read_index
from spar_scale.data.tasks import Conditioned, Members, source_task

Batch = dict[str, Any]
OPEN_SHARDS = 32  # shards that a worker keeps open, with their indexes
WAIT_S = 600.0  # default limit of the wait for a worker's batch
POLL_S = 1.0  # interval between two calls of `while_waiting`
KILLED_S = 5.0  # limit of the wait for a killed worker to exit
SHARED_MEMORY = "/dev/shm"
PARENT_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # handled by the trainer, ignored by workers


class Loader:
    """Iterates over the micro-batches of a rank, from global step `first_step` on, for `steps` steps.

    Yields `steps * micro_steps` batches: the task's tensors (B, ...), the draws of the spec (B, ...) fp32, `weight`
    (B,) fp32 in {0, 1}, `sample` (B,) int64 with -1 in padding rows, and `errors`, a list of {"sample", "source",
    "shard", "key", "reason"}. B is always `micro_batch`. A padding row is zero in all tensors; a bad sample keeps its
    number and draws.

    `micro_steps` is the number of batches per global step, the same on every rank; `digest` is the sha256 over the
    names and shards of the sources. With `encoded`, the stored slots replace the images. `close()` ends the worker
    processes; iterating to the end does so too. `while_waiting` is called every POLL_S while waiting for a worker; an
    exception that it raises ends the wait. Raises UserError for sources that cannot be read or mixed, and if a worker
    needs more than `timeout_s` for a batch.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        spec: SampleSpec,
        seed: int,
        global_batch: int,
        task_block: int,
        micro_batch: int,
        dp_rank: int,
        dp_size: int,
        workers: int,
        first_step: int,
        steps: int,
        prefetch: int = 4,
        encoded: Encoded | None = None,
        timeout_s: float = WAIT_S,
        while_waiting: Callable[[], None] = lambda: None,
    ):
        shards = [group for _, group in shards_of(sources)]
        shapes = [
            SourceShape(source.name, source.weight, tuple(read_header(shard).samples for shard in group))
            for source, group in zip(sources, shards, strict=True)
        ]
        layout = BatchLayout(Blocks(global_batch, task_block), micro_batch, dp_size)
        if not 0 <= dp_rank < dp_size:
            raise UserError(f"dp_rank is {dp_rank} of {dp_size}; it must be at least 0 and less than dp_size")
        self.order = Order(seed, shapes, global_batch, task_block)
        self.micro_steps = layout.per_step
        total = hashlib.sha256()
        for source, group in zip(sources, shards, strict=True):
            total.update(f"{source.name}\0{digest(group)}\n".encode())
        self.digest = total.hexdigest()
        self._dataset = _MicroBatchDataset(self.order, layout, sources, shards, spec, seed, dp_rank, encoded)
        self._numbers = range(first_step * layout.per_step, (first_step + steps) * layout.per_step)
        self._workers, self._prefetch = workers, prefetch
        self._timeout_s, self._while_waiting = timeout_s, while_waiting
        self._batches: Iterator[Batch | _Failure] | None = None
        self._passes = 0

    def __iter__(self) -> Iterator[Batch]:
        """Load from the first step; worker processes start here and run until the last batch or `close()`."""
        self.close()
        self._passes += 1
        this_pass = self._passes
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._numbers,  # pyright: ignore[reportArgumentType]
            num_workers=self._workers,
            prefetch_factor=self._prefetch if self._workers else None,
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=_start_worker,
            timeout=POLL_S if self._workers else 0,
            collate_fn=_identity,
        )
        # A worker inherits the signal mask, so no signal reaches it before `_start_worker` ignores the signals.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PARENT_SIGNALS)
        try:
            self._batches = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # Workers ignore SIGTERM, so multiprocessing's exit handler would terminate them in vain and wait forever.
        atexit.register(self.close)
        try:
            for number in self._numbers:
                if self._batches is None or self._passes != this_pass:
                    return
                batch = self._next(self._batches, number)
                if isinstance(batch, _Failure):
                    raise UserError(batch.message)
                yield batch
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # A lost worker appears as torch's RuntimeError, or as a broken connection while a tensor is received.
            if isinstance(error, RuntimeError) and not is_lost_worker(error):
                raise
            raise UserError(lost_worker_message(error)) from None
        finally:
            if self._passes == this_pass:
                self.close()

    def close(self) -> None:
        """End the worker processes; a second call does nothing."""
        batches: Any = self._batches
        self._batches = None
        atexit.unregister(self.close)
        if not hasattr(batches, "_workers"):
            return
        # A worker holds no state, so it is killed. torch (2.13) would wait 10 s for each worker that is stuck in a
        # read, and would end workers only when the iterator is deleted, which a traceback can prevent.
        # First deregister the workers: otherwise torch's SIGCHLD handler reports the killed ones as lost.
        signal_handling._remove_worker_pids(id(batches))  # pyright: ignore[reportPrivateImportUsage]
        batches._worker_pids_set, batches._shutdown = False, True  # disables torch's own shutdown
        for worker in batches._workers:
            worker.kill()
        for worker in batches._workers:
            worker.join(KILLED_S)
        for queue in batches._index_queues:
            queue.cancel_join_thread()
            queue.close()

    def _next(self, batches: Iterator[Batch | _Failure], number: int) -> Batch | _Failure:
        """Return the batch of micro-step `number`; wait for its worker at most `timeout_s`."""
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except RuntimeError as error:
                # torch (2.13) marks a timeout only by this text; `next` may be called again after it.
                if not str(error).startswith("DataLoader timed out"):
                    raise
            self._while_waiting()
            if time.monotonic() - began > self._timeout_s:
                raise UserError(self._timeout_message(batches, number))

    def _timeout_message(self, batches: Any, number: int) -> str:
        """Return the error message for a worker that does not deliver micro-step `number`."""
        samples = [int(n) for n in self._dataset.layout.samples(number, self._dataset.dp_rank) if n != PADDING]
        locations = [self.order.locate(sample) for sample in samples]
        shards = list(dict.fromkeys(self._dataset.shards[place.source][place.shard] for place in locations))
        more = f" and {len(shards) - 2} more" if len(shards) > 2 else ""
        worker = (number - self._numbers.start) % self._workers  # torch assigns micro-steps to workers in turn
        return (
            f"data.workers: no batch after {self._timeout_s:g} s (guards.timeout_s): worker {worker} of "
            f"{self._workers} (pid {batches._workers[worker].pid}) must load samples {min(samples, default=-1)} to "
            f"{max(samples, default=-1)} from {', '.join(shards[:2])}{more}; check whether that disk responds and "
            f"whether the process is stopped, or raise guards.timeout_s. {shared_memory()}"
        )


def is_lost_worker(error: RuntimeError) -> bool:
    """Return whether an error is torch's (2.13) report of a dead worker.

    torch raises it from a SIGCHLD handler, so it can appear in any code of the parent process.
    """
    return str(error).startswith("DataLoader worker (pid")


def lost_worker_message(error: Exception) -> str:
    """Return the error message for a dead worker process."""
    return (
        f"data.workers: a worker process was lost ({error}); the most frequent cause is that the machine ran out of"
        " memory: use fewer workers or a smaller prefetch"
    )


@dataclass(frozen=True)
class _OpenShard:
    """A shard that a worker keeps open."""

    reader: ShardReader
    index: ShardIndex
    encoded: EncodedShard | None


@dataclass(frozen=True)
class _Failure:
    """A system error, returned by a worker as a value."""

    message: str


class _MicroBatchDataset(Dataset):
    """Maps a micro-batch number to its batch. Each process opens shards for itself; see `__getstate__`."""

    def __init__(
        self,
        order: Order,
        layout: BatchLayout,
        sources: Sequence[Source],
        shards: list[list[str]],
        spec: SampleSpec,
        seed: int,
        dp_rank: int,
        encoded: Encoded | None,
    ):
        self.order, self.layout, self.shards, self.spec = order, layout, shards, spec
        self.seed, self.dp_rank, self.encoded = seed, dp_rank, encoded
        self.tasks = [source_task(spec.task, source) for source in sources]
        self.specs = [spec.of_source(source) for source in sources]
        self.opened: OrderedDict[tuple[int, int], _OpenShard] = OrderedDict()

    def __getitem__(self, micro_step: int) -> Batch | _Failure:
        try:
            batch = self.load(micro_step)
            if get_worker_info() is not None:
                _share(batch)
            return batch
        except UserError as error:
            return _Failure(str(error))

    def load(self, micro_step: int) -> Batch:
        numbers = self.layout.samples(micro_step, self.dp_rank)
        source = self.order.source(self.layout.place(micro_step)[0])
        slots, stored, one_token = self.tasks[source].slots(self.spec), {}, {}
        if self.encoded is not None:
            del slots["images"]
            stored = self.encoded.empty(self.order.sources[source].name, len(numbers))
            one_token = self.encoded.token_states(self.order.sources[source].name)
        # The prompt of a padding row and of a bad sample has one token: a pipeline sends no empty tensor.
        one_token |= {
            name: torch.from_numpy(np.zeros(1, kind)) for name, (shape, kind) in slots.items() if shape is None
        }
        packed = {name: [token] * len(numbers) for name, token in one_token.items()}
        arrays = {name: np.zeros((len(numbers), *shape), t) for name, (shape, t) in slots.items() if shape is not None}
        arrays |= {name: np.zeros((len(numbers), *d.shape), np.float32) for name, d in self.spec.draws.items()}
        weight = np.zeros(len(numbers), np.float32)
        errors = []
        for row, number in enumerate(int(n) for n in numbers):
            if number == PADDING:
                continue
            # Before `_fill`: a bad sample has draws too.
            for name, draw in self.spec.draws.items():
                arrays[name][row] = _draw(draw_generator(self.seed, f"draw/{name}", number), draw)
            error = self._fill(arrays, packed, stored, row, number)
            if error is None:
                weight[row] = 1
            else:
                errors.append(error)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()} | stored
        tensors |= {name: torch.cat(rows) for name, rows in packed.items()}
        if packed:
            tensors["lengths"] = torch.tensor([len(row) for row in packed["tokens"]])
        return {**tensors, "weight": torch.from_numpy(weight), "sample": torch.from_numpy(numbers), "errors": errors}

    def _fill(
        self,
        arrays: dict[str, np.ndarray],
        packed: dict[str, list[torch.Tensor]],
        stored: dict[str, torch.Tensor],
        row: int,
        number: int,
    ) -> dict[str, Any] | None:
        """Write a sample into its row of the batch; return the error to report if it is a bad sample."""
        place = self.order.locate(number)
        shard, opened = self.shards[place.source][place.shard], self._open(place.source, place.shard)
        table = opened.index.members(place.member)
        members = Members(tuple(table), lambda extension: opened.reader.read_member(*table[extension]))
        task, spec = self.tasks[place.source], self.specs[place.source]

        def draws(purpose: str) -> np.random.Generator:
            return draw_generator(self.seed, purpose, number)

        try:
            if opened.encoded is None:
                values = task.fill(members, spec, draws)
            else:
                assert isinstance(task, Conditioned)
                tokens = task.tokens(members, spec, draws)
                for name, states in opened.encoded.fill(stored, row, place.member, tokens).items():
                    packed[name][row] = states
                values = {"tokens": tokens}
        except BadSample as error:
            source, key = self.order.sources[place.source].name, opened.index.keys[place.member]
            return {"sample": number, "source": source, "shard": shard, "key": key, "reason": str(error)}
        for name, value in values.items():
            if name in packed:
                packed[name][row] = torch.from_numpy(value)
            else:
                arrays[name][row] = value
        return None

    def _open(self, source: int, number: int) -> _OpenShard:
        if (source, number) in self.opened:
            self.opened.move_to_end((source, number))
            return self.opened[source, number]
        shard, name = self.shards[source][number], self.order.sources[source].name
        reader, index = ShardReader(shard), read_index(shard)
        check_fresh(shard, index.tar_bytes, reader.size_bytes)
        if len(self.opened) >= OPEN_SHARDS:
            self.opened.popitem(last=False)[1].reader.close()
        encoded = None if self.encoded is None else self.encoded.shard(name, number)
        self.opened[source, number] = _OpenShard(reader, index, encoded)
        return self.opened[source, number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}


def shared_memory() -> str:
    """Return how full the shared memory is through which worker processes pass batches, as text."""
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return "The system shows no shared memory"
    return f"{SHARED_MEMORY}: {usage.free / 1e6:.2f} MB free of {usage.total / 1e6:.2f} MB"


def _share(batch: Batch) -> None:
    """Move a worker's batch to shared memory, in place. Raises UserError if there is not enough.

    torch (2.13) would do this in the feeder thread of the queue, which prints an exception and drops the batch, so the
    parent would wait forever.
    """
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.numel()]
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size = sum(tensor.nbytes for tensor in tensors) / 1e6
        remedy = "let the process open more files (ulimit -n)"
        if "open files" not in str(error):
            remedy = "give the container more (docker run --shm-size=8g)"
        raise UserError(
            f"{shared_memory()}; a worker process could not pass a batch of {size:.2f} MB through it "
            f"({str(error).rpartition(': ')[2]}): {remedy} or set data.workers=0"
        ) from None


def _identity(batch: Any) -> Any:
    return batch


def _draw(generator: np.random.Generator, draw: Draw) -> np.ndarray:
    if draw.distribution == "normal":
        return generator.standard_normal(draw.shape, dtype=np.float32)
    return generator.random(draw.shape, dtype=np.float32)


def _start_worker(_: int) -> None:
    """Prepare a worker process: it ignores the signals that the trainer handles, and exits when the trainer does.

    A worker also holds the file locks that it inherited, so a worker that outlives its parent would block a new run.
    """
    torch.set_num_threads(1)
    for name in PARENT_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    end_with_parent()
