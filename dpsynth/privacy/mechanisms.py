"""Mechanisms: each adds its noise and writes its event in one place, so they cannot disagree."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_ndtr

from dpsynth.checks import UsageError, check_count, check_positive
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import gaussian_event
from dpsynth.randomness import Stream

__all__ = ["Measurer", "Purse"]

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

    def histograms(self, what: str, queries: int, parts: int = 1) -> HistogramNoise:
        """Pay for some parts and spread them over `queries` histograms.

        A histogram over disjoint cells has L2 sensitivity 1 under add/remove, `queries` of them
        together √queries; the noise returned is for each count of each.

        Raises:
            UsageError: When the stage has no budget or fewer parts are left.
        """
        check_count("queries", queries)
        return self.answering(what, self._pay(what, parts), queries)

    def purse(self, what: str) -> Purse:
        """Pay for all that is left at once; what it is spent on may follow from the answers.

        Raises:
            UsageError: When the stage has no budget or no part is left.
        """
        return Purse(self, what, self._pay(what, max(self._left, 1)))

    def answering(self, what: str, mu: float, queries: int) -> HistogramNoise:
        """The noise of `queries` histograms that `mu` was paid for; an auditor listens here."""
        del what
        sigma = 0.0 if math.isinf(mu) else math.sqrt(queries) / mu
        return HistogramNoise(sigma, self._rng, queries)

    def choosing(self, what: str, epsilon: float, scores: np.ndarray, sensitivity: float) -> int:
        """A place drawn with probability ∝ exp(ε·score/(2·sensitivity)); the greatest at ε=∞."""
        del what
        if math.isinf(epsilon):
            return int(scores.argmax())
        uniform = np.maximum(self._rng.random(len(scores)), np.finfo(np.float64).tiny)
        gumbel = -np.log(-np.log(uniform))
        return int((epsilon / (2 * sensitivity) * scores + gumbel).argmax())

    def _pay(self, what: str, parts: int) -> float:
        """μ of so many parts, charged."""
        check_count("parts", parts)
        if self._left < parts:
            raise UsageError(f"{what}: parts={self._parts} of the budget are spent already")
        self._left -= parts
        mu = self._mu * math.sqrt(parts)
        self._ledger.pay(gaussian_event(what, mu))
        return mu


class Purse:
    """A Gaussian budget μ that is paid for as one event and spent bit by bit, each time on what
    the answers so far suggest.

    Whatever is asked, the squared budgets μ_i² of the answers add up to μ² at most, so all of them
    together are μ-GDP, although the next μ_i and its question follow from the answers before it
    (fully adaptive composition: Smith & Thakurta 2022; Koskela, Tobaben & Honkela 2023, Theorem 6).

    Args:
        measurer: Who answers.
        what: Name of the event.
        mu: What was paid; inf adds no noise.
    """

    def __init__(self, measurer: Measurer, what: str, mu: float) -> None:
        self._measurer, self._what, self._mu = measurer, what, mu
        self.left = 1.0

    def sigma(self, share: float, queries: int = 1) -> float:
        """Noise of a count that `histograms` would add."""
        return 0.0 if math.isinf(self._mu) else math.sqrt(queries / share) / self._mu

    def histograms(self, share: float, queries: int = 1) -> HistogramNoise:
        """Spend a share of μ² on `queries` histograms, or on as many numbers of sensitivity 1.

        Raises:
            UsageError: On a share that is not positive, or more than what is left.
        """
        check_positive("share", share)
        check_count("queries", queries)
        return self._measurer.answering(self._what, self._spend(share), queries)

    def choose(self, scores: np.ndarray, share: float, sensitivity: float = 1.0) -> int:
        """Spend a share of μ² on the place of a high score, by the exponential mechanism (McSherry
        & Talwar 2007), which draws place r with probability ∝ exp(ε·s_r/(2Δ)).

        One row more or less moves every score by Δ at most, so the log-ratio of the two
        probabilities of a place lies in an interval of length ε, [t - ε, t] (bounded range: Dong,
        Durfee & Rogers 2020, "Optimal differential privacy composition for exponential
        mechanisms"). Of all such pairs of distributions those with both ends alone are hardest to
        hide for each t; the others are post-processing of them. A test between two points has one
        vertex (a, b) beside (0, 1) and (1, 0), with 1 - a = e^t·b and 1 - b = e^(ε-t)·a. A Gaussian
        trade-off curve is convex, so it lies below these chords where it lies below the vertex: the
        pair is μ-GDP for μ = Φ⁻¹(1 - a) + Φ⁻¹(1 - b). With s(x) = log Φ(x)/Φ(-x) the vertex says
        s(x) + s(y) = ε for x = Φ⁻¹(1 - a), y = Φ⁻¹(1 - b). s is odd, and convex for x ≥ 0 (its
        slope φ/(Φ(1 - Φ)) grows there), so x + y is greatest at x = y = s⁻¹(ε/2), also if one of
        them is negative: then ε = s(x) - s(-y) ≥ s(x + y), and s⁻¹(ε) ≤ 2·s⁻¹(ε/2). So the
        mechanism is μ-GDP for ε = 2·s(μ/2), which is what a share of μ² pays for here.

        Not protected: low-order bits of the scores (Ilvento 2020) beyond what 53-bit draws hide.

        Args:
            scores: Of each place (places,), exact.
            share: Part of μ².
            sensitivity: Δ, the most that one row more or less moves any score by.

        Returns:
            The place.

        Raises:
            UsageError: On no scores or such as are not finite, or on what `histograms` refuses.
        """
        check_positive("share", share)
        check_positive("sensitivity", sensitivity)
        # Whoever asks so is wrong whatever the rows are; a score is not told.
        if not len(scores) or not np.isfinite(scores).all():
            raise UsageError("scores: must be finite, one at least; leave out what has none")
        half = self._spend(share) / 2
        epsilon = math.inf if math.isinf(half) else 2 * float(log_ndtr(half) - log_ndtr(-half))
        return self._measurer.choosing(self._what, epsilon, scores, sensitivity)

    def _spend(self, share: float) -> float:
        """μ of a share, taken out."""
        if share > self.left:
            raise UsageError(
                f"{self._what}: share={share:g} is more than {self.left:.3g}, the rest"
            )
        self.left -= share
        return self._mu * math.sqrt(share)


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
