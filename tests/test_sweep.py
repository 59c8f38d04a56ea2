"""A sweep: every point once, resumable, nothing half done, and no failure that goes unseen."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from inline import Inline
from rich.console import Console
from tiny import SCHEMA, recipe, table

from dpsynth.artifacts import MANIFEST, read_folder, write_folder
from dpsynth.audit import Audit
from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Split, Table
from dpsynth.evaluation import Report
from dpsynth.frontier import sweep
from dpsynth.frontier.results import AUDIT, DISTANCES, IDENTITY, metric_names
from dpsynth.frontier.sweep import CONTROLS, Judging, Point, data_name, gather, run_sweep
from dpsynth.randomness import stream
from dpsynth.release.verify import verify
from dpsynth.training import grid
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import FAMILIES, Seat
from dpsynth.training.run import Run

JUDGING = Judging(max_rows=60, max_candidates=40, draws=1)
MODELS = ("vae", "naive_bayes")
EPSILONS = (1.0, math.inf)
POINTS = [Point(recipe(model), epsilon, 0) for model in MODELS for epsilon in EPSILONS]
FILES = {
    "config.yaml", "schema.json", "codec.json", "ledger.json", "model.safetensors",
    "metrics.json", "audit.json", "samples.parquet", "README.md", "report.html", MANIFEST,
}  # fmt: skip


def split(seed: int = 0) -> Split:
    return Split.random(table(), stream(seed, "split"))


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)


def swept(folder: Path, points: Sequence[Point] = POINTS, **changes: Any) -> pd.DataFrame:
    settings = {
        "data": "tiny",
        "judging": JUDGING,
        "console": Console(file=StringIO()),
        "workers": 1,
        **changes,
    }
    return run_sweep(points, settings.pop("rows", split()), folder, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame, str]:
    """The one sweep with judging processes: its folder, results and what it said."""
    folder = tmp_path_factory.mktemp("sweeps") / "tiny"
    said = StringIO()
    results = swept(folder, console=Console(file=said, width=200))
    return folder, results, said.getvalue()


@pytest.fixture
def copied(finished: tuple[Path, pd.DataFrame, str], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished[0], tmp_path / "sweep"))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("work was done again")


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for part in ("runs", "controls")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }


def same(left: pd.DataFrame, right: pd.DataFrame) -> None:
    order = sorted(left["run"])
    first, second = (frame.set_index("run").loc[order] for frame in (left, right))
    pd.testing.assert_frame_equal(first, second, rtol=1e-6, check_like=True)


# What it leaves


def test_a_sweep_is_these_folders(finished: tuple[Path, pd.DataFrame, str]) -> None:
    folder, _, _ = finished
    assert {path.name for path in (folder / "runs").iterdir()} == {p.name for p in POINTS}
    assert {path.name for path in (folder / "controls").iterdir()} == {
        f"{name}-seed0" for name in CONTROLS
    }
    assert [path.name for path in (folder / "private").iterdir()] == ["data"], (
        "keys and checkpoints are private and go"
    )
    for point in POINTS:
        assert {path.name for path in (folder / "runs" / point.name).iterdir()} == FILES
    for path in (folder / "controls").iterdir():
        names = {file.name for file in path.iterdir()}
        assert names == {"metrics.json", "audit.json", MANIFEST}, "a control's rows are real rows"


def test_results_are_one_row_a_run(finished: tuple[Path, pd.DataFrame, str]) -> None:
    folder, results, _ = finished
    assert list(results.columns[: len(IDENTITY)]) == list(IDENTITY)
    assert list(results.columns[-len(AUDIT) :]) == list(AUDIT)
    metrics = metric_names(results)
    assert set(DISTANCES) < set(metrics)
    assert any(name.startswith("tstr_gbt") for name in metrics)
    assert all(f"floor_{name}" in results for name in metrics)
    assert sorted(results["run"]) == sorted(
        [p.name for p in POINTS] + [f"{name}-seed0" for name in CONTROLS]
    )
    cells = {(r.role, r.family, r.epsilon) for r in results.itertuples()}
    assert cells == {
        ("model", "vae", 1.0), ("model", "vae", math.inf),
        ("baseline", "naive_bayes", 1.0), ("baseline", "naive_bayes", math.inf),
        *(("control", name, math.inf) for name in CONTROLS),
    }  # fmt: skip
    assert results["seed"].tolist() == [0] * 7
    for name in metrics:
        assert results[f"floor_{name}"].nunique() == 1, "one floor for a whole sweep"
    same(results, gather(folder))
    assert data_name(folder) == "tiny"


def test_ceilings_are_those_of_the_runs(finished: tuple[Path, pd.DataFrame, str]) -> None:
    _, results, _ = finished
    private = results["epsilon"] < math.inf
    assert (results.loc[~private, "ceiling_auc"] == 1).all()
    assert results.loc[private, "ceiling_auc"].between(0.5, 0.9, inclusive="neither").all()
    assert results.loc[private, "ceiling_tpr1"].between(0.01, 0.2).all()


def test_a_judged_run_can_be_loaded_and_sampled(
    finished: tuple[Path, pd.DataFrame, str],
) -> None:
    folder, results, _ = finished
    for point in POINTS:
        path = folder / "runs" / point.name
        run = Run.load(path)
        assert run.recipe == point.recipe and run.seed == 0
        assert run.plan.epsilon == point.epsilon
        assert run.lineage["data"] == "tiny"
        assert run.lineage["result"]["run"] == point.name
        synthetic = pd.read_parquet(path / "samples.parquet")
        assert len(synthetic) == run.plan.rows == 240, "members' share of the declared rows"
        Table.from_frame(synthetic, SCHEMA)
        report = Report.from_json((path / "metrics.json").read_text())
        row = results[results["run"] == point.name].iloc[0]
        assert report.metrics["tvd2"] == row["tvd2"]
        attacked = Audit.from_json((path / "audit.json").read_text())
        assert attacked.strongest.auc == row["attack_auc"]
        names = {attack.name for attack in attacked.attacks}
        assert {f"{point.recipe.model}_loss", f"{point.recipe.model}_loss_ratio"} <= names


def test_a_run_of_the_sweep_is_the_run_alone(
    finished: tuple[Path, pd.DataFrame, str],
) -> None:
    folder, _, _ = finished
    for point in POINTS[:2]:
        (alone,) = train_fleet(point.recipe, [Seat(split().members, point.epsilon, 0)])
        judged = Run.load(folder / "runs" / point.name)
        pd.testing.assert_frame_equal(judged.sample(50, rng=0), Run.of(alone).sample(50, rng=0))


def test_a_private_folder_does_not_hold_the_digest_of_its_rows(
    finished: tuple[Path, pd.DataFrame, str],
) -> None:
    folder, _, _ = finished
    parts = split()
    digests = [part.digest() for part in (parts.members, parts.holdout, parts.reference)]
    digests.append(hashlib.sha256("".join(digests).encode()).hexdigest())
    for point in POINTS:
        for path in (folder / "runs" / point.name).iterdir():
            content = path.read_bytes()
            assert not any(digest.encode() in content for digest in digests)


def test_it_says_what_it_does(finished: tuple[Path, pd.DataFrame, str]) -> None:
    _, _, said = finished
    assert "floors" in said
    assert "vae (2 runs): 5/5 steps" in said
    for point in POINTS:
        assert f"{point.name}: TVD2" in said


# Again, and again after a failure


def test_a_second_call_does_nothing_again(
    finished: tuple[Path, pd.DataFrame, str], copied: Path, monkeypatch: pytest.MonkeyPatch, inline
) -> None:
    monkeypatch.setattr(grid, "train_fleet", refuse)
    for name in ("_judge_run", "_judge_control"):
        monkeypatch.setattr(sweep, name, refuse)
    before = stamps(copied)
    same(swept(copied), finished[1])
    assert stamps(copied) == before


def test_only_a_missing_run_is_made_again(
    finished: tuple[Path, pd.DataFrame, str], copied: Path, monkeypatch: pytest.MonkeyPatch, inline
) -> None:
    """It has to be trained once more, with its reference model, and is the same run."""
    fleets: list[list[tuple[float, int | None, str]]] = []

    def counted(made: Any, seats: Sequence[Seat], **others: Any) -> list[Trained]:
        fleets.append([(seat.epsilon, seat.seed, seat.role) for seat in seats])
        return train_fleet(made, seats, **others)

    monkeypatch.setattr(grid, "train_fleet", counted)
    gone = POINTS[0].name
    shutil.rmtree(copied / "runs" / gone)
    before = stamps(copied)
    same(swept(copied), finished[1])
    after = stamps(copied)
    assert {path: after[path] for path in before} == before
    assert {Path(path).parts[1] for path in set(after) - set(before)} == {gone}
    assert fleets == [[(1.0, 0, "model"), (math.inf, 0, "reference")]]


def test_a_judge_that_fails_fails_the_sweep(
    finished: tuple[Path, pd.DataFrame, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inline,
) -> None:
    """Its run is missing, not silently left out; the next call picks up the trained fleet."""
    judge = sweep._judge_run

    def broken(source: Path, reference: Path | None, target: Path, *others: Any) -> str:
        if target.name == POINTS[0].name:
            raise UsageError("the judge is ill")
        return judge(source, reference, target, *others)

    monkeypatch.setattr(sweep, "_judge_run", broken)
    with pytest.raises(UsageError, match="the judge is ill"):
        swept(tmp_path / "sweep", with_controls=False)
    assert not (tmp_path / "sweep" / "runs" / POINTS[0].name).exists()
    monkeypatch.setattr(sweep, "_judge_run", judge)
    trained: list[str] = []

    def counted(made: Any, seats: Sequence[Seat], **others: Any) -> list[Trained]:
        trained.append(made[0].model)
        return train_fleet(made, seats, **others)

    monkeypatch.setattr(grid, "train_fleet", counted)
    results = swept(tmp_path / "sweep", with_controls=False)
    assert "vae" not in trained, "it had been trained"
    expected = finished[1][finished[1]["role"] != "control"]
    same(results, expected)
    assert not (tmp_path / "sweep" / "private" / "fleets").exists()


def test_a_training_that_is_interrupted_goes_on(
    finished: tuple[Path, pd.DataFrame, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inline,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(grid, "train_fleet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path / "sweep", with_controls=False)
    with pytest.raises(UsageError, match="no finished run"):
        gather(tmp_path / "sweep")
    monkeypatch.setattr(grid, "train_fleet", train_fleet)
    results = swept(tmp_path / "sweep", with_controls=False)
    same(results, finished[1][finished[1]["role"] != "control"])


def test_unseeded_points_without_controls_or_a_reference_run(tmp_path: Path, inline) -> None:
    judging = replace(JUDGING, reference_model=False)
    point = Point(recipe("vae"), math.inf, None, variant="lr=1")
    results = swept(tmp_path / "sweep", [point], judging=judging, with_controls=False)
    assert results["seed"].isna().all()
    assert results["family"].tolist() == ["vae lr=1"]
    assert "seedentropy" in results["run"][0]
    attacked = Audit.from_json(
        (tmp_path / "sweep" / "runs" / point.name / "audit.json").read_text()
    )
    assert "vae_loss" in {attack.name for attack in attacked.attacks}
    assert "vae_loss_ratio" not in {attack.name for attack in attacked.attacks}


# Names and fleets


def test_points_are_named_apart() -> None:
    points = [
        *POINTS,
        Point(recipe("vae"), 1.0, 1),
        Point(recipe("vae"), 1.0, None),
        Point(recipe("vae", options={"lr": 0.1}), 1.0, 0),
        Point(recipe("vae", privacy={"steps": 6}), 1.0, 0),
        Point(recipe("vae", codec={"bins": 8}), 1.0, 0),
        Point(recipe("vae"), 1.0 + 1e-12, 0),
    ]
    assert len({point.name for point in points}) == len(points)
    assert Point(recipe("vae"), 1.0, 0).name == POINTS[0].name
    assert POINTS[0].name.startswith("vae-eps1-seed0-")
    assert all(
        set(point.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-+") for point in points
    )


MIXED = [
    Point(recipe("vae"), 1.0, 0),
    Point(recipe("vae", privacy={"steps": 8}), 4.0, 0, "steps=8"),
    Point(recipe("vae", options={"lr": 0.05}), math.inf, 0, "lr=.05"),
    Point(recipe("vae", privacy={"batch": 60, "clip": 2.0}), 1.0, 0, "batch=60 clip=2"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs of one program that differ in all that a run has of its own, in one sweep."""
    folder = tmp_path_factory.mktemp("sweeps") / "mixed"
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "ProcessPoolExecutor", Inline)
        swept(folder, MIXED, console=Console(file=said, width=200), with_controls=False)
    return folder, said.getvalue()


def test_runs_of_one_program_train_as_one(mixed: tuple[Path, str]) -> None:
    """Each recipe has a reference model; all eight runs are one fleet."""
    _, said = mixed
    assert "1 fleet for 4 runs and 4 reference models" in said
    assert "vae: 8 runs in 1 fleet" in said
    assert said.count("vae (4 runs)") == said.count("steps ·") > 0


@pytest.mark.parametrize("place", range(len(MIXED)))
def test_a_run_beside_others_is_the_run_alone(
    place: int, mixed: tuple[Path, str], tmp_path: Path, inline
) -> None:
    """Weights, ledger, samples, figures and attacks; and its claim can be checked."""
    point, folder = MIXED[place], mixed[0]
    swept(tmp_path / "alone", [point], with_controls=False)
    one, other = (Run.load(f / "runs" / point.name) for f in (tmp_path / "alone", folder))
    assert other.plan == one.plan and other.recipe == point.recipe
    assert [replace(e, when="") for e in other.ledger.events] == [
        replace(e, when="") for e in one.ledger.events
    ]
    assert other.ledger.executed == one.ledger.executed
    assert other.executed == point.recipe.privacy["steps"]
    left, right = (run.generator.state_dict() for run in (one, other))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6)
    verify(folder / "runs" / point.name)
    same(gather(tmp_path / "alone"), gather_one(folder, point))


def gather_one(folder: Path, point: Point) -> pd.DataFrame:
    results = gather(folder)
    return results[results["run"] == point.name]


# Refusals: before any work, and without a trace


def test_a_point_listed_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="twice"):
        swept(tmp_path / "sweep", [POINTS[0], POINTS[1], POINTS[0]])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        Point(recipe("vae", options={"latent": 0}), 1.0, 0),
        Point(recipe("vae", privacy={"delta": 0.1}), 1.0, 0),
        Point(recipe("vae"), -1.0, 0),
    ],
    ids=["option", "delta", "epsilon"],
)
def test_a_wrong_point_is_refused_before_any_work(
    wrong: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "floors", refuse)
    with pytest.raises(UsageError):
        swept(tmp_path / "sweep", [*POINTS, wrong])
    assert not list(tmp_path.iterdir())


def test_facts_read_off_the_rows_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "floors", refuse)
    columns = tuple(replace(column, provenance="data") for column in SCHEMA.columns)
    drafted = Table(replace(SCHEMA, columns=columns), table().frame)
    rows = Split.random(drafted, stream(0, "split"))
    with pytest.raises(RefusedError, match="provenance"):
        swept(tmp_path / "sweep", rows=rows)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_rows": 1}, "max_rows=1"),
        ({"max_rows": "abc"}, "max_rows=abc"),
        ({"max_candidates": 15}, "max_candidates=15"),
        ({"max_candidates": None}, "max_candidates=None"),
        ({"draws": 0}, "draws=0"),
        ({"draws": 1.5}, "draws=1.5"),
        ({"seed": -1}, "seed"),
        ({"device": "gpu"}, "device=gpu"),
    ],
)
def test_judging_refuses_what_would_fail_after_training(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        Judging(**settings)


@pytest.mark.parametrize("part", ["members", "holdout"])
def test_too_few_rows_for_an_audit_are_refused_before_any_work(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "floors", refuse)
    rows = split()
    few = replace(rows, **{part: getattr(rows, part).take([0, 1, 2])})
    with pytest.raises(UsageError, match=f"{part} part has 3 rows"):
        swept(tmp_path / "sweep", rows=few)
    assert not list(tmp_path.iterdir())


def test_rows_that_floors_refuse_leave_nothing(tmp_path: Path) -> None:
    """A target that is constant among the holdout rows cannot be scored."""
    rows = split()
    label = rows.holdout.frame["rich"].to_numpy() == "no"
    flat = replace(rows, holdout=rows.holdout.take(label.nonzero()[0]))
    with pytest.raises(UsageError, match="rich"):
        swept(tmp_path / "sweep", rows=flat)
    assert not list(tmp_path.iterdir())


def test_other_rows_are_refused(copied: Path, monkeypatch: pytest.MonkeyPatch, inline) -> None:
    monkeypatch.setattr(sweep, "floors", refuse)
    before = stamps(copied)
    with pytest.raises(UsageError, match="other rows"):
        swept(copied, rows=split(1))
    assert stamps(copied) == before


def test_an_empty_folder_holds_no_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished run"):
        gather(tmp_path)
    with pytest.raises(UsageError, match="no finished run"):
        gather(tmp_path / "nowhere")


def test_unfinished_folders_are_no_results(
    finished: tuple[Path, pd.DataFrame, str], copied: Path
) -> None:
    """What a killed judge leaves: no manifest, or everything but the right name."""
    (copied / "runs" / "begun").mkdir()
    shutil.copytree(
        copied / "runs" / POINTS[0].name, copied / "runs" / f".{POINTS[0].name}.partial"
    )
    same(gather(copied), finished[1])
    assert data_name(copied) == "tiny"


def test_runs_of_other_settings_are_not_averaged(copied: Path) -> None:
    """A folder that two sweeps wrote to must not give one interval for both."""
    run = Run.load(copied / "runs" / POINTS[0].name)
    files, lineage = read_folder(copied / "runs" / POINTS[0].name)
    other = replace(run, recipe=replace(run.recipe, piece=7), lineage=lineage)
    judged = {name: files[name] for name in ("metrics.json", "audit.json")}
    other.save(copied / "runs" / "stray", judged)
    with pytest.raises(UsageError, match="differ in settings"):
        gather(copied)


def test_a_damaged_run_is_an_error_not_a_gap(copied: Path) -> None:
    path = copied / "runs" / POINTS[0].name / "metrics.json"
    path.write_text(path.read_text().replace("0", "1", 1))
    with pytest.raises(UsageError, match="differs from its hash"):
        gather(copied)


def test_a_result_without_a_metric_is_an_error(copied: Path) -> None:
    folder = copied / "runs" / POINTS[0].name
    files, lineage = read_folder(folder)
    body = json.loads(files["metrics.json"])
    del body["metrics"]["tvd1"]
    write_folder(folder, {**files, "metrics.json": json.dumps(body).encode()}, lineage)
    with pytest.raises(UsageError, match="tvd1"):
        gather(copied)


# Figures kept apart


APART = replace(JUDGING, apart=True)
CHEAP = [point for point in POINTS if not FAMILIES[point.recipe.model].trained]


def test_figures_kept_apart_are_the_same_figures(
    finished: tuple[Path, pd.DataFrame, str], tmp_path: Path, inline
) -> None:
    results = swept(tmp_path / "sweep", CHEAP, judging=APART)
    usual = finished[1][finished[1]["run"].isin(results["run"])]
    same(results, usual)
    public = {path.name for path in (tmp_path / "sweep").rglob("*") if path.is_file()}
    outside = {
        path.name
        for path in (tmp_path / "sweep").rglob("*")
        if path.is_file() and "private" not in path.relative_to(tmp_path).parts
    }
    assert {"metrics.json", "audit.json", "report.html"} <= public
    assert outside == FILES - {"metrics.json", "audit.json", "report.html"}
    same(gather(tmp_path / "sweep"), results)


def test_a_release_does_not_depend_on_whether_it_can_be_judged(tmp_path: Path, inline) -> None:
    """That the holdout holds too few rows, or one class, is a fact about private rows."""
    whole = split()
    few = replace(whole, holdout=whole.holdout.take(np.arange(2)))
    results = swept(tmp_path / "sweep", CHEAP[:1], rows=few, judging=APART)
    assert results.empty
    (run,) = (tmp_path / "sweep" / "runs").iterdir()
    assert Run.load(run).epsilon <= CHEAP[0].epsilon
    fault = (tmp_path / "sweep" / "private" / run.name / "fault.txt").read_text()
    assert "holdout part has 2 rows" in fault
    with pytest.raises(UsageError, match="no run could be judged: holdout part has 2 rows"):
        gather(tmp_path / "sweep")
    with pytest.raises(UsageError, match="holdout part has 2 rows"):
        swept(tmp_path / "usual", CHEAP[:1], rows=few)
