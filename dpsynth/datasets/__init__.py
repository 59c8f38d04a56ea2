"""Tables that travel with the package, each with its declared public schema and its licence.

A table `name` is two files here, `name.parquet` and `name.json`, and a line in `ATTRIBUTION.md`.
"""

from __future__ import annotations

from importlib.resources import as_file, files

from dpsynth.checks import check_choice
from dpsynth.data import Table
from dpsynth.schema import Schema

__all__ = ["load", "names", "official_train_rows", "schema"]

# Length of the published training part, which comes first in the file.
_TRAIN_ROWS = {"adult": 32_561}


def names() -> list[str]:
    """Names that `load` and `schema` know.

    >>> names()
    ['adult']
    """
    return sorted(_TRAIN_ROWS)


def schema(name: str) -> Schema:
    """Declared public schema of the table `name`.

    Raises:
        UsageError: If no such table travels with the package.

    >>> schema("adult").target
    'income'
    """
    check_choice("dataset", name, names())
    return Schema.from_json((files(__name__) / f"{name}.json").read_text(encoding="utf-8"))


def load(name: str) -> Table:
    """The table `name` in its published row order, the official training rows first.

    Raises:
        UsageError: If no such table travels with the package.

    >>> len(load("adult"))
    48842
    """
    public = schema(name)
    with as_file(files(__name__) / f"{name}.parquet") as path:
        return Table.read(path, public)


def official_train_rows(name: str) -> int:
    """Number of leading rows of `load(name)` that form the published training part.

    Raises:
        UsageError: If no such table travels with the package.

    >>> official_train_rows("adult")
    32561
    """
    check_choice("dataset", name, names())
    return _TRAIN_ROWS[name]
