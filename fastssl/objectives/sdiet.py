"""S-DIET: DIET whose softmax runs over the batch's own images ("Occam's Razor for SSL:
Memory-Efficient Parametric Instance Discrimination", TMLR 2025).

    L = cross-entropy(z W_B^T, row of the image),   W_B the rows of the batch's N images

Rows outside the batch get no gradient, so their AdamW steps depend only on their moments: they are
applied in one go when the row is next read. The authors published no code; this follows their
abstract: batch cross-entropy, multi-step AdamW, normalised features, a projector while training.

Shapes: M data set, N batch, F features, D embedding, V views.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.config import Config, require
from fastssl.objectives.base import Objective, ProjectorKnobs, projector
from fastssl_kernels import linear_cross_entropy

EPS = 1e-8  # torch.optim.AdamW's
MEMORY = 200  # steps after which a row's momentum, (0.9 / 0.999^.5)^200 = 8e-10 of it, is dropped


@dataclass(frozen=True)
class SDIETKnobs(ProjectorKnobs):
    """Knobs of S-DIET."""

    label_smoothing: float = 0.8
    """Label smoothing of the cross-entropy (arXiv:2302.10260)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "label_smoothing", 0 <= self.label_smoothing <= 1, "lie in [0, 1]")


class SDIET(Objective):
    """A projector, embeddings of length sqrt(D), and a `BatchHead` over the data set's M images."""

    paper = "S-DIET, Memory-Efficient Parametric Instance Discrimination, TMLR 2025"
    formula = "cross-entropy(z W_batch^T, row of the image), classes of the batch only"
    Knobs = SDIETKnobs
    min_views, max_views = 1, 200
    anti_collapse = ("label_smoothing",)

    def __init__(
        self,
        features: int,
        knobs: SDIETKnobs,
        num_samples: int,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
    ):
        super().__init__()
        self.projector = projector(features, knobs)
        self.head = BatchHead(
            num_samples,
            knobs.embedding_width,
            knobs.label_smoothing,
            lr=lr,
            weight_decay=weight_decay,
        )

    @classmethod
    def from_config(
        cls, config: Config, knobs: Any, *, features: int, num_samples: int, group: Any = None
    ) -> Self:
        if group is not None:
            raise ValueError(
                "--method sdiet updates its rows in one process; use one, or --method diet "
                "--fused-head"
            )
        return cls(features, knobs, num_samples, lr=config.lr, weight_decay=config.weight_decay)

    def set_lr(self, lr: float) -> None:
        self.head.lr = lr

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        z = torch.stack([self.projector(f) for f in features])  # (V, N, D)
        return {"loss": self.head(normalize(z, dim=2) * math.sqrt(z.shape[2]), index)}


class BatchHead(nn.Module):
    """Rows of a weight (M, D), one per image, updated inside backward() as torch.optim.AdamW would
    update the dense weight at a constant `lr`.

    A step reads and writes only the batch's rows. Missed steps take the rate of the step at which
    they are applied.
    """

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    updated: Tensor
    step: Tensor

    def __init__(
        self,
        num_samples: int,
        dim: int,
        label_smoothing: float = 0.8,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
    ):
        super().__init__()
        bound = 1 / math.sqrt(dim)  # that of nn.Linear
        self.register_buffer("weight", torch.empty(num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("exp_avg", torch.zeros(num_samples, dim))
        self.register_buffer("exp_avg_sq", torch.zeros(num_samples, dim))
        self.register_buffer("updated", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.label_smoothing, self.lr = label_smoothing, lr
        self.weight_decay, self.betas = weight_decay, betas

    def get_extra_state(self) -> Tensor:
        """The learning rate, which a torch optimizer's state holds too. () float64"""
        return torch.tensor(self.lr, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.lr = float(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        name = prefix + "_extra_state"
        state_dict = {name: self.get_extra_state(), **state_dict}  # older states have none
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, embeddings: Tensor, index: Tensor) -> Tensor:
        """(V, N, D), and (N,) without repetition -> (). In training, backward() takes the step."""
        state = self.caught_up(index)
        rows = state[0].requires_grad_(self.training and torch.is_grad_enabled())
        labels = torch.arange(len(index), device=index.device).repeat(len(embeddings))
        if rows.requires_grad:
            rows.register_hook(lambda grad: self._update(index, *state, grad))
        z = embeddings.flatten(0, 1)
        return linear_cross_entropy(
            z, rows.to(z.dtype), labels, label_smoothing=self.label_smoothing
        )

    @torch.no_grad()
    def caught_up(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, exp_avg and exp_avg_sq (N, D) of these rows after the missed steps.

        Step t without a gradient is w <- d w - lr (m / sqrt(v)) r^j b_t, the j-th after the last
        with one, with d = 1 - lr * weight_decay, r = beta1 / sqrt(beta2) and b_t Adam's correction
        of bias; so k of them are d^k w - lr (m / sqrt(v)) sum_j r^j b_t d^(k - j).
        """
        first, second = self.betas
        last = self.updated[index]  # (N,)
        missed = self.step - last
        j = torch.arange(1, MEMORY + 1, device=index.device, dtype=torch.float64)  # (J,)
        t = last[:, None] + j
        decay = 1 - self.lr * self.weight_decay
        corrected = (1 - second**t).sqrt() / (1 - first**t)
        terms = (first / math.sqrt(second)) ** j * corrected * decay ** (missed[:, None] - j)
        drift = self.lr * terms.where(j <= missed[:, None], 0).sum(1, keepdim=True)  # (N, 1)
        w, m, v = (x[index].double() for x in (self.weight, self.exp_avg, self.exp_avg_sq))
        k = missed[:, None].double()
        state = (decay**k * w - drift * m / (v.sqrt() + EPS), first**k * m, second**k * v)
        return tuple(x.to(self.weight.dtype) for x in state)  # type: ignore[return-value]

    @torch.no_grad()
    def _update(self, index: Tensor, w: Tensor, m: Tensor, v: Tensor, grad: Tensor) -> None:
        """AdamW's step on these rows."""
        first, second = self.betas
        self.step += 1
        t = self.step.double()
        m = first * m + (1 - first) * grad
        v = second * v + (1 - second) * grad.square()
        size = ((1 - second**t).sqrt() / (1 - first**t)).to(m.dtype)
        move = m * size / (v.sqrt() + EPS * (1 - second**t).sqrt().to(m.dtype))
        self.weight[index] = w.detach() * (1 - self.lr * self.weight_decay) - self.lr * move
        self.exp_avg[index], self.exp_avg_sq[index] = m, v
        self.updated[index] = self.step
