"""Tables that travel with the package, each with its declared public schema and its licence.

A table `name` is two files here, `name.parquet` and `name.json`, and a line in `ATTRIBUTION.md`; or
a law in `simulated.py`, from which the same rows are drawn every time.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from dpsynth.checks import check_choice
from dpsynth.data import Table
from dpsynth.datasets.simulated import ROWS, SIMULATED, draw, simulated_schema
from dpsynth.randomness import stream
from dpsynth.schema import Schema

__all__ = ["load", "names", "official_train_rows", "schema"]

# Length of the published training part, which comes first in the file.
_TRAIN_ROWS = {"adult": 32_561}


def names() -> list[str]:
    """Names that `load` and `schema` know.

    >>> names()
    ['adult', 'mixture', 'parity', 'scm']
    """
    return sorted([*_TRAIN_ROWS, *SIMULATED])


def schema(name: str) -> Schema:
    """Declared public schema of the table `name`.

    Raises:
        UsageError: If no such table travels with the package.

    >>> schema("adult").target
    'income'
    """
    check_choice("dataset", name, names())
    if name in SIMULATED:
        return simulated_schema(name)
    return Schema.from_json((files(__name__) / f"{name}.json").read_text(encoding="utf-8"))


def load(name: str) -> Table:
    """The table `name` in its published row order, the official training rows first.

    A simulated one has 30 000 rows; `dpsynth.datasets.simulated.draw` gives others.

    Raises:
        UsageError: If no such table travels with the package.

    >>> len(load("adult"))
    48842
    """
    if name in SIMULATED:
        return draw(name, ROWS, stream(0, name))
    public = schema(name)
    with as_file(files(__name__) / f"{name}.parquet") as path:
        return Table.read(path, public)


def official_train_rows(name: str) -> int:
    """Number of leading rows of `load(name)` that form the published training part.

    Raises:
        UsageError: If no such table travels with the package, or it has no published split.

    >>> official_train_rows("adult")
    32561
    """
    check_choice("dataset with a published split", name, sorted(_TRAIN_ROWS))
    return _TRAIN_ROWS[name]
