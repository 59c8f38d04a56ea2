"""The `dpsynth` command: what each of its words does."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
import pandas as pd
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table as Grid

from dpsynth import datasets
from dpsynth.artifacts import read_folder
from dpsynth.audit.shadow_tables import read_shadows
from dpsynth.audit.tables import audit_table
from dpsynth.checks import RefusedError, UsageError, check_choice, check_count
from dpsynth.configuration import (
    CONF,
    configure,
    expand,
    judging_of,
    logger_of,
    memory_of,
    one_line,
    point_of,
    split_of,
)
from dpsynth.data import Split, Table, check_ending, read_frame, write_frame
from dpsynth.evaluation import Report, evaluate
from dpsynth.frontier.jobs import Job, train_jobs
from dpsynth.frontier.plot import write_frontier
from dpsynth.frontier.results import releases
from dpsynth.frontier.sweep import (
    data_name,
    finished_runs,
    gather,
    run_facts,
    run_sweep,
    unit_name,
)
from dpsynth.launcher import register
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.metadata import Budget, measure, spent_epsilon
from dpsynth.privacy.selection import Selection
from dpsynth.privacy.together import together
from dpsynth.randomness import fresh_key, secure_stream, stream
from dpsynth.release.card import card
from dpsynth.release.verify import verify
from dpsynth.schema import Schema
from dpsynth.suite.run import SUITES, Setting, audit_run
from dpsynth.training.run import Run
from dpsynth.training.select import Choice, select

__all__ = ["main"]

USAGE = """dpsynth: synthetic tables under differential privacy, and the evidence of what they leak

  dpsynth train    KEY=VALUE ...      one run, judged              dpsynth train privacy.epsilon=1
  dpsynth sweep    KEY=V1,V2 ...      a grid, as fleets            dpsynth sweep +experiment=demo
  dpsynth frontier SWEEP              figures and data of a sweep
  dpsynth sample   RUN --rows N       a table from a run
  dpsynth evaluate RUN|TABLE --real R --holdout H
  dpsynth audit    RUN --suite quick|full     attacks, lower bounds and controls of one run
  dpsynth audit-table --synthetic S --candidates C    how likely each candidate was a member
  dpsynth verify   RUN                recompute the claim of a run from its files
  dpsynth select   KEY=V1,V2 ...      train a random number of trials, keep the best, pay for all
  dpsynth inspect  RUN                what is in a run folder, and what it allows an attacker
  dpsynth schema   infer DATA | check SCHEMA DATA | measure DATA DRAFT --epsilon E

`dpsynth COMMAND --help` says more; `dpsynth train --help` lists every key and what it means.
`--debug` shows the traceback of an error. Exit codes: 2 unusable input, 3 refused by policy."""

# What the runs of a sweep cannot differ in.
SHARED = (
    *("data", "evaluation", "audit", "logger"),
    *("release", "private_report", "training.memory"),
)

console = Console(highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    sys.exit(_guarded(lambda: _dispatch(arguments), debug))


def _guarded(work: Callable[[], None], debug: bool) -> int:
    """Exit code of `work`; what went wrong is one line on standard error."""
    try:
        work()
    except (UsageError, HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        print(f"dpsynth: {one_line(error)}", file=sys.stderr)
        return 3 if isinstance(error, RefusedError) else 2
    except BrokenPipeError:  # the reader has seen enough, as in `dpsynth inspect RUN | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a folder that is none, no right to write, a full disk
        if debug:
            raise
        print(f"dpsynth: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dpsynth: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _dispatch(arguments: list[str]) -> None:
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "sweep": _sweep,
        "frontier": _frontier,
        "sample": _sample,
        "evaluate": _evaluate,
        "audit": _audit,
        "audit-table": _audit_table,
        "verify": _verify,
        "select": _select,
        "inspect": _inspect,
        "schema": _schema,
    }
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
    elif arguments[0] in commands:
        commands[arguments[0]](arguments[1:])
    elif arguments[0] in ("-m", "--multirun") or "=" in arguments[0]:
        _multirun(arguments)
    else:
        check_choice("command", arguments[0], commands)


class _Parser(argparse.ArgumentParser):
    """Refuses arguments like everything else does: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")


def _help_keys() -> None:
    """Every key with the comment beside it, group by group."""
    print("KEY=VALUE overrides; a file of a group is chosen by its name, e.g. model=vae\n")
    for path in [CONF / "config.yaml", *sorted(CONF.glob("*/*.yaml"))]:
        print(f"--- {path.relative_to(CONF).with_suffix('')}")
        print(path.read_text().rstrip(), "\n")


def _train(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return _help_keys()
    parsed = OverridesParser.create().parse_overrides(arguments)
    for override in parsed:
        if override.is_sweep_override():
            raise UsageError(f"{override.input_line}: lists several values; use `dpsynth sweep`")
    return _train_one(configure(arguments), None)


def _train_one(cfg: DictConfig, folder: Path | None) -> None:
    """Train and judge one point in a workspace, then move its run to where it was asked for."""
    job = _job_of(cfg, split_of(cfg), folder)
    (fault,) = train_jobs([job], job.out.with_name(f".{job.out.name}.work"), console)
    if fault is not None:
        raise fault
    _say_where(job)


def _job_of(cfg: DictConfig, split: Split, folder: Path | None) -> Job:
    point = point_of(cfg, split.members)
    return Job(
        point,
        split,
        judging_of(cfg),
        data=cfg.data.name,
        out=Path(cfg.out) if cfg.out else (folder or Path("runs") / point.name),
        logger=logger_of(cfg),
        memory=memory_of(cfg),
    )


def _say_where(job: Job) -> None:
    page = f"figures: {job.kept}" if job.judging.apart else f"page: {job.out / 'report.html'}"
    console.print(f"run: {job.out}   {page}", soft_wrap=True)


def _sweep(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return _help_keys()
    grid = expand(arguments)
    configs = [cfg for cfg, _ in grid]
    shared = (*SHARED, "out")
    first = configs[0]
    for cfg in configs:
        for key in shared:
            if OmegaConf.select(cfg, key) != OmegaConf.select(first, key):
                raise UsageError(f"{key}: must be the same for a whole sweep; sweep them apart")
    split = split_of(first)
    points = [point_of(cfg, split.members, variant) for cfg, variant in grid]
    out = Path(first.out or f"runs/sweep-{first.data.name}")
    console.print(f"sweep of {len(points)} runs into {out}")
    table = run_sweep(
        points,
        split,
        out,
        data=first.data.name,
        judging=judging_of(first),
        console=console,
        logger=logger_of(first),
        with_controls=first.audit.controls,
        memory=memory_of(first),
    )
    if not table.empty:
        _draw(table, out, _figures(out), "tvd2")
    return None


def _figures(sweep: Path) -> Path:
    """Where a sweep's figures go: with its private figures, if those are kept apart."""
    apart = any(sweep.glob("private/*/metrics.json"))
    return sweep / "private" / "frontier" if apart else sweep / "frontier"


def _draw(table: pd.DataFrame, sweep: Path, out: Path, x: str) -> None:
    title = f"{data_name(sweep)} · one {unit_name(sweep)} added or removed"
    cost = together(releases(finished_runs(sweep)))
    write_frontier(table, out, title=title, x=x, together=cost)
    console.print(cost.line, soft_wrap=True)
    shown = f"frontier: {out / 'frontier.png'}   interactive: {out / 'frontier.html'}"
    console.print(shown, soft_wrap=True)
    apart = _figures(sweep) != sweep / "frontier"
    what = "runs, to be published" if apart else "runs, each with its report.html"
    console.print(f"{what}: {sweep / 'runs'}", soft_wrap=True)


def _frontier(arguments: list[str]) -> None:
    parser = _Parser(prog="dpsynth frontier", description=gather.__doc__)
    parser.add_argument("sweep", type=Path, help="folder that a sweep wrote")
    parser.add_argument("--x", default="tvd2", help="metric on the fidelity axis")
    parser.add_argument("--out", type=Path, help="folder to write; SWEEP/frontier by default")
    options = parser.parse_args(arguments)
    _draw(gather(options.sweep), options.sweep, options.out or _figures(options.sweep), options.x)


def _sample(arguments: list[str]) -> None:
    parser = _Parser(prog="dpsynth sample", description="Draw a table from a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--rows", type=int, required=True, help="number of rows")
    parser.add_argument("--where", help="condition, e.g. \"income='>50K' and sex=Male\"")
    parser.add_argument("--seed", type=int, help="the same seed gives the same table")
    parser.add_argument("--out", type=Path, required=True, help=".csv or .parquet file")
    options = parser.parse_args(arguments)
    frame = Run.load(options.run).sample(options.rows, where=options.where, rng=options.seed)
    write_frame(frame, options.out)
    console.print(f"{len(frame)} rows: {options.out}")


def _evaluate(arguments: list[str]) -> None:
    parser = _Parser(
        prog="dpsynth evaluate",
        description="Judge any generator's table, or a run, against real rows.",
    )
    parser.add_argument("synthetic", type=Path, help="run folder, or .csv/.parquet table")
    parser.add_argument("--real", type=Path, required=True, help="rows the generator saw")
    parser.add_argument("--holdout", type=Path, required=True, help="rows it did not see")
    parser.add_argument("--schema", type=Path, help="schema file; drafted from the rows if absent")
    parser.add_argument("--target", help="column to predict; the schema's by default")
    parser.add_argument("--max-rows", type=int, help="most rows that trees are fitted to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    options = parser.parse_args(arguments)
    train, holdout, synthetic = _judged_tables(options)
    target = options.target or train.schema.target
    report = evaluate(
        synthetic,
        train=train,
        holdout=holdout,
        target=target,
        rng=stream(options.seed, "evaluate"),
        max_rows=options.max_rows,
    )
    if options.out:
        options.out.write_text(report.to_json())
    _print_report(report)


def _judged_tables(options: argparse.Namespace) -> tuple[Table, Table, Table]:
    """Real, holdout and synthetic rows under one schema: the given one, the run's, or a draft from
    all three, so that a level or value that only the synthetic table has counts as it is."""
    run = Run.load(options.synthetic) if options.synthetic.is_dir() else None
    paths = [options.real, options.holdout] + ([options.synthetic] if run is None else [])
    schema = None if run is None else run.schema
    if options.schema is not None:
        schema = Schema.load(options.schema)
    text = [] if schema is None else [c.name for c in schema.columns if not c.numeric]
    frames = [read_frame(path, text) for path in paths]
    if schema is None:
        for frame, name in zip(frames[1:], ("holdout", "synthetic"), strict=True):
            if odd := set(frame.columns) ^ set(frames[0].columns):
                raise UsageError(f"column {sorted(odd)[0]!r}: not in both --real and the {name}")
        schema = Schema.infer(pd.concat(frames, ignore_index=True), options.target)
    strict = not schema.measured  # else rows lie outside by rule, not by mistake
    tables = [Table.from_frame(_under(frame, schema), schema, strict=strict) for frame in frames]
    if run is not None:
        tables.append(run.sample_table(run.plan.rows, rng=options.seed))
    return tables[0], tables[1], tables[2]


def _under(frame: pd.DataFrame, schema: Schema) -> pd.DataFrame:
    """The schema's columns of a table that may have more."""
    return frame[[name for name in schema.names if name in frame.columns]]


def _print_report(report: Report) -> None:
    grid = Grid("metric", "synthetic", "floor (real)")
    for name, value in report.metrics.items():
        grid.add_row(name, f"{value:.4f}", f"{report.floors[name]:.4f}")
    console.print(grid)
    for note in report.notes:
        console.print(f"note: {note}")


def _audit(arguments: list[str]) -> None:
    parser = _Parser(
        prog="dpsynth audit",
        description="Attack a run, bound its ε from below, and check the audit by known answers.",
        epilog="Exit code 3 when a control fails or the evidence contradicts the claim. A killed "
        "audit goes on where it stopped.",
    )
    usual = Setting()
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "rows", nargs="*", metavar="KEY=VALUE", help="data and split that it was trained with"
    )
    parser.add_argument("--suite", default=usual.suite, help=f"{' or '.join(SUITES)}")
    parser.add_argument("--out", type=Path, help="folder to write; RUN.audit by default")
    parser.add_argument("--candidates", type=int, default=usual.max_candidates)
    parser.add_argument("--shadows", type=int, default=usual.shadows, help="shadow models (full)")
    parser.add_argument("--fits", type=int, default=usual.fits, help="trainings a side (full)")
    parser.add_argument("--canaries", type=int, default=usual.canaries, help="of one run (full)")
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--device", default=usual.device, help="auto, cpu or cuda")
    options = parser.parse_intermixed_args(arguments)
    setting = Setting(
        options.suite,
        max_candidates=options.candidates,
        shadows=options.shadows,
        fits=options.fits,
        canaries=options.canaries,
        seed=options.seed,
        device=options.device,
    )
    name = str(read_folder(options.run)[1].get("data", ""))
    known = [] if any(row.startswith("data=") for row in options.rows) else _rows_of(name)
    cfg = configure([*known, *options.rows])
    out = options.out or options.run.resolve().with_name(f"{options.run.resolve().name}.audit")
    report = audit_run(
        options.run, split_of(cfg), setting, out=out, data=cfg.data.name, console=console
    )
    console.print(f"audit: {out / 'README.md'}   {report.verdict}", soft_wrap=True)
    if report.failed or report.violations:
        raise RefusedError(f"audit {str(out)!r}: {report.verdict}")


def _rows_of(name: str) -> list[str]:
    """Settings of an embedded table by its name."""
    if name not in datasets.names():
        return []
    return ["data=adult"] if name == "adult" else ["data=simulated", f"data.name={name}"]


def _audit_table(arguments: list[str]) -> None:
    parser = _Parser(
        prog="dpsynth audit-table",
        description="Score how likely each candidate was among the rows that any generator saw: "
        "one column an attack, and `combined`; higher = more likely.",
    )
    parser.add_argument("--synthetic", type=Path, required=True, help="the generator's table")
    parser.add_argument("--candidates", type=Path, required=True, help="rows that are asked about")
    parser.add_argument("--reference", type=Path, help="population rows that are neither")
    parser.add_argument("--shadow-dir", type=Path, help="tables of other generators of the kind")
    parser.add_argument("--schema", type=Path, help="schema file; read off the tables if absent")
    parser.add_argument("--cache", type=Path, help="folder that keeps the fitted classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, required=True, help=".parquet or .csv file")
    options = parser.parse_args(arguments)
    check_ending(options.out)  # before the work, not after
    scores = audit_table(
        read_frame(options.synthetic),
        read_frame(options.candidates),
        reference=None if options.reference is None else read_frame(options.reference),
        shadows=() if options.shadow_dir is None else read_shadows(options.shadow_dir),
        schema=None if options.schema is None else Schema.load(options.schema),
        rng=stream(options.seed, "audit-table"),
        device=options.device,
        progress=lambda remark: console.print(remark, soft_wrap=True),
        cache=options.cache,
    )
    write_frame(scores, options.out)
    console.print(f"{len(scores)} scores: {options.out}", soft_wrap=True)


def _verify(arguments: list[str]) -> None:
    parser = _Parser(
        prog="dpsynth verify",
        description="Recompute a run's claim from its files; any disagreement is an error.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    verdict = verify(parser.parse_args(arguments).run)
    console.print(verdict.line, soft_wrap=True)
    if verdict.unchecked:
        console.print(f"not recomputed, hash only: {', '.join(verdict.unchecked)}", soft_wrap=True)


def _select(arguments: list[str]) -> None:
    if {"-h", "--help"} & set(arguments):
        return _help_keys()
    grid = expand(arguments)
    first = grid[0][0]
    if any(cfg.audit.canaries for cfg, _ in grid):
        raise UsageError("audit.canaries: select judges nothing; use `dpsynth train`")
    out = Path(first.out or f"runs/selected-{first.data.name}")
    if out.exists():
        raise UsageError(f"out={str(out)!r}: exists already; choose another or remove it")
    split = split_of(first)
    points = [point_of(cfg, split.members) for cfg, _ in grid]
    for cfg, point in zip([cfg for cfg, _ in grid], points, strict=True):
        same = (point.epsilon, point.seed) == (points[0].epsilon, points[0].seed)
        if not same or cfg.data != first.data:
            raise UsageError("select: privacy, seed and data must be the same for all candidates")
    law = Selection(first.select.mean, first.select.shape, first.select.share)
    choice = Choice(tuple(point.recipe for point in points), law, points[0].epsilon)
    console.print(f"selection among {len(points)} candidates into {out}", soft_wrap=True)
    trained = select(split.members, choice, seed=points[0].seed)
    run = Run.of(trained, data=first.data.name, selection=choice.to_dict())
    facts = run_facts(run, name=out.name, data=first.data.name)
    run.save(out, {"README.md": card(facts).encode()})
    console.print(f"run: {out}   ε {run.epsilon:.4f}", soft_wrap=True)
    return None


def _inspect(arguments: list[str]) -> None:
    parser = _Parser(prog="dpsynth inspect", description="What is in a run folder.")
    parser.add_argument("run", type=Path)
    files, lineage = read_folder(parser.parse_args(arguments).run)
    shown = {
        "claim": _claim(files["ledger.json"].decode()) if "ledger.json" in files else None,
        "lineage": lineage,
        "config": yaml.safe_load(files["config.yaml"]) if "config.yaml" in files else None,
        "ledger": json.loads(files["ledger.json"]) if "ledger.json" in files else None,
        "files": {name: len(content) for name, content in files.items()},
    }
    print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))


def _claim(text: str) -> dict[str, Any]:
    """What a ledger allows an attacker who knows everything but one unit."""
    ledger = Ledger.from_json(text)
    rates, epsilons = (1e-4, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5), (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)
    found, failing = 1 - ledger.tradeoff(rates), ledger.profile(epsilons)
    return {
        "epsilon": ledger.epsilon,
        "delta": ledger.delta,
        "unit": ledger.unit,
        "contributions": ledger.contributions,
        "mu": ledger.mu,
        "advantage": ledger.advantage,
        "tpr_at_fpr": {rate: float(tpr) for rate, tpr in zip(rates, found, strict=True)},
        "delta_at_epsilon": {e: float(d) for e, d in zip(epsilons, failing, strict=True)},
    }


def _schema(arguments: list[str]) -> None:
    parser = _Parser(prog="dpsynth schema", description="Draft, check or measure a schema.")
    actions = parser.add_subparsers(dest="action", required=True)
    infer = actions.add_parser("infer", help="draft a schema from rows; a person must declare it")
    infer.add_argument("data", type=Path)
    infer.add_argument("--target")
    infer.set_defaults(work=_infer)
    check = actions.add_parser("check", help="check rows against a schema")
    check.add_argument("schema", type=Path)
    check.add_argument("data", type=Path)
    check.set_defaults(work=_check)
    measure = actions.add_parser("measure", help="measure what a draft leaves open, and pay for it")
    measure.add_argument("data", type=Path)
    measure.add_argument("draft", type=Path)
    measure.add_argument("--epsilon", type=float, required=True, help="ε of all of it together")
    measure.add_argument("--delta", type=float, default=1e-6, help="δ of it; 1e-6 by default")
    measure.add_argument("--contributions", type=int, default=1, help="most rows of one unit")
    measure.add_argument("--seed", type=int, help="repeatable noise; such a schema is no release")
    measure.set_defaults(work=_measure)
    for action in (infer, measure):
        action.add_argument("--out", type=Path, help="file to write; standard output by default")
    for action in (check, measure):
        action.add_argument("--unit", help="column that says who owns a row")
    options = parser.parse_args(arguments)
    options.work(options)


def _infer(options: argparse.Namespace) -> None:
    text = Schema.infer(read_frame(options.data), options.target).to_json()
    if options.out is None:
        print(text, end="")
        return
    options.out.write_text(text, encoding="utf-8")
    console.print(
        f"{options.out}: every fact was read off the rows; check each, widen bounds, declare "
        "expected_rows, and set provenance to 'declared'"
    )


def _check(options: argparse.Namespace) -> None:
    schema = Schema.load(options.schema)
    table = Table.read(options.data, schema, strict=not schema.measured, unit=options.unit)
    console.print(f"{len(table)} rows keep to {options.schema}", soft_wrap=True)
    for fault in schema.faults():
        console.print(f"a run with finite ε refuses: {fault}", soft_wrap=True)


def _measure(options: argparse.Namespace) -> None:
    out, seed = options.out, options.seed
    if out is not None and (out.exists() or not out.parent.is_dir()):
        # Before any of the budget is spent.
        why = "exists, and measuring again spends again" if out.exists() else "has no folder"
        raise UsageError(f"out={str(out)!r}: {why}; choose another")
    rng = secure_stream(fresh_key(), "metadata")
    noise = "aes256-ctr:system"
    if seed is not None:
        check_count("seed", seed, least=0)
        rng, noise = stream(seed, "metadata"), "philox:seed"
    unit = options.unit or "record"
    draft, frame = Schema.load(options.draft), read_frame(options.data, typed=False)
    budget = Budget(options.delta, epsilon=options.epsilon)
    schema = measure(
        frame, draft, budget, rng=rng, unit=unit, contributions=options.contributions, noise=noise
    )
    if out is None:
        print(schema.to_json(), end="")
    else:
        out.write_text(schema.to_json(), encoding="utf-8")
    new = schema.spent[len(draft.spent) :]
    spent = spent_epsilon(schema, options.delta)
    rows = f"{options.contributions} rows of one {unit}" if options.unit else "one record"
    print(
        f"{out or 'schema'}: {len({e['what'] for e in new})} facts measured; all it holds costs "
        f"ε={spent:.4g} at δ={options.delta:g} for {rows}, counted again by every run under it"
        + ("; fixed seed: whoever knows it can undo the noise" if seed is not None else ""),
        file=sys.stderr if out is None else sys.stdout,
    )


class _Jobs:
    """What Hydra runs: one job, or all that `FleetLauncher` has collected."""

    def __init__(self) -> None:
        self.debug = bool(os.environ.get("HYDRA_FULL_ERROR"))
        self.splits: dict[str, Split] = {}

    def __call__(self, cfg: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir) / "run"
        code = _guarded(lambda: _train_one(cfg, folder), self.debug)
        if code:
            sys.exit(code)

    def together(
        self, jobs: Sequence[Callable[[], tuple[DictConfig, Path]]], sweep: Path
    ) -> list[int]:
        """Train jobs of one table and one way of judging as fleets; an exit code each."""
        codes = [0] * len(jobs)
        groups: dict[str, dict[int, Job]] = {}
        for place, asked in enumerate(jobs):
            codes[place] = self._try(lambda a=asked, p=place: self._join(groups, p, *a()))
        for name, group in groups.items():
            work = sweep / f".fleets-{name}.work"
            faults: list[Exception | None] = []
            code = self._try(
                lambda g=group, w=work, f=faults: f.extend(train_jobs([*g.values()], w, console))
            )
            found = faults or [None] * len(group)
            for (place, job), fault in zip(group.items(), found, strict=True):
                codes[place] = code or self._try(lambda j=job, f=fault: _settle(j, f))
        return codes

    def _try(self, work: Callable[[], None]) -> int:
        """Exit code of `work`; Ctrl-C ends everything."""
        code = _guarded(work, self.debug)
        if code == 130:
            sys.exit(code)
        return code

    def _join(
        self, groups: dict[str, dict[int, Job]], place: int, cfg: DictConfig, folder: Path
    ) -> None:
        """Put a job to those it can share a workspace with; the same point twice goes apart."""
        parts = (*SHARED, "privacy.unit", "privacy.contributions")
        shared = {part: OmegaConf.select(cfg, part) for part in parts}
        text = OmegaConf.to_yaml(OmegaConf.create(shared), sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:8]
        if name not in self.splits:
            self.splits[name] = split_of(cfg)
        job = _job_of(cfg, self.splits[name], folder / "run")
        group = f"{name}-{sum(_has(g, job) for k, g in groups.items() if k.startswith(name))}"
        groups.setdefault(group, {})[place] = job


def _has(group: Mapping[int, Job], job: Job) -> bool:
    return any(other.point.name == job.point.name for other in group.values())


def _settle(job: Job, fault: Exception | None) -> None:
    if fault is not None:
        raise fault
    _say_where(job)


def _multirun(arguments: list[str]) -> None:
    """`python -m dpsynth -m …`: Hydra's own sweepers; the launcher trains the jobs as fleets."""
    register()
    saved = sys.argv
    sys.argv = [saved[0], *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_Jobs())()
    finally:
        sys.argv = saved
