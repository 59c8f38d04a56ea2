"""PrivacyPlan: a frozen budget, and the noise that spends exactly that."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

from scipy.optimize import brentq
from scipy.stats import norm

from dpsynth.checks import UsageError, check_choice, check_count, check_fraction, check_positive
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger

__all__ = ["NoPrivacy", "PrivacyPlan", "check_shares", "gaussian_mu"]

STAGES = ("rows", "codec", "marginals")
_COARSE, _FINE = 1e-3, 1e-4
# The accountant rounds up by less than this: a ledger must never come out above its target.
_BELOW = 1 - 4e-7


@dataclass(frozen=True)
class PrivacyPlan:
    """What may be spent and how: the single source of every noise scale.

    Attributes:
        epsilon: Target ε of the whole training, codec and marginals included; inf turns clipping
            and noise off and changes nothing else.
        delta: Target δ.
        shares: Fraction of the squared Gaussian budget μ² of each measuring stage (`rows`,
            `codec`, `marginals`); DP-SGD gets the rest.
        batch: Expected records a step.
        steps: Number of DP-SGD steps T; 0 for a generator that is measured, not trained.
        clip: L2 bound C on one record's contribution to one step.
        rows: Public number of rows, the denominator of the sampling rate.
        sigma: DP-SGD noise multiplier; `calibrate` fills it in.
    """

    epsilon: float
    delta: float
    rows: int
    batch: int = 1024
    steps: int = 500
    clip: float = 1.0
    shares: Mapping[str, float] = field(default_factory=dict)
    unit: str = "record"
    relation: str = "add_remove"
    sigma: float | None = None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon, allow_inf=True)
        check_fraction("delta", self.delta)
        check_count("rows", self.rows)
        check_count("batch", self.batch)
        check_count("steps", self.steps, least=0)
        check_positive("clip", self.clip)
        check_choice("unit", self.unit, ("record",))
        check_choice("relation", self.relation, ("add_remove",))
        check_shares(self.shares)
        total = sum(self.shares.values())
        if total > 1 + 1e-9 or (self.steps and total > 0.999):
            raise UsageError(f"privacy.shares: add up to {total:g}; leave some for the rest")
        if self.private and self.delta >= 1 / self.rows:
            raise UsageError(
                f"delta={self.delta:g}: must be below 1/rows={1 / self.rows:.3g}, or a mechanism "
                "that publishes one whole record would pass"
            )
        object.__setattr__(self, "shares", MappingProxyType(dict(self.shares)))

    @property
    def private(self) -> bool:
        """Whether anything is protected at all."""
        return math.isfinite(self.epsilon)

    @property
    def q(self) -> float:
        """Probability that one record is in one step's batch."""
        return min(1.0, self.batch / self.rows)

    @property
    def noise(self) -> float:
        """DP-SGD noise multiplier; refuses a plan that was not calibrated."""
        if self.sigma is None:
            raise UsageError("plan has no sigma; call calibrate() first")
        return self.sigma

    @property
    def bound(self) -> float:
        """Clipping bound in force: C, or infinity without privacy."""
        return self.clip if self.private else math.inf

    def mu(self, stage: str) -> float:
        """Gaussian budget μ of a measuring stage; its m parts of sensitivity 1 each take noise
        √m/μ."""
        check_choice("stage", stage, STAGES)
        if not self.private:
            return math.inf
        whole = gaussian_mu(self.epsilon, self.delta) * _BELOW
        return whole * math.sqrt(self.shares.get(stage, 0.0))

    def measured(self) -> list[Event]:
        """The events of the measuring stages, each stage as one Gaussian."""
        mus = {stage: self.mu(stage) for stage in STAGES if self.shares.get(stage, 0.0) > 0}
        return [gaussian_event(stage, mu) for stage, mu in mus.items()]

    def training_event(self, what: str) -> Event:
        """What DP-SGD spends over all of its steps."""
        if not self.private:
            return Event(what, "none", steps=self.steps)
        mechanism = "poisson_gaussian" if self.q < 1 else "gaussian"
        return Event(what, mechanism, sigma=self.noise, q=self.q, steps=self.steps)

    def calibrate(self) -> PrivacyPlan:
        """The same plan with the least σ whose composed ε stays at or below the target.

        Raises:
            UsageError: When no σ up to 1e6 fits.
        """
        if not self.private or self.steps == 0:
            return replace(self, sigma=0.0)
        sigma = _calibrate(
            self.epsilon, self.delta, self.q, self.steps, tuple(e.sigma for e in self.measured())
        )
        return replace(self, sigma=sigma)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `PrivacyPlan(**…)` is the inverse."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**named, "shares": dict(self.shares)}

    def ledger(self) -> Ledger:
        """An empty ledger for this plan."""
        return Ledger(self.delta, unit=self.unit, relation=self.relation)


def check_shares(shares: Mapping[str, float]) -> None:
    """Refuse an unknown stage, or a share that is no number from 0 to 1."""
    for stage, share in shares.items():
        check_choice("privacy.shares", stage, STAGES)
        if not isinstance(share, Real) or not 0 <= share <= 1:
            raise UsageError(f"privacy.shares.{stage}={share}: must be between 0 and 1")


def NoPrivacy(rows: int, *, delta: float = 1e-5, **settings) -> PrivacyPlan:  # noqa: N802
    """A plan with ε=∞: the same path with clipping and noise off."""
    check_fraction("delta", delta)
    return PrivacyPlan(epsilon=math.inf, delta=min(delta, 0.5 / rows), rows=rows, **settings)


def gaussian_event(what: str, mu: float) -> Event:
    """The event of a Gaussian mechanism with budget μ (σ = 1/μ); μ=∞ adds no noise."""
    if mu <= 0:
        raise UsageError(f"{what}: has no budget; give its stage a share in privacy.shares")
    if math.isinf(mu):
        return Event(what, "none")
    return Event(what, "gaussian", sigma=1 / mu)


@functools.cache
def gaussian_mu(epsilon: float, delta: float) -> float:
    """The μ at which Gaussian DP gives (ε, δ): δ = Φ(−ε/μ+μ/2) − e^ε Φ(−ε/μ−μ/2)
    (Balle & Wang 2018, Theorem 8; Dong et al. 2022, Corollary 1)."""

    def excess(mu: float) -> float:
        tail = math.exp(epsilon + norm.logcdf(-epsilon / mu - mu / 2))
        return norm.cdf(-epsilon / mu + mu / 2) - tail - delta

    return float(brentq(excess, 1e-6, 20 + 10 * epsilon, xtol=1e-12))


@functools.lru_cache(maxsize=512)
def _calibrate(
    epsilon: float, delta: float, q: float, steps: int, measured: tuple[float, ...]
) -> float:
    base = [Event(f"measured:{i}", "gaussian", sigma=s) for i, s in enumerate(measured)]
    mechanism = "poisson_gaussian" if q < 1 else "gaussian"

    def spent(sigma: float, interval: float) -> float:
        trained = Event("dpsgd", mechanism, sigma=sigma, q=q, steps=steps)
        return compose_epsilon([*base, trained], delta, interval)

    def excess(log_sigma: float, interval: float) -> float:
        return math.log(max(spent(math.exp(log_sigma), interval), 1e-12) / epsilon)

    low = high = 0.0
    while excess(high, _COARSE) > 0:
        low, high = high, high + math.log(2)
        if high > math.log(1e6):
            raise UsageError(
                f"epsilon={epsilon:g}: no noise is enough beside the measuring stages; raise "
                "epsilon or lower privacy.shares"
            )
    while low == high or excess(low, _COARSE) <= 0:
        low -= math.log(1.5)
    near = brentq(excess, low, high, args=(_COARSE,), xtol=1e-3)
    # The fine grid rounds less, so the root moves down a little: one Newton step there, with the
    # slope of the coarse grid, then up until it holds.
    slope = (excess(near + 0.01, _COARSE) - excess(near - 0.01, _COARSE)) / 0.02
    root = near - excess(near, _FINE) / slope + 2e-5
    while excess(root, _FINE) > 0:
        root += 1e-4
    return math.exp(root)
