"""Worth: how far noise and chance alone move a table from what is expected of it."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import poisson
from torch import Tensor

__all__ = ["WORTH", "blurred", "by_chance", "contingency"]

# A table is worth asking for where it is wrong, beyond chance, by more than this part of what noise
# would do to it.
WORTH = 0.3
# E|N(0, σ²)| / σ.
_MEAN = math.sqrt(2 / math.pi)


def blurred(expected: np.ndarray, sigma: float) -> float:
    """Σ over cells of what noise can move: σ·E|N(0, 1)|, but no more rows than a cell has."""
    return float(np.minimum(_MEAN * sigma, expected).sum())


def by_chance(expected: np.ndarray) -> float:
    """Distance that a right model would have: E|X - r| of Poisson counts X from the whole rows r
    that they are compared with, summed over cells. Sparse tables have most of it."""
    whole = np.round(expected)
    below = whole * poisson.cdf(whole, expected) - expected * poisson.cdf(whole - 1, expected)
    return float((expected - whole + 2 * below).sum())


def contingency(table: Tensor, expected: Tensor, noise: Tensor | float) -> float:
    """φ² = Σ (share - expected)²/expected, less what noise of this standard deviation adds to it.
    Cells that noise hides count for less. Of counts in place of shares it is as often as many."""
    gap = (table - expected).square() - noise**2
    return float((gap / (expected + noise).clamp_min(1e-12)).sum())
