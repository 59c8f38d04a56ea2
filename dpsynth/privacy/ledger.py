"""Ledger: every event spent, in order, and what all of them cost together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from dpsynth.checks import UsageError, check_choice, check_count, check_fraction
from dpsynth.privacy import accounting
from dpsynth.privacy.events import Event

__all__ = ["RELATIONS", "Executed", "Ledger"]

FORMAT = 2
RELATIONS = ("add_remove",)
_HEADER = ("unit", "contributions", "relation", "delta", "noise")


@dataclass(frozen=True)
class Executed:
    """What DP-SGD really did.

    Attributes:
        steps: Steps taken, each counted once.
        replayed: Steps taken again after a crash, with the same rows and the same draws; what was
            lost was seen by nobody, so they cost nothing.
    """

    steps: int = 0
    replayed: int = 0

    def __post_init__(self) -> None:
        check_count("executed steps", self.steps, least=0)
        check_count("replayed steps", self.replayed, least=0)


@dataclass
class Ledger:
    """Append-only list of events of one training, composed under add/remove adjacency.

    Attributes:
        delta: Probability of failure that ε is stated at.
        unit: What a neighbouring table differs by: one `record`, or all rows that share a value of
            the column named here.
        contributions: Most rows of one unit; 1 for records.
        relation: `add_remove`: a neighbouring table has one unit more or less.
        noise: Where the noise comes from, e.g. `aes256-ctr:seed` or `aes256-ctr:system`.
        sink: Called with every event before it counts; writes it where a crash cannot reach it.
        executed: What was done of what was paid.
        seal: sha256 of the files that the run was saved with.
    """

    delta: float
    unit: str = "record"
    contributions: int = 1
    relation: str = "add_remove"
    noise: str = "aes256-ctr:seed"
    sink: Callable[[Event], Event] | None = None
    executed: Executed = field(default_factory=Executed)
    seal: Mapping[str, str] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        check_choice("relation", self.relation, RELATIONS)
        check_count("contributions", self.contributions)
        for name in ("unit", "noise"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise UsageError(f"ledger {name}={getattr(self, name)!r}: must be a text")
        if self.unit == "record" and self.contributions != 1:
            raise UsageError(f"contributions={self.contributions}: a record is one row")

    @property
    def events(self) -> tuple[Event, ...]:
        """The events in the order they were paid."""
        return tuple(self._events)

    def pay(self, event: Event) -> None:
        """Write an event; call it before the mechanism reads a row."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        event = replace(event, when=event.when or now)
        self._events.append(event if self.sink is None else self.sink(event))

    @property
    def epsilon(self) -> float:
        """ε at the ledger's δ, composed by PLD (pessimistic rounding)."""
        return accounting.compose_epsilon(self.events, self.delta, group=self.contributions)

    def cross_check(self) -> None:
        """Refuse a ledger on which the second accountant does not agree.

        PRV states an upper bound within .01 of ε, PLD rounds up by less: PRV must lie above by at
        most .02 and 1 %, and never below by more than PLD's rounding.

        Raises:
            UsageError: When the two disagree.
        """
        first = self.epsilon
        second = accounting.second_opinion(self.events, self.delta, group=self.contributions)
        if first == second:  # both infinite, or nothing spent
            return
        if not -1e-3 * (1 + first) <= second - first <= 0.02 + 0.01 * first:
            raise UsageError(
                f"ledger: the first accountant says ε={first:.4f} and the second {second:.4f}; do "
                "not use this plan"
            )

    def profile(self, epsilons: Sequence[float]) -> np.ndarray:
        """δ(ε) at each of `epsilons` (the privacy profile), for trade-off curves."""
        return accounting.profile(self.events, epsilons, group=self.contributions)

    def tradeoff(self, fprs: Sequence[float]) -> np.ndarray:
        """Least false negative rate of any attack at each false positive rate (len(fprs),)."""
        return accounting.tradeoff(self.events, fprs, group=self.contributions)

    @property
    def mu(self) -> float:
        """Least μ whose Gaussian trade-off covers this ledger's down to its δ."""
        return accounting.mu(self.events, self.delta, group=self.contributions)

    @property
    def advantage(self) -> float:
        """Most that any attack's true positive rate exceeds its false positive rate by."""
        return accounting.advantage(self.events, group=self.contributions)

    def sealed(self, files: Mapping[str, bytes]) -> Ledger:
        """This ledger as it is saved beside `files`: closed, and bound to their content."""
        return replace(self, sink=None, seal=_digests(files))

    def check_seal(self, files: Mapping[str, bytes]) -> None:
        """Refuse files other than those the ledger was saved with."""
        found = _digests(files)
        for name in sorted({*found, *self.seal}):
            if found.get(name) != self.seal.get(name):
                raise UsageError(f"{name}: is not the file that the ledger was sealed with")

    def to_json(self) -> str:
        """Text of `ledger.json`: one event a row, each with a hash of itself and all before it."""
        header = {name: getattr(self, name) for name in _HEADER}
        chain = _link("", header)
        rows = []
        for event in self._events:
            chain = _link(chain, event.to_dict())
            rows.append({**event.to_dict(), "chain": chain})
        tail = {
            "executed": {"steps": self.executed.steps, "replayed": self.executed.replayed},
            "seal": dict(self.seal),
        }
        body = {
            "format": FORMAT,
            **header,
            "accountant": "dp-accounting PLD",
            "events": rows,
            **tail,
            "head": _link(chain, tail),
        }
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Ledger:
        """Inverse of `to_json`; what is unknown, missing or changed is refused, never guessed."""
        try:
            body: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise UsageError(f"ledger is not JSON: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else None
            raise UsageError(f"ledger format={found}: this version reads {FORMAT}")
        _check_keys(
            "ledger",
            body,
            ("format", *_HEADER, "accountant", "events", "executed", "seal", "head"),
        )
        _check_keys("ledger executed", body["executed"], ("steps", "replayed"))
        if not isinstance(body["events"], list):
            raise UsageError("ledger events: must be a list")
        if not isinstance(body["seal"], dict):
            raise UsageError("ledger seal: must map files to hashes")
        header = {name: body[name] for name in _HEADER}
        chain = _link("", header)
        events = []
        for number, row in enumerate(body["events"]):
            if not isinstance(row, dict):
                raise UsageError(f"ledger event {number}: must be an object")
            event = Event.from_dict({k: v for k, v in row.items() if k != "chain"})
            chain = _link(chain, event.to_dict())
            if row.get("chain") != chain:
                raise UsageError(
                    f"ledger event {number} ({event.what!r}): differs from its hash; the ledger "
                    "was changed after it was written"
                )
            events.append(event)
        tail = {"executed": body["executed"], "seal": body["seal"]}
        if body["head"] != _link(chain, tail):
            raise UsageError("ledger: differs from its hash; it was changed after it was written")
        return cls(
            **header, executed=Executed(**body["executed"]), seal=body["seal"], _events=events
        )


def _digests(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def _link(before: str, row: Mapping[str, Any]) -> str:
    text = json.dumps([before, row], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_keys(name: str, found: Any, wanted: Sequence[str]) -> None:
    """Refuse anything but a mapping with exactly the keys `wanted`."""
    if not isinstance(found, dict):
        raise UsageError(f"{name}: must be an object with keys {', '.join(wanted)}")
    for key in sorted(set(found) - set(wanted)):
        raise UsageError(f"{name}: unknown key {key!r}")
    for key in wanted:
        if key not in found:
            raise UsageError(f"{name}: {key!r} is missing")
