"""Estimate what a run needs before it starts: parameters, peak memory by part, steps, and the batch
size that fits.

One step runs on fake tensors, which have a shape and a device but no memory, so nothing is computed
and nothing is written. Seconds are not known without real steps; `measure_step_s` takes a few.

Shapes: N batch, M data set, V views.
"""

import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.backbones import build_backbone, feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.loading import build_views, open_data
from fastssl.data.splits import ArraySplit, open_split
from fastssl.device import choose_device, resolved
from fastssl.distributed import SINGLE_PROCESS
from fastssl.objectives import build_objective, complete
from fastssl.objectives.base import Objective
from fastssl.objectives.oracles import Oracle, uses_oracle
from fastssl.optim import build_optimizer
from fastssl.step import Model, Step
from fastssl_pipelines.memory import GIB, free_bytes

MEASURED_STEPS = 4  # the first warms up
MIB = 2**20
USABLE = 0.9  # of the free memory; the rest is for the allocator and the libraries' workspaces
MAX_AUTO_BATCH = 4096
MIN_BATCHES = 10  # of an epoch, for an automatic batch size
AHEAD = 2  # batches that an engine renders ahead


@dataclass(frozen=True)
class DryRun:
    """Parameters by part, MiB at the peak of a step by part, MiB that the device has free, the
    largest batch size that fits, training images, and optimizer steps."""

    parameters: dict[str, int]
    mib: dict[str, float]
    free_mib: float
    batch_size: int
    largest_batch: int
    images: int
    steps: int

    @property
    def peak_mib(self) -> float:
        return sum(self.mib.values())

    def lines(self) -> list[str]:
        """The estimate as text."""
        peak, free = self.peak_mib * MIB / GIB, self.free_mib * MIB / GIB
        fits = "fits" if self.batch_size <= self.largest_batch else "does not fit"
        return [
            *(f"{name}: {count:,} parameters" for name, count in self.parameters.items()),
            *(f"{name}: {mib:,.1f} MiB" for name, mib in self.mib.items()),
            f"peak memory: about {peak:,.2f} GiB of {free:,.2f} GiB that are free; {fits}",
            f"largest batch size that fits: about {self.largest_batch:,}",
            f"{self.steps:,} steps; add --measure for their time, which takes a few real steps",
        ]


def dry_run(config: Config) -> DryRun:
    """Estimate the run of `config` within seconds; no image is decoded where `data` is files.

    ValueError where the run would raise it for its settings; memory that does not fit is stated.
    """
    config = resolved(complete(config))
    device = choose_device(config.device)
    split = open_split(config, "train")
    count = len(split)
    if config.batch_size > count:
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the data set of {count} images"
        )
    parameters, mib = step_memory(config, device, count)
    fixed = {"weights": mib["weights"], "optimizer": mib["optimizer"]}
    if config.engine == "resident":
        held = split.pixels.nbytes if isinstance(split, ArraySplit) else _decoded(config, count)
        mib["images"] = fixed["images"] = held / MIB
    per_image = (sum(mib.values()) - sum(fixed.values())) / config.batch_size
    free = free_bytes(device) / MIB
    return DryRun(
        parameters=parameters,
        mib=mib,
        free_mib=free,
        batch_size=config.batch_size,
        largest_batch=max(0, min(count, int((USABLE * free - sum(fixed.values())) / per_image))),
        images=count,
        steps=config.epochs * (count // config.batch_size),
    )


def auto_batch_size(config: Config) -> int:
    """The largest power of two that fits, at most 4,096 and a tenth of the images.

    ValueError where not even two images fit.
    """
    found = dry_run(config)
    limit = min(found.largest_batch, MAX_AUTO_BATCH, max(2, found.images // MIN_BATCHES))
    if limit < 2:
        raise ValueError("--batch-size auto: no batch fits; lower --image-size or --views")
    return 1 << (limit.bit_length() - 1)


def step_memory(
    config: Config, device: torch.device, count: int
) -> tuple[dict[str, int], dict[str, float]]:
    """(parameters by part, MiB by part at the peak of a step) on M = `count` images, by one step on
    fake tensors; the device itself need not exist."""
    with torch.device("meta"):  # networks read values while they are built, fake tensors have none
        backbone = build_backbone(config.backbone, stem=config.stem, image_size=config.image_size)
    with FakeTensorMode():
        _allocate(backbone, device)
        with device:
            objective = _objective(config, backbone, count)
        model = Model(backbone, objective, config.accumulate).train()
        optimizer = build_optimizer(config, [backbone, objective])
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        n, sizes = config.batch_size, [view.size for view in build_views(config)]
        with LiveBytes([*model.parameters(), *model.buffers()]) as live:
            weights = live.now
            for parameter in trained:  # the optimizer's state is there from the second step on
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            moments = live.now - weights
            views = [torch.empty(n, 3, size, size, device=device) for size in sizes]
            index = torch.zeros(n, dtype=torch.int64, device=device)
            before, live.peak = live.now, live.now
            bfloat16 = config.precision == "bfloat16"
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                metrics, _ = model(views, index)
            activations = live.now - before
            metrics["loss"].backward()
            nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            optimizer.step()
        mib = {
            "weights": weights / MIB,
            "optimizer": moments / MIB,
            "activations": activations / MIB,
            "gradients and temporary tensors": (live.peak - before - activations) / MIB,
            "views, two batches ahead": (1 + AHEAD) * sum(view.nbytes for view in views) / MIB,
        }
    counts = {
        "backbone": sum(p.numel() for p in backbone.parameters()),
        "head of the method": sum(p.numel() for p in objective.parameters()),
    }
    return counts, mib


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive while the block runs, `now` and at the `peak`,
    those of `tensors` from the start."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._alive:
            self._alive.add(id(storage))
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def measure_step_s(config: Config, log: Callable[[str], None]) -> float:
    """The median seconds of a few real steps on the run's data, after one that warms up."""
    config = resolved(complete(config))
    device = choose_device(config.device)
    data = open_data(config, device, log)
    backbone = seeded_backbone(config, device)
    objective = _objective(config, backbone, len(data.train)).to(device)
    model = Model(backbone, objective, config.accumulate).train()
    step = Step(config, model, build_optimizer(config, [backbone, objective]), SINGLE_PROCESS, log)
    times = []
    for batch in islice(data.pipeline.epoch(0), min(MEASURED_STEPS, len(data.pipeline))):
        begin = time.perf_counter()
        metrics, _ = step(batch.views, batch.index, config.lr)
        metrics["loss"].item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:] or times)


def _allocate(module: nn.Module, device: torch.device) -> None:
    """Replace a module's parameters and buffers by empty ones on `device`, shared ones by one."""
    new: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for name, old in part.named_parameters(recurse=False, remove_duplicate=False):
            if old not in new:
                data = torch.empty(old.shape, dtype=old.dtype, device=device)
                new[old] = nn.Parameter(data, old.requires_grad)
            setattr(part, name, new[old])
        for name, buffer in part.named_buffers(recurse=False, remove_duplicate=False):
            if buffer not in new:
                new[buffer] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            setattr(part, name, new[buffer])


def _objective(config: Config, backbone: nn.Module, count: int) -> Objective:
    oracle = Oracle(count) if uses_oracle(config) else None  # no labels are read
    return build_objective(
        config, features=feature_width(backbone), num_samples=count, oracle=oracle
    )


def _decoded(config: Config, count: int) -> int:
    """Bytes of the images of files that engine resident holds."""
    return count * config.load_size**2 * 3
