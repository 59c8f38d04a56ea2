"""PrivacyPlan: a frozen budget, and the noise that spends exactly that."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from types import MappingProxyType
from typing import Any

from dpsynth.checks import UsageError, check_choice, check_count, check_fraction, check_positive
from dpsynth.privacy import cache
from dpsynth.privacy.calibration import gaussian_mu, noise_multiplier, training, whole_mu
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger

__all__ = ["SECURE_NOISE", "NoPrivacy", "PrivacyPlan", "check_shares", "gaussian_mu"]

STAGES = ("rows", "codec", "marginals", "tables")
SECURE_NOISE = "aes256-ctr:system"


@dataclass(frozen=True)
class PrivacyPlan:
    """What may be spent and how: the single source of every noise scale.

    Attributes:
        epsilon: Target ε of the whole training, codec and marginals included; inf turns clipping
            and noise off and changes nothing else.
        delta: Target δ.
        shares: Fraction of the squared Gaussian budget μ² of each measuring stage (`rows`,
            `codec`, `marginals`, `tables`); DP-SGD gets the rest. What is divided is what
            `spent` leaves.
        batch: Expected records a step.
        steps: Number of DP-SGD steps T; 0 for a generator that is measured, not trained.
        clip: L2 bound C on one record's contribution to one step.
        rows: Public number of rows, the denominator of the sampling rate.
        unit: What is protected: one `record`, or all rows that share a value of the column named
            here.
        contributions: Most rows k of one unit; 1 for records.
        secure: Whether noise comes from the operating system's cryptographic generator; only
            recorded here.
        spent: What was paid before this training in every run under the same schema.
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
    contributions: int = 1
    relation: str = "add_remove"
    secure: bool = False
    spent: tuple[Event, ...] = ()
    sigma: float | None = None

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon, allow_inf=True)
        check_fraction("delta", self.delta)
        check_count("rows", self.rows)
        check_count("batch", self.batch)
        check_count("steps", self.steps, least=0)
        check_positive("clip", self.clip)
        self._check_unit()
        object.__setattr__(self, "spent", _events(self.spent))
        check_choice("relation", self.relation, ("add_remove",))
        check_shares(self.shares)
        total = sum(self.shares.values())
        if total > 1 + 1e-9 or (self.steps and total > 0.999):
            raise UsageError(f"privacy.shares: add up to {total:g}; leave some for the rest")
        # There are at most as many units as rows, so this covers units too.
        if self.private and self.delta >= 1 / self.rows:
            raise UsageError(
                f"delta={self.delta:g}: must be below 1/rows={1 / self.rows:.3g}, or a mechanism "
                "that publishes one whole record would pass"
            )
        object.__setattr__(self, "shares", MappingProxyType(dict(self.shares)))

    def _check_unit(self) -> None:
        if not isinstance(self.unit, str) or not self.unit:
            raise UsageError(f"unit={self.unit!r}: must be `record` or the name of a column")
        check_count("contributions", self.contributions)
        if self.unit == "record" and self.contributions != 1:
            raise UsageError(
                f"contributions={self.contributions}: a record is one row; name the unit's column"
            )
        if not isinstance(self.secure, bool):
            raise UsageError(f"secure={self.secure!r}: must be true or false")

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
        """Gaussian budget μ of a measuring stage for one row; its m parts of sensitivity 1 each
        take noise √m/μ. A unit of k rows gets k times this μ."""
        check_choice("stage", stage, STAGES)
        if not self.private:
            return math.inf
        share = self.shares.get(stage, 0.0)
        if share == 0:
            return 0.0
        whole = whole_mu(self.epsilon, self.delta, self.spent, self.contributions)
        return whole * math.sqrt(share) / self.contributions

    def measured(self) -> list[Event]:
        """The events of the measuring stages, each stage as one Gaussian."""
        mus = {stage: self.mu(stage) for stage in STAGES if self.shares.get(stage, 0.0) > 0}
        return [gaussian_event(stage, mu) for stage, mu in mus.items()]

    def training_event(self, what: str) -> Event:
        """What DP-SGD spends over all of its steps."""
        if not self.private:
            return Event(what, "none", steps=self.steps)
        return training(self.noise, self.q, self.steps, what)

    def events(self, what: str = "dpsgd") -> tuple[Event, ...]:
        """Everything that a calibrated plan pays, in order: `spent`, the stages, DP-SGD."""
        trained = [self.training_event(what)] if self.steps else []
        return (*self.spent, *self.measured(), *trained)

    def calibrate(self) -> PrivacyPlan:
        """The same plan with the least σ whose composed ε stays at or below the target.

        Raises:
            UsageError: When no σ up to 1e6 fits.
        """
        if not self.private or self.steps == 0:
            if self.private and self.spent:  # refused here rather than at the first stage
                whole_mu(self.epsilon, self.delta, self.spent, self.contributions)
            return replace(self, sigma=0.0)
        return replace(self, sigma=self._sigma())

    def _sigma(self) -> float:
        key = self._key()
        held = cache.load(key)
        # What reached more than the target, or far less, is not the σ of this plan.
        if held is not None and 0.98 * self.epsilon <= held[1] <= self.epsilon:
            return held[0]
        base = (*self.spent, *self.measured())
        sigma, reached = noise_multiplier(
            self.epsilon, self.delta, self.q, int(self.steps), base, int(self.contributions)
        )
        cache.store(key, sigma, reached)
        return sigma

    def _key(self) -> str:
        """Whatever σ follows from."""
        spent = [{**event.to_dict(), "what": "", "when": ""} for event in self.spent]
        shares = {name: float(share) for name, share in self.shares.items() if share}
        numbers = [float(self.epsilon), float(self.delta), self.q]
        counts = [int(self.steps), int(self.contributions)]
        return json.dumps([numbers, counts, shares, spent], sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `PrivacyPlan(**…)` is the inverse."""
        named = {name: getattr(self, name) for name in self.__dataclass_fields__}
        spent = [event.to_dict() for event in self.spent]
        return {**named, "shares": dict(self.shares), "spent": spent}

    def ledger(self, noise: str | None = None) -> Ledger:
        """A ledger for this plan with nothing in it, `spent` not either.

        Args:
            noise: Where the noise comes from, unless the plan is `secure`; by default
                `aes256-ctr`.
        """
        if self.secure and noise not in (None, SECURE_NOISE):
            raise UsageError(f"noise={noise}: the plan is secure, which is {SECURE_NOISE}")
        return Ledger(
            self.delta,
            unit=self.unit,
            contributions=self.contributions,
            relation=self.relation,
            noise=SECURE_NOISE if self.secure else noise or "aes256-ctr",
        )


def _events(spent: Any) -> tuple[Event, ...]:
    """Events as they are, or as `Event.to_dict` wrote them."""
    if isinstance(spent, (str, Mapping)) or not isinstance(spent, Sequence):
        raise UsageError(f"privacy.spent={spent!r}: must be a list of events")
    return tuple(row if isinstance(row, Event) else Event.from_dict(row) for row in spent)


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
