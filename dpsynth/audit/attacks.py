"""Membership attacks that see synthetic rows only: one function an attack, higher = more "member".

An attack is called with `(candidates, synthetic, reference, rng, *, device)` and gives scores
(rows,). The reference rows are what the attacker knows of the population and hold neither members
nor holdout rows. Attacks called together (`score_all`) share what they measure: each metric is
searched once, for as many neighbours as any of them needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold

from dpsynth.audit.neighbours import Features, distances, quantile_map, range_map
from dpsynth.checks import UsageError
from dpsynth.data import Table

__all__ = [
    "ATTACKS",
    "DIAGNOSTICS",
    "QUICK",
    "Attack",
    "Evidence",
    "blind",
    "dcr",
    "discriminator",
    "domias_quantile",
    "domias_range",
    "identical",
    "identical_calibrated",
    "nn_ratio_quantile",
    "nn_ratio_range",
    "nndr",
    "row_hashes",
    "score_all",
    "tree_classifier",
    "tree_features",
]

# Added to distances before the logarithm: far below any distance between two different rows.
FLOOR = 1e-9
# Most levels that scikit-learn's trees take as a category; wider columns go in as ordered codes.
TREE_LEVELS = 254
FOLDS = 5
# Neighbours of the density ratio: the fewest that smooth, since leakage is local.
DENSITY_NEIGHBOURS = 5


@dataclass(frozen=True, eq=False)
class Evidence:
    """What attacks on one synthetic table look at, each thing measured once.

    Attributes:
        candidates: Rows that are asked about.
        synthetic: What the generator put out.
        reference: What the attacker knows of the population, all of it.
        seed: Of all draws; an attack draws the same whichever others look at the evidence.
        neighbours: How many neighbours to search for.
        device: Where; it changes no score.
    """

    candidates: Table
    synthetic: Table
    reference: Table
    seed: int
    neighbours: int
    device: str

    @cached_property
    def known(self) -> Table:
        """The reference, cut to the synthetic size where it is larger.

        A larger synthetic table is kept whole: rows left out of it could be the very copies that
        are looked for, while unequal sizes mostly shift all scores by one constant.
        """
        size = min(len(self.synthetic), len(self.reference))
        return _sample(self.reference, size, self.rng(0))

    def rng(self, use: int) -> np.random.Generator:
        """The stream of one use of randomness."""
        return np.random.default_rng([self.seed, use])

    @cached_property
    def quantile(self) -> _Metric:
        """L1 over reference quantiles."""
        return _Metric(self, quantile_map(self.reference), 1)

    @cached_property
    def range(self) -> _Metric:
        """L2 over declared ranges."""
        return _Metric(self, range_map(self.reference.schema), 2)

    @cached_property
    def copied(self) -> np.ndarray:
        """Whether each candidate is a synthetic row, value by value: bool (rows,)."""
        return np.isin(row_hashes(self.candidates), row_hashes(self.synthetic))


@dataclass(frozen=True, eq=False)
class _Metric:
    """Distances from the candidates under one feature map: (rows, neighbours), increasing."""

    evidence: Evidence
    measure: Callable[[Table], Features]
    power: int

    @cached_property
    def candidates(self) -> Features:
        return self.measure(self.evidence.candidates)

    @cached_property
    def to_synthetic(self) -> np.ndarray:
        return self._search(self.evidence.synthetic)

    @cached_property
    def to_reference(self) -> np.ndarray:
        return self._search(self.evidence.known)

    def _search(self, table: Table) -> np.ndarray:
        k, device = self.evidence.neighbours, self.evidence.device
        return distances(self.candidates, self.measure(table), k=k, power=self.power, device=device)

    def log_ratio(self, k: int) -> np.ndarray:
        """log dₖ(x, Ref) − log dₖ(x, Syn)."""
        known, made = self.to_reference[:, k - 1], self.to_synthetic[:, k - 1]
        return np.log(known + FLOOR) - np.log(made + FLOOR)


@dataclass(frozen=True)
class Attack:
    """A membership attack: scores from evidence, and how many neighbours it looks at."""

    score: Callable[[Evidence], np.ndarray]
    neighbours: int = 1

    def __call__(
        self,
        candidates: Table,
        synthetic: Table,
        reference: Table,
        rng: np.random.Generator,
        *,
        device: str = "cpu",
    ) -> np.ndarray:
        """Scores (rows,) of the candidates.

        Raises:
            UsageError: On fewer synthetic or reference rows than `neighbours`.
        """
        seed = int(rng.integers(1 << 63))
        return self.score(Evidence(candidates, synthetic, reference, seed, self.neighbours, device))


def score_all(
    attacks: Mapping[str, Attack],
    candidates: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> dict[str, np.ndarray]:
    """Scores (rows,) by attack: those that each gives alone under the same `rng`, for less work."""
    if not attacks:
        return {}
    most = max(attack.neighbours for attack in attacks.values())
    seed = int(rng.integers(1 << 63))
    evidence = Evidence(candidates, synthetic, reference, seed, most, device)
    return {name: attack.score(evidence) for name, attack in attacks.items()}


def _discriminator(evidence: Evidence) -> np.ndarray:
    size, rng = len(evidence.known), evidence.rng(1)
    sides = [_sample(evidence.synthetic, size, rng), evidence.known]
    features = np.vstack([tree_features(side) for side in sides])
    labels = np.repeat([1, 0], size)
    model = tree_classifier(evidence.reference, rng).fit(features, labels)
    return model.decision_function(tree_features(evidence.candidates))


def _nndr(evidence: Evidence) -> np.ndarray:
    nearest, second = evidence.quantile.to_synthetic[:, :2].T
    return -(nearest + FLOOR) / (second + FLOOR)


# log d₁(x, Ref) − log d₁(x, Syn) in L1 over reference quantiles.
nn_ratio_quantile = Attack(lambda e: e.quantile.log_ratio(1))
# The same in L2 over declared ranges.
nn_ratio_range = Attack(lambda e: e.range.log_ratio(1))
# DOMIAS (van Breugel et al. 2023): the synthetic over the reference density at the candidate. A
# k-th-neighbour estimate of a density is k/(n·volume of a ball of that radius), so up to a constant
# and a factor, which move no rank, the log-ratio of densities is that of the radii.
domias_quantile = Attack(lambda e: e.quantile.log_ratio(DENSITY_NEIGHBOURS), DENSITY_NEIGHBOURS)
domias_range = Attack(lambda e: e.range.log_ratio(DENSITY_NEIGHBOURS), DENSITY_NEIGHBOURS)
# Log odds that a row is synthetic and not reference, by boosted trees on equally many of both. No
# cross-fitting: candidates are in neither table, so every score is out of sample as it is. A
# member that the generator copied is in both, and that is the evidence looked for.
discriminator = Attack(_discriminator)
# Minus the distance to the closest synthetic record. Without a reference it measures how typical
# a row is, and says little on membership (Yao et al. 2025).
dcr = Attack(lambda e: -e.quantile.to_synthetic[:, 0])
# Minus the distance to the nearest over that to the second-nearest synthetic record, 0/0 read as 1:
# blind to rows that were copied twice.
nndr = Attack(_nndr, 2)
# Whether the row was put out as it is.
identical = Attack(lambda e: e.copied.astype(float))
# The same where the reference does not hold the row, and the more the farther it is from there: a
# match in a crowd happens by chance.
identical_calibrated = Attack(lambda e: e.copied * e.quantile.to_reference[:, 0])

# What every run of a sweep is attacked by; they need one neighbour only.
ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        "nn_ratio_quantile": nn_ratio_quantile,
        "nn_ratio_range": nn_ratio_range,
        "discriminator": discriminator,
        "dcr": dcr,
    }
)
# All attacks that train no generator.
QUICK: Mapping[str, Attack] = MappingProxyType(
    {
        **ATTACKS,
        "domias_quantile": domias_quantile,
        "domias_range": domias_range,
        "identical_calibrated": identical_calibrated,
        "identical": identical,
        "nndr": nndr,
    }
)
# Shown, but never the strongest attack: no reference corrects them for how typical a row is.
DIAGNOSTICS = frozenset({"dcr", "identical", "nndr"})


def row_hashes(table: Table) -> np.ndarray:
    """64-bit hashes (rows,): equal rows have equal ones, and a chance meeting is negligible."""
    return pd.util.hash_pandas_object(table.frame, index=False, categorize=False).to_numpy()


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
    features = np.vstack([tree_features(members), tree_features(holdout)])
    labels = np.repeat([1, 0], [len(members), len(holdout)])
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=_seed(rng))
    scores = np.empty(len(labels))
    for seen, kept in folds.split(features, labels):
        model = tree_classifier(members, rng).fit(features[seen], labels[seen])
        scores[kept] = model.decision_function(features[kept])
    return scores[: len(members)], scores[len(members) :]


def _sample(table: Table, size: int, rng: np.random.Generator) -> Table:
    return table if size == len(table) else table.take(rng.permutation(len(table))[:size])


def tree_features(table: Table) -> np.ndarray:
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


def tree_classifier(table: Table, rng: np.random.Generator) -> HistGradientBoostingClassifier:
    """Boosted trees, not yet fitted, for the `tree_features` of tables like `table`."""
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
