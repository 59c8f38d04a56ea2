"""Neighbour features against distances taken one pair at a time."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpsynth.audit.calibration import FLOOR, GAP, SPREAD, Neighbourhoods, normal_scores
from dpsynth.audit.features import neighbour_features
from dpsynth.audit.neighbours import MISSING, quantile_map, range_map
from dpsynth.audit.statistics import auc, null_band
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("x", "decimal", lower=-9.0, upper=9.0, nullable=True),
        Column("y", "decimal", lower=-9.0, upper=9.0),
        Column("job", "categorical", levels=("a", "b", "c"), nullable=True),
        Column("town", "categorical", levels=("p", "q")),
    )
)


def simulated(rows: int, rng: np.random.Generator) -> Table:
    x = np.clip(rng.normal(size=(rows, 2)), -9, 9)
    frame = pd.DataFrame(x, columns=["x", "y"])
    frame.loc[rng.random(rows) < 0.1, "x"] = np.nan
    frame["job"] = rng.choice(np.array(["a", "b", "c", None]), rows)
    frame["town"] = rng.choice(np.array(["p", "q"]), rows)
    return Table.from_frame(frame, SCHEMA, strict=False)


def brute(table: Table, keys: Table, measure, power: int) -> np.ndarray:
    """All distances (rows, keys), one pair at a time."""
    asked, known = measure(table), measure(keys)
    far = np.empty((len(table), len(keys)))
    for i in range(len(table)):
        for j in range(len(keys)):
            total = 0.0
            for a, b in zip(asked.numbers[i], known.numbers[j], strict=True):
                one = MISSING in (a, b) and a != b
                total += (1.0 if one else abs(a - b)) ** power
            total += sum(asked.codes[i] != known.codes[j])
            far[i, j] = total ** (1 / power)
    return far


@pytest.mark.parametrize("with_reference", [True, False])
def test_neighbour_features_are_those_of_all_pairs(with_reference: bool) -> None:
    rng = np.random.default_rng(0)
    candidates, synthetic, reference = (simulated(rows, rng) for rows in (12, 40, 40))
    known = reference if with_reference else None
    found = neighbour_features(candidates, synthetic, known, np.random.default_rng(1))
    measures = {
        "quantile": (quantile_map(reference if with_reference else synthetic), 1),
        "range": (range_map(SCHEMA), 2),
    }
    for metric, (measure, power) in measures.items():
        made = np.sort(brute(candidates, synthetic, measure, power), axis=1)
        real = np.sort(brute(candidates, reference, measure, power), axis=1)
        for k in (1, 2, 3, 5, 8):
            near = made[:, k - 1]
            got = found[f"{metric} log d{k} synthetic"]
            np.testing.assert_allclose(got, np.log(near + 1e-6), rtol=1e-5, atol=1e-5)
            if with_reference:
                ratio = np.log(real[:, k - 1] + 1e-6) - np.log(near + 1e-6)
                np.testing.assert_allclose(found[f"{metric} log ratio {k}"], ratio, atol=1e-4)
                within = (made[:, :8] <= real[:, [k - 1]]).sum(axis=1)
                np.testing.assert_array_equal(found[f"{metric} within {k}"], within)
        nndr = np.log(made[:, 0] + 1e-6) - np.log(made[:, 1] + 1e-6)
        np.testing.assert_allclose(found[f"{metric} log d1/d2"], nndr, atol=1e-4)
    names = ["job", "town"]
    rows, asked = (
        table.frame[names].astype(object).fillna("gone").to_numpy()
        for table in (synthetic, candidates)
    )
    like = [(rows == one).all(axis=1).sum() for one in asked]
    np.testing.assert_allclose(found["log like synthetic"], np.log1p(like), rtol=1e-6)
    gone = candidates.frame["x"].isna().to_numpy()
    np.testing.assert_array_equal(found["value x"].isna(), gone)
    assert np.isfinite(found.drop(columns=["value x", "value job"]).to_numpy()).all()
    assert any("reference" in name for name in found) == with_reference


def test_few_rows_and_few_kinds_of_columns_are_enough() -> None:
    rng = np.random.default_rng(0)
    for names in (["x"], ["job"], SCHEMA.names):
        candidates, synthetic, reference = (simulated(n, rng).select(names) for n in (3, 1, 2))
        found = neighbour_features(candidates, synthetic, reference, rng)
        assert len(found) == 3
        assert not np.isinf(found.to_numpy()).any()
        near = Neighbourhoods([synthetic, reference], reference)
        assert not np.isinf(near.features(candidates, np.zeros(3, dtype=int)).to_numpy()).any()


def test_an_empty_table_has_no_neighbours() -> None:
    some = simulated(5, np.random.default_rng(0))
    nothing = some.take(np.array([], dtype=int))
    with pytest.raises(UsageError, match="synthetic table has no rows"):
        neighbour_features(some, nothing, some, np.random.default_rng(0))
    with pytest.raises(UsageError, match="reference table has no rows"):
        neighbour_features(some, some, nothing, np.random.default_rng(0))


def test_normal_scores_are_normal_and_missing_is_far() -> None:
    population = simulated(4000, np.random.default_rng(0))
    numbers, codes = normal_scores(population)(population)
    known = population.frame["x"].notna().to_numpy()
    assert stats.kstest(numbers[known, 0], stats.norm.cdf).statistic < 0.01
    assert (numbers[~known, 0] >= numbers[known, 0].max() + GAP - 1).all()
    assert codes.shape == (4000, 2)


def calibrated(seed: int = 0) -> tuple[list[Table], Table, Table]:
    rng = np.random.default_rng(seed)
    return [simulated(40, rng) for _ in range(5)], simulated(15, rng), simulated(60, rng)


def test_calibration_is_that_of_all_pairs() -> None:
    tables, candidates, population = calibrated()
    own = np.arange(15) % 5
    excluded = np.zeros((15, 5), dtype=bool)
    excluded[np.arange(15), (own + 1) % 5] = True
    found = Neighbourhoods(tables, population).features(candidates, own, excluded)
    scores = normal_scores(population)
    numbers, codes = scores(candidates)
    for i in range(15):
        far = []
        for table in tables:
            theirs, levels = scores(table)
            gaps = (levels - codes[i]) * GAP * np.array([1, 1.137])
            far.append(np.sort(np.sqrt(((theirs - numbers[i]) ** 2).sum(1) + (gaps**2).sum(1))))
        others = [j for j in range(5) if j != own[i] and not excluded[i, j]]
        mine = far[own[i]]
        row = found.iloc[i]
        for k in (1, 2, 3, 5, 8):
            logs = np.log([far[j][k - 1] + FLOOR for j in others])
            gain = logs.mean() - np.log(mine[k - 1] + FLOOR)
            np.testing.assert_allclose(row[f"gain {k}"], gain, atol=1e-4)
            np.testing.assert_allclose(row[f"z {k}"], gain / (logs.std() + SPREAD), atol=1e-3)
        wins = np.mean([far[j][0] > mine[0] for j in others])
        np.testing.assert_allclose(row["rank 1"], wins)
        least = np.log(min(far[j][0] for j in others) + FLOOR) - np.log(mine[0] + FLOOR)
        np.testing.assert_allclose(row["gain on nearest"], least, atol=1e-4)
        pooled = np.sort(np.concatenate([far[j][:8] for j in others]))
        for crowd in (0.5, 1.0, 2.0):
            radius = pooled[int(np.ceil(crowd * len(others))) - 1]
            # The nearest one may lie on the radius up to rounding.
            counts = [(mine[:8] <= radius * (1 + e)).sum() for e in (-1e-5, 1e-5)]
            assert counts[0] <= row[f"count {crowd:g}"] <= counts[1]
        for width in (0.04, 0.32):
            kernels = [np.exp(-0.5 * (one[:8] / width) ** 2).sum() for one in far]
            mean = np.mean([kernels[j] for j in others])
            ratio = np.log(kernels[own[i]] + 0.01) - np.log(mean + 0.01)
            np.testing.assert_allclose(row[f"density ratio {width:g}"], ratio, atol=1e-3)


def test_an_excluded_table_has_no_say() -> None:
    tables, candidates, population = calibrated()
    own, excluded = np.zeros(15, dtype=int), np.zeros((15, 5), dtype=bool)
    excluded[:, 3] = True
    plain = Neighbourhoods(tables, population).features(candidates, own, excluded)
    other = [*tables[:3], candidates, tables[4]]
    assert plain.equals(Neighbourhoods(other, population).features(candidates, own, excluded))
    assert not plain.equals(Neighbourhoods(other, population).features(candidates, own))


def test_scores_of_strangers_are_no_better_than_chance_and_copies_stand_out() -> None:
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        tables = [simulated(150, rng) for _ in range(6)]
        both, strangers = [simulated(75, rng), simulated(75, rng)], simulated(150, rng)
        asked = Table(SCHEMA, pd.concat([one.frame for one in both], ignore_index=True))
        near = Neighbourhoods([*tables, both[0]], strangers)
        copied = near.features(asked, np.full(150, 6))["z 1"].to_numpy()
        # A row of missing values and common levels is no news, whoever has it.
        assert auc(copied[:75], copied[75:]) > 0.99
        near = Neighbourhoods(tables, strangers)
        fresh = near.features(asked, np.full(150, 2))["z 1"].to_numpy()
        found.append(auc(fresh[:75], fresh[75:]))
    low, high = null_band(6 * 75, 6 * 75)
    assert low < np.mean(found) < high


def test_calibration_refuses_what_does_not_fit() -> None:
    tables, candidates, population = calibrated()
    with pytest.raises(UsageError, match="1 synthetic table: calibration needs"):
        Neighbourhoods(tables[:1], population)
    near = Neighbourhoods(tables, population)
    assert len(near) == 5
    with pytest.raises(UsageError, match="must be \\(15,\\)"):
        near.features(candidates, np.zeros(3, dtype=int))
    with pytest.raises(UsageError, match="places among the 5 tables"):
        near.features(candidates, np.full(15, 5))
    with pytest.raises(UsageError, match="no other table left"):
        near.features(candidates, np.zeros(15, dtype=int), np.ones((15, 5), dtype=bool))
