"""Measured metadata: what is released, how likely by mistake, what it costs, and that rows reach it
through noise alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.privacy import mechanisms
from dpsynth.privacy.metadata import (
    Budget,
    measure,
    selection_failure,
    spent_epsilon,
    spent_events,
)
from dpsynth.randomness import secure_stream, stream
from dpsynth.schema import MAX_LEVELS, Column, Schema

CITY = Column("city", "categorical", open=True)
PAY = Column("pay", "decimal", open=True, nullable=True)
AGE = Column("age", "integer", open=True)
SEX = Column("sex", "categorical", ("f", "m"), source="the form")
LOUD = Budget(1e-6, mu=50.0)


def draft(*columns: Column, rows: int | None = 900) -> Schema:
    return Schema(columns, expected_rows=rows)


def people(rows: int = 600, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "city": rng.choice(["Oslo", "Rome", "Bern"], rows, p=[0.6, 0.3, 0.1]),
            "pay": np.where(rng.random(rows) < 0.1, np.nan, rng.lognormal(7, 1, rows)),
            "age": rng.integers(18, 66, rows),
            "sex": rng.choice(["f", "m"], rows),
        }
    )


def timeless(schema: Schema) -> Schema:
    """Without the time at which each event was paid."""
    return replace(schema, spent=tuple({**e, "when": ""} for e in schema.spent))


def city_levels(frame: pd.DataFrame, budget: Budget, seed: int, **more) -> tuple[str, ...]:
    return (
        measure(frame, draft(CITY, rows=4), budget, rng=stream(seed, "m"), **more).columns[0].levels
    )


# Levels


def partitions(total: int, most: int) -> list[list[int]]:
    """All ways to write `total` as a sum of parts of at most `most`."""
    if total == 0:
        return [[]]
    return [
        [part, *rest]
        for part in range(1, min(total, most) + 1)
        for rest in partitions(total - part, part)
    ]


@pytest.mark.parametrize("rows", range(1, 8))
@pytest.mark.parametrize("sigma", [0.5, 3.0, 40.0])
@pytest.mark.parametrize("above", [0.0, 1.0, 5.5, 60.0])
def test_failure_is_the_worst_of_all_ways_to_own_levels(rows, sigma, above):
    threshold = rows + above
    worst = max(
        sum(stats.norm.sf((threshold - count) / sigma) for count in counts)
        for held in range(rows + 1)
        for counts in partitions(held, held)
    )
    assert selection_failure(threshold, sigma, rows) == pytest.approx(worst, rel=1e-12)


@pytest.mark.parametrize(
    ("contributions", "own"), [(1, ["z"]), (3, ["z", "z", "z"]), (3, ["x", "y", "z"])]
)
def test_a_level_of_one_unit_is_let_through_no_more_often_than_charged(contributions, own):
    frame = pd.DataFrame(
        {
            "city": ["a"] * 50 + ["b"] * 50 + own,
            "who": [*range(100)] + [1000] * len(own),
        }
    )
    runs, failure = 600, 0.2
    budget = Budget(failure, mu=0.5 * contributions)
    more = {"unit": "who", "contributions": contributions}
    found = [city_levels(frame, budget, seed, **more) for seed in range(runs)]
    assert all({"a", "b", "other"} <= set(levels) for levels in found)
    slipped = sum(not set(own).isdisjoint(levels) for levels in found)
    assert stats.binomtest(slipped, runs, failure, alternative="greater").pvalue > 1e-3
    if contributions == 1:  # then the bound is met, and a threshold too high would show
        assert stats.binomtest(slipped, runs, failure, alternative="less").pvalue > 1e-3


def test_what_is_charged_is_what_the_threshold_lets_through():
    for delta, rows in itertools.product([1e-9, 1e-4, 0.2], [1, 2, 25]):
        frame = people().assign(who=range(600))
        known = measure(
            frame[["city", "who"]],
            draft(replace(CITY, levels=("Oslo", "Rome")), rows=4),
            Budget(delta, mu=1.0),
            rng=stream(0, "m"),
            unit="who",
            contributions=rows,
        )
        gaussian, failure = spent_events(known, unit="who", contributions=rows)
        assert (gaussian.what, gaussian.mechanism) == ("levels:city", "gaussian")
        assert (failure.what, failure.mechanism) == ("levels:city", "failure")
        assert gaussian.sigma == pytest.approx(rows)
        # The grid of the noise leaves a little unused, never too little.
        assert 0.99 * delta < failure.delta <= delta


def test_common_levels_come_by_name_and_all_else_is_other():
    frame = pd.DataFrame({"city": ["b"] * 300 + ["c"] * 200 + ["a"] * 100 + ["rare", None]})
    assert city_levels(frame, LOUD, 0) == ("a", "b", "c", "other")
    flipped = frame.replace({"a": "c", "c": "a"})
    assert city_levels(flipped, LOUD, 0) == ("a", "b", "c", "other")
    column = replace(CITY, max_levels=2)
    known = measure(frame, draft(column), LOUD, rng=stream(0, "m"))
    assert known["city"] == Column(
        "city", "categorical", ("b", "c", "other"), other="other", provenance="measured"
    )
    table = Table.from_frame(frame, known, strict=False)
    assert table.frame["city"].value_counts().to_dict() == {"b": 300, "c": 200, "other": 102}


def test_listed_levels_stay_and_are_not_counted():
    column = Column("city", "categorical", ("Atlantis", "?"), other="?", open=True)
    known = measure(people()[["city"]], draft(column), LOUD, rng=stream(0, "m"))["city"]
    assert known.levels == ("?", "Atlantis", "Bern", "Oslo", "Rome")
    assert known.other == "?"


def test_no_more_levels_than_a_schema_holds():
    frame = pd.DataFrame({"city": [f"{i:04}" for i in range(MAX_LEVELS + 5)] * 20})
    assert len(city_levels(frame, LOUD, 0)) == MAX_LEVELS


# Bounds


def bucket(value: float, whole: bool) -> tuple[float, float]:
    """Edges of the power-of-two bucket that holds a value, by counting up."""
    if value < 0:
        low, high = bucket(-value, whole)
        return -high, -low
    edge, most = (1.0, 2.0**53) if whole else (2.0**-20, 2.0**60)
    if value < edge:
        return 0.0, 0.0
    while edge * 2 <= value and edge * 2 < most:
        edge *= 2
    return edge, edge * 2 - whole


@settings(max_examples=150)
@given(
    value=st.floats(-1e20, 1e20)
    | st.integers(-40, 40).map(float)
    | st.integers(-25, 62).map(lambda k: 2.0**k)
    | st.integers(-25, 62).map(lambda k: -(2.0**k)),
    whole=st.booleans(),
)
def test_bounds_of_one_value_are_its_bucket(value, whole):
    column = AGE if whole else replace(PAY, name="age")
    value = float(round(value)) if whole else value
    frame = pd.DataFrame({"age": [value] * 200})
    known = measure(frame, draft(column), LOUD, rng=stream(0, "m"))["age"]
    low, high = bucket(value, whole)
    assert known.lower == low
    if low < high:
        assert known.upper == high
    else:  # a bucket of one value is widened by the next one
        assert known.upper == bucket(max(high + 1, 1) if whole else 2.0**-20, whole)[1] or (
            high != 0 and known.upper > high
        )


@pytest.mark.parametrize("mu", [0.5, 1.0])
@pytest.mark.parametrize("shift", [0.0, -3000.0])
def test_bounds_hold_the_bulk_and_follow_no_single_row(mu, shift):
    rng = np.random.default_rng(3)
    pay = rng.lognormal(7, 1.5, 6000) + shift
    for seed in range(30):
        frame = pd.DataFrame({"pay": [*pay, 1e17, -1e17, np.inf, np.nan]})
        known = measure(frame, draft(PAY), Budget(1e-6, mu=mu), rng=stream(seed, "m"))["pay"]
        low, high = np.quantile(pay, [0.01, 0.99])
        assert known.lower <= low < high <= known.upper
        assert known.lower >= 2 * min(pay.min(), 0)
        assert known.upper <= 2 * pay.max()


def test_odd_cells_count_for_nothing():
    cells = ["12", "13.5", " 14 ", "many", "inf", "1e400", None, "True"]
    frame = pd.DataFrame({"pay": pd.Series(cells * 100, dtype=object)})
    known = measure(frame, draft(PAY), LOUD, rng=stream(0, "m"))["pay"]
    assert (known.lower, known.upper) == (1.0, 16.0)


def test_a_declared_bound_and_the_step_are_kept():
    def bounds(column: Column, values: list[float]) -> tuple[float | None, float | None]:
        frame = pd.DataFrame({column.name: values * 100})
        known = measure(frame, draft(column), LOUD, rng=stream(0, "m"))[column.name]
        assert known.provenance == "measured"
        return known.lower, known.upper

    assert bounds(replace(AGE, lower=0), [20, 40]) == (0, 63)
    assert bounds(replace(AGE, lower=0), [-20, -40]) == (0, 1)
    assert bounds(replace(AGE, lower=7), [7, 7]) == (7, 15)
    assert bounds(replace(AGE, upper=-8), [-9, -8]) == (-15, -8)
    assert bounds(replace(AGE, upper=4), [4, 4]) == (3, 4) or bounds(
        replace(AGE, upper=4), [4, 4]
    ) == (2, 4)
    assert bounds(replace(PAY, step=0.3), [5.0, 6.0]) == (3.9, 8.1)
    assert bounds(replace(PAY, lower=0.5, step=1.0), [5.0, 6.0]) == (0.5, 8.5)
    assert bounds(replace(PAY, upper=9.5, step=1.0), [5.0, 6.0]) == (3.5, 9.5)


# Noise and rows


def test_the_row_count_has_the_noise_that_its_event_says():
    frame = people(1000)[["sex"]]
    errors, sigmas = [], set()
    for seed in range(400):
        known = measure(frame, draft(SEX, rows=None), Budget(1e-6, mu=0.02), rng=stream(seed, "m"))
        assert known.rows_provenance == "measured"
        errors.append(known.expected_rows - 1000)
        (event,) = spent_events(known)
        assert event.what == "rows"
        sigmas.add(event.sigma)
    assert sigmas == {50.0}
    # Rounding to whole rows is small against 50.
    assert stats.kstest(errors, stats.norm(0, 50).cdf).pvalue > 1e-3


def test_nothing_is_fewer_than_one_row():
    known = measure(
        people(2)[["sex"]], draft(SEX, rows=None), Budget(1e-6, mu=0.001), rng=stream(4, "m")
    )
    assert known.expected_rows >= 1
    assert any(
        measure(
            people(2)[["sex"]], draft(SEX, rows=None), Budget(1e-6, mu=0.001), rng=stream(s, "m")
        ).expected_rows
        == 1
        for s in range(8)
    )


def only_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the rows off: a histogram answers with its noise, the same draw at the same call. Buckets
    of public places stand out, so that there are bounds to release."""
    calls = itertools.count()

    def answer(self: mechanisms.HistogramNoise, counts: np.ndarray) -> np.ndarray:
        noise = self.sigma * stream(next(calls), "cut").standard_normal(200)
        noise[60:64] += 1e6 * (len(counts) > 100)
        return noise[: len(counts)]

    monkeypatch.setattr(mechanisms.HistogramNoise, "__call__", answer)


@pytest.mark.parametrize("unit", ["record", "who"])
def test_rows_reach_the_schema_through_noise_alone(unit, monkeypatch):
    columns = (replace(CITY, levels=("Oslo",)), PAY, AGE, SEX)
    few = people(40).assign(who=np.arange(40) // 4)
    strange = pd.DataFrame(
        {
            "city": ["Atlantis", "Oslo", None],
            "pay": [np.inf, -1e300, 7.0],
            "age": [10**6, -4, 0],
            "sex": ["x", None, "f"],
            "who": [99, 99, 99],
        }
    )
    tables = [few, pd.concat([strange, few]), few[few["who"] != 3], strange, few.iloc[:1]]
    found = []
    for table in tables:
        with monkeypatch.context() as patch:
            only_noise(patch)
            known = measure(
                table if unit == "who" else table.drop(columns="who"),
                draft(*columns, rows=None),
                Budget(1e-6, epsilon=0.5),
                rng=stream(0, "m"),
                unit=unit,
                contributions=1 if unit == "record" else 2,
            )
        found.append(timeless(known))
    assert all(known == found[0] for known in found)
    # Not because nothing comes of rows at all.
    seen = measure(people(), draft(*columns, rows=None), LOUD, rng=stream(0, "m"))
    assert seen["age"] != found[0]["age"]


def test_secure_noise_serves_as_well():
    key = 1 << 255
    known = measure(people(), draft(CITY, PAY, AGE, SEX), LOUD, rng=secure_stream(key, "m"))
    assert known["city"].levels == ("Bern", "Oslo", "Rome", "other")


def test_a_unit_counts_for_its_contributions_only():
    frame = pd.DataFrame({"sex": ["f", "m"] * 500, "who": [7] * 900 + [*range(1000, 1100)]})
    known = measure(
        frame, draft(SEX, rows=None), Budget(1e-6, mu=1e5), rng=stream(0, "m"),
        unit="who", contributions=3,
    )  # fmt: skip
    assert known.expected_rows == 103
    frame.loc[0:899, "who"] = None
    known = measure(
        frame, draft(SEX, rows=None), Budget(1e-6, mu=1e5), rng=stream(0, "m"),
        unit="who", contributions=3,
    )  # fmt: skip
    assert known.expected_rows == 100


# Cost


@pytest.mark.parametrize("epsilon", [0.1, 1.0])
@pytest.mark.parametrize("contributions", [1, 3])
@pytest.mark.parametrize("columns", [(AGE, PAY), (CITY, AGE)], ids=["bounds", "levels"])
def test_the_ledger_comes_out_at_the_budget_and_never_above(epsilon, contributions, columns):
    frame = people(9000).assign(who=range(9000))[[c.name for c in columns] + ["who"]]
    unit = {"unit": "who", "contributions": contributions}
    known = measure(
        frame, draft(*columns, rows=None), Budget(1e-6, epsilon=epsilon), rng=stream(0, "m"), **unit
    )
    assert 0.995 * epsilon < spent_epsilon(known, 1e-6) <= epsilon
    wanted = [f"{'bounds' if c.numeric else 'levels'}:{c.name}" for c in columns]
    assert [e.what for e in spent_events(known, **unit) if e.mechanism == "gaussian"] == [
        *wanted, "rows",
    ]  # fmt: skip


def test_a_gaussian_budget_is_shared_equally():
    known = measure(
        people().assign(who=range(600)),
        draft(CITY, PAY, AGE, SEX, rows=None),
        Budget(1e-6, mu=30.0),
        rng=stream(0, "m"),
        unit="who",
        contributions=2,
    )
    sigmas = [e["sigma"] for e in known.spent if e["mechanism"] == "gaussian"]
    assert len(sigmas) == 4
    assert len(set(sigmas)) == 1
    # Noise is stated relative to one row; a unit of two is charged twice the sensitivity.
    assert math.sqrt(sum((2 / sigma) ** 2 for sigma in sigmas)) == pytest.approx(30.0)


def test_a_measured_schema_is_public_and_says_so_only_with_its_events(tmp_path):
    known = measure(
        people(), draft(CITY, PAY, AGE, SEX, rows=None), LOUD, rng=stream(0, "m"), noise="dice"
    )
    known.check_public()
    assert known.measured
    assert Schema.from_json(known.to_json()) == known
    assert {(e["unit"], e["contributions"], e["noise"]) for e in known.spent} == {
        ("record", 1, "dice")
    }
    assert known["sex"] == SEX
    for number in range(len(known.spent)):
        less = replace(known, spent=known.spent[:number] + known.spent[number + 1 :])
        with pytest.raises(RefusedError, match="paid for"):
            less.check_public()
    assert known.select(["sex"]).spent == known.spent
    table = Table.from_frame(people(seed=5), known, strict=False)
    assert len(table) == 600


def test_a_seed_repeats_what_is_measured():
    columns = draft(CITY, PAY, AGE, SEX, rows=None)
    once, again, other = (
        timeless(measure(people(), columns, Budget(1e-6, mu=3.0), rng=stream(seed, "m")))
        for seed in (1, 1, 2)
    )
    assert once == again
    assert once != other


def test_a_second_measurement_adds_to_the_first():
    first = measure(people(), draft(CITY, PAY, AGE, SEX), LOUD, rng=stream(0, "m"))
    second = measure(people(), replace(first, expected_rows=None), LOUD, rng=stream(1, "m"))
    assert second.spent[: len(first.spent)] == first.spent
    assert [event["what"] for event in second.spent[len(first.spent) :]] == ["rows"]
    assert spent_epsilon(second, 1e-6) > spent_epsilon(first, 1e-6)
    assert spent_epsilon(draft(SEX), 1e-6) == 0


# Refusals


def test_a_draft_that_cannot_be_measured_is_refused():
    def refused(error: type, message: str, schema: Schema, **more) -> None:
        with pytest.raises(error, match=message) as caught:
            frame = more.pop("frame", people()[schema.names])
            budget = more.pop("budget", LOUD)
            measure(frame, schema, budget, rng=stream(0, "m"), **more)
        assert "\n" not in str(caught.value)

    refused(UsageError, "leaves nothing open", draft(SEX))
    drafted = replace(SEX, provenance="data")
    refused(RefusedError, "column 'sex': was read off the data", draft(drafted, AGE))
    counted = replace(draft(AGE), rows_provenance="data")
    refused(RefusedError, "expected_rows=900: was read off the data", counted)
    refused(
        UsageError,
        "delta=0.01: must be below 1/expected_rows",
        draft(AGE),
        budget=Budget(0.01, mu=1),
    )
    refused(UsageError, "column 'age': in the schema but not", draft(AGE), frame=people()[["sex"]])
    refused(UsageError, "contributions=2: a record is one row", draft(AGE), contributions=2)
    refused(UsageError, "unit 'who': no such column", draft(AGE), unit="who")
    refused(UsageError, "unit 'age': is a column of the schema", draft(AGE), unit="age")
    quiet = Budget(1e-9, mu=0.001)
    refused(UsageError, "column 'city': no level stands out", draft(CITY), budget=quiet)
    refused(UsageError, "column 'age': no range stands out", draft(AGE), budget=quiet)


def test_a_bad_budget_is_refused():
    for more in ({}, {"epsilon": 1.0, "mu": 1.0}):
        with pytest.raises(UsageError, match="give either epsilon or mu"):
            Budget(1e-6, **more)
    for name, value in itertools.product(("epsilon", "mu"), (0.0, -1.0, math.inf, math.nan)):
        with pytest.raises(UsageError, match=f"{name}=.*: must be a number above 0"):
            Budget(1e-6, **{name: value})
    with pytest.raises(UsageError, match="delta=0"):
        Budget(0.0, mu=1.0)
    with pytest.raises(UsageError, match=r"threshold=2: must be at least 3 rows"):
        selection_failure(2.0, 1.0, 3)
    with pytest.raises(UsageError, match="contributions=0"):
        selection_failure(2.0, 1.0, 0)


def test_facts_measured_under_another_unit_are_refused():
    frame = people().assign(who=range(600))[["age", "who"]]
    known = measure(frame, draft(AGE), LOUD, rng=stream(0, "m"), unit="who", contributions=3)
    assert spent_events(known, unit="who", contributions=3)
    assert spent_events(known, unit="who", contributions=5)
    for unit, contributions in (("who", 2), ("record", 1), ("firm", 3)):
        with pytest.raises(RefusedError, match=r"'bounds:age' was measured with unit=who and"):
            spent_events(known, unit=unit, contributions=contributions)
    with pytest.raises(RefusedError, match="measured with unit=who"):
        measure(people()[["age"]], replace(known, expected_rows=None), LOUD, rng=stream(0, "m"))
    event = {**known.spent[0], "sigma": -1.0}
    with pytest.raises(UsageError, match="sigma=-1"):
        spent_events(replace(known, spent=(event,)), unit="who", contributions=3)
