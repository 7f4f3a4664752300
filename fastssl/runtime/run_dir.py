"""A run's folder: config.json, metrics.jsonl, checkpoint/, backbone.safetensors, curves.png,
summary.json."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from fastssl.config import Config, config_to_json, read_config


def is_resumed(folder: Path, config: Config) -> bool:
    """True if `folder` holds this same run, unfinished; False if it is free.

    Raises ValueError where it holds a finished run, another run, or something else. Writes nothing.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; pass another --run")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not empty and holds no run; pass another --run")
    if changes := differences(read_config(folder), config):
        raise ValueError(f"{folder} holds another run ({changes}); pass another --run")
    if (folder / "summary.json").exists():
        raise ValueError(
            f"{folder} holds this run, finished; `fastssl eval {folder}` repeats its evaluation"
        )
    return True


def create(folder: Path, config: Config) -> None:
    """Make `folder` and write its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config_to_json(replace(config, run=str(folder))))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process alone; ValueError where another trains in it. The hold ends
    with the process, however that ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; pass another --run") from None
    finally:
        os.close(descriptor)


def next_free(root: Path, name: str, config: Config) -> Path:
    """root/name, or root/name-2, ...: the first that is free, or that holds this run unfinished."""
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        if not (folder / "config.json").is_file():
            return folder
        if not (folder / "summary.json").exists() and not differences(read_config(folder), config):
            return folder
    raise ValueError(f"{root} is full of runs named {name}; pass --run")


def differences(there: Config, here: Config) -> str:
    """The knobs in which two configs differ, as one line; where they are stored does not count."""
    old, new = asdict(there), asdict(here)
    return ", ".join(
        f"--{k.replace('_', '-')} {old[k]} there, {new[k]} here"
        for k in old
        if k != "run" and old[k] != new[k]
    )


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: to a temporary file beside it, to the disk, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
