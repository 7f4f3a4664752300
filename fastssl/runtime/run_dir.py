"""The directory of a run: config.json, metrics.jsonl, log.txt, checkpoint/, backbone.safetensors,
curves.png, summary.json."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastssl.config import Config, flag, knob_names
from fastssl.objectives import METHODS, complete, configured


def is_resumed(folder: Path, config: Config) -> bool:
    """True if `folder` contains this run, unfinished; False if it is empty or absent.

    Raises ValueError where it contains a finished run, another run, or other files. Writes nothing.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; pass another --run")
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not empty and contains no run; pass another --run")
    if changes := differences(read_config(folder), config):
        raise ValueError(f"{folder} contains another run ({changes}); pass another --run")
    if (folder / "summary.json").exists():
        raise ValueError(
            f"{folder} contains this run, finished; `fastssl eval {folder}` repeats its evaluation"
        )
    return True


def create(folder: Path, config: Config) -> None:
    """Make `folder` and write its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config_to_json(replace(config, run=str(folder))))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; ValueError where another process trains in it. The lock is
    released when the process exits, for any reason."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(f"another process is training in {folder}; pass another --run") from None
    finally:
        os.close(descriptor)


def next_free(root: Path, name: str, config: Config) -> Path:
    """root/name, or root/name-2, ...: the first that is free, or contains this run, unfinished."""
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        if not (folder / "config.json").is_file():
            return folder
        if not (folder / "summary.json").exists() and not differences(read_config(folder), config):
            return folder
    raise ValueError(f"{root} is full of runs named {name}; pass --run")


def differences(there: Config, here: Config) -> str:
    """The knobs in which two configs differ, as one line; the run folder is ignored."""
    old, new = flat(there), flat(here)
    return ", ".join(
        f"{flag(k)} {old.get(k, '(none)')} there, {new.get(k, '(none)')} here"
        for k in old | new
        if k != "run" and old.get(k) != new.get(k)
    )


def flat(config: Config) -> dict[str, Any]:
    """Every knob of a run by name, those of its method among them."""
    knobs = asdict(complete(config))
    return knobs | knobs.pop("objective")


def config_to_json(config: Config) -> str:
    return json.dumps(flat(config), indent=2)


def config_from_json(text: str) -> Config:
    """The Config of a `config.json`; ValueError for knobs that this version does not have.

    Files of versions that wrote the knobs of all methods are read; those of other methods had no
    effect and are ignored.
    """
    values: dict[str, Any] = json.loads(text)
    knobs = {name: knob_names(method.Knobs) for name, method in METHODS.items()}
    known = knob_names(Config).union(*knobs.values())
    if unknown := sorted(set(values) - known):
        raise ValueError(f"config.json has knobs this version does not know: {', '.join(unknown)}")
    used = knob_names(Config) | knobs.get(values.get("method", Config.method), set())
    return configured(Config(), **{k: v for k, v in values.items() if k in used})


def read_config(run: Path) -> Config:
    """The Config of a run directory."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.json")
    return config_from_json(path.read_text())


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: write and sync a temporary file beside it, then rename it."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
