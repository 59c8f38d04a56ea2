"""Jobs: runs that are asked for one by one, trained together, each left in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.loggers import Logger
from rich.console import Console

from dpsynth.artifacts import MANIFEST, read_folder
from dpsynth.checks import UsageError
from dpsynth.data import Split
from dpsynth.frontier.sweep import Judging, LoggerOf, Point, make_runs
from dpsynth.training.recipe import Seat, check_seat

__all__ = ["Job", "train_jobs"]


@dataclass(frozen=True, eq=False)
class Job:
    """One run that somebody asked for.

    Attributes:
        point: How it is trained.
        split: Its rows.
        judging: How it is judged.
        data: Name of the table.
        out: Folder to write; figures kept apart go to `OUT.private` beside it.
        logger: Makes its loggers from a folder.
        memory: GiB that fleets may fill; `None` for most of what is free.
    """

    point: Point
    split: Split
    judging: Judging
    data: str
    out: Path
    logger: LoggerOf
    memory: float | None = None

    @property
    def kept(self) -> Path:
        """Where figures go that are kept apart."""
        return self.out.with_name(f"{self.out.name}.private")


def train_jobs(jobs: Sequence[Job], work: Path, console: Console) -> list[Exception | None]:
    """Train and judge jobs that share rows and judging in a workspace, then move each run to where
    it was asked for.

    Every run is what it would have been alone. The workspace goes when all is done. It stays after
    an interruption or a full disk, or where a run failed and it was there before: the next call
    goes on in it and leaves the runs alone that were moved by then.

    Args:
        jobs: Jobs that differ in point, `out` and nothing else.
        work: The workspace.
        console: Where progress is shown.

    Returns:
        What went wrong with each job, or `None`.
    """
    begun = work.exists()
    faults: list[Exception | None] = [None] * len(jobs)
    wanted: dict[str, int] = {}
    taken: set[str] = set()
    for place, job in enumerate(jobs):
        try:
            if begun and _is_there(job):
                taken.add(job.point.name)
            else:
                _check(job, [jobs[other] for other in wanted.values()])
            wanted[job.point.name] = place
        except UsageError as error:
            faults[place] = error
    own = {name: jobs[place] for name, place in wanted.items()}
    failed: dict[str, Exception] = {}
    try:
        if own.keys() - taken:
            _make(own, taken, work, console, failed)
    finally:
        for name in own.keys() - taken:
            _deliver(own[name], work, failed)
    for name, error in failed.items():
        if name in wanted:
            faults[wanted[name]] = error
    lost = any(isinstance(fault, OSError) for fault in faults)  # a full disk: what is there counts
    if not any(faults) or not (begun or lost):
        shutil.rmtree(work, ignore_errors=True)
    return faults


def _check(job: Job, others: Sequence[Job]) -> None:
    """Refuse what would fail alone, so that it does not fail the others."""
    for path in (job.out, job.kept):
        if path.exists() or any(path in (other.out, other.kept) for other in others):
            raise UsageError(f"out={str(path)!r}: exists already; choose another or remove it")
    if any(job.point.name == other.point.name for other in others):
        raise UsageError(f"{job.point.name}: asked for twice in one workspace")
    check_seat(job.point.recipe, Seat(job.split.members, job.point.epsilon, job.point.seed))


def _is_there(job: Job) -> bool:
    """Whether this very run was moved to its place before."""
    if not (job.out / MANIFEST).is_file():
        return False
    result: Mapping[str, object] = read_folder(job.out)[1].get("result", {})
    return result.get("run") == job.point.name


def _make(
    jobs: Mapping[str, Job],
    taken: set[str],
    work: Path,
    console: Console,
    failed: dict[str, Exception],
) -> None:
    first = next(iter(jobs.values()))
    found: dict[str, UsageError] = {}

    def loggers(name: str) -> Sequence[Logger] | bool:
        job = jobs[name]
        return job.logger(job.out.parent / "logs" / job.out.name)

    try:
        make_runs(
            [job.point for job in jobs.values()],
            first.split,
            work,
            data=first.data,
            judging=first.judging,
            console=console,
            loggers=loggers,
            with_controls=False,
            memory=first.memory,
            alone=True,
            taken=taken,
            faults=found,
        )
    except (UsageError, OSError) as error:  # a fault of what they share
        failed |= dict.fromkeys(jobs.keys() - taken, error)
    failed |= found


def _deliver(job: Job, work: Path, failed: dict[str, Exception]) -> None:
    """Move a run to its place, if it is there."""
    run, private = work / "runs" / job.point.name, work / "private" / job.point.name
    if not (run / MANIFEST).is_file():
        return
    try:
        job.out.parent.mkdir(parents=True, exist_ok=True)
        if job.judging.apart:
            shutil.move(private, job.kept)
        shutil.move(run, job.out)
        failed.pop(job.point.name, None)
    except OSError as error:
        failed[job.point.name] = error
