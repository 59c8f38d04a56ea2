"""One step of a fleet of private runs against as many steps one after another.

`python scripts/bench_fleet.py [--device cuda] [--quick] [--json FILE]`
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import Step, arguments, compare, finish, interleave, parser, target
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn

from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng

FLEET, ALONE, HOOKS, GHOST = "fleet", "own, one by one", "opacus hooks", "opacus ghost"
PLAIN = "fleet, non-private"


@dataclass(frozen=True)
class Sizes:
    """Of the runs, all alike."""

    runs: int
    batch: int
    widths: tuple[int, ...]


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
        size, network = float(self.sizes.batch), self.network(runs)
        rows, wanted = self.rows[list(runs)], self.wanted[list(runs)]
        optimizer = torch.optim.Adam(network.parameters())
        rng, steps = FleetRng(runs, device=self.device), itertools.count()
        counts = torch.ones(rows.shape[:2], device=self.device)

        def losses() -> Tensor:
            return (network(rows) - wanted).square().mean(-1)

        def plain() -> None:
            (losses().sum() / size).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if not private:
            return plain
        ones = [1.0] * len(runs)
        engine = PrivateEngine(network, optimizer, sigma=ones, bound=ones, batch=[size] * len(runs))

        def step() -> None:
            engine.accumulate(losses, counts)
            engine.step(rng, next(steps))

        return step

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


def variants(sizes: Sizes, device: str) -> dict[str, Step]:
    """The same runs in every way."""
    problem, runs = Problem(sizes, device), range(sizes.runs)
    return {
        FLEET: problem.fleet(runs),
        PLAIN: problem.fleet(runs, private=False),
        ALONE: one_by_one([problem.fleet([run]) for run in runs]),
        GHOST: one_by_one([problem.ghost(run) for run in runs]),
        HOOKS: one_by_one([problem.hooks(run) for run in runs]),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    rounds = chosen.rounds or (2 if chosen.quick else 15)
    sizes = Sizes(2, 4, (4, 8, 8, 4)) if chosen.quick else Sizes(32, 256, (64, 128, 128, 64))
    steps = variants(sizes, chosen.device)
    least = 1.0 if chosen.quick else 20.0
    times = interleave(steps, device=chosen.device, rounds=rounds, least_ms=least)
    results = compare(times, FLEET, runs=sizes.runs, batch=sizes.batch)
    ratio = {row["name"]: row["ratio"]["median"] for row in results}
    whole = next(row["ms"]["median"] for row in results if row["name"] == FLEET)
    cuda = chosen.device == "cuda"
    targets = [
        target("opacus hooks / fleet", ratio[HOOKS], least=100 if cuda else 8),
        target("opacus ghost / fleet", ratio[GHOST], least=60 if cuda else 2.5),
    ]
    if cuda:
        targets.append(target("own, one by one / fleet", ratio[ALONE], least=10))
    return finish(
        "fleet",
        chosen,
        results,
        sizes={**vars(sizes), "rounds": rounds},
        examples_a_second=sizes.runs * sizes.batch / whole * 1e3,
        targets=targets,
    )


if __name__ == "__main__":
    main()
