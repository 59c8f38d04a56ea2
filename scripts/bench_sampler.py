"""One Poisson batch's positions, and its rows, at growing tables: dpsynth's sampler and Opacus'.

`python scripts/bench_sampler.py [--device cuda] [--captured] [--quick] [--json FILE]`

With `--captured` there is also the draw of recorded steps, to which the limit then applies: a block
of batches is drawn on the device, then the host looks once whether one was too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from benchmarking import (
    Step,
    arguments,
    compare,
    finish,
    interleave,
    numbered,
    parser,
    ratios,
    target,
)
from opacus.data_loader import DPDataLoader
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from torch.utils.data import TensorDataset

from dpsynth.codec import Layout
from dpsynth.counter import CounterRng
from dpsynth.models.captured import CapturedSteps
from dpsynth.models.vae import Vae
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.plan import NoPrivacy
from dpsynth.randomness import FleetRng

OWN, RECORDED = "dpsynth", "dpsynth, captured"
SAMPLER, LOADER = "opacus sampler", "opacus loader"
COLUMNS = 10
# Recorded batches that are drawn ahead.
BLOCK = 200


def own(rows: int, runs: int, batch: int, device: str) -> Step:
    """Positions of a batch of every run, where the table is."""
    batches = PoissonBatches([rows] * runs, [batch / rows] * runs, piece=2 * batch)
    rng = FleetRng(range(runs), device=device)

    def step(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        drawn = batches.draw(rng, number)
        return [(index.to(device), inside.to(device)) for index, inside in drawn]

    return numbered(step)


def recorded_own(rows: int, runs: int, batch: int, device: str) -> Step:
    """The same as recorded steps draw them."""
    model, rng = (
        Vae(Layout((2,), None), runs, hidden=(2,)).to(device),
        CounterRng(range(runs), device=device),
    )
    batches = PoissonBatches([rows] * runs, [batch / rows] * runs, piece=2 * batch)
    plans = [NoPrivacy(rows, batch=batch, steps=10**9).calibrate()] * runs
    # Rows that are not looked at take no memory.
    codes = torch.zeros(1, dtype=torch.int16, device=device).expand(runs, rows, 1)
    model.bind(codes, batches, plans, rng, captured=True)
    model.optimizers = lambda **_: model.configure_optimizers()  # type: ignore[method-assign]
    model.on_fit_start()
    ahead = CapturedSteps(model, rng, BLOCK, compiled=device == "cuda")
    draw = ahead._program("draw", ahead._draw)

    def step(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        slot = number % BLOCK
        if slot == 0:
            ahead._more.tolist()
            ahead._base.fill_(number)
            ahead._ahead.fill_(number)
        draw()
        return [(ahead._index[slot], ahead._inside[slot])]

    return numbered(step)


def opacus_sampler(rows: int, runs: int, batch: int, device: str) -> Step:
    """Positions of a batch of every run, one run after another."""
    draws = [_endless_positions(rows, batch) for _ in range(runs)]

    def step() -> list[torch.Tensor]:
        return [torch.tensor(next(draw)).to(device) for draw in draws]

    return step


def opacus_loader(rows: int, runs: int, batch: int, device: str) -> Step:
    """Rows (not positions) of a batch of every run, one run after another."""
    table = torch.zeros(rows, COLUMNS, dtype=torch.int16)
    draws = [_endless_batches(table, batch) for _ in range(runs)]

    def step() -> list[torch.Tensor]:
        return [next(draw).to(device) for draw in draws]

    return step


def _endless_positions(rows: int, batch: int) -> Iterator[list[int]]:
    while True:
        yield from UniformWithReplacementSampler(num_samples=rows, sample_rate=batch / rows)


def _endless_batches(table: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    while True:
        for (rows,) in DPDataLoader(TensorDataset(table), sample_rate=batch / len(table)):
            yield rows


VARIANTS = {
    OWN: own,
    RECORDED: recorded_own,
    SAMPLER: opacus_sampler,
    LOADER: opacus_loader,
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    quick, device = chosen.quick, chosen.device
    rounds = chosen.rounds or (2 if quick else 7)
    tables = (100, 1000) if quick else (10_000, 100_000, 1_000_000, 10_000_000)
    batch, fleets = (10, (1, 2)) if quick else (1024, (1, 32))
    names = [name for name in VARIANTS if chosen.captured or name != RECORDED]
    judged = RECORDED if chosen.captured else OWN
    results, targets, flatness = [], [], []
    for runs in fleets:
        steps = {
            f"{name} {rows}": VARIANTS[name](rows, runs, batch, device)
            for rows in tables
            for name in names
        }
        least = 1.0 if quick else 20.0
        times = interleave(steps, device=device, rounds=rounds, least_ms=least)
        for rows in tables:
            part = {name: times[f"{name} {rows}"] for name in names}
            results += compare(part, OWN, rows=rows, runs=runs)
        for name in names:
            flat = ratios(times, f"{name} {tables[-1]}", f"{name} {tables[0]}")
            flatness.append({"name": name, "runs": runs, "ratio": flat})
        what = f"{judged}, {runs} runs: N={tables[-1]:g} / N={tables[0]:g}"
        targets.append(target(what, _flat(flatness, judged, runs), most=1.10))
    sizes = {"rows": list(tables), "batch": batch, "runs": list(fleets), "rounds": rounds}
    return finish("sampler", chosen, results, sizes=sizes, flatness=flatness, targets=targets)


def _flat(flatness: Sequence[dict[str, Any]], name: str, runs: int) -> float:
    mine = (row for row in flatness if row["name"] == name and row["runs"] == runs)
    return next(mine)["ratio"]["median"]


if __name__ == "__main__":
    main()
