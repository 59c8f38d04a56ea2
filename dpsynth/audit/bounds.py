"""Bounds: the least ε that is not refuted by how well somebody guessed.

Numbers in, bounds out. A claim is known by its trade-off curve, the least false-negative rate of
any test at each false-positive rate (Dong, Roth & Su 2022), and a claim at other noise scales by a
`Family` of curves; accountants are given as callables.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special, stats
from scipy.optimize import brentq

from dpsynth.checks import UsageError, check_count, check_fraction, check_positive

__all__ = [
    "Curve",
    "Errors",
    "Family",
    "Form",
    "LowerBound",
    "attainable",
    "clopper_pearson",
    "curve_of_profile",
    "epsilon_from_family",
    "epsilon_from_rates",
    "epsilon_of_mu",
    "gaussian",
    "gaussian_curve",
    "gaussian_family",
    "lower_bounds",
    "mu_from_guesses",
    "mu_from_rates",
    "noise",
    "optimal_levels",
    "upper_rate",
]

# Least false-negative rate at each false-positive rate: not rising, convex, and symmetric (its own
# inverse), as add and remove together make it.
Curve = Callable[[np.ndarray], np.ndarray]

# Octaves of noise, to either side of the claim, in which the truth is looked for.
_REACH = 10
# Thresholds that are compared on the half that chooses, and false-positive rates that a perfect
# attacker compares.
_CANDIDATES, _LEVELS = 64, 48


# -- from counts of errors ---------------------------------------------------------------------


def upper_rate(errors: int, trials: int, alpha: float) -> float:
    """Clopper–Pearson: the largest rate not refuted, at level `alpha`, by `errors` of `trials`."""
    check_fraction("alpha", alpha)
    check_count("trials", trials)
    check_count("errors", errors, least=0)
    if errors > trials:
        raise UsageError(f"errors={errors}: more than trials={trials}")
    if errors == trials:
        return 1.0
    return float(special.betaincinv(errors + 1, trials - errors, 1 - alpha))


def epsilon_from_rates(
    missed: int, members: int, false: int, others: int, *, delta: float, alpha: float = 0.05
) -> float:
    """Lower bound on ε of any (ε, δ)-DP mechanism: ln[(1 − FNR⁺ − δ)/FPR⁺], at least 0.

    The rule that made the errors must have been fixed on other observations.

    Args:
        missed: Observations with the canary that were taken for ones without, of `members`.
        false: Observations without it that were taken for ones with, of `others`.
        delta: δ of the claim.
        alpha: Chance that the bound lies above the true ε; half of it for each rate.
    """
    fnr = upper_rate(missed, members, alpha / 2)
    fpr = upper_rate(false, others, alpha / 2)
    gained = 1 - fnr - delta
    return max(0.0, math.log(gained / fpr)) if gained > 0 else 0.0


def mu_from_rates(
    missed: int, members: int, false: int, others: int, *, alpha: float = 0.05
) -> float:
    """Lower bound on μ of a μ-GDP mechanism: Φ⁻¹(1 − FPR⁺) − Φ⁻¹(FNR⁺), at least 0 (Nasr et al.
    2023, §4.2). Arguments as in `epsilon_from_rates`."""
    fnr = upper_rate(missed, members, alpha / 2)
    fpr = upper_rate(false, others, alpha / 2)
    return max(0.0, float(stats.norm.isf(fpr) - stats.norm.ppf(fnr)))


def mu_from_guesses(right: int, guesses: int, *, alpha: float = 0.05) -> float:
    """Lower bound on μ from guesses of fair coins, of which `right` came true, at least 0.

    Whatever happened before, a guess at a fair coin through a μ-GDP mechanism comes true with
    probability Φ(μ/2) at most, so the number of right ones is dominated by a binomial: no scores
    need be independent or Gaussian. Both kinds of error share one count, hence one interval where
    `mu_from_rates` needs two.
    """
    wrong = upper_rate(guesses - right, guesses, alpha)
    return max(0.0, -2 * float(stats.norm.ppf(wrong)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """ε of μ-GDP at δ: the root of Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) = δ (Balle & Wang 2018)."""
    check_fraction("delta", delta)
    if mu < 0:
        raise UsageError(f"mu={mu}: must be at least 0")
    if mu == 0:
        return 0.0

    def excess(epsilon: float) -> float:
        tail = math.exp(epsilon + float(special.log_ndtr(-epsilon / mu - mu / 2)))
        return float(special.ndtr(-epsilon / mu + mu / 2)) - tail - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * (1 + math.sqrt(2 * math.log(1 / delta)))
    return float(brentq(excess, 0.0, high, xtol=1e-12))


# -- claims ------------------------------------------------------------------------------------


def gaussian_curve(mu: float) -> Curve:
    """Trade-off of μ-GDP: f(α) = Φ(Φ⁻¹(1 − α) − μ)."""
    check_positive("mu", mu)

    def curve(fpr: np.ndarray) -> np.ndarray:
        return special.ndtr(-special.ndtri(np.asarray(fpr, dtype=float)) - mu)

    return curve


def curve_of_profile(
    epsilons: Float[np.ndarray, " pairs"], deltas: Float[np.ndarray, " pairs"]
) -> Curve:
    """Trade-off of whatever is (ε, δ(ε))-DP at every pair: f(α) = sup_ε max{0, 1 − δ − e^ε α,
    e^−ε (1 − δ − α)} (Dong, Roth & Su 2022). Fewer pairs only make it lower, which refutes less.

    Raises:
        UsageError: On unequal lengths, or an ε or a δ that cannot be.
    """
    epsilon, delta = np.asarray(epsilons, dtype=float), np.asarray(deltas, dtype=float)
    if epsilon.ndim != 1 or epsilon.shape != delta.shape or not len(epsilon):
        raise UsageError(
            f"profile: epsilons {epsilon.shape} and deltas {delta.shape} must be two equally long "
            "lists of at least one value"
        )
    if not ((epsilon >= 0) & (epsilon < 700) & (delta >= 0) & (delta <= 1)).all():
        raise UsageError("profile: every epsilon must lie in 0..700 and every delta in 0..1")
    steep, flat, rest = np.exp(epsilon), np.exp(-epsilon), 1 - delta

    def curve(fpr: np.ndarray) -> np.ndarray:
        alpha = np.asarray(fpr, dtype=float)[..., None]
        lines = np.maximum(rest - steep * alpha, flat * (rest - alpha))
        return np.maximum(0.0, lines.max(axis=-1))

    return curve


@dataclass(frozen=True, eq=False)
class Family:
    """A claim at every noise scale s, of which s = 1 is the claim itself.

    What is tried is kept, since a curve may take an accountant a second.

    Attributes:
        curve: Trade-off with noise s times that of the claim; rises with s.
        epsilon: ε with that noise; falls with s.
        steps: Scales that are tried within an octave of noise: a bound is looser by one of them at
            most, and never too tight.
    """

    curve: Callable[[float], Curve]
    epsilon: Callable[[float], float]
    steps: int = 32

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        object.__setattr__(self, "curve", functools.cache(self.curve))
        object.__setattr__(self, "epsilon", functools.cache(self.epsilon))

    @classmethod
    def of_profiles(
        cls,
        profile: Callable[[float], tuple[np.ndarray, np.ndarray]],
        epsilon: Callable[[float], float],
        steps: int = 32,
    ) -> Family:
        """The family whose curve at scale s is `curve_of_profile` of `profile(s)`, ε and δ(ε)."""
        return cls(lambda s: curve_of_profile(*profile(s)), epsilon, steps)

    def least_refuted(self, refuted: Callable[[Curve], bool]) -> float:
        """The least scale (to one step, from above) whose curve is refuted; inf if none is."""
        end = _REACH * self.steps

        def is_refuted(number: int) -> bool:
            return refuted(self.curve(2.0 ** (number / self.steps)))

        # From the claim outwards, then by halves: always through the same scales.
        width, high = self.steps, 0
        if is_refuted(0):
            while high > -end and is_refuted(high - width):
                high -= width
        else:
            while high < end and not is_refuted(high + width):
                high += width
            high += width
        if high > end:
            return math.inf
        low = high - width
        while high - low > 1 and high > -end:
            middle = (low + high) // 2
            low, high = (low, middle) if is_refuted(middle) else (middle, high)
        return 2.0 ** (high / self.steps)

    def bound(self, refuted: Callable[[Curve], bool]) -> float:
        """Lower bound on ε: that of the least refuted scale; 0 if none is refuted."""
        scale = self.least_refuted(refuted)
        return 0.0 if math.isinf(scale) else self.epsilon(scale)


def gaussian_family(delta: float) -> Family:
    """μ-GDP, with noise s = 1/μ."""
    return Family(
        lambda s: gaussian_curve(1 / s), lambda s: epsilon_of_mu(1 / s, delta), steps=1024
    )


def epsilon_from_family(
    missed: int, members: int, false: int, others: int, family: Family, *, alpha: float = 0.05
) -> float:
    """Lower bound on ε of a mechanism that is known but for its noise, such as DP-SGD with q and T.

    The true rates lie below FPR⁺ and FNR⁺ and no test is better than the curve, so noise of which
    f(FPR⁺) > FNR⁺ is too much to be true. The least such noise is an upper bound on the true one
    (to one step of the family), and its ε a lower bound. Arguments as in `epsilon_from_rates`.
    """
    fnr = upper_rate(missed, members, alpha / 2)
    fpr = upper_rate(false, others, alpha / 2)
    return family.bound(lambda curve: float(curve(np.array([fpr]))[0]) > fnr)


# -- from scores -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """What a rule got wrong: `missed` of `members` (with the canary) and `false` of `others`."""

    missed: int
    members: int
    false: int
    others: int

    @classmethod
    def at(cls, threshold: float, inside: np.ndarray, outside: np.ndarray) -> Errors:
        """Those of the rule that says "with" above `threshold`."""
        missed, false = (inside <= threshold).sum(), (outside > threshold).sum()
        return cls(int(missed), inside.size, int(false), outside.size)


# ε from errors, at a level α.
Form = Callable[[Errors, float], float]


def clopper_pearson(delta: float) -> Form:
    """Form that holds for any (ε, δ)-DP mechanism (`epsilon_from_rates`)."""
    return lambda e, alpha: epsilon_from_rates(
        e.missed, e.members, e.false, e.others, delta=delta, alpha=alpha
    )


def gaussian(delta: float) -> Form:
    """Form for a Gaussian mechanism (`mu_from_rates`); no bound for subsampled DP-SGD."""
    return lambda e, alpha: epsilon_of_mu(
        mu_from_rates(e.missed, e.members, e.false, e.others, alpha=alpha), delta
    )


def noise(family: Family) -> Form:
    """Form for a mechanism that is known but for its noise (`epsilon_from_family`)."""
    return lambda e, alpha: epsilon_from_family(
        e.missed, e.members, e.false, e.others, family, alpha=alpha
    )


@dataclass(frozen=True)
class LowerBound:
    """A lower bound on ε and what to read it by.

    Attributes:
        epsilon: The bound, valid with the stated confidence.
        attainable: Median of what a perfect attack on a mechanism with exactly the claimed
            guarantee shows with as many observations: a bound near it is all there is to be had.
        threshold: Score above which the canary was said to be in.
        errors: Made by that rule on the observations that the bound is from.
        alpha: Level of that one bound, below 1 − confidence where several thresholds were tried.
    """

    epsilon: float
    attainable: float
    threshold: float
    errors: Errors
    alpha: float


def lower_bounds(
    inside: Float[np.ndarray, " members"],
    outside: Float[np.ndarray, " others"],
    forms: Mapping[str, Form],
    claim: Curve,
    rng: np.random.Generator,
    *,
    thresholds: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> dict[str, LowerBound]:
    """Lower bounds on ε from scores of independent outcomes, each beside what was attainable.

    Args:
        inside: Scores of outcomes with the canary, higher for "with".
        outside: Scores of outcomes without it.
        forms: Bounds by name: `clopper_pearson`, `gaussian`, `noise`.
        claim: Trade-off of the claimed guarantee.
        rng: Of the halves and of the simulated attacks.
        thresholds: Thresholds fixed before any score was seen; of several the best is reported, at
            a level divided by their number (Bonferroni). `None` chooses one for each form on a
            random half of the scores and takes the bound from the other half.
        confidence: Of each bound by itself.

    Raises:
        UsageError: On scores that are not finite or too few, or on no threshold or no form.
    """
    for name, scores in (("inside", inside), ("outside", outside)):
        if scores.ndim != 1 or not np.isfinite(scores).all():
            raise UsageError(f"{name} {scores.shape}: must be one row of finite scores")
        check_count(f"scores {name}", scores.size, least=1 if thresholds is not None else 2)
    check_fraction("confidence", confidence)
    if not forms or (thresholds is not None and not len(thresholds)):
        raise UsageError("forms and thresholds: give at least one of each")
    alpha, found = 1 - confidence, {}
    halves = _halves(inside, outside, rng) if thresholds is None else None
    for name, form in forms.items():
        if halves is None:
            best = _best_of(form, thresholds or (), inside, outside, alpha)
        else:
            best = _chosen(form, *halves, alpha)
        shown = attainable(form, claim, inside.size, outside.size, rng, confidence=confidence)
        found[name] = LowerBound(best[0], shown, *best[1:])
    return found


_Found = tuple[float, float, Errors, float]


def _best_of(
    form: Form, thresholds: Sequence[float], inside: np.ndarray, outside: np.ndarray, alpha: float
) -> _Found:
    level = alpha / len(thresholds)
    made = [(float(t), Errors.at(t, inside, outside)) for t in thresholds]
    return max(((form(e, level), t, e, level) for t, e in made), key=lambda one: one[0])


def _halves(
    inside: np.ndarray, outside: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The half of each that chooses, then the half that counts."""
    first, second = (s[rng.permutation(s.size)] for s in (inside, outside))
    a, b = first.size // 2, second.size // 2
    return first[:a], second[:b], first[a:], second[b:]


def _chosen(
    form: Form,
    inside: np.ndarray,
    outside: np.ndarray,
    counted_in: np.ndarray,
    counted_out: np.ndarray,
    alpha: float,
) -> _Found:
    levels = np.linspace(0, 1, _CANDIDATES + 2)[1:-1]
    candidates = np.unique(np.quantile(np.concatenate([inside, outside]), levels))

    def merit(threshold: float) -> tuple[float, float]:
        e = Errors.at(threshold, inside, outside)
        # Where no threshold shows anything, the one that guesses best.
        return form(e, alpha), -e.missed / e.members - e.false / e.others

    threshold = float(max(candidates, key=merit))
    errors = Errors.at(threshold, counted_in, counted_out)
    return form(errors, alpha), threshold, errors, alpha


def optimal_levels(
    claim: Curve, present: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, " observations"]:
    """What the best test of a mechanism with this very trade-off sees of each observation: the
    least false-positive rate at which it says "with".

    Uniform without the canary; with it the chance of a level up to α is 1 − f(α).
    """
    grid = np.concatenate([[0.0], np.geomspace(1e-12, 0.01, 2000), np.linspace(0.01, 1, 4000)[1:]])
    reached = np.maximum.accumulate(1 - claim(grid))
    reached[-1] = 1.0
    uniform = rng.random(present.shape)
    return np.where(present, np.interp(uniform, reached, grid), uniform)


def attainable(
    form: Form,
    claim: Curve,
    members: int,
    others: int,
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    times: int = 400,
) -> float:
    """Median of what `form` shows when a perfect attacker faces exactly the claimed guarantee.

    The attacker's test lies on the trade-off curve, at the point that suits the form best on
    average, fixed in advance; `times` audits are simulated.

    Args:
        form: The bound.
        claim: Trade-off curve of the mechanism.
        members: Outcomes with the canary.
        others: Outcomes without it.
        rng: Of the simulated errors.
        confidence: Of the bound.
        times: Simulated audits.
    """
    check_count("members", members)
    check_count("others", others)
    check_count("times", times)
    alpha = 1 - confidence
    levels = np.concatenate(
        [np.geomspace(0.25 / others, 0.1, _LEVELS // 2), np.linspace(0.1, 0.9, _LEVELS // 2)[1:]]
    )
    rates = np.column_stack([levels, claim(levels)]).clip(0.0, 1.0)

    def typical(rate: np.ndarray) -> float:
        missed, false = np.rint([rate[1] * members, rate[0] * others]).astype(int)
        return form(Errors(int(missed), members, int(false), others), alpha)

    fpr, fnr = max(rates, key=typical)
    drawn = zip(
        rng.binomial(members, fnr, times).tolist(),
        rng.binomial(others, fpr, times).tolist(),
        strict=True,
    )
    once = functools.cache(lambda m, f: form(Errors(m, members, f, others), alpha))
    return float(np.median([once(m, f) for m, f in drawn]))
