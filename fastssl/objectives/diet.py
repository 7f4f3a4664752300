"""DIET (arXiv:2302.10260): every image is its own class; a linear head, cross-entropy, label
smoothing."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.objectives.objective import Objective
from fastssl_kernels import DIETHead


class DIET(Objective):
    """One linear head over the data set's M images; each view is a sample of its image's class."""

    def __init__(self, features: int, num_samples: int, label_smoothing: float = 0.8):
        super().__init__()
        self.head = DIETHead(num_samples, features, label_smoothing=label_smoothing)

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(torch.cat(list(features)), index.repeat(len(features)))}
