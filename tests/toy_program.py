"""A program of six small layers with every feature the engine must bear, and its plain-torch twin.

A frozen branch written without gradient, two learning-rate groups, a loss term in the middle of the
list, a batch that no micro-batch divides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from launching import preload
from torch import Tensor, nn

from parallel.optimizers import OPTIMIZERS
from parallel.program import Layer, Program

preload("deepspeed.pipe", "deepspeed.runtime.zero.muon.muon_optimizer")

GLOBAL_BATCH, MICRO_BATCH, WIDTH = 21, 2, 16
EMA_DECAY = 0.9
INPUTS = ("x", "a")
"""Two of one shape and not in alphabetical order: a mix-up would change the curve."""
TERMS = {"distance": 1.0, "size": 0.5}
LR = {"main": 1e-2, "first": 3e-3}
BETAS, DECAY = (0.9, 0.95), {"main": 0.01, "first": 0.0}


class Widen(Layer):
    reads, writes = ("x",), ("h",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"h": torch.tanh(self.linear(x.to(self.linear.weight.dtype)))}


class Teacher(Widen):
    reads, writes, detached = ("a",), ("t",), frozenset({"t"})

    def forward(self, a: Tensor) -> dict[str, Tensor]:
        return {"t": self.linear(a.to(self.linear.weight.dtype))}


class Residual(Layer):
    reads, writes = ("h",), ("h",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"h": h + torch.relu(self.linear(h))}


class Distance(Layer):
    reads, writes = ("h", "t"), ("distance",)

    def forward(self, h: Tensor, t: Tensor) -> dict[str, Tensor]:
        return {"distance": (h.float() - t.float()).square().mean(1)}


class Size(Layer):
    reads, writes = ("h",), ("size",)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, h: Tensor) -> dict[str, Tensor]:
        return {"size": self.linear(h).float().squeeze(1).square()}


class Toy(nn.Module):
    """Owner of the layers; `layers.0` is frozen, `layers.1` is the group `first`."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([Teacher(), Widen(), Residual(), Distance(), Residual(), Size()])
        self.layers[0].requires_grad_(False)

    def groups(self) -> list[dict[str, Any]]:
        """Two groups, as the trainer would make them."""
        first = [p for n, p in self.named_parameters() if n.startswith("layers.1.")]
        main = [p for n, p in self.named_parameters() if not n.startswith(("layers.0.", "layers.1."))]
        both = (("main", main), ("first", first))
        return [{"name": n, "params": params, "weight_decay": DECAY[n], "betas": BETAS} for n, params in both]


def muon_groups(model: Toy) -> list[dict[str, Any]]:
    """Matrices for Muon, the rest for its AdamW."""
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.use_muon = parameter.dim() == 2
    keys = {
        "main": {"use_muon": True, "momentum": 0.95},
        "first": {"use_muon": False, "betas": BETAS, "eps": 1e-8},
    }
    return [
        {"name": name, "params": [p for p in trained if p.use_muon == own["use_muon"]], "weight_decay": 0.0, **own}
        for name, own in keys.items()
    ]


def inputs(step: int) -> Tensor:
    """The global batch of a step (GLOBAL_BATCH, 8)."""
    return torch.randn(GLOBAL_BATCH, 8, generator=torch.Generator().manual_seed(step))


def micro_batches(step: int, rank: int, ranks: int, size: int, poison: bool = False) -> Iterator[dict[str, Tensor]]:
    """This rank's padded micro-batches of a step; `poison` puts a NaN into the last sample."""
    x = inputs(step)
    if poison:
        x[-1] = float("nan")
    for i in range(micro_steps(ranks, size)):
        part = x[(i * ranks + rank) * size :][:size]
        padded, weight = torch.zeros(size, 8), torch.zeros(size)
        padded[: len(part)], weight[: len(part)] = part, 1.0
        yield {"x": padded, "a": padded.flip(1), "weight": weight}


def micro_steps(ranks: int, size: int) -> int:
    return -(-GLOBAL_BATCH // (ranks * size))


def plain_torch(
    steps: int, clip: float, ema_decay: float, optimizer_name: str = "adamw"
) -> tuple[list[tuple[float, float]], dict[str, dict[str, Tensor]]]:
    """The same training in plain torch on the whole batch: the curve, and weights and EMA by name."""
    model = Toy()
    program = Program(list(model.layers), INPUTS, list(TERMS))  # type: ignore[arg-type]
    groups = model.groups()
    for group in groups:
        group["lr"] = LR[group["name"]]
    optimizer = OPTIMIZERS[optimizer_name].build(groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    ema = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    curve = []
    for step in range(steps):
        terms = program({"x": inputs(step), "a": inputs(step).flip(1)})
        loss = (terms * torch.tensor(list(TERMS.values()))).sum() / GLOBAL_BATCH
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            if name in ema:
                ema[name].lerp_(parameter.detach(), 1 - ema_decay)
        curve.append((loss.item(), norm.item()))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return curve, {"model": weights, "ema": ema}


def engine_for(model: Any, zero: int, pipeline: int, clip: float, optimizer: str = "adamw", groups: Any = None) -> Any:
    from parallel.launch.world import start
    from parallel.topology import Layout, Topology
    from parallel.zero.config import EngineSettings
    from parallel.zero.engine import Engine, name_parameters

    launch, topology = start(), Topology(Layout(pipeline=pipeline, zero=zero))
    name_parameters(model)
    settings = EngineSettings(
        precision="fp32",
        micro_batch=MICRO_BATCH,
        micro_steps=micro_steps(topology.data_size, MICRO_BATCH),
        global_batch=GLOBAL_BATCH,
        clip=clip,
        ema_decay=EMA_DECAY,
    )
    groups = groups or model.groups()
    layers, costs = list(model.layers), [1.0] * len(model.layers)
    return Engine(layers, INPUTS, TERMS, groups, OPTIMIZERS[optimizer], topology, launch.device, settings, costs)


def train(engine: Any, first: int, steps: int, poisoned: tuple[int, ...] = (), lr: dict = LR) -> list[tuple]:
    topology, records = engine.topology, []
    for step in range(first, first + steps):
        batches = micro_batches(step, topology.data_rank, topology.data_size, MICRO_BATCH, step in poisoned)
        record = engine.step(batches, lr)
        terms = topology.sum(record.terms if topology.reports_metrics else torch.zeros_like(record.terms))
        loss = sum(c * float(t) for c, t in zip(TERMS.values(), terms, strict=True))
        records.append((loss, float(record.grad_norm), record.skipped))
    return records
