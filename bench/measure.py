"""Time and peak memory of callables: interleaved variants, medians, interquartile ranges.

    rows = measure({"eager": f, "fused": g}, device="cuda")
    rows["fused"].ms, rows["fused"].peak_mib

On a GPU a time comes from CUDA events around one call (`ms`, the eager loop a trainer sees) and,
where the call can be captured, around one replay of its CUDA graph (`graph_ms`, kernels alone). On
a CPU it comes from `perf_counter`. Variants are interleaved within a run, so a drift of the machine
affects all of them.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

MIB = 2**20
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One variant's result; times in ms, memory in MiB beyond what was allocated before."""

    ms: float
    ms_iqr: tuple[float, float]
    n: int
    peak_mib: float
    graph_ms: float | None = None
    graph_ms_iqr: tuple[float, float] | None = None


@dataclass(frozen=True)
class Case:
    """One thing to measure. `build()` makes the inputs and returns the variants, the reference
    first; `check(variants)` raises where they disagree, and runs before anything is timed."""

    name: str
    parameters: Mapping[str, Any]
    build: Callable[[], dict[str, Call]]
    check: Callable[[dict[str, Call]], None]
    # unit -> amount in one call ("views": 2048)
    work: Mapping[str, float] = field(default_factory=dict)
    floor_ms: float | None = None  # the roofline's, where one is known for this device
    settle_s: float = 0.0  # pause before each call, until threads of the previous one are idle
    graph: bool = True  # whether a CUDA graph can capture the calls: they read nothing back


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    """(25th, 50th, 75th) percentile."""
    if len(samples) < 2:
        return (samples[0],) * 3  # type: ignore[return-value]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high


def measure(
    variants: Mapping[str, Call],
    device: str,
    *,
    seconds: float = 10.0,
    min_runs: int = 20,
    settle_s: float = 0.0,
    graph: bool = True,
) -> dict[str, Timing]:
    """Time the variants, interleaved, for about `seconds` and at least `min_runs` runs each; then
    measure the memory of each once. `settle_s` is the pause before each call; `graph` adds replays
    on a GPU. After 3 * `seconds`, 3 runs suffice.
    """
    cuda = torch.device(device).type == "cuda"
    timer = _cuda_ms if cuda else _cpu_ms
    for call in variants.values():
        call()  # warm-up: compilation, allocator, caches
        call()
    samples: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    rounds = 0
    while True:
        for name, call in variants.items():
            time.sleep(settle_s)
            samples[name].append(timer(call))
        rounds += 1
        spent = time.perf_counter() - start
        if (spent >= seconds and rounds >= min_runs) or (spent >= 3 * seconds and rounds >= 3):
            break
    peak_mib = _cuda_peak_mib if cuda else _cpu_peak_mib
    peaks = {name: peak_mib(call) for name, call in variants.items()}
    graphs = _graph_samples(variants, min_runs) if cuda and graph else {}
    result = {}
    for name in variants:
        low, middle, high = quartiles(samples[name])
        replays = quartiles(graphs[name]) if name in graphs else None
        result[name] = Timing(
            ms=middle,
            ms_iqr=(low, high),
            n=rounds,
            peak_mib=peaks[name],
            graph_ms=replays[1] if replays else None,
            graph_ms_iqr=(replays[0], replays[2]) if replays else None,
        )
    return result


def _cpu_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _graph_samples(variants: Mapping[str, Call], runs: int) -> dict[str, list[float]]:
    """CUDA-graph replay times of the variants that can be captured."""
    graphs = {}
    stream = torch.cuda.current_stream()
    for name, call in variants.items():
        try:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                call()
            side.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
            graphs[name] = graph
        except Exception:  # a sync or an upload that a capture forbids: no graph row for it
            torch.cuda.set_stream(stream)  # a failed capture leaves its stream current
            torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(3 + runs):
        for name, graph in graphs.items():
            samples[name].append(_cuda_ms(graph.replay))
    return {name: times[3:] for name, times in samples.items()}


def _cuda_peak_mib(call: Call) -> float:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def _cpu_peak_mib(call: Call) -> float:
    """Peak of live torch allocations made in the call, from the profiler's allocation events."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    # acc_events: torch 2.11 warns without it
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    allocations = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, size in sorted(allocations, key=lambda a: a[0]):
        live += size
        peak = max(peak, live)
    return peak / MIB


def environment() -> dict[str, Any]:
    """The environment of a measurement: device, power limit, versions, threads."""
    stamp: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in ("triton", "numpy", "timm", "torchvision"):
        stamp[package] = _version(package)
    if torch.cuda.is_available():
        stamp["gpu"] = torch.cuda.get_device_name()
        stamp["gpu_power_limit_w"] = _power_limit_w()
        stamp["cuda"] = torch.version.cuda
    return stamp


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor()


def _power_limit_w() -> float | None:
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        return float(
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
        )
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
