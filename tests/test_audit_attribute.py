"""Inference and singling out on tables of which it is known how much they give away."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpsynth.audit.attribute import Advantage, infer_attributes, single_out, wilson
from dpsynth.audit.neighbours import MISSING, quantile_map
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

LEVELS = tuple("abcd")
SCHEMA = Schema(
    (
        *(Column(f"x{i}", "decimal", lower=-9.0, upper=9.0, nullable=i == 0) for i in range(3)),
        Column("spike", "integer", lower=0, upper=99),
        Column("job", "categorical", levels=LEVELS, nullable=True),
    )
)


def simulated(rows: int, rng: np.random.Generator) -> Table:
    """The job follows x0 loosely, the spike is 0 in four rows of five, everything has gaps."""
    x = rng.normal(size=(rows, 3)).clip(-9, 9)
    frame = pd.DataFrame(x, columns=["x0", "x1", "x2"])
    jobs = np.digitize(x[:, 0] + rng.normal(size=rows), [-1, 0, 1])
    frame["spike"] = np.where(rng.random(rows) < 0.8, 0, rng.integers(1, 99, rows))
    frame["job"] = pd.Series(np.array(LEVELS)[jobs], dtype=object)
    frame.loc[rng.random(rows) < 0.1, "x0"] = np.nan
    frame.loc[rng.random(rows) < 0.1, "job"] = None
    return Table.from_frame(frame, SCHEMA)


def parts(rows: int, seed: int) -> dict[str, Table]:
    rng = np.random.default_rng(seed)
    return {name: simulated(rows, rng) for name in ("members", "holdout", "reference")}


def infer(synthetic: Table, tables: dict[str, Table], **options: Any) -> dict[Any, Advantage]:
    settings = {"rng": np.random.default_rng(0), **options}
    found = infer_attributes(synthetic, **tables, **settings)
    return {(each.target, each.attacker): each for each in found}


# -- intervals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("hits", "trials"), [(0, 9), (9, 9), (3, 10), (70, 700)])
def test_wilson_equals_scipy(hits: int, trials: int) -> None:
    known = stats.binomtest(hits, trials).proportion_ci(0.95, "wilson")
    assert wilson(hits, trials) == pytest.approx((hits / trials, known.low, known.high))


def test_newcombe_as_published() -> None:
    """Newcombe 1998, table II, method 10: 56/70 − 48/80, 9/10 − 3/10, and 5/56 − 0/29."""
    for counts, known in (
        ((56, 70, 48, 80), (0.2, 0.0524, 0.3339)),
        ((9, 10, 3, 10), (0.6, 0.1705, 0.8090)),
        ((5, 56, 0, 29), (0.0893, -0.0381, 0.1926)),
    ):
        assert Advantage("a", "b", *counts).difference == pytest.approx(known, abs=6e-5)


def test_advantage_and_difference_agree_on_zero() -> None:
    """For all small counts; and the interval holds the value unless nothing is known."""
    for first in range(9):
        for second in range(13):
            each = Advantage("a", "b", first, 8, second, 12)
            value, low, high = each.advantage
            _, least, most = each.difference
            assert -1 <= low <= value <= high <= 1
            assert (low > 0) == (least > 1e-12), (first, second)
            assert (high < 0) == (most < -1e-12), (first, second)
            if second < 12:
                rates = (first / 8 - second / 12) / (1 - second / 12)
                assert value == pytest.approx(max(-1, rates))
            else:
                assert value == (0 if first == 8 else -1)
    assert Advantage("a", "b", 50, 50, 60, 60).advantage == (0, -1, 1)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.7, 0.4), (0.95, 0.9), (0.1, 0.1)])
def test_intervals_cover_as_often_as_they_say(p: float, q: float) -> None:
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    draws = list(zip(rng.binomial(150, p, 1000), rng.binomial(200, q, 1000), strict=True))
    for a, b in draws:
        each = Advantage("a", "b", int(a), 150, int(b), 200)
        for i, (truth, (_, low, high)) in enumerate(
            ((p - q, each.difference), ((p - q) / (1 - q), each.advantage))
        ):
            covered[i] += low <= truth <= high
    assert (covered / 1000 >= 0.93).all() and (covered / 1000 <= 0.975).all()


# -- attribute inference -----------------------------------------------------------------------


def test_a_copy_gives_every_secret_away() -> None:
    tables = parts(400, 0)
    found = infer(tables["members"], tables, bins=4)
    assert list(found) == [(n, a) for n in SCHEMA.names for a in ("trees", "nearest")]
    for name in SCHEMA.names:
        value, low, _ = found[name, "nearest"].advantage
        assert value > 0.97 and low > 0.9
    # Trees remember numbers that say nothing of each other, less sharply.
    assert found["x1", "trees"].advantage[1] > 0.1


def test_strangers_give_no_advantage_over_seeds() -> None:
    """Six attackers times 6 seeds at 5 %: fewer than 30 of 36 once in 500 suites, if independent;
    the seeds are fixed."""
    covered, values = [], []
    for seed in range(6):
        tables = parts(300, 10 + seed)
        synthetic = simulated(300, np.random.default_rng(700 + seed))
        found = infer(synthetic, tables, secrets=["x1", "spike", "job"], bins=3)
        for each in found.values():
            value, low, high = each.advantage
            covered.append(low <= 0 <= high)
            values.append(value)
    assert sum(covered) >= 30
    assert abs(np.mean(values)) < 0.03


def test_what_holds_in_the_population_is_no_advantage() -> None:
    """The job follows x0 in any honest sample: trees guess well, equally for both."""
    tables = parts(1500, 1)
    synthetic = simulated(1500, np.random.default_rng(5))
    each = infer(synthetic, tables, secrets=["job"], max_candidates=3000)["job", "trees"]
    assert each.members[1] > 0.3 > 1 / len(LEVELS)
    _, low, high = each.advantage
    assert low <= 0 <= high


def test_nearest_row_is_that_of_all_other_columns() -> None:
    """Against every pair, one secret at a time, through guesses of a column that names the row."""
    rng = np.random.default_rng(2)
    tables = parts(40, 2)
    synthetic = simulated(50, rng)
    measure = quantile_map(tables["reference"])
    x, y = (measure(t) for t in (tables["members"], synthetic))
    absent = [f.numbers == MISSING for f in (x, y)]
    numbers = [np.where(a, 0.5, f.numbers) for a, f in zip(absent, (x, y), strict=True)]
    parts_of = [(numbers[0][:, None, j] - numbers[1][:, j]) ** 2 for j in range(4)]
    parts_of = [p + (absent[0][:, None, j] != absent[1][:, j]) for j, p in enumerate(parts_of)]
    parts_of.append((x.codes[:, None, 0] != y.codes[:, 0]).astype(float))
    found = infer(synthetic, tables, max_candidates=80, bins=4)
    for j, name in enumerate(SCHEMA.names):
        missing = synthetic.frame[name].isna().to_numpy()
        others = sum(p for i, p in enumerate(parts_of) if i != j)
        spot = np.where(missing, np.inf, others).argmin(axis=1)
        guessed = synthetic.frame[name].iloc[spot].reset_index(drop=True)
        truth = tables["members"].frame[name]
        if SCHEMA[name].numeric:
            known = tables["reference"].frame[name].to_numpy(dtype=float, na_value=np.nan)
            cuts = np.quantile(known[~np.isnan(known)], [0.25, 0.5, 0.75])
            # The spike: all three quartiles are 0, so zeros are one bin and the rest another.
            both = [v.to_numpy(dtype=float, na_value=np.nan) for v in (guessed, truth)]
            bins = [np.digitize(v, [*cuts, *(np.nextafter(0, 1),) * (j == 3)]) for v in both]
            hits = ((bins[0] == bins[1]) & ~np.isnan(both[1])).sum()
        else:
            hits = (guessed.astype(object) == truth.astype(object)).sum()
        each = found[name, "nearest"]
        assert (each.member_hits, each.member_trials) == (hits, truth.notna().sum()), name


def test_candidates_are_equally_many_and_reproducible() -> None:
    tables = parts(120, 3)
    tables["holdout"] = tables["holdout"].take(np.arange(70))
    synthetic = simulated(100, np.random.default_rng(1))
    first = infer(synthetic, tables, secrets=["x1"], max_train=50)
    assert first == infer(synthetic, tables, secrets=["x1"], max_train=50)
    assert {(e.member_trials, e.control_trials) for e in first.values()} == {(70, 70)}
    few = infer(synthetic, tables, secrets=["x1"], max_candidates=21)
    assert {(e.member_trials, e.control_trials) for e in few.values()} == {(10, 10)}


def test_a_constant_secret_and_an_empty_column_are_no_obstacle() -> None:
    tables = parts(80, 4)
    frame = simulated(80, np.random.default_rng(2)).frame.assign(x1=1.0, x0=np.nan)
    synthetic = Table.from_frame(frame, SCHEMA, strict=False)
    found = infer(synthetic, tables, secrets=["x1", "job"])
    assert found["x1", "trees"].members[0] == found["x1", "nearest"].members[0] < 0.4


# -- singling out ------------------------------------------------------------------------------


def isolate(synthetic: Table, tables: dict[str, Table], **options: Any) -> dict[str, Advantage]:
    settings: dict[str, Any] = {"rng": np.random.default_rng(0), **options}
    sides = {name: tables[name] for name in ("members", "holdout")}
    found = single_out(synthetic, **sides, **settings)
    assert all(each.attacker == "single_out" for each in found)
    return {each.target: each for each in found}


def test_a_copy_isolates_its_members() -> None:
    tables = parts(500, 5)
    found = isolate(tables["members"], tables, predicates=200)
    for kind in ("univariate", "multivariate"):
        # By construction each isolates one row of the copy.
        assert found[kind].members[0] == 1
        assert found[kind].member_trials >= 100
        assert found[kind].advantage[1] > 0.9


def test_strangers_are_isolated_no_less() -> None:
    covered, rates = [], []
    for seed in range(20):
        tables = parts(200, 50 + seed)
        synthetic = simulated(200, np.random.default_rng(900 + seed))
        found = isolate(synthetic, tables, predicates=200)
        assert list(found) == ["univariate", "multivariate"]
        for each in found.values():
            _, low, high = each.advantage
            covered.append(low <= 0 <= high)
            rates.append(each.control[0])
    # 40 intervals at 5 %: more than five misses once in 70 suites; the seeds are fixed.
    assert sum(covered) >= 35
    # A table's own outliers isolate rows of any other table: without a control that is an alarm.
    assert np.mean(rates) > 0.01


def test_predicates_by_hand() -> None:
    schema = Schema(
        (
            Column("n", "integer", lower=0, upper=99, nullable=True),
            Column("c", "categorical", levels=("a", "b", "z")),
        )
    )

    def table(*rows: tuple[float | None, str]) -> Table:
        return Table.from_frame(pd.DataFrame(rows, columns=["n", "c"]), schema)

    # Unique: n missing, n = 3, n ≤ 3, n = 9, n ≥ 9, c = z; n = 5 occurs twice.
    synthetic = table((None, "a"), (3, "a"), (5, "b"), (5, "b"), (9, "z"))
    members = table((None, "b"), (4, "a"), (50, "a"), (9, "a"), (7, "z"))
    holdout = table((None, "b"), (None, "a"), (3, "a"), (2, "b"), (8, "b"))
    (each, *_) = single_out(
        synthetic, members=members, holdout=holdout, rng=np.random.default_rng(0)
    )
    assert (each.target, each.member_trials) == ("univariate", 6)
    # Members: n missing, n = 9, c = z isolate; n = 3 and n ≤ 3 hold for none, n ≥ 9 for two.
    # Control: n = 3 isolates; n missing and n ≤ 3 hold for two.
    assert (each.member_hits, each.control_hits) == (3, 1)


def test_a_table_of_nothing_unique_gives_no_predicate() -> None:
    schema = Schema((Column("c", "categorical", levels=("a", "b")),))
    rows = Table.from_frame(pd.DataFrame({"c": ["a", "b"] * 10}), schema)
    assert single_out(rows, members=rows, holdout=rows, rng=np.random.default_rng(0)) == ()


# -- refusals ----------------------------------------------------------------------------------


def test_refuses_counts() -> None:
    with pytest.raises(UsageError, match="trials=0"):
        wilson(0, 0)
    with pytest.raises(UsageError, match="hits=-1"):
        wilson(-1, 3)
    with pytest.raises(UsageError, match="hits=4: more than the 3 trials"):
        wilson(4, 3)
    with pytest.raises(UsageError, match="more than"):
        Advantage("a", "b", 4, 3, 0, 3)
    with pytest.raises(UsageError, match="trials=0"):
        Advantage("a", "b", 1, 3, 0, 0)


def test_refuses_tables() -> None:
    tables, rng = parts(20, 6), np.random.default_rng(0)
    synthetic = simulated(20, rng)
    with pytest.raises(UsageError, match="synthetic and members have different schemas"):
        infer(synthetic.select(["x0", "x1"]), tables)
    with pytest.raises(UsageError, match="reference has 1 rows"):
        infer(synthetic, {**tables, "reference": tables["reference"].take(np.arange(1))})
    with pytest.raises(UsageError, match="'pay': no such column"):
        infer(synthetic, tables, secrets=["pay"])
    with pytest.raises(UsageError, match="no other column"):
        infer(synthetic.select(["x1"]), {n: t.select(["x1"]) for n, t in tables.items()})
    for name in ("bins", "max_train", "max_candidates"):
        with pytest.raises(UsageError, match=f"{name}=1"):
            infer(synthetic, tables, **{name: 1})
    empty = Table.from_frame(synthetic.frame.assign(x0=math.nan), SCHEMA, strict=False)
    with pytest.raises(UsageError, match="'x0': is missing in all candidates of a side"):
        infer(synthetic, {**tables, "holdout": empty}, secrets=["x0"])
    with pytest.raises(UsageError, match="'x0': is missing in all synthetic rows"):
        infer(empty, tables, secrets=["x0"])
    with pytest.raises(UsageError, match="synthetic has 1 rows"):
        isolate(synthetic.take(np.arange(1)), tables)
    for name in ("predicates", "columns"):
        with pytest.raises(UsageError, match=f"{name}=0"):
            isolate(synthetic, tables, **{name: 0})


def test_device_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = parts(30, 7)
    synthetic = simulated(30, np.random.default_rng(0))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU"):
        infer(synthetic, tables, device="cuda", secrets=["job"])
    assert infer(synthetic, tables, device="auto", secrets=["job"])
