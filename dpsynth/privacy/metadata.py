"""Metadata: what a draft schema leaves open, measured from private rows and paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm

from dpsynth.checks import RefusedError, UsageError, check_count, check_fraction, check_positive
from dpsynth.data import as_floats, bounded_rows, check_columns, unit_ids
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.privacy.plan import gaussian_mu
from dpsynth.randomness import Stream
from dpsynth.schema import MAX_LEVELS, Column, Schema, as_level

__all__ = ["Budget", "measure", "selection_failure", "spent_epsilon", "spent_events"]

OTHER = "other"
RECORD = "record"
# Noisy counts lie on a grid of this width (see `mechanisms.HistogramNoise`).
_NOISE_GRID = 2.0**-10
# Chance that noise alone carries any empty bucket of a column over the threshold.
_FALSE_BUCKET = 1e-4
# A ledger must never come out above its target: the accountant rounds up by less than this.
_BELOW = 1 - 4e-7


@dataclass(frozen=True)
class Budget:
    """What measuring may cost a unit: ε at δ, or the Gaussian budget μ and δ.

    With ε half of δ pays for levels that only one unit has, if any column is categorical; with μ
    all of it does, and μ is what the Gaussian noise costs.
    """

    delta: float
    epsilon: float | None = None
    mu: float | None = None

    def __post_init__(self) -> None:
        check_fraction("delta", self.delta)
        if (self.epsilon is None) == (self.mu is None):
            raise UsageError("budget: give either epsilon or mu")
        check_positive("epsilon" if self.mu is None else "mu", self.epsilon or self.mu or 0.0)

    def split(self, selections: int) -> tuple[float, float]:
        """(μ of all noise together, δ of each of so many selections of levels)."""
        if self.mu is not None:
            return self.mu, self.delta / max(selections, 1)
        assert self.epsilon is not None
        failure = self.delta / 2 / max(selections, 1)
        return gaussian_mu(self.epsilon, self.delta - failure * selections) * _BELOW, failure


def measure(
    frame: pd.DataFrame,
    draft: Schema,
    budget: Budget,
    *,
    rng: Stream,
    unit: str = RECORD,
    contributions: int = 1,
    noise: str = "philox:seed",
) -> Schema:
    """Measure open levels, open bounds and an undeclared number of rows.

    The schema returned is a release under differential privacy: (ε, δ) as budgeted for one unit
    more or less, whatever else is in the rows. It lists in `spent` what every training on the same
    rows must count. The budget μ² is shared equally.

    Args:
        frame: Private rows: the draft's columns and the `unit` column.
        draft: Public facts; `open` columns are measured, and the number of rows where
            `expected_rows` is not given.
        budget: What it may cost.
        rng: Source of noise and of the sample of each unit's rows.
        unit: `record`, or the column that says who owns a row. Rows without an owner are left
            out.
        contributions: Most rows of one unit; more are dropped at random before anything is read.
        noise: Where `rng` comes from, as the ledger is to say it.

    Raises:
        RefusedError: On a fact read off the data, or facts measured under another unit.
        UsageError: On columns that are not the draft's, a draft that leaves nothing open, or an
            outcome without a level or bound. The last is paid for like any other.
    """
    opened = [column for column in draft.columns if column.open]
    parts = len(opened) + (draft.expected_rows is None)
    _check_draft(draft, parts, budget)
    ledger = Ledger(budget.delta, unit=unit, contributions=contributions, noise=noise)
    spent_events(draft, unit=unit, contributions=contributions)
    frame = check_columns(frame, draft, None if unit == RECORD else unit)
    if unit != RECORD:
        frame = _bounded(frame, unit, contributions, rng)
    mu, failure = budget.split(sum(not column.numeric for column in opened))
    measurer = Measurer(ledger, mu / contributions, parts, rng)
    known = {}
    for column in opened:
        values = frame[column.name]
        if column.numeric:
            known[column.name] = _with_bounds(column, values, measurer)
        else:
            known[column.name] = _with_levels(column, values, measurer, ledger, failure)
    columns = tuple(known.get(column.name, column) for column in draft.columns)
    if draft.expected_rows is None:
        counted = measurer.histograms("rows", 1)(np.array([float(len(frame))]))
        draft = replace(
            draft, expected_rows=max(1, round(float(counted[0]))), rows_provenance="measured"
        )
    return replace(draft, columns=columns, spent=(*draft.spent, *_rows_of(ledger)))


def spent_events(schema: Schema, *, unit: str = RECORD, contributions: int = 1) -> list[Event]:
    """What measuring a schema cost, as events of a ledger with this unit and contributions.

    A schema measured on at most k rows a unit also serves a training on more: there each Gaussian
    event is charged as if k had been that many.

    Raises:
        RefusedError: Where it was measured under another unit, or for fewer contributions.
        UsageError: On what is no event.
    """
    events = []
    for row in schema.spent:
        if row["unit"] != unit or row["contributions"] > contributions:
            raise RefusedError(
                f"schema: {row['what']!r} was measured with unit={row['unit']} and contributions="
                f"{row['contributions']}, not {unit} and {contributions}; measure it again"
            )
        apart = {"unit", "contributions", "noise"}
        events.append(Event.from_dict({k: v for k, v in row.items() if k not in apart}))
    return events


def spent_epsilon(schema: Schema, delta: float) -> float:
    """ε at `delta` of all that measuring a schema cost; 0 if nothing was measured."""
    if not schema.spent:
        return 0.0
    unit = schema.spent[0]["unit"]
    most = max(row["contributions"] for row in schema.spent)
    ledger = Ledger(delta, unit=unit, contributions=most)
    for event in spent_events(schema, unit=unit, contributions=most):
        ledger.pay(event)
    return ledger.epsilon


def _check_draft(draft: Schema, parts: int, budget: Budget) -> None:
    for column in draft.columns:
        if column.provenance == "data":
            raise RefusedError(
                f"column {column.name!r}: was read off the data; declare it, or leave its levels "
                "or bounds out and set open to true"
            )
    if draft.expected_rows is not None and draft.rows_provenance == "data":
        raise RefusedError(
            f"expected_rows={draft.expected_rows}: was read off the data; declare it, or leave it "
            "out"
        )
    if not parts:
        raise UsageError("draft leaves nothing open: all columns and expected_rows are declared")
    if draft.expected_rows is not None and budget.delta >= 1 / draft.expected_rows:
        raise UsageError(
            f"delta={budget.delta:g}: must be below 1/expected_rows={1 / draft.expected_rows:.3g}"
        )


def _bounded(frame: pd.DataFrame, unit: str, contributions: int, rng: Stream) -> pd.DataFrame:
    units, owned = unit_ids(frame[unit])
    frame, units = frame[owned], units[owned]
    return frame.iloc[bounded_rows(units, contributions, rng)]


def _rows_of(ledger: Ledger) -> list[dict[str, object]]:
    """Its events as a schema holds them."""
    under = {"unit": ledger.unit, "contributions": ledger.contributions, "noise": ledger.noise}
    return [{**event.to_dict(), **under} for event in ledger.events]


# -- levels --------------------------------------------------------------------------------------


def _with_levels(
    column: Column, values: pd.Series, measurer: Measurer, ledger: Ledger, failure: float
) -> Column:
    """Partition selection: the levels whose noisy count is above a threshold that a level of one
    unit alone passes with probability at most `failure` (Korolova et al. 2009; Gopi et al. 2020,
    arXiv 2006.03684, with Gaussian noise)."""
    other = column.other or OTHER
    what = f"levels:{column.name}"
    noise = measurer.histograms(what, 1)
    threshold = _threshold(noise.sigma, ledger.contributions, failure)
    lets_through = selection_failure(threshold, noise.sigma, ledger.contributions)
    ledger.pay(Event(what, "failure", delta=lets_through))
    names = as_level(values).dropna()
    listed = {*column.levels, other}
    counts = names[~names.isin(list(listed))].value_counts().sort_index()
    noisy = noise(counts.to_numpy(dtype=float))
    passed = noisy > threshold
    found = sorted(zip(-noisy[passed], counts.index[passed], strict=True))
    room = MAX_LEVELS - len(listed)
    kept = [name for _, name in found][: min(column.max_levels or room, room)]
    # By name: the order of counts, noisy as they are, is nobody's business.
    levels = tuple(sorted({*kept, *listed}))
    if len(levels) < 2:
        raise UsageError(
            f"column {column.name!r}: no level stands out from the noise, and what that took is "
            "spent; list levels, raise epsilon or drop it"
        )
    facts = {"open": False, "max_levels": None, "provenance": "measured"}
    return replace(column, levels=levels, other=other, **facts)


def selection_failure(threshold: float, sigma: float, contributions: int) -> float:
    """Most probable way for a unit of k rows to get a level of its own over the threshold:
    max over m of P[k−m+1 + N(0, σ²) > t] + (m−1)·P[1 + N(0, σ²) > t].

    A unit with m levels of its own has at least a row in each and k in all. For t ≥ k the tail is
    convex in the count, so the union bound is greatest where all rows beyond one a level are in
    one level.

    Args:
        threshold: t, at least `contributions`.
        sigma: Standard deviation of the noise, in rows.
        contributions: k.

    Raises:
        UsageError: On a threshold below `contributions`.
    """
    check_count("contributions", contributions)
    if threshold < contributions:
        raise UsageError(f"threshold={threshold:g}: must be at least {contributions} rows")
    own = np.arange(1, contributions + 1)
    tallest = norm.sf((threshold - (contributions - own + 1)) / sigma)
    return float((tallest + (own - 1) * norm.sf((threshold - 1) / sigma)).max())


def _threshold(sigma: float, contributions: int, failure: float) -> float:
    """The least t on the grid of the noise that keeps `selection_failure` at or below `failure`.

    A noisy count above a t on its grid was above t before it was rounded.
    """

    def excess(threshold: float) -> float:
        return math.log(selection_failure(threshold, sigma, contributions) / failure)

    low, high = float(contributions), contributions + sigma * norm.isf(failure / contributions)
    root = low if excess(low) <= 0 else float(brentq(excess, low, max(high, low) + sigma))
    threshold = math.ceil(root / _NOISE_GRID) * _NOISE_GRID
    while selection_failure(threshold, sigma, contributions) > failure:
        threshold += _NOISE_GRID
    return threshold


# -- bounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Buckets:
    """Signed powers of two: bucket 0 is 0, ±i is ±[2^(first+i−1), 2^(first+i)), and the outermost
    ones take whatever lies beyond. Decimals go from 2^-20 to 2^60, integers from 1 to 2^53."""

    whole: bool

    @property
    def first(self) -> int:
        return 0 if self.whole else -20

    @property
    def most(self) -> int:
        return 53 if self.whole else 80

    def number(self, values: np.ndarray) -> np.ndarray:
        """Bucket of each finite value."""
        # frexp: |x| = mantissa · 2^exponent with the mantissa in [.5, 1).
        exponent = np.frexp(np.abs(values))[1] - self.first
        size = np.clip(np.where(values == 0, 0, exponent), 0, self.most)
        return np.where(values < 0, -size, size)

    def upper(self, number: int) -> float:
        """Greatest value of a bucket (decimals: the edge above it)."""
        if number == 0:
            return 0.0
        if number < 0:
            return -(2.0 ** (self.first - number - 1))
        return 2.0 ** (self.first + number) - self.whole

    def lower(self, number: int) -> float:
        """Least value of a bucket (decimals: the edge below it)."""
        return 0.0 - self.upper(-number)


def _with_bounds(column: Column, values: pd.Series, measurer: Measurer) -> Column:
    """The range of all buckets with more rows than noise alone would show; values beyond it are
    clipped by rule and counted nowhere."""
    buckets = _Buckets(column.kind == "integer")
    noise = measurer.histograms(f"bounds:{column.name}", 1)
    numbers = as_floats(values)
    numbers = np.clip(numbers[np.isfinite(numbers)], column.lower, column.upper)
    numbers = np.round(numbers) if buckets.whole else numbers
    size = 2 * buckets.most + 1
    counts = np.bincount(buckets.number(numbers) + buckets.most, minlength=size)
    noisy = noise(counts.astype(float))
    kept = np.flatnonzero(noisy > noise.sigma * norm.isf(_FALSE_BUCKET / size)) - buckets.most
    if not len(kept):
        raise UsageError(
            f"column {column.name!r}: no range stands out from the noise, and what that took is "
            "spent; declare bounds, raise epsilon or drop it"
        )
    lower, upper = _range(column, buckets, int(kept[0]), int(kept[-1]))
    return replace(column, lower=lower, upper=upper, open=False, provenance="measured")


def _range(column: Column, buckets: _Buckets, first: int, last: int) -> tuple[float, float]:
    """Bounds from bucket `first` to `last`: declared ones as they are, the others on a multiple of
    the step, and never a single value."""
    lower = column.lower if column.lower is not None else buckets.lower(first)
    upper = column.upper if column.upper is not None else buckets.upper(last)
    while upper <= lower:  # all in one bucket of one value, or beside a declared bound
        if column.upper is None:
            last += 1
            upper = buckets.upper(last)
        else:
            first -= 1
            lower = buckets.lower(first)
    if column.step is None:
        return lower, upper
    origin = lower if column.lower is not None else upper if column.upper is not None else 0.0
    if column.lower is None:
        lower = round(origin - math.ceil((origin - lower) / column.step) * column.step, 12)
    if column.upper is None:
        upper = round(origin + math.ceil((upper - origin) / column.step) * column.step, 12)
    return lower, upper
