"""The path that a newcomer reads stays short, and the guide that names it true."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATH = (
    "README.md",
    "fastssl/recipes.py",
    "fastssl/train.py",
    "fastssl/objectives/barlow_twins.py",
    "kernels/fastssl_kernels/barlow_twins.py",
)
LINES = 900


def test_the_path_is_short() -> None:
    lines = {name: len((ROOT / name).read_text().splitlines()) for name in PATH}
    assert sum(lines.values()) <= LINES, lines


def test_contributing_names_the_path() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"`{name}`" in text for name in PATH) and f"at most {LINES} lines" in text


def test_paths_in_contributing_exist() -> None:
    named = re.findall(r"`([\w./-]+/[\w./-]*)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name
