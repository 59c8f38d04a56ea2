"""What the benchmarks share: recorded steps, interleaved timing, peak memory, machine and versions,
tables."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from dpsynth.capture import capture
from dpsynth.counter import CounterRng
from dpsynth.optimizers import FleetAdam
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng

__all__ = [
    "Step",
    "arguments",
    "compare",
    "difference",
    "finish",
    "fleet_adam",
    "interleave",
    "keyed",
    "megabytes",
    "memories",
    "numbered",
    "parser",
    "products",
    "ratios",
    "recorded",
    "spread",
    "target",
    "within",
]

Step = Callable[[], object]
# A step that is told its number: an int, or a tensor where steps are recorded.
Numbered = Callable[[Any], object]
Times = Mapping[str, Sequence[float]]


# -- command line ----------------------------------------------------------------------------


def parser(what: str) -> argparse.ArgumentParser:
    """Options that every benchmark has; `what` is its first line of help."""
    options = argparse.ArgumentParser(description=what)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    options.add_argument("--rounds", type=int, default=None, help="rounds A B C A B C …")
    options.add_argument("--json", type=Path, default=None, help="file for the results")
    options.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    options.add_argument(
        "--captured",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="record own steps once and replay them (default: on with --device cuda)",
    )
    return options


def arguments(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parsed options; sets the number of threads of everything that is loaded. Options that make
    no sense end the program with exit code 2, as argparse does."""
    chosen = options.parse_args(argv)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this machine has no CUDA device; use --device cpu")
    for name in ("threads", "rounds"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            options.error(f"--{name} {getattr(chosen, name)}: must be at least 1")
    if chosen.captured is None:
        chosen.captured = chosen.device == "cuda"
    _settle(chosen.threads)
    return chosen


def _settle(threads: int) -> None:
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    # Opacus registers hooks on a module whose inputs need no gradient, by design.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")


# -- steps -------------------------------------------------------------------------------------


def keyed(keys: Sequence[int], *, device: str, captured: bool) -> FleetRng:
    """What own steps draw from: a counter where they are recorded, as in a training."""
    return (CounterRng if captured else FleetRng)(keys, device=device)


def fleet_adam(network: nn.Module) -> FleetAdam:
    """Adam over a fleet, 10^-3 for every run."""
    like = next(network.parameters())
    return FleetAdam(network.parameters(), torch.full_like(like[:, 0, 0], 1e-3).detach())


def numbered(work: Numbered) -> Step:
    """`work` at step 0, 1, 2, …"""
    numbers = itertools.count()
    return lambda: work(next(numbers))


def recorded(
    work: Numbered,
    optimizers: Sequence[FleetAdam],
    data: Sequence[Tensor],
    *,
    engine: PrivateEngine | None = None,
) -> Step:
    """`work` at step 0, 1, 2, …, recorded once and replayed as a training does it: operations are
    fused and a CUDA graph made of them on a GPU.

    Args:
        work: One step; draws from a `CounterRng`, and moves by `optimizers` and nothing else.
        optimizers: Their parameters and state are what a step changes.
        data: Rows and whatever else a training would hand over anew at each step: what follows
            from it must not be computed once and kept.
        engine: Of a private step.
    """
    state = [*data]
    for optimizer in optimizers:
        optimizer.prepare()
        optimizer.static = True
        for group in optimizer.param_groups:
            state += [*group["params"], group["lr"]]
        state += [value for held in optimizer.state.values() for value in held.values()]
    if engine is not None:
        engine.clipper.static = True
    number = torch.zeros(1, dtype=torch.long, device=state[0].device)

    def step() -> None:
        work(number[0])
        number.add_(1)

    return capture(step, [number, *state], compiled=number.is_cuda)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Forward and backward in float32, or in TF32 with the precisions `tf32` and `bf16`, which
    differ in the product that sums gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def within(precision: str, build: Callable[[], Step]) -> Step:
    """The step that `build` gives; it is built and run with those products."""
    with products(precision):
        made = build()

    def step() -> None:
        with products(precision):
            made()

    return step


# -- time --------------------------------------------------------------------------------------


def interleave(
    steps: Mapping[str, Step], *, device: str, rounds: int, least_ms: float = 20.0
) -> dict[str, list[float]]:
    """Times in ms of one call of each step, measured A B C A B C …

    Each step is warmed up, then called as often in a row as fills `least_ms`; every round gives
    one sample a step, the mean of those calls. On a GPU the clock is the device's own.
    """
    calls = {name: _calls(step, device, least_ms) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_time(step, calls[name], device))
    return times


def _calls(step: Step, device: str, least_ms: float) -> int:
    """Calls that fill `least_ms`; the first one is the warm-up."""
    step()
    once = _time(step, 1, device)
    return max(1, min(1000, math.ceil(least_ms / max(once, 1e-6))))


def _time(step: Step, calls: int, device: str) -> float:
    """Milliseconds of one call."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return (_device_time if device == "cuda" else _host_time)(step, calls) / calls
    finally:
        if collects:
            gc.enable()


def _host_time(step: Step, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) * 1e3


def _device_time(step: Step, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


# -- statistics --------------------------------------------------------------------------------


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) == 1:
        return dict.fromkeys(("median", "q1", "q3"), float(samples[0]))
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3}


def ratios(times: Times, name: str, base: str) -> dict[str, float]:
    """Median and quartiles of time over base, each taken within a round."""
    return spread([a / b for a, b in zip(times[name], times[base], strict=True)])


def difference(times: Times, name: str, *less: str) -> dict[str, float]:
    """Median and quartiles of a time less others of the same round."""
    parts = zip(*(times[other] for other in less), strict=True)
    return spread([a - sum(b) for a, b in zip(times[name], parts, strict=True)])


def compare(times: Times, base: str, **case: Any) -> list[dict[str, Any]]:
    """One row a step: its case, name, `ms` and `ratio` to `base`."""
    return [
        {**case, "name": name, "ms": spread(times[name]), "ratio": ratios(times, name, base)}
        for name in times
    ]


def target(
    what: str, value: float, *, most: float | None = None, least: float | None = None
) -> dict[str, Any]:
    """A figure against its limit."""
    met = (most is None or value <= most) and (least is None or value >= least)
    return {"what": what, "value": value, "most": most, "least": least, "met": met}


# -- memory ------------------------------------------------------------------------------------


def memories(
    build: Callable[..., Step], cases: Sequence[Mapping[str, Any]], device: str
) -> list[dict[str, float] | None]:
    """Memory of one step of each case, in MB: `resting` (tensors that stay: weights, optimizer
    state, data) and `step` (highest point of a step above that).

    CPU: in a process of its own, the kernel's high-water mark of resident memory, so that whatever
    allocates is counted; None where /proc has none. GPU: what torch's allocator reports.

    Args:
        build: A function of a module; called with a case it returns the step.
        cases: Keyword arguments of `build`.
    """
    if device == "cuda":
        return [_device_memory(build, case) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return [pool.submit(_host_memory, build, case).result() for case in cases]


def _host_memory(build: Callable[..., Step], case: Mapping[str, Any]) -> dict[str, float] | None:
    _settle(1)
    if not Path("/proc/self/clear_refs").exists():
        return None
    libc = ctypes.CDLL(None)
    # M_MMAP_THRESHOLD: blocks of 64 KiB and more go back to the system as soon as they are freed.
    libc.mallopt(-3, 1 << 16)
    gc.collect()
    gc.freeze()  # what is alive by now counts no more, and is not looked through again
    step = build(**case)
    for _ in range(3):
        step()
    gc.collect()
    resting = _tensor_bytes()
    peaks = []
    for _ in range(3):
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
        start = _resident("VmRSS")
        step()
        peaks.append(_resident("VmHWM") - start)
    return {"resting": megabytes(resting), "step": megabytes(statistics.median(peaks))}


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _tensor_bytes() -> int:
    """Bytes of all tensors that are alive and not frozen, shared storage counted once."""
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
    return sum(stores.values())


def _device_memory(build: Callable[..., Step], case: Mapping[str, Any]) -> dict[str, float]:
    before = torch.cuda.memory_allocated()
    step = build(**case)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    resting = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - resting
    return {"resting": megabytes(resting - before), "step": megabytes(peak)}


def megabytes(size: float) -> float:
    """Bytes in units of 10^6."""
    return round(size / 1e6, 3)


# -- report ------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """Processor, threads and GPU."""
    return {
        "cpu": _processor(),
        "cores": multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", lines.read_text()) if lines.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here."""
    names = ("torch", "opacus", "dpsynth", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{n: importlib.metadata.version(n) for n in names},
    }


def finish(
    name: str, chosen: argparse.Namespace, results: list[dict[str, Any]], **further: Any
) -> dict[str, Any]:
    """Print the results, write them where `--json` says, and return them.

    Args:
        name: Of the benchmark.
        chosen: Its options.
        results: Rows of `compare`, with whatever else was measured.
        further: More entries of the file: `sizes`, `targets`, …
    """
    found = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": chosen.quick,
        "captured": chosen.captured,
        "machine": machine(chosen.device),
        "versions": versions(),
        "results": results,
        **further,
    }
    console = Console(width=110)
    console.print(_table(f"{name}: {found['machine']['gpu'] or _processor()}", results))
    for row in further.get("targets", []):
        console.print(_verdict(row))
    if chosen.json is not None:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return found


def _table(title: str, results: Iterable[Mapping[str, Any]]) -> RichTable:
    rows = list(results)
    known = ("name", "ms", "ratio", "memory", "memory_ratio")
    case = list(dict.fromkeys(key for row in rows for key in row if key not in known))
    table = RichTable(*case, "step", "ms (quartiles)", "ratio (quartiles)", "MB", "ratio MB")
    table.title = title
    for row in rows:
        held, times = row.get("memory"), row.get("memory_ratio")
        table.add_row(
            *(str(row.get(key, "")) for key in case),
            row["name"],
            _interval(row["ms"]),
            _interval(row["ratio"]),
            f"{held['resting'] + held['step']:.1f}" if held else "",
            f"{times:.2f}" if times else "",
        )
    return table


def _interval(row: Mapping[str, float]) -> str:
    return f"{row['median']:.4g} ({row['q1']:.4g}–{row['q3']:.4g})"


def _verdict(row: Mapping[str, Any]) -> str:
    limit = f"≤ {row['most']}" if row["most"] is not None else f"≥ {row['least']}"
    return f"{'met   ' if row['met'] else 'missed'} {row['what']}: {row['value']:.3g} ({limit})"
