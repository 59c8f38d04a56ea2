"""Sweep: a grid of recipes × ε × seeds, trained as fleets, judged run by run, resumable."""

from __future__ import annotations

import contextlib
import hashlib
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from dpsynth.audit.membership import LEAST
from dpsynth.baselines import controls
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Split, Table
from dpsynth.evaluation import Report, evaluate, floors
from dpsynth.frontier import results
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.together import Release, together
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.release.card import card
from dpsynth.release.page import overlays, page
from dpsynth.release.verify import PROFILE
from dpsynth.training.callbacks import default_callbacks
from dpsynth.training.expected import expected_events
from dpsynth.training.fleet import FAMILIES, Recipe, Seat, check_seat, plan_of, train_fleet
from dpsynth.training.run import Run

__all__ = [
    "Judging",
    "LoggerOf",
    "Point",
    "data_name",
    "finished_runs",
    "gather",
    "run_facts",
    "run_sweep",
    "unit_name",
]

CONTROLS = ("fresh", "p-leak .2", "copy")
LEAK = 0.2
FAULT = "fault.txt"
LoggerOf = Callable[[Path], Sequence[Logger] | bool]
Submit = Callable[..., Future[str]]


@dataclass(frozen=True)
class Judging:
    """How runs are evaluated and attacked.

    Attributes:
        max_rows: Most rows that the trees of TSTR and C2ST are fitted to; `None` for all.
        max_candidates: Most membership candidates, members and holdout together.
        draws: Evaluations of a white-box loss that are averaged.
        reference_model: Whether each fleet trains one more run on the attacker's rows, whose loss
            is subtracted from the white-box scores.
        seed: Of every random choice in judging, the same for all runs so that they are paired.
        apart: Whether figures go to `private/` instead of beside the run, so that everything under
            `runs/` is covered by its ε and may be published.
    """

    max_rows: int | None = None
    max_candidates: int = 8000
    draws: int = 8
    reference_model: bool = True
    seed: int = 0
    apart: bool = False

    def __post_init__(self) -> None:
        if self.max_rows is not None:
            check_count("max_rows", self.max_rows, least=2)
        check_count("max_candidates", self.max_candidates, least=2 * LEAST)
        check_count("draws", self.draws)
        check_count("seed of judging", self.seed, least=0)


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
) -> pd.DataFrame:
    """Train, judge and write every point that is not there yet.

    Points of one recipe train as one fleet. A killed sweep goes on where it stopped: finished runs
    are left alone, a half-trained fleet resumes from its last checkpoint.

    Args:
        points: The grid.
        split: Members, holdout and reference rows; half of the reference is the attacker's, the
            other half makes the fresh and p-leak controls.
        folder: Holds `runs/`, `controls/`, and `private/`: what must not be published, that is a
            mark of the rows, the state of fleets while they train, and figures kept apart.
        data: Name of the table, for cards and lineage.
        judging: How runs are judged.
        console: Where progress is shown.
        logger: Makes the logger of one fleet from a folder.
        workers: Judging processes; by default one a core.
        with_controls: Whether to judge the known-answer controls too.

    Returns:
        The results, one row a run; none where figures are kept apart and there are none.
    """
    names = [point.name for point in points]
    if len(set(names)) < len(names):
        raise UsageError("the grid holds the same point twice; list each value once")
    for point in points:
        check_seat(point.recipe, Seat(split.members, point.epsilon, point.seed))
    _check_same_data(folder, split)
    console.print("measuring floors: members against holdout, and trained on real rows")
    try:
        bench = _bench(split, data, judging)
    except UsageError as error:
        if not judging.apart:
            raise
        bench = _faulty(split, data, judging, str(error))
    bench = replace(bench, sweep=_published(points, split.members))
    (folder / "private").mkdir(parents=True, exist_ok=True)
    (folder / "private" / "data").write_text(_digest(split))
    cores = os.cpu_count() or 1
    before = torch.get_num_threads()
    with (
        _judges(bench, workers or cores, console) as submit,
        threadpool_limits(max(1, cores // 2)),
    ):
        torch.set_num_threads(max(1, cores // 2))
        try:
            wanted = with_controls and not bench.fault
            jobs = _submit_controls(bench, folder, points, submit) if wanted else []
            for recipe, fleet in _fleets(points):
                jobs += _train(recipe, fleet, bench, folder, submit, console, logger)
            console.print(f"waiting for {sum(not job.done() for job in jobs)} judgements")
            for job in jobs:
                job.result()  # an error in a judge is an error of the sweep
        finally:
            torch.set_num_threads(before)
    shutil.rmtree(folder / "private" / "fleets", ignore_errors=True)
    try:
        return gather(folder)
    except UsageError:
        if not judging.apart:
            raise
        return pd.DataFrame()  # whether there are figures is for the custodian to see


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


def _fleets(points: Sequence[Point]) -> list[tuple[Recipe, list[Point]]]:
    """Points by recipe, in order of appearance."""
    fleets: list[tuple[Recipe, list[Point]]] = []
    for point in points:
        for recipe, fleet in fleets:
            if recipe == point.recipe:
                fleet.append(point)
                break
        else:
            fleets.append((point.recipe, [point]))
    return fleets


def _train(
    recipe: Recipe,
    fleet: Sequence[Point],
    bench: _Bench,
    folder: Path,
    submit: Submit,
    console: Console,
    logger: LoggerOf,
) -> list[Future[str]]:
    """Train one fleet if any of its runs is missing, and hand its runs to the judges."""
    missing = [p for p in fleet if not (folder / "runs" / p.name / MANIFEST).is_file()]
    if not missing:
        console.print(f"{recipe.model}: all {len(fleet)} runs are there")
        return []
    digest = hashlib.sha256("/".join(p.name for p in fleet).encode()).hexdigest()[:8]
    state = folder / "private" / "fleets" / f"{recipe.model}-{digest}"
    trained = [state / point.name for point in fleet]
    reference = state / "reference" if bench.judging.reference_model else None
    wanted = trained if reference is None else [*trained, reference]
    if not all((path / MANIFEST).is_file() for path in wanted):
        seats = [Seat(bench.split.members, p.epsilon, p.seed) for p in fleet]
        if reference is not None:
            rows = bench.attacker
            unknown = replace(rows.schema, expected_rows=None)  # the attacker counts its own rows
            known = replace(rows, schema=unknown)
            seats.append(Seat(known, math.inf, fleet[0].seed, "reference"))
        runs = train_fleet(
            recipe,
            seats,
            state=state,
            logger=FAMILIES[recipe.model].trained and logger(folder / "logs" / state.name),
            callbacks=default_callbacks(f"{recipe.model} ({len(fleet)} runs)", state, console),
        )
        for path, one in zip(wanted, runs, strict=True):
            Run.of(one, data=bench.data).save(path)
    return [
        submit(_judge_run, state / p.name, reference, folder / "runs" / p.name, p.variant)
        for p in missing
    ]


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
    run = Run.load(source)
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
    scores = _white_box(run, None if reference is None else Run.load(reference), bench)
    report, attacked = _judge(synthetic, bench, scores, _ceiling(run))
    shown = overlays(bench.split.members, synthetic)
    judged = {**facts, "metrics": report.metrics, "floors": report.floors, "audit": attacked}
    files = {
        "metrics.json": report.to_json().encode(),
        "audit.json": attacked.to_json().encode(),
        "README.md": card(judged).encode(),
        "report.html": page(facts, report, attacked, shown).encode(),
    }
    return files, _line(facts["name"], report, attacked)


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
) -> list[Future[str]]:
    seeds = sorted({p.seed for p in points if p.seed is not None}) or [0]
    home = folder / ("private/controls" if bench.judging.apart else "controls")
    return [
        submit(_judge_control, name, seed, target)
        for name in CONTROLS
        for seed in seeds
        if not ((target := home / f"{name}-seed{seed}") / MANIFEST).is_file()
    ]


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
    )
    return report, attacked


def _white_box(
    run: Run, reference: Run | None, bench: _Bench
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The family's loss, alone and minus a reference model's, of all candidates."""
    draws = bench.judging.draws

    def scored(model: Run, table: Table) -> np.ndarray:
        rng = FleetRng([derive(bench.judging.seed, "white-box")])
        return model.generator.scores(model.codec.encode(table)[None], rng, draws=draws)[0].numpy()

    parts = (bench.inside, bench.outside)
    own = tuple(scored(run, part) for part in parts)
    name = f"{run.recipe.model}_loss"
    attacks = {name: (own[0], own[1])}
    if reference is not None:
        other = tuple(scored(reference, part) for part in parts)
        attacks[f"{name}_ratio"] = (own[0] - other[0], own[1] - other[1])
    return attacks


def _ceiling(run: Run) -> Ceiling:
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
        "tuning": "not counted: the defaults of all families were chosen on UCI Adult",
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


def _check_same_data(folder: Path, split: Split) -> None:
    """Refuse to go on in a folder that was begun with other rows."""
    mark = folder / "private" / "data"
    if mark.is_file() and mark.read_text() != _digest(split):
        raise UsageError(f"sweep {str(folder)!r}: was begun with other rows; choose another folder")


def _digest(split: Split) -> str:
    parts = (split.members, split.holdout, split.reference)
    return hashlib.sha256("".join(part.digest() for part in parts).encode()).hexdigest()
