"""A table of four columns and recipes that train in a blink, for tests of training and above."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from dpsynth.data import Table
from dpsynth.schema import Column, Schema
from dpsynth.training.recipe import Recipe, Seat

__all__ = ["HERE", "OPTIONS", "ROWS", "SCHEMA", "frame", "recipe", "seat", "table"]

ROWS = 400
SCHEMA = Schema(
    (
        Column("age", "integer", lower=17, upper=90),
        Column("job", "categorical", ("clerk", "cook", "nurse"), nullable=True),
        Column("pay", "decimal", lower=0, upper=100, nullable=True),
        Column("rich", "categorical", ("no", "yes")),
    ),
    target="rich",
    expected_rows=ROWS,
)
# Few components, so that a fit takes a blink too; and a start without any, which takes none.
MIX: dict[str, Any] = {"components": 6}
PLAIN: dict[str, Any] = {"components": 0, "reconcile": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "vae": {"hidden": [8, 8], "latent": 2, "block": 2, **PLAIN},
    "gan": {"hidden": [8, 8], "latent": 2, "public_batch": 16, "block": 2, **PLAIN},
    "diffusion": {"hidden": [8, 8], "draws": 2, "block": 2, "components": 0},
    "autoregressive": {"block": 2, **MIX},
    "independent": {},
    "naive_bayes": {},
    "mixture": MIX,
    "tree": {},
    "copula": {},
}
# Families that train on what is installed; `tests/test_baselines.py` has those that need more.
HERE = list(OPTIONS)


def frame(rows: int = ROWS, seed: int = 0) -> pd.DataFrame:
    """Rows in which pay and job follow age, and the label follows pay."""
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 80, rows)
    job = np.array(["clerk", "cook", "nurse"])[(age // 7 + rng.integers(0, 2, rows)) % 3]
    pay = np.round(np.clip(age + rng.normal(0, 10, rows), 0, 100), 2)
    drawn = pd.DataFrame(
        {
            "age": age,
            "job": pd.Series(job, dtype=object),
            "pay": pay,
            "rich": np.where(pay + rng.normal(0, 10, rows) > 55, "yes", "no"),
        }
    )
    drawn.loc[rng.random(rows) < 0.1, "job"] = None
    drawn.loc[rng.random(rows) < 0.1, "pay"] = math.nan
    return drawn


def table(rows: int = ROWS, seed: int = 0, schema: Schema = SCHEMA) -> Table:
    return Table.from_frame(frame(rows, seed), schema)


def recipe(
    model: str = "vae",
    *,
    options: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
    **others: Any,
) -> Recipe:
    # A small δ and a small ε keep calibration quick; 5 steps are no multiple of a block of 2.
    settings = {"batch": 32, "steps": 5, "delta": 1e-5, **(privacy or {})}
    others = {"device": "cpu", **others}
    return Recipe(model, {**OPTIONS[model], **(options or {})}, settings, **others)


def seat(epsilon: float = math.inf, seed: int | None = 0, **schema: Any) -> Seat:
    """A seat at the table, with facts of the schema replaced."""
    rows = table()
    return Seat(Table(replace(rows.schema, **schema), rows.frame), epsilon, seed)
