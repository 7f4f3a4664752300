"""The online probe: how good the backbone is while it trains, by kNN on frozen features.

Labels are read when it is built and serve nothing but its answer. Its time is not training time.

Shapes: M labelled images, M' held-out images, F features.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.evaluation.probes import knn_accuracy
from fastssl.runtime.metrics_log import keep_until, read_metrics
from fastssl.schedule import Progress

Extract = Callable[[nn.Module], tuple[Tensor, Tensor]]


class OnlineProbe:
    """kNN accuracy of a backbone; each answer is a line of `path`: step, train_s, knn."""

    def __init__(
        self,
        path: Path,
        extract: Extract,
        labels: tuple[Tensor, Tensor],
        *,
        k: int,
        temperature: float,
    ):
        """extract: backbone -> features (M, F) and (M', F). labels: (M,) and (M',) int64."""
        self._path, self._extract, self._labels = path, extract, labels
        self._k, self._temperature = k, temperature

    def forget_after(self, step: int) -> None:
        """Drop the answers after `step`: a resumed run gives them again."""
        keep_until(self._path, step)

    def __call__(self, backbone: nn.Module, at: Progress) -> float:
        """Share of held-out images whose neighbours name them right."""
        random = torch.get_rng_state()  # asking must not change what training draws
        train, test = self._extract(backbone)
        torch.set_rng_state(random)
        (train_labels, test_labels), k, t = self._labels, self._k, self._temperature
        knn = knn_accuracy(train, train_labels, test, test_labels, k=k, temperature=t)
        with open(self._path, "a") as file:
            answer = {"step": at.step, "train_s": round(at.train_s, 3), "knn": knn}
            file.write(json.dumps(answer) + "\n")
        return knn


def read_probes(path: Path) -> list[dict[str, float]]:
    """The answers in a probes.jsonl; none where there is no such file."""
    return read_metrics(path) if path.is_file() else []
