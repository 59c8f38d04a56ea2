"""Planner: which family, and how its budget is divided, from public facts alone.

One number says how much noisy tables can tell, the *signal*: what a cell of a candidate table holds
on average over the noise that it would get if the whole budget went on all candidates at once,

    signal = μ · n / (√candidates · mean number of cells a candidate),

with μ the whole Gaussian budget of (ε, δ), n the public number of rows, and the candidates of
`dpsynth.chosen`. Shares of μ² for what is measured, and the number of bins, are interpolated in
log(signal) between the knots of `planner.json`, level outside of them; shares at the signal that
candidates have apart for each level of the target, since those of many levels have thin tables of
label × column, whatever is asked next.

DP-SGD has one share at every signal: what a larger one takes from tables it does not earn back.

`scripts/fit_planner.py` fits all of it on simulated and public tables;
experiments/planner/README.md has the evidence.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.checks import UsageError, check_count, check_fraction, check_positive
from dpsynth.chosen import candidates
from dpsynth.codec import Layout
from dpsynth.mixture import anchored, classed
from dpsynth.privacy.calibration import whole_mu
from dpsynth.privacy.events import Event
from dpsynth.privacy.metadata import spent_events
from dpsynth.schema import Schema

__all__ = [
    "AUTO",
    "CODEC",
    "SHARES",
    "Values",
    "bins_for",
    "budget",
    "family_of",
    "shares_of",
    "signal",
    "slots",
    "values",
]

# The name that stands for the planner's choice of a family; no recipe bears it.
AUTO = "auto"
# Slots of a number: they decide the shapes of networks, so they are the same for every budget.
CODEC: Mapping[str, int] = {"bins": 20, "heaps": 16}
# Parts of the squared Gaussian budget where no tables are chosen. A noisy row count is only taken
# where none is declared.
SHARES: Mapping[str, float] = {"rows": 0.01, "codec": 0.1, "marginals": 0.3, "tables": 0.0}
_FILE = Path(__file__).with_name("planner.json")


@dataclass(frozen=True)
class Values:
    """What was fitted.

    Attributes:
        knots: Signals, ascending.
        codec: Share of the codec at each knot.
        marginals: Share of the label × column tables at each knot.
        bins: Bins of a number at each knot, at most as many as there are slots.
        trained: Share of DP-SGD; the chosen tables get the rest.
        faint: Signal below which DP-SGD does not pay.
        wide: Most levels W of a model with W × W weights.
        widest: Most levels W for which tables are chosen.
    """

    knots: tuple[float, ...]
    codec: tuple[float, ...]
    marginals: tuple[float, ...]
    bins: tuple[int, ...]
    trained: float
    faint: float
    wide: int
    widest: int

    def __post_init__(self) -> None:
        if any(b <= a for a, b in zip((0.0, *self.knots), self.knots, strict=False)):
            raise UsageError(f"planner: knots={self.knots} must be positive and ascend")
        for name in ("codec", "marginals"):
            shares = getattr(self, name)
            if len(shares) != len(self.knots) or not all(0 < share < 1 for share in shares):
                raise UsageError(f"planner: {name}={shares} must be a share between 0 and 1 a knot")
        if len(self.bins) != len(self.knots) or not all(
            2 <= number <= CODEC["bins"] for number in self.bins
        ):
            raise UsageError(
                f"planner: bins={self.bins} must be between 2 and {CODEC['bins']} a knot"
            )
        if not 0 < self.trained < 1:
            raise UsageError(f"planner: trained={self.trained} must be a share between 0 and 1")
        parts = zip(self.codec, self.marginals, strict=True)
        if any(sum(part) + self.trained >= 1 - SHARES["rows"] for part in parts):
            raise UsageError("planner: shares of a knot leave nothing for the chosen tables")

    def at(self, signal: float, values: tuple[float, ...]) -> float:
        """Values of the knots, interpolated."""
        place = math.log(min(max(signal, self.knots[0]), self.knots[-1]))
        return float(np.interp(place, np.log(self.knots), values))

    def shares(self, at: float) -> dict[str, float]:
        """Shares of the measuring stages at a signal; what they leave is DP-SGD's."""
        codec, marginals = (self.at(at, values) for values in (self.codec, self.marginals))
        found = {"rows": SHARES["rows"], "codec": codec, "marginals": marginals}
        tables = 1 - codec - marginals - self.trained
        return {name: round(share, 4) for name, share in {**found, "tables": tables}.items()}


@functools.lru_cache(maxsize=1)
def values() -> Values:
    """The fitted values, as they are shipped."""
    held = json.loads(_FILE.read_text(encoding="utf-8"))["values"]
    read: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
    return Values(**read)


def slots(codec: Mapping[str, Any]) -> dict[str, int]:
    """`bins` and `heaps` of a recipe's codec, defaults filled in."""
    return {**CODEC, **{name: count for name, count in codec.items() if count is not None}}


def signal(layout: Layout, mu: float, rows: int, *, apart: bool = False) -> float:
    """How much noisy tables of a layout can tell.

    Args:
        layout: Public shape of encoded rows.
        mu: The whole Gaussian budget; inf without privacy.
        rows: Public number of rows.
        apart: With candidates apart for each level of the target, asked so or not; but not where
            it is a number, which loses by it.

    Returns:
        See the module; inf where there is no candidate.
    """
    thin = apart and classed(layout) and not anchored(layout)
    scale = _scale(layout) * (layout.groups if thin else 1)
    return mu * rows / scale if scale else math.inf


@functools.lru_cache(maxsize=256)
def _scale(layout: Layout) -> float:
    """√candidates · their mean number of cells; 0 without candidates."""
    asked = candidates(layout)
    if not asked:
        return 0.0
    cells = np.mean([math.prod(layout.levels[column] for column in columns) for columns in asked])
    return math.sqrt(len(asked)) * float(cells)


def budget(epsilon: float, delta: float, spent: tuple[Event, ...], contributions: int) -> float:
    """The whole Gaussian budget μ of one row, after what was `spent`; inf without privacy."""
    if math.isinf(epsilon):
        return math.inf
    return whole_mu(epsilon, delta, spent, contributions) / contributions


def shares_of(layout: Layout, mu: float, rows: int) -> dict[str, float]:
    """Parts of μ² of each measuring stage of a family that chooses tables.

    Args:
        layout: Public shape of encoded rows.
        mu: The whole Gaussian budget μ of one row; inf without privacy.
        rows: Public number of rows.
    """
    return values().shares(signal(layout, mu, rows, apart=True))


def bins_for(layout: Layout, mu: float, rows: int) -> int:
    """How many bins to make of a number; never more than there are slots.

    Args:
        layout: Public shape of encoded rows.
        mu: The whole Gaussian budget μ of one row; inf without privacy.
        rows: Public number of rows.
    """
    return round(values().at(signal(layout, mu, rows), values().bins))


def family_of(
    schema: Schema, epsilon: float, privacy: Mapping[str, Any], codec: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The family that suits a table, and those of its options that are not as usual.

    `autoregressive`, unless the signal is so small that DP-SGD learns nothing (`mixture`), or a
    row has so many levels W that W × W weights cost too much (`diffusion`, without chosen tables
    where even these do). A table whose number of rows is not public is taken for large enough.

    Args:
        schema: Public facts.
        epsilon: Target ε; inf for none.
        privacy: Settings of the plan, as in `Recipe.privacy`.
        codec: `bins` and `heaps`, as in `Recipe.codec`.

    Raises:
        UsageError: On an ε, δ or number of contributions that no plan takes.
    """
    check_positive("epsilon", epsilon, allow_inf=True)
    delta = privacy.get("delta", 1e-5)
    check_fraction("delta", delta)
    contributions = privacy.get("contributions", 1)
    check_count("contributions", contributions)
    layout, fitted = Layout.of(schema, **slots(codec)), values()
    if layout.width > fitted.widest:
        return "diffusion", {"components": 0}
    if layout.width > fitted.wide:
        return "diffusion", {}
    rows = schema.expected_rows
    if rows is None:
        return "autoregressive", {}
    of = {"unit": privacy.get("unit", "record"), "contributions": contributions}
    spent = tuple(spent_events(schema, **of))
    found = signal(layout, budget(epsilon, delta, spent, contributions), rows)
    return ("mixture" if found < fitted.faint else "autoregressive"), {}
