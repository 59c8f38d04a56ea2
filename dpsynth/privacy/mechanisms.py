"""Mechanisms: each adds its noise and writes its event in one place, so they cannot disagree."""

from __future__ import annotations

import math

import numpy as np

from dpsynth.checks import UsageError, check_count
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import gaussian_event

__all__ = ["Measurer"]


class Measurer:
    """Answers counting queries about private rows with Gaussian noise, and pays for each.

    It answers no more often than it was given a budget for.

    Args:
        ledger: Where every answer is written before it is computed.
        mu: Gaussian budget of all the answers together; inf adds no noise.
        parts: How many answers share it equally.
        rng: Source of the noise.
    """

    def __init__(self, ledger: Ledger, mu: float, parts: int, rng: np.random.Generator) -> None:
        self._ledger = ledger
        self._mu = mu / math.sqrt(max(parts, 1))
        self._parts = self._left = parts
        self._rng = rng

    def histograms(self, what: str, queries: int) -> HistogramNoise:
        """Pay for one part and spread it over `queries` histograms.

        A histogram over disjoint cells has L2 sensitivity 1 under add/remove, `queries` of them
        together √queries; the noise returned is for each count of each.

        Raises:
            UsageError: When the stage has no budget or all its parts are spent.
        """
        check_count("queries", queries)
        if self._left < 1:
            raise UsageError(f"{what}: parts={self._parts} of the budget are spent already")
        self._left -= 1
        self._ledger.pay(gaussian_event(what, self._mu))
        sigma = 0.0 if math.isinf(self._mu) else math.sqrt(queries) / self._mu
        return HistogramNoise(sigma, self._rng, queries)


class HistogramNoise:
    """Adds N(0, σ²) to the counts of at most `queries` histograms, in float64, rounded to a grid
    of 2^-10.

    Rounding hides the low-order bits in which floating-point Gaussians leak (Mironov 2012).
    """

    def __init__(self, sigma: float, rng: np.random.Generator, queries: int) -> None:
        self.sigma = sigma
        self._rng = rng
        self._queries = self._left = queries

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        if self._left < 1:
            raise UsageError(f"queries={self._queries} of this noise are used up; pay for more")
        self._left -= 1
        noisy = counts + self.sigma * self._rng.standard_normal(counts.shape)
        return np.round(noisy * 1024) / 1024
