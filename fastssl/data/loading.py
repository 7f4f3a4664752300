"""The views, data and pipeline of a run, opened once."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch

from fastssl.backbones import SizeCheck
from fastssl.config import Config
from fastssl.data.datasets import beton_of, is_encoded, periodic
from fastssl.data.splits import ArraySplit, FileSplit, Split, decoding_of, open_split
from fastssl.distributed import SINGLE_PROCESS, Ranks
from fastssl.schedule import ramp
from fastssl_pipelines import Pipeline, View, choose_engine, open_pipeline, policies
from fastssl_pipelines.engines.streaming import StreamingPipeline
from fastssl_pipelines.memory import require_memory


def build_views(config: Config) -> tuple[View, ...]:
    """The views of `config.policy`; ValueError for an unknown policy, and where it cannot have as
    many views."""
    views = policies.policy_views(config.policy, config.views, config.image_size)
    return tuple(replace(view, channels_last=config.channels_last) for view in views)


def size_step(config: Config) -> int:
    """The px by which the views of a ramp grow (`schedule.ramp`): 4, or what the backbone needs,
    such as the side of its patches.

    Raises ValueError where the backbone cannot take a size of the run; nothing is read or built
    but on meta tensors.
    """
    check = SizeCheck(config)
    check.require(config.image_size)  # of the evaluation
    steps = {step: _view_sizes(config, step) for step in (4, 8, 14, 16, 28, 32)}
    for step, sizes in steps.items():
        if all(check.problem(size) is None for size in sizes):
            return step
    for size in steps[32]:
        check.require(size)
    raise AssertionError("a step fails without a size that does")


def _view_sizes(config: Config, step: int) -> list[int]:
    """The sides of all views of a run, the last epoch's first."""
    epochs = (ramp(config, epoch, step) for epoch in range(config.ramp_epochs, -1, -1))
    return list(dict.fromkeys(max(view.shape) for each in epochs for view in build_views(each)))


@dataclass(frozen=True)
class Data:
    """The data of a run: the training part, a pipeline over the same images in the same order, and
    the test part, opened on first access."""

    config: Config
    train: Split
    pipeline: Pipeline

    @cached_property
    def test(self) -> Split:
        return open_split(self.config, "test")

    @property
    def skipped(self) -> Mapping[str, str]:
        """The unreadable training images found so far, by name, with the reason."""
        if isinstance(self.pipeline, StreamingPipeline):
            return {**self.train.skipped, **self.pipeline.unreadable.reasons}
        return self.train.skipped


def open_data(
    config: Config, device: torch.device, log: Callable[[str], None], ranks: Ranks = SINGLE_PROCESS
) -> Data:
    """The data of a run and its pipeline; ValueError where a batch does not fit.

    Engine resident decodes the training images into memory; the others decode no more than the
    batches in flight. A collective call, which returns when every rank has the data: none waits in
    training for another that still decodes.
    """
    views = build_views(config)
    needed = sum(4 * config.batch_size * 3 * prod(view.shape) for view in views)  # float32
    what = f"one batch of {config.batch_size} x {len(views)} views of {config.image_size} px"
    require_memory(needed, what, "lower --image-size, --batch-size or --views", device)
    engine = _engine(config, device, log)
    with ranks.main_first(config.data == "cifar10"):  # which it downloads
        split = open_split(
            config, "train", hold=engine == "resident", progress=periodic(log, "decoded")
        )
    if config.batch_size > len(split):
        raise ValueError(
            f"--batch-size {config.batch_size} is larger than the data set of {len(split)} images"
        )
    with ranks.main_first(engine == "ffcv"):  # for which it converts the images to a file
        source, split = _source(config, engine, split, log)
    pipeline = open_pipeline(
        engine,
        source,
        views=views,
        batch_size=config.batch_size,
        seed=config.seed,
        device=device,
        shard=(ranks.rank, ranks.world),
        **_engine_options(config, engine),
    )
    ranks.barrier()
    return Data(config, split, pipeline)


def _engine(config: Config, device: torch.device, log: Callable[[str], None]) -> str:
    """The engine that `config` names, or the one that "auto" chooses for its data."""
    if config.engine != "auto":
        return config.engine
    if not is_encoded(config.data):
        return "resident"
    engine, why = choose_engine(config.data if config.data.endswith(".beton") else [b""], device)
    log(f"engine {engine}: {why}")
    return engine


def _source(
    config: Config, engine: str, split: Split, log: Callable[[str], None]
) -> tuple[Any, Split]:
    """(what the engine reads, the split whose image i is the engine's image i)."""
    if isinstance(split, ArraySplit):
        if engine != "resident":
            raise ValueError(
                f"--data {config.data} is not a folder of images: pass --engine resident with it"
            )
        return split.pixels, split
    assert isinstance(split, FileSplit)
    if engine == "dali":
        return split.files, split
    beton, skipped = beton_of(
        split.files,
        decoding_of(config),
        config.on_damage,
        config.on_corrupt,
        config.corrupt_quota,
        log,
    )
    if skipped:
        readable = [i for i, name in enumerate(split.files.names) if name not in skipped]
        source_numbers = split.source_numbers[readable]
        files = split.files.select(readable)
        split = FileSplit(config, "train", files, skipped, source_numbers)
    return beton, split


def _engine_options(config: Config, engine: str) -> dict[str, Any]:
    """The options of `open_pipeline` that only this engine takes."""
    if engine == "resident":
        return {}
    options: dict[str, Any] = {
        "on_corrupt": config.on_corrupt,
        "quota": config.corrupt_quota,
        "scaled": config.scaled,
        "on_damage": config.on_damage,
    }
    if engine == "dali":
        options |= {"render": config.render, **asdict(decoding_of(config))}
    return options
