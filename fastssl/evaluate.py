"""How good frozen features are: kNN and linear probe, with all labels and with a few per class.

One neutral protocol for every method: one centre view, the backbone's features, no fine-tuning.
Labels enter the library here and nowhere else.

Shapes: M data set, F features, K classes, S pixels per side.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl.data import Images

LABELS_PER_CLASS = (None, 10, 5, 1)  # None: all of them
RAW_SIZE_PX = 32  # raw pixels are compared at no more than this, 3072 values


@dataclass(frozen=True)
class Accuracy:
    """Share of test images classified right, and its deviation over draws of the labels."""

    mean: float
    std: float = 0.0


@torch.no_grad()
def extract_features(
    backbone: nn.Module,
    images: Images,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device,
    batch_size: int = 256,
) -> Tensor:
    """Features (M, F) float32 on the CPU of images (M, S, S, 3) uint8, in evaluation mode, one
    centre view each."""
    training = backbone.training
    backbone.eval()
    shift = torch.tensor(mean, device=device).view(3, 1, 1)
    scale = torch.tensor(std, device=device).view(3, 1, 1)
    features = []
    for start in range(0, len(images), batch_size):
        pixels = _pixels(images[start : start + batch_size], image_size, device)
        features.append(backbone((pixels - shift) / scale).float().cpu())
    backbone.train(training)
    return torch.cat(features)


def raw_pixels(images: Images) -> Tensor:
    """The images themselves as features: (M, 3 S S) float32 in [0, 1], S at most RAW_SIZE_PX."""
    size = min(images.shape[1], RAW_SIZE_PX)
    parts = [
        _pixels(images[i : i + 1024], size, torch.device("cpu"))
        for i in range(0, len(images), 1024)
    ]
    return torch.cat([part.flatten(1) for part in parts])


def _pixels(images: Images, size: int, device: torch.device) -> Tensor:
    """(N, 3, size, size) float32 in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (size, size):
        x = functional.interpolate(
            x, size=(size, size), mode="bilinear", antialias=True, align_corners=False
        )
    return x


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

    (M, F), (M,), (M', F), (M',) -> share of test images right. Protocol of arXiv:1805.01978.
    """
    train, test = functional.normalize(train), functional.normalize(test)
    k = min(k, len(train))
    classes = int(train_labels.max()) + 1
    right = 0
    for rows, labels in zip(test.split(1024), test_labels.split(1024), strict=True):
        cosine, neighbours = (rows @ train.T).topk(k)
        votes = torch.zeros(len(rows), classes).scatter_add_(
            1, train_labels[neighbours], ((cosine - 1) / temperature).exp()
        )
        right += int((votes.argmax(1) == labels).sum())
    return right / len(test)


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

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> float:
    """Share of test images that `linear_probe` on the training features gets right."""
    weight, bias = linear_probe(train, train_labels)
    return float(((test @ weight.T + bias).argmax(1) == test_labels).float().mean())


def draw_labels(labels: Tensor, per_class: int, draw: int) -> Tensor:
    """Indices of `per_class` images of every class (of all, where it has fewer), the same for the
    same `draw`."""
    generator = torch.Generator().manual_seed(draw)
    shuffled = torch.randperm(len(labels), generator=generator)
    chosen = [shuffled[labels[shuffled] == k][:per_class] for k in labels.unique()]
    return torch.cat(chosen)


def evaluate_features(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    draws: int = 10,
) -> dict[str, Accuracy]:
    """{"linear_all", "knn_all", "linear_10", "knn_10", ..., "knn_1"} -> Accuracy.

    The linear probe sees features standardised by the mean and deviation of all training features,
    which needs no labels.
    """
    mean, std = train.mean(0), train.std(0)
    scale = torch.where(
        std > 1e-6 * std.max(), std, torch.inf
    )  # a constant feature says nothing: 0
    train_unit, test_unit = (train - mean) / scale, (test - mean) / scale
    table = {}
    for per_class in LABELS_PER_CLASS:
        chosen = (
            [draw_labels(train_labels, per_class, d) for d in range(draws)]
            if per_class
            else [slice(None)]
        )
        linear = [
            linear_probe_accuracy(train_unit[i], train_labels[i], test_unit, test_labels)
            for i in chosen
        ]
        knn = [
            knn_accuracy(train[i], train_labels[i], test, test_labels, k=k, temperature=temperature)
            for i in chosen
        ]
        for name, values in (("linear", linear), ("knn", knn)):
            table[f"{name}_{per_class or 'all'}"] = Accuracy(
                float(np.mean(values)), float(np.std(values))
            )
    return table
