"""DIET (arXiv:2302.10260): every image is its own class; a linear head, cross-entropy, label
smoothing."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.objectives.base import Objective
from fastssl_kernels import DIETHead


class DIET(Objective):
    """One linear head over the data set's M images; each view is a sample of its image's class.

    optimizer: None leaves the head's weight to the trainer; "adamw" or "sgd" update it inside
    backward(), at the rate of `set_lr`. sample_rate: see `DIETHead`. group: over its ranks the
    classes of a head that updates itself are shared; any other head is whole on every rank.
    """

    def __init__(
        self,
        features: int,
        num_samples: int,
        label_smoothing: float = 0.8,
        *,
        optimizer: str | None = None,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        momentum: float = 0.9,
        sample_rate: float = 1.0,
        seed: int = 0,
        group: Any = None,
    ):
        super().__init__()
        shards = group if optimizer else None
        self.head = DIETHead(
            num_samples,
            features,
            label_smoothing=label_smoothing,
            optimizer=optimizer,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            sample_rate=sample_rate,
            seed=seed,
            group=shards,
        )

    def sharded_names(self) -> list[str]:
        if self.head.group is None:
            return []
        return ["head.weight", "head.exp_avg", "head.exp_avg_sq"]

    def set_lr(self, lr: float) -> None:
        self.head.lr = lr

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(torch.cat(list(features)), index.repeat(len(features)))}
