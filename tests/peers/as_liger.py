"""fastssl_kernels under the names of Liger-Kernel.

Its tests of the fused linear cross-entropy run on the device that it finds, a CPU included.
`accum_dtype` needs nothing here: sums are in float32 always. The z-loss and the scaling of rows by
the probability of their targets are written with what our functions return, as a caller would.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl_kernels.linear_cross_entropy import linear_cross_entropy_with_lse

TESTS = "test/transformers/test_fused_linear_cross_entropy.py"


def results(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int | None = None,
) -> tuple[Tensor, Tensor | None, None, None]:
    """(loss, z loss, token accuracy, predicted tokens), as Liger-Kernel's autograd function."""
    if return_token_accuracy or return_predicted_tokens:
        pytest.skip("predicted classes are not offered")
    loss, lse = linear_cross_entropy_with_lse(
        input,
        weight,
        target,
        linear_bias=bias,
        weight=ce_weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none" if use_token_scaling else reduction,
        softcap=softcap,
    )
    if use_token_scaling:
        rows = loss * loss.detach().neg().exp()
        return (rows if reduction == "none" else rows.sum()), None, None, None
    valid = target != ignore_index
    z_loss = (lse_square_scale * lse.square()).where(valid, 0)
    if reduction != "none":
        z_loss = z_loss.sum() / (valid.sum() if reduction == "mean" else 1)
    return loss + z_loss, (z_loss if return_z_loss else None), None, None


def functional(*args: Any, **kwargs: Any) -> Any:
    from liger_kernel.transformers.functional import CrossEntropyOutput

    loss, z_loss, _, _ = results(*args, **kwargs)
    return loss if z_loss is None else CrossEntropyOutput(loss=loss, z_loss=z_loss)


class Function:
    """In the place of their autograd function."""

    apply = staticmethod(results)


class Loss(torch.nn.Module):
    """In the place of their module."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, weight: Tensor, input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Any:
        return functional(input, weight, target, bias, **self.options)


class Placeholder(ModuleType):
    """A module of empty classes, for imports of their helpers that these tests do not use."""

    __path__: list[str] = []  # noqa: RUF012 (an attribute that the import system reads)
    __version__ = "0"

    def __getattr__(self, name: str) -> type:
        return type(name, (), {})


def install(downloads: Path) -> list[str]:
    """Put our functions in place; returns what pytest is to run."""
    root = next(downloads.glob("liger_kernel-*/test")).parent
    sys.path[:0] = [str(root), str(root / "src")]

    import liger_kernel.ops
    import liger_kernel.transformers.functional
    import liger_kernel.transformers.fused_linear_cross_entropy as module

    liger_kernel.ops.LigerFusedLinearCrossEntropyFunction = Function
    liger_kernel.transformers.functional.liger_fused_linear_cross_entropy = functional
    module.LigerFusedLinearCrossEntropyLoss = Loss
    for name in (
        "transformers",
        "transformers.tokenization_utils_base",
        "tokenizers",
        "tokenizers.models",
        "tokenizers.pre_tokenizers",
        "tokenizers.trainers",
    ):
        sys.modules[name] = Placeholder(name)
    return [str(root / TESTS)]
