"""Jobs: each run ends up where it was asked for, and none is lost on the way."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from inline import Inline
from rich.console import Console
from tiny import recipe, table

from dpsynth.checks import UsageError
from dpsynth.data import Split
from dpsynth.frontier import jobs as module
from dpsynth.frontier import sweep
from dpsynth.frontier.jobs import Job, train_jobs
from dpsynth.frontier.sweep import Judging, Point
from dpsynth.randomness import stream
from dpsynth.training.run import Run

JUDGING = Judging(max_rows=60, max_candidates=40, draws=1, reference_model=False)
SPLIT = Split.random(table(), stream(0, "split"))


@pytest.fixture(autouse=True)
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)


def job(out: Path, seed: int = 0, *, model: str = "naive_bayes", apart: bool = False) -> Job:
    point = Point(recipe(model), math.inf, seed)
    return Job(point, SPLIT, replace(JUDGING, apart=apart), "tiny", out, lambda _: False)


def train(folder: Path, *jobs: Job) -> list[str]:
    faults = train_jobs(jobs, folder / ".work", Console(file=StringIO()))
    return ["" if fault is None else str(fault) for fault in faults]


def test_figures_kept_apart_lie_beside_each_run(tmp_path: Path) -> None:
    asked = [job(tmp_path / str(seed) / "run", seed, apart=True) for seed in (0, 1)]
    assert train(tmp_path, *asked) == ["", ""]
    for seed, one in enumerate(asked):
        assert Run.load(one.out).seed == seed
        assert (one.kept / "metrics.json").is_file()
        assert not (one.out / "metrics.json").exists()
    assert not (tmp_path / ".work").exists()


def test_what_cannot_share_a_workspace_is_refused(tmp_path: Path) -> None:
    first = job(tmp_path / "a")
    place, point = train(tmp_path, first, job(tmp_path / "a", 1), job(tmp_path / "b"))[1:]
    assert "exists already" in place
    assert "asked for twice in one workspace" in point
    assert first.out.is_dir() and not (tmp_path / "b").exists()


def test_a_judge_that_fails_keeps_the_other_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = sweep._judge_run

    def broken(source: Path, reference: Path | None, target: Path, *others: Any) -> str:
        if "seed1" in target.name:
            raise UsageError("the judge is ill")
        return judge(source, reference, target, *others)

    monkeypatch.setattr(sweep, "_judge_run", broken)
    asked = [job(tmp_path / str(seed), seed) for seed in (0, 1, 2)]
    assert train(tmp_path, *asked) == ["", "the judge is ill", ""]
    assert [one.out.is_dir() for one in asked] == [True, False, True]


def test_a_fault_of_the_rows_is_one_of_every_job(tmp_path: Path) -> None:
    few = replace(SPLIT, holdout=SPLIT.holdout.take([0, 1]))
    asked = [replace(job(tmp_path / str(seed), seed), split=few) for seed in (0, 1)]
    assert all("holdout part has 2 rows" in fault for fault in train(tmp_path, *asked))
    assert not list(tmp_path.iterdir())


def test_a_run_that_cannot_be_moved_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next call moves it, and leaves alone what was moved before."""
    asked = [job(tmp_path / str(seed), seed) for seed in (0, 1)]

    def full(source: Path, target: Path) -> None:
        if target.name == "1":
            raise OSError(28, "No space left on device")
        shutil.copytree(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "move", full)
        before, after = train(tmp_path, *asked)
    assert before == "" and "No space left" in after
    assert (tmp_path / ".work").is_dir()
    stamp = (asked[0].out / "ledger.json").stat().st_mtime_ns
    assert train(tmp_path, *asked) == ["", ""]
    assert (asked[0].out / "ledger.json").stat().st_mtime_ns == stamp
    assert Run.load(asked[1].out).seed == 1
    assert not (tmp_path / ".work").exists()
