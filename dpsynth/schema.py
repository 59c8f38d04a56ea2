"""Schema and Column: the public facts about a table, declared or measured, never just read off."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dpsynth.checks import RefusedError, UsageError, check_choice, check_count, check_positive

__all__ = ["FORMAT", "KINDS", "MAX_LEVELS", "Column", "Schema"]

FORMAT = 1
KINDS = ("categorical", "integer", "decimal")
PROVENANCES = ("declared", "data", "measured")
MAX_LEVELS = 1024
# What an event in `Schema.spent` must say beside the parameters of its mechanism.
_SPENT = {"what": str, "mechanism": str, "unit": str, "contributions": int, "noise": str}


@dataclass(frozen=True)
class Column:
    """One column's public facts.

    Attributes:
        name: Column name.
        kind: `categorical`, `integer` or `decimal`.
        levels: Categorical only: every level that may occur, as strings, in order if `ordered`.
        lower: Numeric only: least value that may occur (inclusive).
        upper: Numeric only: greatest value that may occur (inclusive).
        step: Numeric only: distance between neighbouring values; 1 for integers, `None` for a
            decimal of unknown resolution.
        nullable: Whether missing values may occur; they are modelled, not dropped.
        ordered: Categorical only: whether the order of `levels` means something.
        provenance: `declared` by a person as public, read off the `data`, or `measured` by a
            differentially private mechanism. A finite-ε run refuses the second, and the third
            where `Schema.spent` does not say what it cost.
        source: By whose word the facts are public, e.g. `UCI codebook`.
        other: Categorical only: the level that takes every value that is no level.
        open: Whether the facts are still to be measured: levels beside those that are listed, or
            the bounds that are not given. Only a draft may say so; no table keeps to it.
        max_levels: Open categorical only: most levels that measuring may find.
    """

    name: str
    kind: str
    levels: tuple[str, ...] = ()
    lower: float | None = None
    upper: float | None = None
    step: float | None = None
    nullable: bool = False
    ordered: bool = False
    provenance: str = "declared"
    source: str = ""
    other: str | None = None
    open: bool = False
    max_levels: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        check_choice(f"kind of column {self.name!r}", self.kind, KINDS)
        check_choice(f"provenance of column {self.name!r}", self.provenance, PROVENANCES)
        if self.kind == "categorical":
            self._check_levels()
        else:
            self._check_bounds()

    def _check_types(self) -> None:
        """Facts may come from a file, so nothing is taken for granted."""
        if not isinstance(self.name, str):
            raise UsageError(f"column name={self.name!r}: must be a text")
        for fact in ("lower", "upper", "step"):
            value = getattr(self, fact)
            if value is not None and not isinstance(value, Real):
                raise UsageError(f"column {self.name!r}: {fact}={value!r} must be a number")
        if not isinstance(self.source, str) or not isinstance(self.other, str | None):
            raise UsageError(f"column {self.name!r}: source and other must be texts")
        for fact in ("nullable", "ordered", "open"):
            if not isinstance(getattr(self, fact), bool):
                raise UsageError(
                    f"column {self.name!r}: {fact}={getattr(self, fact)!r} must be true or false"
                )

    def _check_levels(self) -> None:
        count = len(self.levels)
        if self.lower is not None or self.upper is not None or self.step is not None:
            raise UsageError(f"column {self.name!r}: categorical, so it takes levels, not bounds")
        if len(set(self.levels)) != count:
            raise UsageError(f"column {self.name!r}: a level is listed twice; list each once")
        self._check_open_levels()
        if self.other is not None and self.other not in self.levels and not self.open:
            raise UsageError(f"column {self.name!r}: other={self.other!r} is none of its levels")
        if count < 2 and not self.open:
            raise UsageError(
                f"column {self.name!r}: constant ({count} level); drop it and add it after sampling"
            )
        if count > MAX_LEVELS:
            raise UsageError(
                f"column {self.name!r}: {count} levels, more than {MAX_LEVELS}; "
                "group them or drop it"
            )

    def _check_open_levels(self) -> None:
        if not self.open:
            if self.max_levels is not None:
                raise UsageError(
                    f"column {self.name!r}: max_levels={self.max_levels} is for open columns"
                )
            return
        if self.ordered:
            raise UsageError(f"column {self.name!r}: open, so the order of its levels is unknown")
        if self.max_levels is not None:
            check_count(f"max_levels of column {self.name!r}", self.max_levels)

    def _check_bounds(self) -> None:
        if self.levels or self.ordered or self.other is not None or self.max_levels is not None:
            raise UsageError(f"column {self.name!r}: {self.kind}, so it takes bounds, not levels")
        known = [bound for bound in (self.lower, self.upper) if bound is not None]
        if self.open and len(known) == 2:
            raise UsageError(f"column {self.name!r}: open, but both bounds are given; close it")
        if not self.open and len(known) < 2:
            raise UsageError(f"column {self.name!r}: {self.kind} needs lower and upper bounds")
        if not all(map(math.isfinite, known)):
            raise UsageError(
                f"column {self.name!r}: bounds {self.lower}..{self.upper} must be finite"
            )
        if len(known) == 2 and known[0] >= known[1]:
            raise UsageError(
                f"column {self.name!r}: constant or reversed bounds {self.lower}..{self.upper}; "
                "widen them or drop the column"
            )
        if self.kind == "integer":
            if any(bound != round(bound) for bound in known):
                raise UsageError(
                    f"column {self.name!r}: integer bounds {self.lower}..{self.upper} must be whole"
                )
            if self.step not in (None, 1):
                raise UsageError(f"column {self.name!r}: step={self.step}; integers step by 1")
            object.__setattr__(self, "step", 1.0)
        elif self.step is not None:
            check_positive(f"step of column {self.name!r}", self.step)

    @property
    def numeric(self) -> bool:
        """Whether values are numbers with bounds."""
        return self.kind != "categorical"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready facts, defaults left out."""
        defaults = {f: v.default for f, v in self.__dataclass_fields__.items()}
        facts = {k: v for k, v in asdict(self).items() if v != defaults[k]}
        if self.levels:
            facts["levels"] = list(self.levels)
        return facts

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Column:
        """Inverse of `to_dict`; an unknown key is refused."""
        if not isinstance(facts, dict):
            raise UsageError(f"schema column {facts!r}: must be an object with a name and a kind")
        unknown = sorted(set(facts) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(f"schema column {facts.get('name')!r}: unknown key {unknown[0]!r}")
        if "name" not in facts or "kind" not in facts:
            raise UsageError(f"schema column {facts}: needs a name and a kind")
        levels = facts.get("levels", [])
        if not isinstance(levels, list):
            raise UsageError(f"schema column {facts['name']!r}: levels={levels!r} must be a list")
        levels = tuple(str(level) for level in levels)
        return cls(**{**facts, "levels": levels})


@dataclass(frozen=True)
class Schema:
    """The public facts about a table.

    Attributes:
        columns: Columns in order.
        target: Name of the column that a downstream model would predict, if any.
        expected_rows: Public number of rows, if known. The true count is private under
            add/remove, so sampling rates and sizes are derived from this one.
        rows_provenance: Where `expected_rows` comes from; see `Column.provenance`.
        source: By whose word the facts are public.
        spent: What measuring cost: one object an event (`privacy.events.Event.to_dict`), with the
            `unit` and `contributions` that it was measured under and where its `noise` came from.
            A column that is dropped stays paid for.
    """

    columns: tuple[Column, ...]
    target: str | None = None
    expected_rows: int | None = None
    rows_provenance: str = "declared"
    source: str = ""
    spent: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if not self.columns:
            raise UsageError("schema has no columns; declare at least one")
        names = self.names
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"column {name!r} is declared twice; declare each once")
        if self.target is not None and self.target not in names:
            raise UsageError(f"target={self.target!r}: no such column; choose one of {names}")
        if self.expected_rows is not None:
            check_count("expected_rows", self.expected_rows)
        check_choice("rows_provenance", self.rows_provenance, PROVENANCES)
        if not isinstance(self.source, str):
            raise UsageError(f"schema source={self.source!r}: must be a text")
        for event in self.spent:
            _check_spent(event)

    @property
    def names(self) -> list[str]:
        """Column names in order."""
        return [column.name for column in self.columns]

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise UsageError(f"column {name!r}: not in the schema; choose one of {self.names}")

    def select(self, names: Iterable[str]) -> Schema:
        """The same facts for `names` only, in that order; a target left out becomes `None`."""
        columns = tuple(self[name] for name in names)
        kept = self.target if self.target in [c.name for c in columns] else None
        return replace(self, columns=columns, target=kept)

    def drop(self, names: Iterable[str]) -> Schema:
        """The same facts without `names`; an unknown name is refused."""
        gone = [self[name].name for name in names]
        return self.select([name for name in self.names if name not in gone])

    @property
    def measured(self) -> bool:
        """Whether levels or bounds were measured: then rows lie outside by rule, not by mistake,
        and a table is read with `strict=False`."""
        return any(column.provenance == "measured" for column in self.columns)

    def check_public(self) -> None:
        """Refuse a schema that holds a fact read off the rows (needed before any finite-ε run).

        Raises:
            RefusedError: With the first line of `faults`.
        """
        for fault in self.faults():
            raise RefusedError(fault)

    def faults(self) -> list[str]:
        """What a finite-ε run refuses, a line each; reads no rows."""
        found = [self._fault_of(column) for column in self.columns]
        if self.expected_rows is not None:
            found.append(self._fault_of_rows())
        return [fault for fault in found if fault]

    def _fault_of(self, column: Column) -> str:
        facts = "bounds" if column.numeric else "levels"
        if column.provenance == "data":
            return (
                f"column {column.name!r}: its levels or bounds were read off the data; check "
                "them and set provenance to 'declared', or train with privacy.epsilon=inf"
            )
        if column.open:
            return (
                f"column {column.name!r}: its {facts} are still open; measure them with "
                "`dpsynth schema measure`"
            )
        what = f"{facts}:{column.name}"
        if column.provenance == "measured" and not self._paid(what, selects=not column.numeric):
            return (
                f"column {column.name!r}: its {facts} are called measured, but no event {what!r} "
                "paid for them; measure them again"
            )
        return ""

    def _fault_of_rows(self) -> str:
        if self.rows_provenance == "data":
            return (
                f"expected_rows={self.expected_rows}: was read off the data; declare a public "
                "number, or measure it with `dpsynth schema measure`"
            )
        if self.rows_provenance == "measured" and not self._paid("rows"):
            return (
                f"expected_rows={self.expected_rows}: is called measured, but no event 'rows' "
                "paid for it; measure it again"
            )
        return ""

    def _paid(self, what: str, *, selects: bool = False) -> bool:
        """Whether noise was paid for under that name, and the chance to let through a level that
        only one unit has where levels were selected."""
        paid = {event["mechanism"] for event in self.spent if event["what"] == what}
        noisy = paid - {"failure", "none"}
        return bool(noisy) and "none" not in paid and (not selects or "failure" in paid)

    def to_json(self) -> str:
        """Text of a schema file; what most schemas do not have is left out."""
        body: dict[str, Any] = {"format": FORMAT, "target": self.target}
        if self.source:
            body["source"] = self.source
        body["expected_rows"] = self.expected_rows
        if self.rows_provenance != "declared":
            body["rows_provenance"] = self.rows_provenance
        body["columns"] = [column.to_dict() for column in self.columns]
        if self.spent:
            body["spent"] = [dict(event) for event in self.spent]
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Inverse of `to_json`; unknown keys and newer formats are refused."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"schema is not JSON: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("columns"), list):
            raise UsageError("schema needs a list 'columns'; see `dpsynth schema infer`")
        unknown = sorted(set(body) - {"format", *cls.__dataclass_fields__})
        if unknown:
            raise UsageError(f"schema: unknown key {unknown[0]!r}")
        if body.pop("format", FORMAT) != FORMAT:
            raise UsageError(
                f"schema format={json.loads(text)['format']}: this version reads {FORMAT}"
            )
        spent = body.get("spent", [])
        if not isinstance(spent, list):
            raise UsageError(f"schema spent={spent!r}: must be a list of events")
        columns = tuple(Column.from_dict(facts) for facts in body["columns"])
        return cls(**{**body, "columns": columns, "spent": tuple(spent)})

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read a schema file."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(f"schema {str(path)!r}: no such file")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UsageError(f"schema {str(path)!r}: is not a text file") from error

    @classmethod
    def infer(cls, frame: pd.DataFrame, target: str | None = None) -> Schema:
        """Draft a schema from rows; every fact is marked as read off the data.

        Whole numbers become `integer`, other numbers `decimal`, the rest `categorical`; a number
        with fewer than three distinct values is a category. The number of rows is not written.
        """
        if frame.empty:
            raise UsageError("table has no rows; a schema cannot be drafted from it")
        columns = tuple(
            _infer_column(str(name), frame.iloc[:, place])
            for place, name in enumerate(frame.columns)
        )
        return cls(columns, target)


def _infer_column(name: str, values: pd.Series) -> Column:
    present = values.dropna()
    if present.empty:
        raise UsageError(f"column {name!r}: all values are missing; drop it")
    nullable = len(present) < len(values)
    distinct = as_level(present).nunique()
    if distinct < 2:
        raise UsageError(f"column {name!r}: constant; drop it and add it after sampling")
    numeric = pd.api.types.is_numeric_dtype(present) and not pd.api.types.is_bool_dtype(present)
    if numeric and not np.isfinite(present.to_numpy(dtype=float)).all():
        raise UsageError(f"column {name!r}: holds an infinite value; replace it")
    if not numeric or distinct < 3:
        levels = tuple(sorted(set(as_level(present))))
        return Column(name, "categorical", levels, nullable=nullable, provenance="data")
    numbers = present.to_numpy(dtype=float)
    whole = bool((numbers == np.round(numbers)).all())
    return Column(
        name,
        "integer" if whole else "decimal",
        lower=float(numbers.min()),
        upper=float(numbers.max()),
        step=None if whole else _resolution(numbers),
        nullable=nullable,
        provenance="data",
    )


def _resolution(numbers: np.ndarray) -> float | None:
    """The decimal step that all values keep to, if it has at most four digits."""
    for digits in range(1, 5):
        if np.allclose(numbers, np.round(numbers, digits), rtol=0, atol=1e-9):
            return 10.0**-digits
    return None


def _check_spent(event: Any) -> None:
    """Refuse what is no event of a measurement; `privacy.metadata` reads its parameters."""
    if not isinstance(event, Mapping):
        raise UsageError(f"schema spent: {event!r} must be an object")
    for key, kind in _SPENT.items():
        if not isinstance(event.get(key), kind):
            raise UsageError(
                f"schema spent {event.get('what')!r}: {key}={event.get(key)!r} must be "
                f"{'a text' if kind is str else 'a whole number'}"
            )
    check_count(f"schema spent {event['what']!r}: contributions", event["contributions"])


def as_level(values: pd.Series) -> pd.Series:
    """Values as level names: whole floats (an integer column with gaps) lose their `.0`.

    Each value by itself: were one row able to change how the others are named, a neighbouring
    table would differ in every row.
    """
    names = values.astype("string")
    if pd.api.types.is_float_dtype(values):
        return names.str.removesuffix(".0")
    if pd.api.types.is_object_dtype(values):
        floats = np.array([isinstance(value, float) for value in values], dtype=bool)
        return names.mask(floats, names.str.removesuffix(".0"))
    return names
