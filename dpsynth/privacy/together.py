"""Together: what publishing all runs of a sweep costs, and what choosing one of them would."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpsynth.checks import UsageError
from dpsynth.privacy import accounting, prv
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import gaussian_mu
from dpsynth.privacy.selection import Selection

__all__ = ["Group", "Release", "Together", "together"]

# Half the width of the second accountant's interval, absolute and relative to ε.
_ERROR, _COARSE = 0.01, 0.02
# Grid interval over the standard deviation of one step's loss.
_WIDTH = 0.2


@dataclass(frozen=True)
class Release:
    """One run as it would be published.

    Attributes:
        name: Its folder.
        target: ε it was to keep to; runs are grouped by it.
        delta: δ of its statement.
        events: What its ledger paid, `spent` first.
        spent: How many of them measured the schema: runs under one measured schema share them.
        unit: What a neighbouring table has one more or less of.
        contributions: Most rows of one unit.
        content: A digest of what is published; equal ones are one release.
    """

    name: str
    target: float
    delta: float
    events: tuple[Event, ...]
    spent: int = 0
    unit: str = "record"
    contributions: int = 1
    content: str = ""

    @property
    def protected(self) -> bool:
        """Whether all that it paid for has noise."""
        return all(event.mechanism != "none" for event in self.events)


@dataclass(frozen=True)
class Group:
    """Runs of one target ε.

    Attributes:
        target: That ε.
        runs: How many, different ones.
        alone: Largest ε of one of them.
        together: ε of all of them published.
        chosen: ε of publishing them all, each with a noisy private score, and choosing by these.
        selected: ε of publishing the best alone, had as many trials been expected and their number
            been random (repeat and select), the costliest run being the trial; inf where that run
            was itself selected.
    """

    target: float
    runs: int
    alone: float
    together: float
    chosen: float
    selected: float


@dataclass(frozen=True)
class Together:
    """All runs of a sweep on the same members.

    Attributes:
        runs: Different runs with a finite ε; figures below are of these.
        unprotected: Runs at ε=∞, which no figure covers.
        repeated: Runs left out because another has the same content.
        delta: δ of each run, and of `epsilon`.
        alone: Largest ε of one run.
        epsilon: ε of all published together, by PLD.
        second: The same by the second accountant.
        delta_sum: The runs' δ added up.
        epsilon_at_sum: ε of all together at that δ.
        mu: Least μ whose Gaussian trade-off covers all of them together, down to `delta`.
        advantage: Largest TPR − FPR of a membership test that sees all of them.
        chosen: As in `Group`, of all runs.
        selected: As in `Group`, with the costliest run as the base.
        groups: The runs by target ε.
    """

    runs: int
    unprotected: int
    repeated: int
    delta: float
    alone: float
    epsilon: float
    second: float
    delta_sum: float
    epsilon_at_sum: float
    mu: float
    advantage: float
    chosen: float
    selected: float
    groups: tuple[Group, ...]

    @property
    def published(self) -> float:
        """ε of publishing every run, those at ε=∞ too."""
        return math.inf if self.unprotected else self.epsilon

    @property
    def line(self) -> str:
        """One line for a terminal."""
        text = (
            f"all {self.runs} runs of finite ε published together: ε={self.epsilon:.4g} "
            f"(one alone: at most {self.alone:.4g}) at δ={self.delta:g}; choosing one by a noisy "
            f"score: {self.chosen:.4g}, by repeat and select: {self.selected:.4g}"
        )
        if self.unprotected:
            text += f"; {self.unprotected} runs at ε=∞ beside them are protected by nothing"
        return text

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ∞ as the text `inf`."""
        return _finite({**asdict(self), "published": self.published})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def together(releases: Sequence[Release], *, share: float = Selection.share) -> Together:
    """Compose the ledgers of all runs on the same members.

    Equal events are counted, not composed one by one. PLD rounds the total up by less than 1e-3 of
    ε, those of groups and choices by less than half a percent; the second accountant's interval is
    2 % of ε wide on either side.

    Args:
        releases: The runs; what they share in measured metadata is counted once.
        share: Part of a run's squared Gaussian budget that a private score would be measured with.

    Raises:
        UsageError: On no run, on runs with different units, or when the two accountants disagree.
    """
    if not releases:
        raise UsageError("releases=0: give the runs of a sweep")
    different = _different(releases)
    units = {(release.unit, release.contributions) for release in different}
    if len(units) > 1:
        raise UsageError(f"runs protect different units {sorted(units)}; compose them apart")
    kept = [release for release in different if release.protected]
    delta = max(release.delta for release in (kept or different))
    group = different[0].contributions
    alone = {r: accounting.compose_epsilon(r.events, r.delta, group=group) for r in kept}
    events = _events(kept)
    first = accounting.compose_epsilon(events, delta, group=group)
    summed = min(0.5, sum(release.delta for release in kept))
    by_target = {t: [r for r in kept if r.target == t] for t in sorted({r.target for r in kept})}
    return Together(
        runs=len(kept),
        unprotected=len(different) - len(kept),
        repeated=len(releases) - len(different),
        delta=delta,
        alone=max(alone.values(), default=0.0),
        epsilon=first,
        second=_second(events, delta, group, first),
        delta_sum=summed,
        epsilon_at_sum=accounting.compose_epsilon(events, summed, group=group) if kept else 0.0,
        mu=accounting.mu(events, delta, group=group),
        advantage=accounting.advantage(events, group=group) if kept else 0.0,
        **_choices(kept, list(alone.values()), delta, group, share),
        groups=tuple(
            _group(target, runs, [alone[run] for run in runs], group, share)
            for target, runs in by_target.items()
        ),
    )


def _different(releases: Sequence[Release]) -> list[Release]:
    """Each content once: a file published twice tells nothing new."""
    seen: set[str] = set()
    kept = []
    for release in releases:
        if release.content and release.content in seen:
            continue
        seen.add(release.content)
        kept.append(release)
    return kept


def _events(releases: Sequence[Release]) -> list[Event]:
    """All that was paid, each measured schema once.

    A run that was itself selected stands for its trials; composing what others paid on top needs
    its choice to come first.
    """
    schemas = {release.events[: release.spent] for release in releases}
    selected = [r for r in releases if any(e.mechanism == "repeat_select" for e in r.events)]
    if len(selected) > 1:
        raise UsageError(
            f"runs {selected[0].name} and {selected[1].name}: were both selected among trials; "
            "their ledgers cannot be composed as one list"
        )
    order = selected + [release for release in releases if release not in selected]
    own = [event for release in order for event in release.events[release.spent :]]
    return [*own, *(event for schema in sorted(schemas, key=repr) for event in schema)]


def _interval(releases: Sequence[Release], alone: Sequence[float]) -> float:
    """Grid of a PLD of all `releases`, rounding ε up by less than half a percent.

    Connecting the dots inflates the loss's variance by interval²/6 a step; over all steps that
    variance is about the μ² of as much Gaussian DP. A power of two, so that groups share grids.
    """
    pairs = zip(releases, alone, strict=True)
    variance = sum(gaussian_mu(epsilon, release.delta) ** 2 for release, epsilon in pairs)
    steps = sum(event.steps for release in releases for event in release.events)
    return 2.0 ** math.floor(math.log2(_WIDTH * math.sqrt(variance / steps)))


def _choices(
    releases: Sequence[Release], alone: Sequence[float], delta: float, group: int, share: float
) -> dict[str, float]:
    """What choosing one of these runs by a private score costs, in both ways."""
    if not alone or min(alone) == 0:
        return {"chosen": 0.0, "selected": 0.0}
    if math.isinf(max(alone)):
        return {"chosen": math.inf, "selected": math.inf}
    choice = Selection(mean=len(releases), share=share)
    scores = [choice.score_event(epsilon, delta) for epsilon in alone]
    paid = [*_events(releases), *scores]
    chosen = accounting.compose_epsilon(paid, delta, _interval(releases, alone), group=group)
    worst = max(range(len(alone)), key=alone.__getitem__)
    base = releases[worst]
    if any(event.mechanism == "repeat_select" for event in base.events):
        return {"chosen": chosen, "selected": math.inf}
    paid = [*base.events[base.spent :], scores[worst]]
    paid += [Event("select", "repeat_select", mean=choice.mean, shape=choice.shape)]
    paid += base.events[: base.spent]
    return {"chosen": chosen, "selected": accounting.compose_epsilon(paid, delta, group=group)}


def _group(
    target: float, releases: Sequence[Release], alone: Sequence[float], group: int, share: float
) -> Group:
    delta = max(release.delta for release in releases)
    events, most = _events(releases), max(alone)
    if len(releases) == 1 or math.isinf(most):
        whole = most
    else:
        interval = _interval(releases, alone) if most else None
        whole = accounting.compose_epsilon(events, delta, interval, group=group)
    choices = _choices(releases, alone, delta, group, share)
    return Group(target, len(releases), most, whole, **choices)


def _second(events: Sequence[Event], delta: float, group: int, first: float) -> float:
    """The second accountant's ε, refused where it does not agree with the first.

    Raises:
        UsageError: When the two disagree.
    """
    if not events:
        return 0.0
    error = max(_ERROR, _COARSE * first)
    chosen = any(event.mechanism == "repeat_select" for event in events)
    if chosen:
        second = accounting.second_opinion(events, delta, group=group)
    else:
        second = prv.upper(events, delta, group, error=error)
    if first == second:  # both infinite
        return second
    above = 0.05 * first if chosen else 2 * error + 0.01 * first
    if not -1e-3 * (1 + first) <= second - first <= above:
        raise UsageError(
            f"runs together: PLD says ε={first:.4f} but the second accountant {second:.4f}; do not "
            "publish them"
        )
    return second
