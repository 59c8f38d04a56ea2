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
from dpsynth.randomness import Stream
from dpsynth.schema import Column, Schema, as_level

__all__ = ["Split", "Table", "check_ending", "read_frame", "write_frame"]

ENDINGS = (".csv", ".parquet")
_NULLABLE = "numpy_nullable"
# A column of nothing else is truth values to pandas; one odd cell must not change what it says.
_TRUTH = {"true": 1.0, "false": 0.0}


def read_frame(path: str | Path, text: Sequence[str] = (), *, typed: bool = True) -> pd.DataFrame:
    """Read a CSV or Parquet file.

    Args:
        path: The file. In a CSV empty cells and pandas' usual marks (NA, NaN, None, null …) are
            missing; `?` is a value.
        text: Columns of a CSV to leave as the text they are (`01` stays `01`). Elsewhere pandas
            picks a type a column, and a single row can change it.
        typed: When false no row has a say in a type: every column of a CSV is left as text, and a
            column of a Parquet file keeps the type that the file declares, gaps or none.

    Raises:
        UsageError: If there is no such file, its ending is unknown or it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"table {str(path)!r}: no such file")
    check_ending(path)
    try:
        if path.suffix == ".csv":
            return pd.read_csv(path, dtype=dict.fromkeys(text, "string") if typed else "string")
        return pd.read_parquet(path) if typed else pd.read_parquet(path, dtype_backend=_NULLABLE)
    except (ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"table {str(path)!r}: cannot be read: {reason}") from error


def check_ending(path: str | Path) -> Path:
    """Refuse a table's file name that is neither .csv nor .parquet."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise UsageError(f"table {str(path)!r}: unknown ending; use .csv or .parquet")
    return path


def write_frame(frame: pd.DataFrame, path: str | Path) -> None:
    """Write a CSV or Parquet file, whole or not at all."""
    path = check_ending(path)
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

    `units` says who owns each row (rows,): equal entries, one unit. An entry depends on its own
    row only, so that a unit more leaves those of the others as they are. `None`: a row each.
    """

    schema: Schema
    frame: pd.DataFrame
    units: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.units is not None and self.units.shape != (len(self.frame),):
            raise UsageError(
                f"units of shape {self.units.shape}: must be one for each of {len(self.frame)} rows"
            )
        if self.units is not None and self.units.dtype.hasobject:
            raise UsageError("units are Python objects; give numbers or texts of a fixed width")

    def __len__(self) -> int:
        return len(self.frame)

    @classmethod
    def from_frame(
        cls, frame: pd.DataFrame, schema: Schema, *, strict: bool = True, unit: str | None = None
    ) -> Table:
        """Bring `frame` under `schema`.

        Args:
            frame: Any pandas frame with exactly the schema's columns, in any order, and `unit`.
            schema: The public facts.
            strict: Refuse values outside the declared domain, all-missing and constant columns.
                When false nothing about the values is ever reported: numbers are clipped to their
                bounds (non-finite ones count as missing), and an unknown level goes to the
                column's `other`. Without one, and where a value is missing but may not be, it
                becomes missing if the column is nullable and else `other`, the first level or the
                lower bound. Use this mode when even an error message must not depend on a row.
            unit: Column that says who owns a row; it is taken out and not modelled. Ids are
                compared as text. A row without one is nobody's, so no bound on what a unit
                contributes would hold for it: strict refuses it, else it is left out.

        Raises:
            UsageError: On a column too many or too few, an open one, no rows, or (strict) a value
                outside.
        """
        frame = check_columns(frame, schema, unit)
        for column in schema.columns:
            if column.open:
                raise UsageError(
                    f"column {column.name!r}: is open; measure it with `dpsynth schema measure`"
                )
        units = None
        if unit is not None:
            units, owned = unit_ids(frame[unit])
            if strict and not owned.all():
                raise UsageError(f"unit {unit!r}: a row has none; fill it or drop the row")
            frame, units = frame[owned], units[owned]
        columns = {c.name: _conform(frame[c.name], c, strict) for c in schema.columns}
        return cls(schema, pd.DataFrame(columns).reset_index(drop=True), units)

    @classmethod
    def read(
        cls, path: str | Path, schema: Schema, *, strict: bool = True, unit: str | None = None
    ) -> Table:
        """Read a CSV or Parquet file under `schema`, each value by itself."""
        return cls.from_frame(read_frame(path, typed=False), schema, strict=strict, unit=unit)

    def take(self, rows: np.ndarray) -> Table:
        """The rows at integer positions `rows`, in that order."""
        units = None if self.units is None else self.units[rows]
        return Table(self.schema, self.frame.iloc[rows].reset_index(drop=True), units)

    def select(self, names: Sequence[str]) -> Table:
        """The columns `names` only."""
        return Table(self.schema.select(names), self.frame[list(names)], self.units)

    def bounded(self, contributions: int, rng: Stream) -> Table:
        """At most `contributions` rows of each unit; see `bounded_rows`. Without units, each row
        is one of its own and all of them are kept.

        Raises:
            UsageError: On several contributions without units, or on what is no count.
        """
        check_count("contributions", contributions)
        if self.units is None:
            if contributions != 1:
                raise UsageError(
                    f"contributions={contributions}: the table has no units, so a row each; name "
                    "a unit"
                )
            return self
        return self.take(bounded_rows(self.units, contributions, rng))

    def digest(self) -> str:
        """sha256 over schema and values; equal tables give equal digests."""
        hashed = pd.util.hash_pandas_object(self.frame, index=False, categorize=False)
        text = self.schema.to_json().encode()
        units = b"" if self.units is None else self.units.tobytes()
        return hashlib.sha256(text + hashed.to_numpy().tobytes() + units).hexdigest()


def check_columns(frame: pd.DataFrame, schema: Schema, unit: str | None = None) -> pd.DataFrame:
    """`frame` with its names as texts; refuses any columns but the schema's and `unit`.

    Raises:
        UsageError: On a column too many or too few, a unit that is also modelled, or no rows.
    """
    given = [str(name) for name in frame.columns]
    if unit in schema.names:
        raise UsageError(f"unit {unit!r}: is a column of the schema too; drop it from the schema")
    if unit is not None and unit not in given:
        raise UsageError(f"unit {unit!r}: no such column in the table; choose one of {given}")
    for name in schema.names:
        if name not in given:
            raise UsageError(f"column {name!r}: in the schema but not in the table")
    for name in given:
        if given.count(name) > 1:
            raise UsageError(f"column {name!r}: stands in the table twice; keep one")
        if name not in schema.names and name != unit:
            raise UsageError(
                f"column {name!r}: in the table but not in the schema; declare or drop it"
            )
    if frame.empty:
        raise UsageError("table has no rows")
    return frame.set_axis(given, axis=1)


def unit_ids(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Who owns each row, as 128-bit digests of the ids (rows,), and which rows have an owner.

    Digests rather than numbers counted up: a number would depend on who else is in the table.
    """
    names = as_level(values).str.strip()
    owned = (names.notna() & (names != "")).to_numpy(dtype=bool)
    codes, ids = pd.factorize(names)
    digests = [hashlib.blake2b(str(one).encode(), digest_size=16).digest() for one in ids]
    return np.array([*digests, b""], dtype="S16")[codes], owned


def bounded_rows(units: np.ndarray, contributions: int, rng: Stream) -> np.ndarray:
    """Positions of at most `contributions` rows of each unit, ascending; a uniform sample of each.

    A row's place in the draw is a keyed hash of its unit and its number among that unit's rows:
    with the same key (32 bytes of `rng`) one unit more changes no choice among another's rows.

    Args:
        units: Who owns each row (rows,).
        contributions: Most rows of one unit.
        rng: Source of the key.
    """
    check_count("contributions", contributions)
    owner = np.unique(units, return_inverse=True)[1]
    draws = _keyed_draws(units, _numbers_within(owner), rng)
    order = np.lexsort((draws, owner))
    return np.sort(order[_numbers_within(owner[order]) < contributions])


def _numbers_within(owner: np.ndarray) -> np.ndarray:
    """Each row's number among the rows of its owner, in order, from 0 (rows,)."""
    order = np.argsort(owner, kind="stable")
    grouped = owner[order]
    numbers = np.empty(len(owner), dtype=np.int64)
    numbers[order] = np.arange(len(owner)) - np.searchsorted(grouped, grouped)
    return numbers


def _keyed_draws(units: np.ndarray, numbers: np.ndarray, rng: Stream) -> np.ndarray:
    """A draw from [0, 1) for each (unit, number) (rows,): equal pairs, equal draws."""
    key, width = rng.random(4).tobytes(), units.dtype.itemsize
    ids, places = units.tobytes(), numbers.astype("<i8").tobytes()
    draws = np.empty(len(units))
    for row in range(len(units)):
        # Without its padding an id does not depend on how long the longest other one is.
        name = ids[row * width : (row + 1) * width].rstrip(b"\0")
        text = name + places[row * 8 : row * 8 + 8]
        digest = hashlib.blake2b(text, key=key, digest_size=8).digest()
        draws[row] = (int.from_bytes(digest, "little") >> 11) * 2.0**-53
    return draws


def _conform(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    conform = _conform_number if column.numeric else _conform_level
    clean = conform(values, column, strict)
    if clean.isna().any() and not column.nullable:
        if strict:
            raise UsageError(
                f"column {column.name!r}: holds a missing value; declare it nullable or fill it"
            )
        filler = column.lower if column.numeric else column.other or column.levels[0]
        clean = clean.fillna(filler)
    if strict and clean.isna().all():
        raise UsageError(f"column {column.name!r}: all values are missing; drop it")
    if strict and len(clean) > 1 and clean.nunique(dropna=False) < 2:
        raise UsageError(f"column {column.name!r}: constant; drop it and add it after sampling")
    return clean


def _conform_level(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    names = as_level(values)
    # Levels may be declared with a `.0` that the values lack, or the other way round.
    for other in (names.str.removesuffix(".0"), names + ".0"):
        names = names.where(names.isin(column.levels), other)
    missing = values.isna()
    known = names.isin(column.levels) | missing
    if strict and not known.all():
        stray = as_level(values)[~known].iloc[0]
        mend = "add it to the schema"
        if column.provenance == "measured":
            mend = "few rows have it; read with strict=False (data.strict=false)"
        raise UsageError(f"column {column.name!r}: level {stray!r} is not declared; {mend}")
    named = names.where(known, pd.NA if column.other is None else column.other)
    categories = pd.Categorical(
        named.astype(object), categories=list(column.levels), ordered=column.ordered
    )
    return pd.Series(categories, index=values.index, name=column.name)


def as_floats(values: pd.Series) -> np.ndarray:
    """Each value by itself as a float (rows,); NaN if it is missing or no real number."""
    if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_complex_dtype(values):
        return values.to_numpy(dtype=float, na_value=np.nan)
    return np.array([_as_float(value) for value in values.to_numpy(dtype=object)], dtype=float)


def _as_float(value: Any) -> float:
    try:
        if isinstance(value, complex):
            return value.real if value.imag == 0 else math.nan
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return _TRUTH.get(value.strip().lower(), math.nan) if isinstance(value, str) else math.nan


def _conform_number(values: pd.Series, column: Column, strict: bool) -> pd.Series:
    assert column.lower is not None and column.upper is not None
    array = as_floats(values)
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
        """De-duplicate `table`, then cut it at random; a unit's rows all fall in one part.

        Each row, or unit, falls in a part by a keyed hash of itself, so one more moves none of the
        others, whoever knows the key: what differs by one in `table` differs by at most one among
        the members, for every draw of `rng`. A permutation of all rows would not do; one row more
        gives another permutation. Sizes are right on average.

        With units copies are removed within a unit only: across units a new unit's rows would make
        others' disappear, and 2k rows would change.
        """
        check_fraction("holdout", holdout)
        check_fraction("reference", reference)
        check_fraction("holdout + reference", holdout + reference)
        unique = table.take(_firsts(table))
        owners = _contents(unique.frame) if unique.units is None else unique.units
        draws = _keyed_draws(owners, np.zeros(len(unique)), rng)
        part = np.searchsorted([holdout, holdout + reference], draws, side="right")
        held, known, members = (np.flatnonzero(part == number) for number in range(3))
        declared = table.schema.expected_rows
        # The declared size is that of the whole table; the members' share of it is public too.
        expected = declared and max(1, round(declared * (1 - holdout - reference)))
        return cls(
            _expecting(unique.take(members), expected, table.schema.rows_provenance),
            unique.take(held),
            unique.take(known),
        )

    @classmethod
    def official(cls, table: Table, train_rows: int, rng: np.random.Generator) -> Split:
        """Keep a published split: the first `train_rows` rows are members, the rest is halved at
        random into holdout and reference; of equal rows only the first is kept.

        With units copies are removed within a unit only, a unit that has members loses its other
        rows, and the rest is halved unit by unit.
        """
        check_count("train_rows", train_rows)
        first = _firsts(table)
        inside, rest = first[first < train_rows], first[first >= train_rows]
        if table.units is None:
            rest = rng.permutation(rest)
            held, known = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        else:
            rest = rest[~np.isin(table.units[rest], table.units[inside])]
            draws = _keyed_draws(table.units[rest], np.zeros(len(rest)), rng)
            held, known = rest[draws < 0.5], rest[draws >= 0.5]
        members = _expecting(table.take(inside), train_rows, "declared")
        return cls(members, table.take(held), table.take(known))


def _contents(frame: pd.DataFrame) -> np.ndarray:
    """A digest of each row's values (rows,): equal rows, equal digests."""
    hashes = pd.util.hash_pandas_object(frame, index=False, categorize=False)
    return np.array([f"{value:016x}" for value in hashes.to_numpy()], dtype="S16")


def _firsts(table: Table) -> np.ndarray:
    """Positions of the first of equal rows of one owner, ascending."""
    values = table.frame.set_axis(range(table.frame.shape[1]), axis=1)
    if table.units is not None:
        values[-1] = np.unique(table.units, return_inverse=True)[1]
    return np.flatnonzero(~values.duplicated().to_numpy())


def _expecting(table: Table, rows: int | None, provenance: str) -> Table:
    schema = replace(table.schema, expected_rows=rows, rows_provenance=provenance)
    return replace(table, schema=schema)
