"""The training loop, top to bottom.

Shapes: N batch, C channels, S pixels per side, F features, V views.
"""

import math
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from fastssl.checkpoint import load_checkpoint, save_checkpoint
from fastssl.config import Config
from fastssl.log import Log
from fastssl.objectives import Objective
from fastssl.optim import build_optimizer, learning_rate
from fastssl_pipelines import Pipeline


class NonFiniteLossError(ArithmeticError):
    """The loss became NaN or infinite; nothing after the last checkpoint is kept."""


def view_features(backbone: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
    """V tensors (N, C, S, S) -> V tensors (N, F), the backbone run once per group of adjacent
    equal-sized views."""
    features: list[Tensor] = []
    for _, group in groupby(views, key=lambda view: view.shape[-1]):
        same = list(group)
        features += backbone(torch.cat(same)).chunk(len(same))
    return features


def train(
    config: Config,
    pipeline: Pipeline,
    backbone: nn.Module,
    objective: Objective,
    device: torch.device,
    folder: Path,
) -> float:
    """Pretrain `backbone` and `objective` in place; reports and checkpoints go to `folder`. Returns
    views/s.

    A checkpoint in the folder is resumed. Raises NonFiniteLossError where the loss is NaN or
    infinite.
    """
    total = config.epochs * len(pipeline)
    warmup = round(config.warmup_epochs * len(pipeline))
    optimizer = build_optimizer(config, [backbone, objective])
    saved = load_checkpoint(folder / "checkpoint", device)
    first_epoch = 0
    if saved:
        backbone.load_state_dict(saved["backbone"])
        objective.load_state_dict(saved["objective"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"].cpu())
        first_epoch = saved["epoch"]

    def forward(views: Sequence[Tensor], index: Tensor) -> dict[str, Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            return objective(view_features(backbone, views), index)

    compiled = torch.compile(forward) if config.compile else forward
    backbone.train()
    objective.train()
    step = first_epoch * len(pipeline)
    begin, seen = time.perf_counter(), 0
    with Log(folder / "metrics.jsonl", total, step) as log:
        for epoch in range(first_epoch, config.epochs):
            for batch in pipeline.epoch(epoch):
                lr = learning_rate(
                    step, total=total, warmup=warmup, peak=config.lr, final=config.final_lr
                )
                for parameters in optimizer.param_groups:
                    parameters["lr"] = lr
                metrics = compiled(batch.views, batch.index)
                optimizer.zero_grad(set_to_none=True)
                metrics["loss"].backward()
                optimizer.step()
                step += 1
                seen += len(batch.index) * len(batch.views)
                if step % config.log_every == 0 or step == total:  # the only sync with the device
                    values = {name: value.item() for name, value in metrics.items()}
                    if not math.isfinite(values["loss"]):
                        raise NonFiniteLossError(
                            f"the loss is {values['loss']} at step {step}; try a lower --lr"
                        )
                    rate = seen / (time.perf_counter() - begin)
                    log.write(step, {"epoch": epoch, **values, "lr": lr, "views_per_s": rate})
            if (epoch + 1) % config.checkpoint_every == 0 or epoch + 1 == config.epochs:
                state = {
                    "backbone": backbone.state_dict(),
                    "objective": objective.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "random": torch.get_rng_state(),
                    "epoch": epoch + 1,
                }
                save_checkpoint(folder / "checkpoint", state)
    return seen / max(time.perf_counter() - begin, 1e-9)
