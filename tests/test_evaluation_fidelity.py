"""Fidelity and coding against slow, obvious oracles, and against published reference figures."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import contingency, ks_2samp, pearsonr, wasserstein_distance

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation import fidelity as module_name  # the submodule, not a function
from dpsynth.evaluation.coding import Coder, check_comparable, subsample, tree_features
from dpsynth.evaluation.fidelity import (
    associations,
    column_detail,
    fidelity,
    total_variation,
)
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("age", "integer", lower=0, upper=100),
        Column("job", "categorical", ("a", "b", "c", "never"), nullable=True),
        Column("gain", "decimal", lower=-10, upper=1000, nullable=True),
        Column("sex", "categorical", ("f", "m")),
        Column("rank", "categorical", ("lo", "mid", "hi"), ordered=True),
    ),
    target="sex",
)
REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"


def make(rows: int, seed: int, shift: float = 0.0) -> Table:
    """Dependent columns with a spike, missing values and an unused level."""
    rng = np.random.default_rng(seed)
    age = np.clip(rng.normal(40 + shift, 12, rows), 0, 100).round()
    job = np.where(
        rng.random(rows) < 0.1, None, rng.choice(["a", "b", "c"], rows, p=[0.6, 0.3, 0.1])
    )
    gain = np.where(rng.random(rows) < 0.7, 0.0, rng.exponential(50, rows)).clip(0, 1000)
    gain = np.where(rng.random(rows) < 0.05, np.nan, gain)
    sex = np.where(rng.random(rows) < age / 100, "m", "f")
    rank = np.where(age < 35, "lo", np.where(job == "a", "hi", "mid"))
    frame = pd.DataFrame({"age": age, "job": job, "gain": gain, "sex": sex, "rank": rank})
    return Table.from_frame(frame, SCHEMA, strict=False)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def binned(table: Table, real: Table) -> pd.DataFrame:
    """The oracle's coding: pandas cuts on the same quantiles, missing as text."""
    out = {}
    for c in SCHEMA.columns:
        values = table.frame[c.name]
        if c.numeric:
            known = real.frame[c.name].astype(float).dropna()
            inner = sorted(set(np.quantile(known, np.arange(1, 20) / 20)))
            cut = pd.cut(values.astype(float), [-np.inf, *inner, np.inf], right=False, labels=False)
            out[c.name] = cut.astype(object).where(cut.notna(), "missing").astype(str)
        else:
            out[c.name] = values.astype(object).where(values.notna(), "missing").astype(str)
    return pd.DataFrame(out)


def tvd_oracle(a: pd.DataFrame, b: pd.DataFrame, names: list[str]) -> float:
    p, q = a.value_counts(names, normalize=True), b.value_counts(names, normalize=True)
    return p.sub(q, fill_value=0).abs().sum() / 2


def test_submodule_is_not_shadowed_by_its_function() -> None:
    assert module_name.fidelity is fidelity


@pytest.mark.parametrize("order", [1, 2, 3])
def test_tvd_is_half_the_l1_of_contingency_tables(order: int) -> None:
    real, other = make(700, 0), make(400, 1, shift=8)
    a, b = binned(real, real), binned(other, real)
    sets = [list(s) for s in combinations(SCHEMA.names, order)]
    expected = np.mean([tvd_oracle(a, b, names) for names in sets])
    assert fidelity(real, other, rng=rng())[f"tvd{order}"] == pytest.approx(expected, abs=1e-12)


def test_pair_tvd_equals_crosstab() -> None:
    real, other = make(300, 0), make(200, 1, shift=8)
    a, b = binned(real, real), binned(other, real)
    p = pd.crosstab(a["job"], a["rank"], normalize="all")
    q = pd.crosstab(b["job"], b["rank"], normalize="all")
    coder = Coder.fit(real)
    found = total_variation(coder.codes(real), coder.codes(other), coder.levels, (1, 4))
    assert found == pytest.approx(p.sub(q, fill_value=0).abs().to_numpy().sum() / 2, abs=1e-12)


def test_huge_contingency_tables_are_counted_by_sorting() -> None:
    generator = rng()
    a, b = generator.integers(0, 900, (50, 3)), generator.integers(0, 900, (60, 3))
    b[:20] = a[:20]
    sparse = total_variation(a, b, np.array([900, 900, 900]), (0, 1, 2))
    rows_a, rows_b = [tuple(r) for r in a.tolist()], [tuple(r) for r in b.tolist()]
    cells = set(rows_a) | set(rows_b)
    expected = sum(abs(rows_a.count(c) / 50 - rows_b.count(c) / 60) for c in cells) / 2
    assert sparse == pytest.approx(expected, abs=1e-12)


def test_ks_and_wasserstein_agree_with_scipy() -> None:
    real, other = make(500, 0), make(300, 1, shift=8)
    ks, area = [], []
    for c in SCHEMA.columns:
        if c.numeric:
            a = real.frame[c.name].dropna().to_numpy(float)
            b = other.frame[c.name].dropna().to_numpy(float)
            ks.append(ks_2samp(a, b).statistic)
            area.append(wasserstein_distance(a, b) / (c.upper - c.lower))
    found = fidelity(real, other, rng=rng())
    assert found["ks"] == pytest.approx(np.mean(ks), abs=1e-12)
    assert found["wasserstein"] == pytest.approx(np.mean(area), abs=1e-12)


def test_associations_agree_with_textbook_formulas() -> None:
    table = make(600, 0)
    frame, matrix = table.frame, associations(table)
    both = frame[["age", "gain"]].astype(float).dropna()
    assert matrix[0, 2] == pytest.approx(pearsonr(both["age"], both["gain"]).statistic, abs=1e-10)
    grouped = frame.assign(age=frame["age"].astype(float)).groupby("rank", observed=True)["age"]
    mean = frame["age"].astype(float).mean()
    between = (grouped.size() * (grouped.mean() - mean) ** 2).sum()
    total = ((frame["age"].astype(float) - mean) ** 2).sum()
    assert matrix[0, 4] == pytest.approx((between / total) ** 0.5, abs=1e-10)
    counts = pd.crosstab(frame["sex"], frame["rank"]).to_numpy()
    n, (r, k) = counts.sum(), counts.shape
    phi2 = contingency.association(counts, method="cramer") ** 2 * (min(r, k) - 1)
    phi2 = max(0, phi2 - (r - 1) * (k - 1) / (n - 1))
    room = min(r - (r - 1) ** 2 / (n - 1), k - (k - 1) ** 2 / (n - 1)) - 1
    assert matrix[3, 4] == pytest.approx((phi2 / room) ** 0.5, abs=1e-10)
    assert np.allclose(matrix, matrix.T)
    assert np.allclose(np.diag(matrix), 1)


def test_association_of_constant_or_absent_columns_is_zero() -> None:
    table = make(50, 0)
    frame = table.frame.copy()
    frame["age"] = pd.array([40] * 50, dtype="Int64")
    frame["gain"] = np.nan
    frame["sex"] = pd.Categorical(["f"] * 50, categories=["f", "m"])
    matrix = associations(Table(SCHEMA, frame))
    for j in (0, 2, 3):
        assert np.count_nonzero(matrix[j]) == 1


def test_correlation_difference_is_the_mean_over_pairs() -> None:
    real, other = make(500, 0), make(300, 1, shift=8)
    gap = np.abs(associations(real) - associations(other))
    expected = np.mean([gap[i, j] for i, j in combinations(range(5), 2)])
    found = fidelity(real, other, rng=rng())["correlation_difference"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_equal_tables_are_at_distance_zero_and_row_order_does_not_matter() -> None:
    real, other = make(400, 0), make(300, 1, shift=8)
    assert fidelity(real, real, rng=rng()) == pytest.approx(
        dict.fromkeys(fidelity(real, real, rng=rng()), 0)
    )
    shuffled = other.take(rng().permutation(len(other)))
    first, second = fidelity(real, other, rng=rng()), fidelity(real, shuffled, rng=rng())
    assert first == pytest.approx(second, abs=1e-12)
    assert all(value > 0 for value in first.values())


def test_distances_grow_with_the_shift_and_stay_in_range() -> None:
    real = make(800, 0)
    near, far = (fidelity(real, make(800, 1, shift=s), rng=rng()) for s in (3, 30))
    assert all(near[name] < far[name] for name in near)
    assert all(0 <= value <= 1 for name, value in far.items() if name != "correlation_difference")


@pytest.mark.parametrize(
    "device",
    [
        "auto",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_the_device_changes_no_figure(device: str) -> None:
    real, other = make(400, 0), make(300, 1, shift=8)
    assert fidelity(real, other, rng=rng(), device=device) == fidelity(real, other, rng=rng())
    assert column_detail(real, other, device=device) == column_detail(real, other)
    np.testing.assert_array_equal(associations(real, device=device), associations(real))


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    real = make(50, 0)
    for judge in (
        lambda **o: fidelity(real, real, rng=rng(), **o),
        lambda **o: column_detail(real, real, **o),
        lambda **o: associations(real, **o),
    ):
        with pytest.raises(UsageError, match="device=cuda: no GPU"):
            judge(device="cuda")


def wide(width: int, seed: int) -> Table:
    schema = Schema(tuple(Column(f"c{j}", "categorical", ("0", "1")) for j in range(width)))
    values = np.random.default_rng(seed).integers(0, 2, (60, width)).astype(str)
    return Table.from_frame(pd.DataFrame(values, columns=schema.names), schema)


def test_triples_are_drawn_from_the_generator() -> None:
    real, other = wide(16, 0), wide(16, 1)
    same, again = (fidelity(real, other, rng=np.random.default_rng(3)) for _ in range(2))
    assert same == again
    other_draw = fidelity(real, other, rng=np.random.default_rng(4))
    assert same["tvd3"] != other_draw["tvd3"]
    assert same["tvd2"] == other_draw["tvd2"]


def test_narrow_tables_use_the_largest_subset_there_is() -> None:
    found = fidelity(wide(2, 0), wide(2, 1), rng=rng())
    assert found["tvd3"] == found["tvd2"] >= found["tvd1"]
    found = fidelity(wide(1, 0), wide(1, 1), rng=rng())
    assert found["tvd3"] == found["tvd1"]
    assert found["correlation_difference"] == found["ks"] == found["wasserstein"] == 0


def test_a_number_missing_on_one_side_only_is_at_distance_one() -> None:
    schema = SCHEMA.select(["gain"])
    present = Table(schema, pd.DataFrame({"gain": [1.0, 2.0, 3.0]}))
    absent = Table(schema, pd.DataFrame({"gain": [np.nan] * 3}))
    found = fidelity(present, absent, rng=rng())
    assert (found["ks"], found["wasserstein"], found["tvd1"]) == (1, 1, 1)
    assert fidelity(absent, absent, rng=rng())["ks"] == 0


def test_coder_bins_are_fitted_once_and_missing_is_a_level() -> None:
    real = make(500, 0)
    coder = Coder.fit(real, bins=4)
    codes = coder.codes(real)
    assert codes.dtype == np.int64
    assert codes.shape == (500, 5)
    assert (codes >= 0).all()
    assert (codes < coder.levels).all()
    missing = real.frame["gain"].isna().to_numpy()
    assert (codes[missing, 2] == coder.levels[2] - 1).all()
    assert (codes[~missing, 2] < coder.levels[2] - 1).all()
    extreme = real.take(np.arange(2))
    extreme.frame["age"] = pd.array([0, 100], dtype="Int64")
    assert coder.codes(extreme)[:, 0].tolist() == [0, 3]
    assert coder.levels[2] < 6  # the spike at 0 merges quantiles


def test_coder_refuses_what_it_was_not_fitted_for() -> None:
    real = make(50, 0)
    with pytest.raises(UsageError, match="fitted on"):
        Coder.fit(real).codes(real.select(["age"]))
    with pytest.raises(UsageError, match="bins=1"):
        Coder.fit(real, bins=1)


def test_tables_must_be_comparable() -> None:
    real = make(50, 0)
    with pytest.raises(UsageError, match="rows=1"):
        fidelity(real, real.take(np.arange(1)), rng=rng())
    with pytest.raises(UsageError, match="5 and 2 columns"):
        fidelity(real, real.select(["age", "sex"]), rng=rng())
    with pytest.raises(UsageError, match="'age': declared otherwise"):
        check_comparable(real.select(["age", "sex"]), real.select(["sex", "age"]))
    with pytest.raises(UsageError, match="rows=1"):
        column_detail(real.take(np.arange(1)), real)


def test_subsample_keeps_short_tables_and_draws_distinct_rows() -> None:
    real = make(50, 0)
    assert subsample(real, None, rng()) is real
    assert subsample(real, 50, rng()) is real
    assert len(subsample(real, 10, rng())) == 10
    with pytest.raises(UsageError, match="max_rows=1"):
        subsample(real, 1, rng())


def test_tree_features_mark_sets_and_leave_wide_categories_as_numbers() -> None:
    wide_levels = tuple(f"{i:03d}" for i in range(300))
    schema = Schema((Column("w", "categorical", wide_levels), SCHEMA["job"], SCHEMA["age"]))
    frame = pd.DataFrame({"w": ["000", "299"], "job": ["b", None], "age": [1, 2]})
    features, as_set = tree_features(Table.from_frame(frame, schema), schema.names)
    assert as_set.tolist() == [False, True, False]
    np.testing.assert_array_equal(features, [[0, 1, 1], [299, np.nan, 2]])


def test_column_detail_known_answers() -> None:
    schema = Schema((Column("c", "categorical", ("a", "b", "rare", "lost")),))
    counts = {"a": 500, "b": 495, "rare": 3, "lost": 2}
    real = Table.from_frame(
        pd.DataFrame({"c": np.repeat(list(counts), list(counts.values()))}), schema
    )
    other = Table.from_frame(pd.DataFrame({"c": ["a"] * 50 + ["b"] * 49 + ["rare"]}), schema)
    detail = column_detail(real, other)["c"]
    assert detail["rare_level_coverage"] == 0.5
    assert detail["tvd"] == pytest.approx((0.005 + 0.007 + 0.002) / 2)
    p = np.array([500, 495, 3, 2, 0]) + 0.5
    q = np.array([50, 49, 1, 0, 0]) + 0.5
    p, q = p / p.sum(), q / q.sum()
    assert detail["psi"] == pytest.approx(((p - q) * np.log(p / q)).sum())
    same = column_detail(real, real)["c"]
    assert same == {"tvd": 0, "psi": 0, "rare_level_coverage": 1}
    assert column_detail(make(100, 0), make(100, 0))["sex"]["rare_level_coverage"] == 1


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the shared reference tables")
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("test", (0.007, 0.021, 0.050)),
        ("aimgdp_same_codec_e1", (0.007, 0.027, 0.060)),
        ("aimgdp_e1", (0.068, 0.139, 0.2155)),
        ("naive_bayes_e1", (0.007, 0.055, 0.124)),
    ],
)
def test_reference_tables_score_as_published(name: str, published: tuple[float, ...]) -> None:
    train, other = (pd.read_parquet(REFERENCE / f"adult_{n}.parquet") for n in ("train", name))
    schema = Schema.infer(pd.concat([train, other]), target="income")
    found = fidelity(Table.from_frame(train, schema), Table.from_frame(other, schema), rng=rng())
    # Published to three decimals.
    assert [found[f"tvd{k}"] for k in (1, 2, 3)] == pytest.approx(published, abs=6e-4)
