"""A whole private step, batch draw included, at growing tables and at growing numbers of columns.

`python scripts/bench_scaling.py [--device cuda] [--quick] [--json FILE]`
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from benchmarking import Step, arguments, compare, finish, interleave, parser, target

from dpsynth.codec import Layout
from dpsynth.models.vae import Vae
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng


@dataclass(frozen=True)
class Case:
    """A table and a network.

    Attributes:
        rows: N.
        columns: D, each with `width`/D levels.
        width: One-hot width W.
        hidden: Width of the hidden layers.
    """

    rows: int
    columns: int
    width: int
    hidden: int


def build(case: Case, batch: int, device: str, *, private: bool = True) -> Step:
    """Draw a batch, look its rows up on the device, and take a step of a VAE."""
    levels = case.width // case.columns
    layout = Layout((levels,) * case.columns, None)
    model = Vae(layout, 1, hidden=(case.hidden, case.hidden)).to(device)
    rng = FleetRng([0], device=device)
    model.reset(rng)
    draws = torch.Generator(device).manual_seed(0)
    shape = (1, case.rows, case.columns)
    table = torch.randint(levels, shape, dtype=torch.int16, device=device, generator=draws)
    optimizer = model.configure_optimizers()[0]
    engine = PrivateEngine(
        model.network, optimizer, sigma=[1.0], bound=[model.clip], batch=[float(batch)]
    )
    # One piece a batch at any N, so that both ends of a ratio do the same work.
    batches = PoissonBatches([case.rows], [batch / case.rows], piece=2 * batch)
    run, steps = torch.zeros(1, 1, dtype=torch.long, device=device), itertools.count()

    def step() -> None:
        number = next(steps)
        for index, inside in batches.draw(rng, number):
            codes = table[run, index.to(device)].long()
            counts = inside.to(device, model.prior_logits.dtype)
            noise = rng.at("draws", number)
            if private:
                engine.accumulate(lambda c=codes, n=noise: model.record_loss(c, n), counts)
            else:
                ((model.record_loss(codes, noise) * counts).sum() / batch).backward()
        if private:
            engine.step(rng, number)
        else:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    quick, device = chosen.quick, chosen.device
    rounds = chosen.rounds or (2 if quick else 15)
    batch = 8 if quick else 1024
    if quick:
        tables = [Case(rows, 3, 9, 8) for rows in (100, 1000)]
        columns = [Case(100, count, 12, 8) for count in (2, 6)]
    else:
        tables = [Case(rows, 10, 120, 128) for rows in (10_000, 10_000_000)]
        columns = [Case(10_000, count, 1000, 512) for count in (10, 500)]
    results, targets = [], []
    for pair, what, most in ((tables, "rows", 1.10), (columns, "columns", 1.6)):
        rows = _measure(pair, what, batch, device, rounds, 1.0 if quick else 20.0)
        ends = [f"{getattr(case, what):g}" for case in reversed(pair)]
        ratio = next(row for row in rows if row["name"] == "private" and row["large"])["ratio"]
        targets.append(target(f"{what}: " + " / ".join(ends), ratio["median"], most=most))
        results += rows
    sizes = {"batch": batch, "rounds": rounds, "cases": [asdict(c) for c in tables + columns]}
    return finish("scaling", chosen, results, sizes=sizes, targets=targets)


def _measure(
    pair: Sequence[Case], what: str, batch: int, device: str, rounds: int, least_ms: float
) -> list[dict[str, Any]]:
    """Both ends of a ratio, private and not; `ratio` is to the small end of the same kind."""
    steps = {
        (name, case): build(case, batch, device, private=name == "private")
        for name in ("private", "non-private")
        for case in pair
    }
    names = {f"{name} {getattr(case, what)}": key for key in steps for name, case in [key]}
    times = interleave(
        {label: steps[key] for label, key in names.items()},
        device=device,
        rounds=rounds,
        least_ms=least_ms,
    )
    found = []
    for kind in ("private", "non-private"):
        ends = {str(getattr(case, what)): times[f"{kind} {getattr(case, what)}"] for case in pair}
        small, large = ends
        for row in compare(ends, small):
            size, row["name"] = row["name"], kind
            found.append({"growing": what, "size": size, "large": size == large, **row})
    return found


if __name__ == "__main__":
    main()
