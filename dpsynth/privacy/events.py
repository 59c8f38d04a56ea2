"""Event: one thing that looked at the rows, and the parameters of its mechanism."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

from dpsynth.checks import UsageError, check_choice, check_count

__all__ = ["MECHANISMS", "Event"]

# What each mechanism is stated by; every other parameter must stay at its default.
MECHANISMS: Mapping[str, tuple[str, ...]] = {
    "gaussian": ("sigma", "steps"),
    "poisson_gaussian": ("sigma", "q", "steps"),
    "laplace": ("sigma", "steps"),
    "pure": ("epsilon", "steps"),
    "failure": ("delta",),
    "repeat_select": ("mean", "shape"),
    "none": ("steps",),
}


@dataclass(frozen=True)
class Event:
    """One thing that looked at the rows.

    Attributes:
        what: What it paid for, e.g. `discretiser:age`, `marginals`, `dpsgd:diffusion`.
        mechanism: One of

            * `gaussian`: noise of standard deviation σ · (L2 sensitivity) on a sum;
            * `poisson_gaussian`: the same on a Poisson sample of rate q;
            * `laplace`: noise of scale σ · (L1 sensitivity);
            * `pure`: any mechanism known to be ε-DP, such as the exponential mechanism;
            * `failure`: with probability at most δ anything may happen, else nothing does (the
              chance that partition selection lets through a level only one unit has);
            * `repeat_select`: everything paid before it was run a random number of times and one
              outcome chosen (Papernot & Steinke 2022): truncated negative binomial of `shape` η
              with `mean` trials, η=inf for Poisson;
            * `none`: no noise; ε is infinite.
        sigma: Noise multiplier: noise scale over sensitivity.
        q: Sampling probability of one row in one step.
        steps: Number of times the mechanism ran.
        epsilon: ε of a `pure` mechanism.
        delta: δ of a `failure`.
        mean: Expected number of trials of a `repeat_select`.
        shape: η of a `repeat_select`.
        when: UTC time of writing; the ledger fills it in.
    """

    what: str
    mechanism: str
    sigma: float = 0.0
    q: float = 1.0
    steps: int = 1
    epsilon: float = 0.0
    delta: float = 0.0
    mean: float = 1.0
    shape: float = 1.0
    when: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.what, str) or not isinstance(self.when, str):
            raise UsageError(f"event {self.what!r}: what and when must be texts")
        check_choice(f"mechanism of {self.what!r}", self.mechanism, MECHANISMS)
        check_count(f"steps of {self.what!r}", self.steps)
        fields = type(self).__dataclass_fields__
        for name in ("sigma", "q", "epsilon", "delta", "mean", "shape"):
            value = getattr(self, name)
            if not isinstance(value, Real) or math.isnan(value):
                raise UsageError(f"event {self.what!r}: {name}={value!r}; must be a number")
            if name not in MECHANISMS[self.mechanism] and value != fields[name].default:
                raise UsageError(
                    f"event {self.what!r}: {name}={value:g} means nothing to {self.mechanism}"
                )
        self._check_parameters()

    def _check_parameters(self) -> None:
        used = MECHANISMS[self.mechanism]
        for name in ("sigma", "epsilon"):
            value = getattr(self, name)
            if name in used and not (math.isfinite(value) and value > 0):
                raise UsageError(f"event {self.what!r}: {name}={value}; must be above 0")
        if not 0 < self.q <= 1:
            raise UsageError(f"event {self.what!r}: q={self.q}; must be in (0, 1]")
        if "delta" in used and not 0 < self.delta < 1:
            raise UsageError(f"event {self.what!r}: delta={self.delta}; must be in (0, 1)")
        if self.mean < 1 or math.isinf(self.mean):
            raise UsageError(f"event {self.what!r}: mean={self.mean}; must be at least 1")
        if self.shape < 0:
            raise UsageError(f"event {self.what!r}: shape={self.shape}; must be at least 0")

    def to_dict(self) -> dict[str, Any]:
        """What is written: the parameters that the mechanism has, and no others."""
        used = ("what", "mechanism", *MECHANISMS[self.mechanism], "when")
        return {name: asdict(self)[name] for name in used}

    @classmethod
    def from_dict(cls, row: Any) -> Event:
        """Inverse of `to_dict`; what is unknown or missing is refused, never guessed."""
        if not isinstance(row, dict):
            raise UsageError("ledger event: must be an object")
        check_choice("ledger event: mechanism", row.get("mechanism"), MECHANISMS)
        used = ("what", "mechanism", *MECHANISMS[row["mechanism"]], "when")
        for key in sorted(set(row) - set(used)):
            raise UsageError(f"ledger event {row.get('what')!r}: unknown key {key!r}")
        for key in used:
            if key not in row:
                raise UsageError(f"ledger event {row.get('what')!r}: {key!r} is missing")
        return cls(**row)
