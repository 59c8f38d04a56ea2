"""Classifier two-sample test: can boosted trees tell the rows of two tables apart?"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from dpsynth.checks import check_count
from dpsynth.data import Table
from dpsynth.evaluation.coding import (
    check_comparable,
    fill_empty,
    subsample,
    tree_features,
    tree_options,
)

__all__ = ["c2st"]


def c2st(
    real: Table,
    other: Table,
    *,
    rng: np.random.Generator,
    max_rows: int | None = None,
    folds: int = 2,
) -> float:
    """Cross-fitted area under the ROC curve of telling `other` from `real`; 0.5 is the ideal.

    Both tables are cut at random to the same number of rows, the smaller's or `max_rows`. In each
    fold scikit-learn's default histogram trees (100 rounds, no early stopping, categories split as
    sets, missing values native) learn from the other folds; the result is the mean of the folds'
    areas, for scores of different fits are not on one scale.

    It grows with the number of rows: compare figures of equal sizes only. Give rows that the
    generator has not seen as `real`; rows that occur in both tables push it below 0.5.

    Source: Lopez-Paz & Oquab 2017, with the area in place of the accuracy.

    Raises:
        UsageError: On different columns, fewer than two rows (or than `folds`) in a table.
    """
    check_comparable(real, other)
    check_count("folds", folds, least=2)
    rows = min(len(real), len(other), len(real) if max_rows is None else max_rows)
    check_count("rows a table after max_rows", rows, least=folds)
    parts = [subsample(table, rows, rng) for table in (real, other)]
    encoded = [tree_features(part, part.schema.names) for part in parts]
    features = np.concatenate([values for values, _ in encoded])
    labels = np.repeat([0, 1], rows)
    splits = StratifiedKFold(folds, shuffle=True, random_state=int(rng.integers(2**31)))
    areas = []
    for train, test in splits.split(features, labels):
        model = HistGradientBoostingClassifier(**tree_options(encoded[0][1], rng))
        model.fit(fill_empty(features[train]), labels[train])
        scores = model.predict_proba(features[test])[:, 1]
        areas.append(roc_auc_score(labels[test], scores))
    return float(np.mean(areas))
