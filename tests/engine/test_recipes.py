"""Recipe cards against the measured rows, and what a new method costs in lines."""

import ast
import statistics
from pathlib import Path

import pytest

from bench.report import read_results
from bench.suites import accuracy
from fastssl.config import Config
from fastssl.objectives import METHODS
from fastssl.recipes import RECIPES, Card

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
MEASURED = {name: r.card for name, r in RECIPES.items() if r.card.train_s is not None}
FILES = ("accuracy.jsonl", "accuracy-methods.jsonl")  # whose cases are recipes as they are


def rows_of(card: Card, name: str) -> list[dict[str, float]]:
    _, rows = read_results(RESULTS / card.results)
    return [row for row in rows if row["case"] == name]


@pytest.mark.parametrize("name", MEASURED)
def test_a_card_is_the_mean_of_its_rows(name: str) -> None:
    card = MEASURED[name]
    rows = rows_of(card, name)
    assert len(rows) == card.n
    assert card.train_s == round(statistics.mean(row["train_s"] for row in rows))
    for probe, (mean, std) in card.accuracy.items():
        values = [row[f"pretrained_{probe}"] for row in rows]
        assert round(statistics.mean(values), 3) == mean, probe
        assert round(statistics.stdev(values), 3) == std, probe
    first = (RESULTS / card.results).read_text().splitlines()[0]
    assert f'"started": "{card.date}' in first


def test_every_measured_recipe_has_a_card() -> None:
    cases = set()
    for file in FILES:
        cases |= {row["case"] for row in read_results(RESULTS / "cpu-2-cores" / file)[1]}
    assert set(MEASURED) == cases & set(RECIPES) == cases
    for name, card in MEASURED.items():
        experiment = card.command.removeprefix("python -m bench --only accuracy --match ")
        found = {row.get("experiment", experiment) for row in rows_of(card, name)}
        assert found == {experiment} and hasattr(accuracy, experiment)


def test_cards_print_figures_or_not_measured_yet() -> None:
    assert str(RECIPES["digits-diet"].card) == (
        "2 CPU cores, 37 s: linear 10 0.970 ± 0.002, knn 10 0.963 ± 0.002 (n 3, 2026-11-22)"
    )
    assert str(RECIPES["barlow"].card) == "a GPU, a folder of images: not measured yet"


def constants(path: Path) -> set[str]:
    """The strings in a source file."""
    tree = ast.parse(path.read_text())
    found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    return {value for value in found if isinstance(value, str)}


def test_a_method_is_named_in_its_line_and_in_its_recipes_alone() -> None:
    """CONTRIBUTING: one file, one line, one recipe, and its knobs where help reads them. Config
    names the default of --method, and of --policy, which is called like a method."""
    assert "one file, one line and one recipe" in (ROOT / "CONTRIBUTING.md").read_text()
    wanted = {"fastssl/objectives/__init__.py", "fastssl/knobs.py", "fastssl/recipes.py"}
    defaults = {Config.method, Config.policy}
    for name, method in METHODS.items():
        files = {
            str(path.relative_to(ROOT))
            for path in (ROOT / "fastssl").rglob("*.py")
            if name in constants(path)
        }
        assert files - wanted == ({"fastssl/config.py"} if name in defaults else set()), name
        assert "fastssl/objectives/__init__.py" in files
        assert method.__module__.startswith("fastssl.objectives.")
