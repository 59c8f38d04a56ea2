"""Distances between two tables: contingency tables, distribution functions and associations."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np

from dpsynth.data import Table
from dpsynth.evaluation.coding import Coder, category_codes, check_comparable, numbers
from dpsynth.evaluation.histograms import counted, histograms

__all__ = ["MAX_TRIPLES", "associations", "column_detail", "fidelity", "total_variation"]

MAX_TRIPLES = 300
RARE = 0.01


def fidelity(
    real: Table, other: Table, *, rng: np.random.Generator, device: str = "cpu"
) -> dict[str, float]:
    """Distances of `other` from `real`; all are 0 for equal tables, and none depends on row order.

    Args:
        real: The table the bins are fitted on.
        other: Any table under the same schema.
        rng: Draws the triples. Paired comparisons pass generators in the same state.
        device: Where contingency tables are counted: `cpu`, `cuda`, or `auto`; same figures.

    Returns:
        `tvd1 tvd2 tvd3`: half the L1 distance of the normalised contingency tables over 20
        quantile bins of `real` and a missing level, averaged over all columns, all pairs and 300
        random triples (all, if fewer; a table of two columns has its one pair for a triple).
        `ks wasserstein`: Kolmogorov–Smirnov and Wasserstein-1 distance of the present values,
        averaged over numeric columns, the latter on values scaled to 0..1 by the declared bounds;
        0 if there are none, and 1 for a column present in only one of the tables.
        `correlation_difference`: see `associations`; mean absolute difference over all pairs, 0
        if there is no pair.

    Raises:
        UsageError: On different columns, fewer than two rows, or a device that is not there.
    """
    check_comparable(real, other)
    coder = Coder.fit(real)
    levels = coder.levels
    orders = {f"tvd{order}": _subsets(levels, order, rng) for order in (1, 2, 3)}
    wanted = [subset for subsets in orders.values() for subset in subsets]
    tables = [coder.codes(real), coder.codes(other)]
    gaps = np.empty(len(wanted))
    for number, counts in counted(tables, levels, wanted, device=device):
        gaps[number] = _variation(counts)
    ends = np.cumsum([len(subsets) for subsets in orders.values()])[:-1]
    distances = {
        name: float(part.mean()) for name, part in zip(orders, np.split(gaps, ends), strict=True)
    }
    steps = [_cdf_distances(real, other, c.name) for c in real.schema.columns if c.numeric]
    ks, wasserstein = np.mean(steps, axis=0) if steps else (0.0, 0.0)
    strengths = [associations(table, device=device) for table in (real, other)]
    changes = np.abs(strengths[0] - strengths[1])[np.triu_indices(len(levels), k=1)]
    return distances | {
        "ks": float(ks),
        "wasserstein": float(wasserstein),
        "correlation_difference": float(changes.mean()) if changes.size else 0.0,
    }


def total_variation(
    first: np.ndarray, second: np.ndarray, levels: np.ndarray, subset: tuple[int, ...]
) -> float:
    """Total variation of the joint of columns `subset` of two code arrays (rows, columns)."""
    return _variation(histograms([first, second], levels, [subset])[0])


def _variation(counts: np.ndarray) -> float:
    """Half the L1 distance of two histograms, (2, cells) counts, each over its number of rows."""
    first, second = counts / counts.sum(axis=1, keepdims=True)
    return float(np.abs(first - second).sum() / 2)


def _subsets(levels: np.ndarray, order: int, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """All column subsets of size `order`, or `MAX_TRIPLES` distinct random ones of size 3."""
    width = len(levels)
    order = min(order, width)
    if order < 3 or comb(width, 3) <= MAX_TRIPLES:
        return list(combinations(range(width), order))
    chosen = set(rng.choice(comb(width, 3), MAX_TRIPLES, replace=False).tolist())
    return [s for rank, s in enumerate(combinations(range(width), 3)) if rank in chosen]


def _cdf_distances(real: Table, other: Table, name: str) -> tuple[float, float]:
    """(Kolmogorov–Smirnov, scaled Wasserstein-1) of one numeric column's present values."""
    column = real.schema[name]
    assert column.lower is not None and column.upper is not None
    a, b = (np.sort(v[~np.isnan(v)]) for v in (numbers(real, name), numbers(other, name)))
    if len(a) == 0 or len(b) == 0:
        gap = float(len(a) != len(b))
        return gap, gap
    points = np.sort(np.concatenate([a, b]))
    gap = np.abs(
        np.searchsorted(a, points, side="right") / len(a)
        - np.searchsorted(b, points, side="right") / len(b)
    )
    area = float((gap[:-1] * np.diff(points)).sum())
    return float(gap.max()), area / (column.upper - column.lower)


def associations(table: Table, *, device: str = "cpu") -> np.ndarray:
    """Strength of association of every pair of columns: float64 (columns, columns), symmetric.

    Two numbers: Pearson's correlation (signed). Number and category: the correlation ratio η.
    Two categories: Cramér's V with Bergsma's (2013) bias correction, since the tables compared
    may differ in size. A missing number leaves its pairs out; a missing category is a level of its
    own. A constant column has association 0 with everything. The diagonal is 1. Pairs of categories
    are counted on `device`.
    """
    columns = table.schema.columns
    numeric = [j for j, c in enumerate(columns) if c.numeric]
    nominal = [j for j, c in enumerate(columns) if not c.numeric]
    values = [numbers(table, columns[j].name) for j in numeric]
    codes = [category_codes(table, columns[j].name) + 1 for j in nominal]
    sizes = [len(columns[j].levels) + 1 for j in nominal]
    pairs = list(combinations(range(len(nominal)), 2))
    joints = histograms([np.column_stack(codes)], sizes, pairs, device=device) if pairs else []
    counts = [c.reshape(sizes[i], sizes[h]) for c, (i, h) in zip(joints, pairs, strict=True)]
    matrix = np.eye(len(columns))
    if numeric:
        matrix[np.ix_(numeric, numeric)] = _pearson(np.column_stack(values))
    for i, j in enumerate(nominal):
        for k, number in zip(numeric, values, strict=True):
            matrix[j, k] = matrix[k, j] = _correlation_ratio(codes[i], number, sizes[i])
    for (i, h), strength in zip(pairs, map(_cramers_v, counts), strict=True):
        matrix[nominal[i], nominal[h]] = matrix[nominal[h], nominal[i]] = strength
    return matrix


def _pearson(values: np.ndarray) -> np.ndarray:
    """Pearson's r over the rows where both are present; values (rows, columns), NaN = missing."""
    present = ~np.isnan(values)
    count = np.maximum(present.sum(axis=0), 1)
    filled = np.where(present, values, 0.0)
    filled = np.where(present, filled - filled.sum(axis=0) / count, 0.0)
    # Unit spread first: the sums below then neither overflow nor cancel.
    spread = np.sqrt((filled**2).sum(axis=0) / count)
    filled /= np.where(spread > 0, spread, 1.0)
    seen = present.astype(float)
    both = np.maximum(seen.T @ seen, 1.0)
    mean = filled.T @ seen / both  # [i, j]: mean of i where j is present too
    variance = (filled**2).T @ seen / both - mean**2
    covariance = filled.T @ filled / both - mean * mean.T
    scale = np.sqrt(np.maximum(variance * variance.T, 0.0))
    safe = scale > 1e-12
    r = np.where(safe, covariance / np.where(safe, scale, 1.0), 0.0)
    np.fill_diagonal(r, 1.0)
    return np.clip(r, -1.0, 1.0)


def _correlation_ratio(codes: np.ndarray, values: np.ndarray, size: int) -> float:
    """η: square root of the share of the values' variance that lies between the categories."""
    present = ~np.isnan(values)
    if not present.any():
        return 0.0
    centred, groups = values[present] - values[present].mean(), codes[present]
    total = float(centred @ centred)
    if total <= 0:
        return 0.0
    count = np.bincount(groups, minlength=size)
    sums = np.bincount(groups, weights=centred, minlength=size)
    between = float((sums**2 / np.maximum(count, 1)).sum())
    return min(1.0, between / total) ** 0.5


def _cramers_v(counts: np.ndarray) -> float:
    """Bias-corrected Cramér's V (Bergsma 2013, eqs. 7–10) of a table of counts; 0 if either
    column is constant."""
    rows = counts.sum()
    joint = counts / rows
    joint = joint[joint.sum(axis=1) > 0][:, joint.sum(axis=0) > 0]
    r, c = joint.shape
    expected = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    phi2 = float(((joint - expected) ** 2 / expected).sum())
    phi2 = max(0.0, phi2 - (r - 1) * (c - 1) / (rows - 1))
    r_free, c_free = r - (r - 1) ** 2 / (rows - 1), c - (c - 1) ** 2 / (rows - 1)
    room = min(r_free, c_free) - 1
    return min(1.0, (phi2 / room) ** 0.5) if room > 0 else 0.0


def column_detail(real: Table, other: Table, *, device: str = "cpu") -> dict[str, dict[str, float]]:
    """One entry a column, over the bins and missing level of `fidelity`; counted on `device`.

    Returns:
        By column name: `tvd`; `psi`, the population stability index Σ (p−q) ln(p/q) with half a
        row added to every level; `rare_level_coverage`, the share of the levels held by less than
        1 % of the rows of `real` (and by one at least) that occur in `other`, 1 if none is rare.
    """
    check_comparable(real, other)
    coder = Coder.fit(real)
    single = [(j,) for j in range(len(coder.columns))]
    counts = histograms(
        [coder.codes(real), coder.codes(other)], coder.levels, single, device=device
    )
    detail = {}
    for column, (a, b) in zip(coder.columns, counts, strict=True):
        p, q = (a + 0.5) / (a + 0.5).sum(), (b + 0.5) / (b + 0.5).sum()
        rare = (a > 0) & (a < RARE * len(real))
        detail[column.name] = {
            "tvd": float(np.abs(a / len(real) - b / len(other)).sum() / 2),
            "psi": float(((p - q) * np.log(p / q)).sum()),
            "rare_level_coverage": float((b[rare] > 0).mean()) if rare.any() else 1.0,
        }
    return detail
