"""The classifier two-sample test: known answers, laws, refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation.detection import c2st
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("x", "decimal", lower=-20, upper=20, nullable=True),
        Column("c", "categorical", ("a", "b"), nullable=True),
    )
)


def make(rows: int, seed: int, shift: float = 0.0, missing: float = 0.1) -> Table:
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(rows) < missing, np.nan, rng.normal(shift, 1, rows))
    c = np.where(rng.random(rows) < 0.1, None, np.where(rng.random(rows) < 0.5, "a", "b"))
    return Table.from_frame(pd.DataFrame({"x": x, "c": c}), SCHEMA, strict=False)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_same_distribution_cannot_be_told_apart() -> None:
    # Standard deviation of an area over 2 × 1500 rows without signal: .01.
    assert c2st(make(1500, 0), make(1500, 1), rng=rng()) == pytest.approx(0.5, abs=0.05)


def test_shifted_distribution_is_told_apart_as_well_as_theory_allows() -> None:
    area = c2st(make(1500, 0, missing=0), make(1500, 1, shift=2.5, missing=0), rng=rng())
    bound = 0.9615  # Φ(2.5 / √2), the area of the likelihood ratio
    assert 0.9 < area < bound + 0.02


def test_missingness_alone_gives_a_table_away() -> None:
    assert c2st(make(500, 0, missing=0.1), make(500, 1, missing=0.9), rng=rng()) > 0.85


def test_dependence_alone_gives_a_table_away() -> None:
    real = make(1500, 0, missing=0)
    values = make(1500, 1, missing=0).frame
    tied = values.assign(c=np.where(values["x"] > 0, "a", "b")).where(values["c"].notna())
    assert c2st(real, Table.from_frame(tied, SCHEMA), rng=rng()) > 0.65


def test_same_generator_state_gives_the_same_area() -> None:
    real, other = make(400, 0), make(300, 1, shift=0.5)
    first, again = (c2st(real, other, rng=rng(5), max_rows=200) for _ in range(2))
    assert first == again
    assert first != c2st(real, other, rng=rng(6), max_rows=200)


def test_sizes_are_made_equal_so_that_the_rates_do_not_matter() -> None:
    assert c2st(make(3000, 0), make(600, 1), rng=rng()) == pytest.approx(0.5, abs=0.07)


def test_more_folds_are_allowed() -> None:
    assert c2st(make(400, 0), make(400, 1, shift=3), rng=rng(), folds=5) > 0.9


def test_a_column_without_any_value_is_no_obstacle() -> None:
    real, other = make(300, 0, missing=1), make(300, 1, missing=1)
    assert c2st(real, other, rng=rng()) == pytest.approx(0.5, abs=0.1)


def test_refusals() -> None:
    real = make(50, 0)
    with pytest.raises(UsageError, match="rows=1"):
        c2st(real, real.take(np.arange(1)), rng=rng())
    with pytest.raises(UsageError, match="columns"):
        c2st(real, real.select(["x"]), rng=rng())
    with pytest.raises(UsageError, match="folds=1"):
        c2st(real, real, rng=rng(), folds=1)
    with pytest.raises(UsageError, match="max_rows=3"):
        c2st(real, real, rng=rng(), max_rows=3, folds=4)
