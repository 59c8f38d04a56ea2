"""Mechanisms: each adds its noise and writes its event in one place, so they cannot disagree."""

from __future__ import annotations

import math

import numpy as np

from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import gaussian_event

__all__ = ["Measurer"]


class Measurer:
    """Answers counting queries about private rows with Gaussian noise, and pays for each.

    Args:
        ledger: Where every answer is written before it is computed.
        mu: Gaussian budget of all the answers together; inf adds no noise.
        parts: How many answers share it equally.
        rng: Source of the noise.
    """

    def __init__(self, ledger: Ledger, mu: float, parts: int, rng: np.random.Generator) -> None:
        self._ledger = ledger
        self._mu = mu / math.sqrt(max(parts, 1))
        self._rng = rng

    def histograms(self, what: str, queries: int) -> HistogramNoise:
        """Pay for one part and spread it over `queries` histograms.

        A histogram over disjoint cells has L2 sensitivity 1 under add/remove, `queries` of them
        together √queries; the noise returned is for each count of each.
        """
        self._ledger.pay(gaussian_event(what, self._mu))
        sigma = 0.0 if math.isinf(self._mu) else math.sqrt(queries) / self._mu
        return HistogramNoise(sigma, self._rng)


class HistogramNoise:
    """Adds N(0, σ²) to counts, in float64, rounded to a grid of 2^-10.

    Rounding hides the low-order bits in which floating-point Gaussians leak (Mironov 2012).
    """

    def __init__(self, sigma: float, rng: np.random.Generator) -> None:
        self.sigma = sigma
        self._rng = rng

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        noisy = counts + self.sigma * self._rng.standard_normal(counts.shape)
        return np.round(noisy * 1024) / 1024
