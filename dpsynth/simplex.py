"""Nearest distributions: noisy counts that are to add up, none below 0."""

from __future__ import annotations

import numpy as np

__all__ = ["onto_simplex"]


def onto_simplex(
    counts: np.ndarray, totals: np.ndarray | float, variances: np.ndarray | None = None
) -> np.ndarray:
    """Nearest points with sums `totals` and no negative entry; −inf gives 0.

    Moving all by one constant times their variances and cutting at 0 removes the upward bias that
    cutting alone gives noisy zeros (Euclidean projection; Duchi et al. 2008).

    Args:
        counts: Points, each with a finite entry (..., F).
        totals: At least 0 (...).
        variances: What distances are weighed by, inversely (..., F); by default all alike.
    """
    spread = np.ones_like(counts) if variances is None else variances
    order = np.argsort(-counts / spread, axis=-1, kind="stable")
    sorted_counts, sorted_spread = (
        np.take_along_axis(values, order, axis=-1) for values in (counts, spread)
    )
    excess = np.cumsum(sorted_counts, axis=-1) - np.asarray(totals)[..., None]
    excess = excess / np.cumsum(sorted_spread, axis=-1)
    last = np.maximum((sorted_counts / sorted_spread > excess).sum(axis=-1) - 1, 0)
    level = np.take_along_axis(excess, last[..., None], axis=-1)
    return np.maximum(counts - level * spread, 0)
