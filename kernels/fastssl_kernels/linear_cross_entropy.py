"""Softmax cross-entropy of a linear layer over very many classes, with label smoothing, no logits.

    z = x w^T + b,   loss_i = logsumexp_k z_ik - (1 - e) z_iy - (e / K) sum_k z_ik

the label-smoothed cross-entropy of arXiv:1512.00567, section 7, written so that the one-hot and the
uniform part of the target are two rank-one corrections of the log-sum-exp.

With `group=` the classes are sharded: each rank holds some rows of w, multiplies all ranks' inputs
with them and exchanges four numbers per row. K counts the classes of all shards, for smoothing too.

Shapes: N batch, D embedding, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl_kernels._autograd import refuse_forward_mode
from fastssl_kernels._class_softmax import INSTEAD, class_statistics
from fastssl_kernels._validation import checked
from fastssl_kernels.distributed import (
    Shard,
    all_gather_inputs,
    all_gather_rows,
    all_reduce_lse,
    group_name,
    require_equal_rows,
)

# Bytes of exponentials that save="auto" may store, by device type.
SAVE_BUDGET = {"cpu": 64 * 2**20, "cuda": 8 * 2**30}
# Below this width a GPU recomputes a logit (2 D flops) sooner than it stores and reads one.
SAVE_WIDTH = {"cpu": 0, "cuda": 550}


def linear_cross_entropy_reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The loss in eager PyTorch: any device, any dtype. (N, D), (K, D), (N,) -> () or (N,)"""
    return F.cross_entropy(
        F.linear(input, linear_weight, linear_bias),  # (N, K)
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    save: str = "auto",
    group: Any = None,
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T + linear_bias` with `target`.

    input (N, D), linear_weight (K, D), target (N,) int64, linear_bias (K,) -> (), or (N,) for
    reduction="none"; float32, or float64 for float64 inputs. Arguments mean what they mean in
    torch.nn.functional.linear_cross_entropy. Sums are kept in float32 whatever the inputs.

    save: "none" recomputes logits in backward and allocates nothing of size N x K; "exp" stores
        their exponentials, one product less for N x K numbers; "auto" chooses by width and size.
    group: ranks over which classes are sharded, `linear_weight` being this rank's contiguous rows
        in rank order, and `target` global. The loss is the global batch's on every rank; gradients
        of `linear_weight` are exact, those of `input` carry a factor of the world size, which
        data-parallel averaging removes. N is the same on every rank.

    ValueError on wrong shapes, dtypes, reductions or targets out of range (on CUDA a device assert,
    so that no step waits for the host).
    """
    _check(input, linear_weight, target, linear_bias, label_smoothing, reduction, save)
    if group is not None:
        group_name(group, "linear_cross_entropy")
        if reduction == "none":
            raise ValueError(
                "linear_cross_entropy: reduction='none' with a group; use 'mean' or 'sum'"
            )
    tensors = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]
    refuse_forward_mode("linear_cross_entropy", INSTEAD, *tensors)
    require_equal_rows(input, group, "linear_cross_entropy")
    shard = Shard.of_weight(linear_weight, group)
    labels = all_gather_rows(checked_labels(target, shard.classes, ignore_index), shard)
    x, w, bias = cast_for_product(input, linear_weight, linear_bias)
    x = all_gather_inputs(x, shard)
    keep = saves_exponentials(save, x, len(w))
    lse, z_target, z_sum, lse_lo, _, _ = class_statistics(x, w, bias, labels - shard.first, keep)
    lse, lse_lo, z_target, z_sum = all_reduce_lse(lse, lse_lo, [z_target, z_sum], shard)
    rows = smoothed_rows(lse, lse_lo, z_target, z_sum, shard.classes, label_smoothing)
    return reduce_rows(rows, labels >= 0, reduction)


def checked_labels(target: Tensor, classes: int | Tensor, ignore_index: int) -> Tensor:
    """`target` (N,) with -1 for ignored rows; raises where it lies outside [0, classes)."""
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
    kind = x.device.type
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
    return ((lse - target) + lse_lo) + label_smoothing * (target - total / classes)


def reduce_rows(rows: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """rows (N,) as "none" | "sum" | "mean" over the valid ones."""
    rows = rows.where(valid, 0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / valid.sum()


def _check(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    bias: Tensor | None,
    label_smoothing: float,
    reduction: str,
    save: str,
) -> None:
    def refuse(what: str) -> None:
        raise ValueError(f"linear_cross_entropy: {what}")

    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or 0 in (*x.shape, *w.shape):
        shapes = f"input {tuple(x.shape)} and linear_weight {tuple(w.shape)}"
        refuse(f"got {shapes}; wanted (N, D) and (K, D), nothing empty")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        got = f"target {tuple(target.shape)} {target.dtype}"
        refuse(f"got {got}; wanted one int64 class index for each of {len(x)} rows")
    if bias is not None and bias.shape != w.shape[:1]:
        refuse(f"got linear_bias {tuple(bias.shape)}; wanted ({len(w)},), one for each class")
    tensors = [x, w] if bias is None else [x, w, bias]
    if not all(t.is_floating_point() for t in tensors):
        refuse(f"got dtypes {[t.dtype for t in tensors]}; wanted floating point")
    if len({t.device for t in (*tensors, target)}) > 1:
        refuse(
            f"tensors are on {[str(t.device) for t in (*tensors, target)]}; move them to one device"
        )
    if not 0 <= label_smoothing <= 1:
        refuse(f"label_smoothing={label_smoothing} lies outside [0, 1]")
    if reduction not in ("mean", "sum", "none"):
        refuse(f"reduction={reduction!r}; choose 'mean', 'sum' or 'none'")
    if save not in ("auto", "exp", "none"):
        refuse(f"save={save!r}; choose 'auto', 'exp' or 'none'")
