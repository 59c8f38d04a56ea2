"""Train on one, test on another: known answers, missing classes, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import precision_recall_fscore_support

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation.utility import CLASSIFICATION, REGRESSION, utility
from dpsynth.evaluation.utility import _auc as area
from dpsynth.evaluation.utility import _by_level as by_level
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("x", "decimal", lower=-10, upper=10, nullable=True),
        Column("c", "categorical", ("a", "b", "unused"), nullable=True),
        Column("two", "categorical", ("no", "yes"), nullable=True),
        Column("three", "categorical", ("lo", "mid", "hi")),
        Column("y", "decimal", lower=-50, upper=50, nullable=True),
    ),
    target="two",
)


def make(rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    x, c = rng.normal(0, 2, rows), rng.choice(["a", "b"], rows)
    score = x + np.where(c == "a", 1.5, -1.5)
    two = np.where(rng.random(rows) < 1 / (1 + np.exp(-score)), "yes", "no")
    three = np.where(x < -1, "lo", np.where(x < 1, "mid", "hi"))
    y = 3 * x + np.where(c == "a", 4, 0) + rng.normal(0, 1, rows)
    x = np.where(rng.random(rows) < 0.05, np.nan, x)
    frame = pd.DataFrame({"x": x, "c": c, "two": two, "three": three, "y": y.clip(-50, 50)})
    return Table.from_frame(frame, SCHEMA, strict=False)


def only(names: list[str]) -> tuple[Table, Table]:
    return make(800, 0).select(names), make(600, 1).select(names)


def with_target(table: Table, name: str, values: Any) -> Table:
    column = table.schema[name]
    new = pd.Series(values) if column.numeric else pd.Categorical(values, categories=column.levels)
    return Table(table.schema, table.frame.assign(**{name: new}))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_learnable_binary_target_is_learned_by_both_models() -> None:
    train, test = only(["x", "c", "two"])
    metrics, detail = utility(train, test, target="two", rng=rng())
    assert tuple(metrics) == CLASSIFICATION
    assert metrics["logistic_auc"] > 0.87  # the truth is logistic
    assert metrics["gbt_auc"] > 0.84
    assert metrics["logistic_accuracy"] > 0.78
    assert metrics["logistic_log_loss"] < 0.45 < np.log(2)
    for model in ("gbt", "logistic"):
        assert set(detail[model]) == {"levels", "calibration"}
        assert sum(facts["support"] for facts in detail[model]["levels"].values()) == 600
        assert sum(bin["rows"] for bin in detail[model]["calibration"]) == 600
    for bin in detail["logistic"]["calibration"]:
        slack = 4 * (0.25 / bin["rows"]) ** 0.5 + 0.05
        assert bin["predicted"] == pytest.approx(bin["observed"], abs=slack)


def test_shuffled_labels_teach_nothing() -> None:
    train, test = only(["x", "c", "two"])
    labels = np.asarray(train.frame["two"].astype(object))
    shuffled = with_target(train, "two", rng(3).permutation(labels))
    metrics, _ = utility(shuffled, test, target="two", rng=rng())
    assert metrics["logistic_auc"] == pytest.approx(0.5, abs=0.15)
    assert metrics["logistic_auc"] < 0.7


def test_flipped_labels_turn_the_area_around() -> None:
    train, test = only(["x", "c", "two"])
    flipped = with_target(train, "two", np.where(train.frame["two"] == "yes", "no", "yes"))
    right, _ = utility(train, test, target="two", rng=rng())
    wrong, _ = utility(flipped, test, target="two", rng=rng())
    assert wrong["logistic_auc"] == pytest.approx(1 - right["logistic_auc"], abs=1e-6)


def test_multi_class_is_one_vs_rest() -> None:
    train, test = only(["x", "c", "three"])
    metrics, detail = utility(train, test, target="three", rng=rng())
    assert metrics["gbt_auc"] > 0.95
    assert metrics["gbt_macro_f1"] > 0.9
    assert detail["gbt"]["calibration"] == []


def test_one_vs_rest_area_leaves_out_levels_that_the_test_lacks() -> None:
    truth = np.array([0, 0, 1, 1])
    probability = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.7, 0.3, 0.0], [0.1, 0.9, 0.0]])
    assert area(truth, probability) == pytest.approx((0.75 + 1.0) / 2)


def test_per_level_figures_agree_with_scikit_learn() -> None:
    generator = rng()
    truth, guess = generator.integers(0, 3, 200), generator.integers(0, 3, 200)
    expected = precision_recall_fscore_support(truth, guess, labels=[0, 1, 2])
    found = by_level(truth, guess, ("a", "b", "c"))
    for i, name in enumerate(("precision", "recall", "f1", "support")):
        assert [found[level][name] for level in found] == pytest.approx(expected[i])


def test_a_class_that_train_lacks_gets_the_floor_probability() -> None:
    train, test = only(["x", "c", "three"])
    rows = np.flatnonzero((train.frame["three"] != "hi").to_numpy())
    metrics, detail = utility(train.take(rows), test, target="three", rng=rng())
    share = (test.frame["three"] == "hi").mean()
    assert detail["gbt"]["levels"]["hi"]["recall"] == 0
    assert metrics["gbt_log_loss"] > share * -np.log(1e-6) * 0.99
    assert np.isfinite(metrics["gbt_log_loss"])


def test_a_class_of_one_row_is_no_obstacle() -> None:
    train, test = only(["x", "c", "three"])
    low = np.flatnonzero((train.frame["three"] != "hi").to_numpy())
    high = np.flatnonzero((train.frame["three"] == "hi").to_numpy())[:1]
    metrics, _ = utility(train.take(np.append(low, high)), test, target="three", rng=rng())
    assert all(np.isfinite(value) for value in metrics.values())


def test_one_class_only_makes_a_constant_predictor() -> None:
    train, test = only(["x", "c", "two"])
    constant = with_target(train, "two", ["no"] * len(train))
    metrics, _ = utility(constant, test, target="two", rng=rng())
    positives = float((test.frame["two"] == "yes").mean())
    for model in ("gbt", "logistic"):
        assert metrics[f"{model}_auc"] == 0.5
        assert metrics[f"{model}_accuracy"] == pytest.approx(1 - positives)
        assert metrics[f"{model}_log_loss"] == pytest.approx(positives * -np.log(1e-6))


def test_no_label_at_all_makes_a_uniform_predictor() -> None:
    train, test = only(["x", "c", "two"])
    metrics, _ = utility(
        with_target(train, "two", [None] * len(train)), test, target="two", rng=rng()
    )
    assert metrics["gbt_auc"] == 0.5
    assert metrics["gbt_log_loss"] == pytest.approx(np.log(2))


def test_columns_without_any_value_are_no_obstacle() -> None:
    train, test = only(["x", "c", "two"])
    blank = train.frame.assign(
        x=np.nan, c=pd.Categorical([None] * 800, categories=SCHEMA["c"].levels)
    )
    metrics, _ = utility(Table(train.schema, blank), test, target="two", rng=rng())
    assert metrics["gbt_auc"] == pytest.approx(0.5, abs=0.01)


def test_a_numeric_target_is_regressed() -> None:
    train, test = only(["x", "c", "y"])
    metrics, detail = utility(train, test, target="y", rng=rng())
    assert tuple(metrics) == REGRESSION
    assert detail == {}
    assert metrics["gbt_r2"] > 0.8
    assert metrics["ridge_r2"] > 0.8
    variance = test.frame["y"].to_numpy().var()
    assert metrics["ridge_r2"] == pytest.approx(1 - metrics["ridge_rmse"] ** 2 / variance)


@pytest.mark.parametrize(("known", "constant"), [([7.0], 7.0), ([], 0.0)])
def test_regression_without_enough_labels_is_constant(known: list[float], constant: float) -> None:
    train, test = only(["x", "c", "y"])
    values = np.full(len(train), np.nan)
    values[: len(known)] = known
    metrics, _ = utility(with_target(train, "y", values), test, target="y", rng=rng())
    expected = ((test.frame["y"] - constant) ** 2).mean() ** 0.5
    assert metrics["gbt_rmse"] == metrics["ridge_rmse"] == pytest.approx(expected)


def test_same_generator_state_gives_the_same_figures() -> None:
    train, test = only(["x", "c", "two"])
    first, again = (utility(train, test, target="two", rng=rng(2), max_rows=200) for _ in range(2))
    assert first == again
    assert first != utility(train, test, target="two", rng=rng(3), max_rows=200)


def test_refusals() -> None:
    train, test = only(["x", "c", "two"])
    with pytest.raises(UsageError, match="'z'"):
        utility(train, test, target="z", rng=rng())
    with pytest.raises(UsageError, match="no other column"):
        utility(train.select(["two"]), test.select(["two"]), target="two", rng=rng())
    with pytest.raises(UsageError, match="fewer than 2 distinct"):
        blank = with_target(test, "two", ["no"] * len(test))
        utility(train, blank, target="two", rng=rng())
    with pytest.raises(UsageError, match="rows=1"):
        utility(train.take(np.arange(1)), test, target="two", rng=rng())
    with pytest.raises(UsageError, match="columns"):
        utility(train.select(["x", "two"]), test, target="two", rng=rng())
    with pytest.raises(UsageError, match="max_rows=1"):
        utility(train, test, target="two", rng=rng(), max_rows=1)
