"""Inputs: the tables of an audit brought under one schema, whatever types they came in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from dpsynth.audit.kinds import draft_schema, relaxed, unstamped
from dpsynth.audit.shadow_tables import LABEL, ShadowTable
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Schema

__all__ = ["Inputs"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """All tables of a call by name, under one schema."""

    frames: Mapping[str, pd.DataFrame]
    schema: Schema
    shadows: Sequence[ShadowTable]

    @classmethod
    def of(
        cls,
        synthetic: pd.DataFrame,
        candidates: pd.DataFrame,
        reference: pd.DataFrame | None,
        shadows: Sequence[ShadowTable],
        schema: Schema | None,
        say: Callable[[str], None],
    ) -> Inputs:
        """Check columns, drop what is not compared, and settle the schema."""
        names = [str(name) for name in synthetic.columns if str(name) != LABEL]
        if schema is not None:
            names = _declared(names, schema)
        raw = {} if reference is None else {"reference": reference}
        for shadow in shadows:
            if f"shadow {shadow.name!r}" in raw:
                raise UsageError(f"shadow {shadow.name!r}: two have this name; name each apart")
            raw[f"shadow {shadow.name!r}"] = shadow.synthetic
            if shadow.candidates is not None:
                raw[f"shadow {shadow.name!r} candidates"] = shadow.candidates
            if shadow.members is not None:
                raw[f"shadow {shadow.name!r} members"] = shadow.members
        raw |= {"synthetic": synthetic, "candidates": candidates}
        frames = {where: _compared(frame, names, where) for where, frame in raw.items()}
        _check_dates(frames, raw)
        extra = [str(name) for name in candidates.columns if str(name) not in names]
        if extra:
            say(f"candidates: columns {extra} are ignored; {LABEL!r} is the truth, others are new")
        if schema is not None:
            return cls(frames, relaxed(schema.select(names)), shadows)
        drafted, dropped = draft_schema(frames, names)
        if dropped:
            say(f"columns {dropped}: one value in all tables; left out")
        frames = {where: frame[drafted.names] for where, frame in frames.items()}
        return cls(frames, drafted, shadows)

    def table(self, where: str) -> Table:
        """The table called `where`; values outside the schema go to its edges."""
        return Table.from_frame(self.frames[where], self.schema, strict=False)

    def coarse(self, table: Table) -> Table:
        """`table` under bounds widened to powers of two.

        An extreme value of the audited table then hardly ever moves the measure that the shadows'
        classifier was fitted under, and a cached one still fits.
        """
        return replace(table, schema=_widened(self.schema))


def _widened(schema: Schema) -> Schema:
    columns = []
    for column in schema.columns:
        if column.lower is not None and column.upper is not None:
            lower, upper = -_power(-column.lower), _power(column.upper)
            column = replace(column, lower=lower, upper=upper)
        columns.append(column)
    return Schema(tuple(columns))


def _power(value: float) -> float:
    """The least power of two, with its sign, or 0 that is not below `value`."""
    if value == 0:
        return 0.0
    exponent = np.log2(abs(value))
    return float(np.sign(value) * 2.0 ** (np.ceil(exponent) if value > 0 else np.floor(exponent)))


def _declared(names: list[str], schema: Schema) -> list[str]:
    for name in schema.names:
        if name not in names:
            raise UsageError(f"column {name!r}: in the schema but not in the synthetic table")
    return schema.names


def _compared(frame: pd.DataFrame, names: list[str], where: str) -> pd.DataFrame:
    given = [str(name) for name in frame.columns]
    for name in names:
        if given.count(name) != 1:
            what = "lacks it" if name not in given else "has it twice"
            raise UsageError(f"column {name!r}: the table {where} {what}; give it once everywhere")
    if frame.empty:
        raise UsageError(f"table {where}: has no rows or no columns")
    frame = frame.set_axis(given, axis=1)[names].reset_index(drop=True)
    return frame.apply(lambda values: unstamped(values, where))


def _check_dates(frames: Mapping[str, pd.DataFrame], raw: Mapping[str, pd.DataFrame]) -> None:
    """Refuse a column of dates in one table and of texts in another: no level would match."""
    for name in frames["synthetic"].columns:
        kinds = {where: raw[where][name].dtype for where in raw}
        dates = [where for where, kind in kinds.items() if kind.kind in "mM"]
        texts = [where for where in raw if pd.api.types.is_string_dtype(frames[where][name])]
        if dates and texts:
            raise UsageError(
                f"column {name!r}: dates in {dates[0]} and texts in {texts[0]}; give one kind"
            )
