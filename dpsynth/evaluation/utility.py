"""Train on one table, test on another: what a downstream model learns from synthetic rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation.coding import (
    category_codes,
    check_comparable,
    fill_empty,
    numbers,
    subsample,
    tree_features,
    tree_options,
)

__all__ = ["CLASSIFICATION", "REGRESSION", "utility"]

CLASSIFIERS, REGRESSORS = ("gbt", "logistic"), ("gbt", "ridge")
CLASSIFICATION = tuple(
    f"{model}_{name}"
    for model in CLASSIFIERS
    for name in ("auc", "accuracy", "macro_f1", "log_loss")
)
REGRESSION = tuple(f"{model}_{name}" for model in REGRESSORS for name in ("r2", "rmse"))
FLOOR_PROBABILITY = 1e-6
BINS = 10


def utility(
    train: Table,
    test: Table,
    *,
    target: str,
    rng: np.random.Generator,
    max_rows: int | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Fit trees and a linear model on `train`, score them on `test` (real rows, never subsampled).

    Rows without a target are left out of both. A class that `train` lacks gets probability 0,
    clipped to 1e-6 in the log-loss; with one class only the model is the constant one (AUC 0.5),
    with no labelled row at all it is uniform over the levels (regression: the middle of the
    bounds).

    Args:
        train: Rows to learn from, under the schema of `test`.
        test: Real rows that neither the generator nor `train` has seen.
        target: Column to predict from all others.
        rng: Seeds the trees and draws the subsample.
        max_rows: Learn from at most so many rows of `train`.

    Returns:
        Metrics and per-class detail. Categorical target: `<model>_auc` (two levels: of the last
        declared one; more: mean of one-vs-rest over the levels that `test` holds), `_accuracy`,
        `_macro_f1` (mean over the levels that `test` holds), `_log_loss` (nats) for the models
        `gbt` and `logistic`, and `{model: {"levels": {level: {"precision", "recall", "f1",
        "support"}}, "calibration": [{"predicted", "observed", "rows"}]}}`, the latter in ten equal
        bins of the last level's probability, empty ones left out; `[]` unless there are exactly
        two levels. Numeric target: `<model>_r2` and `_rmse` for `gbt` and `ridge`, no detail.

    Raises:
        UsageError: On different columns, fewer than two rows, an unknown or the only column as
            target, or a test target that is missing or constant.
    """
    check_comparable(test, train)
    column = test.schema[target]
    inputs = [name for name in test.schema.names if name != target]
    if not inputs:
        raise UsageError(f"target={target!r}: there is no other column to predict it from")
    train = subsample(train, max_rows, rng)
    read = numbers if column.numeric else category_codes
    train, known = _labelled(train, read(train, target))
    test, truth = _labelled(test, read(test, target))
    if len(np.unique(truth)) < 2:
        raise UsageError(
            f"target={target!r}: the test rows hold fewer than 2 distinct values of it; "
            "use another target or split"
        )
    if column.numeric:
        assert column.lower is not None and column.upper is not None
        middle = (column.lower + column.upper) / 2
        return _regression(train, known, test, truth, inputs, middle, rng), {}
    return _classification(train, known, test, truth, inputs, column.levels, rng)


def _labelled(table: Table, values: np.ndarray) -> tuple[Table, np.ndarray]:
    """Rows whose target is present (not NaN, not code -1), and their targets."""
    rows = np.flatnonzero(~np.isnan(values) if values.dtype.kind == "f" else values >= 0)
    return table.take(rows), values[rows]


def _classification(
    train: Table,
    known: np.ndarray,
    test: Table,
    truth: np.ndarray,
    inputs: list[str],
    levels: tuple[str, ...],
    rng: np.random.Generator,
) -> tuple[dict[str, float], dict[str, Any]]:
    metrics: dict[str, float] = {}
    detail: dict[str, Any] = {}
    for model in CLASSIFIERS:
        probability = _probabilities(model, train, known, test, inputs, len(levels), rng)
        guess = probability.argmax(axis=1)
        by_level = _by_level(truth, guess, levels)
        held = [facts["f1"] for facts in by_level.values() if facts["support"]]
        sure = np.clip(probability[np.arange(len(truth)), truth], FLOOR_PROBABILITY, 1.0)
        metrics[f"{model}_auc"] = _auc(truth, probability)
        metrics[f"{model}_accuracy"] = float((guess == truth).mean())
        metrics[f"{model}_macro_f1"] = float(np.mean(held))
        metrics[f"{model}_log_loss"] = float(-np.log(sure).mean())
        binary = len(levels) == 2
        detail[model] = {
            "levels": by_level,
            "calibration": _calibration(truth == 1, probability[:, 1]) if binary else [],
        }
    return metrics, detail


def _probabilities(
    model: str,
    train: Table,
    known: np.ndarray,
    test: Table,
    inputs: list[str],
    count: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Predicted probabilities (test rows, declared levels); 0 for a level that `train` lacks."""
    probability = np.zeros((len(test), count))
    present = np.unique(known)
    if len(present) == 0:
        return np.full_like(probability, 1 / count)
    if len(present) == 1:
        probability[:, present[0]] = 1.0
        return probability
    if model == "gbt":
        features, as_set = tree_features(train, inputs)
        fitted: Any = HistGradientBoostingClassifier(**tree_options(as_set, rng))
        fitted.fit(fill_empty(features), known)
        predicted = fitted.predict_proba(tree_features(test, inputs)[0])
    else:
        encode = _linear_encoder(train, inputs)
        fitted = LogisticRegression(max_iter=1000).fit(encode(train), known)
        predicted = fitted.predict_proba(encode(test))
    probability[:, fitted.classes_] = predicted
    return probability


def _regression(
    train: Table,
    known: np.ndarray,
    test: Table,
    truth: np.ndarray,
    inputs: list[str],
    middle: float,
    rng: np.random.Generator,
) -> dict[str, float]:
    if len(known) < 2:
        constant = np.full(len(truth), known[0] if len(known) else middle)
        predictions = dict.fromkeys(REGRESSORS, constant)
    else:
        features, as_set = tree_features(train, inputs)
        trees = HistGradientBoostingRegressor(**tree_options(as_set, rng))
        encode = _linear_encoder(train, inputs)
        predictions = {
            "gbt": trees.fit(fill_empty(features), known).predict(tree_features(test, inputs)[0]),
            "ridge": Ridge().fit(encode(train), known).predict(encode(test)),
        }
    metrics: dict[str, float] = {}
    for model, predicted in predictions.items():
        squared = float(((truth - predicted) ** 2).mean())
        metrics[f"{model}_r2"] = 1 - squared / float(truth.var())
        metrics[f"{model}_rmse"] = squared**0.5
    return metrics


def _linear_encoder(train: Table, inputs: list[str]) -> Callable[[Table], csr_matrix]:
    """Features of a linear model, scaled by `train`: a sparse (rows, features) matrix a table.

    A category is one-hot with its missing level; a number is standardised, a missing one becomes
    the mean and sets an indicator.
    """
    scales: dict[str, tuple[float, float]] = {}
    for name in inputs:
        if train.schema[name].numeric:
            values = numbers(train, name)
            present = values[~np.isnan(values)]
            spread = float(present.std()) if len(present) else 0.0
            scales[name] = (float(present.mean()) if len(present) else 0.0, spread or 1.0)

    def encode(table: Table) -> csr_matrix:
        places, entries, width = [], [], 0
        for name in inputs:
            if name in scales:
                mean, spread = scales[name]
                standard = (numbers(table, name) - mean) / spread
                absent = np.isnan(standard)
                places += [np.full(len(table), width), np.full(len(table), width + 1)]
                entries += [np.where(absent, 0.0, standard), absent.astype(float)]
                width += 2
            else:
                found, count = category_codes(table, name), len(table.schema[name].levels)
                places.append(width + np.where(found < 0, count, found))
                entries.append(np.ones(len(table)))
                width += count + 1
        starts = np.arange(0, len(table) * len(places) + 1, len(places))
        data, columns = np.column_stack(entries).ravel(), np.column_stack(places).ravel()
        return csr_matrix((data, columns, starts), shape=(len(table), width))

    return encode


def _auc(truth: np.ndarray, probability: np.ndarray) -> float:
    if probability.shape[1] == 2:
        return float(roc_auc_score(truth == 1, probability[:, 1]))
    held = np.unique(truth)
    return float(np.mean([roc_auc_score(truth == j, probability[:, j]) for j in held]))


def _by_level(
    truth: np.ndarray, guess: np.ndarray, levels: tuple[str, ...]
) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 (0 where undefined) and support (rows) of every declared level."""
    count = len(levels)
    confusion = np.bincount(truth * count + guess, minlength=count * count).reshape(count, count)
    hits, support, guessed = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    return {
        level: {
            "precision": float(hits[j] / max(guessed[j], 1)),
            "recall": float(hits[j] / max(support[j], 1)),
            "f1": float(2 * hits[j] / max(guessed[j] + support[j], 1)),
            "support": int(support[j]),
        }
        for j, level in enumerate(levels)
    }


def _calibration(positive: np.ndarray, probability: np.ndarray) -> list[dict[str, float]]:
    """Mean prediction, observed share and rows of each of ten equal bins that holds a row."""
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return [
        {
            "predicted": float(probability[bins == b].mean()),
            "observed": float(positive[bins == b].mean()),
            "rows": int((bins == b).sum()),
        }
        for b in np.unique(bins)
    ]
