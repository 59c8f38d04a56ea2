"""Nearest neighbours between tables: the audit's search, scikit-learn, and a plain blocked search.

`python scripts/bench_neighbours.py [--device cuda] [--quick] [--json FILE]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from benchmarking import Step, arguments, compare, finish, interleave, parser, target
from sklearn.neighbors import NearestNeighbors

from dpsynth.audit.neighbours import Features, distances
from dpsynth.randomness import stream

OWN, COARSE, BLOCKED = "dpsynth", "dpsynth, TF32", "torch.cdist"
SCIKIT, AUTO = "scikit-learn", "scikit-learn, auto"
METRICS = {1: "manhattan", 2: "euclidean"}


@dataclass(frozen=True)
class Case:
    """Tables of numbers and of categories with `levels` levels each; d is the `power`-norm."""

    queries: int
    keys: int
    numbers: int
    categories: int = 0
    levels: int = 8
    power: int = 2


CASES = {
    "cpu": (
        Case(10_000, 100_000, 20, power=2),
        Case(1_000, 100_000, 20, power=1),
        Case(1_000, 100_000, 10, categories=10, power=1),
    ),
    "cuda": (Case(100_000, 1_000_000, 100, power=2),),
}
QUICK = (
    Case(20, 50, 3, power=2),
    Case(20, 50, 3, power=1),
    Case(20, 50, 2, categories=2, power=1),
)


def features(case: Case, rows: int, name: str) -> Features:
    """Even draws."""
    draws = stream(0, name)
    codes = draws.integers(1, case.levels + 1, (rows, case.categories))
    levels = (case.levels + 1,) * case.categories
    return Features(draws.random((rows, case.numbers)), codes, levels)


def dense(table: Features, power: int) -> np.ndarray:
    """Numbers beside scaled one-hot categories: two levels that differ are 1 apart in d^p."""
    hot = [table.codes[:, j, None] == np.arange(n) for j, n in enumerate(table.levels)]
    return np.hstack([table.numbers, *(0.5 ** (1 / power) * one for one in hot)])


def exact(queries: Features, keys: Features, power: int) -> np.ndarray:
    """Distance of each query to its nearest key, one query at a time in float64."""
    found = []
    for numbers, codes in zip(queries.numbers, queries.codes, strict=True):
        gaps = np.abs(keys.numbers - numbers) ** power
        whole = gaps.sum(1) + (keys.codes != codes).sum(1)
        found.append(whole.min() ** (1 / power))
    return np.array(found)


def blocked(queries: np.ndarray, keys: np.ndarray, power: int, device: str) -> np.ndarray:
    """Nearest distances by `torch.cdist` in float32, a block of queries at a time."""
    mine = torch.from_numpy(queries.astype(np.float32)).to(device)
    others = torch.from_numpy(keys.astype(np.float32)).to(device)
    size = max(1, (1 << (28 if device == "cuda" else 22)) // len(others))
    parts = [torch.cdist(part, others, p=power).amin(1) for part in mine.split(size)]
    return torch.cat(parts).cpu().numpy()


def variants(case: Case, device: str) -> dict[str, Step]:
    """Searches of the same tables. On a GPU scikit-learn, which stays on the processor, gets one
    query in a thousand; its row says so."""
    queries, keys = features(case, case.queries, "queries"), features(case, case.keys, "keys")
    left, right = dense(queries, case.power), dense(keys, case.power)
    few = left[:: 1000 if device == "cuda" else 1]
    told = "" if len(few) == len(left) else f", {len(few)} queries"
    steps: dict[str, Step] = {
        OWN: lambda: distances(queries, keys, power=case.power, device=device)
    }
    if device == "cuda":
        steps[COARSE] = lambda: _coarse(steps[OWN])
    for name, algorithm in ((SCIKIT, "brute"), (AUTO, "auto")):
        search = NearestNeighbors(
            n_neighbors=1, algorithm=algorithm, metric=METRICS[case.power], n_jobs=1
        ).fit(right)
        steps[name + told] = lambda search=search: search.kneighbors(few)
    return steps | {BLOCKED: lambda: blocked(left, right, case.power, device)}


def _coarse(step: Step) -> object:
    """A step with products that the GPU may round to TF32 first."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return step()
    finally:
        torch.set_float32_matmul_precision(before)


def worst(case: Case, device: str, sample: int) -> float:
    """Largest error of the audit's search over some of the queries."""
    queries, keys = features(case, case.queries, "queries"), features(case, case.keys, "keys")
    few = Features(queries.numbers[:sample], queries.codes[:sample], queries.levels)
    found = distances(few, keys, power=case.power, device=device)[:, 0]
    return float(np.abs(found - exact(few, keys, case.power)).max())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    rounds = chosen.rounds or (2 if chosen.quick else 3)
    device = chosen.device
    cases = QUICK if chosen.quick else CASES[device]
    results, targets, errors = [], [], []
    for case in cases:
        times = interleave(variants(case, device), device=device, rounds=rounds, least_ms=1.0)
        size = f"{case.queries:g} × {case.keys:g} × {case.numbers}+{case.categories}"
        rows = compare(times, OWN, size=size, power=case.power)
        results += rows
        errors.append(worst(case, device, 10 if chosen.quick else 50))
        targets.append(target(f"{size}, power {case.power}: worst error", errors[-1], most=1e-12))
        if device == "cuda":
            seconds = rows[0]["ms"]["median"] / 1e3
            targets.append(target(f"{size}: seconds", seconds, most=1.2))
    sizes = {"cases": [asdict(case) for case in cases], "rounds": rounds}
    return finish(
        "neighbours",
        chosen,
        results,
        sizes=sizes,
        errors=errors,
        targets=targets,
    )


if __name__ == "__main__":
    main()
