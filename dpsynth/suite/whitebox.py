"""White-box scores of one run: its own losses, alone and beside a model of the attacker's rows."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console

from dpsynth.data import Table
from dpsynth.randomness import derive
from dpsynth.suite.parts import Parts, auditors_recipe
from dpsynth.suite.signals import signals_of
from dpsynth.training.grid import Grid, Member
from dpsynth.training.recipe import Seat
from dpsynth.training.run import Run

__all__ = ["reference_member", "reference_run", "white_box"]

Scores = dict[str, tuple[np.ndarray, np.ndarray]]


def reference_member(run: Run, rows: Table, seed: int) -> Member:
    """That model before it is trained."""
    unknown = replace(rows.schema, expected_rows=None)  # the attacker counts its own rows
    seat = Seat(replace(rows, schema=unknown), math.inf, seed, "reference")
    return Member("reference", auditors_recipe(run), seat)


def reference_run(run: Run, rows: Table, folder: Path, seed: int, console: Console) -> Run:
    """One more model by the run's recipe, without privacy, on rows that the attacker knows.

    Args:
        run: The audited run.
        rows: The attacker's.
        folder: Private; a killed training goes on there.
        seed: Of the model.
        console: Where progress is shown.
    """
    grid = Grid({"reference": reference_member(run, rows, seed)}, folder)
    if not grid.is_trained("reference"):
        fleets, _ = grid.fleets(["reference"])
        grid.keep(fleets)
        for fleet in fleets:
            grid.train(
                fleet, ["reference"], data="attacker", console=console, loggers=lambda _: False
            )
    return Run.load(grid.trained("reference"))


def white_box(
    run: Run, reference: Run | None, parts: Parts, *, draws: int, seed: int, device: str
) -> Scores:
    """Minus each of the family's losses, alone and less the reference model's (Zarifzadeh et al.
    2024 with one model): scores of the member and of the other candidates by name."""
    runs = [run] if reference is None else [run, reference]
    key = derive(seed, "white-box")
    # One model at a time: the reference's codec may have other levels.
    found = [
        -signals_of([one], parts.candidates, key=key, draws=draws, device=device)[0] for one in runs
    ]
    size = len(parts.inside)
    scores: Scores = {}
    for place, name in enumerate(run.generator.signal_names):
        own = found[0][:, place].astype(float)
        scores[f"{run.recipe.model}:{name}"] = (own[:size], own[size:])
        if reference is not None:
            rest = own - found[1][:, place]
            scores[f"{run.recipe.model}:{name} ratio"] = (rest[:size], rest[size:])
    return scores
