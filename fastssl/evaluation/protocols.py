"""The protocols under which papers report accuracy, each by name, on a finished run.

Numbers of different protocols cannot be compared: an average over 128 patches of a 4,096-wide layer
beats one centre view of the backbone by points. Every run reports `neutral`; the others are for
standing beside their paper. All score the last epoch.

Shapes: M data set, F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.data.datasets import Images
from fastssl.data.loading import load_both
from fastssl.evaluation.probes import (
    ALL_LABELS,
    PROBES,
    Accuracy,
    Descent,
    Probe,
    descent_probe,
    evaluate_features,
)
from fastssl.evaluation.trained_run import Frozen, Network, load_frozen
from fastssl.pretrain import evaluate_folder

Table = dict[str, dict[str, Accuracy]]


@dataclass(frozen=True)
class Protocol:
    """What is averaged (`views` of the training policy, the centre view among them or not, on the
    backbone's features or on the projector's first layer after its ReLU) and probed how."""

    source: str
    views: int = 1
    centre: bool = True
    projector_layer: bool = False
    probe: Probe = PROBES["lbfgs"]


PROTOCOLS: dict[str, Protocol] = {
    "neutral": Protocol("one centre view, the backbone's features; L-BFGS"),
    "multiview": Protocol(
        "arXiv:2312.10725: the image and 15 augmented views, averaged; Adam 1e-3, 200 epochs, "
        "batch 512, label smoothing 0.1 (of 50,000 images; on a few thousand too few steps: take "
        "--probe lbfgs)",
        views=16,
        probe=Probe(
            partial(
                descent_probe,
                descent=Descent(
                    optimizer="adam", lr=1e-3, epochs=200, batch_size=512, label_smoothing=0.1
                ),
            ),
            standardised=False,
        ),
    ),
    "patches": Protocol(
        "arXiv:2304.03977: 128 augmented patches, averaged, on the projector's first layer after "
        "its ReLU; SGD 0.03, 100 epochs, batch 100, weight decay 5e-5",
        views=128,
        centre=False,
        projector_layer=True,
        probe=Probe(
            partial(
                descent_probe,
                descent=Descent(lr=0.03, epochs=100, batch_size=100, weight_decay=5e-5),
            ),
            standardised=False,
        ),
    ),
}


def evaluate_protocol(
    folder: Path,
    name: str,
    say: Callable[[str], None],
    *,
    probes: tuple[str, ...] = (),
    views: int | None = None,
) -> Table:
    """The accuracy table of a finished run under a protocol, with all labels, 10 %, 1 %, and 10, 5,
    1 per class. probes: names of PROBES; by default the protocol's own. views: other than its own.

    ValueError where the data has no labels, where views do not fit the protocol, or where it probes
    a projector and the method has none.
    """
    protocol = PROTOCOLS[name]
    count = views or protocol.views
    if (count == 1) != (name == "neutral"):
        raise ValueError(
            f"--views is {count}: protocol neutral has one centre view, {name} averages several"
            if name != "neutral"
            else f"--views is {count}: protocol neutral has one; --protocol multiview averages them"
        )
    chosen = _chosen(protocol, probes)
    if name == "neutral":
        table, _ = evaluate_folder(folder, probes=chosen, labels_used=ALL_LABELS)
        _require_labels(bool(table), folder)
        return table
    run = load_frozen(folder, say)
    network = _network(protocol, run, name)
    images, labels = load_both(run.config)
    _require_labels(labels[0] is not None and labels[1] is not None, folder)
    train_y, test_y = (torch.from_numpy(y) for y in labels if y is not None)
    train, test = (_average(run, x, network, count, protocol.centre) for x in images)
    cells = evaluate_features(
        *(train, train_y, test, test_y),
        k=run.config.knn_k,
        temperature=run.config.knn_temperature,
        draws=run.config.label_draws,
        probes=chosen,
        labels=ALL_LABELS,
    )
    return {f"pretrained, {name} ({count} views)": cells}


def _chosen(protocol: Protocol, probes: tuple[str, ...]) -> Mapping[str, Probe]:
    if probes:
        return {"linear" if name == "lbfgs" else name: PROBES[name] for name in probes}
    return {"linear": protocol.probe}


def _require_labels(there: bool, folder: Path) -> None:
    if not there:
        raise ValueError(
            f"the data of {folder} has no labels, so no probe can be trained; "
            f"`fastssl rank {folder}` needs none"
        )


def _network(protocol: Protocol, run: Frozen, name: str) -> Network:
    """Views (N, 3, S, S) -> what the protocol averages (N, F)."""
    if not protocol.projector_layer:
        return run.backbone
    if run.projector is None or len(run.projector) < 3:
        raise ValueError(
            f"protocol {name} probes the projector's first layer after its ReLU, and this "
            f"{run.config.method} run has none; use --protocol multiview"
        )
    return nn.Sequential(run.backbone, *run.projector[:3])


def _average(run: Frozen, images: Images, network: Network, views: int, centre: bool) -> Tensor:
    """(M, S, S, 3) -> (M, F): the mean over views; the centre view is one of them, or not."""
    augmented = views - 1 if centre else views
    total = torch.cat([rows.sum(1) for rows in run.view_features(images, augmented, network)])
    return (total + run.centre_features(images) if centre else total) / views
