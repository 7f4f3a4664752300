"""DIET's head: one class per image (arXiv:2302.10260), its softmax, its optimizer, its shards.

    loss = linear_cross_entropy(features, weight, index, label_smoothing=0.8)

Shapes: M data set (the number of classes), N batch, D embedding, V views, S sampled classes.
"""

import math
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl_kernels._class_softmax import class_statistics
from fastssl_kernels._class_update import class_statistics_updating
from fastssl_kernels._validation import checked, require_unit_grad
from fastssl_kernels.distributed import (
    Shard,
    all_gather_inputs,
    all_gather_rows,
    all_gather_shards,
    all_reduce_lse,
    group_name,
    shard_sizes,
)
from fastssl_kernels.linear_cross_entropy import (
    INTEGERS,
    cast_for_product,
    saves_exponentials,
    smoothed_rows,
)

EPS = 1e-8  # torch.optim.AdamW's
INIT_ROWS = 65536  # the initial weight is sampled in blocks, so that it is the same for any shards

FUSED_ONLY = (
    "DIETHead: with a fused optimizer the loss must reach backward() as it is, with gradient 1. "
    "A scaled loss (GradScaler, gradient accumulation, a loss weight) needs "
    "DIETHead(optimizer=None) and an optimizer of your own"
)


class DIETHead(nn.Module):
    """DIET's loss, a float32 scalar, of features and the indices of their images.

        head = DIETHead(len(dataset), width, optimizer="adamw", lr=1e-3)
        head(features, index).backward()      # features (N, D) or (V, N, D), index (N,) int64

    Views of one image share its class. With `optimizer=None` the weight is a parameter like others.
    With "adamw" or "sgd" the weight is updated inside backward(), block by block, as
    torch.optim.AdamW or SGD would with these arguments on the dense gradient, which never exists;
    no other call is needed, and `head.lr` may be set between steps. A step whose loss is not finite
    changes nothing. In that mode a gradient cannot be clipped by a global norm, accumulated,
    or skipped by a GradScaler: a scaled loss is refused, and `refuse_unless_plain` refuses a
    trainer's other settings.

    sample_rate: below 1, each training step takes the softmax over a sample of that share of the
        classes, drawn from (seed, draws) and always holding those of the batch (Partial FC,
        arXiv:2203.15565). An approximation: the loss is that of a data set of the sample's size,
        smoothing included. Classes outside the sample get the gradient 0, fused or not: they decay
        and move by their momentum, without which accuracy falls.
    save: as in linear_cross_entropy.
    group: ranks over which the classes are sharded; each holds about num_samples / ranks rows. The
        loss is that of all ranks' batches. state_dict holds all rows whatever the group, so that it
        loads into any other; reading it is a collective call.
    bias: a bias for each class, which DIET has not. A fused optimizer steps and decays it as the
        weight, as torch.optim.AdamW(head.parameters()) would.
    device, dtype: of weight and moments. `.to(dtype)` casts those alone: the number of updates and
        of samples are int64 and the learning rate is float64 whatever the dtype. state_dict holds
        the three, as that of a torch optimizer does.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    exp_avg: Tensor
    exp_avg_sq: Tensor
    bias_exp_avg: Tensor
    bias_exp_avg_sq: Tensor
    step: Tensor
    draws: Tensor
    _rate: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        label_smoothing: float = 0.8,
        optimizer: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.9,
        sample_rate: float = 1.0,
        save: str = "auto",
        seed: int = 0,
        group: Any = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """ValueError for an unknown optimizer, sizes below 1, or numbers outside their range."""
        super().__init__()
        _check_sizes(num_samples, dim, label_smoothing, sample_rate, save)
        _check_rule(optimizer, lr, weight_decay, betas, momentum, dtype)
        group_name(group, "DIETHead")
        self.num_samples, self.dim = num_samples, dim
        self.label_smoothing, self.optimizer, self.save = label_smoothing, optimizer, save
        self.weight_decay, self.betas, self.momentum = weight_decay, betas, momentum
        self.sample_rate, self.seed, self.group = sample_rate, seed, group
        self.world = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if num_samples < self.world:
            raise ValueError(
                f"DIETHead: {num_samples} classes over {self.world} ranks; some get none"
            )
        sizes = shard_sizes(num_samples, self.world)
        self.first, rows = sum(sizes[:rank]), sizes[rank]
        self._lr = float(lr)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self._add_class_state("", (rows, dim), momentum, like)
        if bias:
            self._add_class_state("bias", (rows,), momentum, like)
        else:
            self.register_parameter("bias", None)
        # int64 and float64 for good: see _apply
        count = torch.zeros((), dtype=torch.int64, device=device)
        self.register_buffer("step", count)  # updates made
        self.register_buffer("draws", count.clone())  # samples of classes taken
        self.register_buffer("_rate", torch.zeros((), dtype=torch.float64, device=device))
        self.reset_parameters()

    def _add_class_state(
        self, name: str, shape: tuple[int, ...], momentum: float, like: dict[str, Any]
    ) -> None:
        """The weight, or the bias, and its moments: of `shape`, or (0,) where there are none."""
        parameter = nn.Parameter(torch.empty(shape, **like), requires_grad=self.optimizer is None)
        setattr(self, name or "weight", parameter)
        moments = {"adamw": 2, "sgd": int(momentum > 0), None: 0}[self.optimizer]
        for i, moment in enumerate(("exp_avg", "exp_avg_sq")):
            zeros = torch.zeros(shape if i < moments else (0,), **like)
            self.register_buffer(f"{name}_{moment}".lstrip("_"), zeros)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A new weight and no steps made, as after construction; call it after `to_empty`."""
        for parameter in (self.weight, self.bias):
            if parameter is not None:  # as nn.Linear
                _fill_initial(parameter, self.num_samples, self.first, 1 / math.sqrt(self.dim))
        for name, buffer in self.named_buffers():
            buffer.fill_(self._lr if name == "_rate" else 0)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Casts weight and moments; `.to(dtype)` would round the rate, of which _lr is exact."""
        super()._apply(fn, recurse)
        if self._rate.dtype != torch.float64:
            self._rate = self._rate.to(torch.float64)
        self._rate.fill_(self._lr)
        return self

    @property
    def lr(self) -> float:
        """The learning rate of the next fused step."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = float(value)
        self._rate.fill_(value)  # on the device, so that a captured graph reads the new one

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """(V, N, D) or (N, D), and (N,) -> (). In a group the loss is that of all ranks' batches.

        Indices outside [0, num_samples) raise ValueError on a CPU, a device assert on CUDA.
        """
        shard = Shard(self.group, self.world, self.first, self.num_samples)
        x, labels = self._rows(features, index)
        labels = all_gather_rows(labels, shard) - self.first
        rows, classes = None, self.num_samples
        if self.training and self.sample_rate < 1:
            rows, labels = self._sample(labels)
            classes = sum(self._sample_sizes())
        fused = self.optimizer is not None and self.training and torch.is_grad_enabled()
        if fused and not x.requires_grad:
            x = x.detach().requires_grad_()  # the update needs a backward()
        weight = self.weight if rows is None else self.weight.index_select(0, rows)
        bias = self.bias if rows is None or self.bias is None else self.bias.index_select(0, rows)
        x, w, cast_bias = cast_for_product(x, weight, bias)
        x = all_gather_inputs(x, shard)
        keep = saves_exponentials(self.save, x, len(w))
        if fused:
            copy = None if w is self.weight else w
            statistics = class_statistics_updating(
                x, copy, labels, keep, rows, *self._state(), *self._rule(), *self._bias_state()
            )
        else:
            statistics = class_statistics(x, w, cast_bias, labels, keep)
        lse, target, total, lse_lo, _, _ = statistics
        lse, lse_lo, target, total = all_reduce_lse(lse, lse_lo, [target, total], shard)
        loss = smoothed_rows(lse, lse_lo, target, total, classes, self.label_smoothing).mean()
        return require_unit_grad(loss, FUSED_ONLY) if fused else loss

    def refuse_unless_plain(
        self, *, clip_norm: float | None = None, accumulate: int = 1, grad_scaler: bool = False
    ) -> None:
        """ValueError where a trainer's settings need a gradient that the fused mode never forms."""
        if self.optimizer is None:
            return
        refused = {
            "clipping by a global norm": clip_norm is not None,
            "gradient accumulation": accumulate != 1,
            "a GradScaler": grad_scaler,
        }
        for name, requested in refused.items():
            if requested:
                raise ValueError(
                    f"DIETHead: {name} needs the weight's gradient, which the fused optimizer "
                    "never forms; use optimizer=None and an optimizer of your own"
                )

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.num_samples}, {self.dim}, optimizer={self.optimizer}, bias={bias}"

    def _rows(self, features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Features as (V * N, D) and their classes (V * N,), checked."""
        if features.ndim not in (2, 3) or features.shape[-1] != self.dim:
            raise ValueError(
                f"DIETHead: features have shape {tuple(features.shape)}; wanted (N, {self.dim}) or "
                f"(V, N, {self.dim})"
            )
        if index.dtype not in INTEGERS or index.shape != features.shape[-2:-1]:
            raise ValueError(
                f"DIETHead: index is {tuple(index.shape)} {index.dtype}; wanted "
                f"({features.shape[-2]},) int64, one image for each row of a view"
            )
        index = index.long()
        labels = checked(
            index,
            (index >= 0) & (index < self.num_samples),
            f"DIETHead: an index lies outside [0, {self.num_samples}); build the head with as many "
            "samples as the data set has",
        )
        views = len(features) if features.ndim == 3 else 1
        return features.reshape(-1, self.dim), labels.repeat(views)

    def _state(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.exp_avg, self.exp_avg_sq, self.step, self._rate

    def _bias_state(self) -> tuple[Tensor, ...]:
        """The bias and its moments, or nothing without one."""
        if self.bias is None:
            return ()
        return self.bias, self.bias_exp_avg, self.bias_exp_avg_sq

    def _sharded(self) -> list[str]:
        """Names of what is sharded over ranks, rows of classes first."""
        bias = [] if self.bias is None else ["bias", "bias_exp_avg", "bias_exp_avg_sq"]
        return ["weight", "exp_avg", "exp_avg_sq", *bias]

    def _rule(self) -> tuple[str, float, float, float, float]:
        first, second = self.betas if self.optimizer == "adamw" else (self.momentum, 0.0)
        return str(self.optimizer), first, second, EPS, self.weight_decay

    def _sample_sizes(self) -> list[int]:
        """Classes that each rank samples."""
        sizes = shard_sizes(self.num_samples, self.world)
        return [math.ceil(self.sample_rate * size) for size in sizes]

    def _sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """This step's classes (S,) of this rank, ascending, and labels (N,) as indices into them.

        A hash of (seed, draws, class) orders the classes; those of the batch come first.
        """
        classes = len(self.weight)
        size = math.ceil(self.sample_rate * classes)
        if len(labels) > size:
            raise ValueError(
                f"DIETHead: sample_rate={self.sample_rate} leaves {size} of {classes} classes, "
                f"fewer than a batch's {len(labels)} rows; raise it or make the batch smaller"
            )
        is_local = (labels >= 0) & (labels < classes)
        key = _hash(
            torch.arange(self.first, self.first + classes + 1, device=labels.device), self.seed
        )
        key = _hash(key, self.draws)
        lowest = torch.iinfo(torch.int64).min
        key[labels.where(is_local, classes)] = lowest  # one spare slot at the end
        rows = key[:classes].topk(size, largest=False).indices.sort().values
        self.draws += 1
        return rows, torch.searchsorted(rows, labels).where(is_local, -1)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shard = Shard(self.group, self.world, self.first, self.num_samples)
        for name in self._sharded():
            value = destination[prefix + name]
            if len(value):
                rows = value if value.ndim == 2 else value[:, None]
                destination[prefix + name] = all_gather_shards(rows, shard).view(
                    -1, *value.shape[1:]
                )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        local_state = dict(state_dict)
        for name in ("step", "draws", "_rate"):  # of another dtype in older states, which had no
            like = getattr(self, name)  # rate
            value = state_dict.get(prefix + name, like if name == "_rate" else None)
            if value is not None:
                local_state[prefix + name] = value.to(like.dtype)
        for name in self._sharded():
            local, value = getattr(self, name), state_dict.get(prefix + name)
            if value is None:
                continue  # the caller's `strict` decides
            expected = (self.num_samples, *local.shape[1:]) if len(local) else (0,)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"DIETHead: the state's {name} is {tuple(value.shape)}, this head's "
                    f"{expected}; build it with the saved num_samples, dim and optimizer"
                )
            if len(local):
                local_state[prefix + name] = value[self.first : self.first + len(local)]
        super()._load_from_state_dict(local_state, prefix, *arguments)
        if not self._rate.is_meta:
            self._lr = float(self._rate)


def _fill_initial(x: Tensor, num_samples: int, first: int, bound: float) -> None:
    """Fills x, rows [first, first + len(x)) of num_samples, uniformly in [-bound, bound): in blocks
    that are the same for any sharding and device."""
    if x.is_meta:
        return
    for start in range(0, num_samples, INIT_ROWS):
        shape = (min(INIT_ROWS, num_samples - start), *x.shape[1:])
        block = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound)
        skipped = max(first - start, 0)  # rows of earlier ranks
        rows = block[skipped : max(first + len(x) - start, 0)]
        at = start + skipped - first
        x[at : at + len(rows)] = rows


def _hash(x: Tensor, seed: Tensor | int) -> Tensor:
    """int64 -> int64, well mixed: the finalizer of splitmix64 (doi:10.1145/2660193.2660195)."""
    x = (x + seed) * -7046029254386353131
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _check_sizes(
    num_samples: int, dim: int, label_smoothing: float, sample_rate: float, save: str
) -> None:
    if num_samples < 1 or dim < 1:
        raise ValueError(
            f"DIETHead: got {num_samples} samples of width {dim}; both must be positive"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"DIETHead: label_smoothing={label_smoothing} lies outside [0, 1]")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"DIETHead: sample_rate={sample_rate} lies outside (0, 1]")
    if save not in ("auto", "exp", "none"):
        raise ValueError(f"DIETHead: save={save!r}; choose 'auto', 'exp' or 'none'")


def _check_rule(
    optimizer: str | None,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float,
    dtype: torch.dtype,
) -> None:
    if optimizer not in (None, "adamw", "sgd"):
        raise ValueError(f"DIETHead: optimizer={optimizer!r}; choose None, 'adamw' or 'sgd'")
    if lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
        raise ValueError(
            f"DIETHead: lr={lr}, weight_decay={weight_decay}, momentum={momentum}; none may be "
            "negative, and momentum must be below 1"
        )
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"DIETHead: betas={betas}; both must lie in [0, 1)")
    if not dtype.is_floating_point:
        raise ValueError(f"DIETHead: dtype={dtype}; wanted floating point")
