"""Packing: which runs of a grid train as one fleet, by what they share, by memory, and by steps."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dpsynth.checks import UsageError, check_positive
from dpsynth.codec import Layout
from dpsynth.data import Table
from dpsynth.devices import free_memory, resolve
from dpsynth.models import Generator
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.schema import Column, Schema
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import (
    Recipe,
    Seat,
    build,
    captured,
    codec_settings,
    plan_of,
)

__all__ = [
    "GIB",
    "Need",
    "Needs",
    "Packing",
    "capacity",
    "cost",
    "measured",
    "pack",
    "probe",
    "upper_bound",
]

GIB = 1 << 30
# Part of the free memory that fleets may fill where no number is given.
SHARE = 0.8
# What a step costs whatever trains in it, in steps of one run more. A CPU computes each run in turn
# (measured on Adult: about none). A GPU waits for kernels to start: what follows from a fleet of 32
# runs that is ten times as fast as one after another, the target of `scripts/bench_fleet.py`.
OVERHEAD = {"cpu": 1.0, "cuda": 13.0}
# What starting a fleet costs, in steps without a run.
START = 20
# Runs of the second fleet that is measured.
FEW = 4


@dataclass(frozen=True)
class Need:
    """Bytes that a fleet takes: `fixed` whatever its size, and `each` run."""

    fixed: float
    each: float

    def of(self, runs: int) -> float:
        """Bytes of a fleet of so many runs."""
        return self.fixed + self.each * runs

    def most(self, limit: float) -> int:
        """Runs of the largest fleet that fits."""
        return max(0, math.floor((limit - self.fixed) / max(self.each, 1.0)))


# What the fleets of a group need, given its recipes, seats, and the bytes that are to be filled.
Needs = Callable[[Sequence[Recipe], Sequence[Seat], float], Need]


@dataclass(frozen=True)
class Packing:
    """A grid as fleets.

    Attributes:
        fleets: Positions of the runs of each; every position is in one of them.
        notes: Why there are so many, one line a program.
    """

    fleets: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]


def pack(
    recipes: Sequence[Recipe],
    seats: Sequence[Seat],
    memory: float | None = None,
    *,
    needs: Needs | None = None,
) -> Packing:
    """The cheapest fleets that fit into memory.

    Runs may join where program and schema are the same. A fleet trains until the last of its runs
    has taken its steps T, and a run that is done still costs compute, so that a fleet of R runs
    costs `cost`: T·R steps of a run, and T + START times the device's overhead. Runs are ordered
    by T and cut where the total is least: runs of equal T form as few fleets as fit, and short
    runs leave the long ones where that saves more than the further fleet costs.

    Args:
        recipes: One a run.
        seats: One a run.
        memory: GiB to fill; `None` for `SHARE` of what is free.
        needs: Bytes of fleets; measured if not given.

    Raises:
        UsageError: Where one run alone does not fit, or what is free cannot be found out.
    """
    groups: dict[object, list[int]] = {}
    for place, (recipe, seat) in enumerate(zip(recipes, seats, strict=True)):
        schema = seat.table.schema
        key = (recipe.program(), schema.columns, schema.target)
        groups.setdefault(key, []).append(place)
    fleets: list[tuple[int, ...]] = []
    notes: list[str] = []
    for group in groups.values():
        own, taken = [recipes[i] for i in group], [seats[i] for i in group]
        device = resolve(own[0].device).type
        limit = capacity(device, memory)
        need = (needs or measured)(own, taken, limit)
        most = need.most(limit)
        if most < 1:
            raise UsageError(
                f"training.memory={limit / GIB:.3g}: one run of {own[0].model} needs "
                f"{need.of(1) / GIB:.3g} GiB; raise it, or lower training.piece"
            )
        steps = [_steps(r, s) for r, s in zip(own, taken, strict=True)]
        cut = [tuple(group[i] for i in part) for part in _cut(steps, most, OVERHEAD[device])]
        fleets += cut
        shown = _note(own[0].model, len(group), len(cut), most, _room(taken, most, need, limit))
        notes.append(shown)
    return Packing(tuple(fleets), tuple(notes))


def cost(steps: Sequence[int], overhead: float) -> float:
    """What training runs of these steps as one fleet costs, in steps of one run."""
    return overhead * (max(steps) + START) + max(steps) * len(steps)


def _cut(steps: Sequence[int], most: int, overhead: float) -> list[list[int]]:
    """Positions in fleets of at most `most`, at the least total cost; fleets are in the order of
    their first runs.

    Only neighbours in the order of T share a fleet in a cheapest cut: two runs that change places
    towards that order lower no fleet's T but raise none either.
    """
    order = sorted(range(len(steps)), key=lambda i: (-steps[i], i))
    least, begin = [0.0], [0]
    for end in range(1, len(order) + 1):
        starts = range(max(0, end - most), end)
        totals = [
            least[start] + cost([steps[order[start]]] * (end - start), overhead) for start in starts
        ]
        least.append(min(totals))
        # Of equal ones the latest, so that full fleets come first.
        begin.append(max(s for s, total in zip(starts, totals, strict=True) if total == least[-1]))
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(sorted(order[begin[end] : end]))
        end = begin[end]
    return sorted(parts)


def _steps(recipe: Recipe, seat: Seat) -> int:
    """T of a run; 0 of a family that is not trained."""
    return _plan(recipe, seat).steps


def _plan(recipe: Recipe, seat: Seat) -> PrivacyPlan:
    return plan_of(recipe, seat, seat.table.schema.expected_rows or 1)


def _room(seats: Sequence[Seat], most: int, need: Need, limit: float) -> str:
    """How much fits, in words: without figures where the number of rows is private, since what a
    run needs follows from it."""
    private = [s for s in seats if math.isfinite(s.epsilon)]
    if any(s.table.schema.expected_rows is None for s in private):
        return "as memory holds"
    return f"{limit / GIB:.3g} GiB hold {most} of {need.each / GIB:.2g} GiB"


def _note(model: str, runs: int, fleets: int, most: int, room: str) -> str:
    text = f"{model}: {runs} run{'s' * (runs > 1)} in {fleets} fleet{'s' * (fleets > 1)}"
    if fleets == 1:
        return f"{text} ({room})"
    by_memory = math.ceil(runs / most)
    why = room if by_memory == fleets else "steps differ: the short end before the long"
    return f"{text} ({why if by_memory in (1, fleets) else f'{room}; {why}'})"


# -- what there is -----------------------------------------------------------------------------


def capacity(device: str, memory: float | None = None) -> float:
    """Bytes that fleets may fill: `memory` GiB, or `SHARE` of what is free on the device.

    Raises:
        UsageError: On a `memory` that is no number above 0, or where the system does not say what
            is free.
    """
    if memory is not None:
        check_positive("training.memory", memory)
        return memory * GIB
    return SHARE * free_memory(device)


def measured(recipes: Sequence[Recipe], seats: Sequence[Seat], limit: float) -> Need:
    """Bytes of fleets of these runs: an upper bound where a fleet of all is far within the limit,
    else what a probe finds, once a process.

    The probe trains two steps of a fleet of one and of `FEW` runs on made-up rows, with the
    largest batch of the group, and takes the line through both peaks.
    """
    recipe, schema = _widest(recipes, seats)
    bound = upper_bound(recipe, schema)
    if bound.of(len(seats)) <= limit / 2:
        return bound
    budgets = _budgets(seats)
    key = (recipe.digest(), schema.to_json(), budgets)
    if key not in _known:
        _known[key] = probe(recipe, schema, budgets)
    return _known[key]


_known: dict[tuple[str, str, tuple[float, ...]], Need] = {}


def _widest(recipes: Sequence[Recipe], seats: Sequence[Seat]) -> tuple[Recipe, Schema]:
    """What needs as much as any run of a group: two steps of its largest batch, as large as a
    Poisson draw gets, on as many rows as there may be; all of them made up, so all facts public."""
    # Where no number of rows is public, the true one, coarsely: only what is computed together
    # depends on it, nothing that is computed.
    rows = max(s.table.schema.expected_rows or _coarse(len(s.table)) for s in seats)
    batches = [_plan(r, s).batch for r, s in zip(recipes, seats, strict=True)]
    most, widest = max(batches), recipes[batches.index(max(batches))]
    batch = min(rows, math.ceil(most + 6 * math.sqrt(most)))
    steps = min(2, max(_steps(r, s) for r, s in zip(recipes, seats, strict=True)))
    privacy = {"batch": batch, "steps": steps, "delta": min(1e-5, 0.5 / rows)}
    if widest.privacy.get("secure"):
        privacy["secure"] = True
    given = seats[0].table.schema
    columns = tuple(replace(c, provenance="declared") for c in given.columns)
    return replace(widest, privacy=privacy), Schema(columns, given.target, rows)


def _batch(recipe: Recipe) -> int:
    """Of a recipe that names it, as that of `_widest` does."""
    return recipe.privacy.get("batch") or PrivacyPlan.batch


def _budgets(seats: Sequence[Seat]) -> tuple[float, ...]:
    """An ε of either kind that is there: with noise and without it."""
    private = {math.isfinite(seat.epsilon) for seat in seats}
    return tuple(1.0 if one else math.inf for one in sorted(private, reverse=True))


def _coarse(rows: int) -> int:
    return 1 << max(1, rows - 1).bit_length()


def upper_bound(recipe: Recipe, schema: Schema) -> Need:
    """Bytes that no fleet exceeds, by counting.

    128 bytes a parameter (weights, two moments, average, gradient, clipped sum and noise in
    float64, some of them twice), as much again where a captured step is tried out on copies; 64 a
    level of each row, and 8 numbers for each input and output of a layer, of each record in a
    piece, of each draw of a record; 256 batches drawn ahead; four gradients a record for the
    engines that hold them. Half a GiB for libraries.
    """
    layout = Layout.of(schema, **codec_settings(recipe))
    model = build(recipe, layout, 1)
    shapes = [p.shape[1:] for p in model.parameters()]
    parameters = sum(math.prod(shape) for shape in shapes)
    widths = sum(sum(shape) for shape in shapes) + 4 * layout.width
    rows = schema.expected_rows or 1
    piece = min(recipe.piece, rows, _batch(recipe))
    records = piece * _draws(model) + getattr(model, "public_batch", 0)
    each = (
        128 * parameters * (1 + captured(recipe))
        + 64 * rows * layout.columns
        + 4 * 8 * records * widths
    )
    each += 4 * 8 * layout.groups * layout.width + 16 * 256 * piece
    if recipe.engine != "taps":
        each += 4 * 4 * piece * parameters
    return Need(GIB / 2, float(each))


def _draws(model: Generator) -> int:
    """Noise draws, masks or fakes a record."""
    return max(1, *(int(getattr(model, name, 1)) for name in ("draws", "fakes")))


def probe(recipe: Recipe, schema: Schema, budgets: Sequence[float]) -> Need:
    """The line through the peaks of a fleet of one and of `FEW` runs.

    Args:
        recipe: What they share; it is trained as it is, so its steps should be few.
        schema: Of the made-up rows, with their number.
        budgets: ε of the runs, in turn.

    Raises:
        UsageError: Where they do not fit.
    """
    if resolve(recipe.device).type == "cuda":
        one, few = _on_device(recipe, schema, budgets)
    else:
        context = multiprocessing.get_context("spawn")
        threads = torch.get_num_threads()
        try:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                one, few = pool.submit(_on_host, recipe, schema, budgets, threads).result()
        except BrokenProcessPool as error:
            raise UsageError(
                f"training.memory: {FEW} runs of {recipe.model} did not fit when they were "
                "measured; lower training.piece, or give training.memory in GiB"
            ) from error
    each = max(1.0, (few - one) / (FEW - 1))
    return Need(max(0.0, one - each), each)


def _on_device(recipe: Recipe, schema: Schema, budgets: Sequence[float]) -> tuple[float, float]:
    """Peak bytes of torch's allocator above what is held, for a fleet of one and of a few."""
    peaks: list[float] = []
    for runs in (1, FEW):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fits = _fits(recipe, schema, budgets, runs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch.cuda.empty_cache()
        if not fits and runs == 1:
            raise UsageError(
                f"training.memory: one run of {recipe.model} does not fit on the GPU; lower "
                "training.piece"
            )
        if not fits:  # then a further run counts as much as the first
            return peaks[0], FEW * peaks[0]
    return peaks[0], peaks[1]


def _fits(recipe: Recipe, schema: Schema, budgets: Sequence[float], runs: int) -> bool:
    try:
        _train(recipe, schema, budgets, runs)
    except torch.OutOfMemoryError:
        return False
    return True


def _on_host(
    recipe: Recipe, schema: Schema, budgets: Sequence[float], threads: int
) -> tuple[float, float]:
    """Peak resident bytes above those of an idle process, for a fleet of one and of a few; in a
    process of its own, since the high-water mark is one a process."""
    torch.set_num_threads(threads)
    _train(recipe, schema, budgets, 1)  # what is loaded and allocated once is there by now
    _give_back()
    idle, peaks = _resident("VmRSS"), []
    for runs in (1, FEW):
        _give_back()
        _forget_peak()
        _train(recipe, schema, budgets, runs)
        peaks.append(max(0.0, _resident("VmHWM") - idle))
    return peaks[0], peaks[1]


def _give_back() -> None:
    """Return what is free to the system, where the C library can, so that it is not idle use."""
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Let the high-water mark start again; without leave for it, later peaks are upper bounds."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> float:
    """Bytes of a field of /proc/self/status; elsewhere the peak that the system knows."""
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak) * (1 if sys.platform == "darwin" else 1024)
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def _train(recipe: Recipe, schema: Schema, budgets: Sequence[float], runs: int) -> None:
    table = _made_up(schema)
    seats = [
        Seat(table, budgets[run % len(budgets)], None if recipe.privacy.get("secure") else run)
        for run in range(runs)
    ]
    train_fleet(recipe, seats)


def _made_up(schema: Schema) -> Table:
    """As many rows as are expected, uniform over what the schema allows."""
    rng, rows = np.random.default_rng(0), schema.expected_rows or 1
    frame = pd.DataFrame({c.name: _values(c, rows, rng) for c in schema.columns})
    return Table.from_frame(frame, schema, strict=False)


def _values(column: Column, rows: int, rng: np.random.Generator) -> object:
    if not column.numeric:
        return np.array(column.levels, dtype=object)[rng.integers(len(column.levels), size=rows)]
    assert column.lower is not None and column.upper is not None
    values = rng.uniform(column.lower, column.upper, rows)
    return np.floor(values) if column.kind == "integer" else values
