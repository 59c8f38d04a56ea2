"""Calibration: what other generators' tables say a candidate's neighbourhood looks like unseen.

A candidate lies near synthetic rows because the generator saw it, or because such rows are common.
Tables of other generators of the same kind, most of which did not see it, tell the two apart: they
are the OUT side of LiRA (Carlini et al. 2022) without any training. Rows are compared where a
diffusion on quantile-transformed numbers works: numbers as normal scores of their ranks, L2, and
categories first, so that neighbours share the candidate's categories if any row does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special
from scipy.spatial import cKDTree

from dpsynth.audit.neighbours import MISSING, quantile_map
from dpsynth.checks import UsageError
from dpsynth.data import Table

__all__ = ["Neighbourhoods", "normal_scores"]

# Between different levels: more than any two rows of like categories are apart in few columns.
GAP = 10.0
# Ranks nearer to an end count as that near: normal scores stay within ±3.7.
TAIL = 1e-4
# Added to distances before the logarithm, and to spreads of logarithms before a division.
FLOOR = 1e-6
SPREAD = 0.05
# Neighbours searched for, those whose distances are told, and those told column by column.
NEIGHBOURS = 8
TOLD = (1, 2, 3, 5, 8)
APART = 3
# Radii of the counts: the pooled other tables hold this many rows per table within each.
CROWDS = (0.1, 0.25, 0.5, 1.0, 2.0)
# Bandwidths of the kernel densities, in normal scores, and what keeps their logarithms finite.
BANDWIDTHS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
KERNEL_FLOOR = 0.01
# Rows at a time: bounds the memory that distances to all tables take.
CHUNK = 10_000


def normal_scores(population: Table) -> Callable[[Table], tuple[np.ndarray, np.ndarray]]:
    """Map numbers to Φ⁻¹ of their mid-rank in `population`.

    Returns:
        A function from a table to normal scores (rows, numeric columns), a missing one `GAP` above
        the greatest, and level codes (rows, categorical columns), 0 for missing.
    """
    measure = quantile_map(population)

    def scores(table: Table) -> tuple[np.ndarray, np.ndarray]:
        found = measure(table)
        known = special.ndtri(np.clip(found.numbers, TAIL, 1 - TAIL))
        top = special.ndtri(1 - TAIL) + GAP
        return np.where(found.numbers == MISSING, top, known), found.codes

    return scores


@dataclass(frozen=True, eq=False)
class _Searchable:
    numbers: np.ndarray
    codes: np.ndarray
    tree: cKDTree


class Neighbourhoods:
    """Synthetic tables ready to be searched, all measured alike.

    Args:
        tables: One of each generator, at least two.
        population: Fixes the ranks; rows of the population, or synthetic rows for want of them.

    Raises:
        UsageError: On fewer than two tables: nothing to calibrate one against.
    """

    def __init__(self, tables: Sequence[Table], population: Table) -> None:
        if len(tables) < 2:
            raise UsageError(
                f"{len(tables)} synthetic table: calibration needs at least one other generator's"
            )
        self._scores = normal_scores(population)
        self._numeric = [c.name for c in population.schema.columns if c.numeric]
        self._tables = [self._searchable(table) for table in tables]
        # Fewer rows than neighbours: the farthest one stands for those that are not there.
        self._k = min(NEIGHBOURS, *(len(table) for table in tables))

    def __len__(self) -> int:
        return len(self._tables)

    def _searchable(self, table: Table) -> _Searchable:
        numbers, codes = self._scores(table)
        return _Searchable(numbers, codes, cKDTree(_points(numbers, codes)))

    def features(
        self, candidates: Table, own: np.ndarray, excluded: np.ndarray | None = None
    ) -> pd.DataFrame:
        """Features of candidates, each on a table of its own, calibrated by the other tables.

        Args:
            candidates: Rows that are asked about.
            own: Which table each is scored on: int (rows,).
            excluded: Tables that play no part in a candidate's calibration because their
                generators are known to have seen it: bool (rows, tables). Exclude equally many for
                members and for others, or the number of exclusions gives the label away.

        Returns:
            Float columns, one row a candidate: log distances to the k-th nearest row and what the
            other tables make of them (`gain`, `z`, `rank`), counts within the radii of crowds,
            kernel density ratios, offsets to the nearest rows by column, and the values.

        Raises:
            UsageError: On shapes that do not fit, or a candidate without a table to calibrate by.
        """
        rows, tables = len(candidates), len(self)
        others = np.ones((rows, tables), dtype=bool) if excluded is None else ~excluded
        if own.shape != (rows,) or others.shape != (rows, tables):
            raise UsageError(
                f"own {own.shape} and excluded {others.shape}: must be ({rows},) and "
                f"({rows}, {tables})"
            )
        if ((own < 0) | (own >= tables)).any():
            raise UsageError(f"own: must be places among the {tables} tables")
        others[np.arange(rows), own] = False
        if not others.any(axis=1).all():
            raise UsageError("excluded: a candidate has no other table left to calibrate by")
        numbers, codes = self._scores(candidates)
        parts = [
            self._part(numbers[s : s + CHUNK], codes[s : s + CHUNK], own[s : s + CHUNK],
                       others[s : s + CHUNK])
            for s in range(0, rows, CHUNK)
        ]  # fmt: skip
        return pd.concat(parts, ignore_index=True)

    def _part(
        self, numbers: np.ndarray, codes: np.ndarray, own: np.ndarray, others: np.ndarray
    ) -> pd.DataFrame:
        points, rows = _points(numbers, codes), np.arange(len(own))
        far = np.empty((len(own), len(self), NEIGHBOURS), dtype=np.float32)
        nearest = np.empty((len(own), NEIGHBOURS), dtype=np.int64)
        for place, table in enumerate(self._tables):
            found, who = table.tree.query(points, k=np.arange(1, self._k + 1))
            far[:, place] = _padded(found)
            mine = own == place
            nearest[mine] = _padded(who[mine])
        columns = {
            **_distance_columns(far, rows, own, others),
            **_crowd_columns(far, rows, own, others),
            **_density_columns(far, rows, own, others),
            **self._offset_columns(numbers, codes, own, nearest),
        }
        return pd.DataFrame(columns, dtype=np.float32)

    def _offset_columns(
        self, numbers: np.ndarray, codes: np.ndarray, own: np.ndarray, nearest: np.ndarray
    ) -> dict[str, np.ndarray]:
        gaps = np.empty((len(own), APART, numbers.shape[1]))
        differ = np.empty((len(own), APART))
        for place in np.unique(own):
            mine, table = own == place, self._tables[place]
            near = nearest[mine, :APART]
            gaps[mine] = table.numbers[near] - numbers[mine, None]
            differ[mine] = (table.codes[near] != codes[mine, None]).sum(axis=2)
        columns = {"categories differ": differ[:, 0]}
        for k in range(APART):
            for j, name in enumerate(self._numeric):
                columns[f"log offset {k + 1} {name}"] = np.log(np.abs(gaps[:, k, j]) + 1e-5)
        for j, name in enumerate(self._numeric):
            columns[f"offset {name}"] = gaps[:, 0, j]
            columns[f"value {name}"] = numbers[:, j]
        for j in range(codes.shape[1]):
            columns[f"level {j}"] = codes[:, j].astype(float)
        return columns


def _points(numbers: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """(rows, columns): levels `GAP` or more apart, each column at another pitch against ties."""
    pitch = GAP * (1 + 0.137 * np.arange(codes.shape[1]))
    return np.hstack([numbers, codes * pitch])


def _padded(found: np.ndarray) -> np.ndarray:
    """(rows, NEIGHBOURS): the last column again where there are fewer."""
    return np.pad(found, ((0, 0), (0, NEIGHBOURS - found.shape[1])), mode="edge")


def _moments(values: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the chosen entries of each row: (rows,) each."""
    count = chosen.sum(axis=1)
    mean = np.where(chosen, values, 0.0).sum(axis=1) / count
    spread = np.where(chosen, values - mean[:, None], 0.0)
    return mean, np.sqrt(np.square(spread).sum(axis=1) / count)


def _distance_columns(
    far: np.ndarray, rows: np.ndarray, own: np.ndarray, others: np.ndarray
) -> dict[str, np.ndarray]:
    logs = np.log(far.astype(float) + FLOOR)
    columns = {}
    for k in TOLD:
        each = logs[:, :, k - 1]
        mine = each[rows, own]
        mean, spread = _moments(each, others)
        columns[f"log d{k}"] = mine
        columns[f"gain {k}"] = mean - mine
        columns[f"z {k}"] = (mean - mine) / (spread + SPREAD)
        columns[f"spread {k}"] = spread
    for k in (1, 3):
        each = logs[:, :, k - 1]
        mine = each[rows, own][:, None]
        wins = ((each > mine) + 0.5 * (each == mine)) * others
        columns[f"rank {k}"] = wins.sum(axis=1) / others.sum(axis=1)
    least = np.where(others, logs[:, :, 0], np.inf).min(axis=1)
    columns["gain on nearest"] = least - columns["log d1"]
    return columns


def _crowd_columns(
    far: np.ndarray, rows: np.ndarray, own: np.ndarray, others: np.ndarray
) -> dict[str, np.ndarray]:
    """Own rows within the radius that holds so many rows per other table (DOMIAS by counts)."""
    pooled = np.sort(np.where(others[:, :, None], far, np.inf).reshape(len(far), -1), axis=1)
    count, mine = others.sum(axis=1), far[rows, own]
    columns = {}
    for crowd in CROWDS:
        place = np.maximum(np.ceil(crowd * count).astype(int), 1) - 1
        columns[f"count {crowd:g}"] = (mine <= pooled[rows, place][:, None]).sum(axis=1)
    return columns


def _density_columns(
    far: np.ndarray, rows: np.ndarray, own: np.ndarray, others: np.ndarray
) -> dict[str, np.ndarray]:
    """Log ratio of kernel densities, own over the others' mean, at several bandwidths."""
    columns = {}
    for width in BANDWIDTHS:
        kernel = np.exp(-0.5 * np.square(far / width)).sum(axis=2, dtype=float)
        mean = _moments(kernel, others)[0]
        ratio = np.log(kernel[rows, own] + KERNEL_FLOOR) - np.log(mean + KERNEL_FLOOR)
        columns[f"density ratio {width:g}"] = ratio
        columns[f"log density {width:g}"] = np.log(mean + KERNEL_FLOOR)
    return columns
