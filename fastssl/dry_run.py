"""Estimate what a run needs before it starts: parameters, memory by part, steps, time.

A few real steps run on the run's data, and nothing is written.

Shapes: N batch, V views.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from fastssl.backbones import feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.loading import open_data, size_step
from fastssl.device import choose_device
from fastssl.distributed import SINGLE_PROCESS
from fastssl.objectives import build_objective, complete
from fastssl.objectives.oracles import Oracle, uses_oracle
from fastssl.optim import build_optimizer
from fastssl.step import Model, Step

MEASURED_STEPS = 4  # the first warms up
MIB = 2**20


@dataclass(frozen=True)
class DryRun:
    """Parameters by part, MiB by part, optimizer steps, and the median of a few steps' times."""

    parameters: dict[str, int]
    mib: dict[str, float]
    steps: int
    step_s: float

    @property
    def train_s(self) -> float:
        """Estimated seconds of training."""
        return self.steps * self.step_s

    def lines(self) -> list[str]:
        """The estimate as text."""
        total = sum(self.mib.values())
        return [
            *(f"{name}: {count:,} parameters" for name, count in self.parameters.items()),
            *(f"{name}: {mib:,.1f} MiB" for name, mib in self.mib.items()),
            f"total memory: {total:,.1f} MiB",
            f"{self.steps:,} steps of {1e3 * self.step_s:,.1f} ms: about {self.train_s:,.0f} s",
        ]


def dry_run(config: Config, log: Callable[[str], None]) -> DryRun:
    """Estimate the run of `config`; ValueError where that run would raise it."""
    config, device = complete(config), choose_device(config.device)
    size_step(config)  # refuses sizes that the backbone cannot take, before data is read
    data = open_data(config, device, log)
    backbone = seeded_backbone(config, device)
    count = len(data.train)
    oracle = Oracle(count) if uses_oracle(config) else None  # no labels are read
    objective = build_objective(
        config,
        features=feature_width(backbone, config.image_size),
        num_samples=count,
        oracle=oracle,
    )
    model = Model(backbone, objective.to(device), config.accumulate).train()
    optimizer = build_optimizer(config, [backbone, objective])
    step = Step(config, model, optimizer, SINGLE_PROCESS, log)
    times = []
    activations = 0
    for batch in islice(data.pipeline.epoch(0), min(MEASURED_STEPS, len(data.pipeline))):
        saved = SavedTensors(model)
        begin = time.perf_counter()
        with saved.counted():
            metrics, _ = step(batch.views, batch.index, config.lr)
        metrics["loss"].item()  # waits for the device
        times.append(time.perf_counter() - begin)
        activations = saved.bytes
    moments = [x for state in optimizer.state.values() for x in state.values()]
    views = sum(view.nbytes for view in batch.views)
    on_device = getattr(getattr(data.pipeline, "images", None), "flat", None)
    return DryRun(
        parameters={
            "backbone": sum(p.numel() for p in backbone.parameters()),
            "head of the method": sum(p.numel() for p in objective.parameters()),
        },
        mib={
            "weights": _mib([*model.parameters(), *model.buffers()]),
            "gradients": _mib([p for p in model.parameters() if p.requires_grad]),
            "optimizer": _mib([x for x in moments if isinstance(x, Tensor)]),
            "activations": activations / MIB,
            "views, two batches ahead": 3 * views / MIB,
            "images": 0.0 if on_device is None else _mib([on_device]),
        },
        steps=config.epochs * len(data.pipeline),
        step_s=statistics.median(times[1:] or times),
    )


class SavedTensors:
    """Counts the bytes that a forward pass saves for its backward pass, except weights."""

    def __init__(self, model: nn.Module):
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._sizes: dict[int, int] = {}

    def counted(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def _record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def _mib(tensors: list[Tensor]) -> float:
    return sum(x.nbytes for x in tensors) / MIB
