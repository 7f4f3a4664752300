"""Run folders: nothing is overwritten, and configs of other versions are read or refused."""

import json
from pathlib import Path

import pytest

from fastssl.objectives import configured
from fastssl.recipes import RECIPES, recipe_config
from fastssl.runtime import run_dir
from fastssl.runtime.run_dir import config_from_json, config_to_json, read_config

CONFIG = recipe_config("digits-diet", lr=0.003)


@pytest.mark.parametrize("recipe", RECIPES)
def test_config_survives_json(recipe: str) -> None:
    config = recipe_config(recipe)
    assert config_from_json(config_to_json(config)) == config


def test_a_config_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know: colour"):
        config_from_json('{"colour": 1, "lr": 2.0}')


def test_configs_with_the_knobs_of_every_method_are_read() -> None:
    """A config.json of version 0.1 names the knobs of all methods."""
    old = json.loads(config_to_json(recipe_config("digits-barlow", projector_width=64)))
    old |= {"label_smoothing": 0.8, "fused_head": False, "temperature": 0.15, "eps_sq": 0.2}
    config = config_from_json(json.dumps(old))
    assert config == recipe_config("digits-barlow", projector_width=64)
    assert not run_dir.differences(config, recipe_config("digits-barlow", projector_width=64))
    other = recipe_config("digits-barlow", projector_width=32)
    assert run_dir.differences(config, other) == "--projector-width 64 there, 32 here"


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
        configured(CONFIG, **change)  # type: ignore[arg-type]


def test_states_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not run_dir.is_resumed(folder, CONFIG)
    assert not folder.exists(), "the check writes nothing"
    run_dir.create(folder, CONFIG)
    assert read_config(folder) == configured(CONFIG, run=str(folder))
    assert run_dir.is_resumed(folder, CONFIG)
    with pytest.raises(
        ValueError, match=r"contains another run \(--lr 0.003 there, 0.5 here\); pass another --run"
    ):
        run_dir.is_resumed(folder, configured(CONFIG, lr=0.5))
    run_dir.write_text(folder / "summary.json", "{}")
    with pytest.raises(ValueError, match="finished"):
        run_dir.is_resumed(folder, CONFIG)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").touch()
    with pytest.raises(ValueError, match="contains no run"):
        run_dir.is_resumed(stranger, CONFIG)


def test_default_folders_are_numbered(tmp_path: Path) -> None:
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits"
    run_dir.create(tmp_path / "digits", CONFIG)
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits", (
        "unfinished: to be resumed"
    )
    assert (
        run_dir.next_free(tmp_path, "digits", configured(CONFIG, seed=1)) == tmp_path / "digits-2"
    )
    run_dir.write_text(tmp_path / "digits" / "summary.json", "{}")
    assert run_dir.next_free(tmp_path, "digits", CONFIG) == tmp_path / "digits-2"


def test_one_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    with run_dir.locked(tmp_path):
        with pytest.raises(ValueError, match=r"another process is training in .*; pass another"):
            with run_dir.locked(tmp_path):
                pytest.fail("locked twice")
    with run_dir.locked(tmp_path):
        pass
