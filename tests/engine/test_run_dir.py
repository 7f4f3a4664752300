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


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"device": "cpu"}, "resumed with --device cpu, before auto"),
        ({"log_every": 7}, "resumed with --log-every 7, before 20"),
        ({"stall_s": 7.0}, "resumed with --stall-s 7.0, before 10.0"),
        ({"knn_k": 7}, "resumed with --knn-k 7, before 20"),
        ({"checkpoint_s": 7.0}, "resumed with --checkpoint-s 7.0, before 60.0"),
        ({"accumulate": 4}, "resumed with --accumulate 4, before 1"),
        ({"on_nonfinite": "skip"}, "resumed with --on-nonfinite skip, before stop"),
        ({"epochs": 80}, "resumed with --epochs 80, before 40"),
    ],
)
def test_what_leaves_the_result_may_change(
    change: dict[str, object], line: str, tmp_path: Path
) -> None:
    run_dir.create(tmp_path, CONFIG)
    config = configured(CONFIG, **change)
    assert run_dir.is_resumed(tmp_path, config)
    lines = run_dir.changes(read_config(tmp_path), config)
    assert lines[0] == line
    schedule = "from here on the learning rate is that of a run of 80 epochs: after the warm-up a "
    assert (schedule in lines[-1]) == ("epochs" in change) and len(lines) == 1 + (
        "epochs" in change
    )


@pytest.mark.parametrize(
    "change",
    [
        *({"epochs": 20}, {"time_budget_s": 60.0}, {"epochs": 80, "time_budget_s": 60.0}),
        *({"precision": "bfloat16"}, {"clip_norm": 1.0}, {"data": "cifar10"}),
        {"label_smoothing": 0.1},
    ],
)
def test_what_changes_the_result_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    run_dir.create(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="contains another run"):
        run_dir.is_resumed(tmp_path, configured(CONFIG, **change))


def test_the_probe_decides_where_there_is_a_target() -> None:
    target = configured(CONFIG, target_accuracy=0.9, probe_epochs=1)
    assert run_dir.differences(target, configured(target, knn_k=7)) == "--knn-k 20 there, 7 here"
    budget = configured(CONFIG, time_budget_s=60.0)
    assert not run_dir.differences(budget, configured(budget, time_budget_s=90.0))
    assert run_dir.differences(budget, configured(budget, time_budget_s=30.0))


def test_spellings_of_one_path_are_one_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    link.symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    there = configured(CONFIG, data=str(photos))
    for spelling in ("photos", "./photos/", "link", "~/photos", str(link)):
        assert not run_dir.differences(there, configured(CONFIG, data=spelling)), spelling
    assert run_dir.differences(there, configured(CONFIG, data="other"))
    (tmp_path / "digits").mkdir()
    assert run_dir.differences(configured(CONFIG, data=str(tmp_path / "digits")), CONFIG)


def test_relative_paths_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    config = run_dir.with_absolute_paths(configured(CONFIG, data="photos", init="absent"))
    assert config.data == str(tmp_path / "photos") and config.init == "absent"
    assert run_dir.with_absolute_paths(CONFIG).data == "digits"


def test_a_default_folder_is_not_resumed_by_a_longer_run(tmp_path: Path) -> None:
    run_dir.create(tmp_path / "digits", CONFIG)
    longer = configured(CONFIG, epochs=80)
    assert run_dir.next_free(tmp_path, "digits", longer) == tmp_path / "digits-2"
    assert run_dir.next_free(tmp_path, "digits", configured(CONFIG, device="cpu")).name == "digits"


def test_a_folder_with_a_lock_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    assert not run_dir.is_resumed(tmp_path, CONFIG)
