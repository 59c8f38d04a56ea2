"""A whole private step, batch draw included, at growing tables, at growing numbers of columns, and
with rows in a file.

`python scripts/bench_scaling.py [--device cuda] [--captured] [--quick] [--json FILE]`

The steps are those of a training: a VAE is bound to made-up rows and takes its own steps, one by
one, or with `--captured` as recorded ones of which a block is drawn ahead. Without privacy means
ε = ∞, as in a training. Files are read through the system's cache, which holds them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking import Step, arguments, compare, finish, interleave, keyed, parser, target
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.models.vae import Vae
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.plan import NoPrivacy, PrivacyPlan
from dpsynth.rows import MappedRows, read_rows, write_rows

PRIVATE, PLAIN = "private", "non-private"
# Recorded steps that are drawn ahead of the first of them, as in a training.
BLOCK = 200


@dataclass(frozen=True)
class Case:
    """A table and a network.

    Attributes:
        rows: N.
        columns: D, each with `width`/D levels.
        width: One-hot width W.
        hidden: Width of the hidden layers.
        mapped: Whether rows are in a memory-mapped file.
    """

    rows: int
    columns: int
    width: int
    hidden: int
    mapped: bool = False

    @property
    def levels(self) -> int:
        """Of each column."""
        return self.width // self.columns


def codes_of(case: Case, device: str, folder: Path) -> Tensor | MappedRows:
    """Rows (1, N, D) on the device, or in a file of the folder."""
    draws = torch.Generator(device).manual_seed(0)
    shape = (case.rows, case.columns)
    table = torch.randint(case.levels, shape, dtype=torch.int16, device=device, generator=draws)
    if not case.mapped:
        return table[None]
    file = folder / "rows.arrow"
    write_rows(file, table.cpu().split(1 << 20), case.columns)
    return MappedRows([read_rows(file)], device)


def build(
    case: Case,
    codes: Tensor | MappedRows,
    batch: int,
    device: str,
    *,
    private: bool = True,
    block: int = 1,
    captured: bool = False,
) -> Step:
    """Draw a batch, look its rows up, and take a step of a VAE; `block` of them in a row."""
    layout = Layout((case.levels,) * case.columns, None)
    model = Vae(layout, 1, hidden=(case.hidden,) * 2, block=block)
    rng = keyed([0], device=device, captured=captured)
    model.to(device).reset(rng)
    usual = {"delta": 1e-9, "batch": batch, "steps": 10**9, "clip": model.clip}
    plan = PrivacyPlan(1.0, rows=case.rows, sigma=1.0, **usual) if private else None
    plan = plan or NoPrivacy(case.rows, **usual).calibrate()
    # One piece a batch at any N, so that both ends of a ratio do the same work.
    batches = PoissonBatches([case.rows], [plan.q], piece=2 * batch)
    model.bind(codes, batches, [plan], rng, captured=captured)
    # A Trainer would keep them.
    model.optimizers = lambda **_: model.configure_optimizers()  # type: ignore[method-assign]
    model.on_fit_start()
    steps = torch.tensor(block)
    return lambda: model.training_step(steps, 0)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    quick = chosen.quick
    rounds = chosen.rounds or (2 if quick else 15)
    batch = 8 if quick else 1024
    if quick:
        tables = [Case(rows, 3, 9, 8) for rows in (100, 1000)]
        columns = [Case(100, count, 12, 8) for count in (2, 6)]
        files = [Case(1000, 3, 9, 8, mapped) for mapped in (False, True)]
    else:
        tables = [Case(rows, 10, 120, 128) for rows in (10_000, 10_000_000)]
        columns = [Case(10_000, count, 1000, 512) for count in (10, 500)]
        files = [Case(10_000_000, 10, 120, 128, mapped) for mapped in (False, True)]
    results, targets = [], []
    # Rows in a file are a choice between two, so their ratio has no limit.
    for pair, what, most in (
        (tables, "rows", 1.10),
        (columns, "columns", 1.6),
        (files, "mapped", 0),
    ):
        rows = _measure(pair, what, batch, rounds, chosen)
        if most:
            ends = [f"{getattr(case, what):g}" for case in reversed(pair)]
            ratio = next(row for row in rows if row["name"] == PRIVATE and row["large"])["ratio"]
            targets.append(target(f"{what}: " + " / ".join(ends), ratio["median"], most=most))
        results += rows
    sizes = {"batch": batch, "rounds": rounds}
    sizes["cases"] = [asdict(case) for case in (*tables, *columns, *files)]
    return finish("scaling", chosen, results, sizes=sizes, targets=targets)


def _measure(
    pair: Sequence[Case], what: str, batch: int, rounds: int, chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """Both ends of a ratio, private and not; `ratio` is to the small end of the same kind."""
    device, captured = chosen.device, chosen.captured
    block = 1 if not captured else 2 if chosen.quick else BLOCK
    kinds = (PRIVATE, PLAIN)
    if device == "cuda" and what == "columns":  # each takes long to compile
        kinds = (PRIVATE,)
    with tempfile.TemporaryDirectory(prefix="dpsynth-") as folder:
        steps: dict[str, Step] = {}
        for case in pair:
            codes = codes_of(case, device, Path(folder))
            for kind in kinds:
                steps[f"{kind} {getattr(case, what)}"] = build(
                    case,
                    codes,
                    batch,
                    device,
                    private=kind == PRIVATE,
                    block=block,
                    captured=captured,
                )
        least = 1.0 if chosen.quick else 20.0
        times = interleave(steps, device=device, rounds=rounds, least_ms=least)
    found = []
    for kind in kinds:
        ends = {
            str(getattr(case, what)): [t / block for t in times[f"{kind} {getattr(case, what)}"]]
            for case in pair
        }
        small, large = ends
        for row in compare(ends, small):
            size, row["name"] = row["name"], kind
            found.append({"growing": what, "size": size, "large": size == large, **row})
    return found


if __name__ == "__main__":
    main()
