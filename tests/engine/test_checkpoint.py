"""Checkpoint files under fault: whatever stops a save or damages a file, a valid one is found."""

import hashlib
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from fastssl.runtime import checkpoint
from fastssl.runtime.checkpoint import (
    checkpoints,
    load_checkpoint,
    save_checkpoint,
)

CPU = torch.device("cpu")


def load(folder: Path) -> tuple[object, list[str]]:
    logged: list[str] = []
    state = load_checkpoint(folder, CPU, logged.append)
    return (state and state["step"]), logged


def test_the_newest_two_are_retained(tmp_path: Path) -> None:
    assert load(tmp_path) == (None, [])
    for step in (5, 10, 1_000_000_000, 15):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.arange(4)})
    assert [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)] == [1_000_000_000, 15]
    assert load(tmp_path) == (1_000_000_000, [])


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "hostile"])
def test_a_damaged_one_is_named_and_the_one_before_it_taken(damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.arange(1000)})
    newest = checkpoints(tmp_path)[0]
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
    else:  # with a valid checksum, so that only the refusal to execute code protects us
        torch.save({"step": Hostile()}, newest)
        data = bytearray(newest.read_bytes())
        newest.unlink()
        newest = newest.with_name(f"step-000000002-{hashlib.sha256(data).hexdigest()[:16]}.pt")
    newest.write_bytes(data)
    step, logged = load(tmp_path)
    assert step == 1 and len(logged) == 1 and newest.name in logged[0]


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("code in a checkpoint was run",))


def test_the_hostile_state_is_hostile() -> None:
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(pickle.dumps(Hostile()))


def test_with_none_valid_the_run_is_not_started_again_silently(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    checkpoints(tmp_path)[0].write_bytes(b"")
    with pytest.raises(ValueError, match=r"is valid; delete .* to start again"):
        load(tmp_path)


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_full_disk_leaves_what_was_there(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    writes = 0
    write = checkpoint._HashingFile.write

    def fill_up(self: checkpoint._HashingFile, data: bytes) -> int:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(28, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(checkpoint._HashingFile, "write", fill_up)
    with pytest.raises((OSError, RuntimeError)):
        save_checkpoint(tmp_path, 2, {"step": 2, "x": torch.arange(100_000)})
    monkeypatch.undo()
    assert load(tmp_path) == (1, [])
    save_checkpoint(tmp_path, 3, {"step": 3})
    assert load(tmp_path) == (3, [])


@pytest.mark.parametrize("after", [0, 1, 100, 2000, 10_000, "rename"])
def test_a_save_killed_at_any_byte_leaves_what_was_there(after: int | str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1})
    child = os.fork()
    if child == 0:
        die_in_a_save(tmp_path, after)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert load(tmp_path) == (2 if after == "rename" else 1, [])
    save_checkpoint(tmp_path, 3, {"step": 3})
    assert load(tmp_path) == (3, []) and len(checkpoints(tmp_path)) == 2
    assert not (tmp_path / "writing.tmp").exists()


def die_in_a_save(folder: Path, after: int | str) -> None:
    """SIGKILL this process after `after` bytes of the file, or after the rename."""
    written = 0
    write = checkpoint._HashingFile.write

    def killed(self: checkpoint._HashingFile, data: bytes) -> int:
        nonlocal written
        data = bytes(data)
        if isinstance(after, int) and written + len(data) > after:
            write(self, data[: after - written])
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        written += len(data)
        return write(self, data)

    def killed_after_rename(folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._HashingFile.write = killed  # type: ignore[method-assign]
    checkpoint._sync_folder = killed_after_rename
    try:
        save_checkpoint(folder, 2, {"step": 2, "x": torch.arange(10_000)})
    finally:
        os._exit(1)
