"""Label-free model selection: the spectrum of a finished run's features and embeddings, and the
ranking of runs of one method by each criterion.

Shapes: M samples, F features, D embedding, Q views.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.data.splits import open_split, sample_indices
from fastssl.evaluation.defaults import LIDAR_IMAGES, LIDAR_VIEWS, RANKME_SAMPLES
from fastssl.evaluation.spectrum import alpha_req, effective_rank, lidar, rankme
from fastssl.evaluation.trained_run import load_trained_run
from fastssl.runtime.run_dir import read_config, write_text

FILE = "rank.json"

Criteria = dict[str, float]  # "rankme" | "effective_rank" | "alpha_req" | "lidar" -> value
# sort keys, the best run first; good features have alpha-ReQ near 1
SORT_KEYS: dict[str, Callable[[float], float]] = {
    "rankme": lambda value: -value,
    "effective_rank": lambda value: -value,
    "alpha_req": lambda value: abs(value - 1),
    "lidar": lambda value: -value,
}


def measure_quality(
    folder: Path,
    log: Callable[[str], None],
    *,
    samples: int = RANKME_SAMPLES,
    images: int = LIDAR_IMAGES,
    views: int = LIDAR_VIEWS,
) -> dict[str, Criteria]:
    """{"features": Criteria, "embeddings": Criteria} of a finished run on its training images,
    without "embeddings" where the method has no projector; cached in the folder's rank.json.

    RankMe, effective rank and alpha-ReQ of the centre view of up to `samples` images; LiDAR of
    `views` augmented views of up to `images`; both drawn by the run's seed. Reads no labels.
    ValueError where `views` is below 2.
    """
    if views < 2 or samples < 2 or images < 2:
        raise ValueError(
            f"--samples is {samples}, --images {images}, --views {views}: each must be at least 2"
        )
    seed = read_config(folder).seed
    settings = {"samples": samples, "images": images, "views": views, "seed": seed}
    path = folder / FILE
    if path.is_file() and (cached := json.loads(path.read_text()))["settings"] == settings:
        return _from_json(cached["quality"])
    run = load_trained_run(folder, log)
    split = open_split(run.config, "train")
    centre = run.centre_features(split, sample_indices(len(split), samples, seed))  # (M, F)
    chosen = sample_indices(len(split), images, seed)
    found = run.view_features(split, views, run.backbone, chosen)
    augmented = torch.cat([rows for _, rows in found])  # (M, V, F)
    quality = {"features": _criteria(centre, augmented)}
    if run.projector is not None:
        quality["embeddings"] = _criteria(
            *(_embed(run.projector, rows, run.device) for rows in (centre, augmented))
        )
    write_text(path, json.dumps({"settings": settings, "quality": _to_json(quality)}, indent=2))
    return quality


def _criteria(centre: Tensor, augmented: Tensor) -> Criteria:
    return {
        "rankme": rankme(centre),
        "effective_rank": effective_rank(centre),
        "alpha_req": alpha_req(centre),
        "lidar": lidar(augmented),
    }


@torch.no_grad()
def _embed(projector: nn.Module, features: Tensor, device: torch.device) -> Tensor:
    """(..., F) -> (..., D), on the CPU."""
    rows = [projector(part.to(device)).cpu() for part in features.flatten(0, -2).split(4096)]
    return torch.cat(rows).unflatten(0, features.shape[:-1])


def _to_json(quality: dict[str, Criteria]) -> dict[str, Any]:
    return {
        layer: {k: v if v < float("inf") else None for k, v in row.items()}
        for layer, row in quality.items()
    }


def _from_json(cached: dict[str, Any]) -> dict[str, Criteria]:
    return {
        layer: {k: float("inf") if v is None else v for k, v in row.items()}
        for layer, row in cached.items()
    }


def require_comparable(folders: Sequence[Path]) -> None:
    """ValueError where the runs differ in method or data, which no criterion compares."""
    for knob in ("method", "data"):
        by_value: dict[str, str] = {}
        for folder in folders:
            by_value.setdefault(str(getattr(read_config(folder), knob)), folder.name)
        if len(by_value) > 1:
            found = ", ".join(f"{value} ({name})" for value, name in by_value.items())
            raise ValueError(
                f"the runs differ in --{knob}: {found}; no criterion compares those; pass runs "
                "of one, or --force"
            )


def rank_runs(values: Sequence[float], criterion: str) -> list[int]:
    """The rank of each run by one criterion, 1 the best; equal values share a rank."""
    keys = [SORT_KEYS[criterion](value) for value in values]
    return [1 + sum(other < key for other in keys) for key in keys]
