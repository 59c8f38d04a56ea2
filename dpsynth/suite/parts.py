"""Parts: the real rows that an audit of one run needs, each in its role."""

from __future__ import annotations

from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import pandas as pd

from dpsynth.artifacts import read_folder
from dpsynth.audit.membership import LEAST
from dpsynth.baselines import controls
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Split, Table
from dpsynth.randomness import stream
from dpsynth.training.recipe import Recipe
from dpsynth.training.run import Run

__all__ = ["Parts", "auditors_recipe", "published_table"]


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows under one schema; no row is in two of members, holdout, attacker and population.

    Attributes:
        members: Every row that the run saw.
        inside: The members that are attacked.
        outside: As many rows that it did not see.
        attacker: What the attacker knows of the population.
        population: More rows of it, which the controls are made of.
    """

    members: Table
    inside: Table
    outside: Table
    attacker: Table
    population: Table

    @classmethod
    def of(cls, split: Split, *, max_candidates: int, seed: int) -> Parts:
        """Cut a split: equally many candidates a side, the reference part in halves.

        Raises:
            UsageError: Where a side has too few rows to be audited.
        """
        check_count("max_candidates", max_candidates, least=2 * LEAST)
        for name, part in (("members", split.members), ("holdout", split.holdout)):
            if len(part) < LEAST:
                raise UsageError(
                    f"{name} part has {len(part)} rows; the audit needs at least {LEAST}"
                )
        attacker, population = controls.halve(split.reference, stream(seed, "halve"))
        size = min(max_candidates // 2, len(split.members), len(split.holdout))
        rng = stream(seed, "candidates")
        inside, outside = (
            part.take(rng.permutation(len(part))[:size]) for part in (split.members, split.holdout)
        )
        return cls(split.members, inside, outside, attacker, population)

    @property
    def candidates(self) -> Table:
        """Members first, then as many others."""
        frames = [self.inside.frame, self.outside.frame]
        return Table(self.inside.schema, pd.concat(frames, ignore_index=True))


def auditors_recipe(run: Run, device: str | None = None) -> Recipe:
    """The run's own recipe for models that an auditor trains by a seed; noise that is secure
    against an attacker has the same law as any other."""
    privacy = {name: value for name, value in run.recipe.privacy.items() if name != "secure"}
    return replace(run.recipe, privacy=privacy, device=device or run.recipe.device)


def published_table(run: Run, folder: Path, seed: int) -> Table:
    """The table that a run folder publishes, or as many rows drawn anew where it holds none."""
    files = read_folder(folder)[0]
    if "samples.parquet" not in files:
        return run.sample_table(run.plan.rows, rng=seed)
    frame = pd.read_parquet(BytesIO(files["samples.parquet"]))
    return Table.from_frame(frame, run.schema, strict=False)
