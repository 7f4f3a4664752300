"""Softmax cross-entropy of a linear layer over very many classes, with label smoothing.

    z = x w^T + b,   loss_i = logsumexp_k z_ik - (1 - e) z_iy - (e / K) sum_k z_ik

the label-smoothed cross-entropy of arXiv:1512.00567, section 7, written so that the one-hot and the
uniform part of the target are two rank-one corrections of the log-sum-exp.

Shapes: N batch, D embedding, K classes.
"""

import torch
from torch import Tensor


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
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)  # (N, K)
    return torch.nn.functional.cross_entropy(
        logits,
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
) -> Tensor:
    """Cross-entropy of `input @ linear_weight.T + linear_bias` with `target`.

    input (N, D), linear_weight (K, D), target (N,) int64, linear_bias (K,) -> () or (N,), float32,
    or float64 for float64 inputs.
    """
    loss = linear_cross_entropy_reference(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    return loss if loss.dtype == torch.float64 else loss.float()
