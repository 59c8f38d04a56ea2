"""Hydra's `-m`: jobs trained as fleets are the runs they would have been one by one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from inline import Inline
from tiny import SCHEMA, frame

from dpsynth.cli import main
from dpsynth.evaluation import Report
from dpsynth.frontier import sweep
from dpsynth.release.verify import verify
from dpsynth.training import grid
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.run import Run

DATA = [
    "privacy.batch=32", "privacy.steps=5", "privacy.epsilon=1", "seed=0",
    "evaluation.max_rows=60", "audit.max_candidates=40", "audit.draws=1",
    "data=file", "data.path=rows.csv", "data.schema=schema.json",
]  # fmt: skip
# Few weights that start from few components, so that a fit takes a blink.
TINY = [
    "model=vae", "model.options.hidden=[8,8]", "model.options.latent=2",
    "model.options.components=6", *DATA,
]  # fmt: skip
# Nothing but tables, in no time.
TABLES = ["model=naive_bayes", "audit.reference_model=false"]
GRID = ["privacy.epsilon=2,inf", "privacy.steps=4,6", "seed=0,1"]
CELLS = [
    [f"privacy.epsilon={epsilon}", f"privacy.steps={steps}", f"seed={seed}"]
    for steps in (4, 6)
    for epsilon in ("2", "inf")
    for seed in (0, 1)
]


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def multirun(*arguments: str, to: str = "jobs") -> int:
    return command("-m", *arguments, f"hydra.sweep.dir={to}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to stand in, with rows and a schema of them."""
    folder = tmp_path_factory.mktemp("launched")
    frame().to_csv(folder / "rows.csv", index=False)
    (folder / "schema.json").write_text(SCHEMA.to_json())
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ProcessPoolExecutor", Inline)
        yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def trained() -> list[int]:
    """Runs of each fleet that is trained, as they come."""
    return []


@pytest.fixture(autouse=True, scope="module")
def counted(trained: list[int]) -> Iterator[None]:
    def count(recipes: Any, seats: Sequence[Any], **others: Any) -> list[Trained]:
        trained.append(len(seats))
        return train_fleet(recipes, seats, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grid, "train_fleet", count)
        yield


@pytest.fixture(scope="module")
def jobs(place: Path, trained: list[int]) -> Path:
    """A grid of eight jobs."""
    trained.clear()
    assert multirun(*TINY, *GRID) == 0
    assert trained == [12], "eight runs, and a reference model for each T and seed"
    return place / "jobs"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def same(left: Path, right: Path) -> None:
    """Two run folders hold one run, whenever it was made."""
    assert {p.name for p in left.iterdir()} == {p.name for p in right.iterdir()}
    one, other = Run.load(left), Run.load(right)
    assert (one.recipe, one.plan, one.seed) == (other.recipe, other.plan, other.seed)
    assert one.ledger.executed == other.ledger.executed
    events = [[replace(e, when="") for e in run.ledger.events] for run in (one, other)]
    assert events[0] == events[1]
    weights = [run.generator.state_dict() for run in (one, other)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)
    reports = [Report.from_json((f / "metrics.json").read_text()) for f in (left, right)]
    assert reports[0].metrics == pytest.approx(reports[1].metrics, rel=1e-3, abs=1e-6)
    attacks = [json.loads((f / "audit.json").read_text()) for f in (left, right)]
    assert attacks[0].keys() == attacks[1].keys()
    for found in zip(*(a["attacks"] for a in attacks), strict=True):
        assert found[0]["name"] == found[1]["name"]
        assert found[0]["auc"] == pytest.approx(found[1]["auc"], abs=1e-3)
    cards = [(f / "README.md").read_text().splitlines() for f in (left, right)]
    assert len(cards[0]) == len(cards[1])
    samples = [pd.read_parquet(f / "samples.parquet") for f in (left, right)]
    assert samples[0].shape == samples[1].shape


@pytest.mark.parametrize("number", [0, 3, 5, 6])
def test_a_job_is_the_run_alone(number: int, jobs: Path) -> None:
    out = jobs.parent / f"alone-{number}"
    assert command("train", *TINY, *CELLS[number], f"out={out}") == 0
    same(jobs / str(number) / "run", out)
    verify(jobs / str(number) / "run")


def test_hydras_own_launcher_leaves_the_same_files(
    jobs: Path, trained: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    trained.clear()
    assert multirun(*TINY, *CELLS[0][:2], "seed=0,1", "hydra/launcher=basic", to="basic") == 0
    assert trained == [2, 2]
    for number in (0, 1):
        fleet, basic = jobs / str(number), jobs.parent / "basic" / str(number)
        assert files(fleet) == files(basic)
        same(fleet / "run", basic / "run")
        assert "privacy.epsilon=2" in (fleet / ".hydra" / "overrides.yaml").read_text()
    assert {p.name for p in jobs.iterdir()} == {*map(str, range(8)), "multirun.yaml"}


def test_batches_of_a_sweeper_are_packed_one_by_one(place: Path, trained: list[int]) -> None:
    trained.clear()
    batch = "hydra.sweeper.max_batch_size=2"
    assert multirun(*DATA, "model=naive_bayes", "seed=0,1,2", batch, to="batches") == 0
    assert trained == [4, 2]
    assert {p.name for p in (place / "batches").iterdir()} == {"0", "1", "2", "multirun.yaml"}


def test_jobs_of_other_rows_and_the_same_point_twice_go_apart(
    place: Path, trained: list[int]
) -> None:
    trained.clear()
    lists = ["data.split_seed=0,1", "select.mean=10,11"]
    assert multirun(*DATA, *TABLES, *lists, to="apart") == 0
    assert trained == [1] * 4
    splits = [Run.load(place / "apart" / str(job) / "run") for job in range(4)]
    assert splits[0].sample(50, rng=0).equals(splits[1].sample(50, rng=0))
    assert not splits[0].sample(50, rng=0).equals(splits[2].sample(50, rng=0))


def test_a_job_that_fails_leaves_the_others_and_its_exit_code(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whether its settings are wrong, its rows, or its place is taken."""
    (place / "failing" / "3" / "run").mkdir(parents=True)
    points = "privacy.epsilon=2,-1,3,4"
    assert multirun(*DATA, *TABLES, points, to="failing") == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("dpsynth: ")]
    assert lines[0] == "dpsynth: epsilon=-1.0: must be a number above 0"
    assert "exists already" in lines[1] and len(lines) == 2
    assert "Traceback" not in said
    for job, there in enumerate((True, False, True, False)):
        run = place / "failing" / str(job) / "run" / "MANIFEST.json"
        assert run.is_file() == there
    assert not list((place / "failing").glob(".*"))


def test_a_policy_that_refuses_has_its_own_exit_code(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert multirun(*DATA, *TABLES, "release=true", to="refused") == 3
    assert "dpsynth: release=true with seed=0" in capfd.readouterr().err


def test_what_a_job_says_of_itself_is_settled_for_each(place: Path) -> None:
    out = "out=told/${hydra:job.num}"
    assert multirun(*DATA, *TABLES, "seed=0,1", out, to="told-jobs") == 0
    assert {p.name for p in (place / "told").iterdir()} == {"0", "1"}


@pytest.mark.parametrize("setting", ["hydra.job.chdir=true", "+hydra.job.env_set.A=b"])
def test_what_jobs_of_one_process_cannot_have_is_refused(
    setting: str, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert multirun(*DATA, *TABLES, setting, "seed=0,1", to="chdir") == 2
    assert "use hydra/launcher=basic" in capfd.readouterr().err
    shutil.rmtree(place / "chdir")


def test_an_interrupted_sweep_keeps_what_is_done_and_goes_on(
    place: Path, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second family is interrupted; the same command trains nothing twice."""
    lists = [*DATA, "model=naive_bayes,independent", "seed=0,1"]

    def interrupted(recipes: Any, seats: Sequence[Any], **others: Any) -> list[Trained]:
        if recipes[0].model == "independent":
            raise KeyboardInterrupt
        trained.append(len(seats))
        return train_fleet(recipes, seats, **others)

    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(grid, "train_fleet", interrupted)
        assert multirun(*lists, to="stopped") == 130
    (work,) = (place / "stopped").glob(".*.work")
    assert (work / "private" / "packing.json").is_file()
    assert [(place / "stopped" / str(job) / "run").is_dir() for job in range(4)] == [
        True, False, True, False
    ]  # fmt: skip
    assert multirun(*lists, to="stopped") == 0
    assert trained == [4, 4]
    assert all((place / "stopped" / str(job) / "run").is_dir() for job in range(4))
    assert not work.exists()
    assert multirun(*lists, to="stopped") == 2, "nothing is to go on with"
