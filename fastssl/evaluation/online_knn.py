"""Online kNN probe: accuracy of the backbone's features during training.

Labels are used for its accuracy only. Its time is not training time.
"""

import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.config import Config
from fastssl.data.splits import Split, sample_indices
from fastssl.distributed import SINGLE_PROCESS, Ranks
from fastssl.evaluation.features import centre_features, extract
from fastssl.evaluation.probes import knn_accuracy
from fastssl.runtime.metrics_log import read_metrics, truncate_after
from fastssl.schedule import TrainState

IMAGES = 10_000  # of each part, at most


class OnlineKNN:
    """kNN accuracy of a backbone on the test part, appended to `path`: step, train_s, knn.

    Of parts with more than IMAGES images, as many are drawn by the seed, the same at every call.
    ValueError where the data has no classes or no test part.
    """

    def __init__(
        self, path: Path, config: Config, train: Split, test: Split, ranks: Ranks = SINGLE_PROCESS
    ):
        if not len(test):
            raise ValueError(
                "--probe-epochs needs a test part; raise --holdout above 0, or drop it"
            )
        labels = train.labels(), test.labels()
        if labels[0] is None or labels[1] is None:
            raise ValueError(
                f"--probe-epochs needs labels of two classes or more, and {config.data} has none; "
                "drop it"
            )
        self._path, self._config, self._ranks = path, config, ranks
        self._parts = [(train, labels[0]), (test, labels[1])]

    def truncate_after(self, step: int) -> None:
        """Drop the accuracies after `step`: a resumed run measures them again."""
        truncate_after(self._path, step)

    def __call__(self, backbone: nn.Module, state: TrainState) -> float:
        """Accuracy on the test images; a collective call, 0 on all ranks but rank 0."""
        random = torch.get_rng_state()  # probing must not change the random numbers of training
        self._ranks.broadcast_buffers(backbone)  # running statistics differ from rank to rank
        features = [self._features(backbone, split, labels) for split, labels in self._parts]
        torch.set_rng_state(random)
        if not self._ranks.is_main:
            return 0.0
        (train, train_labels), (test, test_labels) = features
        knn = knn_accuracy(
            train,
            train_labels,
            test,
            test_labels,
            k=self._config.knn_k,
            temperature=self._config.knn_temperature,
        )
        with open(self._path, "a") as file:
            line = {"step": state.step, "train_s": round(state.train_s, 3), "knn": knn}
            file.write(json.dumps(line) + "\n")
        return knn

    def _features(self, backbone: nn.Module, split: Split, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Centre-view features and labels of up to IMAGES images; empty on all ranks but rank 0."""
        chosen = sample_indices(len(split), IMAGES, self._config.seed)
        function = partial(centre_features, self._config, backbone)
        numbers, rows = extract(split, {"centre": function}, chosen=chosen, ranks=self._ranks)
        return rows.get("centre", torch.empty(0)), labels[numbers]


def read_probes(path: Path) -> list[dict[str, float]]:
    """The lines of a probes.jsonl; none where there is no such file."""
    return read_metrics(path) if path.is_file() else []
