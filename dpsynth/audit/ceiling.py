"""Ceiling: the best ROC curve that any membership attack can have under a privacy guarantee."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from dpsynth.checks import UsageError, check_positive

__all__ = ["Ceiling"]

# Beyond this exponent every line is above 1 already at the least positive FPR of the grid.
MAX_EXPONENT = 700.0
# Accountants return a vanishing δ as a tiny negative number; reading it as 0 loosens the bound.
ROUNDING = 1e-9
# Entries of one (pairs, points) array.
CHUNK = 1 << 22


def _grid() -> np.ndarray:
    """FPR grid (points,), strictly increasing from 0 to 1, log-spaced near both ends."""
    tails = 10.0 ** np.linspace(-12, -2, 2001)
    whole = np.linspace(0.0, 1.0, 10_001)
    # Rounded, so that 0.01 of the one grid and 0.01 of the other are one point.
    return np.unique(np.concatenate([whole, tails, 1 - tails]).round(15))


@dataclass(frozen=True, eq=False)
class Ceiling:
    """Upper bound on an attack's TPR at each FPR.

    The curve is concave, so it also bounds an attack whose scores are pooled over many records
    and cut at one common threshold (Jensen). Between grid points the value of the next point
    holds, so every number read off is on the safe (upper) side.

    Attributes:
        fpr: (points,) strictly increasing from 0 to 1.
        tpr: (points,) non-decreasing, in [0, 1].
    """

    fpr: np.ndarray
    tpr: np.ndarray

    def __post_init__(self) -> None:
        fpr, tpr = self.fpr, self.tpr
        if fpr.ndim != 1 or fpr.shape != tpr.shape or len(fpr) < 2:
            raise UsageError(
                f"ceiling: fpr {fpr.shape} and tpr {tpr.shape} must be two equally long vectors"
            )
        if fpr[0] != 0 or fpr[-1] != 1 or not (np.diff(fpr) > 0).all():
            raise UsageError("ceiling: fpr must increase strictly from 0 to 1")
        if not ((tpr >= 0) & (tpr <= 1)).all() or not (np.diff(tpr) >= 0).all():
            raise UsageError("ceiling: tpr must not decrease and must lie in [0, 1]")

    @property
    def auc(self) -> float:
        """Largest area under an attack's ROC curve (upper sum over the grid)."""
        return float(np.sum(np.diff(self.fpr) * self.tpr[1:]))

    def tpr_at(self, fpr: float) -> float:
        """Largest true-positive rate at false-positive rate `fpr` in [0, 1]."""
        if not 0 <= fpr <= 1:
            raise UsageError(f"fpr={fpr}: must lie in 0..1")
        return float(self.tpr[np.searchsorted(self.fpr, fpr)])

    @classmethod
    def from_profile(cls, epsilons: Sequence[float], deltas: Sequence[float]) -> Ceiling:
        """Ceiling of a mechanism that is (ε, δ(ε))-DP at every listed ε.

        f(α) = sup_ε max{0, 1 − δ(ε) − e^ε α, e^{−ε}(1 − δ(ε) − α)} (Dong, Roth & Su 2019,
        from the dual to the primal form) and TPR = 1 − f(FPR). Each pair bounds by itself, so a
        finite or pessimistic profile leaves a looser but valid ceiling.

        Args:
            epsilons: (pairs,) finite, at least 0, in any order.
            deltas: (pairs,) δ at each ε, in [0, 1].

        Raises:
            UsageError: On unequal lengths, no pair, or a value out of range.
        """
        epsilon = np.asarray(epsilons, dtype=float)
        delta = np.asarray(deltas, dtype=float)
        if epsilon.ndim != 1 or epsilon.shape != delta.shape or not len(epsilon):
            raise UsageError(
                f"profile: epsilons {epsilon.shape} and deltas {delta.shape} must be two equally "
                "long lists of at least one value"
            )
        if not (np.isfinite(epsilon) & (epsilon >= 0)).all():
            raise UsageError("profile: every epsilon must be finite and at least 0")
        if not ((delta >= -ROUNDING) & (delta <= 1)).all():
            raise UsageError("profile: every delta must lie in 0..1")
        delta = np.maximum(delta, 0.0)
        fpr = _grid()
        tpr = np.ones_like(fpr)
        step = max(1, CHUNK // len(fpr))
        for start in range(0, len(epsilon), step):
            part = slice(start, start + step)
            tpr = np.minimum(tpr, _least_line(fpr, epsilon[part, None], delta[part, None]))
        return cls(fpr, np.maximum.accumulate(tpr))

    @classmethod
    def from_epsilon_delta(cls, epsilon: float, delta: float) -> Ceiling:
        """Ceiling when one pair is all that is known; AUC = 1 − (1 − δ)²/(1 + e^ε).

        ε = ∞ gives `none()`.
        """
        if epsilon == math.inf:
            return cls.none()
        return cls.from_profile([epsilon], [delta])

    @classmethod
    def from_gdp(cls, mu: float) -> Ceiling:
        """Ceiling of a μ-GDP mechanism: TPR = Φ(Φ⁻¹(FPR) + μ), AUC = Φ(μ/√2) (Dong et al. 2019).

        Not for subsampled mechanisms, whose μ is a limit and no bound; use `from_profile` there.
        """
        check_positive("mu", mu, allow_inf=True)
        if mu == math.inf:
            return cls.none()
        fpr = _grid()
        return cls(fpr, special.ndtr(special.ndtri(fpr) + mu))

    @classmethod
    def none(cls) -> Ceiling:
        """No guarantee at all: TPR = 1 everywhere."""
        return cls(np.array([0.0, 1.0]), np.ones(2))


def _least_line(fpr: np.ndarray, epsilon: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """1 − f at `fpr` (points,) over the pairs (pairs, 1), as lines in FPR to spare cancellation."""
    steep = delta + np.exp(np.minimum(epsilon, MAX_EXPONENT)) * fpr
    flat = 1 - np.exp(-epsilon) * (1 - delta - fpr)
    return np.minimum(steep, flat).min(axis=0).clip(0.0, 1.0)
