"""Exact nearest-neighbour distances between tables, by blocks, in two feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsynth.checks import UsageError, check_choice, check_count
from dpsynth.data import Table
from dpsynth.schema import Schema

__all__ = ["Features", "distances", "quantile_map", "range_map"]

# Stands for a missing number: farther than 1 from all of [0, 1], and differences are cut at 1.
MISSING = 2.0
# Entries of one block of the distance matrix: small enough to stay near the core's cache.
BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Features:
    """A table as an attacker measures it.

    Attributes:
        numbers: (rows, numeric columns) float64 in [0, 1]; `MISSING` where the value is missing.
        codes: (rows, categorical columns) int64 level codes; 0 is missing, level i is i + 1.
        levels: Number of codes of each categorical column.
    """

    numbers: np.ndarray
    codes: np.ndarray
    levels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)


def range_map(schema: Schema) -> Callable[[Table], Features]:
    """Map numbers linearly from their declared bounds to [0, 1]; nothing is read off rows."""

    def scale(name: str, values: np.ndarray) -> np.ndarray:
        column = schema[name]
        assert column.lower is not None and column.upper is not None
        return (values - column.lower) / (column.upper - column.lower)

    return lambda table: _features(table, schema, scale)


def quantile_map(reference: Table) -> Callable[[Table], Features]:
    """Map numbers to the mid-rank empirical distribution function of `reference`.

    Between two reference values the function is interpolated, down to 0 and up to 1 at the
    declared bounds, so that different values stay different. Fit it on rows that are neither
    members nor holdout, or the map itself would favour one side.
    """
    schema = reference.schema
    knots = {c.name: _mid_ranks(reference, c.name) for c in schema.columns if c.numeric}

    def scale(name: str, values: np.ndarray) -> np.ndarray:
        return np.interp(values, *knots[name])

    return lambda table: _features(table, schema, scale)


def _mid_ranks(reference: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = reference.schema[name]
    assert column.lower is not None and column.upper is not None
    values = reference.frame[name].to_numpy(dtype=float, na_value=np.nan)
    points, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1)
    if not len(points) or points[0] > column.lower:
        points, ranks = np.append(column.lower, points), np.append(0.0, ranks)
    if points[-1] < column.upper:
        points, ranks = np.append(points, column.upper), np.append(ranks, 1.0)
    return points, ranks


def _features(
    table: Table, schema: Schema, scale: Callable[[str, np.ndarray], np.ndarray]
) -> Features:
    if table.schema.columns != schema.columns:
        raise UsageError("tables under different schemas cannot be compared; use one schema")
    rows = len(table)
    numbers: list[np.ndarray] = [np.empty((rows, 0))]
    codes: list[np.ndarray] = [np.empty((rows, 0), dtype=np.int64)]
    levels: list[int] = []
    for column in schema.columns:
        values = table.frame[column.name]
        if column.numeric:
            array = values.to_numpy(dtype=float, na_value=np.nan)
            scaled = np.clip(scale(column.name, array), 0.0, 1.0)
            numbers.append(np.where(np.isnan(array), MISSING, scaled)[:, None])
        else:
            codes.append(values.cat.codes.to_numpy(dtype=np.int64)[:, None] + 1)
            levels.append(len(column.levels) + 1)
    return Features(np.hstack(numbers), np.hstack(codes), tuple(levels))


def distances(
    queries: Features, keys: Features, *, k: int = 1, power: int = 1, exclude_self: bool = False
) -> np.ndarray:
    """Distances from each query to its `k` nearest keys, exact to float64.

    d = (Σ_numeric |x − y|^p + number of categories that differ)^{1/p}; a missing value counts 1
    against a value and 0 against another missing one.

    Args:
        queries: (rows, ...) features.
        keys: (others, ...) features under the same map.
        k: How many neighbours.
        power: p, 1 or 2.
        exclude_self: Leave out key i for query i (both are the same table).

    Returns:
        (rows, k), increasing along each row.

    Raises:
        UsageError: On too few keys, another power, or tables that do not fit each other.
    """
    check_count("k", k)
    check_choice("power", power, (1, 2))
    if queries.levels != keys.levels or queries.numbers.shape[1] != keys.numbers.shape[1]:
        raise UsageError("queries and keys have different columns; map both under one schema")
    if exclude_self and len(queries) != len(keys):
        raise UsageError(
            f"exclude_self: {len(queries)} queries and {len(keys)} keys are not one table"
        )
    if len(keys) - exclude_self < k:
        raise UsageError(f"k={k}: there are only {len(keys) - exclude_self} rows to choose from")
    others = torch.tensor(keys.numbers.T, dtype=torch.float32).contiguous()
    hot = _one_hot(keys)
    step = max(1, BLOCK // len(keys))
    parts = []
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        part = Features(queries.numbers[rows], queries.codes[rows], queries.levels)
        block = _block(part, others, hot, power)
        if exclude_self:
            own = torch.arange(len(part))
            block[own, start + own] = torch.inf
        nearest = block.topk(k, largest=False).indices if k > 1 else block.argmin(1, keepdim=True)
        parts.append(_exact(part, keys, nearest.numpy(), power))
    return np.concatenate(parts)


def _one_hot(features: Features) -> Tensor:
    """(rows, Σ levels) float32."""
    start = np.concatenate([[0], np.cumsum(features.levels)[:-1]]).astype(np.int64)
    hot = torch.zeros(len(features), sum(features.levels))
    return hot.scatter_(1, torch.from_numpy(features.codes + start[: len(features.levels)]), 1.0)


def _block(queries: Features, others: Tensor, hot: Tensor, power: int) -> Tensor:
    """d^p (rows, others) in float32; agreements are counted by one matrix product."""
    block = len(queries.levels) - _one_hot(queries) @ hot.T
    numbers = torch.tensor(queries.numbers.T, dtype=torch.float32)
    gap = torch.empty_like(block)
    for mine, theirs in zip(numbers, others, strict=True):
        torch.sub(mine[:, None], theirs, out=gap)
        gap.abs_().clamp_(max=1.0)
        block.add_(gap if power == 1 else gap.square_())
    return block


def _exact(queries: Features, keys: Features, nearest: np.ndarray, power: int) -> np.ndarray:
    """Distances (rows, k) to the keys `nearest` (rows, k) in float64, sorted.

    Float32 picks the neighbours; equal float32 values may differ in float64, so the distance
    itself (zero or not) is taken from the latter.
    """
    gaps = np.abs(queries.numbers[:, None] - keys.numbers[nearest]).clip(max=1.0)
    differ = (queries.codes[:, None] != keys.codes[nearest]).sum(axis=2)
    return np.sort(((gaps**power).sum(axis=2) + differ) ** (1 / power), axis=1)
