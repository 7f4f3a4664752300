"""fastssl_kernels under the names of cut-cross-entropy.

Its tests need CUDA. Without a GPU the device "cuda" of their tensors is read as "cpu". `impl` names
two implementations there; here "cce" recomputes the logits in backward and "torch_compile" stores
their exponentials, except where a softcap needs the logits.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastssl_kernels import linear_cross_entropy
from fastssl_kernels.linear_cross_entropy import linear_cross_entropy_with_lse

SAVE = {"cce": "none", "torch_compile": "auto"}


class CUDAOnCPU(TorchFunctionMode):
    """Tensors asked for on "cuda" are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def loss(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool = False,
    impl: str = "cce",
) -> Tensor:
    if shift:  # each position predicts the next one
        e, targets = e[:, :-1], targets[:, 1:]
    return linear_cross_entropy(
        e, c, targets, softcap=softcap, reduction=reduction, save=SAVE[impl]
    )


def lse(e: Tensor, c: Tensor, softcap: float | None = None) -> Tensor:
    any_target = torch.zeros(len(e), dtype=torch.int64, device=e.device)
    return linear_cross_entropy_with_lse(e, c, any_target, softcap=softcap)[1]


def target_logit(*args: Any, **kwargs: Any) -> Tensor:
    pytest.skip("the logit of the target alone is not offered")


def install(downloads: Path) -> list[str]:
    """Put our functions in place; returns what pytest is to run."""
    if not torch.cuda.is_available():
        torch.compile = lambda **options: lambda function: function  # it would look for the GPU
        torch.cuda.is_available = lambda: True
        torch.cuda.manual_seed = torch.manual_seed
        CUDAOnCPU().__enter__()

    import cut_cross_entropy
    import cut_cross_entropy.cce_lse_forward
    import cut_cross_entropy.indexed_dot

    cut_cross_entropy.linear_cross_entropy = loss
    cut_cross_entropy.cce_lse_forward.cce_lse_forward_kernel = lse
    cut_cross_entropy.indexed_dot.indexed_neg_dot_forward_kernel = target_logit
    return [str(next(downloads.glob("cut_cross_entropy-*/tests")))]
