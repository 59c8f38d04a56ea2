"""Neighbour distances against a brute-force loop that shares no code with them."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from dpsynth.audit import neighbours
from dpsynth.audit.neighbours import (
    MISSING,
    Features,
    distances,
    quantile_map,
    range_map,
)
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
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


def shrink(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Tiles of `block` entries on every device, and groups to match."""
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "MOST", block)
    monkeypatch.setattr(neighbours, "ROWS", 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_brute_force_in_every_blocking(
    power: int, k: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, keys, measure = mixed(37, 0), mixed(23, 1), range_map(SCHEMA)
    expected = np.sort(brute(queries, keys, scale_range, power), axis=1)[:, :k]
    for block in (1, 200, 1 << 20):
        shrink(monkeypatch, block)
        found = distances(measure(queries), measure(keys), k=k, power=power, device=device)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def columns_of(rng: np.random.Generator, rows: int, kinds: str) -> np.ndarray:
    """Numbers of each kind: even, tied, almost equal, constant, almost all missing, with gaps."""
    even = rng.random((rows, len(kinds)))
    made = {
        "e": even,
        "t": rng.integers(0, 4, even.shape) / 3,
        "n": 0.3 + 1e-9 * rng.integers(0, 5, even.shape),
        "c": np.full_like(even, 0.7),
        "m": np.where(even < 0.95, MISSING, even),
        "g": np.where(even < 0.3, MISSING, even),
    }
    return np.column_stack([made[kind][:, j] for j, kind in enumerate(kinds)] or [even])


def random_features(seed: int, rows: int, kinds: str, levels: tuple[int, ...]) -> Features:
    """A third of the rows are copies of others."""
    rng = np.random.default_rng(seed)
    codes = [rng.integers(0, count, rows) for count in levels]
    pick = np.r_[np.arange(rows), rng.integers(0, rows, rows // 2)]
    whole = np.column_stack(codes).astype(np.int64) if codes else np.empty((rows, 0), np.int64)
    return Features(columns_of(rng, rows, kinds)[pick], whole[pick], levels)


def oracle(queries: Features, keys: Features, k: int, power: int, own: bool) -> np.ndarray:
    """One query at a time, all keys, in float64, told by equality with `MISSING` only."""
    found = []
    for i, (numbers, codes) in enumerate(zip(queries.numbers, queries.codes, strict=True)):
        gaps = np.abs(keys.numbers - numbers) ** power
        lacks = (keys.numbers == MISSING).astype(int) + (numbers == MISSING)
        gaps = np.choose(lacks, [gaps, 1.0, 0.0])
        whole = gaps.sum(1) + (keys.codes != codes).sum(1)
        if own:
            whole[i] = np.inf
        found.append(np.sort(whole)[:k] ** (1 / power))
    return np.array(found)


CASES = {
    "numbers": ("eeee", ()),
    "one number": ("e", ()),
    "near-ties": ("n", ()),
    "near-ties among others": ("ntc", (3,)),
    "categories": ("", (2, 5, 3)),
    "few cells": ("t", (2,)),
    "gaps": ("ggm", ()),
    "only gaps": ("m", (2,)),
    "constant": ("cc", (1,)),
    "all kinds": ("etncmg", (2, 9)),
    "wide": ("e" * 100 + "g" * 20, (40,) * 12),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_on_hard_tables(case: str, power: int, device: str) -> None:
    kinds, levels = CASES[case]
    queries = random_features(1, 60, kinds, levels)
    keys = random_features(2, 300 if case == "wide" else 700, kinds, levels)
    for k in (1, 2, 5):
        found = distances(queries, keys, k=k, power=power, device=device)
        expected = oracle(queries, keys, k, power, own=False)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)
        found = distances(keys, keys, k=k, power=power, exclude_self=True, device=device)
        expected = oracle(keys, keys, k, power, own=True)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("columns", [8, 20])
def test_the_bound_on_the_error_is_what_finds_near_ties(
    columns: int, power: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys closer to each other than float32 can score: without the bound a wrong one is taken."""
    # One key a group, or the wrong one's company may hold the right one.
    monkeypatch.setattr(neighbours, "GROUP", 1)
    rng, none = np.random.default_rng(3), np.empty((3000, 0), dtype=np.int64)
    close = [0.3 + 1e-6 * rng.random((rows, columns)) for rows in (40, 3000)]
    queries, keys = (Features(part, none[: len(part)], ()) for part in close)
    expected = oracle(queries, keys, 1, power, own=False)
    np.testing.assert_allclose(distances(queries, keys, power=power), expected, rtol=1e-6)
    monkeypatch.setattr(neighbours, "_error", lambda left, *_: left.new_zeros(len(left)).double())
    crippled = distances(queries, keys, power=power)
    assert (crippled > expected * (1 + 1e-6)).any(), "the case does not need the bound"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("power", [1, 2])
def test_products_in_a_coarser_format_lose_no_neighbour(
    power: int, precision: str, device: str
) -> None:
    queries, keys = (random_features(s, n, "egt" * 20, (7,)) for s, n in ((5, 40), (6, 2000)))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        found = distances(queries, keys, k=2, power=power, device=device)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_allclose(found, oracle(queries, keys, 2, power, False), rtol=1e-12)


def test_products_as_a_tensor_core_rounds_them_lose_no_neighbour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Inputs cut to seven bits: found under bfloat16's bound, missed under float32's."""
    queries, keys = (random_features(s, n, "e" * 30, ()) for s, n in ((7, 300), (8, 2000)))
    monkeypatch.setattr(neighbours, "GROUP", 1)
    multiply = torch.mm

    def cut(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        parts = ((side.contiguous().view(torch.int32) & ~0xFFFF) for side in (left, right))
        return multiply(*(part.view(torch.float32) for part in parts), out=out)

    expected = oracle(queries, keys, 1, 2, own=False)
    monkeypatch.setattr(torch, "mm", cut)
    missed = distances(queries, keys, power=2)
    assert (missed > expected * (1 + 1e-9)).any(), "the case does not need that bound"
    monkeypatch.setattr(neighbours, "_roundoff", lambda _: 2.0**-7)
    np.testing.assert_allclose(distances(queries, keys, power=2), expected, rtol=1e-12)


@pytest.mark.parametrize("power", [1, 2])
def test_the_bound_covers_the_error_of_every_score(power: int) -> None:
    """Scores in float32 against the same sums in float64, which are exact beside them."""
    queries, keys = (random_features(s, 300, "etncmg" * 4, (3, 8)) for s in (9, 10))
    place = torch.device("cpu")
    asked, known = (neighbours._Rows.of(part, place) for part in (queries, keys))
    search = neighbours._Search(asked, known, None, queries.levels, 1, power)
    left, right = neighbours._factors(asked, known, queries.levels, power)
    score = left @ right.T
    for mine, theirs in zip(search.mine, search.theirs[:, : len(known)], strict=True):
        score += torch.maximum(mine[:, None], theirs)
    whole = np.array([oracle(queries, keys, len(keys), power, own=False)])[0] ** power
    # Equal but for a constant of the query: sorted, since the oracle is.
    off = score.double().sort(1).values - torch.from_numpy(whole)
    spread = (off.max(1).values - off.min(1).values) / 2
    assert (spread <= search.error).all()
    assert (spread > 0.001 * search.error).any(), "far too wide to be of use"


def test_copies_beyond_what_counts_are_left_out() -> None:
    """Hundreds of equal keys cost no more than a few, and own copies are told apart."""
    base = random_features(11, 30, "gt", (3,))
    pick = np.random.default_rng(0).permutation(np.repeat(np.arange(len(base)), 40))
    many = Features(base.numbers[pick], base.codes[pick], base.levels)
    rows = neighbours._Rows.of(many, torch.device("cpu"))
    kept = neighbours._without_copies(rows, 3)
    whole = np.hstack([many.numbers, many.codes])
    seen, counts = np.unique(whole[kept.numpy()], axis=0, return_counts=True)
    assert set(counts) == {3}
    assert len(seen) == len(np.unique(whole, axis=0))
    assert (np.diff(kept.numpy()) > 0).all()
    found = distances(many, many, k=41, exclude_self=True)
    np.testing.assert_allclose(found, oracle(many, many, 41, 1, own=True), atol=1e-12)


def test_no_queries_have_no_distances() -> None:
    keys = random_features(12, 30, "gt", (3,))
    none = Features(keys.numbers[:0], keys.codes[:0], keys.levels)
    assert distances(none, keys, k=2, power=2).shape == (0, 2)


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


def test_refuses_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    features = range_map(SCHEMA)(mixed(4, 0))
    with pytest.raises(UsageError, match="device=cuda: no GPU is visible"):
        distances(features, features, device="cuda")


def test_refuses_what_does_not_fit() -> None:
    features = range_map(SCHEMA)(mixed(4, 0))
    other = Features(features.numbers, features.codes, (9, 9))
    fewer = range_map(SCHEMA)(mixed(3, 0))
    with pytest.raises(UsageError, match="different columns"):
        distances(features, other)
    with pytest.raises(UsageError, match="power=3"):
        distances(features, features, power=3)
    for value in (-0.1, 1.1, np.nan):
        outside = Features(np.full((4, 2), value), features.codes, features.levels)
        with pytest.raises(UsageError, match="keys: 8 numbers are neither"):
            distances(features, outside)
    with pytest.raises(UsageError, match="device=gpu: unknown"):
        distances(features, features, device="gpu")
    with pytest.raises(UsageError, match="k=0"):
        distances(features, features, k=0)
    with pytest.raises(UsageError, match="k=5"):
        distances(features, features, k=5)
    with pytest.raises(UsageError, match="k=4"):
        distances(features, features, k=4, exclude_self=True)
    with pytest.raises(UsageError, match="not one table"):
        distances(features, fewer, exclude_self=True)
