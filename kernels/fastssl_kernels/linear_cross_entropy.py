"""Softmax cross-entropy of a linear layer over very many classes, with label smoothing, no logits.

    z = x w^T + b,   loss_i = logsumexp_k z_ik - (1 - e) z_iy - (e / K) sum_k z_ik

the label-smoothed cross-entropy of arXiv:1512.00567, section 7, written so that the one-hot and the
uniform part of the target are two rank-one corrections of the log-sum-exp. With class weights v,
as in torch, and a soft cap s on the logits (arXiv:2408.00118, section 2)

    z = s tanh((x w^T + b) / s)
    loss_i = (1 - e) v_y (lse_i - z_iy) + (e / K) sum_k v_k (lse_i - z_ik)

whose mean is sum_i loss_i / sum_i v_{y_i}. With `group=` the classes are sharded: each rank holds
some rows of w, multiplies all ranks' inputs with them and exchanges four numbers per row. K counts
the classes of all shards, for smoothing too.

Shapes: N batch, D embedding, K classes. Inputs may have any leading dimensions; N is their product.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels._class_softmax import class_statistics
from fastssl_kernels._precision import accumulation_dtype
from fastssl_kernels._validation import checked
from fastssl_kernels.distributed import (
    Shard,
    all_gather_inputs,
    all_gather_rows,
    all_reduce_lse,
    group_name,
)

# Bytes of exponentials that save="auto" may store, by device type.
SAVE_BUDGET = {"cpu": 64 * 2**20, "cuda": 8 * 2**30}
# Below this width a GPU recomputes a logit (2 D flops) sooner than it stores and reads one.
SAVE_WIDTH = {"cpu": 0, "cuda": 550}


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
) -> Tensor:
    """The loss in eager PyTorch: any device, any dtype. (..., D), (K, D), (...) -> () or (...)

    target: class indices, or probabilities (..., K), which need all N x K numbers anyway.
    """
    logits = F.linear(input, linear_weight, linear_bias)  # (..., K)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    classes = len(linear_weight)
    is_probability = target.is_floating_point()
    loss = F.cross_entropy(
        logits.reshape(-1, classes),
        target.reshape(-1, classes) if is_probability else target.reshape(-1).long(),
        weight=None if weight is None else weight.to(logits.dtype),
        ignore_index=-100 if ignore_index is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss.reshape(logits.shape[:-1]) if reduction == "none" else loss


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    save: str = "auto",
    group: Any = None,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T + linear_bias` with `target`.

    input (N, D), (D,) or (..., D), linear_weight (K, D), target (N,), () or (...) of any integer
    dtype, linear_bias (K,) -> (), or target's shape for reduction="none"; float32, or float64 for
    float64 inputs. Arguments mean what they mean in torch.nn.functional.linear_cross_entropy. Sums
    are kept in float32 whatever the inputs. No rows give what torch gives: NaN for the mean, else
    0.

    A class whose bias is -inf is masked: its probability is 0. With label smoothing the uniform
    part of the target includes it, so the loss is inf, as in torch, unless its `weight` is 0.

    weight: (K,), how much each class counts, as in torch.nn.functional.cross_entropy. It gets no
        gradient.
    ignore_index: rows with this target do not count; None is -100.
    softcap: s > 0 replaces the logits z (bias included) by s tanh(z / s).
    save: "none" recomputes logits in backward and allocates nothing of size N x K; "exp" stores
        their exponentials, one product less for N x K numbers; "auto" chooses by width and size.
        With a softcap only "none" is possible, and is what "auto" chooses.
    group: ranks over which classes are sharded, `linear_weight` being this rank's contiguous rows
        in rank order, `linear_bias` and `weight` theirs, and `target` global. The loss is the
        global batch's on every rank; gradients of `linear_weight` are exact, those of `input` carry
        a factor of the world size, which data-parallel averaging removes. N is the same on every
        rank.

    ValueError on wrong shapes, dtypes, options or targets out of range (on CUDA a device assert, so
    that no step waits for the host), and for targets that are probabilities.
    """
    return linear_cross_entropy_with_lse(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        weight=weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
        softcap=softcap,
        save=save,
        group=group,
    )[0]


def linear_cross_entropy_with_lse(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    softcap: float | None = None,
    save: str = "auto",
    group: Any = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and the log-sum-exp of each row's logits, which a z-loss needs:

        loss, lse = linear_cross_entropy_with_lse(x, w, y)
        loss = loss + 1e-4 * lse.square().mean()

    lse has target's shape and the loss's dtype, ignored rows included, and is differentiable; in a
    group it is that of all ranks' rows, in rank order along the first dimension.
    """
    _check_shapes(input, linear_weight, target, linear_bias, weight)
    _check_options(label_smoothing, reduction, softcap, save)
    if group is not None:
        group_name(group, "linear_cross_entropy")
        if reduction == "none":
            raise ValueError(
                "linear_cross_entropy: reduction='none' with a group; use 'mean' or 'sum'"
            )
    shard = Shard.of_weight(linear_weight, group)
    labels = checked_labels(target.reshape(-1).long(), shard.classes, ignore_index)
    labels = all_gather_rows(labels, shard)
    x = input.reshape(-1, linear_weight.shape[1])  # (N, D)
    x, w, bias = cast_for_product(x, linear_weight, linear_bias)
    x = all_gather_inputs(x, shard)
    local = labels - shard.first
    v = None if weight is None else weight.to(accumulation_dtype(x)).contiguous()
    lse, z_target, z_sum, lse_lo, _, _ = class_statistics(
        x,
        w,
        bias,
        local,
        softcap is None and saves_exponentials(save, x, len(w)),
        v if label_smoothing else None,
        0.0 if softcap is None else float(softcap),
    )
    sums = [z_target, z_sum] if v is None else [z_target, z_sum, *_weight_rows(v, local)]
    lse, lse_lo, z_target, z_sum, *v_rows = all_reduce_lse(lse, lse_lo, sums, shard)
    v_label = None
    if v is None:
        rows = smoothed_rows(lse, lse_lo, z_target, z_sum, shard.classes, label_smoothing)
    else:
        v_label, v_sum = v_rows
        mean = (z_sum, v_sum, shard.classes, label_smoothing)
        rows = _weighted_rows(lse, lse_lo, z_target, v_label, *mean)
    loss = reduce_rows(rows, labels >= 0, reduction, v_label)
    lse = (
        lse.reshape(target.shape) if shard.world == 1 else lse.unflatten(0, (-1, *target.shape[1:]))
    )
    return loss.reshape(target.shape) if reduction == "none" else loss, lse


def checked_labels(target: Tensor, classes: int | Tensor, ignore_index: int | None) -> Tensor:
    """`target` (N,) with -1 for ignored rows; raises where it lies outside [0, classes)."""
    ignore_index = -100 if ignore_index is None else ignore_index
    ignored = target == ignore_index
    return checked(
        target.masked_fill(ignored, -1),
        ignored | ((target >= 0) & (target < classes)),
        f"linear_cross_entropy: a target lies outside [0, K), K the number of classes "
        f"({classes if isinstance(classes, int) else 'of all ranks'}), and is not "
        f"ignore_index={ignore_index}; pass class indices",
    )


def cast_for_product(
    x: Tensor, w: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """All in the dtype of the product: autocast's on a GPU, else the wider of the two."""
    dtype = torch.promote_types(x.dtype, w.dtype)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cuda")
    return (
        x.to(dtype).contiguous(),
        w.to(dtype).contiguous(),
        None if bias is None else bias.to(dtype),
    )


def saves_exponentials(save: str, x: Tensor, classes: int) -> bool:
    """Whether the forward stores N x K exponentials of x (N, D) for the backward."""
    if save != "auto":
        return save == "exp"
    kind = "cuda" if x.is_cuda else "cpu"  # other devices, meta among them, run as a CPU does
    size = x.element_size() if x.is_cuda else max(4, x.element_size())
    return x.shape[1] > SAVE_WIDTH[kind] and len(x) * classes * size <= SAVE_BUDGET[kind]


def smoothed_rows(
    lse: Tensor,
    lse_lo: Tensor,
    target: Tensor,
    total: Tensor,
    classes: int | Tensor,
    label_smoothing: float,
) -> Tensor:
    """The loss of each row from its statistics, without cancellation where it is small. (N,)"""
    nll = (lse - target) + lse_lo
    if not label_smoothing:
        return nll  # the sum may be -inf: a masked class
    return nll + label_smoothing * (target - total / classes)


def _weight_rows(v: Tensor, labels: Tensor) -> list[Tensor]:
    """Weight of each row's class, 0 where it is none of v's (K,), and the sum of v. (N,), (N,)"""
    inside = (labels >= 0) & (labels < len(v))
    of_label = v[labels.clamp(0, len(v) - 1)].where(inside, 0)
    return [of_label, v.sum().expand(len(labels))]


def _weighted_rows(
    lse: Tensor,
    lse_lo: Tensor,
    target: Tensor,
    v_label: Tensor,
    total: Tensor,
    v_sum: Tensor,
    classes: int | Tensor,
    label_smoothing: float,
) -> Tensor:
    """`smoothed_rows` with class weights: of each row's class, and their sum. (N,)"""
    nll = ((lse - target) + lse_lo).where(v_label != 0, 0)  # not 0 times inf
    rows = (1 - label_smoothing) * v_label * nll
    if not label_smoothing:
        return rows
    return rows + label_smoothing * ((v_sum * lse - total) / classes)


def reduce_rows(
    rows: Tensor, valid: Tensor, reduction: str, v_label: Tensor | None = None
) -> Tensor:
    """rows (N,) as "none" | "sum" | "mean" over the valid ones, by weight where there is one."""
    rows = rows.where(valid, 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / (valid.sum() if v_label is None else v_label.sum())


def _refuse(what: str) -> None:
    raise ValueError(f"linear_cross_entropy: {what}")


def _check_shapes(
    x: Tensor, w: Tensor, target: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> None:
    if x.ndim == 0 or w.ndim != 2 or x.shape[-1] != w.shape[1] or 0 in w.shape:
        shapes = f"input {tuple(x.shape)} and linear_weight {tuple(w.shape)}"
        _refuse(f"got {shapes}; wanted (N, D), (D,) or (..., D) and (K, D), neither K nor D empty")
    if target.is_floating_point():
        _refuse(
            f"got target {tuple(target.shape)} {target.dtype}; wanted int64 class indices. "
            "Probabilities take all N x K numbers: linear_cross_entropy_reference accepts them"
        )
    if target.shape != x.shape[:-1] or target.dtype not in INTEGERS:
        got = f"target {tuple(target.shape)} {target.dtype}"
        _refuse(f"got {got}; wanted int64 class indices {tuple(x.shape[:-1])}, one for each input")
    vectors = {"linear_bias": bias, "weight": class_weight}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != w.shape[:1]:
            _refuse(f"got {name} {tuple(vector.shape)}; wanted ({len(w)},), one for each class")
    tensors = [x, w, *(vector for vector in vectors.values() if vector is not None)]
    if not all(t.is_floating_point() for t in tensors):
        _refuse(f"got dtypes {[t.dtype for t in tensors]}; wanted floating point")
    if len({t.device for t in (*tensors, target)}) > 1:
        devices = [str(t.device) for t in (*tensors, target)]
        _refuse(f"tensors are on {devices}; move them to one device")
    if class_weight is not None and class_weight.requires_grad:
        _refuse("weight requires a gradient, and has none; pass weight.detach()")


def _check_options(
    label_smoothing: float, reduction: str, softcap: float | None, save: str
) -> None:
    if not 0 <= label_smoothing <= 1:
        _refuse(f"label_smoothing={label_smoothing} lies outside [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        _refuse(f"reduction={reduction!r}; choose 'mean', 'sum' or 'none'")
    if softcap is not None and not 0 < softcap < math.inf:
        _refuse(f"softcap={softcap}; wanted a positive number, or None")
    if save not in ("auto", "exp", "none"):
        _refuse(f"save={save!r}; choose 'auto', 'exp' or 'none'")
    if softcap is not None and save == "exp":
        _refuse("save='exp' with a softcap, whose derivative needs the logits; use 'auto'")
