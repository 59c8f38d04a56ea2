"""Defects: planted into the engine, the sampler and the schema of a run, to see whether an audit
finds them. That nothing is found in a sound engine is worth as much as what is found in these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor

from dpsynth.audit import audit_sampler, audit_steps
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.models import Generator
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.randomness import FleetRng, derive
from dpsynth.schema import Column, Schema
from dpsynth.suite.steps import AUDITED_Q, observe_steps
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat, check_seat
from dpsynth.training.run import Run

__all__ = [
    "EXPECTED",
    "ExactShares",
    "HalfNoise",
    "NoClip",
    "NoNoise",
    "Shuffled",
    "missed",
    "run_defects",
]


# -- what is planted ---------------------------------------------------------------------------


class NoNoise(Callback):
    """Sums are released as they are."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module._engine.optimizer.scale.zero_()


class HalfNoise(Callback):
    """Noise of σ/2 where σ is paid for."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module._engine.optimizer.scale.mul_(0.5)


class NoClip(Callback):
    """Noise for C, but nothing is clipped to it."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        clipper = pl_module._engine.clipper
        clipper.bound = torch.full_like(clipper.bound, math.inf)


class _ShuffledBatches:
    """Epochs over a shuffled table in batches of equal size, accounted as Poisson sampling."""

    def __init__(self, sound: PoissonBatches) -> None:
        self._rows = int(sound.rows[0])
        self._size = max(1, round(self._rows * sound.q[0]))

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The next batch of the epoch, for every run."""
        epoch, place = divmod(step, self._rows // self._size)
        order = rng.at("shuffle", epoch).uniform(self._rows).argsort(1).cpu()
        index = order[:, place * self._size : (place + 1) * self._size]
        yield index, torch.ones_like(index, dtype=torch.bool)


class Shuffled(Callback):
    """Shuffled batches, all runs of one size."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module._batches = _ShuffledBatches(pl_module._batches)


class ExactShares(Callback):
    """Shares of the target's levels counted without noise, beside the noisy ones that are paid."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        generator: Generator = pl_module
        assert isinstance(generator._codes, Tensor)
        group = generator.layout.group_of(generator._codes)
        for run, rows in enumerate(generator._batches.rows.long().tolist()):
            counts = torch.bincount(group[run, :rows].long(), minlength=generator.layout.groups)
            generator.prior_logits[run] = (counts / rows).clamp_min(1e-6).log()


# -- controls ----------------------------------------------------------------------------------

_ENGINE: Mapping[str, Callable[[], list[Callback]]] = MappingProxyType(
    {
        "sound": list,
        "no noise": lambda: [NoNoise()],
        "sigma/2": lambda: [HalfNoise()],
        "clipping skipped": lambda: [NoClip()],
        "shuffled batches": lambda: [Shuffled()],
    }
)
# What an audit with any power says of each.
EXPECTED: Mapping[str, bool] = MappingProxyType(
    {name: name != "sound" for name in (*_ENGINE, "private min/max", "unseen category")}
)
_RUNS, _STEPS = 2, 60


def run_defects(
    run: Run | None = None,
    *,
    seed: int = 0,
    alpha: float = 1e-3,
    console: Console | None = None,
    device: str = "auto",
) -> Mapping[str, bool]:
    """Plant every defect and ask the audits whether they see it; the sound engine stands beside.

    Engines and samplers are judged by the tests of `audit_steps` and `audit_sampler`, each of which
    flags a sound one with probability `alpha` at most; schemas by what refuses them before a row is
    read.

    Args:
        run: Whose network, engine, noise and schema are taken; by default a small one is trained on
            rows made up here.
        seed: Of made-up rows, noise and canaries.
        alpha: Chance that the noise, or the sampling, of the sound engine is flagged.
        console: Where progress is shown; by default nowhere.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        Whether each was flagged; `EXPECTED` says which should have been.
    """
    run = _small(seed, device) if run is None else run
    flagged = {}
    for name, plant in _ENGINE.items():
        flagged[name] = _engine_flagged(run, plant(), seed, alpha, device)
        if console is not None:
            said = "flagged" if flagged[name] else "not flagged"
            console.print(f"{name}: {said}", soft_wrap=True)
    flagged["private min/max"] = _refused(lambda: _train_on_private_bounds(run))
    flagged["unseen category"] = _refused(lambda: _read_unseen(run, seed))
    return MappingProxyType(flagged)


def missed(flagged: Mapping[str, bool]) -> tuple[str, ...]:
    """Controls that did not come out as they must: defects not seen, or `sound` flagged."""
    return tuple(name for name, wanted in EXPECTED.items() if flagged[name] != wanted)


def _engine_flagged(run: Run, plant: list[Callback], seed: int, alpha: float, device: str) -> bool:
    seen = observe_steps(run, runs=_RUNS, steps=_STEPS, seed=seed, device=device, plant=plant)
    noise = audit_steps(
        seen.scores,
        seen.present,
        seen.noise,
        sigma=run.plan.noise,
        epsilon_of=lambda sigma: 1 / sigma,
        alpha=alpha,
    )
    return bool(noise.flags or audit_sampler(seen.batches, q=AUDITED_Q, alpha=alpha).flags)


def _refused(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except UsageError:
        return True
    return False


def _train_on_private_bounds(run: Run) -> None:
    """Bounds, or levels where no column is a number, that are those of the rows."""
    schema = run.schema
    columns = sorted(schema.columns, key=lambda column: not column.numeric)
    private = replace(columns[0], provenance="data", open=False)
    rest = [private if c.name == private.name else c for c in schema.columns]
    table = Table(replace(schema, columns=tuple(rest)), run.sample(64, rng=0))
    check_seat(run.recipe, Seat(table, run.plan.epsilon))


def _read_unseen(run: Run, seed: int) -> None:
    """A level that the schema does not declare, or a number beyond its bounds."""
    frame = run.sample(64, rng=derive(seed, "unseen")).astype(object)
    columns = sorted(run.schema.columns, key=lambda column: column.numeric)
    column = columns[0]
    beyond = "unseen" + "".join(column.levels) if column.upper is None else column.upper + 1
    frame.loc[7, column.name] = beyond
    Table.from_frame(frame, run.schema, strict=True)


def _small(seed: int, device: str) -> Run:
    """A run that trains in a blink."""
    rng = np.random.default_rng(derive(seed, "small"))
    columns = (
        Column("age", "integer", lower=0, upper=99),
        Column("job", "categorical", ("clerk", "cook", "nurse")),
        Column("rich", "categorical", ("no", "yes")),
    )
    schema = Schema(columns, target="rich", expected_rows=400, source="made for an audit")
    frame = pd.DataFrame(
        {
            "age": rng.integers(0, 100, 400),
            "job": rng.choice(columns[1].levels, 400),
            "rich": rng.choice(columns[2].levels, 400),
        }
    )
    recipe = Recipe("vae", {"hidden": [8], "latent": 2}, {"batch": 16, "steps": 10}, device=device)
    seat = Seat(Table.from_frame(frame, schema), 4.0, derive(seed, "training"))
    (trained,) = train_fleet(recipe, [seat])
    return Run.of(trained, data="made for an audit")
