"""One step of a fleet of private runs against as many steps one after another.

`python scripts/bench_fleet.py [--device cuda] [--captured] [--quick] [--json FILE]`

Own steps move by `FleetAdam` and are recorded with `--captured`, those one after another too; then
eight programs take turns, since each takes seconds to record; their weights stay in the cache, and
that favours them over a fleet. Opacus' steps use `torch.optim.Adam` and cannot be recorded.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import (
    Step,
    arguments,
    compare,
    finish,
    fleet_adam,
    interleave,
    keyed,
    numbered,
    parser,
    recorded,
    target,
    within,
)
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng

FLEET, ALONE, HOOKS, GHOST = "fleet", "own, one by one", "opacus hooks", "opacus ghost"
PLAIN, ONE, SHADOWS = "fleet, non-private", "one model", "shadow models"
# Recorded programs that take turns where runs go one by one.
PROGRAMS = 8
_LARGE = (128, 512, 512, 128)


@dataclass(frozen=True)
class Sizes:
    """Of the runs, all alike."""

    runs: int
    batch: int
    widths: tuple[int, ...]
    precision: str = "32"


class PlainMlp(nn.Module):
    """Run `run` of an `Mlp`, of plain `nn.Linear` layers as an Opacus user would write it."""

    def __init__(self, fleet: Mlp, run: int) -> None:
        super().__init__()
        layers = [layer for layer in fleet.layers if isinstance(layer, FleetLinear)]
        shapes = [layer.weight.shape for layer in layers]
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for _, inputs, outputs in shapes)
        with torch.no_grad():
            for mine, theirs in zip(self.layers, layers, strict=True):
                mine.get_parameter("weight").copy_(theirs.weight[run].T)
                mine.get_parameter("bias").copy_(theirs.bias[run])

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            out = F.silu(layer(x))
            x = out + x if out.shape == x.shape else out
        return self.layers[-1](x)


class RecordLoss(nn.Module):
    """Mean squared error of a record, the loss of all variants; Opacus switches `reduction`."""

    reduction = "mean"

    def forward(self, made: Tensor, wanted: Tensor) -> Tensor:
        loss = (made - wanted).square().mean(-1)
        return loss if self.reduction == "none" else loss.mean()


@dataclass(eq=False)
class Problem:
    """Rows and wanted outputs of every run (runs, batch, width), and the starting weights."""

    sizes: Sizes
    device: str
    captured: bool = False

    def __post_init__(self) -> None:
        rng = FleetRng(range(self.sizes.runs), device=self.device)
        first, last = self.sizes.widths[0], self.sizes.widths[-1]
        self.rows = rng.at("rows").normal(self.sizes.batch, first)
        self.wanted = rng.at("wanted").normal(self.sizes.batch, last)

    def network(self, runs: Sequence[int]) -> Mlp:
        """Networks of these runs as one fleet."""
        network = Mlp(len(runs), self.sizes.widths).to(self.device)
        network.reset(FleetRng(runs, device=self.device), "mlp", zero=False)
        return network

    def fleet(self, runs: Sequence[int], *, private: bool = True) -> Step:
        """One step of these runs."""
        return within(self.sizes.precision, lambda: self._fleet(list(runs), private=private))

    def _fleet(self, runs: list[int], *, private: bool) -> Step:
        size, network, ones = float(self.sizes.batch), self.network(runs), [1.0] * len(runs)
        rows, wanted = self.rows[runs], self.wanted[runs]
        counts = torch.ones(rows.shape[:2], device=self.device)
        optimizer, data = fleet_adam(network), [rows, wanted, counts]
        rng = keyed(runs, device=self.device, captured=self.captured)

        def losses() -> Tensor:
            return (network(rows) - wanted).square().mean(-1)

        def plain(step: Any) -> None:
            (losses().sum() / size).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if not private:
            return recorded(plain, [optimizer], data) if self.captured else numbered(plain)
        engine = PrivateEngine(
            network,
            optimizer,
            sigma=ones,
            bound=ones,
            batch=[size] * len(runs),
            precision=self.sizes.precision,
        )

        def step(number: Any) -> None:
            engine.accumulate(losses, counts)
            engine.step(rng, number)

        if self.captured:
            return recorded(step, [optimizer], data, engine=engine)
        return numbered(step)

    def alone(self) -> Step:
        """One step of every run, one after another."""
        every = range(self.sizes.runs)
        made = [self.fleet([run]) for run in (every[:PROGRAMS] if self.captured else every)]
        return one_by_one([made[run % len(made)] for run in every])

    def hooks(self, run: int) -> Step:
        """One step of Opacus' default engine."""
        network = GradSampleModule(PlainMlp(self.network([run]), 0).to(self.device))
        optimizer = DPOptimizer(torch.optim.Adam(network.parameters()), **self._terms())
        rows, wanted, criterion = self.rows[run], self.wanted[run], RecordLoss()

        def step() -> None:
            optimizer.zero_grad()
            criterion(network(rows), wanted).backward()
            optimizer.step()

        return step

    def ghost(self, run: int) -> Step:
        """One step of Opacus' ghost clipping."""
        network = GradSampleModuleFastGradientClipping(
            PlainMlp(self.network([run]), 0).to(self.device), max_grad_norm=1.0
        )
        optimizer = DPOptimizerFastGradientClipping(
            torch.optim.Adam(network.parameters()), **self._terms()
        )
        criterion = DPLossFastGradientClipping(network, optimizer, RecordLoss())
        rows, wanted = self.rows[run], self.wanted[run]

        def step() -> None:
            optimizer.zero_grad()
            criterion(network(rows), wanted).backward()
            optimizer.step()

        return step

    def _terms(self) -> dict[str, Any]:
        size = self.sizes.batch
        return {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": size}


def one_by_one(steps: Sequence[Step]) -> Step:
    """All of these, one after another."""

    def step() -> None:
        for each in steps:
            each()

    return step


def variants(problem: Problem) -> dict[str, Step]:
    """The same runs in every way."""
    runs = range(problem.sizes.runs)
    return {
        FLEET: problem.fleet(runs),
        PLAIN: problem.fleet(runs, private=False),
        ALONE: problem.alone(),
        GHOST: one_by_one([problem.ghost(run) for run in runs]),
        HOOKS: one_by_one([problem.hooks(run) for run in runs]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    chosen.rounds = chosen.rounds or (2 if chosen.quick else 15)
    quick, cuda = chosen.quick, chosen.device == "cuda"
    small = Sizes(2, 4, (4, 8, 8, 4)) if quick else Sizes(32, 256, (64, 128, 128, 64))
    shadows = Sizes(3, 4, small.widths) if quick else Sizes(64, 256, small.widths)
    large = Sizes(2, 4, (8, 16, 16, 8), "tf32") if quick else Sizes(32, 1024, _LARGE, "tf32")
    results = _timed(small, variants(Problem(small, chosen.device, chosen.captured)), FLEET, chosen)
    ratio = {row["name"]: row["ratio"]["median"] for row in results}
    speed = small.runs * small.batch / results[0]["ms"]["median"] * 1e3
    targets = [
        target("opacus hooks / fleet", ratio[HOOKS], least=100 if cuda else 8),
        target("opacus ghost / fleet", ratio[GHOST], least=60 if cuda else 2.5),
    ]
    # A CPU is bound by its arithmetic, so there runs together take as long as runs in turn.
    if cuda or quick:
        both, apart = _shadow_rows(shadows, chosen), _large_rows(large, chosen)
        results += both + apart
        if cuda and not quick:
            targets += [
                target("own, one by one / fleet", ratio[ALONE], least=10),
                target("own, one by one / fleet, .39 M weights, tf32", _last(apart), least=3),
                target("examples a second, small, 32 runs", speed, least=4e7),
                target("64 shadow models / one model", _last(both), most=6),
            ]
    sizes = {**vars(small), "shadows": shadows.runs, "large": vars(large), "rounds": chosen.rounds}
    return finish("fleet", chosen, results, sizes=sizes, examples_a_second=speed, targets=targets)


def _timed(
    sizes: Sizes, steps: dict[str, Step], base: str, chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of these steps, taking turns."""
    least = 1.0 if chosen.quick else 20.0
    times = interleave(steps, device=chosen.device, rounds=chosen.rounds, least_ms=least)
    widths = "-".join(map(str, sizes.widths))
    case = {"runs": sizes.runs, "batch": sizes.batch, "net": widths, "precision": sizes.precision}
    return compare(times, base, **case)


def _shadow_rows(sizes: Sizes, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """An attacker's fleet against one model."""
    problem = Problem(sizes, chosen.device, chosen.captured)
    steps = {ONE: problem.fleet([0]), SHADOWS: problem.fleet(range(sizes.runs))}
    return _timed(sizes, steps, ONE, chosen)


def _large_rows(sizes: Sizes, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A fleet whose products fill a GPU, against its runs one after another."""
    problem = Problem(sizes, chosen.device, chosen.captured)
    return _timed(
        sizes, {FLEET: problem.fleet(range(sizes.runs)), ALONE: problem.alone()}, FLEET, chosen
    )


def _last(rows: list[dict[str, Any]]) -> float:
    return rows[-1]["ratio"]["median"]


if __name__ == "__main__":
    main()
