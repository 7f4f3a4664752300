"""The lock on a run's directory: one process trains in it, on local and on network file systems.

It is a file created exclusively (filelock's SoftFileLock), because NFS and Lustre may be mounted
without flock(2), or with one that other machines do not see. It names its process and machine. The
lock of a dead process of this machine is taken over; whether a process of another machine lives
cannot be seen from here, so its lock stays and is named.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import SoftFileLock, Timeout

LOCK = "lock"  # its file in the directory
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and lock it; afterwards release it, and remove what is empty of what was made.

    ValueError where another process trains in it, OSError where it cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder)
        try:
            yield
        finally:
            lock.release()
    finally:
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()


def _acquire(folder: Path) -> SoftFileLock:
    path = folder / LOCK
    lock = SoftFileLock(path, timeout=0)
    for _ in range(2):
        try:
            lock.acquire()
            return lock
        except Timeout:
            if not _remove_stale(path):
                break
    raise ValueError(_refusal(folder))


def _remove_stale(path: Path) -> bool:
    """Remove the lock of a dead process of this machine; whether there is none now.

    filelock takes over a stale lock by exchanging two names, which NFS does not support, and takes
    a process that nobody waits for as alive.
    """
    text = _read(path)
    if text is None:
        return True
    pid, host = _owner(text)
    if pid is None or not _is_here(host) or _is_alive(pid):
        return False
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.rename(aside)  # of several processes that see it stale, one succeeds
    except FileNotFoundError:
        return True
    if _read(aside) == text:
        aside.unlink()
        return True
    aside.rename(path)  # another process was faster and had locked again
    return False


def _refusal(folder: Path) -> str:
    """Why the lock cannot be had, and what to do."""
    path = folder / LOCK
    pid, host = _owner(_read(path) or "")
    if pid is None:
        return f"{folder} is locked by {path}, which names no process; delete it if none trains"
    if not _is_here(host):
        return (
            f"process {pid} on {host} is training in {folder}; pass another --run, or delete {path}"
            " if that process has ended"
        )
    if orphans := orphaned_workers(pid):
        return (
            f"process {pid} is training in {folder}, a worker of a torchrun that was killed; "
            f"`kill {' '.join(map(str, orphans))}` ends it and the others of that launch"
        )
    return f"process {pid} on {host} is training in {folder}; pass another --run"


def _read(path: Path) -> str | None:
    """The text of a lock, None where there is none."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _owner(text: str) -> tuple[int | None, str]:
    """Process and host in a lock's text: filelock writes both on lines of their own."""
    pid, host, *_ = [*text.splitlines(), "", ""]
    return (int(pid) if pid.isdecimal() else None), host


def _is_here(host: str) -> bool:
    """Whether the processes of a lock's host can be seen from here: filelock adds the PID namespace
    to the name, except for the machine's first, so that containers differ."""
    name, mark, namespace = host.partition("?pidns-")
    if name != socket.gethostname():
        return False
    return not mark or namespace == f"{os.stat('/proc/self/ns/pid').st_ino:x}"


def orphaned_workers(pid: int | None = None) -> list[int]:
    """The processes of this user that torchrun started and that outlived it: those of the launch of
    process `pid`, empty where that is no orphan, or all that run fastssl."""
    if pid is not None and not _is_orphan(pid):
        return []
    launch = None if pid is None else _launch(pid)
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        number = int(entry.name)
        wanted = "fastssl" in _text(number, "cmdline") if pid is None else _launch(number) == launch
        if wanted and number != os.getpid() and _is_orphan(number):
            found.append(number)
    return sorted(found)


def _is_alive(pid: int) -> bool:
    """False also for a process that has ended and that its parent never waits for, as in a
    container without an init."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, which /proc may hide
        return True
    stat = _stat(pid)
    return not stat or stat[0] not in "ZX"


def _is_orphan(pid: int) -> bool:
    """Whether torchrun started the process and is not its parent any more: the parent is neither
    another process of the launch, nor torchrun or another Python program that launches."""
    stat = _stat(pid)
    if not stat or _launch(pid) is None or _launch(parent := int(stat[1])) is not None:
        return False
    words = [Path(word).name for word in _text(parent, "cmdline").split("\0")]
    return not words[0].startswith("python") and not {*words} & {*LAUNCHERS}


def _launch(pid: int) -> tuple[str, ...] | None:
    """What the workers of one launch have in common; None for any other process."""
    environment = dict(x.partition("=")[::2] for x in _text(pid, "environ").split("\0"))
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return tuple(environment.get(x, "") for x in names) if names[0] in environment else None


def _text(pid: int, name: str) -> str:
    """/proc/PID/cmdline, environ or stat, "" where the process is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """State, parent, ... of a process, as in /proc/PID/stat; none where it is gone."""
    return _text(pid, "stat").rpartition(")")[2].split()
