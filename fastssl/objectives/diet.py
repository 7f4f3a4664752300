"""DIET (arXiv:2302.10260): every image is its own class; a linear head, cross-entropy, label
smoothing.

    L = cross-entropy(h W^T, index of the image)

Shapes: N batch, M data set, F features, V views.
"""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fastssl.config import Config
from fastssl.knobs import DIETKnobs
from fastssl.objectives.base import Objective
from fastssl_kernels import DIETHead


class DIET(Objective):
    """One linear head over the data set's M images; each view is a sample of its image's class.

    With `fused_head` the head updates itself inside backward(), at the rate of `set_lr`, and its
    classes are sharded over the ranks of `group`; any other head is replicated on every rank.
    """

    paper = "DIET, arXiv:2302.10260 and arXiv:2406.10743"
    formula = "cross-entropy(h W^T, index of the image), label smoothing"
    Knobs = DIETKnobs
    min_views, max_views = 1, 200
    anti_collapse = ("label_smoothing",)

    def __init__(self, head: DIETHead):
        super().__init__()
        self.head = head

    @classmethod
    def from_config(
        cls, config: Config, knobs: Any, *, features: int, num_samples: int, group: Any = None
    ) -> Self:
        head = DIETHead(
            num_samples,
            features,
            label_smoothing=knobs.label_smoothing,
            optimizer=config.optimizer if knobs.fused_head else None,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            sample_rate=knobs.sample_rate,
            seed=config.seed,
            group=group if knobs.fused_head else None,
        )
        return cls(head)

    @classmethod
    def check(cls, config: Config, knobs: Any) -> None:
        if knobs.fused_head and config.clip_norm:
            raise ValueError(
                "--fused-head updates before the norm of the whole gradient is known: --clip-norm "
                "cannot be used; drop one of them"
            )
        if knobs.fused_head and config.optimizer == "lars":
            raise ValueError(
                "--fused-head updates by AdamW or SGD: --optimizer lars cannot be used"
            )

    def sharded_names(self) -> list[str]:
        if self.head.group is None:
            return []
        return ["head.weight", "head.exp_avg", "head.exp_avg_sq"]

    def set_lr(self, lr: float) -> None:
        self.head.lr = lr

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(torch.cat(list(features)), index.repeat(len(features)))}
