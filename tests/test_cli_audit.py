"""`dpsynth audit` and `dpsynth audit-table`, as typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from inline import Inline
from tiny import SCHEMA, frame

from dpsynth.cli import main
from dpsynth.frontier import sweep
from dpsynth.suite import run as suite
from dpsynth.suite.defects import EXPECTED

Command = Callable[..., tuple[int, str, str]]

# Few weights that start from few components, so that a fit takes a blink.
TINY = [
    "model=vae", "model.options.hidden=[8,8]", "model.options.latent=2",
    "model.options.components=6",
    "privacy.batch=32", "privacy.steps=5", "privacy.epsilon=1", "seed=0",
    "evaluation.max_rows=60", "audit.max_candidates=40", "audit.draws=1",
    "audit.reference_model=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a table of 900 rows."""
    folder = tmp_path_factory.mktemp("inputs")
    frame(900, 3).to_csv(folder / "rows.csv", index=False)
    (folder / "schema.json").write_text(SCHEMA.to_json())
    return [
        *("data=file", f"data.path={folder / 'rows.csv'}", f"data.schema={folder / 'schema.json'}"),
        *("data.holdout=.3", "data.reference=.3"),
    ]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    """Run a command in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return call


def test_a_trained_run_is_audited_beside_itself(
    command: Command, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("train", *data, *TINY, "out=run")[0] == 0
    assert command("verify", "run")[0] == 0
    code, out, err = command("audit", "run", *data, "--candidates", 200, "--suite", "quick")
    assert code in (0, 3), err  # a table this small may miss a control by chance
    assert (tmp_path / "run.audit" / "audit.json").is_file()
    assert "no contradiction" in out or "not to be believed" in out
    assert command("verify", "run")[0] == 0, "an audit leaves the run as it was"

    code, _, err = command("audit", "run", *data)
    assert code == 2
    assert "run.audit': exists already" in err

    code, _, err = command("audit", "run", "data=adult", "--out", "other")
    assert code == 2
    assert "has another schema than the rows" in err
    assert not (tmp_path / "other").exists()

    monkeypatch.setattr(suite, "judge_controls", lambda *_, **__: [_wrong()])
    # As in the audit before, and most of its time.
    monkeypatch.setattr(suite, "run_defects", lambda *_, **__: dict(EXPECTED))
    code, out, err = command("audit", "run", *data, "--candidates", 200, "--out", "other")
    assert code == 3
    assert "not to be believed: control 'copy'" in err
    assert (tmp_path / "other" / "README.md").is_file(), "what was found is kept all the same"


def _wrong() -> suite.Control:
    return suite.Control("copy", "nn", 0.7, 0.999, 1.0, 1.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no such folder"),
        (["nowhere", "--suite", "deep"], "suite=deep: unknown"),
        (["nowhere", "--shadows", "0"], "shadows=0"),
        ([], "the following arguments are required: run"),
    ],
)
def test_what_cannot_be_audited(command: Command, arguments: list[str], words: str) -> None:
    code, _, err = command("audit", *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert words in line


def _tables(folder: Path) -> tuple[pd.DataFrame, np.ndarray]:
    """A generator that copies a third of its rows; candidates with the truth beside them."""
    rows = frame(700, 9)
    members, others = rows[:150], rows[150:300]
    synthetic = pd.concat([members[:75], frame(225, 12)])
    candidates = pd.concat([members, others], ignore_index=True)
    truth = np.arange(300) < 150
    synthetic.to_parquet(folder / "S.parquet")
    candidates.assign(member=truth.astype(int), id=range(300)).to_parquet(folder / "C.parquet")
    rows[300:].to_parquet(folder / "R.parquet")
    return candidates, truth


def test_any_table_is_audited(command: Command, tmp_path: Path) -> None:
    _, truth = _tables(tmp_path)
    tables = ["--synthetic", "S.parquet", "--candidates", "C.parquet"]
    code, out, err = command("audit-table", *tables, "--reference", "R.parquet", "--out", "a.csv")
    assert code == 0, err
    assert "'member' is the truth" in out
    scores = pd.read_csv(tmp_path / "a.csv")
    assert len(scores) == 300
    assert scores.columns[-1] == "combined"
    assert np.isfinite(scores.to_numpy()).all()
    assert scores["combined"][truth].mean() > scores["combined"][~truth].mean() + 0.1
    assert command("audit-table", *tables, "--out", "bare.parquet")[0] == 0
    assert len(pd.read_parquet(tmp_path / "bare.parquet")) == 300


NO_SHADOWS = ("--shadow-dir", "no")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--candidates", "C.parquet", "--out", "a.csv"], "required: --synthetic"),
        (["--synthetic", "S.txt", "--candidates", "C.parquet", "--out", "a.csv"], "no such file"),
        (
            ["--synthetic", "S.parquet", "--candidates", "C.parquet", "--out", "a.txt"],
            "unknown ending",
        ),
        (
            [
                "--synthetic",
                "S.parquet",
                "--candidates",
                "C.parquet",
                "--out",
                "a.csv",
                *NO_SHADOWS,
            ],
            "shadows 'no': no such folder",
        ),
    ],
)
def test_what_no_table_audit_can_do(
    command: Command, tmp_path: Path, arguments: list[str], words: str
) -> None:
    _tables(tmp_path)
    code, _, err = command("audit-table", *arguments)
    assert code == 2
    (line,) = err.splitlines()
    assert words in line
    assert not list(tmp_path.glob("a.*"))
