"""One training step: forward over groups of equal-sized views, loss, backward, update.

The order of an update: the gradient is averaged over ranks, the step is skipped where the loss or
the gradient's norm is not finite, the gradient is scaled to `clip_norm`, the optimizer reads it.

With a fused optimizer nothing waits for the device: the optimizer's kernel skips a step whose loss
or gradient is not finite, and metrics are returned as tensors.

Shapes: N batch, C channels, S pixels per side, F features, V views.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from fastssl.config import Config
from fastssl.device import is_out_of_memory, out_of_memory_reason
from fastssl.distributed import Ranks
from fastssl.objectives.base import Objective
from fastssl_pipelines import Batch, Pipeline
from fastssl_pipelines.engines.streaming import StreamingPipeline

Metrics = dict[str, Tensor]


class Model(nn.Module):
    """Backbone and objective as one module: views -> (metrics, features per view)."""

    def __init__(self, backbone: nn.Module, objective: Objective, parts: int = 1):
        super().__init__()
        self.backbone, self.objective, self.parts = backbone, objective, parts

    def forward(self, views: Sequence[Tensor], index: Tensor) -> tuple[Metrics, list[Tensor]]:
        features = view_features(self.backbone, views, self.parts)
        return self.objective(features, index), [f.detach() for f in features]


def view_features(backbone: nn.Module, views: Sequence[Tensor], parts: int = 1) -> list[Tensor]:
    """V tensors (N, C, S, S) -> V tensors (N, F), one pass per group of adjacent equal sizes.

    With parts > 1 each pass is split into parts whose activations are recomputed in the backward
    pass: the memory of one part, and the same loss over the whole batch. Only batch norm sees
    parts.
    """
    features: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape[-1]):
        same = list(group)
        images = torch.cat(same)
        out = backbone(images) if parts == 1 else _in_parts(backbone, images, parts)
        features += out.chunk(len(same))
    return features


def _in_parts(backbone: nn.Module, images: Tensor, parts: int) -> Tensor:
    contexts = partial(_recompute_contexts, backbone)
    out = [
        checkpoint(backbone, part, use_reentrant=False, context_fn=contexts)
        for part in images.chunk(parts)
    ]
    return torch.cat(out)


def _recompute_contexts(backbone: nn.Module) -> tuple[Any, Any]:
    """The contexts of the forward pass and of its recomputation, which must not update the running
    statistics a second time."""
    return nullcontext(), _fixed_running_statistics(backbone)


@contextmanager
def _fixed_running_statistics(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, rate in zip(norms, rates, strict=True):
            norm.momentum = rate


class Step:
    """Forward, gradient over all ranks, update: `step(views, index, lr)`."""

    def __init__(
        self,
        config: Config,
        model: Model,
        optimizer: Optimizer,
        ranks: Ranks,
        log: Callable[[str], None],
    ):
        self._model, self._optimizer, self._ranks, self._log = model, optimizer, ranks, log
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        self._bfloat16 = config.precision == "bfloat16"
        self._clip_norm = config.clip_norm
        self._skips_nonfinite = bool(optimizer.defaults.get("fused"))
        self._eager = _data_parallel(model, ranks)
        self._graphs = config.cuda_graphs
        mode = "reduce-overhead" if config.cuda_graphs else None
        self._forward = torch.compile(self._eager, mode=mode) if config.compile else self._eager

    def __call__(
        self, views: Sequence[Tensor], index: Tensor, lr: float
    ) -> tuple[Metrics, list[Tensor]]:
        """V views (N, C, S, S), their images' indices (N,) -> metrics, features per view (N, F).

        Metrics are those of the objective, "grad_norm" before clipping, with `clip_norm`
        "clip_scale", the factor on the gradient, and "finite", () bool: False where the step was
        skipped. MemoryError where the step does not fit, with what does.
        """
        try:
            return self._step(views, index, lr)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = out_of_memory_reason(error)
        # The error is gone here, and with its traceback the activations that it held.
        raise MemoryError(
            f"out of memory in a training step ({reason}); {self._fits(views, index)}"
        )

    def _step(
        self, views: Sequence[Tensor], index: Tensor, lr: float
    ) -> tuple[Metrics, list[Tensor]]:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self._model.objective.set_lr(lr)
        try:
            metrics, features = self._gradient(views, index)
        except _compile_errors() as error:
            if self._forward is self._eager:
                raise
            reason = " ".join(str(error).split())[:200]
            self._log(f"torch.compile failed, continuing without it: {reason}")
            self._forward = self._eager
            metrics, features = self._gradient(views, index)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        bad = (~(norm.isfinite() & metrics["loss"].detach().isfinite())).float()
        if self._ranks.world > 1:  # all ranks must skip the same steps, or their weights diverge
            dist.all_reduce(bad, dist.ReduceOp.MAX, group=self._ranks.group)
        metrics["grad_norm"] = norm
        if self._clip_norm:
            metrics["clip_scale"] = self._clip(norm)
        self._update(bad)
        return {**metrics, "finite": bad == 0}, features

    def _gradient(self, views: Sequence[Tensor], index: Tensor) -> tuple[Metrics, list[Tensor]]:
        self._optimizer.zero_grad(set_to_none=True)
        if self._graphs:  # the graphs may overwrite the last step's outputs
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            metrics, features = self._forward(views, index)
        metrics["loss"].backward()
        return {name: value.detach() for name, value in metrics.items()}, features

    def _clip(self, norm: Tensor) -> Tensor:
        """Scale the gradient of total norm () to at most `clip_norm`; the factor, ()."""
        nn.utils.clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        return (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch computes it

    def _update(self, bad: Tensor) -> None:
        """The optimizer's step unless bad, () float32, is 1. Fused optimizers read it on the
        device, as they do for a GradScaler; others cost a sync."""
        optimizer: Any = self._optimizer
        if self._skips_nonfinite:
            optimizer.found_inf = bad
            optimizer.step()
        elif not bad.item():
            optimizer.step()

    def _fits(self, views: Sequence[Tensor], index: Tensor) -> str:
        """What to change so that a step of these views fits: the fewest parts (`accumulate`), else
        the largest batch, each found by halving and by taking such a step at a rate of 0."""
        parts, rows = self._model.parts, len(index)
        if self._ranks.world > 1:  # the other ranks wait in a collective: nothing can be tried
            return f"try --accumulate {2 * parts}, or a batch of fewer than {rows} images a rank"
        self._log("out of memory; trying smaller steps")
        self._optimizer.state.clear()  # of the first step, it may be half allocated
        no_compile = " --no-compile" if self._forward is not self._eager else ""
        while parts < rows:
            parts *= 2
            if self._is_possible(views, index, parts):
                return (
                    f"--accumulate {parts}{no_compile} fits, as a step in {parts} parts has shown"
                )
        while rows > 3:
            rows //= 2
            if self._is_possible([view[:rows] for view in views], index[:rows], self._model.parts):
                return f"--batch-size {rows} fits, as a step of {rows} images has shown"
        return "not even a step of 2 images fits; use a smaller --backbone or --image-size"

    def _is_possible(self, views: Sequence[Tensor], index: Tensor, parts: int) -> bool:
        forward, given = self._forward, self._model.parts
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._forward, self._model.parts = self._eager, parts
        try:
            with _fixed_running_statistics(self._model):
                self._step(views, index, 0.0)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            self._forward, self._model.parts = forward, given


def equal_rows(batch: Batch, pipeline: Pipeline, ranks: Ranks) -> Batch:
    """`batch` cut to the rows that every rank has: a streamed batch is shorter where an image could
    not be read, and most losses gather equal batches. A collective call."""
    if ranks.world == 1 or not isinstance(pipeline, StreamingPipeline):
        return batch
    (fewest,) = ranks.all_reduce_max(-len(batch.index))
    rows = slice(-fewest)
    return Batch([view[rows] for view in batch.views], batch.index[rows], batch.params)


def _data_parallel(model: Model, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over ranks, except those of sharded parameters."""
    if ranks.world == 1:
        return model
    sharded = [f"objective.{name}" for name in model.objective.sharded_names()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, process_group=ranks.group)


def _compile_errors() -> tuple[type[Exception], ...]:
    """The errors of torch.compile. Their package is slow to import, so only after an error."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)
