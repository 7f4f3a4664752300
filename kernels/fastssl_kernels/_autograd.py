"""Backward passes of ops that return, beside the loss, its gradient or what that needs.

Shapes: V views, n rows of this rank, D embedding.
"""

from typing import Any

import torch
from torch import Tensor


def wants_gradient(z: Tensor) -> bool:
    """Whether a backward pass through z is possible."""
    return torch.is_grad_enabled() and z.requires_grad


def no_gradient(loss: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an op returns without a gradient: the loss, and empty tensors."""
    return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)


def register_gradient(op: Any, gradient: Any) -> None:
    """Give the custom op `op`(z (V, n, D), ...) -> (loss (), *saved) its backward pass.

    The custom op `gradient`(grad (), z, *saved) -> grad * dL/dz, shaped and typed as z, gets its
    fake here too. The other inputs of `op` get no gradient.
    """

    @gradient.register_fake
    def _(grad: Tensor, z: Tensor, *saved: Tensor) -> Tensor:
        return torch.empty_like(z)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.others = len(inputs) - 1
        ctx.save_for_backward(inputs[0], *output[1:])

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dz = None if grad is None else gradient(grad, *ctx.saved_tensors)
        return dz, *(None,) * ctx.others

    op.register_autograd(backward, setup_context=save)


def register_scaled_gradient(op: Any) -> None:
    """Give the custom op `op`(z, ...) -> (loss (), dL/dz like z in any dtype) its backward pass."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.others = inputs[0].dtype, len(inputs) - 1
        ctx.save_for_backward(output[1])

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        dz = None if grad is None else (gradient * grad).to(ctx.dtype)
        return dz, *(None,) * ctx.others

    op.register_autograd(backward, setup_context=save)
