"""Evaluation protocols of papers, by name, on a finished run.

Accuracies of different protocols are not comparable: an average over 128 patches of a 4,096-wide
layer beats one centre view of the backbone by points. Every run reports `neutral`; the others are
for comparison with their papers. All evaluate the last epoch.

Shapes: M data set, F features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.backbones import seeded_backbone
from fastssl.config import Config
from fastssl.data.splits import ArraySplit, Split, open_split
from fastssl.device import choose_device
from fastssl.distributed import SINGLE_PROCESS, Ranks
from fastssl.evaluation.features import Function, centre_features, extract, raw_pixels
from fastssl.evaluation.probes import (
    ALL_LABELS,
    LABELS_PER_CLASS,
    NEUTRAL,
    PROBES,
    Accuracy,
    LabelBudget,
    Probe,
    SGDSettings,
    evaluate_features,
    sgd_probe,
)
from fastssl.evaluation.spectrum import RANKME_SAMPLES, rankme
from fastssl.evaluation.trained_run import Network, TrainedRun, load_trained_run
from fastssl.runtime.run_dir import read_config
from fastssl.weights import FILE, load_weights

RAW_PIXELS_STREAMED = 2048  # images, of both parts

Table = dict[str, dict[str, Accuracy]]
"""Kind of features ("raw pixels" | "untrained" | "pretrained") -> probe and labels -> accuracy."""


@dataclass(frozen=True)
class Protocol:
    """Features averaged over `views` of the training policy, with or without the centre view, of
    the backbone or of the projector's first layer after its ReLU; and the probe on them."""

    source: str
    views: int = 1
    centre: bool = True
    projector_layer: bool = False
    probe: Probe = PROBES["lbfgs"]


PROTOCOLS: dict[str, Protocol] = {
    "neutral": Protocol("one centre view, the backbone's features; L-BFGS"),
    "multiview": Protocol(
        "arXiv:2312.10725: the image and 15 augmented views, averaged; Adam 1e-3, 200 epochs, "
        "batch 512, label smoothing 0.1 (for 50,000 images; too few steps on a few thousand: "
        "use --probe lbfgs)",
        views=16,
        probe=Probe(
            partial(
                sgd_probe,
                settings=SGDSettings(
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
                sgd_probe,
                settings=SGDSettings(lr=0.03, epochs=100, batch_size=100, weight_decay=5e-5),
            ),
            standardised=False,
        ),
    ),
}


@dataclass(frozen=True)
class RunFeatures:
    """Features of both parts of a run's data, by kind: (train (M, F), test (M', F)), in the order
    in which they are reported; their labels (M,) and (M',), None where the data has none."""

    by_kind: dict[str, tuple[Tensor, Tensor]]
    labels: tuple[Tensor, Tensor] | None


def run_features(
    config: Config, folder: Path, train: Split, test: Split, ranks: Ranks = SINGLE_PROCESS
) -> RunFeatures:
    """What a run is evaluated on, extracted over all ranks; complete on rank 0 alone.

    With labels the untrained backbone and raw pixels are evaluated too; raw pixels of streamed
    images only where they are few, since their features are larger than the images.
    """
    device = choose_device(config.device)
    pretrained = seeded_backbone(config, device)
    load_weights(folder / FILE, pretrained)
    functions: dict[str, Function] = {"pretrained": partial(centre_features, config, pretrained)}
    labels = train.labels(), test.labels()
    if labels[0] is not None and labels[1] is not None:
        untrained = seeded_backbone(config, device)
        functions = {"untrained": partial(centre_features, config, untrained), **functions}
        held = config.engine == "resident" or isinstance(train, ArraySplit)
        if held or len(train) + len(test) <= RAW_PIXELS_STREAMED:
            functions = {"raw pixels": raw_pixels, **functions}
    train_numbers, train_rows = extract(train, functions, ranks=ranks)
    test_numbers, test_rows = extract(test, functions, ranks=ranks)
    by_kind = {name: (train_rows[name], test_rows[name]) for name in train_rows}
    if labels[0] is None or labels[1] is None:
        return RunFeatures(by_kind, None)
    return RunFeatures(by_kind, (labels[0][train_numbers], labels[1][test_numbers]))


def score(
    config: Config,
    features: RunFeatures,
    *,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[LabelBudget] = LABELS_PER_CLASS,
) -> tuple[Table, float]:
    """(accuracies, an empty table where the data has no labels; RankMe of the pretrained
    features)."""
    rank = rankme(features.by_kind["pretrained"][0][:RANKME_SAMPLES])
    table: Table = {}
    if features.labels is not None:
        train_y, test_y = features.labels
        for kind, (train_x, test_x) in features.by_kind.items():
            table[kind] = _cells(config, train_x, train_y, test_x, test_y, probes, labels_used)
    return table, rank


def evaluate_run(
    folder: Path,
    *,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[LabelBudget] = LABELS_PER_CLASS,
) -> tuple[Table, float]:
    """`score` of a finished run, from its folder."""
    config = read_config(folder)
    train, test = open_split(config, "train"), open_split(config, "test")
    features = run_features(config, folder, train, test)
    return score(config, features, probes=probes, labels_used=labels_used)


def evaluate_protocol(
    folder: Path,
    name: str,
    log: Callable[[str], None],
    *,
    probes: tuple[str, ...] = (),
    views: int | None = None,
) -> Table:
    """The accuracy table of a finished run under a protocol, with all labels, 10 %, 1 %, and 10, 5,
    1 per class. probes: names of PROBES; by default the protocol's. views: replaces its number.

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
        table, _ = evaluate_run(folder, probes=chosen, labels_used=ALL_LABELS)
        _require_labels(bool(table), folder)
        return table
    run = load_trained_run(folder, log)
    network = _network(protocol, run, name)
    features, labels = [], []
    for split in (open_split(run.config, "train"), open_split(run.config, "test")):
        found = split.labels()
        _require_labels(found is not None, folder)
        assert found is not None
        numbers, rows = _average(run, split, network, count, protocol.centre)
        features.append(rows)
        labels.append(found[numbers])
    cells = _cells(run.config, features[0], labels[0], features[1], labels[1], chosen, ALL_LABELS)
    return {f"pretrained, {name} ({count} views)": cells}


def _cells(
    config: Config,
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    probes: Mapping[str, Probe],
    labels_used: Sequence[LabelBudget],
) -> dict[str, Accuracy]:
    return evaluate_features(
        train,
        train_labels,
        test,
        test_labels,
        k=config.knn_k,
        temperature=config.knn_temperature,
        draws=config.label_draws,
        probes=probes,
        labels=labels_used,
    )


def _chosen(protocol: Protocol, probes: tuple[str, ...]) -> Mapping[str, Probe]:
    if probes:
        return {"linear" if name == "lbfgs" else name: PROBES[name] for name in probes}
    return {"linear": protocol.probe}


def _require_labels(available: bool, folder: Path) -> None:
    if not available:
        raise ValueError(
            f"the data of {folder} has no labels, so no probe can be trained; "
            f"`fastssl rank {folder}` needs none"
        )


def _network(protocol: Protocol, run: TrainedRun, name: str) -> Network:
    """The network that the protocol averages: views (N, 3, S, S) -> (N, F)."""
    if not protocol.projector_layer:
        return run.backbone
    if run.projector is None or len(run.projector) < 3:
        raise ValueError(
            f"protocol {name} probes the projector's first layer after its ReLU, and this "
            f"{run.config.method} run has none; use --protocol multiview"
        )
    return nn.Sequential(run.backbone, *run.projector[:3])


def _average(
    run: TrainedRun, split: Split, network: Network, views: int, centre: bool
) -> tuple[Tensor, Tensor]:
    """The numbers (M,) of the readable images of `split`, and the mean of their features over views
    (M, F), with or without the centre view."""
    augmented = views - 1 if centre else views
    found = list(run.view_features(split, augmented, network))
    numbers = torch.cat([part for part, _ in found])
    total = torch.cat([rows.sum(1) for _, rows in found])
    return numbers, (total + run.centre_features(split) if centre else total) / views
