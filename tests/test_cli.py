"""The command line: what works leaves a run, what does not leaves one line and nothing else."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from inline import Inline
from tiny import SCHEMA, frame

from dpsynth.checks import UsageError
from dpsynth.cli import main
from dpsynth.configuration import CONF
from dpsynth.evaluation import Report
from dpsynth.frontier import sweep
from dpsynth.schema import Schema
from dpsynth.training.run import Run

Outcome = tuple[int, str, str]
Command = Callable[..., Outcome]

# A network of few weights that starts from few components: what is read takes a blink to fit.
NETWORK = [
    "model=vae", "model.options.hidden=[8,8]", "model.options.latent=2",
    "model.options.components=6",
]  # fmt: skip
STEPS = ["privacy.batch=32", "privacy.steps=5"]
JUDGED = ["evaluation.max_rows=60", "audit.max_candidates=40", "audit.draws=1"]
TINY = [*NETWORK, *STEPS, "privacy.epsilon=1", "seed=0", *JUDGED]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a schema of them, and two parts to evaluate against."""
    folder = tmp_path_factory.mktemp("inputs")
    frame().to_csv(folder / "rows.csv", index=False)
    frame(150, 1).to_csv(folder / "holdout.csv", index=False)
    frame(200, 2).to_csv(folder / "other.csv", index=False)
    (folder / "schema.json").write_text(SCHEMA.to_json())
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to stand in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)
    return folder


@pytest.fixture
def command(here: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in that folder: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


@pytest.fixture
def refused(command: Command, here: Path) -> Callable[..., None]:
    """A command that must fail in one line that holds `words`, and leave nothing."""

    def call(*arguments: object, words: str, code: int = 2) -> None:
        found, _, err = command(*arguments)
        assert found == code, err
        (line,) = err.splitlines()
        assert line.startswith("dpsynth: ")
        assert words in line
        assert not list(here.iterdir()), "something was left behind"

    return call


def data(folder: Path, rows: str = "rows.csv", schema: str = "schema.json") -> list[str]:
    return ["data=file", f"data.path={folder / rows}", f"data.schema={folder / schema}"]


# Tables that cannot be worked with


def changed(**columns: Any) -> Callable[[Path], None]:
    return lambda path: frame().assign(**columns).to_csv(path, index=False)


def one(column: str, value: object) -> Callable[[Path], None]:
    """The table with one cell changed."""

    def write(path: Path) -> None:
        rows = frame().astype(object)
        rows.loc[7, column] = value
        rows.to_csv(path, index=False)

    return write


TABLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no rows": (lambda path: frame().iloc[:0].to_csv(path, index=False), "no rows"),
    "no bytes": (lambda path: path.write_bytes(b""), "cannot be read"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe\x00\x01"), "cannot be read"),
    "one row": (lambda path: frame(1).dropna().to_csv(path, index=False), "row"),
    "two rows": (lambda path: frame(2).to_csv(path, index=False), ""),
    "too few rows": (lambda path: frame(30).to_csv(path, index=False), "audit needs"),
    "a column too many": (changed(colour="red"), "'colour'"),
    "a column too few": (
        lambda path: frame().drop(columns="job").to_csv(path, index=False),
        "'job'",
    ),
    "no target column": (
        lambda path: frame().drop(columns="rich").to_csv(path, index=False),
        "'rich'",
    ),
    "a value outside": (one("age", 120), "120"),
    "a fraction": (one("age", 30.5), "'age'"),
    "a word for a number": (one("age", "old"), "'old'"),
    "an unknown level": (one("job", "pilot"), "'pilot'"),
    "a constant": (changed(job="cook"), "'job'"),
    "a constant number": (changed(age=30), "'age'"),
    "no value at all": (changed(pay=math.nan), "'pay'"),
    "a gap that is not declared": (one("age", None), "'age'"),
    "a gap in the target": (one("rich", None), "'rich'"),
    "infinity": (one("pay", math.inf), "'pay'"),
    "one class": (changed(rich="no"), "'rich'"),
}


@pytest.mark.parametrize(("write", "words"), TABLES.values(), ids=TABLES)
def test_a_table_that_cannot_be_used_is_refused(
    write: Callable[[Path], Any], words: str, inputs: Path, tmp_path: Path, refused
) -> None:
    write(tmp_path / "rows.csv")
    arguments = ["data=file", f"data.path={tmp_path / 'rows.csv'}"]
    refused("train", *arguments, f"data.schema={inputs / 'schema.json'}", *TINY, words=words)


def test_a_parquet_file_that_is_none_is_refused(inputs: Path, tmp_path: Path, refused) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no")
    arguments = [f"data.path={tmp_path / 'rows.parquet'}", f"data.schema={inputs / 'schema.json'}"]
    refused("train", "data=file", *arguments, *TINY, words="cannot be read")


# Schemas that cannot be worked with


def columns(*facts: dict[str, Any], **more: Any) -> str:
    return json.dumps({"columns": list(facts), **more})


AGE = {"name": "age", "kind": "integer", "lower": 17, "upper": 90}
MANY = [str(number) for number in range(10_000)]
SCHEMAS = {
    "not JSON": ("{", "not JSON"),
    "not text": (b"\xff\xfe\x00", "not a text file"),
    "a list": ("[]", "columns"),
    "no column": (columns(), "no columns"),
    "an unknown key": (columns(AGE, colour=1), "'colour'"),
    "an unknown fact": (columns({**AGE, "colour": 1}), "'colour'"),
    "a newer format": (columns(AGE, format=2), "format=2"),
    "an absent target": (columns(AGE, target="rich"), "target='rich'"),
    "an unknown kind": (columns({**AGE, "kind": "date"}), "date"),
    "reversed bounds": (columns({**AGE, "lower": 99}), "99"),
    "an unknown provenance": (columns({**AGE, "provenance": "guess"}), "guess"),
    "ten thousand levels": (
        columns({"name": "age", "kind": "categorical", "levels": MANY}),
        "10000 levels",
    ),
    "one level": (columns({"name": "age", "kind": "categorical", "levels": ["a"]}), "constant"),
    "a column twice": (columns(AGE, AGE), "twice"),
    "no rows expected": (columns(AGE, expected_rows=0), "expected_rows=0"),
}


@pytest.mark.parametrize(("text", "words"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_cannot_be_used_is_refused(
    text: str | bytes, words: str, inputs: Path, tmp_path: Path, refused
) -> None:
    path = tmp_path / "schema.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    rows = [f"data.path={inputs / 'rows.csv'}", f"data.schema={path}"]
    refused("train", "data=file", *rows, *TINY, words=words)
    refused("schema", "check", path, inputs / "rows.csv", words=words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "x"]}), "'b': constant"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": [None, None]}), "'b': all values are missing"),
        (pd.DataFrame({"a": [1.0, 2.0, math.inf, 4.0]}), "'a': holds an infinite value"),
        (pd.DataFrame({"a": [f"x{i}" for i in range(10_000)]}), "'a': 10000 levels"),
        (pd.DataFrame({"a": [1.0]}), "'a': constant"),
        (pd.DataFrame({"a": pd.Series([], dtype=float)}), "no rows"),
    ],
)
def test_a_schema_is_not_drafted_from_anything(
    rows: pd.DataFrame, words: str, tmp_path: Path, refused
) -> None:
    rows.to_csv(tmp_path / "rows.csv", index=False)
    refused("schema", "infer", tmp_path / "rows.csv", words=words)


# Settings that cannot be worked with

SETTINGS = {
    "privacy.epsilon=0": "epsilon=0",
    "privacy.epsilon=-1": "epsilon=-1",
    "privacy.epsilon=abc": "epsilon=abc",
    "privacy.epsilon=nan": "epsilon=nan",
    "privacy.epsilon=1,2": "dpsynth sweep",
    "privacy.epsilon=range(3)": "dpsynth sweep",
    "privacy.delta=.01": "delta=0.01",
    "privacy.delta=abc": "delta=abc",
    "privacy.delta=0": "delta=0",
    "privacy.steps=-1": "steps=-1",
    "privacy.steps=1.5": "steps=1.5",
    "privacy.batch=0": "batch=0",
    "privacy.clip=-1": "clip=-1",
    "privacy.shares=5": "privacy.shares=5",
    "privacy.shares.codec=abc": "privacy.shares.codec=abc",
    "privacy.shares.marginals=.95": "privacy.shares",
    "privacy.stpes=5": "stpes",
    "+privacy.stpes=5": "stpes",
    "+privacy.rows=5": "rows",
    "privacy.unit=person": "unit 'person': no such column",
    "privacy.contributions=2": "contributions=2",
    "model=typo": "model/typo",
    "model.options.latnet=2": "latnet",
    "+model.options.latnet=2": "latnet",
    "model.options.latent=0": "latent=0",
    "model.options.lr=abc": "lr=abc",
    "model.options.block=0": "block=0",
    "model.options.hidden=5": "model=vae",
    "model.options.hidden=[-1]": "=-1",
    "model.options=5": "options",
    "codec.bins=1": "bins=1",
    "codec.bins=abc": "bins=abc",
    "+codec.colour=1": "colour",
    "training.engine=typo": "engine=typo",
    "training.piece=0": "piece=0",
    "training.device=tpu": "device=tpu",
    "training.memory=much": "training.memory=much",
    "training.memory=0": "training.memory=0",
    "training.memory=1e-6": "raise it, or lower training.piece",
    "+training.colour=1": "colour",
    "evaluation.max_rows=1": "max_rows=1",
    "evaluation.max_rows=abc": "max_rows=abc",
    "audit.max_candidates=4": "max_candidates=4",
    "audit.draws=0": "draws=0",
    "seed=-1": "seed=-1",
    "seed=abc": "seed=abc",
    "seed=1.5": "seed=1.5",
    "data.drop=5": "data.drop=5",
    "data.drop=age": "data.drop=age",
    "data.drop=[colour]": "'colour'",
    "data.holdout=2": "holdout=2",
    "data.holdout=null": "holdout=None",
    "data.holdout=.9": "holdout + reference",
    "data.split=official": "split=official",
    "data.split=typo": "split=typo",
    "data.path=2024": "'2024'",
    "data.path=nowhere.csv": "'nowhere.csv': no such file",
    "data.path=rows.xls": "'rows.xls'",
    "data.schema=nowhere.json": "'nowhere.json': no such file",
    "data.schema=null": "data.schema",
    "data=typo": "data/typo",
    "out=/dev/null/run": "/dev/null",
    "logger.mode=typo": "mode=typo",
    "colour=red": "colour",
    "colour": "colour",
    "=1": "",
    "[": "",
    "~model": "model",
}


@pytest.mark.parametrize(("override", "words"), SETTINGS.items(), ids=SETTINGS)
def test_a_setting_that_cannot_be_used_is_refused(
    override: str, words: str, inputs: Path, refused
) -> None:
    refused("train", *data(inputs), *TINY, override, words=words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "data=file"], "data.path: needs a value"),
        (["train", "data=file", "data.path=x.csv"], "data.schema: needs a value"),
        (["train", "data.path=x.csv"], "data.schema"),
        (["train", "data.name=typo"], "dataset=typo"),
        (["sweep", "data.split_seed=0,1"], "data: must be the same"),
        (["sweep", "training.memory=1,2"], "training.memory: must be the same"),
        (["sweep", "seed=0,0"], "twice"),
        (["sweep", "seed=range(x)"], "str"),
        (["sweep", "model=glob(*)"], "glob"),
        (["sweep", "grid=5"], "grid=5"),
        (["sweep", "privacy.epsilon=1,-1"], "epsilon=-1"),
        (["typo"], "command=typo"),
        (["--typo"], "command=--typo"),
        (["frontier"], "required: sweep"),
        (["frontier", "nowhere"], "no finished run"),
        (["frontier", "."], "no finished run"),
        (["sample"], "required"),
        (["sample", "nowhere", "--rows", "5"], "required: --out"),
        (["sample", "nowhere", "--rows", "abc", "--out", "x.csv"], "'abc'"),
        (["sample", "nowhere", "--rows", "5", "--out", "x.csv"], "no such folder"),
        (["sample", ".", "--rows", "5", "--out", "x.csv"], "no MANIFEST.json"),
        (["sample", ".", "--rows", "5", "--out", "x.csv", "--colour"], "--colour"),
        (["evaluate", "x.csv"], "required"),
        (["evaluate", "x.csv", "--real", "y.csv", "--holdout", "z.csv"], "'y.csv': no such file"),
        (["evaluate", ".", "--real", "y.csv", "--holdout", "z.csv"], "no MANIFEST.json"),
        (["inspect"], "required: run"),
        (["inspect", "nowhere"], "no such folder"),
        (["inspect", "."], "no MANIFEST.json"),
        (["schema"], "required: action"),
        (["schema", "typo"], "'typo'"),
        (["schema", "infer", "nowhere.csv"], "no such file"),
        (["schema", "check", "nowhere.json", "nowhere.csv"], "'nowhere.json': no such file"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_command_that_cannot_be_followed_is_refused(
    arguments: list[str], words: str, refused
) -> None:
    refused(*arguments, words=words)


def test_files_that_cannot_be_written_are_refused(inputs: Path, refused) -> None:
    rows = inputs / "rows.csv"
    refused("schema", "infer", rows, "--out", "no/where.json", words="no/where.json")
    parts = ["--real", rows, "--holdout", inputs / "holdout.csv", "--max-rows", 60]
    other = inputs / "other.csv"
    refused("evaluate", other, *parts, "--out", "no/where.json", words="no/where.json")


def test_tables_that_do_not_match_are_refused(inputs: Path, tmp_path: Path, refused) -> None:
    rows, holdout = inputs / "rows.csv", inputs / "holdout.csv"
    odd = tmp_path / "odd.csv"
    frame(50).rename(columns={"job": "work"}).to_csv(odd, index=False)
    refused("evaluate", odd, "--real", rows, "--holdout", holdout, words="'job'")
    refused("evaluate", holdout, "--real", rows, "--holdout", odd, words="'job'")
    schema = ["--schema", inputs / "schema.json"]
    refused("evaluate", odd, "--real", rows, "--holdout", holdout, *schema, words="'job'")
    parts = ["--real", rows, "--holdout", holdout]
    refused("evaluate", holdout, *parts, "--target", "colour", words="colour")
    refused("evaluate", holdout, *parts, *schema, "--target", "colour", words="colour")
    refused("evaluate", holdout, *parts, "--max-rows", 0, words="max_rows=0")
    refused("evaluate", inputs / "schema.json", *parts, words="unknown ending")


def test_an_out_that_exists_is_not_touched(inputs: Path, command: Command, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "precious").write_text("mine")
    code, _, err = command("train", *data(inputs), *TINY, "out=run")
    assert code == 2 and "exists already" in err and len(err.splitlines()) == 1
    assert [str(p.relative_to(here)) for p in here.rglob("*")] == ["run", "run/precious"]


def test_facts_read_off_the_rows_are_refused_by_policy(
    inputs: Path, tmp_path: Path, command: Command, refused
) -> None:
    draft = tmp_path / "draft.json"
    command("schema", "infer", inputs / "rows.csv", "--target", "rich", "--out", draft)
    rows = [f"data.path={inputs / 'rows.csv'}", f"data.schema={draft}"]
    for name in ("train", "sweep"):
        refused(name, "data=file", *rows, *TINY, words="provenance", code=3)


def test_debug_shows_the_traceback(here: Path, inputs: Path) -> None:
    for arguments in (["--debug", "typo"], ["typo", "--debug"]):
        with pytest.raises(UsageError, match="command=typo"):
            main(arguments)
    with pytest.raises(OSError):
        main(["train", *data(inputs), *TINY, "out=/dev/null/run", "--debug"])


# Help


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]], ids=str)
def test_help_mentions_every_command(arguments: list[str], command: Command) -> None:
    code, out, err = command(*arguments)
    assert code == 0 and not err
    for name in ("train", "sweep", "frontier", "sample", "evaluate", "inspect", "schema"):
        assert f"dpsynth {name}" in out
    assert "--debug" in out


@pytest.mark.parametrize("name", ["train", "sweep"])
def test_help_of_a_training_shows_every_key(name: str, command: Command) -> None:
    code, out, err = command(name, "--help")
    assert code == 0 and not err
    for path in [CONF / "config.yaml", *CONF.glob("*/*.yaml")]:
        assert path.read_text().rstrip() in out
        for key in yaml.safe_load(path.read_text()):
            assert f"{key}:" in out


@pytest.mark.parametrize("name", ["frontier", "sample", "evaluate", "inspect", "schema"])
def test_every_other_command_explains_itself(name: str, command: Command) -> None:
    code, out, err = command(name, "--help")
    assert code == 0 and not err
    assert out.startswith(f"usage: dpsynth {name}")


# From a CSV to a judged table


@pytest.fixture(scope="module")
def journey(
    inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Outcome]]:
    """Every command once, in order, as a person would type them."""
    folder = tmp_path_factory.mktemp("journey")
    said: dict[str, Outcome] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sweep, "ProcessPoolExecutor", Inline)

        def call(name: str, *arguments: object) -> None:
            out, err = io.StringIO(), io.StringIO()
            with (
                contextlib.redirect_stdout(out),
                contextlib.redirect_stderr(err),
                pytest.raises(SystemExit) as stopped,
            ):
                main([str(argument) for argument in arguments])
            said[name] = (int(str(stopped.value.code)), out.getvalue(), err.getvalue())

        rows, holdout = inputs / "rows.csv", inputs / "holdout.csv"
        call("infer", "schema", "infer", rows, "--target", "rich", "--out", "schema.json")
        body = json.loads(Path("schema.json").read_text())
        for facts in body["columns"]:
            facts["provenance"] = "declared"
            if facts["kind"] != "categorical":
                facts |= {"lower": 0, "upper": 100}
        Path("schema.json").write_text(json.dumps({**body, "expected_rows": 400}))
        call("check", "schema", "check", "schema.json", rows)
        mine = ["data=file", f"data.path={rows}", "data.schema=schema.json", "data.name=mine"]
        call("train", "train", *mine, *TINY, "out=run")
        call("train inf", "train", *mine, *TINY, "privacy.epsilon=inf", "model=gan",
             "model.options.latent=2", "model.options.hidden=[8,8]")  # fmt: skip
        where = "rich='yes' and job=cook"
        for name, seed in {"sample": 1, "again": 1, "other": 2}.items():
            call(name, "sample", "run", "--rows", 120, "--seed", seed, "--out", f"{name}.csv")
        call("where", "sample", "run", "--rows", 30, "--where", where, "--out", "where.parquet")
        parts = ["--real", rows, "--holdout", holdout, "--max-rows", 60]
        call("evaluate", "evaluate", "sample.csv", *parts, "--target", "rich", "--out", "r.json")
        call("evaluate run", "evaluate", "run", *parts)
        call("evaluate schema", "evaluate", "sample.csv", *parts, "--schema", "schema.json")
        call("inspect", "inspect", "run")
        call("verify", "verify", "run")
        law = ["model=independent,naive_bayes", "select.mean=2", "model.options={}"]
        call("select", "select", *mine, "privacy.epsilon=1", "seed=0", *law, "out=selected")
        call("verify selected", "verify", "selected")
        grid = ["model=independent", "privacy.epsilon=1,inf", "seed=0,1", "model.options={}"]
        call("sweep", "sweep", *mine, *STEPS, *JUDGED, *grid, "out=swept")
        call("again sweep", "sweep", *mine, *STEPS, *JUDGED, *grid, "out=swept")
        call("frontier", "frontier", "swept", "--x", "ks", "--out", "drawn")
    return folder, said


def test_every_step_of_the_journey_works(journey: tuple[Path, dict[str, Outcome]]) -> None:
    _, said = journey
    for name, (code, _, err) in said.items():
        assert code == 0, f"{name}: {err}"
        assert "Traceback" not in err


def test_a_draft_says_that_it_is_one(journey: tuple[Path, dict[str, Outcome]]) -> None:
    assert "read off the rows" in journey[1]["infer"][1]
    assert "400 rows keep to schema.json" in journey[1]["check"][1]


def test_a_draft_is_printed_where_no_file_is_named(inputs: Path, command: Command) -> None:
    code, out, _ = command("schema", "infer", inputs / "rows.csv")
    assert code == 0
    drafted = Schema.from_json(out)
    assert drafted.names == SCHEMA.names
    assert {column.provenance for column in drafted.columns} == {"data"}


def test_train_leaves_a_run_and_its_log(journey: tuple[Path, dict[str, Outcome]]) -> None:
    folder, said = journey
    run = Run.load(folder / "run")
    assert run.epsilon <= run.plan.epsilon == 1.0
    assert run.seed == 0 and run.executed == 5 and run.lineage["data"] == "mine"
    assert run.schema["age"].upper == 100
    (other,) = (folder / "runs").glob("gan-epsinf-seed0-*")
    assert Run.load(other).epsilon == math.inf
    assert "run: run" in said["train"][1]
    (log,) = (folder / "logs" / "run").glob("*/metrics.csv")
    logged = pd.read_csv(log)
    assert logged["steps"].iloc[-1] == 5
    assert not [name for name in logged if "loss" in name]
    assert not list(folder.glob(".*")), "the workspace is gone"


def test_sampling_again_gives_the_same_table(journey: tuple[Path, dict[str, Outcome]]) -> None:
    folder, _ = journey
    first, again, other = (
        (folder / f"{name}.csv").read_bytes() for name in ("sample", "again", "other")
    )
    assert first == again != other
    rows = pd.read_csv(folder / "sample.csv")
    assert len(rows) == 120 and list(rows) == SCHEMA.names
    assert rows[["job", "pay"]].isna().to_numpy().any(), "missing values are modelled"
    met = pd.read_parquet(folder / "where.parquet")
    assert len(met) == 30
    assert (met["rich"] == "yes").all() and (met["job"] == "cook").all()


def test_a_table_is_judged(journey: tuple[Path, dict[str, Outcome]]) -> None:
    folder, said = journey
    report = Report.from_json((folder / "r.json").read_text())
    assert report.rows == {"synthetic": 120, "train": 400, "holdout": 150}
    assert "tstr_gbt_auc" in report.metrics
    for name in ("evaluate", "evaluate run", "evaluate schema"):
        assert "tvd2" in said[name][1] and "tstr_gbt_auc" in said[name][1]
        assert "not themselves differentially private" in " ".join(said[name][1].split())


def test_inspect_shows_the_claim(journey: tuple[Path, dict[str, Outcome]]) -> None:
    shown = yaml.safe_load(journey[1]["inspect"][1])
    claim = shown["claim"]
    assert 0.99 < claim["epsilon"] <= 1.0 and claim["delta"] == 1e-5
    assert 0 < claim["advantage"] < claim["mu"] < claim["epsilon"]
    found = list(claim["tpr_at_fpr"].values())
    for rate, tpr in claim["tpr_at_fpr"].items():
        assert rate < tpr <= rate + claim["advantage"] + 1e-9
    assert found == sorted(found)
    failing = list(claim["delta_at_epsilon"].values())
    assert failing == sorted(failing, reverse=True)
    assert claim["delta_at_epsilon"][1.0] <= 1e-5
    assert shown["config"]["plan"]["epsilon"] == 1.0
    assert shown["ledger"]["events"][-1]["what"] == "dpsgd:vae"
    assert shown["lineage"]["data"] == "mine"
    assert shown["files"]["model.safetensors"] > 0


def test_a_claim_is_recomputed(journey: tuple[Path, dict[str, Outcome]]) -> None:
    folder, said = journey
    for name, run in {"verify": "run", "verify selected": "selected"}.items():
        found = Run.load(folder / run)
        assert f"ε={found.epsilon:.4f}" in said[name][1] and "one record" in said[name][1]
    assert "seed" in said["verify"][1], "noise that can be taken off is said to be that"


def test_a_selection_is_paid_for(journey: tuple[Path, dict[str, Outcome]]) -> None:
    run = Run.load(journey[0] / "selected")
    assert [e.mechanism for e in run.ledger.events][-1] == "repeat_select"
    assert 0.9 < run.epsilon <= 1.0 and run.plan.epsilon < 0.9


def test_candidates_must_share_what_they_are_chosen_under(inputs: Path, refused) -> None:
    mine = data(inputs)
    words = "must be the same for all candidates"
    refused("select", *mine, *NETWORK, "privacy.epsilon=1,2", words=words)
    refused("select", *mine, *NETWORK, "privacy.epsilon=1", "seed=0,1", words=words)


def test_a_sweep_is_drawn(journey: tuple[Path, dict[str, Outcome]]) -> None:
    folder, said = journey
    assert "sweep of 4 runs into swept" in said["sweep"][1]
    assert "all 4 runs are there" in said["again sweep"][1]
    for drawn in (folder / "swept" / "frontier", folder / "drawn"):
        names = {path.name for path in drawn.iterdir()}
        assert {f"frontier.{kind}" for kind in ("pdf", "svg", "png", "html", "csv")} <= names
    table = pd.read_parquet(folder / "swept" / "frontier" / "frontier.parquet")
    assert sorted(table["role"].unique()) == ["baseline", "control"]
    assert len(table[table["role"] == "baseline"]) == 4
    assert len(table[table["role"] == "control"]) == 6


def test_an_unknown_axis_is_refused(journey: tuple[Path, dict[str, Outcome]], refused) -> None:
    refused("frontier", journey[0] / "swept", "--x", "typo", "--out", "drawn", words="typo")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rows", 0, "--out", "x.csv"], "rows=0"),
        (["--rows", -5, "--out", "x.csv"], "rows=-5"),
        (["--rows", 5, "--out", "x.xls"], "unknown ending"),
        (["--rows", 5, "--out", "/dev/null/x.csv"], "/dev/null"),
        (["--rows", 5, "--out", "x.csv", "--where", "rich"], "where='rich'"),
        (["--rows", 5, "--out", "x.csv", "--where", ""], "where=''"),
        (["--rows", 5, "--out", "x.csv", "--where", "colour=red"], "'colour'"),
        (["--rows", 5, "--out", "x.csv", "--where", "rich=maybe"], "'maybe'"),
        (["--rows", 5, "--out", "x.csv", "--where", "job=pilot"], "'pilot'"),
        (["--rows", 5, "--out", "x.csv", "--where", "age=old"], "'old'"),
        (["--rows", 5, "--out", "x.csv", "--where", "age=999"], "999"),
        (["--rows", 5, "--out", "x.csv", "--where", "rich=no and rich=yes"], "twice"),
    ],
    ids=str,
)
def test_a_sample_that_cannot_be_drawn_is_refused(
    options: list[Any], words: str, journey: tuple[Path, dict[str, Outcome]], refused
) -> None:
    refused("sample", journey[0] / "run", *options, words=words)


def test_a_damaged_run_is_refused(
    journey: tuple[Path, dict[str, Outcome]], tmp_path: Path, refused, inputs: Path
) -> None:
    run = Path(shutil.copytree(journey[0] / "run", tmp_path / "run"))
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    refused("sample", run, "--rows", 5, "--out", "x.csv", words="differs from its hash")
    refused("inspect", run, words="differs from its hash")
    parts = ["--real", inputs / "rows.csv", "--holdout", inputs / "holdout.csv"]
    refused("evaluate", run, *parts, words="differs from its hash")


def test_codes_keep_their_leading_zeros(tmp_path: Path, command: Command) -> None:
    """`01` is a level, not the number 1, wherever a schema says so."""
    rng = np.random.default_rng(0)
    facts = [{"name": n, "kind": "categorical", "levels": ["01", "02", "10"]} for n in "ab"]
    (tmp_path / "schema.json").write_text(json.dumps({"columns": facts}))
    for name in ("rows", "holdout", "made"):
        drawn = rng.choice(["01", "02", "10"], (60, 2))
        pd.DataFrame(drawn, columns=["a", "b"]).to_csv(tmp_path / f"{name}.csv", index=False)
    schema = tmp_path / "schema.json"
    code, _, err = command("schema", "check", schema, tmp_path / "rows.csv")
    assert code == 0, err
    parts = ["--real", tmp_path / "rows.csv", "--holdout", tmp_path / "holdout.csv"]
    code, _, err = command("evaluate", tmp_path / "made.csv", *parts, "--schema", schema)
    assert code == 0, err


# Interrupted


def test_an_interrupted_training_goes_on(
    inputs: Path, command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["train", *data(inputs), *TINY, "privacy.epsilon=inf", "out=run"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_train", interrupted)
        code, _, err = command(*arguments)
    assert code == 130
    assert err.splitlines() == ["dpsynth: interrupted; run the same command again to go on"]
    assert (here / ".run.work").is_dir() and not (here / "run").exists()
    code, _, err = command(*arguments)
    assert code == 0, err
    assert Run.load(here / "run").executed == 5
    assert sorted(path.name for path in here.iterdir()) == ["logs", "run"]


def test_a_workspace_outlives_a_mistyped_setting(
    inputs: Path, command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of training must not go because the next command holds a typo."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["train", *data(inputs), *TINY, "privacy.epsilon=inf", "out=run"]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_train", interrupted)
        command(*arguments)
    for typo in ("audit.draws=0", "training.engine=typo", "privacy.delta=abc", "data.path=x.csv"):
        assert command(*arguments, typo)[0] == 2
    other = f"data.path={inputs / 'other.csv'}"
    code, _, err = command(*arguments, other)
    assert code == 2 and "other rows" in err
    assert (here / ".run.work").is_dir()


# `python -m dpsynth -m`


def test_hydras_own_sweeper_leaves_a_run_a_job(inputs: Path, tmp_path: Path) -> None:
    """In a process of its own, with a judging process a job; a job that fails is seen."""
    arguments = [*data(inputs), *TINY, "privacy.epsilon=2,4,-1", "privacy.steps=0"]
    done = subprocess.run(
        [sys.executable, "-m", "dpsynth", "-m", *arguments, "hydra.sweep.dir=jobs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("dpsynth: ")] == [
        "dpsynth: epsilon=-1.0: must be a number above 0"
    ]
    for job, epsilon in enumerate((2.0, 4.0)):
        run = Run.load(tmp_path / "jobs" / str(job) / "run")
        assert run.plan.epsilon == epsilon >= run.epsilon
    assert not (tmp_path / "jobs" / "2" / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
