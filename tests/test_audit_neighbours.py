"""Neighbour distances against a brute-force loop that shares no code with them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpsynth.audit import neighbours
from dpsynth.audit.neighbours import Features, distances, quantile_map, range_map
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("age", "integer", lower=0, upper=90),
        Column("job", "categorical", levels=("a", "b", "c"), nullable=True),
        Column("pay", "decimal", lower=-1.0, upper=3.0, nullable=True),
        Column("home", "categorical", levels=("own", "rent")),
    )
)


def mixed(rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "age": rng.integers(0, 91, rows),
            "job": rng.choice(np.array(["a", "b", "c", None]), rows),
            "pay": np.where(rng.random(rows) < 0.3, np.nan, rng.uniform(-1, 3, rows)),
            "home": rng.choice(["own", "rent"], rows),
        }
    )
    return Table.from_frame(frame, SCHEMA)


def scale_range(name: str, value: float) -> float:
    return value / 90 if name == "age" else (value + 1) / 4


def gap(name: str, left: Any, right: Any, scale) -> float:
    if pd.isna(left) or pd.isna(right):
        return float(pd.isna(left) != pd.isna(right))
    if name in ("job", "home"):
        return float(left != right)
    return abs(scale(name, float(left)) - scale(name, float(right)))


def brute(queries: Table, keys: Table, scale, power: int) -> np.ndarray:
    far = np.empty((len(queries), len(keys)))
    for i, left in enumerate(queries.frame.itertuples(index=False)):
        for j, right in enumerate(keys.frame.itertuples(index=False)):
            pairs = zip(SCHEMA.names, left, right, strict=True)
            gaps = [gap(name, x, y, scale) for name, x, y in pairs]
            far[i, j] = sum(g**power for g in gaps) ** (1 / power)
    return far


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_brute_force_in_every_blocking(
    power: int, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys, measure = mixed(37, 0), mixed(23, 1), range_map(SCHEMA)
    expected = np.sort(brute(queries, keys, scale_range, power), axis=1)[:, :k]
    for block in (1, 200, 1 << 20):
        monkeypatch.setattr(neighbours, "BLOCK", block)
        found = distances(measure(queries), measure(keys), k=k, power=power)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_self_exclusion_leaves_out_the_own_row_only() -> None:
    table, measure = mixed(31, 2), range_map(SCHEMA)
    table = table.take(np.r_[0, np.arange(31)])
    far = brute(table, table, scale_range, 1)
    np.fill_diagonal(far, np.inf)
    found = distances(measure(table), measure(table), exclude_self=True)
    np.testing.assert_allclose(found[:, 0], far.min(axis=1), atol=1e-12)
    assert found[0] == found[1] == 0


def test_quantiles_are_mid_ranks_interpolated_to_the_bounds() -> None:
    schema = Schema((Column("x", "decimal", lower=0.0, upper=10.0),))
    reference = Table.from_frame(pd.DataFrame({"x": [2.0, 4.0, 4.0, 8.0]}), schema)
    wanted = Table.from_frame(pd.DataFrame({"x": [0.0, 1, 2, 3, 4, 8, 9, 10]}), schema)
    ranks = quantile_map(reference)(wanted).numbers[:, 0]
    np.testing.assert_allclose(ranks, [0, 0.0625, 0.125, 0.3125, 0.5, 0.875, 0.9375, 1])


def test_quantile_map_equals_brute_force_and_keeps_values_apart() -> None:
    queries, keys, reference = mixed(25, 3), mixed(20, 4), mixed(40, 5)
    measure = quantile_map(reference)
    knots = {n: reference.frame[n].dropna().to_numpy(float) for n in ("age", "pay")}
    ends = {"age": (0.0, 90.0), "pay": (-1.0, 3.0)}

    def scale(name: str, value: float) -> float:
        values = np.unique(knots[name])
        ranks = [np.mean(knots[name] < v) + np.mean(knots[name] == v) / 2 for v in values]
        low, high = ends[name]
        known = {low: 0.0, high: 1.0} | dict(zip(values, ranks, strict=True))
        points = sorted(known)
        return float(np.interp(value, points, [known[point] for point in points]))

    expected = brute(queries, keys, scale, 1).min(axis=1)
    np.testing.assert_allclose(
        distances(measure(queries), measure(keys))[:, 0], expected, atol=1e-12
    )
    distinct = queries.frame["pay"].dropna().nunique()
    numbers = measure(queries).numbers[:, 1]
    assert len(np.unique(numbers[numbers <= 1])) == distinct


def test_values_that_single_precision_confuses_stay_apart() -> None:
    left = Features(np.array([[0.5]]), np.empty((1, 0), dtype=np.int64), ())
    right = Features(np.array([[0.5 + 1e-12]]), np.empty((1, 0), dtype=np.int64), ())
    assert distances(left, right)[0, 0] == pytest.approx(1e-12, rel=1e-3)
    assert distances(left, left)[0, 0] == 0


def test_a_column_that_reference_lacks_falls_back_to_its_range() -> None:
    reference = mixed(5, 6)
    empty = reference.frame.assign(pay=np.nan)
    measure = quantile_map(Table(SCHEMA, empty))
    np.testing.assert_allclose(
        measure(reference).numbers[:, 1], range_map(SCHEMA)(reference).numbers[:, 1]
    )


def test_refuses_another_schema() -> None:
    with pytest.raises(UsageError, match="different schemas"):
        range_map(SCHEMA)(mixed(3, 0).select(["age"]))


def test_refuses_what_does_not_fit() -> None:
    features = range_map(SCHEMA)(mixed(4, 0))
    other = Features(features.numbers, features.codes, (9, 9))
    fewer = range_map(SCHEMA)(mixed(3, 0))
    with pytest.raises(UsageError, match="different columns"):
        distances(features, other)
    with pytest.raises(UsageError, match="power=3"):
        distances(features, features, power=3)
    with pytest.raises(UsageError, match="k=0"):
        distances(features, features, k=0)
    with pytest.raises(UsageError, match="k=5"):
        distances(features, features, k=5)
    with pytest.raises(UsageError, match="k=4"):
        distances(features, features, k=4, exclude_self=True)
    with pytest.raises(UsageError, match="not one table"):
        distances(features, fewer, exclude_self=True)
