"""Fleet training: R runs (ε × seed × rows × budget × rate), measured and trained as one program."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dpsynth.baselines.marginal import Independent, NaiveBayes
from dpsynth.checks import RefusedError, UsageError, check_choice, check_count, check_positive
from dpsynth.codec import Codec, Layout
from dpsynth.data import Table
from dpsynth.marginals import Marginals
from dpsynth.models import Diffusion, Gan, Generator, Vae
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.events import Event
from dpsynth.privacy.journal import Journal
from dpsynth.privacy.ledger import Executed, Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.privacy.metadata import spent_events
from dpsynth.privacy.plan import NoPrivacy, PrivacyPlan, check_shares
from dpsynth.privacy.targets import Target
from dpsynth.privacy.targets import epsilon_for as target_epsilon
from dpsynth.randomness import FleetRng, Stream, derive, fresh_key, secure_stream, stream

__all__ = [
    "FAMILIES",
    "SHARES",
    "Recipe",
    "Seat",
    "Trained",
    "build",
    "check_seat",
    "codec_settings",
    "epsilon_for",
    "plain",
    "plan_of",
    "train_fleet",
]

# Parts of the squared Gaussian budget; a noisy row count is only taken where none is declared.
_PRIVACY = frozenset(PrivacyPlan.__dataclass_fields__) - {"epsilon", "rows", "sigma", "spent"}
_CODEC = {"bins": 32, "heaps": 16}
SHARES = {"rows": 0.01, "codec": 0.1, "marginals": 0.3}

FAMILIES: dict[str, type[Generator]] = {
    family.family: family for family in (Vae, Gan, Diffusion, Independent, NaiveBayes)
}


@dataclass(frozen=True)
class Recipe:
    """Everything about a training but ε, seed and rows.

    Runs form a fleet where `program` is the same: each has its own budget, batch, steps, clipping
    bound and learning rate.

    Attributes:
        model: Name of a family.
        options: Its settings (widths, learning rate, draws, …).
        privacy: Settings of `PrivacyPlan` other than ε and rows.
        codec: `bins` and `heaps`.
        engine: `taps`, `opacus_hooks` or `opacus_ghost`.
        piece: Largest number of records in memory at a time, a run.
        device: `auto`, `cpu` or `cuda`.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    codec: Mapping[str, int] = field(default_factory=dict)
    engine: str = "taps"
    piece: int = 2048
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("model", self.model, FAMILIES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_count("piece", self.piece)
        for name in ("options", "privacy", "codec"):
            _check_mapping(name, getattr(self, name))
        for name in self.privacy:
            check_choice("privacy setting", name, _PRIVACY)
        for name in self.codec:
            check_choice("codec setting", name, _CODEC)
        check_shares(_check_mapping("privacy.shares", self.privacy.get("shares", {})))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON; `Recipe(**…)` is the inverse."""
        return plain(asdict(self))

    def digest(self) -> str:
        """The same for equal settings."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def program(self) -> str:
        """The same for recipes whose runs can train as one program."""
        shared = {k: v for k, v in self.options.items() if k not in FAMILIES[self.model].own}
        privacy = {"secure": True} if self.privacy.get("secure") else {}
        return replace(self, options=shared, privacy=privacy).digest()


@dataclass(frozen=True, eq=False)
class Seat:
    """One run's place in a fleet.

    Attributes:
        table: The rows it may see.
        epsilon: Target ε; inf for none.
        seed: Fixed seed, or `None` for noise from the operating system's entropy.
        role: `model`, or `reference` for a run on an attacker's rows.
    """

    table: Table
    epsilon: float
    seed: int | None = None
    role: str = "model"


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


@dataclass(frozen=True, eq=False)
class _Measured:
    """A seat after everything that reads rows outside of DP-SGD."""

    plan: PrivacyPlan
    ledger: Ledger
    codec: Codec
    codes: Tensor
    marginals: Marginals


def build(recipe: Recipe, layout: Layout, runs: int) -> Generator:
    """An untrained generator of the recipe's family; an unknown option is refused."""
    return _build([recipe] * runs, layout)


def _build(recipes: Sequence[Recipe], layout: Layout) -> Generator:
    """One run a recipe, all of one program."""
    recipe = recipes[0]
    family = FAMILIES[recipe.model]
    usual = inspect.signature(family).parameters
    own = {
        name: [one.options.get(name, usual[name].default) for one in recipes]
        for name in family.own
        if any(name in one.options for one in recipes)
    }
    try:
        return family(layout, len(recipes), **{**recipe.options, **own})
    except TypeError as error:
        reason = str(error).split("__init__() ")[-1].splitlines()[0]
        raise UsageError(f"model={recipe.model}: {reason}") from error


def check_seat(recipe: Recipe, seat: Seat) -> None:
    """Refuse, before any work, what the training of this seat would refuse; reads no rows.

    Raises:
        UsageError: On settings that a plan, a codec, a family or the engine refuses.
        RefusedError: On a finite ε under a schema with facts read off the data.
    """
    check_positive("epsilon", seat.epsilon, allow_inf=True)
    if math.isfinite(seat.epsilon):
        seat.table.schema.check_public()
    if recipe.privacy.get("secure") and seat.seed is not None:
        raise UsageError(
            f"seed={seat.seed} with privacy.secure=true: secure noise has no seed; leave it out"
        )
    if recipe.privacy.get("unit", "record") != "record" and seat.table.units is None:
        raise UsageError(
            f"privacy.unit={recipe.privacy['unit']}: the table does not say who owns a row; read "
            "it with that unit"
        )
    build(recipe, Layout.of(seat.table.schema, **codec_settings(recipe)), 1)
    plan_of(recipe, seat, seat.table.schema.expected_rows or 1)
    _device(recipe)


def train_fleet(
    recipe: Recipe | Sequence[Recipe],
    seats: Sequence[Seat],
    *,
    state: Path | None = None,
    logger: Sequence[Logger] | bool = False,
    callbacks: Sequence[Callback] = (),
) -> list[Trained]:
    """Measure, then train all seats as one program.

    Args:
        recipe: How to train: one for all, or one a seat of the same `program`.
        seats: One entry a run, all under one schema.
        state: Folder for what a resumed training needs (keys, the journal of what is paid and
            done, the last checkpoint; private, never published). `None` keeps nothing.
        logger: Lightning loggers.
        callbacks: Lightning callbacks.

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
    measured = [
        _measure(one, seat, key, journal.sink(run))
        for run, (one, seat, key) in enumerate(zip(recipes, seats, keys, strict=True))
    ]
    generator = _build(recipes, measured[0].codec.layout)
    secure = measured[0].plan.secure
    rng = FleetRng(keys, device=_device(recipes[0]), secure=secure)
    generator.reset(FleetRng(keys, secure=secure))
    generator.prepare([m.marginals for m in measured], [m.codec.used for m in measured])
    if generator.trained and any(m.plan.steps for m in measured):
        for m in measured:
            _pay_training(m, recipes[0].model)
        _fit(recipes[0], generator, measured, rng, journal, state, logger, callbacks)
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


def _pay_training(measured: _Measured, model: str) -> None:
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


def _measure(recipe: Recipe, seat: Seat, key: int, sink: Callable[[Event], Event]) -> _Measured:
    """Row count (if not declared), codec and marginals, each through a paid mechanism."""
    _check_bounded(seat.table, recipe)
    # Where no row count is public yet the first plan must not depend on the true one.
    rough = plan_of(recipe, seat, seat.table.schema.expected_rows or 1)
    ledger = replace(rough.ledger(_noise(rough, seat)), sink=sink)
    for event in rough.spent:
        ledger.pay(event)
    rows = _public_rows(seat, rough, ledger, key)
    plan = plan_of(recipe, seat, rows).calibrate()
    columns = Codec.measured_columns(seat.table.schema, **codec_settings(recipe))
    measurer = Measurer(ledger, plan.mu("codec"), 2 * len(columns), _stream(plan, key, "codec"))
    codec = Codec.fit(seat.table, measurer, rows=rows, **codec_settings(recipe))
    codes = codec.encode(seat.table)
    parts = Marginals.tables(codec.layout)
    measurer = Measurer(ledger, plan.mu("marginals"), parts, _stream(plan, key, "marginals"))
    marginals = Marginals.measure(codes, codec.layout, codec.used, measurer, codec.schema.names)
    return _Measured(plan, ledger, codec, codes, marginals)


def _check_bounded(table: Table, recipe: Recipe) -> None:
    """Refuse rows of one unit beyond the most that is accounted for."""
    most = recipe.privacy.get("contributions", 1)
    if recipe.privacy.get("unit", "record") == "record" or table.units is None:
        return
    if np.unique(table.units, return_counts=True)[1].max() > most:
        raise RefusedError(
            f"privacy.contributions={most}: a unit has more rows; bound them first with "
            "Table.bounded"
        )


def _noise(plan: PrivacyPlan, seat: Seat) -> str:
    """Where the noise comes from, as the ledger says it."""
    source = "aes256-ctr" if plan.secure else "philox"
    return f"{source}:{'system' if seat.seed is None else 'seed'}"


def _stream(plan: PrivacyPlan, key: int, purpose: str) -> Stream:
    return secure_stream(key, purpose) if plan.secure else stream(key, purpose)


def codec_settings(recipe: Recipe) -> dict[str, int]:
    """`bins` and `heaps` of a recipe, defaults filled in."""
    return {**_CODEC, **recipe.codec}


def plan_of(recipe: Recipe, seat: Seat, rows: int) -> PrivacyPlan:
    """The seat's plan, not yet calibrated: shares that nothing would use go to what is left."""
    family, schema = FAMILIES[recipe.model], seat.table.schema
    settings = dict(recipe.privacy)
    shares = {**SHARES, **settings.pop("shares", {})}
    if schema.expected_rows is not None or not math.isfinite(seat.epsilon):
        shares["rows"] = 0.0
    elif shares["rows"] <= 0:
        raise UsageError("privacy.shares.rows=0: declare expected_rows in the schema or pay for it")
    if not Codec.measured_columns(schema, **codec_settings(recipe)):
        shares["codec"] = 0.0
    if not family.trained:
        settings["steps"] = 0
        shares["marginals"] = 1 - shares["rows"] - shares["codec"]
    settings["clip"] = settings.get("clip") or family.clip
    settings.setdefault("delta", 1e-5)
    of = {"unit": settings.get("unit", "record"), "contributions": settings.get("contributions", 1)}
    settings["spent"] = tuple(spent_events(schema, **of))
    if math.isinf(seat.epsilon):
        return NoPrivacy(rows, shares=shares, **settings)
    return PrivacyPlan(epsilon=seat.epsilon, rows=rows, shares=shares, **settings)


def epsilon_for(recipe: Recipe, table: Table, target: Target) -> float:
    """The greatest ε at which a training of `recipe` on `table` keeps to a target in other terms;
    reads no rows.

    Raises:
        UsageError: Where the number of rows is not public: the target then depends on what will
            be counted.
    """
    rows = table.schema.expected_rows
    if rows is None:
        raise UsageError("privacy.target: needs a public row count; declare expected_rows")
    return target_epsilon(target, lambda e: plan_of(recipe, Seat(table, e), rows).calibrate())


def plain(value: Any) -> Any:
    """Mappings and sequences as dicts and lists, all the way down."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _public_rows(seat: Seat, plan: PrivacyPlan, ledger: Ledger, key: int) -> int:
    """The declared number of rows, or a noisy count that the ledger pays for."""
    declared = seat.table.schema.expected_rows
    if declared is not None:
        return declared
    if not plan.private:
        return len(seat.table)
    noise = Measurer(ledger, plan.mu("rows"), 1, _stream(plan, key, "rows")).histograms("rows", 1)
    return max(1, round(float(noise(np.array([float(len(seat.table))]))[0])))


def _check_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}={value}: must map names to values")
    return value


def _shape(seat: Seat) -> tuple[Any, ...]:
    return seat.table.schema.columns, seat.table.schema.target


def _keys(recipes: Sequence[Recipe], seats: Sequence[Seat], state: Path | None) -> list[int]:
    """One 128-bit key a seat: from its seed, or from entropy kept in `state` until it is done.

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
        fresh_key(secure=bool(recipe.privacy.get("secure")))
        if seat.seed is None
        else derive(seat.seed, _purpose(recipe, seat))
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
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _purpose(recipe: Recipe, seat: Seat) -> str:
    # Engine and device say how a step is computed, not what: the same draws give the same run.
    same = replace(recipe, engine="taps", device="auto")
    return f"{same.digest()}/{seat.epsilon!r}/{seat.role}"


def _device(recipe: Recipe) -> str:
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("device=cuda: no GPU is visible to torch; use device=cpu")
    return recipe.device


class _Blocks(IterableDataset):
    """How many steps each `training_step` takes, until all are done; carries no data."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator

    def __iter__(self) -> Iterator[Tensor]:
        # Read anew each time, so that a restored checkpoint goes on where it stopped.
        while (left := self.generator.total - int(self.generator.completed)) > 0:
            yield torch.tensor(min(left, self.generator.block))


def _fit(
    recipe: Recipe,
    generator: Generator,
    measured: Sequence[_Measured],
    rng: FleetRng,
    journal: Journal,
    state: Path | None,
    logger: Sequence[Logger] | bool,
    callbacks: Sequence[Callback],
) -> None:
    plans = [m.plan for m in measured]
    sizes = [len(m.codes) for m in measured]
    batches = PoissonBatches(sizes, [plan.q for plan in plans], piece=recipe.piece)
    rows = _stack([m.codes for m in measured])
    generator.bind(rows, batches, plans, rng, engine=recipe.engine, ahead=journal.execute)
    device = _device(recipe)
    with _quiet():
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
        with _quiet():
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
def _quiet() -> Iterator[None]:
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


def _stack(codes: Sequence[Tensor]) -> Tensor:
    """Runs side by side (runs, rows, D); shorter ones are padded, never drawn beyond their end."""
    rows = max(len(c) for c in codes)
    padded = [torch.nn.functional.pad(c, (0, 0, 0, rows - len(c))) for c in codes]
    return torch.stack(padded).to(torch.int16)


def _single(recipe: Recipe, measured: _Measured, fleet: Generator, run: int) -> Generator:
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
