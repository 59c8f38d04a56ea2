"""The report: what it holds, its round trip, its refusals."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation import Report, evaluate, floors
from dpsynth.evaluation.report import DISTANCES, NO_NUMBERS, NOT_PRIVATE
from dpsynth.evaluation.utility import CLASSIFICATION, REGRESSION
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        Column("x", "decimal", lower=-10, upper=10),
        Column("c", "categorical", ("a", "b"), nullable=True),
        Column("label", "categorical", ("no", "yes")),
    ),
    target="label",
)


def make(rows: int, seed: int, schema: Schema = SCHEMA) -> Table:
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 2, rows).clip(-10, 10)
    c = np.where(rng.random(rows) < 0.1, None, rng.choice(["a", "b"], rows))
    label = np.where(x + rng.normal(0, 1, rows) > 0, "yes", "no")
    frame = pd.DataFrame({"x": x, "c": c, "label": label})
    return Table.from_frame(frame[schema.names], schema)


TRAIN, HOLDOUT, SYNTHETIC = make(200, 0), make(120, 1), make(200, 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def report() -> Report:
    return evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng())


def test_a_report_holds_every_metric_and_its_floor(report: Report) -> None:
    expected = {*DISTANCES, *(f"tstr_{name}" for name in CLASSIFICATION)}
    assert set(report.metrics) == set(report.floors) == expected
    assert report.rows == {"synthetic": 200, "train": 200, "holdout": 120}
    assert set(report.columns) == {"x", "c", "label"}
    assert set(report.per_class) == {"gbt", "logistic"}
    assert NOT_PRIVATE in report.notes
    with pytest.raises(FrozenInstanceError):
        report.metrics = {}  # type: ignore[misc]


def test_same_seed_same_report_and_given_floors_change_nothing_else(report: Report) -> None:
    assert evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng()) == report
    shared = floors(TRAIN, HOLDOUT, rng=rng(7))
    given = evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng(), floors=shared)
    assert given.metrics == report.metrics
    assert given.floors == shared
    unseeded = [name for name in DISTANCES if name != "c2st_auc"]
    assert [shared[name] for name in unseeded] == [report.floors[name] for name in unseeded]


def test_the_device_changes_no_figure_and_must_be_there(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng(), device="auto")
    assert found == report
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU"):
        evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng(), device="cuda")
    with pytest.raises(UsageError, match="device=gpu: unknown"):
        floors(TRAIN, HOLDOUT, rng=rng(), device="gpu")


def test_the_floor_is_the_score_of_real_rows() -> None:
    found = floors(TRAIN, HOLDOUT, rng=rng())
    as_distance = evaluate(HOLDOUT, train=TRAIN, holdout=HOLDOUT, rng=rng(), floors=found)
    as_learned = evaluate(TRAIN, train=TRAIN, holdout=HOLDOUT, rng=rng(), floors=found)
    for name in DISTANCES[:-1]:
        assert as_distance.metrics[name] == found[name]
        assert as_learned.metrics[name] == 0
    for name in found:
        if name.startswith("tstr_"):
            assert as_learned.metrics[name] == pytest.approx(found[name], abs=1e-9)


def test_distances_are_to_train_but_the_judges_use_the_holdout() -> None:
    moved = HOLDOUT.frame.assign(x=np.clip(HOLDOUT.frame["x"] + 6, -10, 10))
    drifted = Table(SCHEMA, moved)
    found = evaluate(SYNTHETIC, train=TRAIN, holdout=drifted, rng=rng())
    assert found.metrics["tvd1"] < 0.2 < found.floors["tvd1"]
    assert found.metrics["c2st_auc"] > 0.9
    assert found.metrics["tstr_gbt_accuracy"] < 0.7


def test_without_a_target_there_is_no_downstream_task() -> None:
    tables = [table.select(["x", "c"]) for table in (SYNTHETIC, TRAIN, HOLDOUT)]
    found = evaluate(tables[0], train=tables[1], holdout=tables[2], rng=rng())
    assert set(found.metrics) == set(DISTANCES)
    assert found.per_class == {}
    named = evaluate(tables[0], train=tables[1], holdout=tables[2], target="c", rng=rng())
    assert "tstr_gbt_auc" in named.metrics


def test_a_numeric_target_is_regressed() -> None:
    found = evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, target="x", rng=rng())
    assert set(found.metrics) == {*DISTANCES, *(f"tstr_{name}" for name in REGRESSION)}


def test_notes_say_what_was_capped_or_absent() -> None:
    tables = [table.select(["c", "label"]) for table in (SYNTHETIC, TRAIN, HOLDOUT)]
    found = evaluate(tables[0], train=tables[1], holdout=tables[2], rng=rng(), max_rows=50)
    assert NO_NUMBERS in found.notes
    assert any("50 rows" in note for note in found.notes)


def test_json_round_trip(report: Report) -> None:
    assert Report.from_json(report.to_json()) == report


def test_evaluate_refuses_tables_that_do_not_belong_together() -> None:
    with pytest.raises(UsageError, match="columns"):
        evaluate(SYNTHETIC.select(["x", "label"]), train=TRAIN, holdout=HOLDOUT, rng=rng())
    levels = replace(
        SCHEMA, columns=(*SCHEMA.columns[:2], replace(SCHEMA["label"], levels=("no", "yes", "?")))
    )
    with pytest.raises(UsageError, match="'label': declared otherwise"):
        evaluate(make(50, 3, levels), train=TRAIN, holdout=HOLDOUT, rng=rng())
    with pytest.raises(UsageError, match="rows=1"):
        evaluate(SYNTHETIC.take(np.arange(1)), train=TRAIN, holdout=HOLDOUT, rng=rng())
    with pytest.raises(UsageError, match="rows=1"):
        floors(TRAIN, HOLDOUT.take(np.arange(1)), rng=rng())
    with pytest.raises(UsageError, match="max_rows=1"):
        floors(TRAIN, HOLDOUT, rng=rng(), max_rows=1)
    with pytest.raises(UsageError, match="floors: 'tstr_gbt_accuracy' is missing"):
        short = {name: 0.0 for name in DISTANCES}
        evaluate(SYNTHETIC, train=TRAIN, holdout=HOLDOUT, rng=rng(), floors=short)


def changed(report: Report, part: str, key: str, value: object) -> dict[str, object]:
    body = json.loads(report.to_json())
    body[part] = {**body[part], key: value}
    return body


def test_from_json_is_strict(report: Report) -> None:
    body = json.loads(report.to_json())
    lacking = {k: v for k, v in body["metrics"].items() if k != "tvd2"}
    cases = [
        ("not JSON", "{"),
        ("JSON object", "[]"),
        ("format=2", json.dumps({**body, "format": 2})),
        ("unknown key 'extra'", json.dumps({**body, "extra": 1})),
        ("report: 'rows' is missing", json.dumps({k: v for k, v in body.items() if k != "rows"})),
        ("metrics: 'tvd2' is missing", json.dumps({**body, "metrics": lacking})),
        ("floors: 'tvd2' is missing", json.dumps({**body, "floors": lacking})),
        ("metrics: unknown key 'luck'", json.dumps(changed(report, "metrics", "luck", 1.0))),
        ("metrics must map", json.dumps({**body, "metrics": [1]})),
        ("notes must be a list", json.dumps({**body, "notes": "text"})),
        ("notes must be texts", json.dumps({**body, "notes": [1]})),
        ("rows: 'holdout' is missing", json.dumps({**body, "rows": {"synthetic": 1, "train": 1}})),
        ("must be one number", json.dumps(changed(report, "metrics", "tvd1", [0.1]))),
    ]
    for value in (float("nan"), float("inf"), "0.1", None, True):
        cases.append(
            ("must be a finite number", json.dumps(changed(report, "metrics", "tvd1", value)))
        )
    nested = {"levels": {"no": {"f1": float("nan")}}, "calibration": [{"rows": float("inf")}]}
    cases.append(("finite", json.dumps(changed(report, "per_class", "gbt", nested))))
    for match, text in cases:
        with pytest.raises(UsageError, match=match):
            Report.from_json(text)
