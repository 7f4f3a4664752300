"""Tables and figures of the accuracy experiments, from rows with known results."""

from pathlib import Path

import pytest

from bench.experiments import (
    by_method,
    gain_table,
    methods_table,
    pareto_front,
    plot_accuracy_against_time,
    plot_error_against_time,
    plot_loss_against_probe,
    rank_correlation,
    time_to,
    time_to_table,
)
from bench.suites import accuracy


def probes(*knn: float) -> list[dict[str, float]]:
    return [
        {"step": 10 * k, "train_s": 5.0 * k, "knn": x, "loss": 9 - x} for k, x in enumerate(knn, 1)
    ]


def run(case: str, seed: int, *knn: float) -> dict[str, object]:
    features = {
        f"{row}_{probe}": value + 0.01 * seed
        for row, value in (("raw pixels", 0.2), ("untrained", 0.3), ("pretrained", knn[-1]))
        for probe in ("knn_all", "linear_all", "knn_10", "linear_10")
    }
    return {
        "case": case,
        "parameters": {"seed": seed},
        "train_s": 10.0 + seed,
        "views_per_s": 2000.0,
        "probes": probes(*knn),
        **features,
    }


ROWS = [run("a", 0, 0.3, 0.4), run("a", 1, 0.3, 0.5), run("b", 0, 0.45, 0.6), run("b", 1, 0.3, 0.4)]


def test_methods_table() -> None:
    lines = methods_table([*ROWS, {"case": "c", "failed": "x"}]).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| raw pixels | 2 |  |  | 0.205 ± 0.007 |")
    assert lines[5].startswith("| b | 2 | 10 ± 1 | 2,000 | 0.505 ± 0.134 |")


def test_times_to_the_accuracy_of_the_reference() -> None:
    lines = time_to_table(ROWS).splitlines()  # the target is .45, that of the first case
    assert "s to kNN 0.450" in lines[0]
    assert lines[2].endswith("| 0.450 ± 0.071 | 0.455 ± 0.078 | 10 (1 of 2 runs) |")
    assert lines[3].endswith("| 0.500 ± 0.141 | 0.505 ± 0.134 | 5 (1 of 2 runs) |")
    better = time_to_table([*ROWS, run("c", 0, 0.7, 0.85)]).splitlines()
    assert "s to kNN 0.800" in better[0]
    assert better[2].endswith("| not reached |") and better[4].endswith("| 10 |")
    assert time_to(probes(0.1, 0.2, 0.3), 0.2) == 10.0
    assert time_to(probes(0.1, 0.2), 0.3) is None


def test_gain_table() -> None:
    first = {**ROWS[0], "seconds_to_target": 100.0, "times_faster": 1.0}
    second = {**ROWS[2], "seconds_to_target": 20.0, "times_faster": 5.0}
    third = {**ROWS[3], "case": "c", "seconds_to_target": None, "times_faster": None}
    lines = gain_table([first, second, third]).splitlines()
    assert lines[3] == "| b | 1 | 2,000 | 10 | 0.600 | 20 | 5.0 |"
    assert lines[4] == "| c | 1 | 2,000 | 11 | 0.400 | not reached |  |"


def test_figures_and_the_correlation(tmp_path: Path) -> None:
    assert rank_correlation([run("x", 0, 0.1, 0.2, 0.3)]) == pytest.approx(-1)
    plot_accuracy_against_time(ROWS, tmp_path / "a.png")
    plot_loss_against_probe(ROWS, tmp_path / "b.png")
    plot_error_against_time(ROWS, tmp_path / "c.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("a.png", "b.png", "c.png"))


def test_pareto_front() -> None:
    points = {"slow": (9.0, 0.1), "dear": (5.0, 0.4), "quick": (1.0, 0.5), "good": (4.0, 0.3)}
    assert pareto_front(points) == ["quick", "good", "slow"]
    assert pareto_front({"same": (1.0, 0.5), "later": (2.0, 0.5)}) == ["same"]


def test_methods_are_the_first_word_of_a_case() -> None:
    rows = [run("barlow, 2 views", 0, 0.1), run("vicreg, 2 views", 0, 0.1), run("barlow", 1, 0.1)]
    assert {name: len(found) for name, found in by_method(rows).items()} == {
        "barlow": 2,
        "vicreg": 1,
    }


def test_experiments_are_configs_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSSL_CIFAR10", "cifar.npz")
    monkeypatch.setenv("FASTSSL_IMAGENETTE", "jpegs")
    names = {"digits", "diet", "methods", "data", "views", "emp_ssl", "engines"}
    for device in ("cpu", "cuda"):
        found = list(accuracy.runs(device))
        assert len(found) == len({(e, name, c.seed) for e, name, c in found})
        assert {c.device for _, _, c in found} == {device}
        assert {e for e, _, _ in found} == names | ({"gpu"} if device == "cuda" else set())
        assert all(c.data == "jpegs" for e, _, c in found if e == "engines")
    on_gpu = [c.seed for _, _, c in accuracy.runs("cuda")]
    assert on_gpu == sorted(on_gpu)
    steps = {c.train_images * c.epochs for e, _, c in accuracy.runs("cpu") if e == "data"}
    assert len(steps) == 1
    monkeypatch.delenv("FASTSSL_CIFAR10")
    monkeypatch.delenv("FASTSSL_IMAGENETTE")
    assert {e for e, _, _ in accuracy.runs("cpu")} == {"digits", "diet"}
