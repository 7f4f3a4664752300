"""Evaluation protocols of papers, by name, on a finished run.

Accuracies of different protocols are not comparable: an average over 128 patches of a 4,096-wide
layer beats one centre view of the backbone by points. Every run reports `neutral`; the others are
for comparison with their papers. All evaluate the last epoch.

Shapes: M data set, F features.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.backbones import seeded_backbone
from fastssl.config import Config
from fastssl.data.splits import ArraySplit, Split, open_split, sample_indices
from fastssl.device import choose_device
from fastssl.distributed import SINGLE_PROCESS, Ranks, init_distributed
from fastssl.evaluation.defaults import PROTOCOL_SOURCES, RANKME_SAMPLES
from fastssl.evaluation.features import (
    Function,
    centre_features,
    extract,
    interleave,
    raw_pixels,
)
from fastssl.evaluation.partial_results import Cell, PartialResults
from fastssl.evaluation.probes import (
    ALL_LABELS,
    LABELS_PER_CLASS,
    NEUTRAL,
    PROBES,
    Accuracy,
    LabelBudget,
    Probe,
    ProbedFeatures,
    SGDSettings,
    cell_functions,
    sgd_probe,
)
from fastssl.evaluation.progress import Progress
from fastssl.evaluation.spectrum import rankme
from fastssl.evaluation.trained_run import Network, TrainedRun, load_trained_run
from fastssl.runtime.run_dir import flat, read_config, write_text
from fastssl.runtime.run_log import discard
from fastssl.runtime.weights import FILE, load_weights

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
    "neutral": Protocol(PROTOCOL_SOURCES["neutral"]),
    "multiview": Protocol(
        PROTOCOL_SOURCES["multiview"],
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
        PROTOCOL_SOURCES["patches"],
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
class Features:
    """Features of both parts of a run's data, by kind: (train (M, F), test (M', F)), in the order
    in which they are reported; their labels (M,) and (M',), None where there are no classes or no
    test part; and the unreadable images of each part by name, with the reason."""

    by_kind: dict[str, tuple[Tensor, Tensor]]
    labels: tuple[Tensor, Tensor] | None
    skipped: tuple[dict[str, str], dict[str, str]]


@dataclass(frozen=True)
class Evaluation:
    """The accuracy table, empty where the data has no classes or no test part; RankMe of the
    pretrained features; the unreadable images of each part by name, with the reason."""

    table: Table
    rankme: float
    skipped: tuple[dict[str, str], dict[str, str]]


def evaluate(
    config: Config,
    folder: Path,
    train: Split,
    test: Split,
    log: Callable[[str], None],
    *,
    ranks: Ranks = SINGLE_PROCESS,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[LabelBudget] = LABELS_PER_CLASS,
) -> Evaluation:
    """Evaluate the backbone of the run in `folder` by one centre view of each image; a collective
    call, which returns the same on every rank.

    The ranks share the extraction of the features and the probes. Killed, it resumes from what it
    had finished. `log` takes a line of progress at intervals.
    """
    extracted = partial(_neutral_features, config, folder, train, test, ranks)
    settings = {"protocol": "neutral"}
    return _evaluate(config, folder, settings, extracted, log, ranks, probes, labels_used)


def _evaluate(
    config: Config,
    folder: Path,
    settings: Mapping[str, Any],
    extracted: Callable[[Progress], Features],
    log: Callable[[str], None],
    ranks: Ranks,
    probes: Mapping[str, Probe],
    labels_used: Sequence[LabelBudget],
) -> Evaluation:
    """The evaluation of the features that `extracted` returns, on rank 0 all of them; `settings`
    are those that `config` has not."""
    knobs = {name: value for name, value in flat(config).items() if name != "run"}
    described = {name: _description(probe) for name, probe in probes.items()}
    partial_results = PartialResults(folder, {**knobs, **settings, "probes": described}, log)
    with Progress(log) as progress:
        features, shared = _shared_features(partial_results, extracted, ranks, progress)
        rank, table = 0.0, {}
        if ranks.is_main and (pretrained := features.by_kind.get("pretrained")):
            progress.doing = "RankMe"
            rows = pretrained[0]
            rank = rankme(rows[sample_indices(len(rows), RANKME_SAMPLES, config.seed)])
        cells = cell_functions(
            k=config.knn_k,
            temperature=config.knn_temperature,
            draws=config.label_draws,
            probes=probes,
            labels=labels_used,
        )
        share = ranks if shared else SINGLE_PROCESS
        mine = _accuracies(features, cells, partial_results, share, progress)
        progress.doing = "waiting for the other ranks"
        found: dict[Cell, Accuracy] = {}
        for part in ranks.gather(mine):
            found |= part
        if features.labels is not None:
            table = {k: {name: found[k, name] for name in cells} for k in features.by_kind}
        rank = ranks.broadcast(rank)
    if ranks.is_main:
        partial_results.delete()
    return Evaluation(table, rank, features.skipped)


def _description(probe: Probe) -> str:
    """Equal for probes that are fitted alike, in any process."""
    fit = probe.fit if isinstance(probe.fit, partial) else partial(probe.fit)
    return f"{fit.func.__qualname__} {fit.keywords}, standardised {probe.standardised}"


def _shared_features(
    partial_results: PartialResults,
    extracted: Callable[[Progress], Features],
    ranks: Ranks,
    progress: Progress,
) -> tuple[Features, bool]:
    """(the features, whether every rank has them): those of an evaluation that was killed, or new
    ones, which the other ranks read from the file that rank 0 writes."""
    saved = partial_results.load_features()
    (missing,) = ranks.all_reduce_max(saved is None)
    if missing:
        features = extracted(progress)
        if ranks.is_main:
            progress.doing = "saving the features"
            partial_results.save_features(vars(features))
        ranks.barrier()
        saved = None if ranks.is_main else partial_results.load_features()
        (missing,) = ranks.all_reduce_max(saved is None and not ranks.is_main)
        if saved is None or missing:
            return features, not missing
    assert saved is not None
    return Features(**saved), True


def _accuracies(
    features: Features,
    cells: Mapping[str, Callable[[ProbedFeatures], Accuracy]],
    partial_results: PartialResults,
    ranks: Ranks,
    progress: Progress,
) -> dict[Cell, Accuracy]:
    """This rank's share of the table's cells, and those that were computed before."""
    if features.labels is None:
        return {}
    train_labels, test_labels = features.labels
    probed = {
        kind: ProbedFeatures(train, train_labels, test, test_labels)
        for kind, (train, test) in features.by_kind.items()
    }
    found = partial_results.load_accuracies()
    # Kinds vary fastest: the cells of all labels, the slowest by far, come first and are shared.
    # Every second round goes backwards, or with two ranks the first would get most linear probes.
    order = [*range(ranks.world), *reversed(range(ranks.world))]
    share = [
        (kind, name)
        for (kind, name), rank in zip(
            ((kind, name) for name in cells for kind in probed), cycle(order), strict=False
        )
        if rank == ranks.rank
    ]
    for number, (kind, name) in enumerate(share, 1):
        if (kind, name) not in found:
            progress.doing = f"{name} of {kind} features, {number} of {len(share)} probes"
            found[kind, name] = cells[name](probed[kind])
            partial_results.save_accuracies(ranks.rank, found)
    return found


def _neutral_features(
    config: Config, folder: Path, train: Split, test: Split, ranks: Ranks, progress: Progress
) -> Features:
    """One centre view of each image, extracted over all ranks; complete on rank 0 alone.

    With labels the untrained backbone and raw pixels are evaluated too; raw pixels of streamed
    images only where they are few, since their features are larger than the images. Without labels
    no more than the images of RankMe are read.
    """
    device = choose_device(config.device)
    pretrained = seeded_backbone(config, device)
    load_weights(folder / FILE, pretrained)
    functions: dict[str, Function] = {"pretrained": partial(centre_features, config, pretrained)}
    labels = _labels(train, test)
    if labels is None:
        chosen = sample_indices(len(train), RANKME_SAMPLES, config.seed)
        progress.doing = f"features of {len(chosen)} training images"
        _, rows = extract(train, functions, chosen=chosen, ranks=ranks)
        by_kind = {name: (x, x.new_empty(0, x.shape[1])) for name, x in rows.items()}
        return Features(by_kind, None, (_skipped(train, ranks), {}))
    untrained = seeded_backbone(config, device)
    functions = {"untrained": partial(centre_features, config, untrained), **functions}
    held = config.engine == "resident" or isinstance(train, ArraySplit)
    if held or len(train) + len(test) <= RAW_PIXELS_STREAMED:
        functions = {"raw pixels": raw_pixels, **functions}
    progress.doing = f"features of {len(train)} training images"
    train_numbers, train_rows = extract(train, functions, ranks=ranks)
    progress.doing = f"features of {len(test)} test images"
    test_numbers, test_rows = extract(test, functions, ranks=ranks)
    return Features(
        {name: (train_rows[name], test_rows[name]) for name in train_rows},
        (labels[0][train_numbers], labels[1][test_numbers]),
        (_skipped(train, ranks), _skipped(test, ranks)),
    )


def _labels(train: Split, test: Split) -> tuple[Tensor, Tensor] | None:
    """The labels of both parts; None where there are no classes or no test part."""
    if not len(test):
        return None
    labels = train.labels(), test.labels()
    return None if labels[0] is None or labels[1] is None else (labels[0], labels[1])


def _skipped(split: Split, ranks: Ranks) -> dict[str, str]:
    """The unreadable images that any rank has met, by name, with the reason."""
    return {name: why for part in ranks.gather(dict(split.skipped)) for name, why in part.items()}


def evaluate_run(
    folder: Path,
    log: Callable[[str], None] = print,
    *,
    probes: Mapping[str, Probe] = NEUTRAL,
    labels_used: Sequence[LabelBudget] = LABELS_PER_CLASS,
) -> tuple[Table, float]:
    """(the accuracy table, RankMe) of a finished run, from its folder; the ranks of a torchrun
    launch share it. The summary of a run with --no-eval gets them."""
    begin = time.perf_counter()
    config = read_config(folder)
    train, test = open_split(config, "train"), open_split(config, "test")
    with init_distributed(config.device) as ranks:
        found = evaluate(
            config,
            folder,
            train,
            test,
            log if ranks.is_main else discard,
            ranks=ranks,
            probes=probes,
            labels_used=labels_used,
        )
        path = folder / "summary.json"
        if ranks.is_main and path.is_file():
            summary = json.loads(path.read_text())
            if summary.get("rankme", 0.0) is None:  # of a run with --no-eval
                spent_s = time.perf_counter() - begin
                results = evaluation_summary(found, spent_s)
                write_text(path, json.dumps(summary | results, indent=2))
    return found.table, found.rankme


def evaluation_summary(found: Evaluation | None, evaluate_s: float) -> dict[str, Any]:
    """The fields of summary.json that an evaluation gives; without one, those of --no-eval."""
    table = found.table if found else {}
    return {
        "accuracy": {row: {k: asdict(cell) for k, cell in table[row].items()} for row in table},
        "rankme": found.rankme if found else None,
        "evaluate_s": round(evaluate_s, 2),
    }


def evaluate_protocol(
    folder: Path,
    name: str,
    log: Callable[[str], None],
    *,
    probes: tuple[str, ...] = (),
    views: int | None = None,
) -> Table:
    """The accuracy table of a finished run under a protocol, with all labels, 10 %, 1 %, and 10, 5,
    1 per class; the ranks of a torchrun launch share it. probes: names of PROBES; by default the
    protocol's. views: replaces its number.

    ValueError where the data has no classes or no test part, where views do not fit the protocol,
    or where it probes a projector and the method has none.
    """
    protocol = PROTOCOLS[name]
    count = views or protocol.views
    if (count == 1) != (name == "neutral"):
        raise ValueError(
            f"--views is {count}: protocol neutral has one centre view, {name} averages several"
            if name != "neutral"
            else f"--views is {count}: protocol neutral has one; --protocol multiview averages them"
        )
    config, chosen = read_config(folder), _chosen(protocol, probes)
    parts = open_split(config, "train"), open_split(config, "test")
    _require_labels(parts, folder)
    if name == "neutral":
        return evaluate_run(folder, log, probes=chosen, labels_used=ALL_LABELS)[0]
    with init_distributed(config.device) as ranks:
        log = log if ranks.is_main else discard
        run = load_trained_run(folder, log)
        network = _network(protocol, run, name)
        kind = f"pretrained, {name} ({count} views)"
        extracted = partial(_view_features, run, parts, network, count, protocol, kind, ranks)
        settings = {"protocol": name, "count": count}
        found = _evaluate(config, folder, settings, extracted, log, ranks, chosen, ALL_LABELS)
    return found.table


def _view_features(
    run: TrainedRun,
    parts: tuple[Split, Split],
    network: Network,
    views: int,
    protocol: Protocol,
    kind: str,
    ranks: Ranks,
    progress: Progress,
) -> Features:
    """Features averaged over views, extracted over all ranks; complete on rank 0 alone."""
    labels = _labels(*parts)
    assert labels is not None  # they have been required
    rows, known = [], []
    for split, found in zip(parts, labels, strict=True):
        progress.doing = f"{views} views of {len(split)} images"
        numbers, averages = _average(run, split, network, views, protocol.centre, ranks)
        rows.append(averages)
        known.append(found[numbers])
    skipped = _skipped(parts[0], ranks), _skipped(parts[1], ranks)
    return Features({kind: (rows[0], rows[1])}, (known[0], known[1]), skipped)


def _chosen(protocol: Protocol, probes: tuple[str, ...]) -> Mapping[str, Probe]:
    if probes:
        return {"linear" if name == "lbfgs" else name: PROBES[name] for name in probes}
    return {"linear": protocol.probe}


def _require_labels(parts: tuple[Split, Split], folder: Path) -> None:
    if _labels(*parts) is None:
        lacks = "labels of two classes or more" if len(parts[1]) else "test part"
        raise ValueError(
            f"the data of {folder} has no {lacks}, so no probe can be evaluated; "
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
    run: TrainedRun,
    split: Split,
    network: Network,
    views: int,
    centre: bool,
    ranks: Ranks = SINGLE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """The numbers (M,) of the readable images of `split`, and the mean of their features over views
    (M, F), with or without the centre view; empty on all ranks but rank 0."""
    augmented = views - 1 if centre else views
    found = [
        (numbers, rows.sum(1))
        for numbers, rows in run.view_features(split, augmented, network, ranks=ranks)
    ]
    parts = interleave(ranks.gather_to_main(found))
    centres = run.centre_features(split, ranks=ranks) if centre else None
    if not parts:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, 0)
    total = torch.cat([rows for _, rows in parts])
    return torch.cat([part for part, _ in parts]), (
        total if centres is None else total + centres
    ) / views
