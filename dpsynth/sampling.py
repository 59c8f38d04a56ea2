"""Sampling: a trained generator and its codec → a table, with conditions met in every row."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd

from dpsynth.checks import UsageError, check_count
from dpsynth.codec import Codec
from dpsynth.data import Table
from dpsynth.models.base import Generator
from dpsynth.randomness import FleetRng, derive, fresh_key, stream

__all__ = ["parse_where", "sample_table"]

_ATTEMPTS = 50
_CONDITION = re.compile(
    r"\s*([^=<>]+?)\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|([^\s='\"]\S*))(\s+and\s|\s*$)"
)


def parse_where(text: str) -> dict[str, str]:
    """`"income='>50K' and sex=Male"` as a mapping of column to value."""
    conditions: dict[str, str] = {}
    place, more = 0, True
    while more:
        match = _CONDITION.match(text, place)
        if match is None:
            raise UsageError(f"where={text[place:]!r}: write column='value', joined by ' and '")
        name, *values, joint = match.groups()
        if name in conditions:
            raise UsageError(f"where={text!r}: column {name!r} stands twice; give it one value")
        conditions[name] = next(value for value in values if value is not None)
        place, more = match.end(), bool(joint.strip())
    return conditions


def sample_table(
    generator: Generator,
    codec: Codec,
    rows: int,
    *,
    where: Mapping[str, object] | None = None,
    rng: int | None = None,
) -> Table:
    """Draw `rows` rows, all of which meet `where`.

    Columns that the family can condition on are fixed before drawing; whatever is left is met by
    rejection.

    Args:
        generator: A fleet of one.
        codec: The codec it was trained with.
        rows: Number of rows.
        where: Column → value that every row must have; `None` or NaN for a missing one.
        rng: Seed; the same seed gives the same table. `None` draws a fresh one.

    Raises:
        UsageError: On an unknown column or value, or a condition too rare to be met.
    """
    check_count("rows", rows)
    key = fresh_key() if rng is None else rng
    wanted = {name: _declared(codec, name, value) for name, value in (where or {}).items()}
    places = {codec.schema.names.index(name): name for name in wanted}
    given = {
        place: codec.code_of(name, wanted[name])
        for place, name in places.items()
        if place in generator.conditions()
    }
    kept: list[Table] = []
    have = 0
    for attempt in range(_ATTEMPTS):
        need = rows - have
        # As many as the last attempt hints at, and more from one to the next: few may meet it.
        size = min(max(2 * need, 256), 4 * rows + 256) << min(attempt, 4) if attempt else rows
        codes = generator.sample(size, FleetRng([derive(key, "rows", attempt)]), given)[0]
        table = codec.decode(codes, stream(key, "decode", attempt))
        table = table.take(np.flatnonzero(_meets(table, wanted)))
        kept.append(table)
        have += len(table)
        if have >= rows:
            frame = pd.concat([part.frame for part in kept], ignore_index=True)
            return Table(codec.schema, frame.iloc[:rows])
    raise UsageError(
        f"where={dict(where or {})}: met by {have} of the rows drawn for {rows}; ask for fewer or "
        "relax it"
    )


def _declared(codec: Codec, name: str, value: object) -> object:
    """`value` as the column itself would hold it, `None` for a missing one that is declared; an
    unknown column or value is refused."""
    if codec.schema[name].nullable and (value is None or value is pd.NA or value != value):
        return None
    frame = pd.DataFrame({name: [value]})
    return Table.from_frame(frame, codec.schema.select([name])).frame[name].iloc[0]


def _meets(table: Table, wanted: Mapping[str, object]) -> np.ndarray:
    mask = np.ones(len(table), dtype=bool)
    for name, value in wanted.items():
        column = table.frame[name]
        met = column.isna() if value is None else (column == value).fillna(False)
        mask &= met.to_numpy(dtype=bool)
    return mask
