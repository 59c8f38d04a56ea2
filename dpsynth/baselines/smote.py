"""SMOTE: rows between real rows, the oversampling that is often taken for synthetic data.

Nothing in it is private: each row lies on the line between two members, so it is judged like a
control, at ε=∞ alone, and never saved as a run.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from dpsynth.checks import RefusedError, check_count
from dpsynth.data import Table
from dpsynth.schema import Column

__all__ = ["smote"]


def smote(
    members: Table,
    n: int,
    rng: np.random.Generator,
    *,
    neighbours: int = 5,
    epsilon: float = math.inf,
) -> Table:
    """`n` rows by SMOTE-NC (Chawla et al. 2002, section 6.1), in the classes' own shares.

    Each row starts from a member and takes one of its nearest neighbours in the class: numbers lie
    at one random point between the two, on their column's grid; a category is the most frequent one
    of all those neighbours. Numbers are measured in standard deviations of the class, and two
    categories that differ are one apart (the median of these deviations). Missing is a category of
    its own: a number is missing where it is for the member, and the member's where it is for the
    neighbour. The only row of its class is copied.

    Args:
        members: Real rows. A categorical target makes the classes; else all rows are one.
        n: How many rows.
        rng: Of all choices.
        neighbours: k.
        epsilon: For callers with a budget: there is no noise, so all but inf is refused.

    Raises:
        RefusedError: On a finite `epsilon`.
        UsageError: On counts that are not positive.
    """
    check_count("n", n)
    check_count("neighbours", neighbours)
    if not math.isinf(epsilon):
        raise RefusedError(
            f"epsilon={epsilon}: smote hands out members' values; it has no ε but inf"
        )
    base = rng.integers(0, len(members), n)
    near = np.tile(np.arange(len(members))[:, None], (1, neighbours))
    for rows in _classes(members):
        if len(rows) > 1:
            near[rows] = rows[_nearest(members.take(rows), neighbours)]
    other = near[base, rng.integers(0, neighbours, n)]
    point = rng.random(n)
    target, frame = members.schema.target, {}
    for column in members.schema.columns:
        values = members.frame[column.name]
        if column.numeric:
            frame[column.name] = _between(values, column, base, other, point)
        else:
            # All neighbours are of the class.
            around = base[:, None] if column.name == target else near[base]
            frame[column.name] = _most_frequent(values, around)
    return Table(members.schema, pd.DataFrame(frame))


def _classes(members: Table) -> list[np.ndarray]:
    """Positions of the rows of each class."""
    target = members.schema.target
    held = next((c for c in members.schema.columns if c.name == target), None)
    if held is None or held.numeric:
        return [np.arange(len(members))]
    codes = members.frame[held.name].cat.codes.to_numpy()
    return [np.flatnonzero(codes == code) for code in np.unique(codes)]


def _nearest(rows: Table, neighbours: int) -> np.ndarray:
    """The nearest other rows of each (rows, neighbours); of few rows some more than once."""
    parts = []
    for column in rows.schema.columns:
        values = rows.frame[column.name]
        if column.numeric:
            numbers = values.to_numpy(dtype=float, na_value=np.nan)
            present = np.isfinite(numbers)
            spread = numbers[present].std() if present.any() else 0.0
            centre = numbers[present].mean() if present.any() else 0.0
            parts.append(np.where(present, (numbers - centre) / (spread or 1.0), 0.0)[:, None])
            codes = present.astype(int)
        else:
            codes = values.cat.codes.to_numpy()
        # Two levels that differ are √2 apart in one-hot coding.
        parts.append((codes[:, None] == np.unique(codes)) / math.sqrt(2))
    points = np.concatenate(parts, axis=1)
    found = min(neighbours, len(rows) - 1)
    search = NearestNeighbors(n_neighbors=found).fit(points)
    return search.kneighbors(return_distance=False)[:, np.arange(neighbours) % found]


def _between(
    values: pd.Series, column: Column, base: np.ndarray, other: np.ndarray, point: np.ndarray
) -> pd.Series:
    """Numbers between those of two rows, on the column's grid."""
    numbers = values.to_numpy(dtype=float, na_value=np.nan)
    start, end = numbers[base], numbers[other]
    drawn = start + point * (np.where(np.isnan(end), start, end) - start)
    if column.step is not None and column.lower is not None:
        drawn = column.lower + column.step * np.round((drawn - column.lower) / column.step)
    series = pd.Series(drawn.clip(column.lower, column.upper))
    return series.astype(values.dtype)


def _most_frequent(values: pd.Series, around: np.ndarray) -> pd.Series:
    """The most frequent category of each group of rows, of several the first (n, k) -> (n,)."""
    codes = values.cat.codes.to_numpy()[around]
    levels = np.append(np.arange(len(values.cat.categories)), -1)
    counts = (codes[..., None] == levels).sum(1)
    drawn = levels[counts.argmax(1)]
    kept = values.cat
    return pd.Series(pd.Categorical.from_codes(drawn, kept.categories, ordered=kept.ordered))
