"""Mechanisms: each adds its noise and writes its event in one place, so they cannot disagree."""

from __future__ import annotations

import math

import numpy as np

from dpsynth.checks import UsageError, check_count
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import gaussian_event
from dpsynth.randomness import Stream

__all__ = ["Measurer"]

_CELLS = 1024
# Both below 2^42 in multiples of 2^-10: their sum has 53 bits. No normal draw reaches 16 σ.
_MOST_COUNT = 2.0**42
_MOST_NOISE = 2.0**38


class Measurer:
    """Answers counting queries about private rows with Gaussian noise, and pays for each.

    It answers no more often than it was given a budget for.

    Args:
        ledger: Where every answer is written before it is computed.
        mu: Gaussian budget of all the answers together; inf adds no noise.
        parts: How many answers share it equally.
        rng: Source of the noise.
    """

    def __init__(self, ledger: Ledger, mu: float, parts: int, rng: Stream) -> None:
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
    """Adds N(0, σ²) to the counts of at most `queries` histograms.

    The noise, not the sum, is rounded to the grid of 2^-10, before a count is looked at. A grid
    that holds the whole numbers moves onto itself when a count changes, and the sum is exact in
    float64 (counts and noise stay below 2^42), so what is published is count + noise rounded, as if
    both had been real numbers: post-processing of the Gaussian mechanism. No low-order bit depends
    on the count, which is how floating-point noise gives it away (Mironov 2012; Canonne, Kamath &
    Steinke 2020 go further and sample on the grid itself).

    Not protected: the law of the noise is that of the stream (53 random bits and more a draw; a
    Philox stream is foreseeable by whoever has its key), and how long the draw takes.

    Raises:
        UsageError: On σ above 2^38; when called, on counts that are not whole numbers below 2^42.
    """

    def __init__(self, sigma: float, rng: Stream, queries: int) -> None:
        if sigma > _MOST_NOISE:
            raise UsageError(
                f"sigma={sigma:g}: noise above 2^38 cannot be added exactly; raise the budget"
            )
        self.sigma = sigma
        self._rng = rng
        self._queries = self._left = queries

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        if self._left < 1:
            raise UsageError(f"queries={self._queries} of this noise are used up; pay for more")
        # Whoever asks for such counts is wrong in the same way on every table; a value is not told.
        if not ((counts == np.round(counts)) & (np.abs(counts) < _MOST_COUNT)).all():
            raise UsageError("counts: must be whole numbers below 2^42; sum rows, not weights")
        self._left -= 1
        noise = self.sigma * self._rng.standard_normal(counts.shape)
        return counts + np.round(noise * _CELLS) / _CELLS
