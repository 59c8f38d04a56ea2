"""Private selection: the best of a random number of trials, and the law of that number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import gammaln

from dpsynth.checks import UsageError, check_fraction, check_positive
from dpsynth.privacy import renyi
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan, gaussian_event, gaussian_mu
from dpsynth.randomness import Stream

__all__ = ["Selection", "allowance"]

_LEAST = 2.0**-80


@dataclass(frozen=True)
class Selection:
    """Repeat and select (Papernot & Steinke 2022, arXiv 2110.03620): K trials, each a candidate
    drawn anew, trained and scored with noise; only the best is ever seen.

    K is random, so that no count of trials tells of the rows: truncated negative binomial with
    `shape` η and expectation `mean`, P[K=k] ∝ (1−γ)^k Γ(k+η)/(Γ(η) k!) for k ≥ 1; η=0 is the
    logarithmic and η=1 the geometric law. A smaller η costs less and has the longer tail.

    Attributes:
        mean: Expected number of trials.
        shape: η.
        share: Part of a trial's squared Gaussian budget μ² that its score is measured with.
    """

    mean: float = 10.0
    shape: float = 1.0
    share: float = 0.1

    def __post_init__(self) -> None:
        check_positive("selection.mean", self.mean)
        check_fraction("selection.share", self.share)
        if self.mean < 1:
            raise UsageError(f"selection.mean={self.mean}: a selection runs at least one trial")
        if not 0 <= self.shape < math.inf:
            raise UsageError(
                f"selection.shape={self.shape}: must be at least 0 and finite; the Poisson law may "
                "run no trial at all"
            )

    @property
    def gamma(self) -> float:
        """γ of the law, in (0, 1]: the smaller, the more trials."""
        return renyi.success(self.mean, self.shape)

    def pmf(self, trials: np.ndarray) -> np.ndarray:
        """P[K = k] at whole numbers k ≥ 1 of any shape."""
        k, eta, gamma = np.asarray(trials, dtype=float), self.shape, self.gamma
        if gamma == 1:
            return np.where(k == 1, 1.0, 0.0)
        if eta == 0:
            return np.exp(k * math.log1p(-gamma) - np.log(k)) / -math.log(gamma)
        rise = gammaln(k + eta) - gammaln(eta) - gammaln(k + 1) + k * math.log1p(-gamma)
        return np.exp(rise - math.log(math.expm1(-eta * math.log(gamma))))

    def trials(self, rng: Stream) -> int:
        """Draw K by inverting its distribution function."""
        left, k, eta, gamma = float(rng.random()), 1, self.shape, self.gamma
        chance = float(self.pmf(np.ones(1))[0])
        # Past the mean the terms fall; what rounding leaves beyond the last that counts is no more
        # than 2^-50.
        while left >= chance and (k <= self.mean or chance > _LEAST):
            left -= chance
            chance *= (1 - gamma) * (k + eta) / (k + 1)
            k += 1
        return k

    def score_event(self, epsilon: float, delta: float) -> Event:
        """What scoring one trial of ε costs; σ in units of what one row changes."""
        mu = math.sqrt(self.share) * gaussian_mu(epsilon, delta)
        return gaussian_event("score", mu)

    def events(
        self, chosen: Sequence[Event], others: Sequence[Sequence[Event]], plan: PrivacyPlan
    ) -> list[Event]:
        """What the ledger of the chosen trial ends with.

        Args:
            chosen: Events of its training.
            others: Events that training any of the candidates pays.
            plan: Of a trial.
        """
        score = self.score_event(plan.epsilon, plan.delta)
        more = allowance(chosen, others)
        last = Event("select", "repeat_select", mean=self.mean, shape=self.shape)
        return [score, *more, last]

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `Selection(**…)` is the inverse."""
        return {"mean": self.mean, "shape": self.shape, "share": self.share}


def allowance(own: Sequence[Event], others: Sequence[Sequence[Event]]) -> list[Event]:
    """What `own` has to pay on top to cost at least as much as each of `others`.

    Which candidate a trial drew is part of what it gives out, so a trial costs what the costliest
    candidate does, whichever is chosen in the end. Full-batch Gaussians are compared by their
    summed μ², all else event by event; so candidates of the same batch, steps and shares need
    nothing, and those of different ones up to the cost of each.
    """
    missing, more = 0.0, Counter[Event]()
    mine, counts = _parts(own)
    for other in others:
        theirs, needed = _parts(other)
        missing = max(missing, theirs - mine)
        more |= needed - counts
    lifted = [Event("allowance", "gaussian", sigma=missing**-0.5)] if missing > 0 else []
    named = [replace(event, what="allowance", steps=steps) for event, steps in more.items()]
    return lifted + sorted(named, key=repr)


def _parts(events: Sequence[Event]) -> tuple[float, Counter[Event]]:
    """Summed μ² of full-batch Gaussians, and how often each other mechanism ran."""
    whole = [event for event in events if event.mechanism == "gaussian"]
    counts: Counter[Event] = Counter()
    for event in events:
        if event.mechanism != "gaussian":
            counts[replace(event, what="", when="", steps=1)] += event.steps
    # Exactly rounded, so that the order of payment makes no difference.
    return math.fsum(event.steps / event.sigma**2 for event in whole), counts
