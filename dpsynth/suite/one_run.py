"""One more training of a run's recipe on its own rows, with gradient canaries: a lower bound on ε
from a single training."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dpsynth.audit.one_run import OneRunAudit
from dpsynth.data import Table
from dpsynth.frontier.sweep import bound_by_canaries
from dpsynth.randomness import stream
from dpsynth.suite.parts import auditors_recipe
from dpsynth.training.canaries import CanaryGrid, kept_scores
from dpsynth.training.grid import Member
from dpsynth.training.recipe import Seat
from dpsynth.training.run import Run

__all__ = ["audit_by_canaries"]

NAME = "canaries"


def audit_by_canaries(
    run: Run, members: Table, folder: Path, *, number: int, seed: int, console: Console
) -> OneRunAudit:
    """Train once more as the run was, with canaries among the records, and guess their coins.

    The training is the auditor's own: it is not published, and its noise follows from `seed`.

    Args:
        run: A run with finite ε and private steps.
        members: The rows it was trained on.
        folder: Private; a killed training goes on there.
        number: Canaries, each in by a fair coin.
        seed: Of the training, the canaries and their coins.
        console: Where progress is shown.
    """
    seat = Seat(members, run.plan.epsilon, seed)
    grid = CanaryGrid({NAME: Member(NAME, auditors_recipe(run), seat)}, folder, number=number)
    if not grid.is_trained(NAME):
        fleets, _ = grid.fleets([NAME])
        grid.keep(fleets)
        for fleet in fleets:
            grid.train(fleet, [NAME], data="members", console=console, loggers=lambda _: False)
    trained = Run.load(grid.trained(NAME))
    scores, coins = kept_scores(grid.kept, NAME)
    events = [trained.plan.training_event("dpsgd")]
    rng = stream(seed, "one run")
    return bound_by_canaries(scores, coins, events, trained.plan, kind="gradient", rng=rng)
