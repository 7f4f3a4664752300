"""Derivatives of custom ops: backward passes from what the forward saved, second derivatives by the
eager formula, and errors for what is not implemented, which torch would take to be 0.

Shapes: V views, n rows of this rank, D embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from fastssl_kernels._precision import accumulation_dtype, without_autocast
from fastssl_kernels.distributed import SECOND_ACROSS_RANKS, all_gather_with_grad, refuse_backward

PATH_EAGER = "path='eager'"  # what the ops over views offer instead


def refuse_forward_mode(name: str, instead: str, *tensors: Tensor | float) -> None:
    """NotImplementedError naming `instead` where forward-mode differentiation is under way.

    A custom op would drop the tangent, and torch.func.jvp return 0.
    """
    for x in tensors:
        if isinstance(x, Tensor) and unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are "
                f"not implemented; use {instead}"
            )


def wants_gradient(z: Tensor) -> bool:
    """Whether a backward pass through z is possible."""
    return torch.is_grad_enabled() and z.requires_grad


def no_gradient(loss: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What an op returns without a gradient: the loss, and empty tensors."""
    return loss, loss.new_empty(0), loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)


def eager_loss(reference: Callable[..., Tensor], z: Tensor, group: str, **settings: Any) -> Tensor:
    """`reference` of the global batch of views z (V, n, D) in the accumulation dtype -> ().

    Autocast changes nothing of it.
    """
    with without_autocast(z):
        return reference(all_gather_with_grad(z.to(accumulation_dtype(z)), group), **settings)


class _TwiceDifferentiable(torch.autograd.Function):
    """First derivatives that an op computed, with the eager formula's as their own derivatives."""

    @staticmethod
    def forward(
        ctx: Any, formula: Callable[..., Any], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        """tensors: `count` derivatives, the inputs that they belong to, and the outputs' gradients.

        Returns the derivatives.
        """
        ctx.formula, ctx.count = formula, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *second: Tensor) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        tensors = ctx.saved_tensors
        with torch.enable_grad():
            # of create_graph a third derivative flows through the originals
            tensors = tuple(
                t if create_graph and t.requires_grad else t.detach().requires_grad_()
                for t in tensors
            )
            inputs, upstream = tensors[: ctx.count], tensors[ctx.count :]
            with without_autocast(inputs[0]):
                outputs = ctx.formula(*inputs)
                first = torch.autograd.grad(
                    outputs, inputs, upstream, create_graph=True, materialize_grads=True
                )
        pairs = [(f, s) for f, s in zip(first, second, strict=True) if f.requires_grad]
        found = torch.autograd.grad(
            [f for f, _ in pairs],
            tensors,
            [s for _, s in pairs],
            create_graph=create_graph,
            materialize_grads=True,
        )
        return None, None, *[None] * ctx.count, *found


def twice_differentiable(
    derivatives: Sequence[Tensor],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    formula: Callable[..., Any],
) -> tuple[Tensor, ...]:
    """`derivatives` of an op with respect to `inputs`, for a backward pass to return.

    Under create_graph their own derivatives are those of formula(*inputs), in eager PyTorch, whose
    outputs have the gradients `upstream`. The formula runs only if they are asked for.
    """
    if not torch.is_grad_enabled():
        return tuple(derivatives)
    return _TwiceDifferentiable.apply(formula, len(derivatives), *derivatives, *inputs, *upstream)


def register_gradient(op: Any, gradient: Any, formula: Callable[..., Tensor]) -> None:
    """Give the custom op `op`(z (V, n, D), ..., group, wants_gradient) -> (loss (), *saved) its
    backward pass.

    The custom op `gradient`(grad (), z, *saved) -> grad * dL/dz, shaped and typed as z, gets its
    fake here too. formula(*inputs) is the loss in eager PyTorch, for second derivatives; across
    ranks they raise. The other inputs of `op` get no gradient.
    """

    @gradient.register_fake
    def _(grad: Tensor, z: Tensor, *saved: Tensor) -> Tensor:
        return torch.empty_like(z)

    def compute(grad: Tensor, z: Tensor, saved: Sequence[Tensor]) -> Tensor:
        return gradient(grad, z, *saved)

    _register(op, compute, formula)


def register_scaled_gradient(op: Any, formula: Callable[..., Tensor]) -> None:
    """`register_gradient` for an `op`(z, ...) -> (loss (), dL/dz like z in any dtype)."""

    def compute(grad: Tensor, z: Tensor, saved: Sequence[Tensor]) -> Tensor:
        return (saved[0] * grad).to(z.dtype)

    _register(op, compute, formula)


def _register(op: Any, compute: Callable[..., Tensor], formula: Callable[..., Tensor]) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.settings = inputs[1:]
        ctx.save_for_backward(inputs[0], *output[1:])

    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = [None] * len(ctx.settings)
        if grad is None:
            return None, *nothing
        refuse_forward_mode(f"the gradient of {op._qualname}", PATH_EAGER, grad)
        z, *saved = ctx.saved_tensors
        with torch.no_grad():
            dz = compute(grad, z, saved)
        *settings, group, _ = ctx.settings
        if group:
            return refuse_backward(dz, z, SECOND_ACROSS_RANKS), *nothing

        def eager(z: Tensor) -> Tensor:
            return formula(z.to(accumulation_dtype(z)), *settings)

        (dz,) = twice_differentiable([dz], [z], [grad], eager)
        return dz, *nothing

    op.register_autograd(backward, setup_context=save)


def refuse_second_order(op: Any, instead: str) -> None:
    """Make the derivative of the custom op `op`, a backward pass itself, raise with `instead`."""

    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"{op._qualname}: second derivatives are not implemented; use {instead}"
        )

    op.register_autograd(backward, setup_context=lambda ctx, inputs, output: None)
