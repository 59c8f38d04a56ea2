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
_CONDITION = re.compile(r"\s*([^=<>]+?)\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|(\S+))\s*")


def parse_where(text: str) -> dict[str, str]:
    """`"income='>50K' and sex=Male"` as a mapping of column to value."""
    conditions = {}
    for part in re.split(r"\s+and\s+", text.strip()):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise UsageError(f"where={part!r}: write column='value', joined by ' and '")
        conditions[match[1]] = next(value for value in match.groups()[1:] if value is not None)
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
        where: Column → value that every row must have.
        rng: Seed; the same seed gives the same table. `None` draws a fresh one.

    Raises:
        UsageError: On an unknown column or value, or a condition too rare to be met.
    """
    check_count("rows", rows)
    key = fresh_key() if rng is None else rng
    wanted = dict(where or {})
    given = {}
    for name, value in wanted.items():
        codec.schema[name]  # an unknown column is refused here
        place = codec.schema.names.index(name)
        if place in generator.conditions():
            given[place] = codec.code_of(name, value)
    kept: list[Table] = []
    have = 0
    for attempt in range(_ATTEMPTS):
        need = rows - have
        size = rows if attempt == 0 else min(max(2 * need, 256), 4 * rows + 256)
        codes = generator.sample(size, FleetRng([derive(key, "rows", attempt)]), given)[0]
        table = codec.decode(codes, stream(key, "decode", attempt))
        table = table.take(np.flatnonzero(_meets(table, wanted)))
        kept.append(table)
        have += len(table)
        if have >= rows:
            frame = pd.concat([part.frame for part in kept], ignore_index=True)
            return Table(codec.schema, frame.iloc[:rows])
    raise UsageError(
        f"where={wanted}: met by {have} of the rows drawn for {rows}; ask for fewer or relax it"
    )


def _meets(table: Table, wanted: Mapping[str, object]) -> np.ndarray:
    mask = np.ones(len(table), dtype=bool)
    for name, value in wanted.items():
        column = table.frame[name]
        target = float(str(value)) if table.schema[name].numeric else str(value)
        mask &= (column == target).fillna(False).to_numpy(dtype=bool)
    return mask
