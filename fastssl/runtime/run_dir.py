"""The directory of a run: config.json, metrics.jsonl, log.txt, checkpoint/, backbone.safetensors,
curves.png, summary.json."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastssl.config import Config, flag, knob_names
from fastssl.objectives import METHODS, complete, configured
from fastssl.runtime.run_lock import LOCK

BUILT_IN_DATA = ("digits", "cifar10")  # names, not paths
FREE = frozenset(
    {
        *("device", "compile", "cuda_graphs", "channels_last", "accumulate"),
        *("log_every", "stall_s", "checkpoint_s", "label_draws", "eval"),
        *("on_nonfinite", "on_collapse", "on_corrupt", "corrupt_quota"),
    }
)
"""Knobs that leave the result as it is, but for rounding, batch norm's parts, and when a run gives
up: a run may be resumed with others."""
PROBE = frozenset({"knn_k", "knn_temperature", "probe_epochs"})  # likewise, without a target


def is_resumed(folder: Path, config: Config) -> bool:
    """True if `folder` contains this run, unfinished; False if it is empty or absent.

    Raises ValueError where it contains a finished run, another run, or other files. Writes nothing.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file; pass another --run")
    if not folder.exists() or all(path.name.startswith(LOCK) for path in folder.iterdir()):
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
    """Write the config.json of a run into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", config_to_json(replace(config, run=str(folder))))


def next_free(root: Path, name: str, config: Config) -> Path:
    """root/name, or root/name-2, ...: the first that is free, or contains this run, unfinished."""
    for number in range(1, 10_000):
        folder = root / (name if number == 1 else f"{name}-{number}")
        if not (folder / "config.json").is_file():
            return folder
        if (folder / "summary.json").exists():
            continue
        there = read_config(folder)
        if not differences(there, config) and not _longer(there, config):
            return folder
    raise ValueError(f"{root} is full of runs named {name}; pass --run")


def differences(there: Config, here: Config) -> str:
    """The knobs in which two configs differ and that change the result, as one line.

    A longer schedule is no difference: the same run goes on.
    """
    ignored = {*FREE, *_longer(there, here)}
    if not there.target_accuracy:
        ignored |= PROBE
    old, new = flat(there), flat(here)
    return ", ".join(
        f"{flag(k)} {old.get(k, '(none)')} there, {new.get(k, '(none)')} here"
        for k in _changed(old, new)
        if k not in ignored
    )


def changes(there: Config, here: Config) -> list[str]:
    """What a resumed run does otherwise than before, a line for each knob."""
    old, new, longer = flat(there), flat(here), _longer(there, here)
    lines = [
        f"resumed with {flag(k)} {new.get(k)}, before {old.get(k)}" for k in _changed(old, new)
    ]
    if longer:
        unit = "s" if here.time_budget_s else " epochs"
        lines.append(
            f"from here on the learning rate is that of a run of {new[longer[0]]:g}{unit}: after "
            f"the warm-up a cosine that ends with it, at {here.final_lr:g} of the peak"
        )
    return lines


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The knobs in which two runs differ; the run's own folder is none."""
    return [
        k
        for k in old | new
        if k != "run" and old.get(k) != new.get(k) and not _is_same_path(k, old.get(k), new.get(k))
    ]


def _is_same_path(knob: str, old: Any, new: Any) -> bool:
    """Whether two values of --data or --init are spellings of one path."""
    if knob not in ("data", "init") or not old or not new or {old, new} & {*BUILT_IN_DATA}:
        return False
    return os.path.realpath(os.path.expanduser(old)) == os.path.realpath(os.path.expanduser(new))


def _longer(there: Config, here: Config) -> tuple[str, ...]:
    """The knob by which `here` has the same schedule over a longer time, if any."""
    if there.time_budget_s:
        return ("time_budget_s",) if here.time_budget_s > there.time_budget_s else ()
    return ("epochs",) if here.epochs > there.epochs and not here.time_budget_s else ()


def with_absolute_paths(config: Config) -> Config:
    """`config` with --data and --init as they are found from any working directory."""
    return replace(config, data=_absolute(config.data), init=_absolute(config.init))


def _absolute(path: str) -> str:
    """An absolute path where there is such a file; names of data sets and networks as they are."""
    if not path or path in BUILT_IN_DATA:
        return path
    full = os.path.abspath(os.path.expanduser(path))
    return full if os.path.exists(full) else path


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
    values = json.loads(text)
    if not isinstance(values, dict):
        raise TypeError("it holds no table of knobs")
    knobs = {name: knob_names(method.Knobs) for name, method in METHODS.items()}
    known = knob_names(Config).union(*knobs.values())
    if unknown := sorted(set(values) - known):
        raise ValueError(f"config.json has knobs this version does not know: {', '.join(unknown)}")
    used = knob_names(Config) | knobs.get(values.get("method", Config.method), set())
    return configured(Config(), **{k: v for k, v in values.items() if k in used})


def read_config(run: Path) -> Config:
    """The Config of a run directory; ValueError where its file is damaged."""
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not a run folder: it has no config.json")
    try:
        return config_from_json(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it, or delete {run} to start again"
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with replacing(path) as temporary, open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block ends, and is deleted
    where the block raises."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
