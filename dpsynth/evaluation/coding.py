"""Tables as arrays for the judges: joint codes fitted on the real rows, and features for trees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.schema import Column

__all__ = [
    "Coder",
    "category_codes",
    "check_comparable",
    "fill_empty",
    "numbers",
    "subsample",
    "tree_features",
    "tree_options",
]

MAX_TREE_LEVELS = 255  # what scikit-learn's histogram trees can split on as a set


def check_comparable(*tables: Table) -> None:
    """Refuse tables of less than two rows, or whose columns are declared differently.

    Only what the figures depend on must agree: names and their order, kinds, levels and bounds.
    """
    expected = [_facts(column) for column in tables[0].schema.columns]
    for table in tables:
        if len(table) < 2:
            raise UsageError(f"table has rows={len(table)}: an evaluation needs at least 2")
        given = [_facts(column) for column in table.schema.columns]
        if len(given) != len(expected):
            raise UsageError(
                f"tables have {len(expected)} and {len(given)} columns; bring them under one schema"
            )
        for want, have in zip(expected, given, strict=True):
            if want != have:
                raise UsageError(
                    f"column {want[0]!r}: declared otherwise in the other table ({have[0]!r}, "
                    f"{have[1]}); bring both under one schema"
                )


def _facts(column: Column) -> tuple[object, ...]:
    return column.name, column.kind, column.levels, column.lower, column.upper


def numbers(table: Table, name: str) -> np.ndarray:
    """Numeric column as float64 (rows,), NaN where missing."""
    return table.frame[name].to_numpy(dtype=float, na_value=np.nan)


def category_codes(table: Table, name: str) -> np.ndarray:
    """Categorical column as int64 (rows,): position among the declared levels, -1 where missing."""
    return table.frame[name].cat.codes.to_numpy().astype(np.int64)


@dataclass(frozen=True, eq=False)
class Coder:
    """Bins fitted on one table, so that every column becomes a small integer.

    Bin i of a numeric column holds `edges[i-1] <= value < edges[i]`; values outside the fitted
    range fall into the end bins, equal quantiles are merged. A column's last code means missing.

    Limit: values that share a bin are not told apart. When a spike (`capital-gain` = 0) fills
    several quantiles, its bin reaches up to the next edge, so smearing the spike inside that bin
    goes unnoticed here; Kolmogorov–Smirnov and the classifier test see it.

    Attributes:
        columns: The columns' public facts, in order.
        edges: Ascending inner bin edges a column; empty for categories.
    """

    columns: tuple[Column, ...]
    edges: tuple[np.ndarray, ...]

    @classmethod
    def fit(cls, real: Table, *, bins: int = 20) -> Coder:
        """Take the distinct inner `bins`-quantiles of the present values of each numeric column."""
        check_count("bins", bins, least=2)
        shares = np.linspace(0, 1, bins + 1)[1:-1]
        columns = real.schema.columns
        return cls(columns, tuple(_edges(real, column, shares) for column in columns))

    @property
    def levels(self) -> np.ndarray:
        """Number of codes a column, the missing one included: int64 (columns,)."""
        pairs = zip(self.columns, self.edges, strict=True)
        return np.array([(len(e) + 1 if c.numeric else len(c.levels)) + 1 for c, e in pairs])

    def codes(self, table: Table) -> np.ndarray:
        """Code a table: int64 (rows, columns), column j in `0..levels[j]-1`, column-major."""
        if [c.name for c in self.columns] != table.schema.names:
            raise UsageError(
                f"table has columns {table.schema.names}; the bins were fitted on "
                f"{[c.name for c in self.columns]}"
            )
        coded = np.empty((len(table), len(self.columns)), dtype=np.int64, order="F")
        for j, (column, edges, count) in enumerate(
            zip(self.columns, self.edges, self.levels, strict=True)
        ):
            if column.numeric:
                values = numbers(table, column.name)
                found = np.searchsorted(edges, values, side="right")
                coded[:, j] = np.where(np.isnan(values), count - 1, found)
            else:
                found = category_codes(table, column.name)
                coded[:, j] = np.where(found < 0, count - 1, found)
        return coded


def _edges(table: Table, column: Column, shares: np.ndarray) -> np.ndarray:
    if not column.numeric:
        return np.empty(0)
    values = numbers(table, column.name)
    present = values[~np.isnan(values)]
    return np.unique(np.quantile(present, shares)) if len(present) else np.empty(0)


def tree_features(table: Table, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features for histogram trees, missing as NaN.

    Returns:
        float64 (rows, len(names)) and bool (len(names),), true where the values are categories.
        A category of more than 255 levels is too wide for set splits and is left as a number, its
        position among the declared levels.
    """
    features = np.empty((len(table), len(names)))
    as_set = np.zeros(len(names), dtype=bool)
    for j, name in enumerate(names):
        column = table.schema[name]
        if column.numeric:
            features[:, j] = numbers(table, name)
        else:
            found = category_codes(table, name)
            features[:, j] = np.where(found < 0, np.nan, found)
            as_set[j] = len(column.levels) <= MAX_TREE_LEVELS
    return features, as_set


def fill_empty(features: np.ndarray) -> np.ndarray:
    """Copy in which columns without any value are 0; for fitting only.

    Histogram trees cannot bin such a column; no split can use a constant one, so what it holds at
    prediction does not matter.
    """
    return np.where(np.isnan(features).all(axis=0), 0.0, features)


def tree_options(as_set: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """The judges' histogram trees: scikit-learn's defaults (100 rounds), but no early stopping.

    It would set in above 10 000 rows only, so that figures of different sizes came from different
    procedures, and holds out a stratified part, which a class of one row does not allow.
    """
    return {
        "categorical_features": as_set,
        "early_stopping": False,
        "random_state": int(rng.integers(2**31)),
    }


def subsample(table: Table, max_rows: int | None, rng: np.random.Generator) -> Table:
    """At most `max_rows` rows, drawn without replacement; the table itself if it is no longer."""
    if max_rows is None:
        return table
    check_count("max_rows", max_rows, least=2)
    if len(table) <= max_rows:
        return table
    return table.take(rng.choice(len(table), max_rows, replace=False))
