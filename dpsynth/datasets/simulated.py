"""Simulated tables whose truth is known: what a label is given its row, in closed form.

Their structure is of high order on purpose: in `parity` and `mixture` no table of the label and two
columns says anything about the label, so no method that measures such tables alone can learn it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import pandas as pd
from scipy import special, stats

from dpsynth.checks import check_choice, check_count
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

__all__ = ["SIMULATED", "bayes_accuracy", "draw", "posterior", "simulated_schema"]

TARGET, YES, NO = "y", "1", "0"
# Share of labels (and of other derived bits) that are flipped.
FLIPPED = 0.1
# Rows of `dpsynth.datasets.load`, and what such a table declares.
ROWS = 30_000

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Simulated:
    """A law of rows.

    Attributes:
        columns: Public facts of all columns but the label.
        features: Draws them: number of rows and randomness to one array a column, categories as
            level numbers.
        posterior: P(label = 1 | row), exact (rows,).
    """

    columns: tuple[Column, ...]
    features: Callable[[int, np.random.Generator], Columns]
    posterior: Callable[[Columns], np.ndarray]


def simulated_schema(name: str, rows: int = ROWS) -> Schema:
    """Declared public schema of a simulated table."""
    check_choice("dataset", name, SIMULATED)
    label = Column(TARGET, "categorical", (NO, YES), source="definition")
    return Schema((*SIMULATED[name].columns, label), target=TARGET, expected_rows=rows)


def draw(name: str, rows: int, rng: np.random.Generator) -> Table:
    """Independent rows of the simulated law `name`.

    Args:
        name: `parity`, `scm` or `mixture`.
        rows: How many.
        rng: Randomness.

    Raises:
        UsageError: On another name, or no rows.
    """
    check_count("rows", rows)
    schema = simulated_schema(name, rows)
    values = SIMULATED[name].features(rows, rng)
    label = rng.random(rows) < SIMULATED[name].posterior(values)
    return Table(schema, _frame({**values, TARGET: label.astype(int)}, schema))


def posterior(table: Table, name: str) -> np.ndarray:
    """P(label = 1 | row) of every row under the law `name` (rows,): no classifier beats it."""
    check_choice("dataset", name, SIMULATED)
    values = {
        column.name: table.frame[column.name].to_numpy(dtype=float)
        if column.numeric
        else table.frame[column.name].cat.codes.to_numpy()
        for column in SIMULATED[name].columns
    }
    return SIMULATED[name].posterior(values)


def bayes_accuracy(table: Table, name: str) -> float:
    """Accuracy of the best possible classifier, expected over labels of these very rows."""
    yes = posterior(table, name)
    return float(np.maximum(yes, 1 - yes).mean())


def _frame(values: Columns, schema: Schema) -> pd.DataFrame:
    columns = {}
    for column in schema.columns:
        held = values[column.name]
        if column.kind == "integer":
            columns[column.name] = pd.Series(held).astype("Int64")
        elif column.numeric:
            columns[column.name] = pd.Series(held, dtype=float)
        else:
            columns[column.name] = pd.Series(
                pd.Categorical.from_codes(held, pd.Index(column.levels), ordered=column.ordered)
            )
    return pd.DataFrame(columns)


# -- parity --------------------------------------------------------------------------------------

BITS, WIDE = 6, 2


def _parity_columns() -> tuple[Column, ...]:
    bits = [Column(f"x{i}", "categorical", ("0", "1"), source="definition") for i in range(BITS)]
    wide = [
        Column(f"u{i}", "categorical", tuple("0123"), ordered=True, source="definition")
        for i in range(WIDE)
    ]
    # Makes rows distinct: a split takes equal rows for one.
    noise = Column("noise", "decimal", lower=-4.0, upper=4.0, source="definition")
    return (*bits, *wide, noise)


def _parity_features(rows: int, rng: np.random.Generator) -> Columns:
    """Fair bits x0…x4 and fair levels; x5 is x3 ⊕ x4 ⊕ [u0 ≥ 2], flipped now and then."""
    values = {f"x{i}": rng.integers(2, size=rows) for i in range(BITS)}
    values |= {f"u{i}": rng.integers(4, size=rows) for i in range(WIDE)}
    odd = values["x3"] ^ values["x4"] ^ (values["u0"] >= 2)
    values["x5"] = odd ^ (rng.random(rows) < FLIPPED)
    return {**values, "noise": rng.standard_normal(rows).clip(-4, 4)}


def _parity_posterior(values: Columns) -> np.ndarray:
    """The label is x0 ⊕ x1 ⊕ x2, flipped now and then."""
    odd = (values["x0"] + values["x1"] + values["x2"]) % 2 == 1
    return np.where(odd, 1 - FLIPPED, FLIPPED)


# -- mixture -------------------------------------------------------------------------------------

SIDE, AXES, SPREAD = 3, 3, 0.35


def _mixture_columns() -> tuple[Column, ...]:
    names = [f"z{i}" for i in range(AXES)] + ["noise"]
    return tuple(
        Column(name, "decimal", lower=-4.0, upper=4.0, source="definition") for name in names
    )


def _mixture_features(rows: int, rng: np.random.Generator) -> Columns:
    """Gaussians on a grid of SIDE³ centres 2 apart, equally heavy on even and odd centres."""
    centres = np.stack(np.unravel_index(np.arange(SIDE**AXES), (SIDE,) * AXES), axis=1)
    weight = _weights()
    chosen = centres[rng.choice(len(centres), rows, p=weight)]
    points = 2.0 * (chosen - (SIDE - 1) / 2) + SPREAD * rng.standard_normal((rows, AXES))
    values = {f"z{i}": points[:, i].clip(-4, 4) for i in range(AXES)}
    return {**values, "noise": rng.standard_normal(rows).clip(-4, 4)}


def _weights() -> np.ndarray:
    """Mass of each centre: a product over axes, so that the parity of a centre is independent of
    any two of its coordinates: a middle one has mass 1/2."""
    axis = np.array([0.25, 0.5, 0.25])
    return np.einsum("i,j,k->ijk", axis, axis, axis).ravel()


def _mixture_posterior(values: Columns) -> np.ndarray:
    """The label is the parity of the row's centre; it is known up to the overlap of Gaussians."""
    places = 2.0 * (np.arange(SIDE) - (SIDE - 1) / 2)
    sign = np.ones(len(values["z0"]))
    for i in range(AXES):
        z = values[f"z{i}"][:, None]
        logits = stats.norm.logpdf(z, places, SPREAD) + np.log([0.25, 0.5, 0.25])
        share = special.softmax(logits, axis=1)
        # E[(−1)^coordinate]: coordinates are independent given the row.
        sign = sign * (share * [1, -1, 1]).sum(1)
    return (1 - sign) / 2


# -- structural causal model -----------------------------------------------------------------------


def _scm_columns() -> tuple[Column, ...]:
    def number(name: str, lower: float, upper: float, kind: str = "decimal") -> Column:
        return Column(name, kind, lower=lower, upper=upper, source="definition")

    return (
        Column("region", "categorical", tuple("abcde"), source="definition"),
        Column("sector", "categorical", ("farm", "works", "office"), source="definition"),
        number("age", 18, 80, "integer"),
        number("skill", -5, 5),
        number("wage", 0, 200),
        number("debt", 0, 400),
        Column("owner", "categorical", ("no", "yes"), source="definition"),
    )


def _scm_features(rows: int, rng: np.random.Generator) -> Columns:
    """region → sector → skill ← age; wage ← sector, skill, age; debt is 0 for many; owner last."""
    region = rng.choice(5, rows, p=[0.35, 0.25, 0.2, 0.12, 0.08])
    lean = np.array([[3, 1, 0], [0, 2, 1], [0, 1, 3], [1, 1, 1], [2, 2, 0]]) / 1.5
    sector = (lean[region] + rng.gumbel(size=(rows, 3))).argmax(1)
    age = np.clip(np.round(18 + 62 * rng.beta(1.8, 2.6, rows)), 18, 80)
    skill = np.array([-0.8, 0.0, 0.9])[sector] * np.sin(age / 9) + 0.6 * rng.standard_normal(rows)
    wage = np.exp(2.6 + 0.4 * sector + 0.35 * skill + 0.3 * rng.standard_normal(rows))
    borrows = rng.random(rows) < special.expit((wage - 25) / 8 * np.cos(age / 12))
    debt = np.where(borrows, wage * rng.gamma(2.0, 0.9, rows), 0.0)
    owner = rng.random(rows) < special.expit((age - 45) / 8 + (debt > 30) - 0.5)
    return {
        "region": region,
        "sector": sector,
        "age": age,
        "skill": skill.clip(-5, 5),
        "wage": wage.clip(0, 200),
        "debt": debt.clip(0, 400),
        "owner": owner.astype(int),
    }


def _scm_posterior(values: Columns) -> np.ndarray:
    """Owners default on debt above their wage, others on skill against sector; age turns both."""
    strain = np.log1p(values["debt"]) - np.log1p(values["wage"])
    match = values["skill"] * (values["sector"] - 1.0)
    turn = np.where(values["age"] > 45, 1.0, -1.0)
    return special.expit(turn * np.where(values["owner"] == 1, 1.5 * strain, 2.5 * match) - 0.3)


SIMULATED: Mapping[str, Simulated] = MappingProxyType(
    {
        "parity": Simulated(_parity_columns(), _parity_features, _parity_posterior),
        "mixture": Simulated(_mixture_columns(), _mixture_features, _mixture_posterior),
        "scm": Simulated(_scm_columns(), _scm_features, _scm_posterior),
    }
)
