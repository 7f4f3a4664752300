"""The training loop, top to bottom.

Shapes: N batch, V views.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fastssl.backbones import feature_width
from fastssl.config import Config
from fastssl.device import device_of
from fastssl.distributed import SINGLE_PROCESS, Ranks
from fastssl.evaluation.collapse import CollapseDetector, SpectrumQueue
from fastssl.evaluation.online_knn import OnlineKNN
from fastssl.objectives.base import Objective
from fastssl.optim import build_optimizer
from fastssl.runtime.checkpoint import CheckpointTimer, TrainCheckpointer
from fastssl.runtime.metrics_log import MetricsLog
from fastssl.runtime.nan_guard import NonFiniteGuard
from fastssl.runtime.signals import stop_signals
from fastssl.runtime.watchdog import Watchdog
from fastssl.schedule import Schedule
from fastssl.step import Model, Step, equal_rows
from fastssl_pipelines import Pipeline, View


@dataclass(frozen=True)
class Trained:
    """The totals of a run: optimizer steps and seconds of training over all sessions, views/s of
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
    log: Callable[[str], None],
    *,
    ranks: Ranks = SINGLE_PROCESS,
    probe: OnlineKNN | None = None,
    views_of: Callable[[int], tuple[View, ...]] | None = None,
) -> Trained:
    """Pretrain `backbone` and `objective` in place.

    probe: called every `config.probe_epochs`, its time not counted. views_of: the views of each
    epoch, where they change. Metrics and checkpoints go to `folder`; a checkpoint there is resumed,
    to the same weights as those of an uninterrupted run. On SIGINT, SIGTERM or SIGUSR1 the
    current step is finished and saved, then Interrupted is raised. Raises NonFiniteLossError where
    the loss or its gradient is NaN or infinite (`NonFiniteGuard`), and CollapseError where the
    features collapse and `config.on_collapse` is "stop".
    """
    model = Model(backbone, objective, config.accumulate).train()
    optimizer = build_optimizer(config, [backbone, objective])
    width = feature_width(backbone, pipeline.views[0].size)
    spectrum = SpectrumQueue(width, device_of(model))
    collapse = CollapseDetector(config, width, log)
    checkpointer = TrainCheckpointer(
        folder / "checkpoint",
        {"modules": model, "optimizer": optimizer, "spectrum": spectrum, "collapse": collapse},
        device=device_of(model),
        global_batch=config.batch_size * ranks.world,
        seed=config.seed,
        ranks=ranks,
    )
    state, schedule = checkpointer.load(log), Schedule(config, len(pipeline))
    if state.step:
        log(f"resumed at step {state.step} of {schedule.steps(state)}")
    step = Step(config, model, optimizer, ranks, log)
    guard = NonFiniteGuard(model, config.on_nonfinite, log)
    timer = CheckpointTimer(config.checkpoint_s)
    if probe and ranks.is_main:
        probe.truncate_after(state.step)
    metrics_path = folder / "metrics.jsonl" if ranks.is_main else None
    metrics_log = MetricsLog(metrics_path, schedule.steps(state), state.step)
    begin, earlier_s, seen, waited_s = time.perf_counter(), state.train_s, 0, 0.0
    with (
        metrics_log,
        Watchdog(log, config.stall_s) as watchdog,
        stop_signals() as stop,
        stop.deferred(),
    ):
        while not schedule.is_over(state):
            epoch, skip = divmod(state.step, len(pipeline))
            views = views_of(epoch) if views_of else None
            wait_begin = time.perf_counter()
            for batch in watchdog.batches(pipeline.epoch(epoch, skip=skip, views=views)):
                batch = equal_rows(batch, pipeline, ranks)
                waited_s += time.perf_counter() - wait_begin
                lr = schedule.lr(state)
                metrics, features = step(batch.views, batch.index, lr)
                spectrum.update(features)
                state.step += 1
                guard.add(state.step, batch.index, metrics.pop("finite"))
                seen += len(batch.index) * len(batch.views)
                # The guard is checked before the probe, the report and the checkpoint: none of them
                # may include a non-finite step. A check is a sync with the device, so there is none
                # at other steps.
                probing = schedule.is_probed(state)
                if probing or state.step % config.log_every == 0 or state.step == schedule.total:
                    watchdog.phase("reading metrics")
                    guard.check()  # waits for the device, so the clock below covers whole steps
                spent_s = time.perf_counter() - begin
                # Under a time budget the learning rate and the end depend on the clock: all ranks
                # use rank 0's, or they would leave the loop at different steps and hang.
                state.train_s = ranks.broadcast(earlier_s + spent_s)
                if probing:
                    watchdog.phase("probing")
                    state.knn = ranks.broadcast(probe(backbone, state) if probe else 0.0)
                    begin = time.perf_counter() - spent_s  # the probe's time is not training time
                over = schedule.is_over(state)
                if state.step % config.log_every == 0 or over:
                    watchdog.phase("reading metrics")
                    guard.check()
                    values = {name: ranks.mean(x.item()) for name, x in metrics.items()}
                    rates = {"views_per_s": seen / spent_s, "data_wait": waited_s / spent_s}
                    quality = spectrum.report(at_once=over) if ranks.is_main else {}
                    report = {"epoch": epoch, **values, "lr": lr, **rates, **quality}
                    metrics_log.write(state.step, report)
                    collapse.check(state.step, quality)
                # A signal may reach a single rank, and timers differ between ranks: saving is a
                # collective call, so all ranks agree on it at every step.
                due, signal = ranks.all_reduce_max(timer.is_due(), stop.received or 0)
                if due or signal or over:
                    watchdog.phase("saving")
                    guard.check()
                    timer.time(lambda: checkpointer.save(state))
                stop.raise_if(signal)
                watchdog.step_done(state.step)
                if over:
                    break
                wait_begin = time.perf_counter()
    views_per_s = seen / max(time.perf_counter() - begin, 1e-9)
    return Trained(state.step, state.train_s, views_per_s)
