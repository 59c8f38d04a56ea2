"""Hydra stops here: configurations, and the typed objects that they describe."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ValueType
from hydra.errors import HydraException
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf

from dpsynth import datasets
from dpsynth.checks import RefusedError, UsageError, check_choice, check_count, check_positive
from dpsynth.data import Split, Table
from dpsynth.frontier.sweep import Judging, LoggerOf, Point
from dpsynth.privacy.targets import Target
from dpsynth.randomness import stream
from dpsynth.schema import Schema
from dpsynth.training.planner import AUTO, family_of
from dpsynth.training.recipe import Recipe, epsilon_for
from dpsynth.training.release import check_release

__all__ = [
    "CONF",
    "configure",
    "expand",
    "judging_of",
    "logger_of",
    "memory_of",
    "one_line",
    "point_of",
    "split_of",
]

_HERE = Path(__file__).resolve().parent
# In a wheel conf/ lies in the package, in a checkout beside it.
CONF = _HERE / "conf" if (_HERE / "conf").is_dir() else _HERE.parent / "conf"

# Settings of a recipe that stand under `training`.
_TRAINING = frozenset(Recipe.__dataclass_fields__) - {"model", "options", "privacy", "codec"}


def one_line(error: Exception) -> str:
    """First line of what an error says; of its cause where Hydra wraps one."""
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def configure(overrides: Sequence[str]) -> DictConfig:
    """Compose `conf/config.yaml` with overrides; unknown keys and missing values are refused."""
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", list(overrides))
    except ValueError as error:  # what Hydra makes of `=1`
        raise UsageError(one_line(error)) from error
    missing = OmegaConf.missing_keys(cfg)
    if missing:
        raise UsageError(f"{sorted(missing)[0]}: needs a value; give {sorted(missing)[0]}=…")
    return cfg


def expand(overrides: Sequence[str]) -> list[tuple[DictConfig, str]]:
    """One configuration for every combination of the listed values, and of `grid`'s where the
    command line lists none; with it what sets its recipe apart (not model, ε or seed)."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    fixed = [o.input_line for o in parsed if not o.is_sweep_override()]
    for override in parsed:
        if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
            raise UsageError(f"{override.input_line}: list the values instead of glob()")
    listed = {
        o.get_key_element(): [str(v) for v in o.sweep_string_iterator()]
        for o in parsed
        if o.is_sweep_override()
    }
    first = configure([cast(str, f) for f in fixed] + [f"{k}={v[0]}" for k, v in listed.items()])
    given = {o.get_key_element() for o in parsed}
    grid = cast(dict[str, Any], OmegaConf.to_container(first)).get("grid")
    if not isinstance(grid, dict):
        raise UsageError(f"grid={grid}: must map keys to lists of values")
    listed |= {k: [str(v) for v in vs] for k, vs in _flat(grid).items() if k not in given}
    choices = [[f"{key}={value}" for value in values] for key, values in listed.items()]
    return [
        (configure([*map(str, fixed), *choice]), _variant(choice))
        for choice in itertools.product(*choices)
    ]


def _variant(choice: Sequence[str]) -> str:
    usual = ("model", "privacy.epsilon", "seed")
    pairs = [c.lstrip("+").split("=", 1) for c in choice]
    return " ".join(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in pairs if k not in usual)


def _flat(grid: dict[str, Any], above: str = "") -> dict[str, list[Any]]:
    flat: dict[str, list[Any]] = {}
    for key, value in grid.items():
        if isinstance(value, dict):
            flat |= _flat(cast(dict[str, Any], value), f"{above}{key}.")
        elif isinstance(value, list) and value:
            flat[above + key] = value
        else:
            raise UsageError(f"grid.{above}{key}={value}: must be a list of values")
    return flat


def point_of(cfg: DictConfig, members: Table | None = None, variant: str = "") -> Point:
    """The typed point of a grid that a configuration describes.

    Args:
        cfg: The configuration.
        members: Rows to train on; their schema turns a `privacy.target` into an ε and
            `model=auto` into a family.
        variant: What sets its recipe apart from others of its family.
    """
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    privacy = dict(plain["privacy"])
    given, target = privacy.pop("epsilon", None), privacy.pop("target", None)
    secure, seed = privacy.pop("secure", None), plain["seed"]
    privacy["secure"] = bool(plain["release"]) if secure is None else secure
    usual = {"unit": "record", "contributions": 1, "secure": False}
    # What says nothing beyond the default is left out, so that a recipe has one spelling.
    privacy = {k: v for k, v in privacy.items() if k not in usual or v != usual[k]}
    for name in plain["training"]:
        check_choice("training setting", name, {*_TRAINING, "memory"})
    training = {name: value for name, value in plain["training"].items() if name != "memory"}
    if "precision" in training:
        training["precision"] = str(training["precision"])  # a number to whoever types 32
    memory_of(cfg)
    if seed is not None:
        check_count("seed", seed, least=0)
    name, options = plain["model"]["name"], plain["model"]["options"]

    def made(family: str, settings: Mapping[str, Any]) -> Recipe:
        return Recipe(family, settings, privacy, plain["codec"], **training)

    if name == AUTO:
        recipe, epsilon = _suited(made, options, given, target, members)
    else:
        recipe = made(name, options)
        epsilon = _epsilon(recipe, given, target, members)
    if plain["release"]:
        check_release(recipe, epsilon, seed, None if members is None else members.schema)
    return Point(recipe, epsilon, seed, variant)


def _suited(
    made: Callable[[str, Mapping[str, Any]], Recipe],
    options: Mapping[str, Any],
    given: object,
    target: dict[str, Any],
    members: Table | None,
) -> tuple[Recipe, float]:
    """Recipe of the planner's family, as its own file has it but for the options that are given,
    and its ε."""
    if members is None:
        raise UsageError("model=auto: needs the table it is to suit")

    def recipe_of(family: str, chosen: Mapping[str, Any]) -> Recipe:
        usual = yaml.safe_load((CONF / "model" / f"{family}.yaml").read_text(encoding="utf-8"))
        return made(family, {**usual["options"], **chosen, **options})

    # A target in other terms gives an ε once there is a family; an ε gives the family.
    recipe = recipe_of("autoregressive", {})
    epsilon = _epsilon(recipe, given, target, members)
    suited = recipe_of(*family_of(members.schema, epsilon, recipe.privacy, recipe.codec))
    return suited, _epsilon(suited, given, target, members)


def _epsilon(recipe: Recipe, given: object, target: dict[str, Any], members: Table | None) -> float:
    """ε as given, or the greatest that keeps to a target in other terms."""
    target = {k: v for k, v in target.items() if v is not None}
    if set(target) <= {"fpr"}:
        return _number("privacy.epsilon", 1.0 if given is None else given)
    if given is not None:
        raise UsageError("privacy.epsilon and privacy.target: both are given; give one of them")
    if members is None:
        raise UsageError("privacy.target: needs the table it is to hold for")
    if "tpr" not in target:
        target.pop("fpr", None)
    return epsilon_for(recipe, members, Target.from_dict(target))


def _number(name: str, value: object) -> float:
    try:
        return float(cast(str, value))
    except (TypeError, ValueError):
        raise UsageError(f"{name}={value}: must be a number") from None


def memory_of(cfg: DictConfig) -> float | None:
    """GiB that fleets may fill; `None` for most of what is free."""
    memory = OmegaConf.select(cfg, "training.memory")
    if memory is None:
        return None
    number = _number("training.memory", memory)
    check_positive("training.memory", number)
    return number


def split_of(cfg: DictConfig) -> Split:
    """Read the table that `data` names and cut it into members, holdout and reference."""
    data = cfg.data
    check_choice("data.split", data.split, ("official", "random"))
    if data.path is None:
        table = datasets.load(data.name)
    elif data.schema is None:
        raise UsageError("data.schema: needs a value; give data=file data.path=… data.schema=…")
    else:
        schema, unit = Schema.load(str(data.schema)), _unit(cfg)
        # Under a measured schema rows lie outside by rule, not by mistake.
        strict = data.strict
        if strict is None:
            strict = not (cfg.release or schema.measured)
        if strict and cfg.release:
            raise RefusedError(
                "data.strict=true: its messages quote rows; leave it out with release=true"
            )
        table = Table.read(str(data.path), schema, strict=strict, unit=unit)
        table = table.bounded(cfg.privacy.contributions, stream(data.split_seed, "unit"))
    left_out = cast(dict[str, Any], OmegaConf.to_container(data)).get("drop")
    if not isinstance(left_out, list):
        raise UsageError(f"data.drop={left_out}: must be a list, as in data.drop=[name]")
    table = table.select(table.schema.drop(left_out).names)
    rng = stream(data.split_seed, "split")
    if data.split == "official":
        if data.path is not None:
            raise UsageError("data.split=official: a file has no published split; use random")
        return Split.official(table, datasets.official_train_rows(data.name), rng)
    return Split.random(table, rng, holdout=data.holdout, reference=data.reference)


def _unit(cfg: DictConfig) -> str | None:
    """Column that says who a row belongs to, if the unit of privacy is not the row itself."""
    return None if cfg.privacy.unit == "record" else cfg.privacy.unit


def judging_of(cfg: DictConfig) -> Judging:
    """How runs are judged, from the `evaluation` and `audit` groups."""
    return Judging(
        cfg.evaluation.max_rows,
        cfg.audit.max_candidates,
        cfg.audit.draws,
        cfg.audit.reference_model,
        cfg.audit.seed,
        cfg.training.device,
        apart=bool(cfg.private_report or cfg.release),
        canaries=cfg.audit.canaries,
        canary=cfg.audit.canary,
    )


def logger_of(cfg: DictConfig) -> LoggerOf:
    """Loggers of one run: CSV always, W&B where asked for."""
    check_choice("logger.mode", cfg.logger.mode, ("offline", "online"))

    def make(folder: Path) -> list[Logger]:
        loggers: list[Logger] = [CSVLogger(folder.parent, name=folder.name)]
        if cfg.logger.wandb:
            folder.mkdir(parents=True, exist_ok=True)
            settings = {"project": cfg.logger.project, "offline": cfg.logger.mode == "offline"}
            # The runs of a fleet train at the same time, in one process.
            loggers.append(
                WandbLogger(folder.name, save_dir=folder, reinit="create_new", **settings)
            )
        return loggers

    return make
