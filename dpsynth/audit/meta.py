"""Meta-classifier: trees that learn from labelled generators what membership looks like."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import special
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression

from dpsynth.checks import UsageError

__all__ = ["MetaClassifier"]

FOLDS = 5
# Fits whose log-odds are averaged; each sees other features at its splits.
REPEATS = 3
# Fewest rows of a leaf, as a share of all rows and at most: small fleets still get leaves.
LEAF_SHARE = 0.01
LEAF_ROWS = 100


@dataclass(frozen=True, eq=False)
class MetaClassifier:
    """Boosted trees over features of candidates, fitted on generators with known members.

    Rows of one generator share its synthetic table, so every estimate of how good the classifier
    is, its own calibration among them, leaves out whole generators and never single rows.

    Attributes:
        names: Feature names, in order.
        cross_fitted: Calibrated log-odds of each generator's rows, (rows,) a generator, by trees
            that saw no row of that generator.
        slope: Of the calibration: log-odds = slope · trees + offset (Platt 1999).
        offset: Of the calibration.
        forest: Trees fitted on all generators.
    """

    names: tuple[str, ...]
    cross_fitted: tuple[np.ndarray, ...]
    slope: float
    offset: float
    forest: _Forest

    @classmethod
    def fit(
        cls,
        features: Sequence[pd.DataFrame],
        members: Sequence[np.ndarray],
        rng: np.random.Generator,
    ) -> MetaClassifier:
        """Fit on labelled generators.

        Args:
            features: A frame of float columns (rows, features) for each generator; NaN is a value.
            members: Which of its rows each generator saw: bool or 0/1 (rows,).
            rng: Of the folds and of the trees.

        Raises:
            UsageError: On fewer than two generators, frames that do not fit each other or their
                labels, infinite features, or labels that do not take both values.
        """
        names = _check(features, members)
        sizes = [len(frame) for frame in features]
        values = np.vstack([frame[list(names)].to_numpy(dtype=np.float32) for frame in features])
        labels = np.concatenate([np.asarray(one).astype(int) for one in members])
        owner = np.repeat(np.arange(len(sizes)), sizes)
        fold = (rng.permutation(len(sizes)) % min(FOLDS, len(sizes)))[owner]
        raw = np.empty(len(labels))
        for number in np.unique(fold):
            seen, kept = fold != number, fold == number
            if len(np.unique(labels[seen])) < 2:
                raise UsageError(
                    "labels: without some generators only one kind of row is left; label members "
                    "and non-members of every generator"
                )
            (model,) = _fit_trees(values[seen], labels[seen], rng, repeats=1)
            raw[kept] = model.decision_function(values[kept])
        slope, offset = _platt(raw, labels)
        crossed = np.split(slope * raw + offset, np.cumsum(sizes)[:-1])
        forest = _Forest.of(_fit_trees(values, labels, rng))
        return cls(names, tuple(crossed), slope, offset, forest)

    def score(self, features: pd.DataFrame) -> np.ndarray:
        """Calibrated log-odds of membership (rows,); `expit` of them is a probability.

        The prior is the share of members among the rows that the classifier was fitted on.
        """
        missing = [name for name in self.names if name not in features]
        if missing:
            raise UsageError(f"feature {missing[0]!r}: the classifier needs it; give all of them")
        values = features[list(self.names)].to_numpy(dtype=np.float32)
        if np.isinf(values).any():
            raise UsageError("features: hold an infinite value; NaN stands for what is unknown")
        return self.slope * self.forest.log_odds(values) + self.offset

    def probability(self, features: pd.DataFrame) -> np.ndarray:
        """Calibrated probability of membership (rows,), strictly inside 0..1."""
        return special.expit(self.score(features))

    def save(self, path: Path) -> None:
        """Write everything but `cross_fitted` as plain arrays; `load` gives equal scores."""
        line = np.array([self.slope, self.offset, self.forest.start])
        with path.open("wb") as file:
            np.savez(file, names=np.array(self.names), nodes=self.forest.nodes, line=line)

    @classmethod
    def load(cls, path: Path) -> MetaClassifier:
        """Inverse of `save`, except that `cross_fitted` is empty; executes nothing it reads.

        Raises:
            UsageError: If the file is not one of `save`.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                slope, offset, start = map(float, stored["line"])
                names = tuple(map(str, stored["names"]))
                forest = _Forest(stored["nodes"].astype(_NODE, casting="no"), start)
                forest.check(len(names))
                return cls(names, (), slope, offset, forest)
        except (KeyError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
            raise UsageError(
                f"classifier {str(path)!r}: cannot be read; delete it, and it is fitted again"
            ) from error


# A node of a tree: where NaN and values up to the threshold go, and what a leaf adds.
_NODE = np.dtype(
    [
        ("feature", "<i4"),
        ("threshold", "<f8"),
        ("missing_left", "?"),
        ("left", "<i4"),
        ("right", "<i4"),
        ("leaf", "?"),
        ("value", "<f8"),
    ]
)


@dataclass(frozen=True, eq=False)
class _Forest:
    """Boosted trees as one array, so that they can be stored without storing code.

    Attributes:
        nodes: (trees, nodes) of `_NODE`; node 0 is the root.
        start: Log-odds before any tree.
    """

    nodes: np.ndarray
    start: float

    @classmethod
    def of(cls, models: Sequence[HistGradientBoostingClassifier]) -> _Forest:
        """The average of fitted models' log-odds."""
        trees = [stage[0].nodes for model in models for stage in _private(model, "_predictors")]
        nodes = np.zeros((len(trees), max(map(len, trees))), dtype=_NODE)
        nodes["leaf"] = True  # also where a smaller tree has no node
        names = {
            "feature": "feature_idx",
            "threshold": "num_threshold",
            "missing_left": "missing_go_to_left",
            "left": "left",
            "right": "right",
            "leaf": "is_leaf",
        }
        for row, tree in zip(nodes, trees, strict=True):
            for mine, theirs in names.items():
                row[mine][: len(tree)] = tree[theirs]
            row["value"][: len(tree)] = tree["value"] / len(models)
        starts = [float(np.ravel(_private(model, "_baseline_prediction"))[0]) for model in models]
        return cls(nodes, float(np.mean(starts)))

    def check(self, features: int) -> None:
        """Refuse nodes that lead nowhere, back, or to a feature that there is not."""
        inner = ~self.nodes["leaf"]
        here = np.arange(self.nodes.shape[1])
        for side in ("left", "right"):
            child = self.nodes[side]
            if (inner & ((child <= here) | (child >= len(here)))).any():
                raise ValueError("a branch does not lead down")
        if (inner & ((self.nodes["feature"] < 0) | (self.nodes["feature"] >= features))).any():
            raise ValueError("no such feature")

    def log_odds(self, values: np.ndarray) -> np.ndarray:
        """Sum over the trees: (rows,) of features (rows, features)."""
        total = np.full(len(values), self.start)
        rows = np.arange(len(values))
        for tree in self.nodes:
            place = np.zeros(len(values), dtype=np.int64)
            while not tree["leaf"][place].all():
                node = tree[place]
                value = values[rows, node["feature"]]
                left = np.where(np.isnan(value), node["missing_left"], value <= node["threshold"])
                deeper = np.where(left, node["left"], node["right"])
                place = np.where(node["leaf"], place, deeper)
            total += tree["value"][place]
        return total


def _private(model: HistGradientBoostingClassifier, name: str) -> Any:
    """A fitted part for which scikit-learn has no public name; its own scores check the reading."""
    return getattr(model, name)


def _check(features: Sequence[pd.DataFrame], members: Sequence[np.ndarray]) -> tuple[str, ...]:
    if len(features) < 2 or len(features) != len(members):
        raise UsageError(
            f"{len(features)} feature frames and {len(members)} sets of labels: give one of each "
            "for at least 2 generators"
        )
    names = tuple(map(str, features[0].columns))
    for place, (frame, labels) in enumerate(zip(features, members, strict=True)):
        if sorted(map(str, frame.columns)) != sorted(names):
            raise UsageError(f"features of generator {place}: other columns than the first's")
        if np.shape(labels) != (len(frame),):
            raise UsageError(
                f"labels of generator {place}: shape {np.shape(labels)} for {len(frame)} rows"
            )
        if not np.isin(labels, (0, 1)).all():
            raise UsageError(f"labels of generator {place}: must be 0 or 1")
        if np.isinf(frame.to_numpy(dtype=np.float32)).any():
            raise UsageError(f"features of generator {place}: hold an infinite value; use NaN")
    kinds = np.unique(np.concatenate([np.asarray(one).astype(int) for one in members]))
    if len(kinds) < 2:
        raise UsageError("labels: all are equal; give members and non-members")
    return names


def _fit_trees(
    values: np.ndarray, labels: np.ndarray, rng: np.random.Generator, *, repeats: int = REPEATS
) -> tuple[HistGradientBoostingClassifier, ...]:
    # A mapping, because the stubs of scikit-learn know the defaults' types only.
    settings: dict[str, Any] = {
        "max_iter": 120,
        "learning_rate": 0.08,
        "max_leaf_nodes": 16,
        "min_samples_leaf": int(np.clip(LEAF_SHARE * len(labels), 5, LEAF_ROWS)),
        "l2_regularization": 5.0,
        "max_features": 0.3,
        "early_stopping": False,
    }
    return tuple(
        HistGradientBoostingClassifier(**settings, random_state=int(rng.integers(1 << 31))).fit(
            values, labels
        )
        for _ in range(repeats)
    )


def _platt(raw: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Slope and offset of the logistic regression of labels on raw log-odds.

    Trees without skill get a slope near 0. A negative one would turn the sign of every score on
    the strength of noise, so it is cut there: at the least positive slope all scores are alike and
    their order is the trees'.
    """
    model = LogisticRegression(C=1e6).fit(raw[:, None], labels)
    slope, offset = float(model.coef_[0, 0]), float(model.intercept_[0])
    if slope > 0:
        return slope, offset
    return 1e-6, float(special.logit(labels.mean()))
