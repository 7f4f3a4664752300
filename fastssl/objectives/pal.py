"""PAL (arXiv:2303.15256): the losses with a similarity graph in place of "views of one image".

Rows z_i are all views of the batch, n = V N of them, and P their graph: P_ij = G of the two images,
0 for i = j, rows divided by their sums. With G = I, nothing known, each is the method that it
generalises (Barlow Twins up to symmetry of C). The methods define these losses as `graph_loss`.

Shapes: N batch, D embedding, V views, n rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import all_gather_index, all_gather_with_grad
from fastssl.objectives.base import (
    GraphObjective,
    Objective,
    at_least_float32,
    without_autocast,
)
from fastssl.objectives.oracles import Oracle


class PAL(Objective):
    """A method's projector and its loss on an oracle's graph of the batch.

    In training the oracle may query pairs before each step, given the mean embeddings over views;
    its answers are part of the state.
    """

    paper = "PAL, active self-supervised learning, arXiv:2303.15256"
    formula = "the method's loss with 'G_ij > 0' for 'views of one image'"

    def __init__(self, method: GraphObjective, oracle: Oracle):
        super().__init__()
        self.projector, self.oracle = method.projector, oracle
        self._graph_loss = method.graph_loss

    def forward(self, features: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        z = at_least_float32(torch.stack([self.projector(f) for f in features]))
        z = all_gather_with_grad(z, self.group)
        embeddings, index = list(z), all_gather_index(index, self.group)
        with without_autocast(z):
            if self.training:
                self.oracle.ask(index, z.detach().mean(0))
            graph = self.oracle.block(index)
            known = graph.count_nonzero() - len(graph)
            loss = self._graph_loss(embeddings, neighbours(graph, len(embeddings)))
        return {"loss": loss, "known_pairs": known.float() / 2}


def neighbours(graph: Tensor, views: int) -> Tensor:
    """P of the module docstring: (N, N) weights, diagonal positive -> (V N, V N), rows sum to 1.

    ValueError for fewer than two views: an image without known neighbours would have an empty row.
    """
    if views < 2:
        raise ValueError(f"PAL: got {views} views; it takes at least 2")
    p = graph.repeat(views, views).fill_diagonal_(0)
    return p / p.sum(1, keepdim=True)
