"""Signals: what an attacker measures on the audited model and on each shadow, kept when measured.

Models stand in one order everywhere: the audited one first, then its shadows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from dpsynth.audit.features import neighbour_features
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.devices import resolve
from dpsynth.models import Diffusion, Generator
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.suite.targeted import Queries, achilles
from dpsynth.training.recipe import Recipe, build_fleet
from dpsynth.training.run import Run

__all__ = ["Evidence", "Settings", "as_fleet", "gather", "losses_of", "signals_of"]

# Numbers of one layer of all models at a time: few enough to stay near a core's cache.
CELLS = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        draws: Fixed noises or masks a signal.
        population: Most rows that no model saw, for RMIA.
        targets: Achilles records on each side, fewer where a side has fewer rows.
        queries: Targeted queries a record.
    """

    draws: int = 16
    population: int = 2000
    targets: int = 50
    queries: int = 64

    def __post_init__(self) -> None:
        for name in ("draws", "population", "targets", "queries"):
            check_count(name, getattr(self, name))


@dataclass(frozen=True, eq=False)
class Evidence:
    """Everything measured; `names` says what the signals are, all low for a member.

    Attributes:
        names: Of the signals.
        signals: Of the candidates (models, rows, signals).
        population: Of rows that no model saw (models, z, signals).
        losses: Of the candidates by rate and mask (models, rows, rates, masks); diffusion only.
        features: What a neighbour search tells of the candidates, a frame a model.
        targets: Positions of the Achilles records among the candidates (records,).
        counts: Answers to the targeted queries (models, records, queries).
    """

    names: tuple[str, ...]
    signals: np.ndarray
    population: np.ndarray
    losses: np.ndarray | None
    features: tuple[pd.DataFrame, ...]
    targets: np.ndarray
    counts: np.ndarray


def as_fleet(runs: Sequence[Run], device: str = "cpu") -> Generator:
    """Runs of one program side by side as one generator, so that they are asked in one pass.

    Raises:
        UsageError: On no runs, or runs that could not have trained as one program.
    """
    if not runs:
        raise UsageError("runs=0: signals need at least one model")
    recipes = [_portable(run) for run in runs]
    layout = runs[0].codec.layout
    for recipe, run in zip(recipes, runs, strict=True):
        if recipe.program() != recipes[0].program() or run.codec.layout != layout:
            raise UsageError("runs differ in recipe or schema; measure them apart")
    fleet = build_fleet(recipes, layout)
    states = [run.generator.state_dict() for run in runs]
    joined = {
        name: value if name == "completed" else torch.cat([state[name] for state in states])
        for name, value in states[0].items()
    }
    fleet.load_state_dict(joined)
    fleet.finish()
    return fleet.to(resolve(device))


def signals_of(
    runs: Sequence[Run], table: Table, *, key: int, draws: int = 16, device: str = "cpu"
) -> np.ndarray:
    """`Generator.signals` of a table's rows under each run: float32 (runs, rows, signals).

    Args:
        runs: Runs of one program.
        table: Rows; each run encodes them by its own codec.
        key: Of the fixed noises.
        draws: How many.
        device: Where to compute.
    """
    fleet, codes, piece = _prepared(runs, table, device)
    return fleet.signals(codes, FleetRng([key]), draws=draws, piece=piece).numpy()


def losses_of(
    runs: Sequence[Run], table: Table, *, key: int, draws: int = 16, device: str = "cpu"
) -> np.ndarray | None:
    """`Diffusion.mask_losses` as `signals_of`: (runs, rows, rates, draws); `None` for others."""
    fleet, codes, piece = _prepared(runs, table, device)
    if not isinstance(fleet, Diffusion):
        return None
    return fleet.mask_losses(codes, FleetRng([key]), draws=draws, piece=piece).numpy()


def gather(
    runs: Sequence[Run],
    synthetic: Table,
    members: Table,
    holdout: Table,
    known: Table,
    folder: Path,
    *,
    key: int,
    settings: Settings,
    device: str,
    console: Console,
) -> Evidence:
    """Measure all models, each piece of it once.

    Args:
        runs: The audited run and its shadows.
        synthetic: Table of the audited run; each shadow draws as many rows.
        members: Candidates that the audited run saw.
        holdout: Candidates that it did not see; candidates are members, then holdout.
        known: Rows of the population that no model saw.
        folder: Private; keeps what is done for the next start. It belongs to these very arguments.
        key: Of all random choices.
        settings: How much.
        device: Where to compute.
        console: Where progress is shown.
    """
    folder.mkdir(parents=True, exist_ok=True)
    candidates = Table(members.schema, pd.concat([members.frame, holdout.frame], ignore_index=True))
    ask = {"key": derive(key, "noises"), "draws": settings.draws, "device": device}
    order = stream(key, "z").permutation(len(known))[: settings.population]
    console.print(f"signals: {len(runs)} models, {len(candidates)} candidates", soft_wrap=True)
    losses = _array(folder / "losses.npy", lambda: losses_of(runs, candidates, **ask))
    signals = _array(
        folder / "signals.npy",
        # Averages of what is there already, where there is.
        lambda: _averaged(losses) if losses.size else signals_of(runs, candidates, **ask),
    )
    population = _array(folder / "z.npy", lambda: signals_of(runs, known.take(order), **ask))
    targets = _targets(members, holdout, known, settings.targets, device)
    queries = Queries.draw(settings.queries, known, stream(key, "queries"))
    features, counts = [], []
    for model, run in enumerate(runs):
        draw = _tables(folder, model, run, synthetic, key)
        rng = stream(key, "features", model)
        found = _frame(
            folder / f"features-{model}.parquet",
            lambda draw=draw, rng=rng: neighbour_features(
                candidates, draw(), known, rng, device=device
            ),
        )
        answers = _array(
            folder / f"counts-{model}.npy",
            lambda draw=draw: queries.counts(candidates.take(targets), draw(), device=device),
        )
        features.append(found)
        counts.append(answers)
        console.print(f"  table of model {model + 1} of {len(runs)}: compared", soft_wrap=True)
    return Evidence(
        names=runs[0].generator.signal_names,
        signals=signals,
        population=population,
        losses=losses if losses.size else None,
        features=tuple(features),
        targets=targets,
        counts=np.stack(counts),
    )


def _portable(run: Run) -> Recipe:
    """The recipe as far as it matters where a run is only asked: without how it was trained."""
    return replace(run.recipe, privacy={}, device="auto", capture=None)


def _prepared(runs: Sequence[Run], table: Table, device: str) -> tuple[Generator, Tensor, int]:
    fleet = as_fleet(runs, device)
    codes = torch.stack([run.codec.encode(table) for run in runs])
    cells = CELLS[resolve(device).type]
    return fleet, codes, max(16, cells // (len(runs) * fleet.layout.width))


def _averaged(losses: np.ndarray) -> np.ndarray:
    """`Diffusion.signals` from its `mask_losses`."""
    rates = losses.mean(axis=-1)
    return np.concatenate([rates.mean(axis=-1, keepdims=True), rates], axis=-1)


def _targets(members: Table, holdout: Table, known: Table, count: int, device: str) -> np.ndarray:
    inside = achilles(members, known, min(count, len(members)), device=device)
    outside = achilles(holdout, known, min(count, len(holdout)), device=device)
    return np.concatenate([inside, len(members) + outside])


def _tables(folder: Path, model: int, run: Run, synthetic: Table, key: int) -> Callable[[], Table]:
    """Draws the table of a model at most once, and not at all where nothing asks for it."""
    if model == 0:
        return lambda: synthetic

    def draw() -> Table:
        seed = derive(key, "samples", model)
        frame = _frame(
            folder / f"samples-{model}.parquet",
            lambda: run.sample_table(len(synthetic), rng=seed).frame,
        )
        return Table.from_frame(frame, run.schema, strict=False)

    return draw


def _array(path: Path, work: Callable[[], np.ndarray | None]) -> np.ndarray:
    """What `work` returns, an empty array for nothing; from the file if it was done before."""
    if not path.is_file():
        value = work()
        _written(path, lambda file: np.save(file, np.empty(0) if value is None else value))
    return np.load(path, allow_pickle=False)


def _frame(path: Path, work: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    if not path.is_file():
        frame = work()
        _written(path, lambda file: frame.to_parquet(file, index=False))
    return pd.read_parquet(path)


def _written(path: Path, write: Callable[[BytesIO], object]) -> None:
    """A file, whole or not at all."""
    held = BytesIO()
    write(held)
    partial = path.with_suffix(".partial")
    partial.write_bytes(held.getvalue())
    partial.replace(path)
