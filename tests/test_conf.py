"""Every file of `conf/` composes, works, says what its keys mean, and holds the code's defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from omegaconf import OmegaConf
from tiny import SCHEMA, frame, table

import dpsynth
from dpsynth.baselines.marginal import NaiveBayes
from dpsynth.checks import UsageError
from dpsynth.codec import Codec
from dpsynth.configuration import (
    CONF,
    configure,
    expand,
    judging_of,
    logger_of,
    point_of,
    split_of,
)
from dpsynth.data import Split, Table
from dpsynth.frontier.sweep import Judging, run_sweep
from dpsynth.launcher import FleetLauncher
from dpsynth.models import Generator
from dpsynth.privacy.plan import STAGES, PrivacyPlan
from dpsynth.training.planner import AUTO, CODEC
from dpsynth.training.recipe import FAMILIES, Recipe, Seat, check_seat

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))


def body(path: Path) -> dict[str, Any]:
    return yaml.safe_load((CONF / path).read_text())


@pytest.fixture
def mine(tmp_path: Path) -> list[str]:
    """What `data=file` needs."""
    frame().to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "schema.json").write_text(SCHEMA.to_json())
    return [f"data.path={tmp_path / 'rows.csv'}", f"data.schema={tmp_path / 'schema.json'}"]


def choice(path: Path, mine: list[str]) -> list[str]:
    group, name = path.parts[0], path.stem
    chosen = f"+{group}={name}" if group == "experiment" else f"{group}={name}"
    return [chosen, *mine] if (group, name) == ("data", "file") else [chosen]


# Every file works


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_composes_into_a_run_that_can_start(
    path: Path, mine: list[str], adult: Table, tmp_path: Path
) -> None:
    cfg = configure(choice(path, mine))
    point = point_of(cfg, adult)
    for epsilon in (point.epsilon, math.inf):
        check_seat(point.recipe, Seat(adult, epsilon, point.seed))
    assert isinstance(judging_of(cfg), Judging)
    assert isinstance(logger_of(cfg)(tmp_path / "logs")[0], CSVLogger)


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[0] == "experiment"], ids=str)
def test_every_recipe_of_every_grid_can_start(path: Path, adult: Table) -> None:
    grid = body(path).get("grid", {})
    points = [
        point_of(cfg, adult, variant)
        for cfg, variant in expand([f"+experiment={path.stem}", "privacy.epsilon=1", "seed=0"])
    ]
    for point in points:
        for epsilon in grid.get("privacy.epsilon", [1]):
            check_seat(point.recipe, Seat(adult, float(epsilon), 0))
    for seed in grid.get("seed", [0]):
        assert point_of(configure([f"seed={seed}"]), adult).seed == seed
    assert len({point.name for point in points}) == len(points)


def test_every_model_has_a_file_and_every_file_a_model() -> None:
    files = {path.stem: body(path)["name"] for path in FILES if path.parts[0] == "model"}
    assert files == {name: name for name in (AUTO, *FAMILIES)}


def test_the_file_of_a_table_of_ones_own_reads_it(mine: list[str]) -> None:
    parts = split_of(configure(["data=file", *mine]))
    sizes = [len(part) for part in (parts.members, parts.holdout, parts.reference)]
    assert sum(sizes) == (~frame().duplicated()).sum()
    assert sizes == pytest.approx([240, 80, 80], abs=30), "right on average"
    assert parts.members.schema.expected_rows == 240
    again = split_of(configure(["data=file", *mine]))
    assert parts.members.digest() == again.members.digest()
    other = split_of(configure(["data=file", *mine, "data.split_seed=1"]))
    assert parts.members.digest() != other.members.digest()
    fewer = split_of(configure(["data=file", *mine, "data.drop=[job,pay]"]))
    assert fewer.members.schema.names == ["age", "rich"]


def test_the_embedded_table_keeps_its_published_split() -> None:
    parts = split_of(configure([]))
    assert parts.members.schema.expected_rows == 32_561
    assert "education-num" not in parts.members.schema.names
    assert parts.members.schema.target == "income"


def test_wandb_is_asked_for(tmp_path: Path) -> None:
    assert [type(log) for log in logger_of(configure(["logger=wandb"]))(tmp_path / "logs")] == [
        CSVLogger,
        WandbLogger,
    ]
    assert len(logger_of(configure(["logger=csv"]))(tmp_path / "logs")) == 1
    with pytest.raises(UsageError, match=r"logger\.mode=typo"):
        logger_of(configure(["logger=wandb", "logger.mode=typo"]))


def test_jobs_of_hydras_own_sweeper_are_packed() -> None:
    """Composed as Hydra would; the launcher of every key but this one is not looked at."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", return_hydra_config=True)
    held = yaml.safe_load((CONF / "hydra" / "launcher" / "fleet.yaml").read_text())
    assert cfg.hydra.launcher == held
    assert held["_target_"] == f"{FleetLauncher.__module__}.{FleetLauncher.__name__}"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=basic"], return_hydra_config=True)
    assert cfg.hydra.launcher._target_.endswith("BasicLauncher")


# What it holds is what the code would take


def defaults(*functions: Any) -> dict[str, Any]:
    """Keyword arguments with a default, the first function's winning."""
    found: dict[str, Any] = {}
    for function in reversed(functions):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                found[name] = parameter.default
    return found


def listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("model", [name for name, family in FAMILIES.items() if family.trained])
def test_options_are_the_familys_own_defaults(model: str) -> None:
    own = defaults(FAMILIES[model].__init__, Generator.__init__)
    assert body(Path("model", f"{model}.yaml"))["options"] == {k: listed(v) for k, v in own.items()}


@pytest.mark.parametrize("model", [name for name, f in FAMILIES.items() if not f.trained])
def test_a_baseline_has_only_what_is_its_own_to_set(model: str) -> None:
    family, shared = FAMILIES[model], NaiveBayes.__mro__[1]
    own = family.__mro__[: family.__mro__.index(shared)]
    found = defaults(*(part.__init__ for part in own if "__init__" in vars(part)))
    assert body(Path("model", f"{model}.yaml"))["options"] == {
        k: listed(v) for k, v in found.items()
    }


def test_privacy_is_what_the_plan_would_take() -> None:
    held = body(Path("privacy/default.yaml"))
    own, fit = defaults(PrivacyPlan), defaults(dpsynth.fit)
    assert held["batch"] is held["steps"] is None
    assert held["delta"] == fit["delta"]
    assert held["shares"] == dict.fromkeys(STAGES), "the planner's"
    assert held["clip"] is None
    assert held["epsilon"] is None and point_of(configure([]), table()).epsilon == 1.0
    for name in ("unit", "contributions"):
        assert held[name] == own[name]
    assert set(held) - {"epsilon", "target"} < set(own) | {"delta", "rows"}


def test_the_recipes_settings_are_its_defaults() -> None:
    own = defaults(Recipe)
    training = body(Path("training/default.yaml"))
    assert training.pop("memory") is None is defaults(run_sweep)["memory"]
    assert training == {k: v for k, v in own.items() if k not in ("options", "privacy", "codec")}
    codec = body(Path("codec/default.yaml"))
    assert codec.pop("bins") is None is defaults(Codec.fit)["wanted"]
    assert {"bins": CODEC["bins"], **codec} == CODEC
    assert {name: defaults(Codec.fit)[name] for name in CODEC} == CODEC


def test_judging_is_what_the_sweep_would_take() -> None:
    held = {**body(Path("evaluation/default.yaml")), **body(Path("audit/quick.yaml"))}
    assert held.pop("controls") == defaults(run_sweep)["with_controls"]
    held["device"] = body(Path("training/default.yaml"))["device"]
    assert held == {k: v for k, v in defaults(Judging).items() if k != "apart"}
    assert judging_of(configure([])) == Judging()


def test_data_is_split_as_the_split_would() -> None:
    own = defaults(Split.random)
    for name in ("adult", "file"):
        held = body(Path("data", f"{name}.yaml"))
        assert {key: held[key] for key in own} == own
        assert held["strict"] is None, "what is right depends on release and on the schema"
    assert set(body(Path("data/adult.yaml"))) == set(body(Path("data/file.yaml")))


def test_the_default_family_is_the_one_of_fit() -> None:
    assert configure([]).model.name == defaults(dpsynth.fit)["model"]


def test_the_default_recipe_is_the_one_that_python_spells_out() -> None:
    point = point_of(configure([]), table())
    assert point.seed is None
    family = FAMILIES["autoregressive"]
    own = {k: listed(v) for k, v in defaults(family.__init__, Generator.__init__).items()}
    assert point.recipe.options == own
    shares = dict.fromkeys(STAGES)
    privacy = {"delta": 1e-5, "shares": shares, "clip": None, "batch": None, "steps": None}
    spelled = Recipe("autoregressive", own, privacy, {"bins": None, "heaps": 16})
    assert point.recipe.digest() == spelled.digest()


# What it says


def leaves(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, dict) and tree:
        for name, inner in tree.items():
            yield from leaves(inner, (*above, str(name)))
    else:
        yield above


@pytest.mark.parametrize("path", [Path("config.yaml"), *FILES], ids=str)
def test_every_file_says_what_it_is_and_every_key_what_it_means(path: Path) -> None:
    lines = (CONF / path).read_text().splitlines()
    first = next(line for line in lines if not line.startswith("# @package"))
    assert first.startswith("# ")
    if path.parts[0] == "experiment":  # sets keys that other files explain
        return
    for leaf in leaves(body(path)):
        if leaf[0] in ("defaults", "name", "options") and len(leaf) == 1:
            continue
        (line,) = [n for n in lines if n.strip().startswith(f"{leaf[-1]}:")]
        assert " # " in line, f"{'.'.join(leaf)} is not explained"


# Grids


def cells(*overrides: str) -> list[tuple[str, float, int | None]]:
    points = [point_of(cfg, table()) for cfg, _ in expand(overrides)]
    return [(point.recipe.model, point.epsilon, point.seed) for point in points]


def test_lists_and_ranges_span_a_grid() -> None:
    assert cells("model=vae,gan", "privacy.epsilon=1,inf", "seed=range(2)") == [
        (model, epsilon, seed)
        for model in ("vae", "gan")
        for epsilon in (1.0, math.inf)
        for seed in (0, 1)
    ]
    assert cells("model=vae", "seed=3") == [("vae", 1.0, 3)]
    both = [("autoregressive", 0.5, None), ("autoregressive", 10.0, None)]
    assert cells("privacy.epsilon=.5,1e1") == cells("model=auto", "privacy.epsilon=.5,1e1") == both


def test_a_list_may_hold_lists() -> None:
    configs = [cfg for cfg, _ in expand(["model=vae", "model.options.hidden=[8,8],[16]"])]
    assert [list(cfg.model.options.hidden) for cfg in configs] == [[8, 8], [16]]


def test_an_experiments_grid_gives_way_to_the_command_line() -> None:
    grid = body(Path("experiment/demo.yaml"))["grid"]
    budgets = [float(value) for value in grid["privacy.epsilon"]]
    one = cells("+experiment=demo", "model=vae", "seed=7")
    assert one == [("vae", epsilon, 7) for epsilon in budgets]
    lists = cells("+experiment=demo", "model=gan", "seed=7,8", "privacy.epsilon=3")
    assert lists == [("gan", 3.0, 7), ("gan", 3.0, 8)]
    free = cells("+experiment=demo", "seed=7", "privacy.epsilon=3")
    assert free == [(model, 3.0, 7) for model in grid["model"]]


def test_a_grid_may_be_nested_or_dotted() -> None:
    assert cells("+grid.seed=[1,2]", "model=vae") == [("vae", 1.0, 1), ("vae", 1.0, 2)]
    assert cells("+grid.privacy.epsilon=[1,2]", "model=vae") == [
        ("vae", 1.0, None),
        ("vae", 2.0, None),
    ]


def variants(*overrides: str) -> list[str]:
    return [variant for _, variant in expand(["model=vae", *overrides])]


def test_the_other_settings_of_a_grid_keep_families_apart() -> None:
    """Runs are averaged over seeds only. A value keeps its point: 0.1 and 1.1 are not both 1."""
    assert variants("seed=0,1", "privacy.epsilon=1,2") == [""] * 4
    assert variants("model.options.lr=0.1,1.1") == ["lr=0.1", "lr=1.1"]
    assert variants("privacy.steps=5,6", "codec.bins=8,9") == [
        "steps=5 bins=8", "steps=5 bins=9", "steps=6 bins=8", "steps=6 bins=9"
    ]  # fmt: skip
    assert variants("++seed=0,1") == ["", ""]
    assert variants("model.options.lr=0.1") == [""], "what all runs share sets none apart"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("grid=5", "grid=5"),
        ("+grid.seed=5", r"grid\.seed=5"),
        ("+grid.seed=[]", r"grid\.seed=\[\]"),
        ("+grid.privacy.epsilon=5", r"grid\.privacy\.epsilon=5"),
        ("model=glob(*)", "glob"),
    ],
)
def test_a_grid_that_lists_nothing_is_refused(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        expand([override])


def test_what_needs_a_value_is_named() -> None:
    with pytest.raises(UsageError, match=r"data\.path: needs a value"):
        configure(["data=file"])


def test_nothing_is_composed_in_place() -> None:
    first = OmegaConf.to_container(configure(["model=vae"]))
    configure(["model=vae", "privacy.epsilon=3", "model.options.latent=3"])
    assert OmegaConf.to_container(configure(["model=vae"])) == first
