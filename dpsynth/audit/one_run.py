"""One-run audit: a lower bound on ε from one training with many canaries.

Each of m canaries enters by a fair coin of the auditor's, who guesses r of the coins from whatever
the training released. Two bounds: for any (ε, δ) claim (Steinke, Nasr & Jagielski 2023, arXiv
2305.08846), and for a claim that is a trade-off curve (Mahloujifar, Melis & Chaudhuri 2024, arXiv
2410.22235). Neither needs canaries to be independent of each other in what they do.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special, stats

from dpsynth.audit.bounds import Curve, Family, optimal_levels
from dpsynth.checks import UsageError, check_count, check_fraction, check_positive

__all__ = [
    "OneRunAudit",
    "OneRunBound",
    "attainable_right",
    "audit_one_run",
    "best_guesses",
    "epsilon_from_guesses",
    "epsilon_from_guesses_fdp",
    "guess",
    "guess_p_value",
    "refutes",
]

# Guesses of m coins that are compared, as parts of m, before any score is seen.
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
_MOST_EPSILON = 500.0


def guess_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Chance, at most, that `right` or more of `guesses` come true under (ε, δ)-DP.

    P[Bin(r, q) ≥ v] + 2mδ · max_i P[v > Bin(r, q) ≥ v − i]/i with q = 1/(1 + e^−ε), i from 1 to v
    (Steinke et al. 2023, theorem 5.2 and algorithm of appendix D).

    Args:
        canaries: m, coins thrown.
        guesses: r, coins guessed; the rest are left open.
        right: v, guesses that came true.
        epsilon: ε of the claim.
        delta: δ of the claim.

    Raises:
        UsageError: On counts that cannot be, or an ε or a δ that cannot be.
    """
    _check_counts(canaries, guesses, right)
    if not 0 <= epsilon < np.inf or not 0 <= delta <= 1:
        raise UsageError(f"epsilon={epsilon}, delta={delta}: must be at least 0, and δ at most 1")
    rate = float(special.expit(epsilon))
    above = float(stats.binom.sf(right - 1, guesses, rate))
    if delta == 0 or right == 0:
        return min(1.0, above)
    below = np.arange(1, right + 1)
    mass = np.cumsum(stats.binom.pmf(right - below, guesses, rate))
    return float(min(1.0, above + 2 * canaries * delta * (mass / below).max()))


def epsilon_from_guesses(
    canaries: int, guesses: int, right: int, *, delta: float, alpha: float = 0.05
) -> float:
    """Lower bound on ε of any (ε, δ)-DP training: the largest ε with a p-value up to `alpha`.

    By bisection, from below by 1e-9; 0 where even ε = 0 is not refuted. Arguments as in
    `guess_p_value`; `alpha` is the chance that the bound lies above the true ε.
    """
    check_fraction("alpha", alpha)
    low, high = 0.0, 1.0
    if guess_p_value(canaries, guesses, right, 0.0, delta) > alpha:
        return 0.0
    while guess_p_value(canaries, guesses, right, high, delta) <= alpha:
        low, high = high, 2 * high
        if high > _MOST_EPSILON:
            return low
    while high - low > 1e-9:
        middle = (low + high) / 2
        refuted = guess_p_value(canaries, guesses, right, middle, delta) <= alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


def refutes(curve: Curve, canaries: int, guesses: int, right: int, *, alpha: float = 0.05) -> bool:
    """Whether `right` or more of `guesses` have a chance below `alpha` under a trade-off curve f.

    Let p_j be the chance of exactly j right ones, R_i = Σ_{j≥i} j p_j/m the share of canaries that
    are guessed right then, H_i = Σ_{j≥i} (r − j) p_j/m that of those guessed wrong. Turning one
    coin makes of a right guess among i a wrong one among i − 1, so H_{i−1} ≥ f(1 − R_i) for a
    symmetric f, averaged over coins and canaries since f is convex (Mahloujifar et al. 2024,
    theorem 9 and algorithm 3). From P[j ≥ v] = α the least R and H follow downwards; more than all
    of R_0 + H_0 = r/m is a contradiction.

    Args:
        curve: Trade-off of the claim between tables that differ in one record.
        canaries: m, coins thrown.
        guesses: r, coins guessed.
        right: v, guesses that came true.
        alpha: Level of the test.

    Raises:
        UsageError: On counts or a level that cannot be.
    """
    _check_counts(canaries, guesses, right)
    check_fraction("alpha", alpha)
    good, bad = alpha * right / canaries, alpha * (guesses - right) / canaries
    whole = guesses / canaries * (1 + 1e-12)  # what rounds to all of it is no contradiction
    for i in range(right - 1, -1, -1):
        if good > 1 or good + bad > whole:
            return True
        least = float(curve(np.array([1 - good]))[0])
        if least <= bad:
            return False  # and so it stays: neither changes from here on
        good += i / (guesses - i) * (least - bad)
        bad = least
    return good + bad > whole


def epsilon_from_guesses_fdp(
    canaries: int, guesses: int, right: int, family: Family, *, alpha: float = 0.05
) -> float:
    """Lower bound on ε of a training that is known but for its noise: ε of the least noise whose
    trade-off curve is refuted (`refutes`); 0 where none is. Other arguments as there."""
    _check_counts(canaries, guesses, right)
    check_fraction("alpha", alpha)
    if 2 * right <= guesses:  # no better than coins: no curve is refuted
        return 0.0
    return family.bound(lambda f: refutes(f, canaries, guesses, right, alpha=alpha))


# -- guessing ----------------------------------------------------------------------------------


def guess(scores: Float[np.ndarray, " canaries"], guesses: int) -> Int[np.ndarray, " canaries"]:
    """Guess the coins with the most telling scores: 1 for the upper half of `guesses`, −1 for the
    lower, 0 for those left open. Ties go by position, which no coin depends on."""
    check_count("guesses", guesses)
    if scores.ndim != 1 or not np.isfinite(scores).all():
        raise UsageError(f"scores {scores.shape}: must be one row of finite scores")
    if guesses > scores.size:
        raise UsageError(f"guesses={guesses}: more than canaries={scores.size}")
    order = np.argsort(-scores, kind="stable")
    said = np.zeros(scores.size, dtype=int)
    said[order[: (guesses + 1) // 2]] = 1
    said[order[scores.size - guesses // 2 :]] = -1
    return said


def _right(scores: np.ndarray, coins: np.ndarray, guesses: int) -> int:
    said = guess(scores, guesses)
    return int(((said > 0) & coins).sum() + ((said < 0) & ~coins).sum())


def attainable_right(
    claim: Curve, canaries: int, guesses: int, rng: np.random.Generator, *, times: int = 200
) -> int:
    """Median of right guesses of a perfect attacker, where every canary faces a mechanism of its
    own with this very trade-off; from `times` simulated trainings. Every bound grows with the
    number of right guesses, so this gives its median too."""
    _check_counts(canaries, guesses, 0)
    check_count("times", times)
    return _typical(claim, canaries, [guesses], rng, times)[guesses]


def _typical(
    claim: Curve, canaries: int, choices: list[int], rng: np.random.Generator, times: int
) -> dict[int, int]:
    """Median of right guesses by their number."""
    seen: dict[int, list[int]] = {number: [] for number in choices}
    for _ in range(times):
        coins = rng.random(canaries) < 0.5
        scores = -optimal_levels(claim, coins, rng)
        for number in choices:
            seen[number].append(_right(scores, coins, number))
    return {number: int(np.median(counts)) for number, counts in seen.items()}


def best_guesses(
    form: Callable[[int, int, int, float], float],
    claim: Curve,
    canaries: int,
    rng: np.random.Generator,
    *,
    confidence: float = 0.95,
    times: int = 100,
) -> tuple[int, float]:
    """The number of guesses at which a perfect attack on the claim shows most, and what it shows.

    It depends on the claim and m alone, not on any score, so nothing is paid for the choice.

    Args:
        form: ε from canaries, guesses, right ones and a level.
        claim: Trade-off curve of the claim.
        canaries: m.
        rng: Of the simulated trainings.
        confidence: Of the bound.
        times: Simulated trainings.
    """
    check_count("canaries", canaries)
    check_count("times", times)
    choices = sorted({max(1, round(share * canaries)) for share in _SHARES})
    typical = _typical(claim, canaries, choices, rng, times)
    shown = {r: form(canaries, r, right, 1 - confidence) for r, right in typical.items()}
    best = max(choices, key=lambda r: (shown[r], r))
    return best, shown[best]


# -- audit -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneRunBound:
    """One form's lower bound.

    Attributes:
        guesses: Coins guessed; fixed before scores were seen.
        right: Guesses that came true.
        epsilon: Lower bound on ε.
        attainable: Median of that bound for a perfect attack on exactly what is claimed.
    """

    guesses: int
    right: int
    epsilon: float
    attainable: float


@dataclass(frozen=True)
class OneRunAudit:
    """What one training with canaries says of its ε.

    Attributes:
        kind: What a canary was.
        canaries: Coins thrown, m.
        claimed: ε of what the canaries went through.
        delta: Its δ.
        confidence: Of each bound by itself.
        any: For any (ε, δ)-DP training (Steinke et al. 2023).
        fdp: For a training known but for its noise (Mahloujifar et al. 2024).
    """

    kind: str
    canaries: int
    claimed: float
    delta: float
    confidence: float
    any: OneRunBound
    fdp: OneRunBound

    @property
    def violated(self) -> bool:
        """Whether the claim is refuted; for `fdp` a bound that meets it means that, since what it
        states is the ε of noise that was refuted."""
        return self.any.epsilon > self.claimed or self.fdp.epsilon >= self.claimed

    @property
    def line(self) -> str:
        """Both bounds, each beside what was attainable."""
        parts = [
            f"{name} {b.epsilon:.2f} (attainable {b.attainable:.2f}, {b.right}/{b.guesses} right)"
            for name, b in (("ε ≥", self.any), ("by f-DP ε ≥", self.fdp))
        ]
        return (
            f"{self.canaries} {self.kind} canaries: {', '.join(parts)}; claimed {self.claimed:.4g}"
        )

    def to_json(self) -> str:
        """All fields, without a canary, a coin or a score."""
        return json.dumps({**asdict(self), "violated": self.violated}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> OneRunAudit:
        """Inverse of `to_json`.

        Raises:
            UsageError: On anything else.
        """
        try:
            body: dict[str, Any] = json.loads(text)
            body.pop("violated")
            either, curve = OneRunBound(**body.pop("any")), OneRunBound(**body.pop("fdp"))
            return cls(**body, any=either, fdp=curve)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError("canaries.json: is not what an audit wrote; judge the run anew") from (
                error
            )


def audit_one_run(
    scores: Float[np.ndarray, " canaries"],
    coins: Bool[np.ndarray, " canaries"],
    family: Family,
    *,
    delta: float,
    kind: str,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> OneRunAudit:
    """Bound ε from one training's canaries.

    How many coins are guessed is chosen for each form by what a perfect attack on the claim would
    show, before scores are looked at.

    Args:
        scores: Any score of each canary from what was released, higher for "in".
        coins: Whether it was in: fair coins that nothing else depends on.
        family: The claim at every noise scale; s = 1 is the claim.
        delta: δ that ε is stated at.
        kind: What a canary was, in a word.
        rng: Of the simulated attacks.
        confidence: Of each bound by itself.

    Raises:
        UsageError: On scores that are not finite, or not one for each coin.
    """
    if scores.shape != coins.shape or scores.ndim != 1 or not scores.size:
        raise UsageError(
            f"scores {scores.shape} and coins {coins.shape}: give one of each a canary"
        )
    if not np.isfinite(scores).all():
        raise UsageError("scores of canaries: must be finite; the training released NaN or inf")
    check_fraction("confidence", confidence)
    check_fraction("delta", delta)
    claimed = family.epsilon(1.0)
    check_positive("claimed epsilon", claimed)

    def any_form(m: int, r: int, v: int, alpha: float) -> float:
        return epsilon_from_guesses(m, r, v, delta=delta, alpha=alpha)

    def fdp_form(m: int, r: int, v: int, alpha: float) -> float:
        return epsilon_from_guesses_fdp(m, r, v, family, alpha=alpha)

    def bound(form: Callable[[int, int, int, float], float]) -> OneRunBound:
        number, shown = best_guesses(
            form, family.curve(1.0), scores.size, rng, confidence=confidence
        )
        right = _right(scores, coins, number)
        return OneRunBound(number, right, form(scores.size, number, right, 1 - confidence), shown)

    return OneRunAudit(
        kind, scores.size, claimed, delta, confidence, bound(any_form), bound(fdp_form)
    )


def _check_counts(canaries: int, guesses: int, right: int) -> None:
    check_count("canaries", canaries)
    check_count("guesses", guesses)
    check_count("right", right, least=0)
    if not right <= guesses <= canaries:
        raise UsageError(
            f"right={right}, guesses={guesses}, canaries={canaries}: each must be at most the next"
        )
