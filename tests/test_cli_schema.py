"""`dpsynth schema`: drafts, checks and measures; the schema it measures opens a run's account."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dpsynth.cli import main
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

Outcome = tuple[int, str, str]
DRAFT = Schema(
    (
        Column("city", "categorical", open=True),
        Column("age", "integer", open=True, source="the form"),
        Column("sex", "categorical", ("f", "m")),
    ),
    target="sex",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 300 people, some with two, and a draft of their schema."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "city": rng.choice(["Oslo", "Rome"], 400),
            "age": rng.integers(18, 60, 400),
            "sex": rng.choice(["f", "m"], 400),
        }
    )
    rows.loc[0, "city"] = "Atlantis"
    rows.to_csv(folder / "rows.csv", index=False)
    rows.assign(who=np.arange(400) % 300).to_csv(folder / "owned.csv", index=False)
    (folder / "draft.json").write_text(DRAFT.to_json())
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["schema", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return call


def test_a_measured_schema_is_written_and_its_cost_is_told(inputs, tmp_path, command):
    out = tmp_path / "schema.json"
    arguments = [inputs / "rows.csv", inputs / "draft.json", "--epsilon", 2, "--out", out]
    code, said, err = command("measure", *arguments)
    assert (code, err) == (0, "")
    (line,) = said.splitlines()
    assert line.startswith(f"{out}: 3 facts measured; all it holds costs ε=")
    assert 1.9 < float(line.split("ε=")[1].split()[0]) <= 2
    assert "at δ=1e-06 for one record" in line
    known = Schema.load(out)
    known.check_public()
    assert known["city"].levels == ("Oslo", "Rome", "other")
    assert known["age"].provenance == "measured"
    assert (known["age"].source, known["sex"]) == ("the form", DRAFT["sex"])
    assert {event["noise"] for event in known.spent} == {"aes256-ctr:system"}
    assert len(Table.read(inputs / "rows.csv", known, strict=False)) == 400
    code, said, err = command("check", out, inputs / "rows.csv")
    assert (code, said, err) == (0, f"400 rows keep to {out}\n", "")


def test_without_a_file_the_schema_goes_to_standard_output(inputs, command):
    arguments = [inputs / "rows.csv", inputs / "draft.json", "--epsilon", 2, "--seed", 7]
    code, said, err = command("measure", *arguments)
    assert code == 0
    known = Schema.from_json(said)
    assert {event["noise"] for event in known.spent} == {"philox:seed"}
    assert "fixed seed: whoever knows it can undo the noise" in err
    again = Schema.from_json(command("measure", *arguments)[1])
    assert again.columns == known.columns
    assert again.expected_rows == known.expected_rows


def test_a_unit_is_measured_as_one(inputs, tmp_path, command):
    out = tmp_path / "schema.json"
    code, said, err = command(
        "measure", inputs / "owned.csv", inputs / "draft.json", "--epsilon", 4, "--delta", 1e-5,
        "--unit", "who", "--contributions", 2, "--out", out,
    )  # fmt: skip
    assert code == 0, err
    assert "at δ=1e-05 for 2 rows of one who" in said
    known = Schema.load(out)
    assert {(event["unit"], event["contributions"]) for event in known.spent} == {("who", 2)}
    assert command("check", out, inputs / "owned.csv", "--unit", "who")[0] == 0


def test_check_names_what_a_private_run_would_refuse(inputs, tmp_path, command):
    code, said, _ = command("infer", inputs / "rows.csv", "--out", tmp_path / "drafted.json")
    assert code == 0
    assert "every fact was read off the rows" in said
    body = json.loads((tmp_path / "drafted.json").read_text())
    assert body["expected_rows"] is None
    assert {column["provenance"] for column in body["columns"]} == {"data"}
    code, said, _ = command("check", tmp_path / "drafted.json", inputs / "rows.csv")
    assert code == 0
    lines = said.splitlines()
    assert lines[0].startswith("400 rows keep to ")
    assert [line.split("'")[1] for line in lines[1:]] == ["city", "age", "sex"]
    assert all(line.startswith("a run with finite ε refuses: ") for line in lines[1:])


def test_what_cannot_be_measured_is_one_line_and_leaves_nothing(inputs, tmp_path, command):
    drafted = tmp_path / "drafted.json"
    data = replace(DRAFT, columns=(*DRAFT.columns[:2], replace(DRAFT["sex"], provenance="data")))
    drafted.write_text(data.to_json())
    there = tmp_path / "there.json"
    there.write_text("kept")
    rows, draft, cost = inputs / "rows.csv", inputs / "draft.json", ("--epsilon", "1")
    nowhere = tmp_path / "no" / "where.json"
    cases = [
        ((rows, draft), "required: --epsilon", 2),
        ((rows, draft, "--epsilon", "much"), "invalid float value: 'much'", 2),
        ((rows, draft, "--epsilon", "inf"), "epsilon=inf", 2),
        ((rows, draft, *cost, "--delta", "0"), "delta=0", 2),
        ((rows, draft, *cost, "--contributions", "2"), "contributions=2: a record is one row", 2),
        ((rows, draft, *cost, "--unit", "who"), "unit 'who': no such column", 2),
        ((rows, draft, *cost, "--seed", "-1"), "seed=-1", 2),
        ((rows, draft, *cost, "--out", there), "exists, and measuring again spends again", 2),
        ((rows, draft, *cost, "--out", nowhere), "has no folder", 2),
        ((rows, drafted, *cost), "column 'sex': was read off the data", 3),
        ((rows, tmp_path / "none.json", *cost), "no such file", 2),
        ((rows, draft, "--epsilon", "0.0001"), "stands out from the noise", 2),
    ]
    before = sorted(tmp_path.iterdir())
    for arguments, words, code in cases:
        found, said, err = command("measure", *arguments)
        (line,) = err.splitlines()
        assert (found, said) == (code, "")
        assert line.startswith("dpsynth: ")
        assert words in line
        assert sorted(tmp_path.iterdir()) == before
    assert there.read_text() == "kept"
    code, _, err = command("check", draft, rows)
    assert code == 2
    assert "column 'city': is open; measure it with `dpsynth schema measure`" in err
