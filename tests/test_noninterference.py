"""With the noisy channels cut, one record more changes no byte of anything public.

Every mechanism is made to answer from no rows at all, so whatever still differs between two
neighbouring tables got out beside the mechanisms that the ledger pays for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from inline import Inline

from dpsynth import cli
from dpsynth.codec import NumericCoder
from dpsynth.data import Table
from dpsynth.frontier import sweep
from dpsynth.privacy import ledger as ledger_module
from dpsynth.privacy.engine import FleetOptimizer
from dpsynth.privacy.mechanisms import HistogramNoise
from dpsynth.schema import Schema
from dpsynth.training import run as run_module
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat
from dpsynth.training.run import Run

USUAL = {"age": "40", "job": "nurse", "pay": "50.5", "rich": "no"}
# One record that would betray itself wherever a value, a level, a type or a count is read off rows.
RECORDS: dict[str, dict[str, str]] = {
    "a usual one": USUAL,
    "out of bounds": {**USUAL, "age": "400"},
    "extreme": {**USUAL, "pay": "1e300"},
    "beyond float": {**USUAL, "pay": "1e999", "age": str(10**40)},
    "not a number": {**USUAL, "age": "forty"},
    "an unseen level": {**USUAL, "job": "astronaut"},
    "missing where none may be": {**USUAL, "rich": "", "age": ""},
    "the only row of its class": {**USUAL, "rich": "yes"},
    "a long text": {**USUAL, "job": "x" * 10_000},
}


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Text as it stands in a CSV; all of one class, so that one record can be the only other."""
    frame = tiny.frame(900)
    frame["rich"] = "no"
    frame = frame.drop_duplicates().astype("string").fillna("")
    return frame


class Frozen(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ledger_module, run_module):
        monkeypatch.setattr(module, "datetime", Frozen)


@pytest.fixture
def cut(still: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every paid mechanism answers as if there were no rows."""
    answer, release = HistogramNoise.__call__, FleetOptimizer.release

    def empty(self: HistogramNoise, counts: np.ndarray) -> np.ndarray:
        return answer(self, np.zeros_like(counts))

    def silent(self: FleetOptimizer, *arguments: Any) -> None:
        for parameter in self.params:
            parameter.summed_grad = None  # type: ignore[attr-defined]
        release(self, *arguments)

    monkeypatch.setattr(HistogramNoise, "__call__", empty)
    monkeypatch.setattr(FleetOptimizer, "release", silent)
    yield


def neighbour(rows: pd.DataFrame, record: dict[str, str]) -> pd.DataFrame:
    return pd.concat([rows, pd.DataFrame([record])], ignore_index=True)


def saved(model: str, rows: pd.DataFrame, folder: Path) -> dict[str, bytes]:
    """All files of a run on `rows`, read as an unattended release reads them."""
    (source := folder.with_suffix(".csv")).write_text(rows.to_csv(index=False))
    table = Table.read(source, tiny.SCHEMA, strict=False)
    (trained,) = train_fleet(tiny.recipe(model), [Seat(table, 1.0, 0)])
    Run.of(trained, data="tiny").save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("model", tiny.HERE)
def test_no_file_of_a_run_differs(
    model: str, rows: pd.DataFrame, cut: None, tmp_path: Path
) -> None:
    before = saved(model, rows, tmp_path / "before")
    for number, (name, record) in enumerate(RECORDS.items()):
        after = saved(model, neighbour(rows, record), tmp_path / str(number))
        assert after == before, name


def test_uncut_the_same_files_differ(rows: pd.DataFrame, still: None, tmp_path: Path) -> None:
    """The channels that were cut are the ones that rows go through."""
    before = saved("vae", rows, tmp_path / "before")
    after = saved("vae", neighbour(rows, USUAL), tmp_path / "after")
    differ = {name for name in before if before[name] != after[name]}
    assert {"codec.json", "model.safetensors"} <= differ
    assert not differ & {"schema.json", "config.yaml"}


def totalled(column: Any, values: pd.Series, *rest: Any, **more: Any) -> NumericCoder:
    """A codec that looks at the sum of the values without paying."""
    coder = FIT(column, values, *rest, **more)
    coder.mass[-1] += float(values.sum())
    return coder


FIT: Callable[..., NumericCoder] = NumericCoder.fit


def test_a_leak_beside_the_mechanisms_is_seen(
    rows: pd.DataFrame, cut: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumericCoder, "fit", totalled)
    before = saved("independent", rows, tmp_path / "before")
    after = saved("independent", neighbour(rows, RECORDS["extreme"]), tmp_path / "after")
    assert before != after


def command(rows: pd.DataFrame, home: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """Everything that `dpsynth train` shows and leaves outside of `.private`, and how it ends."""
    home.mkdir()
    (home / "rows.csv").write_text(rows.to_csv(index=False))
    (home / "schema.json").write_text(tiny.SCHEMA.to_json())
    with pytest.raises(SystemExit) as ended:
        cli.main(
            [
                "train",
                "+experiment=tiny",
                "model=vae",
                "model.options.hidden=[8,8]",
                f"model.options.components={tiny.MIX['components']}",
                "data=file",
                f"data.path={home / 'rows.csv'}",
                f"data.schema={home / 'schema.json'}",
                "data.strict=false",
                "private_report=true",
                "privacy.epsilon=1",
                "seed=0",
                f"out={home / 'run'}",
            ]
        )
    shown = capsys.readouterr()
    # Speeds and free memory are the machine's, paths the test's.
    text = re.sub(r"[\d,]+ records/s|[\d.]+ GiB hold \d+ of [\d.]+ GiB", "", shown.out + shown.err)
    text = text.replace(str(home), "")
    left = {
        str(path.relative_to(home)): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and "run.private" not in path.parts and path.name != "rows.csv"
    }
    return {**left, "shown": text.encode(), "exit": str(ended.value.code).encode()}


def test_nothing_that_the_command_shows_or_leaves_differs(
    rows: pd.DataFrame,
    cut: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)
    before = command(rows, tmp_path / "before", capsys)
    assert before["exit"] == b"0" and "run/README.md" in before
    assert "run/metrics.json" not in before and "run/audit.json" not in before
    for number, (name, record) in enumerate(RECORDS.items()):
        after = command(neighbour(rows, record), tmp_path / str(number), capsys)
        differ = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
        assert not differ, name


def test_a_schema_never_says_how_many_rows_it_was_drafted_from(rows: pd.DataFrame) -> None:
    draft = Schema.infer(rows.drop(columns="rich"))
    assert draft.expected_rows is None
    with pytest.raises(ValueError, match="read off"):
        draft.check_public()
