"""Oracles: what is known about which images are alike, and the only way that labels reach training.

PAL (arXiv:2303.15256) trains on a similarity graph G over the data set in place of "views of one
image". An oracle fills G: from labels, from answers to "do these two show the same?", or from pairs
given outright; its log says what it was asked. Training sees the block of G that belongs to a
batch, never a label.

Likeness by answers is an equivalence, so a graph of M images is one group number each: images are
alike where the numbers are equal.

Shapes: M data set, N batch, D embedding, E pairs, Q queries.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fastssl.config import Config

SHARPNESS = 0.1  # of the guess exp((cosine - 1) / SHARPNESS) that two images are alike


class Labels(Protocol):
    """An array of M labels, read one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class Oracle(nn.Module):
    """Every image is like itself alone, until an oracle knows better."""

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
        """May ask about the batch (N,), knowing its embeddings (N, D)."""

    def log(self) -> dict[str, Any]:
        """What was asked, in numbers and lists that JSON takes."""
        return {"oracle": type(self).__name__, **self._groups()}

    def _groups(self) -> dict[str, int]:
        sizes = self.group.bincount(minlength=self.num_samples)
        return {"groups": int((sizes > 1).sum()), "in_groups": int(sizes[sizes > 1].sum())}


class LabelOracle(Oracle):
    """The labels of a random share of the M images, read once and turned into groups.

    Which images are asked about depends on `seed` alone; no other label is read.
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
    """Yes/no answers about pairs of images, asked for where they are worth most.

    Of a batch's open pairs the one is asked that promises most new pairs: the guess from the
    embeddings' cosine that the two are alike, times the sizes of their groups. What follows from
    earlier answers is never asked. `answer(i, j)` says whether images i and j are alike.

    queries: how many may be asked in all; per_batch: in one batch.
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
            best = self._promise(index, guess).flatten()
            at = int(best.argmax())
            if not best[at] > 0:
                return
            i, j = int(index[at // len(index)]), int(index[at % len(index)])
            self.tell(i, j, bool(self.answer(i, j)))

    def tell(self, i: int, j: int, alike: bool) -> None:
        """Take one answer. ValueError where it contradicts what follows from those before, for an
        image out of range, and beyond the number of queries."""
        self._check(i, j)
        known = self.known(i, j)
        if known is not None and known != alike:
            says = ["are not alike", "are alike"]
            raise ValueError(
                f"the oracle contradicts itself: it says that images {i} and {j} {says[alike]}, "
                f"but from its earlier answers they {says[not alike]}; correct one of the answers"
            )
        self.answers[self.asked] = torch.tensor([i, j, int(alike)], device=self.answers.device)
        self.asked += 1
        if alike:
            a, b = sorted((int(self.group[i]), int(self.group[j])))
            self.group[self.group == b] = a

    def known(self, i: int, j: int) -> bool | None:
        """What follows from the answers so far: alike, not alike, or nothing."""
        a, b = self.group[i], self.group[j]
        if a == b:
            return True
        apart = self._apart()
        met = ((apart == torch.stack([a, b])) | (apart == torch.stack([b, a]))).all(1)
        return False if bool(met.any()) else None

    def log(self) -> dict[str, Any]:
        pairs = self.answers[: int(self.asked)].tolist()
        yes = sum(alike for *_, alike in pairs)
        return {**super().log(), "queries": len(pairs), "yes": yes, "pairs": pairs}

    def _check(self, i: int, j: int) -> None:
        if not (0 <= i < self.num_samples and 0 <= j < self.num_samples):
            raise ValueError(f"the pair ({i}, {j}) lies outside the {self.num_samples} images")
        if int(self.asked) == self.queries:
            raise ValueError(f"all {self.queries} queries are spent; raise --oracle-queries")

    def _apart(self) -> Tensor:
        """Groups that are known to differ, (Q, 2)."""
        answers = self.answers[: int(self.asked)]
        return self.group[answers[answers[:, 2] == 0, :2]]

    def _promise(self, index: Tensor, guess: Tensor) -> Tensor:
        """Expected new pairs of alike images for each pair of the batch, 0 for what is known.
        (N, N)"""
        group = self.group[index]
        size = self.group.bincount(minlength=self.num_samples)[group].to(guess.dtype)
        low, high = torch.minimum(group[:, None], group), torch.maximum(group[:, None], group)
        apart = self._apart().sort(1).values
        keys = apart[:, 0] * self.num_samples + apart[:, 1]
        known = (low == high) | torch.isin(low * self.num_samples + high, keys)
        return (guess * size[:, None] * size).masked_fill(known, 0)


class PairOracle(Oracle):
    """A sparse graph given outright: pairs (E, 2) of images and their weights (E,), 1 by default.

    Weights need not be transitive. Each pair counts both ways; a pair that is given twice with two
    weights contradicts itself, which is a ValueError.
    """

    keys: Tensor
    weights: Tensor

    def __init__(self, num_samples: int, pairs: Tensor, weights: Tensor | None = None):
        super().__init__(num_samples)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            raise ValueError(
                f"PairOracle: pairs are {tuple(pairs.shape)} {pairs.dtype}; wanted (E, 2) int64"
            )
        weights = torch.ones(len(pairs)) if weights is None else weights.float()
        if weights.shape != pairs.shape[:1] or bool((weights < 0).any()):
            raise ValueError(
                f"PairOracle: weights are {tuple(weights.shape)}; wanted one for each of the "
                f"{len(pairs)} pairs, none negative"
            )
        if len(pairs) and not (0 <= int(pairs.min()) and int(pairs.max()) < num_samples):
            raise ValueError(f"PairOracle: a pair lies outside the {num_samples} images")
        low, high = pairs.min(1).values, pairs.max(1).values
        keys, first = torch.unique(low * num_samples + high, return_inverse=True)
        kept = torch.zeros(len(keys)).index_copy_(0, first, weights)
        if not torch.equal(kept[first], weights):
            bad = pairs[kept[first] != weights][0].tolist()
            raise ValueError(f"the oracle contradicts itself: pair {bad} has two weights")
        self.register_buffer("keys", keys)
        self.register_buffer("weights", kept)

    def block(self, index: Tensor) -> Tensor:
        low, high = torch.minimum(index[:, None], index), torch.maximum(index[:, None], index)
        keys = low * self.num_samples + high
        at = torch.searchsorted(self.keys, keys).clamp_max(max(len(self.keys) - 1, 0))
        same = torch.eye(len(index), device=index.device)
        if not len(self.keys):
            return same
        return torch.where(self.keys[at] == keys, self.weights[at], 0).maximum(same)

    def log(self) -> dict[str, Any]:
        return {"oracle": type(self).__name__, "pairs": len(self.keys)}


def build_oracle(config: Config, labels: Labels | None) -> Oracle:
    """The oracle that `config.oracle` names, over the data set's labels (M,), which it alone holds.

    ValueError where the data has no labels.
    """
    if labels is None:
        raise ValueError(
            f"--oracle {config.oracle} needs labels to answer from, and the data has none"
        )
    if config.oracle == "labels":
        return LabelOracle(labels, config.oracle_share, config.seed)
    if config.oracle == "queries":
        known = labels
        batches = config.epochs * (len(labels) // config.batch_size)
        per_batch = -(-2 * config.oracle_queries // max(1, batches))  # spent by half of the run
        return QueryOracle(
            len(labels),
            lambda i, j: _plain(known[i]) == _plain(known[j]),
            config.oracle_queries,
            per_batch,
        )
    raise ValueError("--oracle is 'none': there is no oracle to build")


def _plain(label: Any) -> Any:
    """A Python value that can be compared and hashed."""
    return label.item() if hasattr(label, "item") else label
