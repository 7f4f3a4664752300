"""The training loop, top to bottom.

Shapes: N batch, V views.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastssl.config import Config
from fastssl.distributed import ALONE, Ranks
from fastssl.evaluation.collapse import CollapseWatcher
from fastssl.evaluation.online_knn import OnlineProbe
from fastssl.evaluation.spectrum import SpectrumQueue
from fastssl.objectives import Objective
from fastssl.optim import build_optimizer
from fastssl.runtime.metrics_log import Log
from fastssl.runtime.nan_guard import FiniteGuard
from fastssl.runtime.signals import stop_signals
from fastssl.runtime.state import RunState, SaveClock, device_of
from fastssl.runtime.watchdog import StallWatch
from fastssl.schedule import Schedule
from fastssl.step import Model, Step
from fastssl_pipelines import Pipeline, View


@dataclass(frozen=True)
class Trained:
    """What a run came to: optimizer steps and seconds of training in all its sessions, views/s of
    this one."""

    steps: int
    train_s: float
    views_per_s: float


def train(
    config: Config,
    pipeline: Pipeline,
    backbone: nn.Module,
    objective: Objective,
    folder: Path,
    say: Callable[[str], None],
    *,
    ranks: Ranks = ALONE,
    probe: OnlineProbe | None = None,
    views_of: Callable[[int], tuple[View, ...]] | None = None,
) -> Trained:
    """Pretrain `backbone` and `objective` in place.

    probe: asked by the first rank every `config.probe_epochs`, its time not counted. views_of: the
    views of each epoch, where they change. Reports and checkpoints go to `folder`; a checkpoint
    found there is resumed, to the same weights as without the interruption. On SIGINT, SIGTERM or
    SIGUSR1 the step at hand is finished and saved, then Interrupted is raised. Raises
    NonFiniteLossError where the loss or its gradient is NaN or infinite (`FiniteGuard`), and
    CollapseError where the features collapse and `config.on_collapse` is "stop".
    """
    model = Model(backbone, objective, config.accumulate).train()
    optimizer = build_optimizer(config, [backbone, objective])
    width: int = backbone.num_features  # type: ignore[assignment]
    spectrum = SpectrumQueue(width, device_of(model))
    collapse = CollapseWatcher(config, width, say)
    state = RunState(
        folder / "checkpoint",
        {"modules": model, "optimizer": optimizer, "spectrum": spectrum, "collapse": collapse},
        device=device_of(model),
        global_batch=config.batch_size * ranks.world,
        seed=config.seed,
        ranks=ranks,
    )
    at, schedule = state.load(say), Schedule(config, len(pipeline))
    if at.step:
        say(f"resumed at step {at.step} of {schedule.steps(at)}")
    step = Step(config, model, optimizer, ranks, say)
    guard, clock = FiniteGuard(model, config.on_nonfinite, say), SaveClock(config.checkpoint_s)
    if probe:
        probe.forget_after(at.step)
    log = Log(folder / "metrics.jsonl" if ranks.first else None, schedule.steps(at), at.step)
    begin, earlier_s, seen, waited_s = time.perf_counter(), at.train_s, 0, 0.0
    with log, StallWatch(say, config.stall_s) as stall, stop_signals() as stop, stop.held():
        while not schedule.is_over(at):
            epoch, skip = divmod(at.step, len(pipeline))
            views = views_of(epoch) if views_of else None
            asked = time.perf_counter()
            for batch in stall.batches(pipeline.epoch(epoch, skip=skip, views=views)):
                waited_s += time.perf_counter() - asked
                lr = schedule.lr(at)
                metrics, features = step(batch.views, batch.index, lr)
                spectrum.update(features)
                at.step += 1
                guard.add(at.step, batch.index, metrics.pop("finite"))
                seen += len(batch.index) * len(batch.views)
                probing = schedule.is_probed(at)
                if probing or at.step % config.log_every == 0 or at.step == schedule.total:
                    stall.phase("reading metrics")
                    guard.check()  # the only sync with the device; the clock is read behind it
                spent_s = time.perf_counter() - begin
                at.train_s = ranks.share(earlier_s + spent_s)
                if probing:
                    stall.phase("probing")
                    at.knn = ranks.share(probe(backbone, at) if probe else 0.0)
                    begin = time.perf_counter() - spent_s
                over = schedule.is_over(at)
                if at.step % config.log_every == 0 or over:
                    stall.phase("reading metrics")
                    guard.check()
                    values = {name: ranks.mean(x.item()) for name, x in metrics.items()}
                    rates = {"views_per_s": seen / spent_s, "data_wait": waited_s / spent_s}
                    quality = spectrum.report(at_once=over) if ranks.first else {}
                    log.write(at.step, {"epoch": epoch, **values, "lr": lr, **rates, **quality})
                    collapse.check(at.step, quality)
                due, signal = ranks.most(clock.is_due(), stop.received or 0)
                if due or signal or over:
                    stall.phase("saving")
                    guard.check()
                    clock.time(lambda: state.save(at))
                stop.obey(signal)
                stall.made(at.step)
                if over:
                    break
                asked = time.perf_counter()
    return Trained(at.step, at.train_s, seen / max(time.perf_counter() - begin, 1e-9))
