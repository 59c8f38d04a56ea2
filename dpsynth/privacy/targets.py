"""Targets: a budget in terms of what an attacker may achieve, and the ε that keeps to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from scipy.optimize import brentq

from dpsynth.checks import UsageError, check_fraction, check_positive
from dpsynth.privacy.accounting import advantage, mu, tradeoff
from dpsynth.privacy.plan import PrivacyPlan

__all__ = ["Target", "epsilon_for"]

# Where an ε is looked for; beyond, a target asks for nothing, or for no data.
_LEAST, _MOST = 1e-3, 256.0
# Relative distance to the target that is near enough.
_NEAR = 2e-3


@dataclass(frozen=True)
class Target:
    """What an attacker who knows everything but one unit may achieve; exactly one of three.

    Attributes:
        mu: Gaussian DP parameter μ whose profile covers that of the run, down to the run's δ.
        advantage: Largest TPR − FPR of a membership test.
        tpr: Largest true positive rate at `fpr`.
        fpr: False positive rate that `tpr` is stated at.
    """

    mu: float | None = None
    advantage: float | None = None
    tpr: float | None = None
    fpr: float = 0.01

    def __post_init__(self) -> None:
        given = [name for name in ("mu", "advantage", "tpr") if getattr(self, name) is not None]
        if len(given) != 1:
            said = ", ".join(given) or "none"
            raise UsageError(f"privacy.target: give one of mu, advantage, tpr; got {said}")
        for name in (*given, "fpr"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise UsageError(f"privacy.target.{name}={value}: must be a number")
        if self.mu is not None:
            check_positive("privacy.target.mu", self.mu)
        if self.advantage is not None:
            check_fraction("privacy.target.advantage", self.advantage)
        check_fraction("privacy.target.fpr", self.fpr)
        if self.tpr is not None:
            check_fraction("privacy.target.tpr", self.tpr)
            if self.tpr <= self.fpr:
                raise UsageError(
                    f"privacy.target.tpr={self.tpr:g}: guessing already has a true positive rate "
                    f"of fpr={self.fpr:g}; give a higher one"
                )

    @classmethod
    def from_dict(cls, settings: Any) -> Target:
        """A target as a configuration holds it, e.g. `{"advantage": 0.2}`."""
        if not isinstance(settings, Mapping):
            raise UsageError(f"privacy.target={settings}: must map one name to a number")
        for key in settings:
            if key not in cls.__dataclass_fields__:
                known = ", ".join(cls.__dataclass_fields__)
                raise UsageError(f"privacy.target: unknown key {key!r}; choose from {known}")
        if settings.get("fpr") is not None and settings.get("tpr") is None:
            raise UsageError("privacy.target.fpr: means nothing without tpr")
        return cls(**{key: value for key, value in settings.items() if value is not None})

    def to_dict(self) -> dict[str, float]:
        """Plain values; `from_dict` is the inverse."""
        names = ("tpr", "fpr") if self.tpr is not None else ("mu", "advantage")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}

    @property
    def bound(self) -> float:
        """The number that must not be exceeded."""
        return next(v for v in (self.mu, self.advantage, self.tpr) if v is not None)

    def reached(self, plan: PrivacyPlan) -> float:
        """What a calibrated plan's events allow, by the run's own trade-off curve."""
        events, group = plan.events(), plan.contributions
        if self.mu is not None:
            return mu(events, plan.delta, group=group)
        if self.advantage is not None:
            return advantage(events, group=group)
        return 1.0 - float(tradeoff(events, [self.fpr], group=group)[0])


def epsilon_for(target: Target, plan_at: Callable[[float], PrivacyPlan]) -> float:
    """The largest ε whose plan keeps to `target`, within .5 % of it and never above.

    Args:
        target: What may be achieved.
        plan_at: The plan of an ε, calibrated or not.

    Raises:
        UsageError: When even ε=.001 allows more, or ε=256 less.
    """

    def reached(epsilon: float) -> float:
        plan = plan_at(epsilon)
        return target.reached(plan if plan.sigma is not None else plan.calibrate())

    low, high = _bracket(target, reached)

    def excess(log_epsilon: float) -> float:
        return math.log(reached(math.exp(log_epsilon)) / aim)

    # Aimed a little below, so that the root's own error does not lead above.
    aim = target.bound * (1 - _NEAR / 2)
    at = float(brentq(excess, math.log(low), math.log(high), xtol=_NEAR / 16))
    while reached(math.exp(at)) > target.bound:
        at -= _NEAR / 8
    return math.exp(at)


def _bracket(target: Target, reached: Callable[[float], float]) -> tuple[float, float]:
    """Two ε, one that keeps to the target with room to spare and one that does not."""
    low = high = 1.0
    aim = target.bound * (1 - _NEAR / 2)
    while reached(high) <= aim:
        if high >= _MOST:
            raise UsageError(
                f"privacy.target: {target.to_dict()} allows epsilon={_MOST:g} and more; that "
                "protects nobody, give a lower one"
            )
        low, high = high, 4 * high
    while reached(low) >= aim:
        if low <= _LEAST:
            raise UsageError(
                f"privacy.target: {target.to_dict()} needs epsilon below {_LEAST:g}; no synthetic "
                "table is worth it, give a higher one"
            )
        low, high = max(low / 4, _LEAST), low
    return low, high
