"""The samples of each global step: pure functions of (seed, step), the same under every layout.

The position of a run is one integer, the number of consumed samples, counted over epochs. Sample number n belongs to
global step n // global_batch and to a task block of `task_block` consecutive slots. All samples of a block come from
one source. Everything is computed in closed form from n, so resuming replays nothing. A step costs O(its number of
samples); a new shuffle window costs a permutation of 4096 numbers.

The trade-off is a local shuffle: samples are mixed within a window of 4096 that spans a few randomly chosen shards, not
over the whole source. In return a reader needs only a few open shards at a time.

Guarantees, each with a test: an epoch of a source takes every sample once; the share of each source is exact over 1000
blocks; every layout sees the same samples, each exactly once with weight 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from parallel.errors import UserError

WINDOW = 4096  # samples that are shuffled together
CYCLE = 1000  # blocks over which every source has its exact share of the mixture
PADDING = -1  # the sample number of a slot that holds no sample


def draw_generator(seed: int, purpose: str, number: int) -> np.random.Generator:
    """Return the Philox generator of (seed, purpose, number), e.g. (0, "crop", sample number).

    Generators of different keys never overlap: seed and purpose form the 128-bit key, and the number is in the upper
    half of the 256-bit counter, so each has 2**128 blocks of its own.
    """
    key = np.array([seed % 2**64, _purpose_key(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, number, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class SourceShape:
    """The properties of a source that determine the order: name, weight and the number of samples per shard."""

    name: str
    weight: float
    shard_samples: tuple[int, ...]

    @property
    def samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.shard_samples)


@dataclass(frozen=True)
class Location:
    """The location of a sample: source index, epoch of the source, shard index, sample index in the shard."""

    source: int
    epoch: int
    shard: int
    member: int


@dataclass(frozen=True)
class Blocks:
    """The division of a global batch into task blocks; the last block of a step may be shorter."""

    global_batch: int
    task_block: int

    def __post_init__(self) -> None:
        for name in ("global_batch", "task_block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def per_step(self) -> int:
        """Blocks of one global step."""
        return -(-self.global_batch // self.task_block)

    def length(self, block: int) -> int:
        """Slots of a block."""
        first = block % self.per_step * self.task_block
        return min(self.task_block, self.global_batch - first)

    def first_sample(self, block: int) -> int:
        """Sample number of the first slot of a block."""
        step, within = divmod(block, self.per_step)
        return step * self.global_batch + within * self.task_block


class Order:
    """Maps sample numbers to samples: block -> source, ordinal within the source -> epoch and member.

    Raises UserError for a mixture that is not possible: no source, an empty source, a weight that is not positive or
    too small for one block in 1000.
    """

    def __init__(self, seed: int, sources: Sequence[SourceShape], global_batch: int, task_block: int):
        self.seed, self.sources, self.blocks = seed, tuple(sources), Blocks(global_batch, task_block)
        _check_sources(self.sources)
        self._shares = _shares([source.weight for source in self.sources])
        self._epochs: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def source(self, block: int) -> int:
        """Return the index of the source of a block."""
        return int(self._mixture(*self._kind(block))[0])

    def locate(self, sample: int) -> Location:
        """Return the location of sample number `sample` of the run."""
        step, within = divmod(sample, self.blocks.global_batch)
        block_of_step, offset = divmod(within, self.blocks.task_block)
        block = step * self.blocks.per_step + block_of_step
        source = self.source(block)
        epoch, position = divmod(self._ordinal(block, source) + offset, self.sources[source].samples)
        return self._member(source, epoch, position)

    def epoch(self, sample: int) -> int:
        """Return the epoch that sample number `sample` belongs to, counted within its source."""
        return self.locate(sample).epoch

    def _kind(self, block: int) -> tuple[str, int]:
        """Return whether a block is "full" or "short", and its number among the blocks of that kind.

        The two kinds have separate mixtures, so that the samples taken from a source have a closed form.
        """
        step, within = divmod(block, self.blocks.per_step)
        full = self.blocks.global_batch // self.blocks.task_block
        return ("full", step * full + within) if within < full else ("short", step)

    def _mixture(self, kind: str, number: int) -> tuple[int, np.ndarray]:
        """Return the source of block `number` of a kind, and how many earlier blocks of the kind each source has."""
        cycle, position = divmod(number, CYCLE)
        order, before = _cycle(self.seed, kind, cycle, self._shares)
        return int(order[position]), before[position] + cycle * np.array(self._shares)

    def _ordinal(self, block: int, source: int) -> int:
        """Return how many samples of `source` the run takes before this block."""
        step, within = divmod(block, self.blocks.per_step)
        full = self.blocks.global_batch // self.blocks.task_block
        short_length = self.blocks.global_batch - full * self.blocks.task_block
        _, full_before = self._mixture("full", step * full + min(within, full))
        ordinal = int(full_before[source]) * self.blocks.task_block
        if short_length:
            ordinal += int(self._mixture("short", step)[1][source]) * short_length
        return ordinal

    def _member(self, source: int, epoch: int, position: int) -> Location:
        """Shuffle in two levels: permute the shards, then the positions in each window over the permuted shards."""
        shape = self.sources[source]
        window, offset = divmod(position, WINDOW)
        length = min(WINDOW, shape.samples - window * WINDOW)
        permuted = _permutation(self.seed, f"window/{shape.name}/{epoch}", window, length)
        position = window * WINDOW + int(permuted[offset])
        shards, ends = self._shards(source, epoch)
        place = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[place])
        return Location(source, epoch, shard, position - int(ends[place]) + shape.shard_samples[shard])

    def _shards(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of an epoch in their order and the position at which each ends."""
        if (source, epoch) not in self._epochs:
            shape = self.sources[source]
            if len(self._epochs) >= 4 * len(self.sources):  # bounds the cache in a long run
                self._epochs.clear()
            shards = _permutation(self.seed, f"shards/{shape.name}", epoch, len(shape.shard_samples))
            self._epochs[source, epoch] = shards, np.cumsum(np.array(shape.shard_samples, dtype=np.int64)[shards])
        return self._epochs[source, epoch]


@dataclass(frozen=True)
class BatchLayout:
    """The division of blocks among data-parallel ranks: a block has micro-steps of micro_batch x dp_size slots."""

    blocks: Blocks
    micro_batch: int
    dp_size: int

    def __post_init__(self) -> None:
        for name in ("micro_batch", "dp_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def per_step(self) -> int:
        """Micro-steps of one global step, the same on every rank."""
        full, short = divmod(self.blocks.global_batch, self.blocks.task_block)
        return full * self._parts(self.blocks.task_block) + self._parts(short)

    def place(self, micro_step: int) -> tuple[int, int]:
        """Return (block, micro-step within the block) of a micro-step counted over the whole run."""
        step, within = divmod(micro_step, self.per_step)
        block_of_step, part = divmod(within, self._parts(self.blocks.task_block))
        return step * self.blocks.per_step + block_of_step, part

    def samples(self, micro_step: int, rank: int) -> np.ndarray:
        """Return the sample numbers (micro_batch,) int64 of a rank in a micro-step; PADDING behind the block's end."""
        block, part = self.place(micro_step)
        first = (part * self.dp_size + rank) * self.micro_batch
        slots = first + np.arange(self.micro_batch, dtype=np.int64)
        return np.where(slots < self.blocks.length(block), self.blocks.first_sample(block) + slots, PADDING)

    def _parts(self, slots: int) -> int:
        return -(-slots // (self.micro_batch * self.dp_size))


def micro_steps(global_batch: int, task_block: int, micro_batch: int, dp_size: int) -> int:
    """Return the number of micro-steps (gradient accumulation) of one global step."""
    return BatchLayout(Blocks(global_batch, task_block), micro_batch, dp_size).per_step


@lru_cache(maxsize=256)
def _purpose_key(purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")


@lru_cache(maxsize=64)
def _permutation(seed: int, purpose: str, number: int, length: int) -> np.ndarray:
    return draw_generator(seed, purpose, number).permutation(length)


@lru_cache(maxsize=16)
def _cycle(seed: int, kind: str, cycle: int, shares: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sources of 1000 blocks (1000,) and how many blocks each source has before each block (1000, S)."""
    members = np.repeat(np.arange(len(shares)), shares)
    order = members[_permutation(seed, f"mixture/{kind}", cycle, CYCLE)]
    taken = order[:, None] == np.arange(len(shares))[None]
    return order, np.cumsum(taken, axis=0) - taken


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the blocks of each source in a cycle by the largest remainder method; ties go to the earlier source."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    shares = np.floor(exact).astype(np.int64)
    for source in np.argsort(shares - exact, kind="stable")[: CYCLE - int(shares.sum())]:
        shares[source] += 1
    return tuple(int(share) for share in shares)


def _check_sources(sources: Sequence[SourceShape]) -> None:
    if not sources:
        raise UserError("data.sources is empty; a run needs at least one source")
    names = [source.name for source in sources]
    for index, source in enumerate(sources):
        where = f"data.sources[{index}] ({source.name})"
        if source.name in names[:index]:
            raise UserError(f"{where}: another source has this name; it keys the shuffle, so names must be unique")
        if not (source.weight > 0 and np.isfinite(source.weight)):
            raise UserError(f"{where}: weight is {source.weight}; it must be positive")
        if source.samples == 0:
            raise UserError(f"{where}: its shards hold no samples")
    for index, share in enumerate(_shares([source.weight for source in sources])):
        if share == 0:
            raise UserError(
                f"data.sources[{index}] ({sources[index].name}): weight {sources[index].weight} gives less than one"
                f" block in {CYCLE} of the mixture; raise it or remove the source"
            )
