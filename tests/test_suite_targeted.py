"""Targeted queries: counts against loops over rows, and a leak that only they are aimed at."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from tiny import SCHEMA, table

from dpsynth.audit.membership import auc
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.suite.targeted import NEIGHBOURS, QUANTILES, Queries, achilles, targeted_scores


def by_hand(one: pd.Series, other: pd.Series, subset: list[str], reference: Table) -> bool:
    """Whether two rows agree on some columns: same level, or same tenth of the reference."""
    for name in subset:
        a, b = one[name], other[name]
        if pd.isna(a) or pd.isna(b):
            if pd.isna(a) != pd.isna(b):
                return False
            continue
        if SCHEMA[name].numeric:
            known = reference.frame[name].dropna().to_numpy(dtype=float)
            edges = np.unique(np.quantile(known, np.arange(1, QUANTILES) / QUANTILES))
            if sum(a >= e for e in edges) != sum(b >= e for e in edges):
                return False
        elif a != b:
            return False
    return True


def test_a_count_is_the_number_of_rows_that_agree_with_the_record() -> None:
    reference, records, synthetic = table(100, 1), table(6, 2), table(40, 3)
    queries = Queries.draw(12, reference, np.random.default_rng(0))
    found = queries.counts(records, synthetic)
    assert found.shape == (6, 12)
    for r, record in records.frame.iterrows():
        for q, chosen in enumerate(queries.subsets):
            subset = [name for name, kept in zip(SCHEMA.names, chosen, strict=True) if kept]
            agree = [
                by_hand(record, row, subset, reference) for _, row in synthetic.frame.iterrows()
            ]
            assert found[int(str(r)), q] == sum(agree)
    own = queries.counts(records, records)
    assert (own >= 1).all()
    # A larger subset never agrees more often.
    for a, b in ((a, b) for a in range(12) for b in range(12)):
        if (queries.subsets[a] <= queries.subsets[b]).all():
            assert (found[:, a] >= found[:, b]).all()


def test_subsets_have_every_size_equally_often() -> None:
    queries = Queries.draw(4000, table(50), np.random.default_rng(0))
    sizes = np.bincount(queries.subsets.sum(axis=1), minlength=5)
    assert sizes[0] == 0
    assert (abs(sizes[1:] - 1000) < 5 * math.sqrt(750)).all()
    assert (abs(queries.subsets.mean(axis=0) - 0.625) < 0.05).all()
    again = Queries.draw(4000, table(50), np.random.default_rng(0))
    np.testing.assert_array_equal(again.subsets, queries.subsets)


def test_achilles_records_are_the_loneliest() -> None:
    rows, reference = table(60, 1), table(80, 2)
    found = achilles(rows, reference, 5)
    assert len(set(found)) == 5
    assert (np.diff(found) > 0).all()
    assert NEIGHBOURS == 5
    # By loops: mean of the five smallest of all distances.
    knots = {
        name: np.sort(reference.frame[name].dropna().to_numpy(dtype=float))
        for name in ("age", "pay")
    }

    def rank(name: str, value: float) -> float:
        known = knots[name]
        points, counts = np.unique(known, return_counts=True)
        ranks = (np.cumsum(counts) - counts / 2) / len(known)
        lower, upper = SCHEMA[name].lower, SCHEMA[name].upper
        return float(np.interp(value, [lower, *points, upper], [0, *ranks, 1]))

    def distance(one: pd.Series, other: pd.Series) -> float:
        total = 0.0
        for name in SCHEMA.names:
            a, b = one[name], other[name]
            if pd.isna(a) or pd.isna(b):
                total += pd.isna(a) != pd.isna(b)
            elif name in knots:
                total += abs(rank(name, float(a)) - rank(name, float(b)))
            else:
                total += a != b
        return total

    means = [
        np.sort([distance(row, other) for _, other in reference.frame.iterrows()])[:5].mean()
        for _, row in rows.frame.iterrows()
    ]
    assert set(found) == set(np.argsort(means)[-5:].tolist())


@pytest.mark.parametrize("queries", [5, 40])
def test_the_score_is_a_ridge_regression_of_the_coins(queries: int) -> None:
    rng = np.random.default_rng(0)
    coins = rng.random((12, 7)) < 0.5
    coins[0], coins[1] = True, False
    answers = rng.poisson(3, (12, 7, queries))
    answers[:, 2, 1] = 4  # never differs
    own = rng.poisson(3, (7, queries))
    found = targeted_scores(own, answers, coins)
    for record in range(7):
        logs = np.log1p(answers[:, record])
        mean, spread = logs.mean(axis=0), logs.std(axis=0)
        kept = np.ptp(logs, axis=0) > 0
        scaled = ((logs - mean) / np.where(kept, spread, 1))[:, kept]
        model = Ridge(alpha=queries).fit(scaled, coins[:, record].astype(float))
        asked = ((np.log1p(own[record]) - mean) / np.where(kept, spread, 1))[kept]
        share = coins[:, record].mean()
        assert found[record] == pytest.approx(model.predict(asked[None])[0] - share, abs=1e-9)


def test_a_record_that_is_handed_out_is_found() -> None:
    """Answers rise by one where the table holds a copy of the record: nearly all are found where
    that tells, and half are where members are not copied."""
    rng = np.random.default_rng(0)
    coins = rng.random((33, 200)) < 0.5
    noise = rng.poisson(0.1, (33, 200, 8)) + rng.poisson(20, (33, 200, 8)) * (np.arange(8) > 3)
    for copied, low, high in ((1, 0.9, 1.0), (0, 0.36, 0.64)):
        answers = noise + copied * coins[:, :, None]
        scores = targeted_scores(answers[0], answers[1:], coins[1:])
        assert low < auc(scores[coins[0]], scores[~coins[0]]) <= high


def test_what_does_not_fit_is_refused() -> None:
    rows = table(20)
    with pytest.raises(UsageError, match="count of Achilles records=0"):
        achilles(rows, table(30, 1), 0)
    with pytest.raises(UsageError, match="there are only 20 rows"):
        achilles(rows, table(30, 1), 21)
    with pytest.raises(UsageError, match="count of queries=0"):
        Queries.draw(0, rows, np.random.default_rng(0))
    answers, coins = np.zeros((6, 4, 3)), np.tile([True, False], (4, 3)).T
    for arguments in (
        (answers[0, 0], answers, coins),
        (answers[0, 1:], answers, coins),
        (answers[0], answers, coins[1:]),
    ):
        with pytest.raises(UsageError, match="answers of shapes"):
            targeted_scores(*arguments)
    with pytest.raises(UsageError, match="no IN or no OUT"):
        targeted_scores(answers[0], answers, np.ones((6, 4), bool))
