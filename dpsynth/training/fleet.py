"""Fleet training: R runs (ε × seed × rows × budget × rate), measured and trained as one program."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dpsynth.checks import RefusedError, UsageError
from dpsynth.codec import Codec
from dpsynth.counter import CounterRng
from dpsynth.devices import resolve
from dpsynth.models import Generator
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.journal import Journal
from dpsynth.privacy.ledger import Executed, Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng, derive, fresh_key
from dpsynth.rows import MappedRows
from dpsynth.training.measure import Measured, measure, row_folder, stacked
from dpsynth.training.recipe import Recipe, Seat, build, build_fleet, captured, check_seat

__all__ = ["Trained", "products", "quiet", "train_fleet"]


@dataclass(frozen=True, eq=False)
class Trained:
    """What one seat leaves: a fleet of one, ready to sample."""

    seat: Seat
    recipe: Recipe
    plan: PrivacyPlan
    ledger: Ledger
    codec: Codec
    generator: Generator
    executed: Executed


def train_fleet(
    recipe: Recipe | Sequence[Recipe],
    seats: Sequence[Seat],
    *,
    state: Path | None = None,
    logger: Sequence[Logger] | bool = False,
    callbacks: Sequence[Callback] = (),
    measurer: Callable[..., Measurer] = Measurer,
) -> list[Trained]:
    """Measure, then train all seats as one program.

    Args:
        recipe: How to train: one for all, or one a seat of the same `program`.
        seats: One entry a run, all under one schema.
        state: Folder for what a resumed training needs (keys, the journal of what is paid and
            done, the last checkpoint; private, never published). `None` keeps nothing.
        logger: Lightning loggers.
        callbacks: Lightning callbacks.
        measurer: What answers before DP-SGD; an auditor listens here.

    Returns:
        One `Trained` a seat, in order.

    Raises:
        UsageError: On what `check_seat` refuses, or on a `state` that belongs to another fleet.
        RefusedError: On a callback that would choose by a figure of private rows.
    """
    if not seats:
        raise UsageError("seats=0: a fleet needs at least one run")
    recipes = [recipe] * len(seats) if isinstance(recipe, Recipe) else list(recipe)
    _check_fleet(recipes, seats)
    _check_callbacks(seats, callbacks)
    keys = _keys(recipes, seats, state)
    journal = Journal(None if state is None else state / "journal.jsonl", keys)
    with row_folder(recipes[0], seats, state) as folder:
        found = [
            measure(one, seat, key, journal.sink(run), _file(folder, run), measurer=measurer)
            for run, (one, seat, key) in enumerate(zip(recipes, seats, keys, strict=True))
        ]
        return _train(recipes, seats, keys, found, journal, folder, state, logger, callbacks)


def _file(folder: Path | None, run: int) -> Path | None:
    """Where a run's encoded rows go; they stay in memory without a folder."""
    return None if folder is None else folder / f"{run}.arrow"


def _train(
    recipes: Sequence[Recipe],
    seats: Sequence[Seat],
    keys: Sequence[int],
    measured: Sequence[Measured],
    journal: Journal,
    folder: Path | None,
    state: Path | None,
    logger: Sequence[Logger] | bool,
    callbacks: Sequence[Callback],
) -> list[Trained]:
    """`train_fleet` after measuring; encoded rows lie in `folder`, or in memory."""
    generator = build_fleet(recipes, measured[0].codec.layout)
    secure = measured[0].plan.secure
    rng = _rng(recipes[0], keys, secure)
    start = FleetRng(keys, secure=secure)
    generator.reset(start)
    generator.prepare(
        [m.marginals for m in measured],
        [m.codec.used for m in measured],
        start,
        [m.surveyed for m in measured],
    )
    if generator.trained and any(m.plan.steps for m in measured):
        for m in measured:
            _pay_training(m, recipes[0].model)
        rows = stacked(measured, resolve(recipes[0].device).type, mapped=folder is not None)
        _fit(recipes[0], generator, measured, rows, rng, journal, state, logger, callbacks)
    generator.finish()
    return [
        Trained(
            seat,
            one,
            m.plan,
            m.ledger,
            m.codec,
            _single(one, m, generator, run),
            journal.executed(m.plan.steps),
        )
        for run, (one, seat, m) in enumerate(zip(recipes, seats, measured, strict=True))
    ]


def _check_fleet(recipes: Sequence[Recipe], seats: Sequence[Seat]) -> None:
    """Refuse what cannot train as one program, and what any seat alone would refuse."""
    if len(recipes) != len(seats):
        raise UsageError(f"recipes={len(recipes)} and seats={len(seats)}: give one each")
    for recipe, seat in zip(recipes, seats, strict=True):
        check_seat(recipe, seat)
        if recipe.program() != recipes[0].program():
            raise UsageError(
                "recipes differ in more than what a run has of its own; train them apart"
            )
        if _shape(seat) != _shape(seats[0]):
            raise UsageError("seats have different schemas; train them apart")


def _pay_training(measured: Measured, model: str) -> None:
    """Charge all steps of a run before the first of them."""
    plan, ledger = measured.plan, measured.ledger
    if not plan.steps:
        return
    ledger.pay(plan.training_event(f"dpsgd:{model}"))
    ledger.cross_check()
    if ledger.epsilon > plan.epsilon:
        raise RefusedError(
            f"ledger: ε={ledger.epsilon:.6g} is above the target {plan.epsilon:g}; calibrate again"
        )


def _check_callbacks(seats: Sequence[Seat], callbacks: Sequence[Callback]) -> None:
    """Refuse early stopping and choice of a checkpoint: whatever they watch is a figure of private
    rows that no ledger has paid for."""
    for callback in callbacks:
        if hasattr(callback, "monitor") and any(math.isfinite(seat.epsilon) for seat in seats):
            raise RefusedError(
                f"callback {type(callback).__name__}: chooses by a private figure that is not "
                "charged; train for the planned steps, or with privacy.epsilon=inf"
            )


def _shape(seat: Seat) -> tuple[Any, ...]:
    return seat.table.schema.columns, seat.table.schema.target


def _keys(recipes: Sequence[Recipe], seats: Sequence[Seat], state: Path | None) -> list[int]:
    """One key a seat: from its seed, or from entropy kept in `state` until it is done.

    A seed gives every recipe and ε noise of its own: two runs that shared a draw at different
    scales would cancel it for whoever sees both.
    """
    held = None if state is None else state / "keys"
    if held is not None and held.is_file():
        name, *lines = held.read_text().split()
        if name != _identity(recipes, seats):
            raise UsageError(f"state {str(state)!r}: belongs to another fleet; remove it")
        return [int(line) for line in lines]
    keys = [
        fresh_key() if seat.seed is None else derive(seat.seed, _purpose(recipe, seat))
        for recipe, seat in zip(recipes, seats, strict=True)
    ]
    if held is not None:
        held.parent.mkdir(parents=True, exist_ok=True)
        partial = held.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text("\n".join([_identity(recipes, seats), *map(str, keys)]))
        partial.replace(held)
    return keys


def _identity(recipes: Sequence[Recipe], seats: Sequence[Seat]) -> str:
    """Name of a fleet with its rows: a checkpoint of one must never go on as another, or its noise
    would pay for rows or budgets that no ledger has seen."""
    tables = {id(seat.table): seat.table for seat in seats}
    rows = {key: table.digest() for key, table in tables.items()}
    parts = [
        f"{_purpose(recipe, seat)}/{seat.seed}/{rows[id(seat.table)]}"
        for recipe, seat in zip(recipes, seats, strict=True)
    ]
    # Captured steps draw from another generator: a step repeated with other noise would be two.
    draws = "counter" if captured(recipes[0]) else resolve(recipes[0].device).type
    return hashlib.sha256("\n".join([draws, *parts]).encode()).hexdigest()


def _purpose(recipe: Recipe, seat: Seat) -> str:
    # These say how a step is computed, not what.
    same = replace(recipe, engine="taps", device="auto", rows="auto", capture=None)
    return f"{same.digest()}/{seat.epsilon!r}/{seat.role}"


def _rng(recipe: Recipe, keys: Sequence[int], secure: bool) -> FleetRng:
    """What the steps of a fleet draw from."""
    if captured(recipe):
        return CounterRng(keys, device=resolve(recipe.device).type)
    return FleetRng(keys, device=resolve(recipe.device).type, secure=secure)


class _Blocks(IterableDataset):
    """How many steps each `training_step` takes, until all are done; carries no data."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Tensor]:
        # Read anew each time, so that a restored checkpoint goes on where it stopped.
        while (left := self.generator.total - int(self.generator.completed)) > 0:
            yield torch.tensor(min(left, self.generator.steps_a_block))


def _fit(
    recipe: Recipe,
    generator: Generator,
    measured: Sequence[Measured],
    rows: Tensor | MappedRows,
    rng: FleetRng,
    journal: Journal,
    state: Path | None,
    logger: Sequence[Logger] | bool,
    callbacks: Sequence[Callback],
) -> None:
    plans = [m.plan for m in measured]
    sizes = [m.rows for m in measured]
    batches = PoissonBatches(sizes, [plan.q for plan in plans], piece=recipe.piece)
    generator.bind(
        rows,
        batches,
        plans,
        rng,
        engine=recipe.engine,
        precision=recipe.precision,
        captured=captured(recipe),
        ahead=journal.execute,
    )
    device = resolve(recipe.device).type
    with quiet():
        trainer = lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=list(logger) if isinstance(logger, Sequence) else logger,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
        )
    last = None if state is None else state / "last.ckpt"
    resume = str(last) if last is not None and last.is_file() else None
    loader = DataLoader(_Blocks(generator), batch_size=None)
    try:
        with quiet(), products(recipe.precision):
            trainer.fit(generator, loader, ckpt_path=resume, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"state {str(last)!r}: the checkpoint holds more than tensors; remove it"
        ) from error
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if int(generator.completed) != generator.total:  # stopped from outside, e.g. by a signal
        raise KeyboardInterrupt


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Forward and backward in the format that the bound is proven for."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "32" else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's remarks on devices and products; its warnings are kept."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning's own call into torch, nothing that a user or we could change.
            warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
            yield
    finally:
        logger.setLevel(level)


def _single(recipe: Recipe, measured: Measured, fleet: Generator, run: int) -> Generator:
    """One run of the fleet as a fleet of one."""
    generator = build(recipe, measured.codec.layout, 1)
    done = fleet.completed.cpu().clamp(max=measured.plan.steps)
    state = {
        name: done if name == "completed" else value[run : run + 1].cpu().clone()
        for name, value in fleet.state_dict().items()
    }
    generator.load_state_dict(state)
    generator.finish()
    return generator
