"""The README says what is so: its tree, its two commands, its snippets, its measured tables."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.report import accuracy_table, read_results
from fastssl.cli import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_tree_is_the_tree() -> None:
    tree = next(block for block in blocks("text") if "pyproject.toml" in block)
    folder, named = "", []
    for line in tree.splitlines():
        if not line.strip():
            continue
        names = line.split("  ")[0 if not line.startswith(" ") else 1].split()
        if not line.startswith(" ") and names[0].endswith("/"):
            folder = names[0]
        named += [name if not line.startswith(" ") else folder + name for name in names]
    for name in named:
        assert (ROOT / name).exists(), f"the README's tree names {name}, which does not exist"
    top = {name.split("/")[0] for name in tracked()} - {".gitignore"}
    assert top == {name.split("/")[0] for name in named if name.count("/") <= 1 and name.split("/")[0] in top}


def test_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("pretrain", "test"):
        assert f"make {command}\n" in "".join(blocks("sh")) or f"make {command} " in "".join(blocks("sh"))
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "fastssl train digits-diet" in makefile


def test_commands_in_the_readme_are_commands() -> None:
    commands = re.findall(r"^fastssl train (\S+) ?([^#\n]*)", "".join(blocks("sh")), flags=re.MULTILINE)
    assert commands
    for recipe, flags in commands:
        parse_config(recipe, flags.split())


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda text: text.splitlines()[0])
def test_snippets_run(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_accuracy_table_is_the_measured_one() -> None:
    _, rows = read_results(ROOT / "bench" / "results" / "cpu-2-cores" / "accuracy.jsonl")
    assert accuracy_table(rows) in README


def test_few_dependencies_and_pinned_versions() -> None:
    core = [re.split(r"[<>=~!\[ ]", name)[0] for name in PROJECT["dependencies"]]
    assert len(core) <= 10
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert set(core) <= set(pins)
    for name in core:
        assert version(name).split("+")[0] == pins[name], f"{name} is not the version of constraints.txt"
    assert PROJECT["name"] == "fastssl-torch"
    assert set(PROJECT["optional-dependencies"]) == {"bench", "dali", "ffcv", "test"}
