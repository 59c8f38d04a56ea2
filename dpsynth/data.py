"""Table and Split: rows that keep to a schema, and the three disjoint parts of an honest audit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpsynth.checks import UsageError, check_count, check_fraction
from dpsynth.schema import Column, Schema

__all__ = ["Split", "Table", "read_frame", "write_frame"]

ENDINGS = (".csv", ".parquet")


def read_frame(path: str | Path, text: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV or Parquet file.

    Args:
        path: The file. In a CSV empty cells and pandas' usual marks (NA, NaN, None, null …) are
            missing; `?` is a value.
        text: Columns of a CSV to leave as the text they are (`01` stays `01`). Elsewhere pandas
            picks a type a column, and a single row can change it.

    Raises:
        UsageError: If there is no such file, its ending is unknown or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"table {str(path)!r}: no such file")
    if path.suffix not in ENDINGS:
        raise UsageError(f"table {str(path)!r}: unknown ending; use .csv or .parquet")
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=dict.fromkeys(text, "string"))
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"table {str(path)!r}: cannot be read: {reason}") from error


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a CSV or Parquet file, whole or not at all."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise UsageError(f"table {str(path)!r}: unknown ending; use .csv or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".csv":
            frame.to_csv(partial, index=False)
        else:
            frame.to_parquet(partial, index=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that keep to a schema.

    `frame` holds the schema's columns in order: categories as `pd.Categorical` over the declared
    levels, integers as `Int64`, decimals as `float64`; missing values are NA/NaN. Build it with
    `from_frame`, which checks or mends every value.
    """

    schema: Schema
    frame: pd.DataFrame

    def __len__(self) -> int:
        return len(self.frame)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, schema: Schema, *, strict: bool = True) -> Table:
        """Bring `frame` under `schema`.

        Args:
            frame: Any pandas frame with exactly the schema's columns, in any order.
            schema: The public facts.
            strict: Refuse values outside the declared domain, all-missing and constant columns.
                When false nothing about the values is ever reported: numbers are clipped to their
                bounds (non-finite ones count as missing), and an unknown level, or a missing value
                where none is declared, becomes missing if the column is nullable and else its
                first level or lower bound. Use this mode when even an error message must not
                depend on a row.

        Raises:
            UsageError: On a column too many or too few, no rows, or (strict) a value outside.
        """
        given = [str(name) for name in frame.columns]
        for name in schema.names:
            if name not in given:
                raise UsageError(f"column {name!r}: in the schema but not in the table")
        for name in given:
            if given.count(name) > 1:
                raise UsageError(f"column {name!r}: stands in the table twice; keep one")
            if name not in schema.names:
                raise UsageError(
                    f"column {name!r}: in the table but not in the schema; declare or drop it"
                )
        if frame.empty:
            raise UsageError("table has no rows")
        frame = frame.set_axis(given, axis=1)
        columns = {c.name: _conform(frame[c.name], c, strict) for c in schema.columns}
        return cls(schema, pd.DataFrame(columns).reset_index(drop=True))

    @classmethod
    def read(cls, path: str | Path, schema: Schema, *, strict: bool = True) -> Table:
        """Read a CSV or Parquet file under `schema`."""
        text = [column.name for column in schema.columns if not column.numeric]
        return cls.from_frame(read_frame(path, text), schema, strict=strict)

    def take(self, rows: np.ndarray) -> Table:
        """The rows at integer positions `rows`, in that order."""
        return Table(self.schema, self.frame.iloc[rows].reset_index(drop=True))

    def select(self, names: Sequence[str]) -> Table:
        """The columns `names` only."""
        return Table(self.schema.select(names), self.frame[list(names)])

    def digest(self) -> str:
        """sha256 over schema and values; equal tables give equal digests."""
        hashed = pd.util.hash_pandas_object(self.frame, index=False, categorize=False)
        text = self.schema.to_json().encode()
        return hashlib.sha256(text + hashed.to_numpy().tobytes()).hexdigest()


def _conform(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    conform = _conform_number if column.numeric else _conform_level
    clean = conform(values, column, strict)
    if clean.isna().any() and not column.nullable:
        if strict:
            raise UsageError(
                f"column {column.name!r}: holds a missing value; declare it nullable or fill it"
            )
        clean = clean.fillna(column.lower if column.numeric else column.levels[0])
    if strict and clean.isna().all():
        raise UsageError(f"column {column.name!r}: all values are missing; drop it")
    if strict and len(clean) > 1 and clean.nunique(dropna=False) < 2:
        raise UsageError(f"column {column.name!r}: constant; drop it and add it after sampling")
    return clean


def _conform_level(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    names = values.astype("string")
    # A whole float (an integer column with gaps) is looked up without its `.0`, each by itself.
    names = names.where(names.isin(column.levels), names.str.removesuffix(".0"))
    known = names.isin(column.levels) | names.isna()
    if strict and not known.all():
        stray = names[~known].iloc[0]
        raise UsageError(
            f"column {column.name!r}: level {stray!r} is not declared; add it to the schema"
        )
    categories = pd.Categorical(
        names.where(known).astype(object), categories=list(column.levels), ordered=column.ordered
    )
    return pd.Series(categories, index=values.index, name=column.name)


def _as_floats(values: pd.Series) -> np.ndarray:
    """Each value by itself as a float; NaN if it is missing or no real number."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_complex_dtype(values):
        return values.to_numpy(dtype=float, na_value=np.nan)

    def one(value: Any) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return math.nan

    return np.array([one(value) for value in values], dtype=float)


def _conform_number(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    assert column.lower is not None and column.upper is not None
    array = _as_floats(values)
    strange = np.isnan(array) & values.notna().to_numpy()
    if strict and strange.any():
        stray = values[strange].iloc[0]
        raise UsageError(f"column {column.name!r}: {stray!r} is not a number")
    if strict and np.isinf(array).any():
        raise UsageError(f"column {column.name!r}: holds an infinite value; replace it")
    array = np.where(np.isfinite(array), array, np.nan)
    outside = (array < column.lower) | (array > column.upper)
    if strict and outside.any():
        raise UsageError(
            f"column {column.name!r}: value {array[outside][0]:g} is outside the declared bounds "
            f"{column.lower:g}..{column.upper:g}; widen them or mend the value"
        )
    array = np.clip(array, column.lower, column.upper)
    if column.kind == "decimal":
        return pd.Series(array, index=values.index, name=column.name)
    whole = np.round(array)
    if strict and (np.isfinite(array) & (whole != array)).any():
        raise UsageError(f"column {column.name!r}: holds fractions but is declared integer")
    return pd.Series(whole, index=values.index, name=column.name).astype("Int64")


@dataclass(frozen=True, eq=False)
class Split:
    """Three parts without a row in common (Carlini et al. 2022, the membership game).

    Attributes:
        members: What the generator may see.
        holdout: Non-members: the real test rows of evaluation and audit.
        reference: What an attacker is granted to know of the population.
    """

    members: Table
    holdout: Table
    reference: Table

    def __post_init__(self) -> None:
        for name in ("members", "holdout", "reference"):
            if len(getattr(self, name)) < 2:
                raise UsageError(
                    f"{name} part has {len(getattr(self, name))} row; each part needs at least 2: "
                    "give more rows or larger fractions"
                )

    @classmethod
    def random(
        cls, table: Table, rng: np.random.Generator, *, holdout: float = 0.2, reference: float = 0.2
    ) -> Split:
        """De-duplicate `table`, then cut a random permutation of it.

        Removing copies moves a neighbouring table by at most one row, so it costs no budget.
        """
        check_fraction("holdout", holdout)
        check_fraction("reference", reference)
        check_fraction("holdout + reference", holdout + reference)
        unique = table.take(np.flatnonzero(~table.frame.duplicated().to_numpy()))
        order = rng.permutation(len(unique))
        cuts = np.round(np.cumsum([holdout, reference]) * len(unique)).astype(int)
        held, known, members = np.split(order, cuts)
        declared = table.schema.expected_rows
        # The declared size is that of the whole table; the members' share of it is public too.
        expected = declared and max(1, round(declared * (1 - holdout - reference)))
        return cls(
            _expecting(unique.take(members), expected), unique.take(held), unique.take(known)
        )

    @classmethod
    def official(cls, table: Table, train_rows: int, rng: np.random.Generator) -> Split:
        """Keep a published split: the first `train_rows` rows are members, the rest is halved at
        random into holdout and reference; of equal rows only the first is kept."""
        check_count("train_rows", train_rows)
        first = np.flatnonzero(~table.frame.duplicated().to_numpy())
        rest = rng.permutation(first[first >= train_rows])
        half = len(rest) // 2
        members = _expecting(table.take(first[first < train_rows]), train_rows)
        return cls(members, table.take(rest[:half]), table.take(rest[half:]))


def _expecting(table: Table, rows: int | None) -> Table:
    return Table(replace(table.schema, expected_rows=rows), table.frame)
