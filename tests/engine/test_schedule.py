"""Schedules by steps and by seconds under a budget, and ramps."""

import pytest

from fastssl.config import Config
from fastssl.objectives import configured
from fastssl.schedule import Schedule, TrainState, fit_warmup, ramp, require_full_views

CONFIG = Config(lr=2.0, final_lr=0.1, epochs=10, warmup_epochs=2)


def test_steps_decide_without_a_budget() -> None:
    schedule = Schedule(CONFIG, batches=5, log=print)
    assert schedule.total == schedule.steps(TrainState(7, 3.0)) == 50
    assert schedule.lr(TrainState(9)) == schedule.lr(TrainState(10)) == 2.0
    assert schedule.lr(TrainState(49)) == pytest.approx(0.2)
    assert not schedule.is_over(TrainState(49, 1e9)) and schedule.is_over(TrainState(50))


def test_a_time_budget_ends_the_same_curve_at_its_end() -> None:
    by_steps = Schedule(CONFIG, batches=500, log=print)
    by_time = Schedule(configured(CONFIG, time_budget_s=100.0), batches=5, log=print)
    for seconds in (10, 30, 50, 80, 99):
        at_step = by_steps.lr(TrainState(50 * seconds))
        assert by_time.lr(TrainState(3, seconds)) == pytest.approx(at_step, rel=2e-3)
    assert by_time.lr(TrainState(3, 10.0)) == pytest.approx(1.0, rel=1e-3)
    assert by_time.lr(TrainState(3, 200.0)) == pytest.approx(0.2)
    assert not by_time.is_over(TrainState(1000, 99.0)) and by_time.is_over(TrainState(1, 100.0))
    assert by_time.steps(TrainState(20, 25.0)) == 80


def test_the_target_accuracy_ends_a_run() -> None:
    schedule = Schedule(
        configured(CONFIG, target_accuracy=0.8, probe_epochs=1), batches=5, log=print
    )
    assert not schedule.is_over(TrainState(5, knn=0.79)) and schedule.is_over(
        TrainState(5, knn=0.8)
    )


def test_ramps_reach_the_full_views() -> None:
    config = configured(CONFIG, views=8, image_size=32, ramp_epochs=4, start_views=2, start_size=16)
    found = [(c.views, c.image_size) for c in (ramp(config, epoch) for epoch in range(6))]
    assert found == [(2, 16), (3, 20), (5, 24), (6, 28), (8, 32), (8, 32)]
    only_size = configured(config, start_views=0)
    assert [ramp(only_size, e).views for e in range(3)] == [8, 8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_accuracy": 80.0, "probe_epochs": 1}, "pass a fraction, such as 0.8"),
        ({"target_accuracy": 0.8}, "--target-accuracy needs --probe-epochs"),
        ({"start_size": 16}, "need --ramp-epochs"),
        ({"start_size": 300, "ramp_epochs": 2}, "must not exceed --image-size"),
        ({"start_views": 3, "ramp_epochs": 2}, "must not exceed --views"),
        ({"time_budget_s": -1.0}, "--time-budget-s is -1.0"),
        ({"accumulate": 2, "compile": True}, "add --no-compile"),
        ({"cuda_graphs": True}, "--cuda-graphs needs --compile"),
        ({"accumulate": 0}, "--accumulate is 0"),
    ],
)
def test_knobs_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(CONFIG, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [0.0, 100.0])
@pytest.mark.parametrize(("epochs", "warmup"), [(1, 10.0), (5, 5.0), (10, 9.0), (1, 0.0)])
def test_every_run_reaches_its_learning_rate(epochs: int, warmup: float, budget: float) -> None:
    config = configured(CONFIG, epochs=epochs, warmup_epochs=warmup, time_budget_s=budget)
    logged: list[str] = []
    schedule = Schedule(config, batches=20, log=logged.append)
    rates = [schedule.lr(TrainState(k, 5.0 * k / epochs)) for k in range(schedule.total)]
    assert max(rates) == pytest.approx(config.lr, rel=0.05)
    if warmup < epochs:
        assert not logged and fit_warmup(config, print) is config
        return
    assert rates[-1] < max(rates) / 2, "it decays after the warm-up"
    assert logged == [
        f"warning: a warm-up of {warmup:g} epochs in a run of {epochs} would not reach --lr; it is "
        f"shortened to {epochs / 10:g} (--warmup-epochs sets it)"
    ]


def test_a_ramp_as_long_as_the_run_is_refused() -> None:
    require_full_views(configured(CONFIG, ramp_epochs=9))
    require_full_views(configured(CONFIG, ramp_epochs=10, time_budget_s=60.0))
    with pytest.raises(ValueError, match="--ramp-epochs is 10 in a run of 10: no epoch"):
        require_full_views(configured(CONFIG, ramp_epochs=10))
