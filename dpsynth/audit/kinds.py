"""Kinds: a working schema for tables that came without one, drafted from all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from dpsynth.checks import UsageError
from dpsynth.data import as_floats
from dpsynth.schema import MAX_LEVELS, Column, Schema, as_level

__all__ = ["draft_schema", "relaxed", "unstamped"]

# A column of whole numbers with more distinct values than this is a number, not a category.
FEW = 24
OTHER = "(other)"


def unstamped(values: pd.Series, where: str) -> pd.Series:
    """Dates and durations as seconds; anything else as it is.

    Raises:
        UsageError: On a date of which pandas knows no number.
    """
    if isinstance(values.dtype, pd.PeriodDtype):
        raise UsageError(f"{where} column {values.name!r}: holds periods; give dates or numbers")
    stamp = pd.api.types.is_datetime64_any_dtype(values)
    if not stamp and not pd.api.types.is_timedelta64_dtype(values):
        return values
    if getattr(values.dtype, "tz", None) is not None:
        values = values.dt.tz_convert("UTC").dt.tz_localize(None)
    zero = pd.Timestamp(0) if stamp else pd.Timedelta(0)
    return ((values - zero) / pd.Timedelta(seconds=1)).astype(float)


def draft_schema(
    tables: Mapping[str, pd.DataFrame], names: Sequence[str]
) -> tuple[Schema, list[str]]:
    """A schema that every table fits, every column nullable.

    A column is a number if all tables hold numbers in it, more than `FEW` of them different or one
    a fraction; else it is a category. The levels of the first tables come first, so that a last
    table with a stranger among them gives no other level another place.

    Args:
        tables: By name; all have the columns `names`, dates as numbers.
        names: Columns to take.

    Returns:
        The schema and the columns left out of it: those with one value, or none, in all tables.

    Raises:
        UsageError: If no column is left.
    """
    columns, dropped = [], []
    for name in names:
        column = _draft(name, [table[name] for table in tables.values()])
        if column is None:
            dropped.append(name)
        else:
            columns.append(column)
    if not columns:
        raise UsageError(f"columns {list(names)}: each has one value only; nothing can be compared")
    return Schema(tuple(columns)), dropped


def _draft(name: str, parts: Sequence[pd.Series]) -> Column | None:
    present = [part[part.notna().to_numpy()] for part in parts]
    distinct = [pd.Series(part.unique()) for part in present if len(part)]
    truth = any(pd.api.types.is_bool_dtype(part) for part in parts)
    numbers = [as_floats(part) for part in distinct]
    if numbers and not truth and not any(np.isnan(part).any() for part in numbers):
        values = np.unique(np.concatenate(numbers))
        values = values[np.isfinite(values)]
        if len(values) > FEW or (len(values) > 1 and (values != np.round(values)).any()):
            lower, upper = float(values[0]), float(values[-1])
            return Column(
                name, "decimal", lower=lower, upper=upper, nullable=True, provenance="data"
            )
    levels: list[str] = []
    for part in distinct:
        levels += sorted(set(as_level(part)) - set(levels))
    missing = any(part.isna().any() for part in parts)
    if len(levels) + missing < 2:
        return None
    if len(levels) > MAX_LEVELS - 1:
        count = as_level(pd.concat(present, ignore_index=True).astype(object)).value_counts()
        keep = set(count.index[: MAX_LEVELS - 1])
        levels = [level for level in levels if level in keep]
    other = OTHER
    while other in levels:
        other += "_"
    return Column(
        name, "categorical", (*levels, other), nullable=True, other=other, provenance="data"
    )


def relaxed(schema: Schema) -> Schema:
    """The same facts, but whole numbers may have fractions and any value may be missing: a
    generator's table keeps to less than its training rows."""
    return Schema(
        tuple(
            replace(column, kind="decimal" if column.numeric else column.kind, step=None,
                    nullable=True)
            for column in schema.columns
        )
    )  # fmt: skip
