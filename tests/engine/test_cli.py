"""The commands as a user types them: help, results, one line with exit code 2 for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastssl.cli import COMMANDS, run
from fastssl.cli.knob_flags import flag_parser, knob_docs
from fastssl.cli.parsing import parse_config
from fastssl.config import Config, flag, knob_names
from fastssl.evaluation.defaults import PROBE_NAMES, PROTOCOL_SOURCES
from fastssl.evaluation.probes import PROBES
from fastssl.evaluation.protocols import PROTOCOLS
from fastssl.evaluation.spectrum import rankme
from fastssl.knobs import KNOBS
from fastssl.objectives import METHODS
from fastssl.objectives.pal import PAL
from fastssl.recipes import RECIPES, recipe_config

QUICK = ["--epochs", "1", "--warmup-epochs", "0", "--backbone", "fastnet-8", "--label-draws", "1"]


def one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The message of a command line that must fail with exit code 2 and exactly one line."""
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith("fastssl: ") and err.count("\n") == 1, err
    assert not out
    return err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "fastssl train RECIPE" in capsys.readouterr().out
    assert run([]) == 2
    assert capsys.readouterr().out.startswith("usage: ")
    with pytest.raises(SystemExit) as stop:
        run(["train", "digits-diet", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    flags = set(re.findall(r"--[a-z][a-z-]*", out)) - {"--help"}
    knobs = knob_names(Config) | knob_names(METHODS["diet"].Knobs)
    named = {name for name in flags if not name.startswith("--no-")}
    assert named - {"--dry-run", "--measure", "--knob"} == set(map(flag, knobs))
    assert out.count("(default:") == len(knobs) and "(default: digits)" in out


def test_help_groups_knobs_and_shows_the_defaults_of_the_recipe() -> None:
    config = recipe_config("diet-cpu", sample_rate=1.0)
    text = " ".join(flag_parser("x", config).format_help().split())
    found = [
        text.index(f" {heading}: --{first} ")
        for heading, first in (
            ("data", "data"),
            ("method", "method"),
            ("network", "backbone"),
            ("optimisation", "batch-size"),
            ("execution", "seed"),
            ("reports", "run"),
            ("knobs of diet", "label-smoothing"),
        )
    ]
    assert found == sorted(found)
    values = {name: getattr(config, name) for name in knob_names(Config)}
    values |= {name: getattr(config.objective, name) for name in knob_names(type(config.objective))}
    for name, value in values.items():
        shown = re.search(rf" {flag(name)}(?:,| [^- ]).*?\(default: (.*?)\)", text)
        assert shown and shown[1] == {"": "none", "None": "auto"}.get(str(value), str(value)), name


def test_help_documents_every_knob_of_every_method() -> None:
    assert {name: method.Knobs for name, method in METHODS.items()} == KNOBS
    for cls in (Config, *KNOBS.values()):
        headings, docs = knob_docs(cls)
        assert set(docs) >= knob_names(cls) and all(docs[name] for name in knob_names(cls))
        assert bool(headings[min(docs)]) == (cls is Config)


def test_the_command_line_names_the_protocols_and_probes_that_there_are() -> None:
    assert {name: protocol.source for name, protocol in PROTOCOLS.items()} == PROTOCOL_SOURCES
    assert tuple(PROBES) == PROBE_NAMES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert re.fullmatch(r"fastssl (\d+\.\d+.*|\(not installed.*\))\n", capsys.readouterr().out)


def test_output_is_not_wrapped_in_a_pipe_and_may_be_ascii(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", "from fastssl.cli import main; main()", "recipes"]
    done = subprocess.run(command, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    card = str(RECIPES["digits-diet"].card).replace("±", "+/-")
    assert len(card) > 80 and f"    {card}\n" in done.stdout.decode("ascii")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["zzz"], "unknown command 'zzz'; there are train, eval, rank, select, views"),
        (["train"], "needs a recipe first; there are barlow, diet, vicreg"),
        (["train", "digits-dite"], "unknown recipe 'digits-dite'; did you mean digits-diet?"),
        (["views", "zzz"], "unknown recipe 'zzz'; there are barlow, diet, vicreg, simclr"),
        (["train", "digits-diet", "photos"], "unrecognized arguments: photos"),
        (["train", "digits-diet", "--epoch", "3"], "unknown knob --epoch; did you mean --epochs?"),
        (
            ["train", "digits-diet", "--zzz", "3"],
            "unknown knob --zzz; `fastssl train RECIPE --help` lists the knobs",
        ),
        (["train", "digits-diet", "--epochs", "three"], "argument --epochs: invalid int"),
        (
            ["train", "digits-diet", "--method", "simsiam"],
            "unknown --method 'simsiam'; there are barlow, diet, emp_ssl",
        ),
        (
            ["train", "digits-diet", "--method", "simcrl"],
            "unknown --method 'simcrl'; did you mean simclr?",
        ),
        (["train", "digits-diet", "--epochs"], "--epochs: expected one argument"),
        (["train", "digits-diet", "--engine", "dalli"], "--engine: invalid choice: 'dalli'"),
        (["recipes", "digits"], "unrecognized arguments: digits; see `fastssl recipes --help`"),
        (["train", "digits-diet", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["train", "barlow", "--lambd", "-1"], "fastssl: --lambd is -1.0: it must be 0 or more"),
        (
            ["train", "digits-diet", "--batch-size", "5000"],
            "larger than the data set of 1438 images",
        ),
        (["train", "barlow"], "pass --data with a folder of images"),
        (["train", "barlow", "--data", "/nowhere"], "--data /nowhere does not exist"),
        (
            ["train", "barlow", "--backbone", "resnet8000", "--data", "digits"],
            "unknown backbone 'resnet8000'",
        ),
        (["train", "barlow", "--fused-head"], "--fused-head is for diet: --method barlow has none"),
        (
            ["train", "diet", "--oracle", "labels"],
            "--oracle is for barlow, simclr, spectral",
        ),
        (["eval"], "takes one run folder"),
        (["eval", "/nowhere"], "/nowhere is not a run folder"),
        (["eval", "/nowhere", "--protocol", "crops"], "invalid choice: 'crops'"),
        (["eval", "/nowhere", "--views", "4"], "protocol neutral has one; --protocol multiview"),
        (["eval", "/nowhere", "--protocol", "patches", "--views", "1"], "patches averages several"),
        (["rank"], "required: run; see `fastssl rank --help`"),
        (["rank", "/nowhere"], "/nowhere is not a run folder"),
        (["rank", "/nowhere", "--views", "1"], "--views 1: each must be at least 2"),
        (["select", "/nowhere"], "pass two folders or more"),
    ],
)
def test_mistakes(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_line(capsys, arguments)
    assert not list(tmp_path.iterdir()), "a failed command wrote something"


def test_an_empty_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "holds no images" in one_line(capsys, ["train", "barlow", "--data", str(tmp_path)])


def test_a_corrupt_image(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    for name in ("Landscape_1.jpg", "hopper_gray.jpg", "pil_sample_cmyk.jpg"):
        (tmp_path / name).write_bytes((data / "jpeg-odd" / name).read_bytes())
    (tmp_path / "a.jpg").write_bytes((data / "jpeg-odd" / "truncated_jpeg.jpg").read_bytes())
    flags = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--batch-size", "2"]
    message = one_line(capsys, ["train", "barlow", *flags])
    assert "a.jpg cannot be read as an image" in message and "repair or remove it" in message
    assert not (tmp_path / "run").exists()


def test_a_run_is_evaluated_again_and_never_overwritten(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = ["train", "digits-diet", "--run", str(folder), "--probe-epochs", "1", *QUICK]
    assert run(command) == 0
    out = capsys.readouterr().out
    (probe,) = json.loads((folder / "summary.json").read_text())["probes"]
    assert f"step 11: online kNN {probe['knn']:.3f} (epoch 1)" in out
    assert f"online kNN {probe['knn']:.3f} at step 11; best" in out
    logged = (folder / "log.txt").read_text().splitlines()
    assert logged[0] == f"run {folder}" and set(logged) <= set(out.splitlines())
    assert any(line.startswith("step 11/11  loss ") for line in logged)
    table = out.split("accuracy on held-out images")[1].split("online kNN")[0]
    assert "raw pixels" in table and "pretrained" in table and table.count("knn") == 4
    assert run(["eval", str(folder)]) == 0
    assert capsys.readouterr().out.split("accuracy on held-out images")[1] == table
    before = (folder / "summary.json").read_bytes()
    assert "contains this run, finished" in one_line(capsys, command)
    assert "contains another run (--seed 0 there, 3 here)" in one_line(
        capsys, [*command, "--seed", "3"]
    )
    assert (folder / "summary.json").read_bytes() == before


def test_default_run_folders_do_not_collide(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run(["train", "digits-diet", *QUICK]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-diet",
        "digits-diet-2",
    ]


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines if re.fullmatch(r"  \S+", line)] == list(RECIPES)
    own = [name for name, recipe in RECIPES.items() if not recipe.settings.data]
    assert lines[0] == "for your own images: --data PATH" and own == list(RECIPES)[: len(own)]
    assert len(own) == 6 and f"    {RECIPES['digits-diet'].card}" in lines


def test_methods_are_listed_with_their_cards(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["methods"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for name, method in METHODS.items():
        assert f"{name} {method.paper}" in out and method.formula in out
    assert f"pal {PAL.paper}" in out and "--oracle labels|queries" in out
    assert "digits-diet: 2 CPU cores, 37 s: linear 10 0.970 ± 0.002" in out
    assert "barlow: a GPU, a folder of images: not measured yet" in out


def test_flags_of_other_methods_have_no_effect_and_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--projector-width", "64", "--lambd=0.1", "--label-smoothing", "0.5"]
    config = parse_config("digits-diet", flags)
    assert config == recipe_config("digits-diet", label_smoothing=0.5)
    err = capsys.readouterr().err
    assert "diet has no --projector-width" in err and "diet has no --lambd" in err


def test_knobs_follow_the_method() -> None:
    config = parse_config("digits-diet", ["--method", "barlow", "--lambd", "0.5"])
    assert config.objective == METHODS["barlow"].Knobs(
        projector_width=256, projector_layers=2, lambd=0.5
    )


def test_runs_are_ranked_and_selected(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("slow", "fast", "diet")]
    train = ["train", "digits-barlow", *QUICK, "--projector-width", "32"]
    assert run([*train, "--run", str(folders[0])]) == 0
    assert run([*train, "--run", str(folders[1]), "--lr", "0.01"]) == 0
    assert run(["train", "digits-diet", *QUICK, "--run", str(folders[2])]) == 0
    capsys.readouterr()
    small = ["--images", "40", "--views", "3"]
    assert run(["rank", str(folders[0]), *small]) == 0
    out = capsys.readouterr().out
    assert "features" in out and "embeddings" in out and "alpha-ReQ" in out
    assert run(["select", *map(str, folders[:2]), *small]) == 0
    out = capsys.readouterr().out
    assert out.count("#1") == out.count("#2") == 8  # four criteria of features and embeddings
    mixed = ["select", *map(str, folders), *small]
    assert "differ in --method: barlow (slow), diet (diet)" in one_line(capsys, mixed)
    assert run([*mixed, "--force"]) == 0
    assert "#3" in capsys.readouterr().out
    patches = ["eval", str(folders[2]), "--protocol", "patches"]
    assert "diet run has none; use --protocol multiview" in one_line(capsys, patches)


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("train", "; the same command resumes the run"),
        ("eval", "; the same command resumes"),
        ("rank", ""),
    ],
)
def test_an_interruption_names_what_resumes(
    command: str, hint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(arguments: list[str]) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setitem(COMMANDS, command, stopped)
    assert run([command]) == 143
    assert capsys.readouterr().err == f"fastssl: stopped by SIGTERM{hint}\n"


@pytest.mark.filterwarnings("default")
def test_fastssl_warnings_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "rank", lambda arguments: print(rankme(torch.eye(3, 5))))
    assert run(["rank"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("fastssl: warning: RankMe of 3 samples in 5") and err.count("\n") == 1


def test_a_folder_of_jpegs_as_a_process(data: Path, tmp_path: Path) -> None:
    """A folder of Imagenette's JPEGs, through the installed entry point in a separate process."""
    with tarfile.open(data / "imagenette-224-1000.tar") as tar:
        some = [m for m in tar.getmembers() if m.isfile()][::10]
        tar.extractall(tmp_path / "images", members=some, filter="data")
    code = "from fastssl.cli import main; main()"
    flags = ["--data", str(tmp_path / "images"), "--run", str(tmp_path / "run"), *QUICK]
    small = [
        "--image-size",
        "32",
        "--load-size",
        "40",
        "--batch-size",
        "16",
        "--projector-width",
        "64",
    ]
    env = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "barlow", *flags, *small],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert "75 images, 4 batches of 16 x 2 views" in done.stdout and "pretrained" in done.stdout
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_views_are_plotted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert run(["views", "digits-diet", "--views", "3", "--out", str(out)]) == 0
    assert "4 images and their views" in " ".join(capsys.readouterr().out.split())
    with Image.open(out) as picture:
        assert picture.size[0] > 500
    assert "needs a recipe first" in one_line(capsys, ["views"])
    assert "--out needs" in one_line(capsys, ["views", "digits-diet", "--out"])


def test_a_run_folder_that_cannot_be_written_ends_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """/proc takes no folder, not even from root."""
    assert run(["train", "digits-diet", "--run", "/proc/fastssl"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastssl: ") and "/proc/fastssl" in error and error.count("\n") == 1
