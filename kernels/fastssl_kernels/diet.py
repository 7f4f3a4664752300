"""DIET's head: one class per image (arXiv:2302.10260).

Shapes: M data set, N batch, D embedding, V views.
"""

import math

import torch
from torch import Tensor, nn

from fastssl_kernels.linear_cross_entropy import linear_cross_entropy


class DIETHead(nn.Module):
    """Linear layer over `num_samples` classes without bias, and its smoothed cross-entropy.

    `forward(features (N, D) or (V, N, D), index (N,)) -> ()`: views of one image share its class.
    """

    def __init__(
        self,
        num_samples: int,
        dim: int,
        *,
        label_smoothing: float = 0.8,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.weight = nn.Parameter(torch.empty(num_samples, dim, dtype=dtype))  # (M, D)
        bound = 1 / math.sqrt(dim)  # what nn.Linear draws
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        if features.ndim == 3:  # (V, N, D)
            index = index.repeat(len(features))
            features = features.flatten(0, 1)
        return linear_cross_entropy(
            features, self.weight, index, label_smoothing=self.label_smoothing
        )
