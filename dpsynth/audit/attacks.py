"""Membership attacks that see synthetic rows only: one function an attack, higher = more "member".

Every attack is `(candidates, synthetic, reference, rng, *, device) -> scores (rows,)`. The
reference rows are what the attacker knows of the population and hold neither members nor holdout
rows; the device is where neighbours are searched, and changes no score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold

from dpsynth.audit.neighbours import Features, distances, quantile_map, range_map
from dpsynth.checks import UsageError
from dpsynth.data import Table

__all__ = [
    "ATTACKS",
    "DIAGNOSTICS",
    "Attack",
    "blind",
    "dcr",
    "discriminator",
    "nn_ratio_quantile",
    "nn_ratio_range",
]


class Attack(Protocol):
    """What every attack is called with, and gives."""

    def __call__(
        self,
        candidates: Table,
        synthetic: Table,
        reference: Table,
        rng: np.random.Generator,
        *,
        device: str = "cpu",
    ) -> np.ndarray: ...


# Added to distances before the logarithm: far below any distance between two different rows.
FLOOR = 1e-9
# Most levels that scikit-learn's trees take as a category; wider columns go in as ordered codes.
TREE_LEVELS = 254
FOLDS = 5


def nn_ratio_quantile(
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """log d₁(x, Ref) − log d₁(x, Syn) in L1 over reference quantiles: (rows,) scores."""
    measure = quantile_map(reference)
    return _log_ratio(candidates, synthetic, reference, rng, measure, power=1, device=device)


def nn_ratio_range(
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """log d₁(x, Ref) − log d₁(x, Syn) in L2 over declared ranges: (rows,) scores."""
    measure = range_map(reference.schema)
    return _log_ratio(candidates, synthetic, reference, rng, measure, power=2, device=device)


def discriminator(
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Log odds that a row is synthetic and not reference, by boosted trees: (rows,) scores.

    Both sides are cut to equal size. The candidates come from neither table, so every score is
    out of sample as it is; a member that the generator copied counts as evidence, not as a leak.
    """
    size = min(len(synthetic), len(reference))
    sides = [_sample(synthetic, size, rng), _sample(reference, size, rng)]
    features = np.vstack([_matrix(side) for side in sides])
    labels = np.repeat([1, 0], size)
    model = _trees(reference, rng).fit(features, labels)
    return model.decision_function(_matrix(candidates))


def dcr(
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> np.ndarray:
    """Minus the distance to the closest synthetic record: (rows,) scores.

    A diagnostic only: without a reference it measures how typical a row is, and says little on
    membership (Yao et al. 2025).
    """
    measure = quantile_map(reference)
    return -distances(measure(candidates), measure(synthetic), device=device)[:, 0]


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "nn_ratio_quantile": nn_ratio_quantile,
        "nn_ratio_range": nn_ratio_range,
        "discriminator": discriminator,
        "dcr": dcr,
    }
)
DIAGNOSTICS = frozenset({"dcr"})


def blind(
    members: Table, holdout: Table, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cross-fitted scores of boosted trees that see features only and no synthetic row.

    A control: members and holdout must not be told apart this way, or the split itself leaks and
    no attack's AUC speaks of the generator (Das, Zhang & Tramèr 2024).

    Returns:
        Scores of `members` (rows,) and of `holdout` (rows,), each from trees that did not see it.
    """
    if min(len(members), len(holdout)) < FOLDS:
        raise UsageError(
            f"{len(members)} members and {len(holdout)} holdout rows: the blind control needs at "
            f"least {FOLDS} of each"
        )
    features = np.vstack([_matrix(members), _matrix(holdout)])
    labels = np.repeat([1, 0], [len(members), len(holdout)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=_seed(rng))
    scores = np.empty(len(labels))
    for seen, kept in folds.split(features, labels):
        model = _trees(members, rng).fit(features[seen], labels[seen])
        scores[kept] = model.decision_function(features[kept])
    return scores[: len(members)], scores[len(members) :]


def _log_ratio(
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    measure: Callable[[Table], Features],
    *,
    power: int,
    device: str,
) -> np.ndarray:
    """The ratio with |Ref| cut to |Syn| where it is larger.

    A larger synthetic table is kept whole: rows left out of it could be the very copies that are
    looked for, while unequal sizes mostly shift all scores by one constant.
    """
    rows = measure(candidates)
    known = measure(_sample(reference, min(len(synthetic), len(reference)), rng))
    to_reference, to_synthetic = (
        distances(rows, keys, power=power, device=device)[:, 0]
        for keys in (known, measure(synthetic))
    )
    return np.log(to_reference + FLOOR) - np.log(to_synthetic + FLOOR)


def _sample(table: Table, size: int, rng: np.random.Generator) -> Table:
    return table if size == len(table) else table.take(rng.permutation(len(table))[:size])


def _matrix(table: Table) -> np.ndarray:
    """(rows, columns) float: numbers and level codes, NaN where missing."""
    columns = []
    for column in table.schema.columns:
        values = table.frame[column.name]
        if column.numeric:
            columns.append(values.to_numpy(dtype=float, na_value=np.nan))
        else:
            codes = values.cat.codes.to_numpy(dtype=float)
            columns.append(np.where(codes < 0, np.nan, codes))
    return np.column_stack(columns)


def _trees(table: Table, rng: np.random.Generator) -> HistGradientBoostingClassifier:
    nominal = [not c.numeric and len(c.levels) <= TREE_LEVELS for c in table.schema.columns]
    # A mapping, because the stubs of scikit-learn know the defaults' types only.
    settings: dict[str, Any] = {
        "max_iter": 60,
        "max_leaf_nodes": 15,
        "early_stopping": False,
        "categorical_features": np.flatnonzero(nominal),
        "random_state": _seed(rng),
    }
    return HistGradientBoostingClassifier(**settings)


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(1 << 31))
