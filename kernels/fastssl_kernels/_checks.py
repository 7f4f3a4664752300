"""Checks of values that need no wait for the device: ValueError on a CPU, a device assert on CUDA.

Shapes: any.
"""

# mypy: allow-untyped-defs
# (Triton kernels and autograd callbacks carry no types.)

import torch
from torch import Tensor


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
def plain_loss(loss: Tensor, message: str) -> Tensor:
    """A copy of `loss` () whose backward raises `message` unless the gradient it gets is exactly 1.

    Where the loss is not finite it passes NaN on, so whoever updates on the way can tell.
    """
    return loss.clone()


@plain_loss.register_fake
def _(loss: Tensor, message: str) -> Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.message = inputs[1]


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (loss,) = ctx.saved_tensors
    return checked(grad, grad == 1, ctx.message) + 0 * loss, None


plain_loss.register_autograd(_backward, setup_context=_setup_context)
