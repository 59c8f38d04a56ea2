"""The Python door: tables in any shape in, the same run and report out."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tiny import OPTIONS, ROWS, SCHEMA, frame, table

import dpsynth
from dpsynth.api import evaluate, fit
from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema
from dpsynth.training.planner import SHARES

# Chosen tables take seconds a run; that they reach a run is for the tests of training.
SMALL = {**OPTIONS["vae"], "components": 0}
SETTINGS = {"model": "vae", "options": SMALL, "batch": 32, "steps": 5, "seed": 0}


class Foreign:
    """A table of another library, known by its `to_pandas` alone."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def to_pandas(self) -> pd.DataFrame:
        return self.rows.copy()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    frame().to_csv(tmp_path / "rows.csv", index=False)
    frame().to_parquet(tmp_path / "rows.parquet", index=False)
    frame(150, 1).to_csv(tmp_path / "holdout.csv", index=False)
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    return tmp_path


def shapes(files: Path) -> dict[str, Any]:
    """The same rows in every shape that is taken."""
    return {
        "pandas": frame(),
        "columns in another order": frame()[SCHEMA.names[::-1]],
        "another index": frame().set_index(np.arange(ROWS) + 7),
        "CSV": files / "rows.csv",
        "name of a CSV": str(files / "rows.csv"),
        "Parquet": files / "rows.parquet",
        "to_pandas": Foreign(frame()),
        "Arrow": pa.Table.from_pandas(frame(), preserve_index=False),
        "table": table(),
    }


# Fit, save, load, sample


def test_one_run_whatever_the_shape_of_the_rows(files: Path) -> None:
    expected = fit(frame(), schema=SCHEMA, epsilon=math.inf, **SETTINGS).sample(50, rng=0)
    for name, rows in shapes(files).items():
        for schema in (SCHEMA, files / "schema.json", str(files / "schema.json")):
            run = fit(rows, schema=schema, epsilon=math.inf, **SETTINGS)
            pd.testing.assert_frame_equal(run.sample(50, rng=0), expected, obj=name)
    run = fit(table(), epsilon=math.inf, **SETTINGS)  # which knows its schema
    pd.testing.assert_frame_equal(run.sample(50, rng=0), expected)


def test_fit_save_load_sample(tmp_path: Path) -> None:
    run = dpsynth.fit(frame(), schema=SCHEMA, epsilon=1.0, delta=1e-5, **SETTINGS)
    assert run.epsilon <= 1.0 and run.ledger.delta == 1e-5
    assert run.executed == 5
    run.save(tmp_path / "mine")
    back = dpsynth.load(str(tmp_path / "mine"))
    where = {"rich": "yes"}
    made = back.sample(40, where=where, rng=0)
    assert (made["rich"] == "yes").all()
    pd.testing.assert_frame_equal(made, run.generate(40, where=where, rng=0))


def test_every_family_is_fitted() -> None:
    for model, options in OPTIONS.items():
        run = fit(table(), epsilon=math.inf, model=model, options=options, batch=32, steps=2)
        assert run.recipe.model == model
        assert len(run.sample(10)) == 10


@pytest.mark.parametrize("epsilon", [0, "one", -1.0])
def test_auto_refuses_what_a_family_would(epsilon: Any) -> None:
    with pytest.raises(UsageError, match=f"epsilon={epsilon}"):
        fit(table(), epsilon=epsilon)
    with pytest.raises(UsageError, match="latnet"):
        fit(table(), epsilon=1.0, options={"latnet": 2})


def test_settings_of_the_budget_reach_the_plan() -> None:
    run = fit(table(), epsilon=math.inf, delta=1e-4, model="vae", options=SMALL,
              batch=16, steps=3, clip=2.5, shares={"codec": 0.2})  # fmt: skip
    assert (run.plan.delta, run.plan.batch, run.plan.steps, run.plan.clip) == (1e-4, 16, 3, 2.5)
    planned = SHARES["marginals"]
    assert run.plan.shares["codec"] == 0.2 and run.plan.shares["marginals"] == planned
    assert run.seed is None


def test_the_rows_are_not_touched() -> None:
    rows = frame()
    fit(rows, schema=SCHEMA, epsilon=math.inf, model="independent")
    pd.testing.assert_frame_equal(rows, frame())


def test_levels_of_a_csv_keep_their_leading_zeros(tmp_path: Path) -> None:
    levels = {"a": ("01", "02"), "b": ("x", "y")}
    schema = Schema(tuple(Column(name, "categorical", values) for name, values in levels.items()))
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"a": rng.choice(["01", "02"], 50), "b": rng.choice(["x", "y"], 50)})
    rows.to_csv(tmp_path / "rows.csv", index=False)
    run = fit(tmp_path / "rows.csv", schema=schema, epsilon=math.inf, model="independent")
    assert set(run.sample(50, rng=0)["a"]) == {"01", "02"}
    path = tmp_path / "rows.csv"
    report = evaluate(path, train=path, holdout=path, schema=schema)
    assert report.metrics["tvd1"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": None}, "schema is missing"),
        ({"schema": "nowhere.json"}, "'nowhere.json': no such file"),
        ({"data": "nowhere.csv"}, "'nowhere.csv': no such file"),
        ({"data": np.zeros((3, 4))}, "type ndarray"),
        ({"data": None}, "type NoneType"),
        ({"data": frame().drop(columns="job")}, "'job'"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"epsilon": "one"}, "epsilon=one"),
        ({"delta": 0.1}, "delta=0.1"),
        ({"model": "typo"}, "model=typo"),
        ({"options": {"latnet": 2}}, "latnet"),
        ({"stpes": 5}, "stpes"),
        ({"sigma": 0.1}, "sigma"),
    ],
    ids=str,
)
def test_fit_refuses(changes: dict[str, Any], words: str) -> None:
    settings = {"data": frame(), "schema": SCHEMA, "epsilon": 1.0, **SETTINGS, **changes}
    with pytest.raises(UsageError, match=words):
        fit(settings.pop("data"), **settings)


def test_a_draft_is_refused_at_a_finite_epsilon() -> None:
    draft = Schema.infer(frame(), "rich")
    with pytest.raises(RefusedError, match="provenance"):
        fit(frame(), schema=draft, epsilon=8.0, **SETTINGS)
    fit(frame(), schema=draft, epsilon=math.inf, **SETTINGS)


# Evaluate


def test_one_report_whatever_the_shape_of_the_rows(files: Path) -> None:
    expected = evaluate(table(100, 2), train=table(), holdout=table(150, 1), max_rows=60)
    assert expected.rows == {"synthetic": 100, "train": ROWS, "holdout": 150}
    assert "tstr_gbt_auc" in expected.metrics, "the schema's target"
    others = [
        ({"train": files / "rows.csv", "holdout": str(files / "holdout.csv")}, SCHEMA),
        ({"train": Foreign(frame()), "holdout": frame(150, 1)}, files / "schema.json"),
        ({"train": table(), "holdout": frame(150, 1)}, None),
    ]
    for parts, schema in others:
        report = evaluate(frame(100, 2), schema=schema, max_rows=60, **parts)
        assert report.metrics == expected.metrics and report.floors == expected.floors
    assert evaluate(
        table(100, 2), train=table(), holdout=table(150, 1), max_rows=60, seed=1
    ).metrics != (expected.metrics)


def test_without_a_schema_one_is_drafted_from_all_three() -> None:
    """A level or value that only the synthetic table has must count, not raise."""
    made = frame(100, 2)
    made.loc[3, "job"], made.loc[4, "age"] = "pilot", 120
    parts = {"train": frame(), "holdout": frame(150, 1), "max_rows": 60}
    report = evaluate(made, **parts, target="rich")
    assert "tstr_gbt_auc" in report.metrics
    assert "tstr_gbt_auc" not in evaluate(made, **parts).metrics, "no target, no task"
    with pytest.raises(UsageError, match="target='colour'"):
        evaluate(made, **parts, target="colour")


@pytest.mark.parametrize("part", ["synthetic", "train", "holdout"])
def test_evaluate_refuses_what_is_no_table(part: str) -> None:
    tables = {"synthetic": frame(50, 2), "train": frame(50), "holdout": frame(50, 1), part: 5}
    with pytest.raises(UsageError, match="type int"):
        evaluate(tables.pop("synthetic"), **tables)


def test_evaluate_takes_what_a_run_samples() -> None:
    run = fit(table(), epsilon=math.inf, model="naive_bayes", seed=0)
    parts = {"train": table(), "holdout": table(150, 1), "max_rows": 60}
    report = evaluate(run.sample(300, rng=0), **parts)
    assert 0 <= report.metrics["tvd1"] < 0.2
    assert report == evaluate(run.sample_table(300, rng=0), **parts)


# Names


def test_every_public_name_resolves() -> None:
    for name in dpsynth.__all__:
        assert getattr(dpsynth, name) is not None
    assert dpsynth.fit is fit and dpsynth.evaluate is evaluate
    assert dpsynth.Table is Table
    assert dpsynth.datasets.names() == ["adult", "mixture", "parity", "scm"]
    assert issubclass(dpsynth.RefusedError, dpsynth.UsageError)


def test_homes_are_where_names_are_made() -> None:
    for name, home in dpsynth._HOMES.items():
        made = getattr(importlib.import_module(f"dpsynth.{home}"), name)
        assert made.__module__.startswith("dpsynth.")
        assert made is getattr(dpsynth, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = dpsynth.colour
    assert not hasattr(dpsynth, "colour")
    with pytest.raises(ImportError):
        importlib.import_module("dpsynth.colour")


def test_importing_is_quick() -> None:
    """Names are loaded on first use: neither torch nor Hydra comes with the package itself."""
    code = "import sys, dpsynth; sys.exit(bool({'torch', 'hydra', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_public_schema_is_cut_to_the_columns_of_a_table() -> None:
    """As the README has it."""
    public = dpsynth.datasets.schema("adult").select(["age", "sex", "income"])
    rows = dpsynth.datasets.load("adult").frame[["age", "sex", "income"]].head(300)
    declared = replace(public, expected_rows=300)
    run = fit(rows, schema=declared, epsilon=1.0, model="naive_bayes", seed=0)
    assert list(run.sample(5, rng=0)) == ["age", "sex", "income"]
