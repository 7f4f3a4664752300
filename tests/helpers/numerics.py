"""The one error budget: a fused op may be at most twice as wrong as eager PyTorch in the same
dtype."""

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[..., Tensor]


def relative_error(x: Tensor, truth: Tensor) -> float:
    """||x - truth|| / ||truth|| in the Frobenius norm, in fp64; ||x|| where the truth is zero."""
    x, truth = x.double(), truth.double()
    scale = truth.norm()
    return float((x - truth).norm() / scale if scale > 0 else x.norm())


def value_and_grads(op: Op, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """[op(*inputs), its gradient with respect to each input], computed in `dtype`."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    value = op(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_within_budget(
    op: Op, reference: Op, inputs: list[Tensor], dtype: torch.dtype, names: list[str] | None = None
) -> None:
    """Value and every gradient of `op` against `reference`.

    Truth is the reference in fp64. The floor, 4 eps, covers cases that eager computes exactly.
    """
    inputs = [x.to(dtype) for x in inputs]  # round once, so truth and kernel see the same numbers
    truth = value_and_grads(reference, inputs, torch.float64)
    eager = value_and_grads(reference, inputs, dtype)
    fused = value_and_grads(op, inputs, dtype)
    names = names or ["value", *(f"grad{i}" for i in range(len(inputs)))]
    for name, t, e, f in zip(names, truth, eager, fused, strict=True):
        budget = 2 * relative_error(e, t) + 4 * torch.finfo(dtype).eps
        error = relative_error(f, t)
        assert error <= budget, f"{name}: {error:.2e} > {budget:.2e}"
