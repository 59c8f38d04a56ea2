"""The meta-classifier: it learns across generators, and only what carries over to new ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import special

from dpsynth.audit.meta import MetaClassifier, _fit_trees, _Forest
from dpsynth.audit.statistics import auc, null_band
from dpsynth.checks import UsageError

Fleet = tuple[list[pd.DataFrame], list[np.ndarray]]


def fleet(generators: int, rows: int, signal: float, seed: int) -> Fleet:
    """Features of generators; the first tells membership by `signal` standard deviations."""
    rng = np.random.default_rng(seed)
    features, members = [], []
    for _ in range(generators):
        inside = rng.random(rows) < 0.5
        x = rng.normal(size=(rows, 4)).astype(np.float32)
        x[:, 0] += signal * inside
        x[rng.random(rows) < 0.1, 1] = np.nan
        features.append(pd.DataFrame(x, columns=list("abcd")))
        members.append(inside)
    return features, members


def test_a_signal_is_found_and_its_probability_is_calibrated() -> None:
    features, members = fleet(6, 300, 1.0, 0)
    fitted = MetaClassifier.fit(features, members, np.random.default_rng(1))
    fresh, inside = fleet(1, 4000, 1.0, 99)
    score = fitted.score(fresh[0])
    best = special.ndtr(1 / np.sqrt(2))
    assert best - 0.05 < auc(score[inside[0]], score[~inside[0]]) < best + 0.02
    chance = fitted.probability(fresh[0])
    np.testing.assert_allclose(chance, special.expit(score))
    for low in np.arange(0.2, 0.8, 0.2):
        some = (chance >= low) & (chance < low + 0.2)
        assert abs(inside[0][some].mean() - chance[some].mean()) < 0.1
    assert [len(one) for one in fitted.cross_fitted] == [300] * 6


def test_features_without_signal_give_chance_on_held_out_generators() -> None:
    # A trait of each generator and its share of members: rows of one generator would betray it.
    rng = np.random.default_rng(0)
    features, members = fleet(20, 200, 0.0, 1)
    for place in range(20):
        members[place] = rng.random(200) < rng.uniform(0.2, 0.8)
        features[place]["trait"] = np.float32(rng.normal())
        features[place]["trait 2"] = np.float32(rng.normal())
    fitted = MetaClassifier.fit(features, members, np.random.default_rng(2))
    pooled, labels = np.concatenate(fitted.cross_fitted), np.concatenate(members)
    areas = [auc(s[m], s[~m]) for s, m in zip(fitted.cross_fitted, members, strict=True)]
    low, high = null_band(2000, 2000)
    assert low < np.mean(areas) < high
    # Within a generator nothing shows, and across generators the traits mean nothing new.
    assert abs(auc(pooled[labels], pooled[~labels]) - 0.5) < 0.12
    fitted = MetaClassifier.fit(features, fleet(20, 200, 0.0, 7)[1], np.random.default_rng(2))
    truth = np.concatenate(fleet(20, 200, 0.0, 7)[1])
    pooled = np.concatenate(fitted.cross_fitted)
    assert low < auc(pooled[truth], pooled[~truth]) < high


def test_the_same_seed_gives_the_same_scores_and_columns_go_by_name() -> None:
    features, members = fleet(4, 100, 0.5, 0)
    one, two = (MetaClassifier.fit(features, members, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one.score(features[0]), two.score(features[0]))
    turned = features[0][["d", "b", "a", "c"]].assign(more=1.0)
    np.testing.assert_array_equal(one.score(features[0]), one.score(turned))


def test_the_forest_gives_the_scores_of_the_trees_it_was_read_from() -> None:
    features, members = fleet(3, 300, 0.7, 0)
    values = np.vstack([frame.to_numpy() for frame in features])
    models = _fit_trees(values, np.concatenate(members).astype(int), np.random.default_rng(0))
    expected = np.mean([model.decision_function(values) for model in models], axis=0)
    found = _Forest.of(models).log_odds(values)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(values).any()


def test_a_saved_classifier_gives_equal_scores(tmp_path: Path) -> None:
    features, members = fleet(3, 100, 0.7, 0)
    fitted = MetaClassifier.fit(features, members, np.random.default_rng(0))
    path = tmp_path / "classifier.npz"
    fitted.save(path)
    again = MetaClassifier.load(path)
    assert again.cross_fitted == ()
    np.testing.assert_array_equal(again.score(features[0]), fitted.score(features[0]))


@pytest.mark.parametrize("damage", ["cut", "other", "loop", "feature", "missing"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    features, members = fleet(3, 100, 0.7, 0)
    fitted = MetaClassifier.fit(features, members, np.random.default_rng(0))
    path = tmp_path / "classifier.npz"
    nodes = fitted.forest.nodes
    inner = tuple(np.argwhere(~nodes["leaf"])[0])
    if damage == "loop":
        nodes["left"][inner] = 0
    if damage == "feature":
        nodes["feature"][inner] = 4
    fitted.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    if damage == "other":
        path.write_bytes(b"something else")
    if damage == "missing":
        path.unlink()
    with pytest.raises(UsageError, match="cannot be read; delete it"):
        MetaClassifier.load(path)


def _inf(fleet: Fleet) -> None:
    fleet[0][1].loc[0, "a"] = np.inf


def _short(fleet: Fleet) -> None:
    fleet[1][1] = fleet[1][1][1:]


def _strange(fleet: Fleet) -> None:
    fleet[1][1] = fleet[1][1] + 1


def _equal(fleet: Fleet) -> None:
    fleet[1][:] = [np.ones(30)] * 3


def _one_sided(fleet: Fleet) -> None:
    fleet[1][:] = [np.arange(30) % 2, np.ones(30), np.ones(30)]


def _renamed(fleet: Fleet) -> None:
    fleet[0][1] = fleet[0][1].rename(columns={"a": "z"})


def _fewer(fleet: Fleet) -> None:
    fleet[0].pop()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_inf, "features of generator 1: hold an infinite value"),
        (_short, "labels of generator 1: shape"),
        (_strange, "must be 0 or 1"),
        (_equal, "all are equal"),
        (_one_sided, "without some generators only one kind of row is left"),
        (_renamed, "other columns than the first's"),
        (_fewer, "2 feature frames and 3 sets of labels"),
    ],
)
def test_what_cannot_be_learned_from_is_refused(
    spoil: Callable[[Fleet], None], message: str
) -> None:
    spoiled = fleet(3, 30, 0.0, 0)
    spoil(spoiled)
    with pytest.raises(UsageError, match=message):
        MetaClassifier.fit(*spoiled, np.random.default_rng(0))


def test_scoring_refuses_other_features() -> None:
    features, members = fleet(3, 60, 0.0, 0)
    fitted = MetaClassifier.fit(features, members, np.random.default_rng(0))
    with pytest.raises(UsageError, match="feature 'c': the classifier needs it"):
        fitted.score(features[0].drop(columns="c"))
    with pytest.raises(UsageError, match="hold an infinite value"):
        fitted.score(features[0].assign(a=np.inf))
