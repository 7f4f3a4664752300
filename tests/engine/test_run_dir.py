"""Run folders and checkpoints: nothing is overwritten, nothing is half written, nothing hostile is
run."""

from dataclasses import replace
from pathlib import Path

import pytest

from fastssl.config import Config, config_from_json, config_to_json, read_config
from fastssl.recipes import RECIPES
from fastssl.runtime import run_dir

CONFIG = replace(RECIPES["digits-diet"], lr=0.003)


@pytest.mark.parametrize("config", RECIPES.values(), ids=RECIPES)
def test_config_survives_json(config: Config) -> None:
    assert config_from_json(config_to_json(config)) == config


def test_a_config_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know: colour"):
        config_from_json('{"colour": 1, "lr": 2.0}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0: it must be at least 1"),
        ({"method": "barlow", "views": 1}, "compares views, so it needs at least 2"),
        ({"holdout": 1.0}, "--holdout"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"label_smoothing": 2.0}, "--label-smoothing"),
        ({"epochs": -1}, "--epochs"),
    ],
)
def test_knobs_out_of_range(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_states_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not run_dir.is_resumed(folder, CONFIG)
    assert not folder.exists(), "asking writes nothing"
    run_dir.create(folder, CONFIG)
    assert read_config(folder) == replace(CONFIG, run=str(folder))
    assert run_dir.is_resumed(folder, CONFIG)
    with pytest.raises(
        ValueError, match=r"holds another run \(--lr 0.003 there, 0.5 here\); pass another --run"
    ):
        run_dir.is_resumed(folder, replace(CONFIG, lr=0.5))
    run_dir.write_text(folder / "summary.json", "{}")
    with pytest.raises(ValueError, match="finished"):
        run_dir.is_resumed(folder, CONFIG)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    with pytest.raises(ValueError, match="holds no run"):
        run_dir.is_resumed(stranger, CONFIG)


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits"
    run_dir.create(tmp_path / "digits", CONFIG)
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits", (
        "unfinished: to be resumed"
    )
    assert run_dir.next_free(tmp_path, "digits", replace(CONFIG, seed=1)) == tmp_path / "digits-2"
    run_dir.write_text(tmp_path / "digits" / "summary.json", "{}")
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits-2"


def test_one_folder_is_held_by_one_process(tmp_path: Path) -> None:
    with run_dir.held(tmp_path):
        with pytest.raises(ValueError, match=r"another process is training in .*; pass another"):
            with run_dir.held(tmp_path):
                pytest.fail("held twice")
    with run_dir.held(tmp_path):
        pass
