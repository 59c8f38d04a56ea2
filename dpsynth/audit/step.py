"""Step audit: is the noise of single steps as large, and their batches as random, as is claimed?

Scores and bits in, bounds and p-values out. An auditor adds to a step, by a fair coin, one more
record whose clipped gradient is C·u for a unit vector u of its own choice, and writes down the
score ⟨released sum − sum of all other records, u⟩/C. In an honest step that is N(coin, σ²): one
Gaussian mechanism with μ = 1/σ (Nasr et al. 2023, arXiv 2302.07956).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import fft, special, stats
from scipy.spatial import KDTree

from dpsynth.audit.bounds import mu_from_guesses, mu_from_rates
from dpsynth.checks import UsageError, check_fraction, check_positive

__all__ = [
    "Bound",
    "SamplerAudit",
    "StepAudit",
    "audit_sampler",
    "audit_steps",
]

EpsilonOf = Callable[[float], float]

# Halfway between a step without the canary and one with it: where a μ-GDP test errs least. Fixed
# before any score is seen, so nothing is paid for choosing it.
THRESHOLD = 0.5
# A repeated draw repeats in every coordinate; this many tell it from chance.
REPEAT_COORDINATES = 6
# Most distances in time, and in the order of rows, at which dependence is looked for.
LAGS = 200
NEIGHBOURS = 8
# Most batches, and most records, that are compared each with each.
PAIRED = 2000


@dataclass(frozen=True)
class Bound:
    """Lower bound on what a step reveals, and on ε of the training it belongs to.

    Attributes:
        mu: Lower bound on the Gaussian budget μ of one step on its batch.
        epsilon: ε of all steps with noise 1/μ.
    """

    mu: float
    epsilon: float

    @classmethod
    def of(cls, mu: float, epsilon_of: EpsilonOf) -> Bound:
        """Recompose a training whose steps reveal `mu`; nothing shown is ε = 0."""
        return cls(mu, epsilon_of(1 / mu) if mu > 0 else 0.0)

    @property
    def sigma(self) -> float:
        """Upper bound on the noise multiplier; infinite where nothing was shown."""
        return 1 / self.mu if self.mu > 0 else math.inf


# -- reports -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tested:
    """Named p-values under the claim, judged together.

    Attributes:
        p_values: Chance of what was seen, or worse, if the claim is true.
        alpha: Chance that a true claim is flagged at all (Bonferroni over the tests).
    """

    p_values: Mapping[str, float]
    alpha: float

    @property
    def flags(self) -> tuple[str, ...]:
        """Tests that refute the claim."""
        bar = self.alpha / len(self.p_values)
        return tuple(name for name, p in self.p_values.items() if p <= bar)


@dataclass(frozen=True)
class StepAudit(_Tested):
    """What observed steps say of a claimed noise multiplier.

    The bounds take sampling as claimed (`audit_sampler` tests it) and each holds with its own
    confidence; `attainable` is the median of `bound` for a perfect attacker on an honest engine.

    Attributes:
        sigma: Claimed noise multiplier.
        right: Coins guessed right, of `guesses`.
        guesses: Steps observed, all runs together.
        bound: From the guesses; the headline.
        by_rates: From false positives and false negatives apart.
        sure: As `bound`, but above the truth with probability `alpha` at most: beyond the claim it
            refutes it.
        attainable: The bound that an honest engine shows in every second audit of this size.
        rates_attainable: The same of `by_rates`.
        claimed: ε of all steps with the claimed noise.
    """

    sigma: float
    right: int
    guesses: int
    bound: Bound
    by_rates: Bound
    sure: Bound
    attainable: Bound
    rates_attainable: Bound
    claimed: float


@dataclass(frozen=True)
class SamplerAudit(_Tested):
    """What observed batches say of Poisson sampling at the claimed rate.

    Attributes:
        q: Claimed rate.
        batches: Batches observed, all runs together.
        records: Records of a run.
    """

    q: float
    batches: int
    records: int


# -- noise -------------------------------------------------------------------------------------


def audit_steps(
    scores: Float[np.ndarray, "runs steps"],
    present: Bool[np.ndarray, "runs steps"],
    noise: Float[np.ndarray, "runs steps coordinates"],
    *,
    sigma: float,
    epsilon_of: EpsilonOf,
    alpha: float = 1e-3,
    confidence: float = 0.95,
) -> StepAudit:
    """Bound the noise of a training from its steps, and test that it is what was claimed.

    Args:
        scores: ⟨released sum − sum of others, u⟩/C of every step.
        present: Fair coins: whether the canary was in the step.
        noise: The same difference in a few coordinates of every parameter, without the canary.
        sigma: Claimed noise multiplier.
        epsilon_of: ε of the whole training as a function of its noise multiplier.
        alpha: Chance of any flag on an honest engine.
        confidence: Of each lower bound.

    Raises:
        UsageError: On shapes that do not fit, a score that is not finite, or fewer than two steps
            with and two without the canary.
    """
    _check_observed(scores, present, noise)
    check_positive("sigma", sigma)
    check_fraction("alpha", alpha)
    check_fraction("confidence", confidence)
    members, others = scores[present], scores[~present]
    missed, false = int((members <= THRESHOLD).sum()), int((others > THRESHOLD).sum())
    guesses, right = scores.size, scores.size - missed - false
    miss = 1 - confidence
    best = int(stats.binom.median(guesses, stats.norm.cdf(1 / (2 * sigma))))
    rates = mu_from_rates(missed, members.size, false, others.size, alpha=miss)
    slip = float(stats.norm.cdf(-1 / (2 * sigma)))
    usual = [int(stats.binom.median(side.size, slip)) for side in (members, others)]
    honest = mu_from_rates(usual[0], members.size, usual[1], others.size, alpha=miss)
    return StepAudit(
        p_values={
            "guesses": _binomial_above(right, guesses, float(stats.norm.cdf(1 / (2 * sigma)))),
            **_score_tests((scores - present) / sigma, present),
            **_noise_tests(noise / sigma),
        },
        alpha=alpha,
        sigma=sigma,
        right=right,
        guesses=guesses,
        bound=Bound.of(mu_from_guesses(right, guesses, alpha=miss), epsilon_of),
        by_rates=Bound.of(rates, epsilon_of),
        sure=Bound.of(mu_from_guesses(right, guesses, alpha=alpha), epsilon_of),
        attainable=Bound.of(mu_from_guesses(best, guesses, alpha=miss), epsilon_of),
        rates_attainable=Bound.of(honest, epsilon_of),
        claimed=epsilon_of(sigma),
    )


def _check_observed(scores: np.ndarray, present: np.ndarray, noise: np.ndarray) -> None:
    if scores.ndim != 2 or present.shape != scores.shape or noise.shape[:2] != scores.shape:
        raise UsageError(
            f"scores {scores.shape}, present {present.shape} and noise {noise.shape}: must agree "
            "on (runs, steps)"
        )
    if noise.ndim != 3 or not noise.shape[2]:
        raise UsageError(f"noise {noise.shape}: must be (runs, steps, coordinates)")
    if not np.isfinite(scores).all() or not np.isfinite(noise).all():
        raise UsageError("scores and noise must be finite; the audited step released NaN or inf")
    if min(int(present.sum()), int((~present).sum())) < 2 or scores.shape[1] < 4:
        raise UsageError(
            f"{scores.shape[1]} steps, {int(present.sum())} of them with the canary: audit at "
            "least 4 steps, two with it and two without"
        )


def _score_tests(residual: np.ndarray, present: np.ndarray) -> dict[str, float]:
    """p-values of scores less their coin, over σ (runs, steps): standard normal if honest."""
    members, others = residual[present], residual[~present]
    return {
        "contribution": _normal_two_sided(float(members.sum()) / math.sqrt(members.size)),
        "offset": _normal_two_sided(float(others.sum()) / math.sqrt(others.size)),
        "scale": _chi_square(float(np.square(residual).sum()), residual.size),
    }


def _noise_tests(noise: np.ndarray) -> dict[str, float]:
    """p-values of noise over σ (runs, steps, coordinates): independent standard normals if
    honest."""
    runs, coordinates = noise.shape[0], noise.shape[2]
    points = noise.reshape(-1, coordinates)
    sums = np.square(points).sum(0)
    each = [_chi_square(float(total), len(points)) for total in sums]
    tests = {
        "parameters": _least(each),
        "law": float(stats.kstest(points.ravel(), stats.norm.cdf).pvalue),
        "steps": _least(_lag_tests(noise)),
        "repeats": _repeats(points),
    }
    if coordinates > 1:
        tests["coordinates"] = _least(_correlations(points))
    if runs > 1:
        tests["runs"] = _least(_correlations(noise.reshape(runs, -1).T))
    return tests


def _lag_tests(noise: np.ndarray) -> list[float]:
    """p-value of Σ z_t z_{t+k} for each lag k up to half the steps: noise that comes again."""
    runs, steps, coordinates = noise.shape
    centred = noise / max(float(np.sqrt(np.square(noise).mean())), np.finfo(float).tiny)
    spectrum = fft.rfft(centred, n=2 * steps, axis=1)
    together = np.square(np.abs(spectrum)).sum((0, 2))
    sums = fft.irfft(together, n=2 * steps)
    lags = np.arange(1, steps // 2 + 1)
    return [
        _normal_two_sided(float(sums[k]) / math.sqrt(runs * coordinates * (steps - k)))
        for k in lags
    ]


def _repeats(points: np.ndarray) -> float:
    """p-value of the two nearest draws (draws, coordinates): the union bound over all pairs.

    The difference of two standard normal vectors is N(0, 2I), its square over 2 a chi-square.
    """
    chosen = np.linspace(0, points.shape[1] - 1, min(points.shape[1], REPEAT_COORDINATES))
    some = points[:, np.unique(chosen.astype(int))]
    nearest = KDTree(some).query(some, k=2)[0][:, 1].min()
    pairs = len(some) * (len(some) - 1) / 2
    return min(1.0, pairs * float(stats.chi2.cdf(nearest**2 / 2, some.shape[1])))


def _correlations(points: np.ndarray) -> list[float]:
    """p-values of the correlation of every two columns of `points` (draws, columns)."""
    draws, columns = points.shape
    spread = points.std(0)
    if not spread.all():
        return [0.0]
    r = np.clip(np.corrcoef(points.T), -1, 1)[np.triu_indices(columns, 1)]
    # Exact for normal columns: t = r √((n−2)/(1−r²)).
    with np.errstate(divide="ignore"):
        t = np.abs(r) * np.sqrt((draws - 2) / (1 - r**2))
    return list(2 * stats.t.sf(t, draws - 2))


# -- batches -----------------------------------------------------------------------------------


def audit_sampler(
    bits: Bool[np.ndarray, "runs steps records"],
    *,
    q: float,
    groups: Int[np.ndarray, " records"] | None = None,
    alpha: float = 1e-3,
) -> SamplerAudit:
    """Test that every record entered every batch by itself with probability q.

    Args:
        bits: Whether a record was in a step's batch.
        q: Claimed rate.
        groups: Category of each record that sampling could have depended on.
        alpha: Chance of any flag on Poisson sampling.

    Raises:
        UsageError: On shapes that do not fit, or a rate outside (0, 1).
    """
    if bits.ndim != 3 or bits.shape[1] < 4 or bits.shape[2] < 2:
        raise UsageError(f"bits {bits.shape}: must be (runs, at least 4 steps, at least 2 records)")
    if groups is not None and groups.shape != bits.shape[2:]:
        raise UsageError(f"groups {groups.shape}: must be one for each of {bits.shape[2]} records")
    check_fraction("q", q)
    check_fraction("alpha", alpha)
    runs, steps, records = bits.shape
    flat = bits.reshape(-1, records).astype(np.float32)
    tests = {
        "rate": float(stats.binomtest(int(bits.sum()), bits.size, q).pvalue),
        "batch sizes": _dispersion(bits.sum(2), records, q),
        "records": _dispersion(bits.sum(1), steps, q),
        "steps": _least(_lagged(bits.astype(np.float32), q)),
        "neighbours": _least(_lagged(bits.swapaxes(1, 2).astype(np.float32), q, NEIGHBOURS)),
        "batches again": _together(flat, q),
        "records together": _together(flat.T, q),
    }
    if groups is not None:
        tests |= _group_tests(bits, q, groups)
    return SamplerAudit(tests, alpha, q, runs * steps, records)


def _dispersion(counts: np.ndarray, trials: int, q: float) -> float:
    """p-value of Σ (x − nq)²/(nq(1−q)) over independent binomial counts, on either side.

    A gamma law with the sum's exact mean and variance: a chi-square corrected for small nq.
    """
    variance = trials * q * (1 - q)
    total = float((np.square(counts - trials * q) / variance).sum())
    spread = 2 + (1 - 6 * q * (1 - q)) / variance
    return _gamma_two_sided(total / spread, counts.size / spread)


def _lagged(bits: np.ndarray, q: float, most: int = LAGS) -> list[float]:
    """p-values of Σ (x_t − q)(x_{t+k} − q) along the second axis, one a lag k."""
    along = bits.shape[1]
    most = min(most, along // 2, max(2, math.ceil(2 / q)))
    centred = bits - np.float32(q)
    found = []
    for lag in range(1, most + 1):
        left, right = centred[:, :-lag], centred[:, lag:]
        total = float(np.einsum("rti,rti->", left, right, dtype=np.float64))
        found.append(_product_tail(total, left.size, q))
    return found


def _product_tail(total: float, terms: int, q: float) -> float:
    """Two-sided p-value of a sum of products of two centred bits.

    Products that share a bit are uncorrelated and have no third moment in common, so variance and
    skewness are those of independent ones: a shifted gamma law (Pearson III), half a count nearer
    to 0 because the sum moves in whole counts.
    """
    spread = q * (1 - q) * math.sqrt(terms)
    skew = (1 - 2 * q) ** 2 / (q * (1 - q) * math.sqrt(terms))
    z = math.copysign(max(abs(total) - 0.5, 0.0), total) / spread
    if skew < 1e-6:
        return _normal_two_sided(z)
    shape = 4 / skew**2
    return _gamma_two_sided(shape + z * math.sqrt(shape), shape)


def _together(rows: np.ndarray, q: float) -> float:
    """p-value of the largest overlap of any two rows of bits: binomial, times the pairs."""
    chosen = _some(rows)
    overlap = chosen @ chosen.T
    np.fill_diagonal(overlap, 0)
    pairs = len(chosen) * (len(chosen) - 1) / 2
    return min(1.0, pairs * float(stats.binom.sf(overlap.max() - 1, rows.shape[1], q**2)))


def _some(rows: np.ndarray) -> np.ndarray:
    """At most `PAIRED` rows: half of them the first, half spread evenly."""
    if len(rows) <= PAIRED:
        return rows
    spread = np.linspace(0, len(rows) - 1, PAIRED // 2).astype(int)
    return rows[np.union1d(np.arange(PAIRED // 2), spread)]


def _group_tests(bits: np.ndarray, q: float, groups: np.ndarray) -> dict[str, float]:
    """Does the rate, or who shares a batch with whom, follow the group?"""
    rates, sizes = [], []
    for group in np.unique(groups):
        inside = bits[..., groups == group]
        rates.append(float(stats.binomtest(int(inside.sum()), inside.size, q).pvalue))
        sizes.append(_dispersion(inside.sum(2), inside.shape[2], q))
    return {"group rates": _least(rates), "group sizes": _least(sizes)}


# -- p-values ----------------------------------------------------------------------------------


def _normal_two_sided(z: float) -> float:
    return float(2 * special.ndtr(-abs(z)))


def _gamma_two_sided(value: float, shape: float) -> float:
    below = special.gammainc(shape, max(value, 0.0))
    return min(1.0, 2 * float(min(below, special.gammaincc(shape, max(value, 0.0)))))


def _chi_square(total: float, freedom: int) -> float:
    return _gamma_two_sided(total / 2, freedom / 2)


def _binomial_above(count: int, trials: int, rate: float) -> float:
    return float(stats.binom.sf(count - 1, trials, rate))


def _least(p_values: Sequence[float]) -> float:
    """The least p-value, corrected for how many there are (Bonferroni)."""
    return min(1.0, min(p_values) * len(p_values))
