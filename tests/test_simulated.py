"""Simulated tables: labels follow the stated posterior, and in parity and mixture no table of two
columns and the label tells it."""

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier

from dpsynth import datasets
from dpsynth.checks import UsageError
from dpsynth.data import Split
from dpsynth.datasets.simulated import SIMULATED, bayes_accuracy, draw, posterior
from dpsynth.randomness import stream

NAMES = sorted(SIMULATED)


def _matrix(table):
    """Features (rows, columns) and labels (rows,)."""
    columns = [c for c in table.schema.columns if c.name != table.schema.target]
    features = [
        table.frame[c.name].to_numpy(float) if c.numeric else table.frame[c.name].cat.codes
        for c in columns
    ]
    return np.column_stack(features), (table.frame["y"] == "1").to_numpy()


def _level(values, pieces=4):
    """A number as one of a few quantile bins."""
    cuts = np.quantile(values, np.arange(1, pieces) / pieces)
    return np.searchsorted(cuts, values)


@pytest.mark.parametrize("name", NAMES)
def test_rows_keep_to_a_public_schema_and_are_the_same_every_time(name):
    table = datasets.load(name)
    table.schema.check_public()
    assert table.schema == datasets.schema(name)
    assert len(table) == table.schema.expected_rows == 30_000
    again = type(table).from_frame(datasets.load(name).frame, table.schema)  # strict
    assert again.digest() == table.digest()
    assert not table.frame.duplicated().any()
    split = Split.random(table, stream(0, "split"))  # by a keyed hash of each row, so about
    assert len(split.members) == pytest.approx(18_000, rel=0.02)
    assert sum(map(len, (split.members, split.holdout, split.reference))) == 30_000


@pytest.mark.parametrize("name", NAMES)
def test_labels_follow_the_stated_posterior(name):
    table = draw(name, 40_000, np.random.default_rng(3))
    expected, label = posterior(table, name), (table.frame["y"] == "1").to_numpy()
    for tenth in np.array_split(np.argsort(expected), 10):
        spread = np.sqrt((expected[tenth] * (1 - expected[tenth])).sum())
        assert abs(label[tenth].sum() - expected[tenth].sum()) < 4.5 * spread + 1


@pytest.mark.parametrize("name", NAMES)
def test_boosted_trees_come_near_the_best_accuracy_and_not_above_it(name):
    table = draw(name, 30_000, np.random.default_rng(4))
    features, label = _matrix(table)
    model = HistGradientBoostingClassifier(random_state=0).fit(features[:20_000], label[:20_000])
    reached, best = model.score(features[20_000:], label[20_000:]), bayes_accuracy(table, name)
    assert best - 0.03 < reached < best + 4 * np.sqrt(0.25 / 10_000)


@pytest.mark.parametrize("name", ["parity", "mixture"])
def test_no_two_columns_tell_the_label(name):
    table = draw(name, 50_000, np.random.default_rng(5))
    features, label = _matrix(table)
    pairs = list(itertools.combinations(range(features.shape[1]), 2))
    least = 1.0
    for pair in pairs:
        cell = sum(_level(features[:, column]) * 4**place for place, column in enumerate(pair))
        counts = np.zeros((2, 16))
        np.add.at(counts, (label.astype(int), cell), 1)
        least = min(least, stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue)
    assert least > 1e-4 / len(pairs)


def test_three_columns_tell_it():
    features, label = _matrix(draw("parity", 20_000, np.random.default_rng(6)))
    odd = features[:, :3].sum(1) % 2 == 1
    assert abs((odd == label).mean() - 0.9) < 0.01


def test_another_name():
    with pytest.raises(UsageError, match="dataset=pairity: unknown"):
        draw("pairity", 10, stream(0, "x"))
    with pytest.raises(UsageError, match="dataset=pairity: unknown"):
        posterior(datasets.load("parity"), "pairity")


def test_no_rows():
    with pytest.raises(UsageError, match="rows=0"):
        draw("parity", 0, stream(0, "x"))
