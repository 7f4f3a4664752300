"""The lock of a run folder: one process, named; stale locks end, orphaned workers are found."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import SoftFileLock

from fastssl.runtime.run_lock import LOCK, locked, orphaned_workers

HOLD = "from fastssl.runtime.run_lock import locked; from pathlib import Path; import time, sys\n"
HOLD += "with locked(Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"


def test_one_folder_is_locked_by_one_process(tmp_path: Path) -> None:
    with locked(tmp_path):
        refusal = rf"process {os.getpid()} on {socket.gethostname()}.* is training in .*; pass ano"
        with pytest.raises(ValueError, match=refusal):
            with locked(tmp_path):
                pytest.fail("locked twice")
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_folders_in_which_nothing_was_written_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "config.json").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_lock_of_a_dead_process_is_taken_over(
    exchange: bool, waited: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where two names cannot be exchanged, as on NFS: filelock then leaves the lock."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=-1, env=environment())
    assert holder.stdout and holder.stdout.readline() == b"locked\n"
    with pytest.raises(ValueError, match=f"process {holder.pid} on "), locked(tmp_path):
        pytest.fail("its process lives")
    holder.kill()
    if waited:
        holder.wait()
    else:  # a process that has ended stays in /proc until its parent waits for it
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / LOCK).exists()
    if not exchange:
        monkeypatch.setattr(SoftFileLock, "_try_break_stale_lock", lambda self: None)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"{os.getpid()}\n")
    holder.communicate()
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_named_with_its_file(tmp_path: Path) -> None:
    for text in ("4711\nnode7\n", "4711\nnode7?pidns-f0000000\n"):
        (tmp_path / LOCK).write_text(text)
        with pytest.raises(ValueError, match=rf"process 4711 on node7.* or delete {tmp_path}/lock"):
            with locked(tmp_path):
                pytest.fail("the process may live")
    (tmp_path / LOCK).write_text("")
    with pytest.raises(ValueError, match="names no process; delete it"), locked(tmp_path):
        pytest.fail("the process may live")


LAUNCH = """
import os, subprocess, sys, time
env = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
code, folder = sys.argv[2:]
workers = [subprocess.Popen([sys.executable, "-c", code, folder], env=env)]
workers += [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=env)]
print(*[worker.pid for worker in workers], flush=True)
time.sleep(60)
"""


def test_orphaned_workers_are_named_with_the_command_that_ends_them(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LAUNCH, "torchrun", HOLD, str(tmp_path)]
    agent = subprocess.Popen(command, stdout=-1, env=environment(), text=True)
    assert agent.stdout
    lines = [agent.stdout.readline(), agent.stdout.readline()]
    pids = [int(word) for line in lines for word in line.split() if word.isdecimal()]
    try:
        assert not orphaned_workers(pids[0]) and not {*pids} & {*orphaned_workers()}
        agent.kill()
        agent.wait()
        ends = f"a worker of a torchrun that was killed; `kill {pids[0]} {pids[1]}` ends it"
        with pytest.raises(ValueError, match=ends), locked(tmp_path):
            pytest.fail("the worker trains")
        assert pids[0] in orphaned_workers() and os.getpid() not in orphaned_workers()
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        agent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with locked(tmp_path):
                return
        except ValueError:  # the worker is still ending
            time.sleep(0.01)
    pytest.fail("the lock of the ended worker was not taken over")


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(sys.path)}
