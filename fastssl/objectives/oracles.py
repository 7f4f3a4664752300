"""Oracles: which images are known to be alike, and the only path of labels into training.

PAL (arXiv:2303.15256) trains on a similarity graph G over the data set in place of "views of one
image". An oracle fills G: from labels, from answers to "do these two show the same?", or from pairs
given outright; its log records what it was asked. Training sees the block of G of a batch, never a
label.

Likeness is an equivalence relation, so a graph of M images is stored as one group number per image:
images are alike where the numbers are equal.

Shapes: M data set, N batch, D embedding, E pairs, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.config import Config, Knobs, require

SHARPNESS = 0.1  # of the guess exp((cosine - 1) / SHARPNESS) that two images are alike


@dataclass(frozen=True)
class OracleKnobs(Knobs):
    """Knobs of every method with a loss on a similarity graph."""

    oracle: Literal["none", "labels", "queries"] = "none"
    """PAL (arXiv:2303.15256): similarities beyond views of one image, from the labels
    of `oracle_share` of the images or from `oracle_queries` yes/no answers. Labels reach training
    only here, and oracle.json records which."""
    oracle_share: float = 1.0
    """PAL with labels: fraction of the images whose label is read."""
    oracle_queries: int = 1000
    """PAL with queries: number of pairs of images to query, over the first half of the run."""

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # of the knobs that it is mixed with
        require(self, "oracle_share", 0 < self.oracle_share <= 1, "lie in (0, 1]")
        require(self, "oracle_queries", self.oracle_queries >= 1, "be at least 1")


class Labels(Protocol):
    """An array of M labels, read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Oracle(nn.Module):
    """Base class, and the graph without knowledge: every image is alike only to itself."""

    group: Tensor

    def __init__(self, num_samples: int):
        super().__init__()
        self.num_samples = num_samples
        self.register_buffer("group", torch.arange(num_samples))

    def block(self, index: Tensor) -> Tensor:
        """The batch's part of G: indices (N,) -> (N, N) float32 weights, 1 on the diagonal."""
        group = self.group[index]
        return (group[:, None] == group).float()

    def ask(self, index: Tensor, embeddings: Tensor) -> None:
        """May query pairs of the batch (N,), given its embeddings (N, D)."""

    def log(self) -> dict[str, Any]:
        """What was asked, as JSON-serialisable numbers and lists."""
        return {"oracle": type(self).__name__, **self._groups()}

    def _groups(self) -> dict[str, int]:
        sizes = self.group.bincount(minlength=self.num_samples)
        return {"groups": int((sizes > 1).sum()), "in_groups": int(sizes[sizes > 1].sum())}


class LabelOracle(Oracle):
    """The labels of a random share of the M images, read once and turned into groups.

    The choice of images depends only on `seed`; no other label is read.
    """

    def __init__(self, labels: Labels, share: float = 1.0, seed: int = 0):
        super().__init__(len(labels))
        if not 0 < share <= 1:
            raise ValueError(f"LabelOracle: share is {share}; it must lie in (0, 1]")
        generator = torch.Generator().manual_seed(seed)
        count = round(share * len(labels))
        self.asked = torch.randperm(len(labels), generator=generator)[:count].sort().values.tolist()
        first: dict[Any, int] = {}
        for i in self.asked:
            self.group[i] = first.setdefault(_plain(labels[i]), i)

    def log(self) -> dict[str, Any]:
        return {**super().log(), "labels_asked": len(self.asked), "images": self.asked}


class QueryOracle(Oracle):
    """Yes/no answers about pairs of images, queried by their expected gain.

    Of a batch's undecided pairs it queries the one with the most expected new pairs: the estimate
    from the embeddings' cosine that the two are alike, times the sizes of their groups. Pairs
    implied by earlier answers are never queried. `answer(i, j)` is whether i and j are alike.

    queries: their total number; per_batch: at most in one batch.
    """

    answers: Tensor
    asked: Tensor

    def __init__(
        self, num_samples: int, answer: Callable[[int, int], bool], queries: int, per_batch: int = 8
    ):
        super().__init__(num_samples)
        if queries < 1 or per_batch < 1:
            raise ValueError(
                f"QueryOracle: got {queries} queries, {per_batch} per batch; both must be positive"
            )
        self.answer, self.queries, self.per_batch = answer, queries, per_batch
        self.register_buffer("answers", torch.zeros(queries, 3, dtype=torch.int64))  # i, j, yes
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def ask(self, index: Tensor, embeddings: Tensor) -> None:
        if int(self.asked) == self.queries:
            return
        z = normalize(embeddings.float(), dim=1)
        guess = ((z @ z.T - 1) / SHARPNESS).exp()  # (N, N)
        for _ in range(min(self.per_batch, self.queries - int(self.asked))):
            gain = self._expected_gain(index, guess).flatten()
            best = int(gain.argmax())
            if not gain[best] > 0:
                return
            i, j = int(index[best // len(index)]), int(index[best % len(index)])
            self.record(i, j, bool(self.answer(i, j)))

    def record(self, i: int, j: int, alike: bool) -> None:
        """Record one answer. ValueError where earlier answers imply the opposite, for an image out
        of range, and beyond the number of queries."""
        self._check(i, j)
        known = self.known(i, j)
        if known is not None and known != alike:
            relation = ["are not alike", "are alike"]
            raise ValueError(
                f"the oracle contradicts itself: images {i} and {j} {relation[alike]}, but from "
                f"its earlier answers they {relation[not alike]}; correct one of the answers"
            )
        self.answers[self.asked] = torch.tensor([i, j, int(alike)], device=self.answers.device)
        self.asked += 1
        if alike:
            a, b = sorted((int(self.group[i]), int(self.group[j])))
            self.group[self.group == b] = a

    def known(self, i: int, j: int) -> bool | None:
        """What the answers so far imply: alike (True), not alike (False), or nothing (None)."""
        a, b = self.group[i], self.group[j]
        if a == b:
            return True
        different = self._different()
        matches = ((different == torch.stack([a, b])) | (different == torch.stack([b, a]))).all(1)
        return False if bool(matches.any()) else None

    def log(self) -> dict[str, Any]:
        pairs = self.answers[: int(self.asked)].tolist()
        yes = sum(alike for *_, alike in pairs)
        return {**super().log(), "queries": len(pairs), "yes": yes, "pairs": pairs}

    def _check(self, i: int, j: int) -> None:
        if not (0 <= i < self.num_samples and 0 <= j < self.num_samples):
            raise ValueError(f"the pair ({i}, {j}) lies outside the {self.num_samples} images")
        if int(self.asked) == self.queries:
            raise ValueError(f"all {self.queries} queries are spent; raise --oracle-queries")

    def _different(self) -> Tensor:
        """Groups that are known to differ, (Q, 2)."""
        answers = self.answers[: int(self.asked)]
        return self.group[answers[answers[:, 2] == 0, :2]]

    def _expected_gain(self, index: Tensor, guess: Tensor) -> Tensor:
        """Expected new pairs of alike images for each pair of the batch, 0 for what is known.
        (N, N)"""
        group = self.group[index]
        size = self.group.bincount(minlength=self.num_samples)[group].to(guess.dtype)
        low, high = torch.minimum(group[:, None], group), torch.maximum(group[:, None], group)
        different = self._different().sort(1).values
        keys = different[:, 0] * self.num_samples + different[:, 1]
        known = (low == high) | torch.isin(low * self.num_samples + high, keys)
        return (guess * size[:, None] * size).masked_fill(known, 0)


def build_oracle(config: Config, labels: Labels | None) -> Oracle:
    """The oracle that the method's knobs name, over the data set's labels (M,), which only it can
    read.

    ValueError where the data has no labels, and where the knobs name no oracle.
    """
    knobs: Any = config.objective
    if not uses_oracle(config):
        raise ValueError("--oracle is 'none': there is no oracle to build")
    if labels is None:
        raise ValueError(
            f"--oracle {knobs.oracle} needs labels to answer from, and the data has none"
        )
    if knobs.oracle == "labels":
        return LabelOracle(labels, knobs.oracle_share, config.seed)
    batches = config.epochs * (len(labels) // config.batch_size)
    per_batch = -(-2 * knobs.oracle_queries // max(1, batches))  # spent by half of the run
    return QueryOracle(
        len(labels),
        partial(_same_label, labels),
        knobs.oracle_queries,
        per_batch,
    )


def uses_oracle(config: Config) -> bool:
    """Whether the run is PAL: whether labels reach its training."""
    return getattr(config.objective, "oracle", "none") != "none"


def _same_label(labels: Labels, i: int, j: int) -> bool:
    return bool(_plain(labels[i]) == _plain(labels[j]))


def _plain(label: Any) -> Any:
    """A Python value that can be compared and hashed."""
    return label.item() if hasattr(label, "item") else label
