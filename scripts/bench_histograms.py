"""Contingency tables of many subsets of columns: the evaluation's counts, NumPy, and pandas.

`python scripts/bench_histograms.py [--device cuda] [--quick] [--json FILE]`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from benchmarking import Step, arguments, compare, finish, interleave, parser, target

from dpsynth.evaluation.histograms import histograms
from dpsynth.randomness import stream

OWN, NUMPY, PANDAS = "dpsynth", "numpy.bincount", "pandas groupby"


@dataclass(frozen=True)
class Case:
    """Subsets of `order` of the columns of a table: all, or `subsets` random ones."""

    rows: int
    columns: int
    levels: int
    order: int
    subsets: int | None = None


CASES = (Case(1_000_000, 30, 20, 2), Case(1_000_000, 30, 20, 3, subsets=300))
QUICK = (Case(200, 5, 4, 2), Case(200, 5, 4, 3, subsets=6))


def table(case: Case) -> np.ndarray:
    """Even codes (rows, columns), column-major as the coder gives them."""
    draws = stream(0, "codes").integers(0, case.levels, (case.columns, case.rows))
    return draws.T


def chosen_subsets(case: Case) -> list[tuple[int, ...]]:
    """The case's subsets of columns."""
    every = list(combinations(range(case.columns), case.order))
    if case.subsets is None:
        return every
    picked = stream(0, "subsets").choice(len(every), case.subsets, replace=False)
    return [every[i] for i in np.sort(picked)]


def by_numpy(codes: np.ndarray, case: Case, subsets: list[tuple[int, ...]]) -> list[np.ndarray]:
    """One mixed-radix count a subset."""
    found = []
    for subset in subsets:
        cells = codes[:, subset[0]]
        for j in subset[1:]:
            cells = cells * case.levels + codes[:, j]
        found.append(np.bincount(cells, minlength=case.levels**case.order))
    return found


def by_pandas(codes: np.ndarray, case: Case, subsets: list[tuple[int, ...]]) -> list[np.ndarray]:
    """One groupby a subset, its sizes put into all cells."""
    # Names, or pandas would take the number of a level for the name of a column.
    frame, found = pd.DataFrame(codes, columns=[f"c{j}" for j in range(case.columns)]), []
    for subset in subsets:
        sizes = frame.groupby([f"c{j}" for j in subset]).size()
        dense = np.zeros((case.levels,) * case.order, dtype=np.int64)
        dense[tuple(sizes.index.get_level_values(i) for i in range(case.order))] = sizes
        found.append(dense.ravel())
    return found


def variants(case: Case, device: str) -> dict[str, Step]:
    """Counts of the same table. pandas gets one subset in twenty, and its row says so."""
    codes, subsets = table(case), chosen_subsets(case)
    levels, few = [case.levels] * case.columns, subsets[:: 20 if len(subsets) > 50 else 1]
    pandas = PANDAS if len(few) == len(subsets) else f"{PANDAS}, {len(few)} subsets"
    return {
        OWN: lambda: histograms([codes], levels, subsets, device=device),
        NUMPY: lambda: by_numpy(codes, case, subsets),
        pandas: lambda: by_pandas(codes, case, few),
    }


def differing(case: Case, device: str) -> int:
    """Cells of which the evaluation's count is not NumPy's."""
    codes, subsets = table(case), chosen_subsets(case)
    found = histograms([codes], [case.levels] * case.columns, subsets, device=device)
    wanted = by_numpy(codes, case, subsets)
    return sum(int((a[0] != b).sum()) for a, b in zip(found, wanted, strict=True))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what `--json` writes."""
    chosen = arguments(parser(str(__doc__).splitlines()[0]), argv)
    rounds = chosen.rounds or (2 if chosen.quick else 3)
    cases = QUICK if chosen.quick else CASES
    results, targets = [], []
    for case in cases:
        steps = variants(case, chosen.device)
        times = interleave(steps, device=chosen.device, rounds=rounds, least_ms=1.0)
        size = f"{case.rows:g} × {case.columns} × {case.levels}, {len(chosen_subsets(case))} sets"
        rows = compare(times, OWN, size=size, order=case.order)
        results += rows
        wrong = differing(case, chosen.device)
        targets.append(target(f"{size} of {case.order}: cells that differ", wrong, most=0))
        if not chosen.quick:
            ratio = next(row["ratio"]["median"] for row in rows if row["name"] == NUMPY)
            targets.append(target(f"{size} of {case.order}: × numpy", ratio, least=1.0))
    sizes = {"cases": [asdict(case) for case in cases], "rounds": rounds}
    return finish("histograms", chosen, results, sizes=sizes, targets=targets)


if __name__ == "__main__":
    main()
