"""Ledger: every event spent, in order, and what all of them cost together."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from numbers import Real
from typing import Any

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from opacus.accountants import PRVAccountant

from dpsynth.checks import UsageError, check_choice, check_count, check_fraction

__all__ = ["MECHANISMS", "Event", "Ledger", "compose_epsilon", "second_opinion"]

MECHANISMS = ("gaussian", "poisson_gaussian", "none")
_FINE = 1e-4


@dataclass(frozen=True)
class Event:
    """One thing that looked at the rows.

    Attributes:
        what: What it paid for, e.g. `discretiser:age`, `marginals`, `dpsgd:diffusion`.
        mechanism: `gaussian` (noise σ·sensitivity on a sum), `poisson_gaussian` (the same on a
            Poisson sample, `steps` times), or `none` (no noise: ε is infinite).
        sigma: Noise multiplier: standard deviation over L2 sensitivity.
        q: Sampling probability of one record in one step.
        steps: Number of times the mechanism ran.
        when: UTC time of writing; the ledger fills it in.
    """

    what: str
    mechanism: str
    sigma: float = 0.0
    q: float = 1.0
    steps: int = 1
    when: str = ""

    def __post_init__(self) -> None:
        check_choice(f"mechanism of {self.what!r}", self.mechanism, MECHANISMS)
        check_count(f"steps of {self.what!r}", self.steps)
        for name in ("sigma", "q"):
            if not isinstance(getattr(self, name), Real):
                raise UsageError(
                    f"event {self.what!r}: {name}={getattr(self, name)!r}; must be a number"
                )
        if self.mechanism != "none" and not (math.isfinite(self.sigma) and self.sigma > 0):
            raise UsageError(f"event {self.what!r}: sigma={self.sigma}; must be above 0")
        if not 0 < self.q <= 1:
            raise UsageError(f"event {self.what!r}: q={self.q}; must be in (0, 1]")
        if self.mechanism == "gaussian" and self.q != 1:
            raise UsageError(
                f"event {self.what!r}: a gaussian event reads all rows, so q must be 1"
            )


class Ledger:
    """Append-only list of events of one training, composed under add/remove adjacency.

    Args:
        delta: Probability of failure that ε is stated at.
        unit: What a neighbouring table differs by: one `record`.
        relation: `add_remove`.
    """

    def __init__(self, delta: float, *, unit: str = "record", relation: str = "add_remove") -> None:
        check_fraction("delta", delta)
        check_choice("unit", unit, ("record",))
        check_choice("relation", relation, ("add_remove",))
        self.delta = delta
        self.unit = unit
        self.relation = relation
        self._events: list[Event] = []

    @property
    def events(self) -> tuple[Event, ...]:
        """The events in the order they were paid."""
        return tuple(self._events)

    def pay(self, event: Event) -> None:
        """Write an event; call it before the mechanism reads a row."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._events.append(replace(event, when=event.when or now))

    @property
    def epsilon(self) -> float:
        """ε at the ledger's δ, composed by PLD (pessimistic rounding)."""
        return compose_epsilon(self.events, self.delta)

    def cross_check(self) -> None:
        """Refuse a ledger on which the second accountant does not agree.

        PRV states an upper bound within .01 of ε, PLD rounds up by less: PRV must lie above by at
        most .02 and 1 %, and never below by more than PLD's rounding.

        Raises:
            UsageError: When the two disagree.
        """
        first, second = self.epsilon, second_opinion(self.events, self.delta)
        if first == second:  # both infinite, or nothing spent
            return
        if not -1e-3 * (1 + first) <= second - first <= 0.02 + 0.01 * first:
            raise UsageError(
                f"ledger: PLD says ε={first:.4f} but PRV says {second:.4f}; do not use this plan"
            )

    def profile(self, epsilons: Sequence[float]) -> np.ndarray:
        """δ(ε) at each of `epsilons` (the privacy profile), for trade-off curves."""
        if any(event.mechanism == "none" for event in self._events):
            return np.ones(len(epsilons))
        if not self._events:
            return np.maximum(0.0, 1.0 - np.exp(np.asarray(epsilons, dtype=float)))
        composed = _compose(_merged(self.events), 1e-3)
        # The library rounds pessimistically; beyond 1 a δ says nothing more.
        return np.minimum(1.0, composed.get_delta_for_epsilon(list(epsilons)))

    def to_json(self) -> str:
        """Text of `ledger.json`, one event a row."""
        body = {
            "format": 1,
            "unit": self.unit,
            "relation": self.relation,
            "delta": self.delta,
            "accountant": "dp-accounting PLD",
            "events": [asdict(event) for event in self._events],
        }
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Inverse of `to_json`; what is unknown or missing is refused, never guessed."""
        try:
            body: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise UsageError(f"ledger is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != 1:
            found = body.get("format") if isinstance(body, dict) else None
            raise UsageError(f"ledger format={found}: this version reads 1")
        _check_keys("ledger", body, ("format", "unit", "relation", "delta", "accountant", "events"))
        ledger = cls(body["delta"], unit=body["unit"], relation=body["relation"])
        if not isinstance(body["events"], list):
            raise UsageError("ledger events: must be a list")
        for number, row in enumerate(body["events"]):
            _check_keys(f"ledger event {number}", row, tuple(Event.__dataclass_fields__))
            ledger._events.append(Event(**row))
        return ledger


def _check_keys(name: str, found: Any, wanted: Sequence[str]) -> None:
    """Refuse anything but a mapping with exactly the keys `wanted`."""
    if not isinstance(found, dict):
        raise UsageError(f"{name}: must be an object with keys {', '.join(wanted)}")
    for key in sorted(set(found) - set(wanted)):
        raise UsageError(f"{name}: unknown key {key!r}")
    for key in wanted:
        if key not in found:
            raise UsageError(f"{name}: {key!r} is missing")


def compose_epsilon(events: Sequence[Event], delta: float, interval: float = _FINE) -> float:
    """ε(δ) of all `events` together by PLD; 0 for none, inf where one of them adds no noise."""
    if not events:
        return 0.0
    if any(event.mechanism == "none" for event in events):
        return math.inf
    return float(_compose(_merged(tuple(events)), interval).get_epsilon_for_delta(delta))


def second_opinion(events: Sequence[Event], delta: float) -> float:
    """Upper ε of the same events by Opacus' PRV accountant (Gopi et al. 2021)."""
    if not events:
        return 0.0
    if any(event.mechanism == "none" for event in events):
        return math.inf
    return _prv(_merged(tuple(events)), delta)


@functools.lru_cache(maxsize=256)
def _prv(rows: tuple[tuple[float, float, int], ...], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = list(rows)
    return float(accountant.get_epsilon(delta, eps_error=0.01))


def _merged(events: tuple[Event, ...]) -> tuple[tuple[float, float, int], ...]:
    """(σ, q, steps) rows: all full-batch Gaussians folded into one (Σ 1/σ² adds up exactly)."""
    mu2 = sum(event.steps / event.sigma**2 for event in events if event.q == 1)
    rows = [(mu2**-0.5, 1.0, 1)] if mu2 else []
    sampled: dict[tuple[float, float], int] = {}
    for event in events:
        if event.q < 1:
            key = (event.sigma, event.q)
            sampled[key] = sampled.get(key, 0) + event.steps
    return tuple(rows + [(sigma, q, steps) for (sigma, q), steps in sampled.items()])


@functools.lru_cache(maxsize=256)
def _compose(
    rows: tuple[tuple[float, float, int], ...], interval: float
) -> pld.PrivacyLossDistribution:
    composed = None
    for sigma, q, steps in rows:
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=interval
        ).self_compose(steps)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return composed
