"""README.md and docs/ are true: links, tree, commands, snippets, tables, the tests they name."""

import argparse
import importlib
import re
import shlex
import statistics
import subprocess
import tomllib
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest
from PIL import Image

from bench.__main__ import SUITES
from bench.experiments import mean_std, rank_correlation, tables
from bench.report import accuracy_table, jpeg_table, markdown, read_results, views_table
from bench.suites import accuracy
from fastssl.cli import COMMANDS, catalog_commands
from fastssl.cli.parsing import UsageError, parse_config
from fastssl.config import Config, flag, knob_names
from fastssl.objectives import METHODS
from tests.helpers.requires import needs

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "cpu-2-cores"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
OTHERS = ("CONTRIBUTING.md", "bench/README.md", "kernels/README.md", "pipelines/README.md")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAX_LINES = 149  # of the README
MAX_IQR = 0.2  # of the median, of the timings that the README quotes


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def shell_lines(text: str) -> list[str]:
    """The commands of a page's shell blocks, one a line, without comments."""
    lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
    stripped = (re.sub(r"(^| )#.*", "", line).strip() for line in lines)
    return [line for line in stripped if line]


def commands(text: str, program: str) -> list[str]:
    """The lines of shell blocks and the inline code that call `program`."""
    found = [*shell_lines(text), *inline_code(text)]
    return [line for line in found if line == program or line.startswith(f"{program} ")]


class AcceptedError(Exception):
    """A parser took the arguments; what follows is not run."""


def check_fastssl(line: str, patch: pytest.MonkeyPatch) -> None:
    """Fails unless `line` is a command with arguments that its parser accepts; those that are
    quick and write nothing are run."""
    _, *words = shlex.split(line.replace("RECIPE", "digits-diet"))
    if not words:
        return
    name, arguments = words[0], words[1:]
    assert name in COMMANDS, f"unknown command: {line}"
    if not arguments and name not in ("recipes", "methods"):
        return  # the command's name, in a sentence
    if "--help" in arguments:
        with pytest.raises(SystemExit) as stop:
            COMMANDS[name](arguments)
        assert stop.value.code == 0, line
    elif name == "train":
        recipe, *flags = (word for word in arguments if word != "--dry-run")
        parse_config(recipe, flags)
    elif name in ("recipes", "methods"):
        assert not arguments, line
        COMMANDS[name](arguments)
    else:
        stop_after_parsing(patch)
        with pytest.raises(AcceptedError):
            COMMANDS[name](arguments)


def stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    """Every parser of a command line raises AcceptedError where it accepts its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def accepted(self: argparse.ArgumentParser, *given: Any, **named: Any) -> NoReturn:
        parse_args(self, *given, **named)
        raise AcceptedError

    def accepted_config(recipe: str, flags: list[str]) -> NoReturn:
        parse_config(recipe, flags)
        raise AcceptedError

    patch.setattr(argparse.ArgumentParser, "parse_args", accepted)
    patch.setattr(catalog_commands, "parse_config", accepted_config)


def all_flags() -> set[str]:
    """The flags of `fastssl train`, those of every method among them."""
    names = knob_names(Config).union(*(knob_names(method.Knobs) for method in METHODS.values()))
    return {flag(name) for name in names} | {f"--no-{flag(name)[2:]}" for name in names}


def broken_links(text: str, folder: Path) -> list[str]:
    """The targets of a page's links and images that do not exist, anchors included."""
    return [
        target
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(text))
        if not target.startswith(("https://", "http://")) and not link_exists(target, text, folder)
    ]


def link_exists(target: str, text: str, folder: Path) -> bool:
    name, _, anchor = target.partition("#")
    path = folder / name
    if name and not path.exists():
        return False
    there = path.read_text() if name and anchor else text
    return not anchor or anchor in {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", prose(there), flags=re.MULTILINE)
    }


def missing_tests(text: str) -> list[str]:
    """The tests that a page names, as path::function, and that do not exist."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    return [
        f"{path}::{name}"
        for path, name in named
        if not (ROOT / path).is_file() or f"\ndef {name}(" not in (ROOT / path).read_text()
    ]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_LINES


def names_in_the_tree() -> list[str]:
    """Paths that the README's tree names: two spaces separate them from their description."""
    tree = next(block for block in blocks(README, "text") if "pyproject.toml" in block)
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
    top = {path.split("/")[0] for path in tracked()} - {".gitignore"} | {"docs"}
    assert top == {name.split("/")[0] for name in names}


@pytest.mark.parametrize("page", [*PAGES, *OTHERS])
def test_links_resolve(page: str) -> None:
    path = ROOT / page
    assert broken_links(path.read_text(), path.parent) == []


def test_the_readme_leads_to_every_page() -> None:
    for page in [*PAGES, *OTHERS]:
        assert page == "README.md" or f"]({page})" in README
    for path in re.findall(r"`((?:fastssl|kernels|pipelines|bench|tests)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert {line.split()[1] for line in commands(README, "make")} == {"pretrain", "test"}
    for target in ("pretrain", "test"):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "fastssl train digits-diet" in makefile


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(PAGES[page], "fastssl"):
        with monkeypatch.context() as patch:
            check_fastssl(line, patch)


def test_the_commands_of_several_ranks_are_accepted() -> None:
    from torch.distributed.run import get_args_parser

    lines = [line for line in shell_lines(PAGES["docs/distributed.md"]) if "torchrun" in line]
    assert len(lines) == 2
    for line in lines:
        launch = get_args_parser().parse_args(shlex.split(line.split("torchrun ")[1]))
        assert launch.module and launch.training_script == "fastssl"
        name, recipe, *flags = launch.training_script_args
        assert name == "train" and parse_config(recipe, flags).global_batch


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_bench_are_accepted(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for line in commands(PAGES[page], "python -m"):
        _, _, module, *arguments = shlex.split(line)
        main = importlib.import_module("bench.__main__" if module == "bench" else module).main
        if not arguments:
            continue  # the module's name, in a sentence
        options = dict(pairwise(arguments))
        assert set(options.get("--only", SUITES[0]).split(",")) <= set(SUITES), line
        assert hasattr(accuracy, options.get("--match", "rows")), line
        with monkeypatch.context() as patch, pytest.raises(AcceptedError):
            patch.setattr("sys.argv", [module, *arguments])
            stop_after_parsing(patch)
            main()


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_extras_exist(page: str) -> None:
    text = PAGES[page]
    for name, *value in (code.split() for code in inline_code(text) if code.startswith("--")):
        assert name in all_flags(), name
        if value and not value[0].isupper():
            parse_config("barlow", [name, *value])
    extras = re.findall(r"fastssl-torch\[(\w+)\]", text)
    assert set(extras) <= set(PROJECT["optional-dependencies"])


SNIPPETS = [
    pytest.param(
        page, code, id=f"{page}-{number}", marks=needs("nvidia.dali") if '"dali"' in code else ()
    )
    for page, text in PAGES.items()
    for number, code in enumerate(blocks(text, "python"))
]


@pytest.mark.parametrize(("page", "code"), SNIPPETS)
def test_snippets_run(
    page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(48):
        path = tmp_path / "photos" / f"class-{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    exec(compile(code, page, "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_are_named_exist(page: str) -> None:
    assert missing_tests(PAGES[page]) == []


def test_every_fault_names_its_test() -> None:
    rows = re.findall(r"^\| .* \|$", PAGES["docs/reliability.md"], flags=re.MULTILINE)
    faults = [row for row in rows if not row.startswith(("| fault", "| ---"))]
    assert len(faults) > 20
    for row in faults:
        assert "`tests/" in row or row.endswith("| not tested yet |"), row


def test_the_checks_find_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# A title\n[a](README.md#layout-of-nothing) ![b](docs/none.png) [c](#a-title)"
    assert broken_links(text, ROOT) == ["README.md#layout-of-nothing", "docs/none.png"]
    assert len(missing_tests("`tests/test_readme.py::test_no`, `tests/no.py::test_no`")) == 2
    assert not missing_tests("`tests/test_readme.py::test_links_resolve`")
    for line in ("fastssl trian x", "fastssl recipes x"):
        with pytest.raises(AssertionError):
            check_fastssl(line, monkeypatch)
    for line in (
        "fastssl train barlow --lambda 1",
        "fastssl doctor photos",
        "fastssl views --seed 1",
    ):
        with monkeypatch.context() as patch, pytest.raises(UsageError):
            check_fastssl(line, patch)
    assert "--lambda" not in all_flags() and "--lambd" in all_flags()


def rows_of(name: str) -> list[dict[str, Any]]:
    return read_results(RESULTS / f"{name}.jsonl")[1]


class Speed(NamedTuple):
    """A row of the README's table of speeds, and the rows of bench/results/ that it quotes."""

    workload: str
    baseline: str
    file: str
    case: str
    ours: str
    theirs: str


VIEWS_32, VIEWS_224 = "pipeline SimCLR-CIFAR 2x32", "pipeline SimCLR 2x224 with blur"
SMALL, LARGE = "views: SimCLR, 2 x 32 px", "views: SimCLR with blur, 2 x 224 px"
JPEG, FROM_JPEG = "JPEG SimCLR 2x224", "JPEG to views: SimCLR, 2 x 224 px"
SPEED = [
    *(
        Speed(workload, peer, "pipelines", case, "fastssl", peer)
        for workload, case, peer in (
            (SMALL, VIEWS_32, "torchvision v2, PIL"),
            (SMALL, VIEWS_32, "DALI"),
            (LARGE, VIEWS_224, "torchvision v2, PIL"),
            (LARGE, VIEWS_224, "albumentationsx"),
        )
    ),
    *(
        Speed(
            f"{FROM_JPEG}, `{engine}` engine",
            "torchvision",
            "pipelines",
            JPEG,
            f"fastssl {engine}",
            "torchvision",
        )
        for engine in ("dali", "ffcv")
    ),
    *(
        Speed(workload, "official code", "losses", case, "fastssl", "official")
        for workload, case in (
            ("Barlow Twins loss, N = 256, D = 8192", "barlow V=2 N=256 D=8192 float32"),
            ("VICReg loss, N = 256, D = 8192", "vicreg V=2 N=256 D=8192 float32"),
            (
                "EMP-SSL coding rate, V = 20, N = 100, D = 1024",
                "coding rate V=20 N=100 D=1024 float32",
            ),
        )
    ),
    Speed(
        "NT-Xent loss, N = 4096, D = 128",
        "eager PyTorch",
        "losses",
        "nt-xent N=4096 D=128",
        "fastssl",
        "eager",
    ),
    Speed(
        'DIET step with AdamW, N = 256, D = 512, K = 50,000, `save="none"`',
        "eager PyTorch",
        "losses",
        "diet AdamW N=256 D=512 K=50000",
        "fastssl fused, save=none",
        "eager",
    ),
]
TO_LIGHTLY = {  # workload -> case of lightly.jsonl
    "Barlow Twins to lightly's kNN accuracy, views and loss replaced": "+ fastssl's loss",
    "the same, also channels last, bfloat16 and a projector of width 256": (
        "+ projector of 256, tuned weight"
    ),
}


def timing(file: str, case: str, variant: str) -> dict[str, Any]:
    (row,) = (r for r in rows_of(file) if (r["case"], r.get("variant")) == (case, variant))
    low, high = row["ms_iqr"]
    assert high - low <= MAX_IQR * row["ms"], (case, variant)
    return row


def test_the_table_of_speeds_is_the_measured_one() -> None:
    lines = []
    for row in SPEED:
        ours, theirs = (timing(row.file, row.case, name) for name in (row.ours, row.theirs))
        memory = f"{ours['peak_mib']:.0f}, baseline {theirs['peak_mib']:.0f}"
        speed_up = f"{theirs['ms'] / ours['ms']:.3g} x"
        memory = memory if row.file == "losses" else ""
        lines.append([row.workload, row.baseline, speed_up, memory, str(ours["n"])])
    for workload, case in TO_LIGHTLY.items():
        times = [row["times_faster"] for row in rows_of("lightly") if row["case"] == case]
        lines.append([workload, "lightly", f"{mean_std(times, 1)} x", "", str(len(times))])
    head = ["workload", "baseline", "speed-up", "peak memory, MiB", "n"]
    assert markdown(head, lines) + "\n\n" in README
    assert f"within {MAX_IQR:.0%}".replace("%", " %") in " ".join(README.split())


def test_the_accuracy_in_the_readme_is_the_measured_one() -> None:
    runs = [row for row in rows_of("accuracy") if row["case"] == "digits-diet"]
    raw, trained = (
        statistics.mean(run[f"{kind}_linear_10"] for run in runs)
        for kind in ("raw pixels", "pretrained")
    )
    text = " ".join(README.split())
    assert f"from {raw:.1%} (raw pixels) to {trained:.1%} ".replace("%", " %") in text
    assert f"{statistics.mean(run['train_s'] for run in runs):.0f} s of DIET" in text
    assert f"(mean of {len(runs)} seeds)" in text


def test_the_accuracy_table_is_the_measured_one() -> None:
    assert accuracy_table(rows_of("accuracy")) in PAGES["docs/results.md"]


def test_the_tables_of_the_experiments_are_the_measured_ones() -> None:
    page = PAGES["docs/results.md"]
    for table in tables(RESULTS).values():
        assert table in page
    for figure in ("accuracy-against-time.png", "error-against-time.png", "diet-loss.png"):
        assert f"](../bench/results/cpu-2-cores/{figure})" in page


def test_the_other_figures_of_the_results_are_the_measured_ones() -> None:
    text = " ".join(PAGES["docs/results.md"].split())
    assert f"kNN accuracy is {rank_correlation(rows_of('accuracy-diet')):.2f}" in text
    ms = {row["variant"]: row["ms"] for row in rows_of("loop")}
    pipeline = ms["+ pipeline"] / ms["one batch"] - 1
    guard, log, spectrum = (ms[name] / ms["20 steps"] for name in ("guard", "log", "spectrum"))
    assert f"the data pipeline {100 * pipeline:.1f} %" in text
    assert f"guard {100 * guard:.2f} %, the metrics log {100 * log:.2f} %" in text
    assert f"with one report {100 * spectrum:.2f} %" in text
    assert 0.2 < ms["online probe"] / ms["an epoch"] < 0.3 and "takes a quarter of" in text


def test_the_tables_of_the_pipelines_are_the_measured_ones() -> None:
    text = (ROOT / "pipelines" / "README.md").read_text()
    assert views_table(rows_of("pipelines")) in text and jpeg_table(rows_of("pipelines")) in text


def test_few_dependencies_and_pinned_versions() -> None:
    core = [re.split(r"[<>=~!\[ ]", name)[0] for name in PROJECT["dependencies"]]
    assert len(core) <= 11
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert set(core) <= set(pins)
    for name in core:
        assert version(name).split("+")[0] == pins[name], f"{name} is not the pinned one"
    assert PROJECT["name"] == "fastssl-torch"
    assert set(PROJECT["optional-dependencies"]) == {"bench", "dali", "ffcv", "test"}
