"""Sweep: a grid of recipes × ε × seeds, trained as fleets, judged run by run, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from lightning.pytorch.loggers import Logger
from rich.console import Console
from threadpoolctl import threadpool_limits

from dpsynth.artifacts import MANIFEST, read_folder, write_folder
from dpsynth.audit import Audit, Ceiling, audit
from dpsynth.audit.bounds import Family
from dpsynth.audit.membership import LEAST
from dpsynth.audit.one_run import OneRunAudit, audit_one_run
from dpsynth.baselines import controls
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Split, Table
from dpsynth.devices import resolve
from dpsynth.evaluation import Report, evaluate, floors
from dpsynth.frontier import results
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.privacy.together import Release, together
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.release.card import card
from dpsynth.release.page import overlays, page
from dpsynth.release.verify import PROFILE
from dpsynth.training.canaries import (
    CanaryGrid,
    CanarySettings,
    canary_key,
    coins_of,
    kept_scores,
    record_canaries,
    scaled_epsilon,
    scaled_profile,
    with_records,
)
from dpsynth.training.expected import expected_events
from dpsynth.training.grid import Grid, Member, RunLoggers
from dpsynth.training.recipe import FAMILIES, Recipe, Seat, check_seat, plan_of
from dpsynth.training.run import Run

__all__ = [
    "Judging",
    "LoggerOf",
    "Point",
    "bound_by_canaries",
    "ceiling_of",
    "data_name",
    "finished_runs",
    "gather",
    "make_runs",
    "run_facts",
    "run_sweep",
    "unit_name",
]

CONTROLS = ("fresh", "p-leak .2", "copy")
LEAK = 0.2
FAULT = "fault.txt"
# The auditor's keys, coins and scores, in the private folder.
KEPT = "canaries"
LoggerOf = Callable[[Path], Sequence[Logger] | bool]
Submit = Callable[..., Future[str]]


@dataclass(frozen=True)
class Judging:
    """How runs are evaluated and attacked.

    Attributes:
        max_rows: Most rows that the trees of TSTR and C2ST are fitted to; `None` for all.
        max_candidates: Most membership candidates, members and holdout together.
        draws: Evaluations of a white-box loss that are averaged.
        reference_model: Whether each recipe trains one more run on the attacker's rows, whose loss
            is subtracted from the white-box scores.
        seed: Of every random choice in judging, the same for all runs so that they are paired.
        device: Where tables are compared: `cpu`, `cuda` or `auto`; the figures are the same.
        apart: Whether figures go to `private/` instead of beside the run, so that everything under
            `runs/` is covered by its ε and may be published.
        canaries: Canaries that each private run is trained with, for a lower bound on its ε.
        canary: What they are, one of `training.canaries.KINDS`.
    """

    max_rows: int | None = None
    max_candidates: int = 8000
    draws: int = 8
    reference_model: bool = True
    seed: int = 0
    device: str = "auto"
    apart: bool = False
    canaries: int = 0
    canary: str = "gradient"

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            check_count("max_rows", self.max_rows, least=2)
        check_count("max_candidates", self.max_candidates, least=2 * LEAST)
        check_count("draws", self.draws)
        check_count("seed of judging", self.seed, least=0)
        resolve(self.device)
        CanarySettings(self.canaries, self.canary)

    @property
    def planted(self) -> CanarySettings:
        """The canaries of a private run."""
        return CanarySettings(self.canaries, self.canary)


@dataclass(frozen=True)
class Point:
    """One cell of a grid.

    Attributes:
        recipe: How to train.
        epsilon: Target ε.
        seed: Fixed seed, or `None`.
        variant: What sets its recipe apart from others of the same family in the grid; results
            are only averaged over runs of one family and variant.
    """

    recipe: Recipe
    epsilon: float
    seed: int | None
    variant: str = ""

    @property
    def name(self) -> str:
        """Folder name: readable, and different for different settings."""
        text = f"{self.recipe.digest()}/{self.epsilon!r}/{self.seed}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        seed = "entropy" if self.seed is None else str(self.seed)
        return f"{self.recipe.model}-eps{self.epsilon:g}-seed{seed}-{digest}"


@dataclass(frozen=True, eq=False)
class _Bench:
    """What every judgement shares.

    Attributes:
        split: All real rows.
        inside: The members that are attacked.
        outside: As many holdout rows.
        attacker: Reference rows that attacks may use.
        population: Reference rows that controls are made of.
        judging: Settings.
        floors: What real rows reach by every metric.
        data: Name of the table.
        sweep: What publishing all runs costs, as cards say it.
        fault: Why nothing can be judged, where figures are kept apart: whether it can be is private
            too, so it must not stop a release.
        private: Folder that is never published.
    """

    split: Split
    inside: Table
    outside: Table
    attacker: Table
    population: Table
    judging: Judging
    floors: dict[str, float]
    data: str
    fault: str = ""
    sweep: Mapping[str, Any] = field(default_factory=dict)
    private: Path = Path("private")


@dataclass(frozen=True, eq=False)
class _Work:
    """What a sweep has to do.

    Attributes:
        grid: Points and reference models to train.
        points: By name.
        reference: Name of each point's reference model, if it has one.
        missing: Names of points that are neither finished nor taken away.
    """

    grid: Grid
    points: Mapping[str, Point]
    reference: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def needed(self) -> frozenset[str]:
        """What must be trained before the missing points can be judged."""
        models = (self.reference[name] for name in self.missing if name in self.reference)
        return frozenset({*self.missing, *models})


def run_sweep(
    points: Sequence[Point],
    split: Split,
    folder: Path,
    *,
    data: str,
    judging: Judging,
    console: Console,
    logger: LoggerOf = lambda _: False,
    workers: int | None = None,
    with_controls: bool = True,
    memory: float | None = None,
) -> pd.DataFrame:
    """Train, judge and write every point that is not there yet.

    Points train in as few fleets as fit into memory (`dpsynth.training.packing`). A killed sweep
    goes on where it stopped: finished runs are left alone, a half-trained fleet resumes from its
    last checkpoint.

    Args:
        points: The grid.
        split: Members, holdout and reference rows; half of the reference is the attacker's, the
            other half makes the fresh and p-leak controls.
        folder: Holds `runs/`, `controls/`, and `private/`: what must not be published, that is a
            mark of the rows, the state of fleets while they train, and figures kept apart.
        data: Name of the table, for cards and lineage.
        judging: How runs are judged.
        console: Where progress is shown.
        logger: Makes the loggers of one run from a folder.
        workers: Judging processes; by default one a core.
        with_controls: Whether to judge the known-answer controls too.
        memory: GiB that fleets may fill; by default most of what is free.

    Returns:
        The results, one row a run; none where figures are kept apart and there are none.
    """
    make_runs(
        points,
        split,
        folder,
        data=data,
        judging=judging,
        console=console,
        loggers=lambda name: logger(folder / "logs" / name),
        workers=workers,
        with_controls=with_controls,
        memory=memory,
    )
    try:
        return gather(folder)
    except UsageError:
        if not judging.apart:
            raise
        return pd.DataFrame()  # whether there are figures is for the custodian to see


def make_runs(
    points: Sequence[Point],
    split: Split,
    folder: Path,
    *,
    data: str,
    judging: Judging,
    console: Console,
    loggers: RunLoggers,
    workers: int | None = None,
    with_controls: bool = True,
    memory: float | None = None,
    alone: bool = False,
    taken: Collection[str] = (),
    faults: dict[str, UsageError] | None = None,
) -> None:
    """What `run_sweep` does before it gathers results.

    Args:
        points, split, folder, data, judging, console, workers, with_controls, memory: As there.
        loggers: Makes the loggers of one run from its name.
        alone: Whether each run is judged as if it were the only one: by a reference model of its
            own seed, and without a word on what publishing all of them costs.
        taken: Names of finished points whose runs are no longer in the folder.
        faults: Takes what went wrong by the name of a point, while the others go on; if not given,
            the first fault ends all.
    """
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise UsageError("the grid holds the same point twice; list each value once")
    for point in points:
        check_seat(point.recipe, Seat(split.members, point.epsilon, point.seed))
        unit = point.recipe.privacy.get("unit", "record")
        judging.planted.check(point.recipe.model, unit)
    _check_same_data(folder, split, judging)
    console.print("measuring floors: members against holdout, and trained on real rows")
    try:
        bench = _bench(split, data, judging)
    except UsageError as error:
        if not judging.apart:
            raise
        bench = _faulty(split, data, judging, str(error))
    bench = replace(bench, private=folder / "private")
    if not alone:
        bench = replace(bench, sweep=_published(points, split.members))
    work = _work(points, bench, folder, alone, taken, memory)
    fleets, notes = work.grid.fleets(work.needed)
    _say(work, fleets, notes, console)
    work.grid.keep(fleets)
    (folder / "private" / "data").write_text(_digest(split, judging))
    with _threads(), _judges(bench, workers or os.cpu_count() or 1, console) as submit:
        wanted = with_controls and not bench.fault
        jobs = _submit_controls(bench, folder, points, submit) if wanted else {}
        failed = {} if faults is None else faults
        jobs |= _submit_ready(work, jobs, failed, folder, submit)
        for fleet in fleets:
            with _noting(fleet, failed, faults is None):
                _train(work, fleet, data, console, loggers)
            jobs |= _submit_ready(work, jobs, failed, folder, submit)
        console.print(f"waiting for {sum(not job.done() for job in jobs.values())} judgements")
        for name, job in jobs.items():
            with _noting([name], failed, faults is None):
                job.result()  # an error in a judge is an error of the sweep
    if not faults:
        work.grid.forget()


@contextlib.contextmanager
def _threads() -> Iterator[None]:
    """Half the cores for training, the rest for judging meanwhile."""
    half, before = max(1, (os.cpu_count() or 1) // 2), torch.get_num_threads()
    with threadpool_limits(half):
        torch.set_num_threads(half)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextlib.contextmanager
def _noting(names: Sequence[str], faults: dict[str, UsageError], strict: bool) -> Iterator[None]:
    """Keep an error as the fault of these runs; `strict` lets it pass on."""
    try:
        yield
    except UsageError as error:
        if strict:
            raise
        faults |= dict.fromkeys(names, error)


def data_name(folder: Path) -> str:
    """Name of the table that a sweep's runs were trained on."""
    names = {read_folder(path)[1]["data"] for path in finished_runs(folder)}
    return ", ".join(sorted(names))


def unit_name(folder: Path) -> str:
    """What the runs of a sweep protect."""
    ledgers = [read_folder(path)[0]["ledger.json"] for path in finished_runs(folder)]
    return ", ".join(sorted({Ledger.from_json(text.decode()).unit for text in ledgers}))


def finished_runs(folder: Path) -> list[Path]:
    """Run folders of a sweep that are whole."""
    return _finished(folder, "runs")


def gather(folder: Path) -> pd.DataFrame:
    """Results of all finished runs and controls under a sweep's folder.

    Raises:
        UsageError: Where there are none, or where runs of one family and variant were trained by
            different recipes, which an interval over seeds must not mix.
    """
    rows: list[dict[str, Any]] = []
    recipes: dict[str, tuple[Path, Any]] = {}
    faults: list[str] = []
    parts = ("runs", "controls", "private/controls")
    for path in [path for part in parts for path in _finished(folder, part)]:
        files, lineage = read_folder(path)
        if "config.yaml" in files:  # a control has no recipe
            _check_recipe(path, files, lineage["result"]["family"], recipes)
        if "metrics.json" not in files:
            files = read_folder(folder / "private" / path.name)[0]
        if FAULT in files:
            faults.append(files[FAULT].decode().strip())
            continue
        report = Report.from_json(files["metrics.json"].decode())
        attacked = Audit.from_json(files["audit.json"].decode())
        rows.append(results.row(report, attacked, lineage["result"]))
    if faults and not rows:
        raise UsageError(f"sweep {str(folder)!r}: no run could be judged: {faults[0]}")
    if not rows:
        raise UsageError(f"sweep {str(folder)!r}: holds no finished run; run `dpsynth sweep` first")
    return results.collect(rows)


def _check_recipe(
    path: Path, files: Mapping[str, bytes], family: str, known: dict[str, tuple[Path, Any]]
) -> None:
    """Remember the recipe of a family's first run and refuse another."""
    recipe = yaml.safe_load(files["config.yaml"])["recipe"]
    first, before = known.setdefault(family, (path, recipe))
    if recipe != before:
        raise UsageError(
            f"runs {first.name} and {path.name}: both are {family!r} but differ in settings; "
            "move one of them out of the sweep"
        )


def _finished(folder: Path, part: str) -> list[Path]:
    """Folders that are whole: a killed judge may have left one under a hidden name."""
    paths = sorted((folder / part).glob("[!.]*"))
    return [path for path in paths if (path / MANIFEST).is_file()]


# -- training ------------------------------------------------------------------------------------


def _work(
    points: Sequence[Point],
    bench: _Bench,
    folder: Path,
    alone: bool,
    taken: Collection[str],
    memory: float | None,
) -> _Work:
    """Points and, where judging wants them, one reference model a recipe, or (`alone`) a recipe
    and seed; it has the seed of the first point it is for."""
    members: dict[str, Member] = {}
    reference: dict[str, str] = {}
    seeds: dict[str, int | None] = {}
    rows = bench.attacker
    unknown = replace(rows.schema, expected_rows=None)  # the attacker counts its own rows
    known = replace(rows, schema=unknown)
    for point in points:
        seat = Seat(_rows_of(point, bench), point.epsilon, point.seed)
        members[point.name] = Member(point.name, point.recipe, seat)
        if not bench.judging.reference_model:
            continue
        seed = seeds.setdefault(f"{point.recipe.digest()}/{alone and point.seed}", point.seed)
        name = "reference-" + Point(point.recipe, math.inf, seed).name
        reference[point.name] = name
        members[name] = Member(name, point.recipe, Seat(known, math.inf, seed, "reference"))
    there = [p.name for p in points if (folder / "runs" / p.name / MANIFEST).is_file()]
    missing = tuple(p.name for p in points if p.name not in {*there, *taken})
    grid = Grid(members, bench.private, memory)
    if bench.judging.canaries and bench.judging.canary == "gradient":
        grid = CanaryGrid(members, bench.private, memory, bench.judging.canaries)
    return _Work(grid, {p.name: p for p in points}, reference, missing)


def _rows_of(point: Point, bench: _Bench) -> Table:
    """Rows that a point trains on: the members, with those of its canaries that are rows."""
    planted, rows = bench.judging.planted, bench.split.members
    if not planted.number or planted.kind != "record" or math.isinf(point.epsilon):
        return rows
    return with_records(rows, planted, canary_key(bench.private / KEPT, point.name, point.seed))


def _say(
    work: _Work, fleets: Sequence[Sequence[str]], notes: Sequence[str], console: Console
) -> None:
    """How many fleets, and why."""
    there = len(work.points) - len(work.missing)
    if not work.missing:
        console.print(f"all {there} runs are there")
        return
    models = len(work.needed) - len(work.missing)
    runs = _count(len(work.missing), "run")
    runs += f" and {_count(models, 'reference model')}" if models else ""
    done = f"; {_count(there, 'run')} done" if there else ""
    console.print(f"{_count(len(fleets), 'fleet')} for {runs}{done}", soft_wrap=True)
    for note in notes:
        console.print(f"  {note}", soft_wrap=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _train(
    work: _Work, fleet: tuple[str, ...], data: str, console: Console, loggers: RunLoggers
) -> None:
    work.grid.train(fleet, work.needed, data=data, console=console, loggers=loggers)


def _submit_ready(
    work: _Work,
    jobs: Mapping[str, Future[str]],
    failed: dict[str, UsageError],
    folder: Path,
    submit: Submit,
) -> dict[str, Future[str]]:
    """Hand the judges every missing run that is trained, its reference model too."""
    ready: dict[str, Future[str]] = {}
    grid = work.grid
    for name in work.missing:
        reference = work.reference.get(name)
        if reference in failed:
            failed.setdefault(name, failed[reference])
        wanted = [name] if reference is None else [name, reference]
        if name in jobs or name in failed or not all(map(grid.is_trained, wanted)):
            continue
        source = None if reference is None else grid.trained(reference)
        target, variant = folder / "runs" / name, work.points[name].variant
        ready[name] = submit(_judge_run, grid.trained(name), source, target, variant)
    return ready


# -- judging -------------------------------------------------------------------------------------


def _faulty(split: Split, data: str, judging: Judging, fault: str) -> _Bench:
    """A bench that says only why there is none."""
    rows = split.reference
    return _Bench(split, rows, rows, rows, rows, judging, {}, data, fault)


def _bench(split: Split, data: str, judging: Judging) -> _Bench:
    for name, part in (("members", split.members), ("holdout", split.holdout)):
        if len(part) < LEAST:
            raise UsageError(f"{name} part has {len(part)} rows; the audit needs at least {LEAST}")
    attacker, population = controls.halve(split.reference, stream(judging.seed, "halve"))
    floor = floors(
        split.members,
        split.holdout,
        target=split.members.schema.target,
        rng=stream(judging.seed, "floors"),
        device=judging.device,
        max_rows=judging.max_rows,
    )
    size = min(judging.max_candidates // 2, len(split.members), len(split.holdout))
    rng = stream(judging.seed, "candidates")
    inside, outside = (
        part.take(rng.permutation(len(part))[:size]) for part in (split.members, split.holdout)
    )
    return _Bench(split, inside, outside, attacker, population, judging, dict(floor), data)


_worker: dict[str, _Bench] = {}


def _start_worker(bench: _Bench) -> None:
    threadpool_limits(1)
    torch.set_num_threads(1)
    _worker["bench"] = bench


@contextlib.contextmanager
def _judges(bench: _Bench, workers: int, console: Console) -> Iterator[Submit]:
    """A pool of judging processes that say what they found when they are done with a run; on an
    error or Ctrl-C what has not begun is dropped."""

    def report(job: Future[str]) -> None:
        if not job.cancelled() and job.exception() is None:
            console.print(f"  {job.result()}", soft_wrap=True)

    def submit(work: Callable[..., str], *arguments: Any) -> Future[str]:
        job = pool.submit(work, *arguments)
        job.add_done_callback(report)
        return job

    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (bench,)
    )
    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


def _judge_run(source: Path, reference: Path | None, target: Path, variant: str) -> str:
    """Sample one trained run, judge it and write its folder."""
    bench = _worker["bench"]
    run = _told_of_canaries(Run.load(source), bench)
    key = None if run.seed is None else derive(run.seed, "samples")
    synthetic = run.sample_table(run.plan.rows, rng=key)
    facts = {**run_facts(run, name=target.name, data=bench.data), **bench.sweep}
    parquet = BytesIO()
    synthetic.frame.to_parquet(parquet, index=False)
    role = "model" if FAMILIES[run.recipe.model].trained else "baseline"
    family = f"{run.recipe.model} {variant}".strip()
    identity = _identity(family, role, run.plan.epsilon, run.plan.delta, run.seed, target)
    extra = {"samples.parquet": parquet.getvalue(), "README.md": card(facts).encode()}
    said = f"{target.name}: judged"
    if bench.judging.apart:  # first, since a run that is there passes for judged
        kept = target.parent.parent / "private" / target.name
        write_folder(kept, _figures_apart(run, reference, synthetic, facts), {"result": identity})
    else:
        figures, said = _figures(run, reference, synthetic, facts)
        extra |= figures
    replace(run, lineage={**run.lineage, "result": identity}).save(target, extra)
    return said


def _told_of_canaries(run: Run, bench: _Bench) -> Run:
    """The run with a word on the canaries that it was trained with."""
    planted = bench.judging.planted
    if not planted.number or not run.plan.private:
        return run
    said = {"number": planted.number, "kind": planted.kind}
    return replace(run, lineage={**run.lineage, "canaries": said})


def _figures_apart(
    run: Run, reference: Path | None, synthetic: Table, facts: Mapping[str, Any]
) -> dict[str, bytes]:
    """The figures, or why there are none; either way the release goes on."""
    try:
        if _worker["bench"].fault:
            raise UsageError(_worker["bench"].fault)
        return _figures(run, reference, synthetic, facts)[0]
    except UsageError as error:
        return {FAULT: f"{error}\n".encode()}


def _figures(
    run: Run, reference: Path | None, synthetic: Table, facts: Mapping[str, Any]
) -> tuple[dict[str, bytes], str]:
    """Evaluation and audit of one run as files, and one line of them."""
    bench = _worker["bench"]
    other = None if reference is None else Run.load(reference)
    scores = _white_box(run, other, bench)
    report, attacked = _judge(synthetic, bench, scores, ceiling_of(run))
    shown = overlays(bench.split.members, synthetic)
    judged = {**facts, "metrics": report.metrics, "floors": report.floors, "audit": attacked}
    files = {
        "metrics.json": report.to_json().encode(),
        "audit.json": attacked.to_json().encode(),
        "README.md": card(judged).encode(),
        "report.html": page(facts, report, attacked, shown).encode(),
    }
    said = _line(facts["name"], report, attacked)
    if "canaries" in run.lineage:
        found = _one_run(run, other, facts["name"], bench)
        files["canaries.json"] = found.to_json().encode()
        said = f"{said}\n    {found.line}"
    return files, said


def _one_run(run: Run, reference: Run | None, name: str, bench: _Bench) -> OneRunAudit:
    """Lower bounds on ε of what the run's canaries went through: gradients through DP-SGD alone,
    records through all that read the table."""
    planted, plan, seed = bench.judging.planted, run.plan, bench.judging.seed
    if planted.kind == "gradient":
        scores, coins = kept_scores(bench.private / KEPT, name)
        events = [plan.training_event("dpsgd")]
    else:
        key = canary_key(bench.private / KEPT, name, run.seed)
        rows = record_canaries(run.schema, planted.number, key)
        coins = coins_of(key, planted.number)
        scores = _scored(run, rows, bench)
        scores = scores if reference is None else scores - _scored(reference, rows, bench)
        events = run.ledger.events[len(plan.spent) :]  # the schema was measured before them
    rng = stream(seed, f"one run:{name}")
    return bound_by_canaries(scores, coins, events, plan, kind=planted.kind, rng=rng)


def bound_by_canaries(
    scores: np.ndarray,
    coins: np.ndarray,
    events: Sequence[Event],
    plan: PrivacyPlan,
    *,
    kind: str,
    rng: np.random.Generator,
) -> OneRunAudit:
    """Lower bounds on ε of events that canaries went through.

    Args:
        scores: Of each canary (canaries,), higher for "in".
        coins: Whether it was in (canaries,).
        events: What read the canaries, as claimed.
        plan: Whose δ and unit the claim has.
        kind: What a canary was.
        rng: Of the simulated attacks.
    """
    group = plan.contributions
    family = Family.of_profiles(
        lambda scale: scaled_profile(events, scale, group),
        lambda scale: scaled_epsilon(events, scale, plan.delta, group),
        steps=16,
    )
    return audit_one_run(scores, coins, family, delta=plan.delta, kind=kind, rng=rng)


def _judge_control(name: str, seed: int, target: Path) -> str:
    """Evaluate and attack one control; its rows are real, so only the figures are kept."""
    bench = _worker["bench"]
    rng = stream(seed, f"control:{name}")
    members, population = bench.split.members, bench.population
    if name == "fresh":
        table = controls.fresh(population, len(population), rng)
    elif name == "copy":
        table = controls.copy(members)
    else:
        table = controls.p_leak(members, population, LEAK, len(members), rng)
    report, attacked = _judge(table, bench, {}, Ceiling.none(), seed)
    files = {
        "metrics.json": report.to_json().encode(),
        "audit.json": attacked.to_json().encode(),
    }
    identity = _identity(name, "control", math.inf, 0.0, seed, target)
    write_folder(target, files, {"result": identity})
    return _line(target.name, report, attacked)


def _submit_controls(
    bench: _Bench, folder: Path, points: Sequence[Point], submit: Submit
) -> dict[str, Future[str]]:
    seeds = sorted({p.seed for p in points if p.seed is not None}) or [0]
    home = folder / ("private/controls" if bench.judging.apart else "controls")
    return {
        target.name: submit(_judge_control, name, seed, target)
        for name in CONTROLS
        for seed in seeds
        if not ((target := home / f"{name}-seed{seed}") / MANIFEST).is_file()
    }


def _judge(
    synthetic: Table,
    bench: _Bench,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
    ceiling: Ceiling,
    seed: int = 0,
) -> tuple[Report, Audit]:
    judging, split = bench.judging, bench.split
    report = evaluate(
        synthetic,
        train=split.members,
        holdout=split.holdout,
        rng=stream(judging.seed, "evaluate"),
        device=judging.device,
        max_rows=judging.max_rows,
        floors=bench.floors,
    )
    attacked, _ = audit(
        synthetic,
        members=bench.inside,
        holdout=bench.outside,
        reference=bench.attacker,
        white_box=scores,
        ceiling=ceiling,
        max_candidates=judging.max_candidates,
        rng=stream(judging.seed, "audit", seed),
        device=judging.device,
    )
    return report, attacked


def _white_box(
    run: Run, reference: Run | None, bench: _Bench
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The family's loss, alone and minus a reference model's, of all candidates."""
    parts = (bench.inside, bench.outside)
    own = tuple(_scored(run, part, bench) for part in parts)
    name = f"{run.recipe.model}_loss"
    attacks = {name: (own[0], own[1])}
    if reference is not None:
        other = tuple(_scored(reference, part, bench) for part in parts)
        attacks[f"{name}_ratio"] = (own[0] - other[0], own[1] - other[1])
    return attacks


def _scored(run: Run, table: Table, bench: _Bench) -> np.ndarray:
    """White-box scores of rows (rows,), by the same draws for every model."""
    rng = FleetRng([derive(bench.judging.seed, "white-box")])
    codes = run.codec.encode(table)[None]
    return run.generator.scores(codes, rng, draws=bench.judging.draws)[0].numpy()


def ceiling_of(run: Run) -> Ceiling:
    """What no attack on this run can beat, from its own ledger's privacy profile."""
    if not run.plan.private:
        return Ceiling.none()
    return Ceiling.from_profile(PROFILE, run.ledger.profile(PROFILE).tolist())


def _published(points: Sequence[Point], members: Table) -> dict[str, Any]:
    """What publishing all points costs, for each card; from plans alone, so the number of rows must
    be public. Nothing for a single one."""
    rows = members.schema.expected_rows
    if rows is None or len(points) < 2:
        return {}
    planned = []
    for point in points:
        plan = plan_of(point.recipe, Seat(members, point.epsilon), rows).calibrate()
        events = tuple(expected_events(point.recipe, members.schema, plan))
        of = {"unit": plan.unit, "contributions": plan.contributions}
        spent = len(plan.spent)
        planned.append(Release(point.name, point.epsilon, plan.delta, events, spent, **of))
    return {"sweep_runs": len(points), "sweep_epsilon": together(planned).published}


# -- words ---------------------------------------------------------------------------------------


def run_facts(run: Run, *, name: str, data: str) -> dict[str, Any]:
    """What card and report page say of a run."""
    plan = run.plan
    facts: dict[str, Any] = {
        "name": name,
        "family": run.recipe.model,
        "suits": run.generator.suits,
        "epsilon": run.epsilon,
        "delta": plan.delta,
        "data": data,
        "seed": run.seed,
        "unit": plan.unit,
        "relation": plan.relation,
        "noise": run.ledger.noise,
        "accountant": "PLD (dp-accounting), cross-checked by PRV (Opacus)",
        "accountant_version": version("dp-accounting"),
        "expected_rows": plan.rows,
        "columns": len(run.schema.columns),
        "target": run.schema.target,
        "metadata": "levels and bounds as declared in schema.json; bins, heaps and marginals "
        "measured with noise and charged",
        "tuning": "not counted: families were developed on UCI Adult, the planner on others",
        "version": run.lineage["versions"]["dpsynth"],
        "created": run.lineage["created"],
        "ledger": [
            {
                "what": e.what,
                "mechanism": e.mechanism,
                "params": f"σ={e.sigma:.4g}, q={e.q:.4g}, steps={e.steps}",
            }
            for e in run.ledger.events
        ],
    }
    if run.executed:
        facts |= {"sampler": "Poisson", "sample_rate": plan.q, "steps": run.executed}
        facts |= {"noise_multiplier": plan.noise, "clip": plan.bound}
    if "canaries" in run.lineage:
        facts["limits"] = [CanarySettings(**run.lineage["canaries"]).told]
    return facts


def _identity(
    family: str, role: str, epsilon: float, delta: float, seed: int | None, target: Path
) -> dict[str, Any]:
    return {
        "family": family,
        "role": role,
        "epsilon": epsilon,
        "delta": delta,
        "seed": seed,
        "run": target.name,
    }


def _line(name: str, report: Report, attacked: Audit) -> str:
    best = attacked.strongest
    utility = next((k for k in ("tstr_gbt_auc", "tstr_gbt_r2") if k in report.metrics), None)
    learned = "" if utility is None else f"{utility[5:]} {report.metrics[utility]:.3f}  "
    return (
        f"{name}: TVD2 {report.metrics['tvd2']:.3f}  {learned}"
        f"attack {best.name} AUC {best.auc:.3f} (ceiling {attacked.ceiling_auc:.3f})"
    )


def _check_same_data(folder: Path, split: Split, judging: Judging) -> None:
    """Refuse to go on in a folder that was begun with other rows, or other canaries."""
    mark = folder / "private" / "data"
    if mark.is_file() and mark.read_text() != _digest(split, judging):
        raise UsageError(
            f"sweep {str(folder)!r}: was begun with other rows or canaries; choose another folder"
        )


def _digest(split: Split, judging: Judging) -> str:
    parts = [part.digest() for part in (split.members, split.holdout, split.reference)]
    if judging.canaries:
        parts.append(f"{judging.canaries}/{judging.canary}")
    return hashlib.sha256("".join(parts).encode()).hexdigest()
