"""Checks of arguments: shapes on the host, values on the device without a synchronisation.

A check of values raises ValueError on a CPU and is a device assert on CUDA.

Shapes: N batch, D embedding, V views.
"""

# mypy: allow-untyped-defs
# (autograd callbacks carry no types)

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastssl_kernels._autograd import PATH_EAGER, refuse_forward_mode
from fastssl_kernels.distributed import group_name

Path = Literal["auto", "gram", "direct", "eager"]
PATHS = get_args(Path)


def check_views(
    views: Tensor | Sequence[Tensor],
    op: str,
    *,
    path: str = "auto",
    group: Any = None,
    min_views: int = 2,
    min_rows: int = 2,
) -> tuple[Tensor, str]:
    """`views` as one tensor (V, n, D), and the name of `group`; ValueError if any is wrong.

    A rank of a group may hold no row: how many there are together is for the op to check.
    """
    z = stack_views(views, op, min_views, min_rows if group is None else 0)
    if path not in PATHS:
        raise ValueError(f"{op}: path is {path!r}; choose one of {', '.join(PATHS)}")
    if path != "eager":
        refuse_forward_mode(op, PATH_EAGER, z)
    return z, group_name(group, op)


def stack_views(
    views: Tensor | Sequence[Tensor], op: str, min_views: int = 2, min_rows: int = 0
) -> Tensor:
    """`views` as one floating tensor (V, N, D), V >= min_views, N >= min_rows; else ValueError."""
    if not isinstance(views, Tensor):
        tensors = list(views)
        shapes = [tuple(t.shape) for t in tensors]
        if len(set(shapes)) > 1:
            raise ValueError(f"{op}: views have shapes {shapes}; all must be one (N, D)")
        if len({t.device for t in tensors}) > 1:
            devices = [str(t.device) for t in tensors]
            raise ValueError(f"{op}: views are on {devices}; move them to one device")
        if len({t.dtype for t in tensors}) > 1:
            dtypes = [str(t.dtype) for t in tensors]
            raise ValueError(f"{op}: views have dtypes {dtypes}; cast them to one")
        if len(tensors) < min_views:
            raise ValueError(f"{op}: got {len(tensors)} views; it takes at least {min_views}")
        views = torch.stack(tensors)
    least = (min_views, min_rows, 1)
    if views.ndim != 3 or any(n < m for n, m in zip(views.shape, least, strict=True)):
        raise ValueError(
            f"{op}: views have shape {tuple(views.shape)}; "
            f"wanted (V, N, D) with V >= {min_views}, N >= {min_rows}, D >= 1"
        )
    if not views.is_floating_point():
        raise ValueError(f"{op}: views are {views.dtype}; wanted a floating-point dtype")
    return views


@torch.library.custom_op("fastssl::checked", mutates_args=())
def checked(x: Tensor, valid: Tensor, message: str) -> Tensor:
    """A copy of `x`; raises `message` unless every element of the bool tensor `valid` is true."""
    if valid.is_cuda:
        torch._assert_async(valid.all(), message)
    elif not bool(valid.all()):
        raise ValueError(message)
    return x.clone()


@checked.register_fake
def _(x: Tensor, valid: Tensor, message: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("fastssl::plain_loss", mutates_args=())
def require_unit_grad(loss: Tensor, message: str) -> Tensor:
    """A copy of `loss` () whose backward raises `message` unless its incoming gradient is 1.

    Where the loss is not finite the gradient becomes NaN, which a fused optimizer step checks.
    """
    return loss.clone()


@require_unit_grad.register_fake
def _(loss: Tensor, message: str) -> Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.message = inputs[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (loss,) = ctx.saved_tensors
    return checked(grad, grad == 1, ctx.message) + 0 * loss, None


require_unit_grad.register_autograd(_backward, setup_context=_setup_context)
