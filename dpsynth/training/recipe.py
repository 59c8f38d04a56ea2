"""Recipe and seat: everything that is settled about a training before it reads a row."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dpsynth.baselines.copula import Copula
from dpsynth.baselines.graphical import Aim, Mst
from dpsynth.baselines.marginal import Independent, MixtureOfProducts, NaiveBayes
from dpsynth.baselines.tree import Tree
from dpsynth.checks import UsageError, check_choice, check_count, check_positive
from dpsynth.codec import Codec, Layout
from dpsynth.data import Table
from dpsynth.devices import resolve
from dpsynth.models import Autoregressive, Diffusion, Gan, Generator, Vae
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.metadata import spent_events
from dpsynth.privacy.plan import NoPrivacy, PrivacyPlan, check_shares
from dpsynth.privacy.precision import PRECISIONS
from dpsynth.privacy.targets import Target
from dpsynth.privacy.targets import epsilon_for as target_epsilon
from dpsynth.training.planner import CODEC, SHARES, bins_for, budget, shares_of, slots

__all__ = [
    "FAMILIES",
    "Recipe",
    "Seat",
    "bins_of",
    "build",
    "build_fleet",
    "captured",
    "check_seat",
    "codec_settings",
    "epsilon_for",
    "plain",
    "plan_of",
]

_PRIVACY = frozenset(PrivacyPlan.__dataclass_fields__) - {"epsilon", "rows", "sigma", "spent"}

FAMILIES: dict[str, type[Generator]] = {
    family.family: family
    for family in (
        Autoregressive,
        Vae,
        Gan,
        Diffusion,
        Independent,
        NaiveBayes,
        MixtureOfProducts,
        Tree,
        Copula,
        Mst,
        Aim,
    )
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
        codec: `bins` and `heaps`; what is left out or `None` is as usual, and how many of the slots
            for bins are in use is then the planner's choice.
        engine: `taps`, `opacus_hooks` or `opacus_ghost`.
        piece: Largest number of records in memory at a time, a run.
        device: `auto`, `cpu` or `cuda`.
        precision: Format of the products that sum clipped gradients: `32`, `tf32` or `bf16`, the
            last two with the engine `taps`; the bound holds in each.
        rows: Where encoded rows are while they are trained on: `device`, or `mapped`, in files in
            the private folder of the fleet, of which each batch reads its own; `auto` maps them
            where they would take more than half of the memory that is free.
        capture: Whether steps are recorded once and replayed; `None` does so on a GPU, with the
            engine `taps` and noise that need not be secure.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, Any] = field(default_factory=dict)
    codec: Mapping[str, int] = field(default_factory=dict)
    engine: str = "taps"
    piece: int = 2048
    device: str = "auto"
    precision: str = "32"
    rows: str = "auto"
    capture: bool | None = None

    def __post_init__(self) -> None:
        check_choice("model", self.model, FAMILIES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_count("piece", self.piece)
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("rows", self.rows, ("auto", "device", "mapped"))
        if self.precision != "32" and self.engine != "taps":
            raise UsageError(
                f"precision={self.precision} with engine={self.engine}: use engine=taps"
            )
        for name in ("options", "privacy", "codec"):
            _check_mapping(name, getattr(self, name))
        for name in self.privacy:
            check_choice("privacy setting", name, _PRIVACY)
        for name in self.codec:
            check_choice("codec setting", name, CODEC)
        shares = _check_mapping("privacy.shares", self.privacy.get("shares", {}))
        check_shares({name: share for name, share in shares.items() if share is not None})
        self._check_capture()

    def _check_capture(self) -> None:
        if self.capture not in (None, True, False):
            raise UsageError(f"capture={self.capture}: must be true, false or null")
        if self.capture and self.engine != "taps":
            raise UsageError(f"capture=true with engine={self.engine}: only taps can be captured")
        if self.capture and self.privacy.get("secure"):
            raise UsageError(
                "capture=true with privacy.secure=true: secure noise is not drawn in a captured "
                "step; use capture=false"
            )

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


def build(recipe: Recipe, layout: Layout, runs: int) -> Generator:
    """An untrained generator of the recipe's family; an unknown option is refused."""
    return build_fleet([recipe] * runs, layout)


def build_fleet(recipes: Sequence[Recipe], layout: Layout) -> Generator:
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
    resolve(recipe.device)


def codec_settings(recipe: Recipe) -> dict[str, int]:
    """`bins` and `heaps` of a recipe, defaults filled in."""
    return slots(recipe.codec)


def bins_of(recipe: Recipe, seat: Seat, plan: PrivacyPlan) -> int:
    """How many bins to make of a number: what the recipe names, else what the planner says."""
    if (named := recipe.codec.get("bins")) is not None:
        return named
    mu = budget(plan.epsilon, plan.delta, plan.spent, plan.contributions)
    return bins_for(Layout.of(seat.table.schema, **codec_settings(recipe)), mu, plan.rows)


def surveys(recipe: Recipe) -> bool:
    """Whether the recipe's family asks for tables of its own choice."""
    family = FAMILIES[recipe.model]
    places = (inspect.signature(part.__init__).parameters for part in family.__mro__[:-1])
    usual = next(place["components"].default for place in places if "components" in place)
    return family.surveys or bool(recipe.options.get("components", usual))


def plan_of(recipe: Recipe, seat: Seat, rows: int) -> PrivacyPlan:
    """The seat's plan, not yet calibrated: shares that nothing would use go to what is left, and
    what the recipe does not name, or names as `None`, is what suits the family."""
    family, schema = FAMILIES[recipe.model], seat.table.schema
    settings = {name: value for name, value in recipe.privacy.items() if value is not None}
    given = {k: v for k, v in settings.pop("shares", {}).items() if v is not None}
    settings.setdefault("clip", family.clip)
    settings.setdefault("delta", 1e-5)
    of = {"unit": settings.get("unit", "record"), "contributions": settings.get("contributions", 1)}
    settings["spent"] = tuple(spent_events(schema, **of))
    if not family.trained:
        settings["steps"] = 0
    if math.isinf(seat.epsilon):
        plan = NoPrivacy(rows, **settings)
    else:
        plan = PrivacyPlan(epsilon=seat.epsilon, rows=rows, **settings)
    plan = replace(plan, shares=_shares(recipe, seat, plan, given))
    suited = family.planned(plan, len(schema.columns))
    return replace(plan, **{k: v for k, v in suited.items() if k not in settings})


def _shares(
    recipe: Recipe, seat: Seat, plan: PrivacyPlan, given: Mapping[str, float]
) -> dict[str, float]:
    """Parts of the squared budget: what is given, else what the planner says; 0 for what is not
    asked."""
    schema, choosing = seat.table.schema, surveys(recipe)
    layout = Layout.of(schema, **codec_settings(recipe))
    mu = budget(plan.epsilon, plan.delta, plan.spent, plan.contributions)
    shares = {**(shares_of(layout, mu, plan.rows) if choosing else SHARES), **given}
    if schema.expected_rows is not None or not math.isfinite(seat.epsilon):
        shares["rows"] = 0.0
    elif shares["rows"] <= 0:
        raise UsageError("privacy.shares.rows=0: declare expected_rows in the schema or pay for it")
    if not Codec.measured_columns(schema, **codec_settings(recipe)):
        shares["codec"] = 0.0
    if not choosing:
        shares["tables"] = 0.0
    if not FAMILIES[recipe.model].trained:
        rest = "tables" if choosing else "marginals"
        shares[rest] = 1 - sum(share for name, share in shares.items() if name != rest)
    return shares


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


def _check_mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UsageError(f"{name}={value}: must map names to values")
    return value


def captured(recipe: Recipe) -> bool:
    """Whether the steps of a recipe are captured on this machine."""
    able = recipe.engine == "taps" and not recipe.privacy.get("secure")
    able &= FAMILIES[recipe.model].trained
    return able and (
        resolve(recipe.device).type == "cuda" if recipe.capture is None else recipe.capture
    )
