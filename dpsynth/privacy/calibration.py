"""Calibration: the least noise, and the most measuring budget, whose composed ε is the target."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from dpsynth.checks import UsageError
from dpsynth.privacy import accounting, prv
from dpsynth.privacy.events import Event

__all__ = ["BELOW", "gaussian_mu", "noise_multiplier", "training", "whole_mu"]

# Doubles round: what is paid part by part must not come out above its target.
BELOW = 1 - 1e-9
_MOST_SIGMA = 1e6
_MOST_STEPS = 10**8
# A σ this much above the least one (relative) is near enough.
_NEAR = 3e-4


@functools.cache
def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ at which Gaussian DP gives (ε, δ): δ = Φ(−ε/μ+μ/2) − e^ε Φ(−ε/μ−μ/2)
    (Balle & Wang 2018, Theorem 8; Dong et al. 2022, Corollary 1)."""

    def excess(mu: float) -> float:
        tail = math.exp(epsilon + log_ndtr(-epsilon / mu - mu / 2))
        return float(ndtr(-epsilon / mu + mu / 2)) - tail - delta

    return float(brentq(excess, 1e-7, 20 + 10 * epsilon, xtol=1e-14, rtol=1e-13))


def training(sigma: float, q: float, steps: int, what: str = "dpsgd") -> Event:
    """The event of DP-SGD."""
    mechanism = "poisson_gaussian" if q < 1 else "gaussian"
    return Event(what, mechanism, sigma=sigma, q=q, steps=steps)


@functools.lru_cache(maxsize=1024)
def whole_mu(epsilon: float, delta: float, spent: tuple[Event, ...], group: int = 1) -> float:
    """Largest μ of Gaussians whose composition with `spent` stays at ε, for one unit.

    Raises:
        UsageError: When `spent` alone costs ε or more.
    """
    lost = accounting.failure(spent)
    if lost < delta:
        reduced = (delta - lost) / (1 - lost)
        most = gaussian_mu(epsilon, reduced)
        if not spent or all(_is_folded(event) for event in spent):
            left = most**2 - _folded(spent, group)
            if left > 0:
                return math.sqrt(left) * BELOW
        elif accounting.compose_epsilon(spent, delta, group=group) < epsilon:
            return _measured_mu(epsilon, delta, spent, group, most)
    cost = accounting.compose_epsilon(spent, delta, group=group)
    raise UsageError(
        f"epsilon={epsilon:g}: the measured metadata alone cost ε={cost:.4g} at delta={delta:g}; "
        "raise epsilon"
    )


def _measured_mu(
    epsilon: float, delta: float, spent: tuple[Event, ...], group: int, most: float
) -> float:
    def excess(mu: float) -> float:
        events = [*spent, Event("measured", "gaussian", sigma=group / mu)]
        return accounting.compose_epsilon(events, delta, group=group) / epsilon - 1

    low = most
    while excess(low) > 0:
        low /= 2
        if low < 1e-6 * most:
            raise UsageError(f"epsilon={epsilon:g}: nothing is left to measure with; raise epsilon")
    if low == most:
        return most * BELOW
    found = float(brentq(excess, low, 2 * low, xtol=1e-5 * low))
    while excess(found) > 0:
        found *= 1 - 1e-4
    return found * BELOW


def _is_folded(event: Event) -> bool:
    whole = event.mechanism in ("gaussian", "poisson_gaussian") and event.q == 1
    return whole or event.mechanism == "failure"


def _folded(events: Sequence[Event], group: int) -> float:
    """μ² of all full-batch Gaussians together."""
    return sum(e.steps * (group / e.sigma) ** 2 for e in events if e.mechanism != "failure")


def noise_multiplier(
    epsilon: float, delta: float, q: float, steps: int, base: tuple[Event, ...], group: int = 1
) -> tuple[float, float]:
    """Least σ of DP-SGD beside `base` that stays at or below ε, and the ε it reaches.

    The root is found with the second accountant's grid, which is fast, corrected for what the
    first one's rounding will add; the first accountant then has the last word.

    Raises:
        UsageError: When no σ up to 1e6 fits, or there are more steps than can be composed.
    """
    if steps > _MOST_STEPS:
        raise UsageError(f"steps={steps}: at most {_MOST_STEPS} can be accounted for")
    goal = epsilon * BELOW
    lost = accounting.failure(base)
    reduced = (delta - lost) / (1 - lost)
    if reduced <= 0:
        raise _no_noise(epsilon)
    if q == 1 and all(_is_folded(event) for event in base):
        left = (gaussian_mu(goal, reduced) * BELOW) ** 2 - _folded(base, group)
        if left <= 0 or group * math.sqrt(steps / left) > _MOST_SIGMA:
            raise _no_noise(epsilon)
        sigma = group * math.sqrt(steps / left)
        event = training(sigma, q, steps)
        return sigma, accounting.compose_epsilon([*base, event], delta, group=group)

    def spent(log_sigma: float) -> float:
        event = training(math.exp(log_sigma), q, steps)
        return accounting.compose_epsilon([*base, event], delta, group=group)

    guess = _guess(goal, reduced, q, steps, base, group)
    if any(event.mechanism == "repeat_select" for event in base):
        root, slope = _root(lambda x: math.log(max(spent(x), 1e-12) / goal), guess, epsilon), 1.0
    else:
        search = _Search(goal, reduced, q, steps, base, group)
        root = _root(search.excess, guess, epsilon)
        slope = search.slope(root)
    return _settle(spent, root, slope, goal, epsilon)


def _settle(
    spent: Callable[[float], float], root: float, slope: float, goal: float, epsilon: float
) -> tuple[float, float]:
    """From near the root to just below it, by the first accountant: Newton, then a bracket."""
    low, high = -math.inf, math.inf
    reached = math.inf
    at = root
    for _ in range(40):
        cost = spent(at)
        if cost <= goal:
            high, reached = at, cost
        else:
            low = at
        move = math.log(max(cost, 1e-12) / goal) / slope
        if cost <= goal and (-move <= _NEAR or high - low <= _NEAR):
            return math.exp(high), reached
        at += max(-0.1, min(0.1, move)) + _NEAR / 4
        if not low < at < high:
            at = (low + high) / 2 if math.isfinite(high - low) else at + _NEAR
        if at > math.log(_MOST_SIGMA):
            break
    if math.isfinite(reached):
        return math.exp(high), reached
    raise _no_noise(epsilon)


class _Search:
    """log δ(ε) of base and training as a function of log σ, on the second accountant's grid."""

    def __init__(
        self,
        epsilon: float,
        delta: float,
        q: float,
        steps: int,
        base: tuple[Event, ...],
        group: int,
    ) -> None:
        self._epsilon, self._delta = epsilon, delta
        self._q, self._steps, self._base, self._group = q, steps, base, group
        whole = [event for event in base if _is_folded(event)]
        rest = [e for e in base if not _is_folded(e)]
        self._mu2 = _folded(whole, group)
        self._parts = prv.parts_of(rest, group, added=False)

    def _composed(self, log_sigma: float) -> prv.Composed:
        sigma = math.exp(log_sigma)
        event = training(sigma, self._q, self._steps)
        step, added = accounting.rounding([*self._base, event], group=self._group)
        parts, mu2 = list(self._parts), self._mu2 + added
        if self._q < 1:
            parts.append((prv.mixture(sigma, self._q, self._group), self._steps))
        else:
            mu2 += self._steps * (self._group / sigma) ** 2
        if mu2:
            parts.append((prv.gaussian(math.sqrt(mu2)), 1))
        return prv.compose(parts, step / 2, 1e-3 * self._delta)

    def excess(self, log_sigma: float) -> float:
        found = self._composed(log_sigma).delta(self._epsilon)
        return math.log(max(found, 1e-300) / self._delta)

    def slope(self, log_sigma: float) -> float:
        """−d log ε / d log σ where δ(ε) stays the same."""
        at, further = self._composed(log_sigma), self.excess(log_sigma + 0.01)
        here, beyond = at.delta(self._epsilon), at.delta(1.001 * self._epsilon)
        by_sigma = (math.log(max(here, 1e-300) / self._delta) - further) / 0.01
        by_epsilon = math.log(max(here, 1e-300) / max(beyond, 1e-300)) / 0.001
        return max(1e-4, by_sigma / max(by_epsilon, 1e-9))


def _guess(
    epsilon: float, delta: float, q: float, steps: int, base: Sequence[Event], group: int
) -> float:
    """log σ by the central limit: T q² (exp(1/σ²) − 1) is the μ² that `base` leaves."""
    most = gaussian_mu(epsilon, delta) ** 2
    whole = [event for event in base if _is_folded(event)]
    left = max(most - _folded(whole, group), 1e-3 * most)
    return math.log(group) - 0.5 * math.log(math.log1p(left / (steps * q * q)))


def _root(excess: Callable[[float], float], guess: float, epsilon: float) -> float:
    """Where a falling function is zero, searched outwards from a guess."""
    low = high = min(guess, math.log(_MOST_SIGMA) - 1)
    width, at = 0.05, excess(low)
    if at > 0:
        while at > 0:
            if high >= math.log(_MOST_SIGMA):
                raise _no_noise(epsilon)
            low, high = high, min(high + width, math.log(_MOST_SIGMA))
            width, at = 2 * width, excess(high)
    else:
        while at <= 0:
            low, high = low - width, low
            width, at = min(2 * width, 1.0), excess(low)
            if low < math.log(1e-4):
                return low
    return float(brentq(excess, low, high, xtol=1e-5))


def _no_noise(epsilon: float) -> UsageError:
    return UsageError(
        f"epsilon={epsilon:g}: no noise is enough beside the measuring stages; raise epsilon or "
        "lower privacy.shares"
    )
