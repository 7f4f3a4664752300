"""The detector on runs that collapse, by thresholds and by training, and on runs that do not."""

import pytest
import torch
from torch import Tensor

from fastssl.backbones import feature_width, seeded_backbone
from fastssl.config import Config
from fastssl.data.datasets import load_array
from fastssl.data.loading import build_views
from fastssl.evaluation.collapse import (
    CollapseDetector,
    CollapseError,
    SpectrumQueue,
    likely_causes,
)
from fastssl.objectives import build_objective, configured
from fastssl.optim import build_optimizer
from fastssl.recipes import recipe_config
from fastssl.step import view_features
from fastssl_pipelines import open_pipeline

VICREG = recipe_config("digits-barlow", method="vicreg")
BATCHES = 11  # of 128 in an epoch of the digits


def detector_and_log(
    mode: str = "warn", dimensions: int = 128, config: Config = VICREG
) -> tuple[CollapseDetector, list[str]]:
    logged: list[str] = []
    config = configured(config, on_collapse=mode)  # type: ignore[arg-type]
    return CollapseDetector(config, dimensions, logged.append), logged


def reports(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"rankme": rank, "feature_std": std} for rank, std in pairs]


@pytest.mark.parametrize(
    ("pairs", "word"),
    [
        ([(45, 0.28), (7, 0.49)], "RankMe is 7.0 of 128 (at best 45.0 here)"),
        ([(45, 0.28), (20, 0.03)], "spread is 0.03 (1 is isotropic; at best 0.28 here)"),
        ([(5, 1e-4)], "spread is 0.0001"),  # one point from the first step on
        ([(1.1, 0.2)], "RankMe is 1.1"),
    ],
)
def test_a_collapse_is_named_once_with_causes(pairs: list[tuple[float, float]], word: str) -> None:
    detector, logged = detector_and_log()
    for step, report in enumerate([{}, *reports(*pairs, pairs[-1], pairs[-1])]):
        detector.check(step, report)
    assert len(logged) == 1 and logged[0].startswith(
        "warning: the features have collapsed at step "
    )
    assert word in logged[0] and "--lr 0.0015 is too high" in logged[0]
    assert "\n" not in logged[0]


@pytest.mark.parametrize(
    "pairs",
    [
        [(45, 0.28), (32, 0.24), (30, 0.35)],  # the digits recipes
        [(600, 0.5), (140, 0.5)],  # a quarter of what it was, of 1024, but many directions
        [(45, 0.9), (40, 0.15)],  # less spread, but spread
        [(2.0, 0.05), (2.5, 0.04)],  # a deep net whose features start out alike
    ],
)
def test_no_collapse_is_reported(pairs: list[tuple[float, float]]) -> None:
    detector, logged = detector_and_log("stop", 1024 if pairs[0][0] > 500 else 128)
    for step, report in enumerate(reports(*pairs)):
        detector.check(step, report)
    assert not logged


def test_it_warns_again_after_a_recovery_and_can_be_silenced() -> None:
    fall = reports((45, 0.3), (5, 0.3), (40, 0.3), (5, 0.3))
    detector, logged = detector_and_log()
    silent, nothing = detector_and_log("ignore")
    for step, report in enumerate(fall):
        detector.check(step, report)
        silent.check(step, report)
    assert len(logged) == 2 and not nothing


def test_its_state_survives_a_resume() -> None:
    before, _ = detector_and_log("stop")
    before.check(1, reports((45, 0.3))[0])
    after, _ = detector_and_log("stop")
    after.load_state_dict(before.state_dict())
    with pytest.raises(CollapseError, match=r"at best 45\.0 here"):
        after.check(2, reports((5, 0.3))[0])


def test_causes_are_those_of_the_run() -> None:
    barlow = recipe_config("digits-barlow", lambd=0.0, batch_size=16, precision="bfloat16")
    text = "; ".join(likely_causes(barlow))
    assert "(--lambd 0)" in text and "--batch-size 16" in text and "bfloat16" in text
    assert "(--lambd tuned)" in "; ".join(likely_causes(configured(barlow, lambd=None)))
    assert "--lambd" not in "; ".join(likely_causes(VICREG))
    assert "--label-smoothing" in "; ".join(likely_causes(recipe_config("digits-diet")))


def train_checked(config: Config, epochs: int, detector: CollapseDetector) -> int:
    """Train on the digits, checking at the end of each epoch and at each report before it;
    -> steps."""
    device, step = torch.device("cpu"), 0
    images = load_array("digits", "train", holdout=0.2)
    pipeline = open_pipeline(
        "resident", images, views=build_views(config), batch_size=128, seed=0, device=device
    )
    backbone = seeded_backbone(config, device)
    features = feature_width(backbone, config.image_size)
    objective = build_objective(config, features=features, num_samples=len(images))
    optimizer = build_optimizer(config, [backbone, objective])
    queue = SpectrumQueue(features, device)
    for epoch in range(epochs):
        for batch in pipeline.epoch(epoch):
            views: list[Tensor] = view_features(backbone, batch.views)
            loss = objective(views, batch.index)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            queue.update(views)
            detector.check(step, queue.report(at_once=step % BATCHES == 0))
    return step


SMALL = {"image_size": 8}  # a quarter of the recipes' work


def test_a_run_that_collapses_is_stopped() -> None:
    """VICReg with invariance alone; its RankMe, 54 at best, falls to 10 in the third epoch."""
    config = configured(VICREG, std_coeff=0.0, cov_coeff=0.0, lr=3e-2, **SMALL)  # type: ignore[arg-type]
    detector, logged = detector_and_log("stop", config=config)
    with pytest.raises(CollapseError, match=r"--sim-coeff 25, --std-coeff 0, --cov-coeff 0"):
        train_checked(config, 5, detector)
    assert not logged


@pytest.mark.parametrize("method", ["diet", "barlow", "vicreg"])
def test_a_healthy_run_gives_no_warning(method: str) -> None:
    config = configured(VICREG, method=method, **SMALL)  # type: ignore[arg-type]
    detector, logged = detector_and_log("stop", config=config)
    assert train_checked(config, 2, detector) == 2 * BATCHES
    assert not logged
