"""The Python door: `fit`, `load`, `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from dpsynth import evaluation
from dpsynth.checks import UsageError
from dpsynth.data import Table, read_frame
from dpsynth.evaluation import Report
from dpsynth.randomness import fresh_key, stream
from dpsynth.schema import Schema
from dpsynth.training.callbacks import default_callbacks
from dpsynth.training.fleet import train_fleet
from dpsynth.training.planner import AUTO, family_of
from dpsynth.training.recipe import Recipe, Seat
from dpsynth.training.run import Run

__all__ = ["evaluate", "fit", "load"]


def fit(
    data: pd.DataFrame | Table | str | Path,
    *,
    schema: Schema | str | Path | None = None,
    epsilon: float,
    delta: float = 1e-5,
    model: str = AUTO,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
    progress: bool = True,
    **privacy: Any,
) -> Run:
    """Train one generator.

    Args:
        data: Rows: a pandas frame, anything with `to_pandas` (polars, Arrow), a `Table`, or the
            path of a CSV or Parquet file.
        schema: Public facts, or the path of a schema file; needed unless `data` is a `Table`.
        epsilon: Target ε; `math.inf` for none.
        delta: Target δ, below 1 / rows.
        model: A family: `autoregressive`, `vae`, `gan`, `diffusion`, `mixture`, `naive_bayes`, …;
            `auto` for the one that suits ε, the schema and its number of rows.
        seed: Fixed seed; leave it out for anything that is to be released.
        options: Settings of the family.
        progress: Whether to show steps, ε spent and time left on standard error.
        **privacy: Settings of `PrivacyPlan`: batch, steps, clip, shares; `unit` and
            `contributions` where a person has several rows; `secure` for noise from the operating
            system's entropy through AES-256.
    """
    unit, given = privacy.get("unit", "record"), {"delta": delta, **privacy}
    chosen, table = {}, _table(data, schema, None if unit == "record" else unit)
    if model == AUTO:
        model, chosen = family_of(table.schema, epsilon, given, {})
    recipe = Recipe(model, {**chosen, **(options or {})}, given)
    callbacks = default_callbacks(model, None, Console(stderr=True)) if progress else ()
    if unit != "record":
        key = fresh_key() if seed is None else seed
        table = table.bounded(privacy.get("contributions", 1), stream(key, "unit"))
    seat = Seat(table, epsilon, seed)
    (trained,) = train_fleet(recipe, [seat], callbacks=callbacks)
    return Run.of(trained, data="in memory")


def load(folder: str | Path) -> Run:
    """Read a run folder; executes nothing from it."""
    return Run.load(folder)


def evaluate(
    synthetic: Any,
    *,
    train: Any,
    holdout: Any,
    schema: Schema | str | Path | None = None,
    target: str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    device: str = "auto",
) -> Report:
    """Judge a synthetic table against the rows it was made from and rows it was not made from.

    Tables are given as in `fit`; without a schema one is drafted from all three. `device` is where
    they are compared; the figures are the same.
    """
    parts = (train, holdout, synthetic)
    if schema is None:
        schema = next((part.schema for part in parts if isinstance(part, Table)), None)
    if schema is None:
        schema = Schema.infer(pd.concat(map(_frame, parts), ignore_index=True), target)
    real, held, made = (_table(part, schema) for part in parts)
    rng = np.random.default_rng(seed)
    return evaluation.evaluate(
        made,
        train=real,
        holdout=held,
        target=target,
        rng=rng,
        max_rows=max_rows,
        device=device,
    )


def _frame(data: Any) -> pd.DataFrame:
    if isinstance(data, Table):
        return data.frame
    if isinstance(data, (str, Path)):
        return read_frame(data)
    if isinstance(data, pd.DataFrame):
        return data
    if not hasattr(data, "to_pandas"):
        raise UsageError(f"table of type {type(data).__name__}: give a pandas frame or a path")
    return data.to_pandas()


def _table(data: Any, schema: Schema | str | Path | None, unit: str | None = None) -> Table:
    if isinstance(data, Table) and schema is None:
        return data
    if schema is None:
        raise UsageError("schema is missing; declare one (draft it with Schema.infer)")
    known = schema if isinstance(schema, Schema) else Schema.load(schema)
    strict = not known.measured  # else rows lie outside by rule, not by mistake
    if isinstance(data, (str, Path)):  # leaves the text of categories as it stands
        return Table.read(data, known, strict=strict, unit=unit)
    return Table.from_frame(_frame(data), known, strict=strict, unit=unit)
