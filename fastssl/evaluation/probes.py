"""Evaluate frozen features: kNN and linear probes, with all labels and with few.

One neutral protocol for every method: one centre view, the backbone's features, no fine-tuning;
`protocols.py` has those of the papers. Features are extracted once and shared by all probes.

Shapes: M data set, F features, K classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# labels for training a probe: a number per class, "1%" of each class, or None for all
LabelBudget = int | str | None
LABELS_PER_CLASS: tuple[LabelBudget, ...] = (None, 10, 5, 1)
ALL_LABELS: tuple[LabelBudget, ...] = (None, "10%", "1%", 10, 5, 1)
# Multiply-adds of one product of features and weights, below which several threads do not save
# time: a fit is hundreds of products, and after each the threads wait for one another.
FEW_MULTIPLY_ADDS = 2**24


@dataclass(frozen=True)
class Accuracy:
    """Mean accuracy on the test images, and its standard deviation over samples of the labels."""

    mean: float
    std: float = 0.0


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Accuracy of the k nearest neighbours by cosine, each voting with exp(cosine / temperature).

    (M, F), (M,), (M', F), (M',) -> accuracy. Protocol of arXiv:1805.01978.
    """
    train, test = functional.normalize(train), functional.normalize(test)
    k = min(k, len(train))
    classes = int(train_labels.max()) + 1
    correct = 0
    for rows, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        cosine, neighbours = (rows @ train.T).topk(k)
        votes = torch.zeros(len(rows), classes).scatter_add_(
            1, train_labels[neighbours], ((cosine - 1) / temperature).exp()
        )
        correct += int((votes.argmax(1) == labels).sum())
    return correct / len(test)


@contextmanager
def _threads_for(multiply_adds: int) -> Iterator[None]:
    """One thread for products of so few multiply-adds that several slow them down; then as many as
    before."""
    threads = torch.get_num_threads()
    if multiply_adds < FEW_MULTIPLY_ADDS:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def linear_probe(
    features: Tensor, labels: Tensor, *, c: float = 1.0, iterations: int = 200
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression by L-BFGS: weight (K, F) and bias (K,) that minimise

        c * sum of cross-entropies + |weight|^2 / 2

    which is scikit-learn's LogisticRegression(C=c). features (M, F), labels (M,).
    """
    classes = int(labels.max()) + 1
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        tolerance_grad=1e-6,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(features @ weight.T + bias, labels)
        loss = loss + weight.square().sum() / (2 * c * len(labels))
        loss.backward()
        return loss

    with _threads_for(weight.numel() * len(features)):
        optimizer.step(closure)
    return weight.detach(), bias.detach()


def ridge_probe(features: Tensor, labels: Tensor, *, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Least squares on targets 1 and -1 in closed form, fp64: weight (K, F) and bias (K,) that
    minimise

        sum of squared errors + alpha |weight|^2

    which is scikit-learn's RidgeClassifier(alpha). features (M, F), labels (M,). Solved in the
    smaller of (F, F) and (M, M).
    """
    x, classes = features.double(), int(labels.max()) + 1
    y = 2 * functional.one_hot(labels, classes).double() - 1  # (M, K)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    if x.shape[1] <= len(x):
        gram = x.T @ x
        gram.diagonal().add_(alpha)
        weight = torch.linalg.solve(gram, x.T @ y).T
    else:
        gram = x @ x.T
        gram.diagonal().add_(alpha)
        weight = (x.T @ torch.linalg.solve(gram, y)).T
    bias = y_mean - weight @ x_mean
    return weight.to(features.dtype), bias.to(features.dtype)


@dataclass(frozen=True, kw_only=True)
class SGDSettings:
    """Settings of `sgd_probe`, as papers report them."""

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float
    epochs: int
    batch_size: int
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    cosine: bool = False  # decay of the learning rate to 0; else it is constant


NEUTRAL_SGD = SGDSettings(lr=0.1, epochs=100, batch_size=256, cosine=True)


def sgd_probe(
    features: Tensor, labels: Tensor, *, settings: SGDSettings = NEUTRAL_SGD, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A linear layer trained by cross-entropy in mini-batches: weight (K, F), bias (K,) after the
    last epoch, never the best one. features (M, F), labels (M,); the order depends on `seed`."""
    generator = torch.Generator().manual_seed(seed)
    classes = int(labels.max()) + 1
    weight = features.new_zeros(classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(classes, requires_grad=True)
    optimizer: torch.optim.Optimizer
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(
            [weight, bias], lr=settings.lr, weight_decay=settings.weight_decay
        )
    else:
        optimizer = torch.optim.SGD(
            [weight, bias],
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
    with _threads_for(weight.numel() * settings.batch_size):
        for epoch in range(settings.epochs):
            if settings.cosine:
                share = (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
                optimizer.param_groups[0]["lr"] = settings.lr * share
            for rows in torch.randperm(len(labels), generator=generator).split(settings.batch_size):
                loss = functional.cross_entropy(
                    features[rows] @ weight.T + bias,
                    labels[rows],
                    label_smoothing=settings.label_smoothing,
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return weight.detach(), bias.detach()


@dataclass(frozen=True)
class Probe:
    """A linear probe: `fit` (features, labels) -> (weight, bias), on features standardised by the
    mean and deviation of all training features, which needs no labels, or on raw features."""

    fit: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    standardised: bool = True


PROBES: dict[str, Probe] = {
    "lbfgs": Probe(linear_probe),
    "ridge": Probe(ridge_probe),
    "sgd": Probe(partial(sgd_probe, settings=NEUTRAL_SGD)),
}
NEUTRAL = {"linear": PROBES["lbfgs"]}  # what every run reports


def linear_probe_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    probe: Probe = PROBES["lbfgs"],
) -> float:
    """Accuracy on the test features of the probe fitted on the training features."""
    weight, bias = probe.fit(train, train_labels)
    return float(((test @ weight.T + bias).argmax(1) == test_labels).float().mean())


def sample_labels(labels: Tensor, count: int | str, seed: int) -> Tensor:
    """Indices of `count` images of every class (of all, where it has fewer), or of a share of every
    class such as "1%" (at least one image); the same for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = []
    for k in labels.unique():
        rows = shuffled[labels[shuffled] == k]
        chosen.append(rows[: _count(count, len(rows))])
    return torch.cat(chosen)


def _count(count: int | str, of: int) -> int:
    if isinstance(count, str):
        return max(1, round(float(count.removesuffix("%")) / 100 * of))
    return count


class ProbedFeatures:
    """Features (M, F) and labels (M,) of the training part, (M', F) and (M',) of the test part, and
    the accuracies of probes on them."""

    def __init__(self, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor):
        self._train, self._train_labels = train, train_labels
        self._test, self._test_labels = test, test_labels

    def probe(self, probe: Probe, count: LabelBudget, draws: int) -> Accuracy:
        """The accuracy of `probe` over the samples of `count` labels."""
        test = self._standardise(self._test) if probe.standardised else self._test
        accuracies = []
        for rows in _samples(self._train_labels, count, draws):
            train = self._train[rows]
            accuracies.append(
                linear_probe_accuracy(
                    self._standardise(train) if probe.standardised else train,
                    self._train_labels[rows],
                    test,
                    self._test_labels,
                    probe,
                )
            )
        return _mean(accuracies)

    def knn(self, count: LabelBudget, draws: int, *, k: int, temperature: float) -> Accuracy:
        """The accuracy of the k nearest neighbours over the samples of `count` labels."""
        accuracies = [
            knn_accuracy(
                self._train[rows],
                self._train_labels[rows],
                self._test,
                self._test_labels,
                k=k,
                temperature=temperature,
            )
            for rows in _samples(self._train_labels, count, draws)
        ]
        return _mean(accuracies)

    def _standardise(self, features: Tensor) -> Tensor:
        mean, scale = self._mean_and_scale
        return (features - mean) / scale

    @cached_property
    def _mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Of all training features: (F,) each. The scale of constant features is infinite, so that
        they become 0."""
        mean, std = self._train.mean(0), self._train.std(0)
        return mean, torch.where(std > 1e-6 * std.max(), std, torch.inf)


def _mean(accuracies: Sequence[float]) -> Accuracy:
    return Accuracy(float(np.mean(accuracies)), float(np.std(accuracies)))


def cell_functions(
    *,
    k: int = 20,
    temperature: float = 0.07,
    draws: int = 10,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels: Sequence[LabelBudget] = LABELS_PER_CLASS,
) -> dict[str, Callable[[ProbedFeatures], Accuracy]]:
    """The cells of an accuracy table, "linear_all", "knn_all", "linear_10", ..., "knn_1": for each
    entry of `labels`, each of `probes` under its name there, and kNN."""
    cells: dict[str, Callable[[ProbedFeatures], Accuracy]] = {}
    for count in labels:
        for name, probe in probes.items():
            cells[f"{name}_{count or 'all'}"] = partial(
                ProbedFeatures.probe, probe=probe, count=count, draws=draws
            )
        cells[f"knn_{count or 'all'}"] = partial(
            ProbedFeatures.knn, count=count, draws=draws, k=k, temperature=temperature
        )
    return cells


def evaluate_features(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    **settings: Any,
) -> dict[str, Accuracy]:
    """The accuracy table of features (M, F), labels (M,) and those of the test part (M', F), (M',):
    the cells of `cell_functions`, which takes the same settings."""
    features = ProbedFeatures(train, train_labels, test, test_labels)
    return {name: cell(features) for name, cell in cell_functions(**settings).items()}


def _samples(labels: Tensor, count: LabelBudget, draws: int) -> Iterator[Tensor | slice]:
    """The rows of each sample; all of them, once, where `count` is None."""
    if count is None:
        yield slice(None)
    else:
        yield from (sample_labels(labels, count, seed) for seed in range(draws))
