"""What ends a command does so in one line, whatever the terminal, the names and the account."""

import errno
import getpass
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.cli import COMMANDS, run
from fastssl.cli.errors import one_line
from fastssl.runtime.environment import provide_user
from fastssl.runtime.run_dir import read_config, write_text

TINY = ["--epochs", "1", "--warmup-epochs", "0", "--backbone", "fastnet-4", "--label-draws", "1"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --batch-s"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 4 bytes"), "lower --batch-size"),
        (MemoryError("Unable to allocate 7 PiB"), "out of memory (Unable to allocate 7 PiB); lo"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "'x'; free some space; the same"),
        (ValueError("two\nlines"), "two lines"),
        (RuntimeError("a bug"), None),
        (KeyError("a bug"), None),
    ],
)
def test_errors_of_one_line(error: Exception, expected: str | None) -> None:
    line = one_line(error)
    assert expected in line if expected and line else line is expected
    assert "\n" not in (line or "")


def test_the_exit_code_of_an_out_of_memory_is_two(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "rank", lambda arguments: torch.empty(10**15))
    assert run(["rank"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastssl: out of memory (") and err.count("\n") == 1


def test_a_full_disk_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")
    (tmp_path / "summary.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"] and path.read_text() == "old"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"lr": "high"}', '{"lr": 0.1, "lr', "\udcff"])
def test_a_damaged_config_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*\); restore it, or delete"):
        read_config(tmp_path)


def test_brackets_in_paths_and_a_terminal_of_ascii(tmp_path: Path) -> None:
    """Square brackets are no markup, and what a terminal cannot show does not end a command."""
    folder = tmp_path / "a[/b]:smile:é"
    code = "from fastssl.cli import main; main()"
    path = {"PYTHONPATH": ":".join(sys.path)}
    env = {**os.environ, **path, "LANG": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "400"}
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    data = ["--data", str(tmp_path / "tiny.npz"), "--batch-size", "16"]
    labels = np.arange(40) % 2
    np.savez(data[1], x_train=images, y_train=labels, x_test=images, y_test=labels)
    flags = ["--run", str(folder), *data, *TINY]
    command = [sys.executable, "-c", code, "train", "digits-diet", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert f"results in {tmp_path}/a[/b]:smile:?" in done.stdout and " +/-0.0" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=env)
    assert again.returncode == 2 and "a[/b]:smile:? contains this run, finished" in again.stderr


def test_neither_home_nor_a_name_for_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    with pytest.raises(RuntimeError):
        Path.home()
    provide_user()
    assert getpass.getuser() == f"fastssl-uid{os.getuid()}"
    assert Path.home().parent == tmp_path and os.access(Path.home(), os.W_OK)
    assert run(["recipes"]) == 0


def test_a_home_and_a_name_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USER", "someone")
    provide_user()
    assert os.environ["HOME"] == "/somewhere" and os.environ["USER"] == "someone"
