"""The README says what is so: its tree, its two commands, its snippets, its measured tables."""

import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from bench.experiments import tables
from bench.report import accuracy_table, jpeg_table, read_results, views_table
from fastssl.cli.parsing import parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def names_in_the_tree() -> list[str]:
    """Paths that the README's tree names: one entry a line, two spaces before what it is for."""
    tree = next(block for block in blocks("text") if "pyproject.toml" in block)
    names, folder = [], ""
    for line in filter(str.strip, tree.splitlines()):
        inside = line.startswith(" ")
        entries = line.strip().split("  ")[0].split()
        names += [folder + entry if inside else entry for entry in entries]
        if not inside:
            folder = entries[0]
    return names


def test_the_tree_is_the_tree() -> None:
    names = names_in_the_tree()
    for name in names:
        assert (ROOT / name).exists(), f"the README's tree names {name}, which does not exist"
    top = {path.split("/")[0] for path in tracked()} - {".gitignore"}
    assert top == {name.split("/")[0] for name in names}
    modules = {path for path in tracked() if re.fullmatch(r"fastssl/[a-z]+[a-z_]*\.py", path)}
    assert modules <= set(names), f"the README's tree lacks {modules - set(names)}"


def test_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in ("pretrain", "test"):
        assert re.search(rf"^make {command}\b", "".join(blocks("sh")), flags=re.MULTILINE)
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "fastssl train digits-diet" in makefile


def test_commands_in_the_readme_are_commands() -> None:
    shell = "".join(blocks("sh")).replace("\\\n", " ")
    commands = re.findall(r"^fastssl train (\S+) ?([^#\n]*)", shell, flags=re.MULTILINE)
    assert commands
    for recipe, flags in commands:
        parse_config(recipe, flags.replace("--dry-run", "").split())


@pytest.mark.parametrize("snippet", blocks("python"), ids=lambda text: text.splitlines()[0])
def test_snippets_run(snippet: str) -> None:
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_accuracy_table_is_the_measured_one() -> None:
    _, rows = read_results(ROOT / "bench" / "results" / "cpu-2-cores" / "accuracy.jsonl")
    assert accuracy_table(rows) in README


def test_the_tables_of_the_experiments_are_the_measured_ones() -> None:
    folder = ROOT / "bench" / "results" / "cpu-2-cores"
    for table in tables(folder).values():
        assert table in README
    for figure in ("accuracy-against-time.png", "error-against-time.png", "diet-loss.png"):
        assert f"bench/results/cpu-2-cores/{figure}" in README and (folder / figure).is_file()


def test_the_tables_of_the_pipelines_are_the_measured_ones() -> None:
    _, rows = read_results(ROOT / "bench" / "results" / "cpu-2-cores" / "pipelines.jsonl")
    text = (ROOT / "pipelines" / "README.md").read_text()
    assert views_table(rows) in text and jpeg_table(rows) in text


def test_few_dependencies_and_pinned_versions() -> None:
    core = [re.split(r"[<>=~!\[ ]", name)[0] for name in PROJECT["dependencies"]]
    assert len(core) <= 10
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert set(core) <= set(pins)
    for name in core:
        assert version(name).split("+")[0] == pins[name], f"{name} is not the pinned one"
    assert PROJECT["name"] == "fastssl-torch"
    assert set(PROJECT["optional-dependencies"]) == {"bench", "dali", "ffcv", "test"}
