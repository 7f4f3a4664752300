"""Base classes of objectives: a head and a loss of the features of each view, without labels.

Shapes: N batch, F features, D embedding, V views, n = V N rows.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fastssl.config import Config, Knobs
from fastssl.knobs import ProjectorKnobs


class Objective(nn.Module):
    """`forward(features, index)`: V tensors (N, F) and the images' indices (N,) -> scalars, "loss"
    among them.

    `group`: the process group over whose batches the loss is taken; None for one process.
    """

    paper: ClassVar[str]
    """Title and arXiv id."""
    formula: ClassVar[str]
    """The loss in one line: z_v (N, D) embeddings of view v, C correlation, Cov covariance, h
    features, W head."""
    Knobs: ClassVar[type[Knobs]]
    """Its knobs, with unit, default and source."""
    min_views: ClassVar[int] = 2
    max_views: ClassVar[int] = 16
    anti_collapse: ClassVar[tuple[str, ...]] = ()
    """The knobs that weigh the terms against collapse."""

    group: Any = None

    @classmethod
    def from_config(
        cls, config: Config, knobs: Any, *, features: int, num_samples: int, group: Any = None
    ) -> Self:
        """The objective of a run, for a backbone of `features` outputs and M = `num_samples`
        images, over the ranks of `group`."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: Config, knobs: Any) -> None:
        """ValueError where the knobs do not fit the rest of the config."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step (used by heads with a fused optimizer)."""

    def sharded_names(self) -> list[str]:
        """The names of the parameters and buffers that are sharded over ranks."""
        return []

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError


class ProjectedObjective(Objective):
    """A projector and `loss` of the embeddings, for methods without further state."""

    def __init__(self, features: int, knobs: ProjectorKnobs):
        super().__init__()
        self.projector = projector(features, knobs)

    @classmethod
    def from_config(
        cls, config: Config, knobs: Any, *, features: int, num_samples: int, group: Any = None
    ) -> Self:
        return cls(features, knobs)

    def loss(self, embeddings: Sequence[Tensor]) -> Tensor:
        """V tensors (N, D), maybe bfloat16 or float16 -> () float32; called without autocast"""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        embeddings = [self.projector(f) for f in features]
        with without_autocast(embeddings[0]):
            return {"loss": self.loss(embeddings)}


class GraphObjective(ProjectedObjective):
    """A method that PAL generalises: it also has a loss on a similarity graph (`pal.py`)."""

    def graph_loss(self, embeddings: Sequence[Tensor], p: Tensor) -> Tensor:
        """V tensors (N, D), the graph's weights (n, n), rows that sum to 1 -> ()

        In float32 or float64; called without autocast.
        """
        raise NotImplementedError


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which operations on x's device compute in the dtypes of their inputs: a loss
    sums over a batch, where bfloat16 has errors of percents."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device):  # meta
        return nullcontext()
    return torch.autocast(device, enabled=False)


def at_least_float32(z: Tensor) -> Tensor:
    """z in float32, or in float64 as it is."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def graph_distance(z: Tensor, p: Tensor) -> Tensor:
    """mean_i sum_j P_ij |z_i - z_j|^2 of rows (n, D), weights (n, n) -> ()"""
    z, p = z - z.mean(0), p.to(z.dtype)  # centred, against cancellation
    square = z.square().sum(1)
    return (square + p @ square - 2 * (z * (p @ z)).sum(1)).mean()


def projector(features: int, knobs: ProjectorKnobs) -> nn.Sequential:
    """(N, F) -> (N, D): linear layers with batch norm and ReLU between them."""
    modules: list[nn.Module] = []
    width = knobs.projector_width
    for _ in range(knobs.projector_layers - 1):
        modules += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*modules, nn.Linear(features, knobs.embedding_width, bias=False))
