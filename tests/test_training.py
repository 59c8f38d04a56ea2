"""Fleets: a run is the same alone, in company or resumed, and spends what its ledger says."""

from __future__ import annotations

import math
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from rich.console import Console
from scipy.optimize import brentq
from scipy.stats import norm
from tiny import HERE, ROWS, SCHEMA, frame, recipe, seat, table

from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.models.base import Generator
from dpsynth.privacy.accounting import second_opinion
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Executed, Ledger
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import stream
from dpsynth.sampling import sample_table
from dpsynth.schema import Column
from dpsynth.training import fleet as fleet_module
from dpsynth.training import measure as measure_module
from dpsynth.training.callbacks import (
    LastCheckpoint,
    SpentEpsilon,
    TrainingProgress,
    default_callbacks,
    spent,
)
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import FAMILIES, Recipe, Seat, build, check_seat

MODELS = HERE
NETWORKS = [name for name, family in FAMILIES.items() if family.trained]
BASELINES = [name for name in HERE if not FAMILIES[name].trained]
SEATS = [seat(0.5, 3), seat(1.0, 4), seat(math.inf, 5)]

_trios: dict[str, list[Trained]] = {}


# No law here asks how good a fit is; two of them are alike at any length.
pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture
def trio(request: pytest.FixtureRequest) -> list[Trained]:
    """A fleet of three runs of the family in `request.param`, trained once."""
    if request.param not in _trios:
        _trios[request.param] = train_fleet(recipe(request.param), SEATS)
    return _trios[request.param]


def of(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("trio", names, indirect=True)


def events(ledger: Ledger) -> list[Event]:
    """What was paid, without when."""
    return [replace(event, when="") for event in ledger.events]


def rows_of(trained: Trained, rows: int = 60) -> pd.DataFrame:
    return sample_table(trained.generator, trained.codec, rows, rng=9).frame


def assert_same_weights(left: Generator, right: Generator, atol: float = 1e-5) -> None:
    first, second = left.state_dict(), right.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=atol, msg=name)


def assert_same_run(left: Trained, right: Trained) -> None:
    assert left.plan == right.plan
    assert events(left.ledger) == events(right.ledger)
    assert left.codec.to_dict() == right.codec.to_dict()
    assert_same_weights(left.generator, right.generator)
    pd.testing.assert_frame_equal(rows_of(left), rows_of(right))


# A run is itself, whoever trains beside it


@of(*MODELS)
def test_a_run_in_a_fleet_is_the_run_alone(trio: list[Trained]) -> None:
    for together in trio:
        (alone,) = train_fleet(together.recipe, [together.seat])
        assert_same_run(together, alone)


def test_a_shorter_table_in_the_fleet_changes_nothing() -> None:
    """The attacker's reference run has fewer rows and counts them itself."""
    few = table(150, seed=8)
    unknown = Seat(
        Table(replace(few.schema, expected_rows=None), few.frame), math.inf, 6, "reference"
    )
    together = train_fleet(recipe("diffusion"), [SEATS[2], unknown])
    assert [run.plan.rows for run in together] == [ROWS, 150]
    for run in together:
        assert_same_run(run, train_fleet(run.recipe, [run.seat])[0])


OWN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"steps": 7, "batch": 32}),
    ({"lr": 0.05}, {"steps": 3, "batch": 90, "clip": 0.5}),
    ({}, {"steps": 0}),
    ({"lr": 1e-4}, {"steps": 4, "batch": 12, "delta": 1e-6, "shares": {"marginals": 0.6}}),
]


@pytest.mark.parametrize("model", ["vae", "gan", "diffusion"])
def test_runs_of_different_length_batch_and_rate_are_those_runs_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the batch of one run takes more pieces than that of another."""
    taken: list[int] = []
    step = PrivateEngine.step
    monkeypatch.setattr(
        PrivateEngine, "step", lambda s, rng, at: (taken.append(at), step(s, rng, at))
    )
    recipes = [recipe(model, options=o, privacy=p, piece=48) for o, p in OWN]
    assert len({made.program() for made in recipes}) == 1
    seats = [seat(0.5, 1), seat(math.inf, 2), seat(1.0, 3), seat(4.0, 4)]
    fleet = train_fleet(recipes, seats)
    assert taken == list(range(7))
    for made, one, together in zip(recipes, seats, fleet, strict=True):
        (alone,) = train_fleet(made, [one])
        assert together.recipe == made
        assert together.executed == alone.executed == Executed(together.plan.steps)
        assert int(together.generator.completed) == together.plan.steps
        assert_same_run(together, alone)


class OwnOptimizer(FAMILIES["vae"]):  # type: ignore[misc, name-defined]
    """Moves by an optimizer that knows nothing of runs."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.network.parameters(), lr=self.lr[0])]


def test_another_optimizer_moves_runs_of_equal_length_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "vae", OwnOptimizer)
    before, after = (
        train_fleet(recipe("vae", privacy={"steps": steps}), [seat()])[0] for steps in (0, 3)
    )
    left, right = (one.generator.network.state_dict() for one in (before, after))
    assert any(not torch.equal(left[name], right[name]) for name in left)
    recipes = [recipe("vae", privacy={"steps": steps}) for steps in (3, 4)]
    with pytest.raises(UsageError, match="SGD: cannot stop runs one by one"):
        train_fleet(recipes, [seat(), seat()])
    with pytest.raises(UsageError, match=r"SGD: .* or be captured"):
        train_fleet(recipe("vae", capture=True), [seat()])


def test_a_program_is_what_the_runs_of_a_fleet_must_share() -> None:
    base = recipe("gan")
    for options, privacy in OWN:
        assert recipe("gan", options=options, privacy=privacy).program() == base.program()
    assert recipe("gan", options={"generator_lr": 0.5}).program() == base.program()
    others = [
        recipe("vae"),
        recipe("gan", options={"latent": 3}),
        recipe("gan", codec={"bins": 8}),
        recipe("gan", engine="opacus_ghost"),
        recipe("gan", piece=7),
        recipe("gan", privacy={"secure": True}),
    ]
    programs = {made.program() for made in [base, *others]}
    assert len(programs) == len(others) + 1
    for other in others:
        with pytest.raises(UsageError, match="train them apart"):
            train_fleet([base, other], [seat(0.5, None), seat(0.5, None)])
    with pytest.raises(UsageError, match="recipes=1 and seats=2"):
        train_fleet([base], [seat(), seat()])


@pytest.mark.parametrize("model", MODELS)
def test_a_seed_is_a_table(model: str) -> None:
    first, again = (train_fleet(recipe(model), [seat(0.5, 3)])[0] for _ in range(2))
    assert_same_weights(first.generator, again.generator, atol=0)
    pd.testing.assert_frame_equal(rows_of(first), rows_of(again))
    (other,) = train_fleet(recipe(model), [seat(0.5, 4)])
    assert not rows_of(first).equals(rows_of(other))


def test_without_a_seed_no_two_runs_are_alike() -> None:
    first, other = train_fleet(recipe("vae"), [seat(math.inf, None), seat(math.inf, None)])
    left, right = (t.generator.network.state_dict() for t in (first, other))
    assert all(not torch.equal(left[name], right[name]) for name in left)


def test_a_seed_gives_every_budget_and_recipe_noise_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Equal draws at two scales would cancel for whoever holds both runs."""
    used: list[int] = []

    def recorded(key: int, purpose: str) -> np.random.Generator:
        used.append(key)
        return stream(key, purpose)

    monkeypatch.setattr(measure_module, "keyed_stream", recorded)

    def keys(made: Recipe, *seats: Seat) -> list[int]:
        used.clear()
        train_fleet(made, seats)
        return sorted(set(used))

    plain = recipe("independent")
    roles = [seat(0.5, 3), seat(1.0, 3), seat(0.5, 4), replace(seat(0.5, 3), role="reference")]
    assert len(keys(plain, *roles)) == len(roles)
    (first,) = keys(plain, roles[0])
    assert keys(recipe("independent", engine="opacus_ghost"), roles[0]) == [first]
    for other in (
        recipe("naive_bayes"),
        recipe("independent", privacy={"delta": 2e-5}),
        recipe("independent", codec={"bins": 8}),
    ):
        assert keys(other, roles[0]) != [first]


# Steps and budget


@of(*MODELS)
def test_steps_taken_are_steps_planned_and_paid(trio: list[Trained]) -> None:
    for run in trio:
        taken = int(run.generator.completed)
        paid = sum(event.steps for event in run.ledger.events if event.what.startswith("dpsgd"))
        assert taken == run.plan.steps == paid
        assert taken == (5 if FAMILIES[run.recipe.model].trained else 0)


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("model", NETWORKS)
def test_no_block_takes_a_step_too_many(
    model: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    step = PrivateEngine.step

    def counted(self: PrivateEngine, rng: Any, number: int) -> None:
        numbers.append(number)
        step(self, rng, number)

    monkeypatch.setattr(PrivateEngine, "step", counted)
    (run,) = train_fleet(recipe(model, options={"block": block}), [seat()])
    assert numbers == list(range(5))
    assert int(run.generator.completed) == 5


@pytest.mark.parametrize("model", NETWORKS)
def test_no_steps_leave_the_measured_tables(model: str) -> None:
    (run,) = train_fleet(recipe(model, privacy={"steps": 0}), [seat(0.5)])
    assert int(run.generator.completed) == 0
    assert not any(event.what.startswith("dpsgd") for event in run.ledger.events)
    assert run.ledger.epsilon < 0.5
    assert len(rows_of(run)) == 60


@of(*MODELS)
def test_what_was_spent_is_within_the_target(trio: list[Trained]) -> None:
    for run in trio[:2]:
        assert run.ledger.delta == run.plan.delta == 1e-5
        assert 0.9 * run.plan.epsilon < run.ledger.epsilon <= run.plan.epsilon
        assert second_opinion(run.ledger.events, run.ledger.delta) <= run.plan.epsilon * 1.03


@of(*MODELS)
def test_every_stage_keeps_to_its_share(trio: list[Trained]) -> None:
    """Σ 1/σ² of a stage's events is its part of μ²."""
    for run in trio[:2]:
        gaussian = [event for event in run.ledger.events if event.q == 1]
        squared = {
            stage: sum(1 / e.sigma**2 for e in gaussian if e.what.split(":")[0] in kinds)
            for stage, kinds in {
                "codec": ("cells", "heaps", "bins"),
                "marginals": ("marginal",),
            }.items()
        }
        assert {e.what.split(":")[0] for e in gaussian} >= {"cells", "heaps", "bins", "marginal"}
        assert squared["marginals"] == pytest.approx(run.plan.mu("marginals") ** 2)
        assert squared["codec"] == pytest.approx(run.plan.mu("codec") ** 2)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε of Gaussian DP (Balle & Wang 2018), written down once more."""

    def excess(epsilon: float) -> float:
        first = norm.cdf(mu / 2 - epsilon / mu)
        return first - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu) - delta

    return float(brentq(excess, 0, 50))


@of(*BASELINES)
def test_the_ledger_is_the_sum_of_its_stages(trio: list[Trained]) -> None:
    for run in trio[:2]:
        mu = math.sqrt(sum(1 / event.sigma**2 for event in run.ledger.events))
        assert run.ledger.epsilon == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-2)


@of(*NETWORKS)
def test_measuring_and_training_add_up(trio: list[Trained]) -> None:
    for run in trio[:2]:
        parts = Ledger(1e-5), Ledger(1e-5)
        for event in run.ledger.events:
            parts[event.what.startswith("dpsgd")].pay(event)
        measured, trained = (part.epsilon for part in parts)
        assert 0 < max(measured, trained) < run.ledger.epsilon < measured + trained


@of(*MODELS)
def test_no_privacy_takes_the_same_path(trio: list[Trained]) -> None:
    finite, free = trio[1], trio[2]
    assert [e.what for e in free.ledger.events] == [e.what for e in finite.ledger.events]
    assert [e.steps for e in free.ledger.events] == [e.steps for e in finite.ledger.events]
    assert {e.mechanism for e in free.ledger.events} == {"none"}
    assert free.ledger.epsilon == math.inf
    assert free.plan.bound == math.inf and free.plan.noise == 0
    assert finite.plan.bound == FAMILIES[finite.recipe.model].clip


@of(*BASELINES)
def test_a_baseline_is_measured_and_nothing_else(trio: list[Trained]) -> None:
    for run in trio:
        assert int(run.generator.completed) == 0
        assert not [e for e in run.ledger.events if e.what.startswith("dpsgd")]
        assert not list(run.generator.network.parameters())


class Watched(Callback):
    """Keeps the weights that are averaged, after every block."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if int(pl_module.completed) > len(self.weights):
            weights = pl_module.averaged().named_parameters()
            self.weights.append({name: value.detach().clone() for name, value in weights})


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("decay", [0.15, 0.99])
def test_what_samples_is_the_moving_average(model: str, decay: float) -> None:
    """w̄ₙ = λ w̄ₙ₋₁ + (1 − λ) wₙ with λ = min(decay, (1 + n)/(10 + n)), from w̄₀ = w₀."""
    watched = Watched()
    made = recipe(model, options={"block": 1, "average": decay})
    (run,) = train_fleet(made, [seat()], callbacks=[watched])
    assert len(watched.weights) == 5
    for name, value in run.generator.averaged().named_parameters():
        mean = watched.weights[0][name]
        for n, step in enumerate(watched.weights[1:], start=1):
            keep = min(decay, (1 + n) / (10 + n))
            mean = keep * mean + (1 - keep) * step[name]
        torch.testing.assert_close(value, mean, rtol=1e-5, atol=1e-6)
    last = watched.weights[-1]
    assert any((last[k] != v).any() for k, v in run.generator.averaged().named_parameters())


def test_every_step_draws_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []
    draw = PoissonBatches.draw

    def recorded(self: PoissonBatches, rng: Any, step: int) -> Any:
        for index, inside in draw(self, rng, step):
            drawn.append(tuple(index[inside].tolist()))
            yield index, inside

    monkeypatch.setattr(PoissonBatches, "draw", recorded)
    train_fleet(recipe(), [seat()])
    assert len(set(drawn)) == len(drawn) == 5


@pytest.mark.parametrize("model", NETWORKS)
def test_all_engines_train_the_same_run(model: str) -> None:
    runs = [
        train_fleet(recipe(model, engine=engine), [seat(0.5, 3), seat(1.0, 4)])
        for engine in ("taps", "opacus_hooks", "opacus_ghost")
    ]
    for other in runs[1:]:
        for left, right in zip(runs[0], other, strict=True):
            assert_same_weights(left.generator, right.generator, atol=1e-4)


def test_a_small_piece_takes_the_same_records(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    accumulate = PrivateEngine.accumulate

    def counted(self: PrivateEngine, losses: Any, counts: torch.Tensor) -> torch.Tensor:
        seen.append(int(counts.sum()))
        return accumulate(self, losses, counts)

    monkeypatch.setattr(PrivateEngine, "accumulate", counted)
    train_fleet(recipe("vae", piece=8), [seat()])
    assert max(seen) <= 8
    assert 5 * 32 * 0.6 < sum(seen) < 5 * 32 * 1.4
    assert len(seen) > 5


# The number of rows


def test_an_undeclared_number_of_rows_is_bought() -> None:
    trained = train_fleet(recipe("independent"), [seat(0.5, i, expected_rows=None) for i in (1, 2)])
    for run in trained:
        first = run.ledger.events[0]
        assert first.what == "rows" and first.mechanism == "gaussian"
        assert 1 / first.sigma == pytest.approx(run.plan.mu("rows"))
        assert run.plan.shares["rows"] == 0.01
        assert run.ledger.epsilon <= 0.5
        assert abs(run.plan.rows - ROWS) < 5 * first.sigma
    assert trained[0].plan.rows != trained[1].plan.rows


@of("vae", "independent")
def test_a_declared_number_of_rows_costs_nothing(trio: list[Trained]) -> None:
    for run in trio:
        assert run.plan.rows == ROWS
        assert run.plan.shares["rows"] == 0
        assert "rows" not in [event.what for event in run.ledger.events]


def test_without_privacy_rows_are_counted() -> None:
    (run,) = train_fleet(recipe("independent"), [seat(math.inf, 0, expected_rows=None)])
    assert run.plan.rows == ROWS
    assert "rows" not in [event.what for event in run.ledger.events]


def test_a_declared_number_stands_whatever_the_table_holds() -> None:
    (run,) = train_fleet(recipe("vae"), [seat(math.inf, 0, expected_rows=1000)])
    assert run.plan.rows == 1000
    assert run.plan.q == 32 / 1000


# Refusals


def drafted() -> Table:
    """The table under a schema that was read off it."""
    columns = tuple(replace(column, provenance="data") for column in SCHEMA.columns)
    return Table(replace(SCHEMA, columns=columns), table().frame)


@pytest.mark.parametrize("model", MODELS)
def test_facts_read_off_the_rows_need_infinite_epsilon(model: str) -> None:
    for refuse in (check_seat, lambda r, s: train_fleet(r, [s])):
        with pytest.raises(RefusedError, match="provenance"):
            refuse(recipe(model), Seat(drafted(), 8.0))
    train_fleet(recipe(model), [Seat(drafted(), math.inf, 0)])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "typo"}, "model=typo"),
        ({"device": "tpu"}, "device=tpu"),
        ({"engine": "typo"}, "engine=typo"),
        ({"piece": 0}, "piece=0"),
        ({"options": 5}, "options=5"),
        ({"privacy": {"foo": 1}}, "foo"),
        ({"privacy": {"sigma": 0.1}}, "sigma"),
        ({"privacy": {"shares": 5}}, "shares=5"),
        ({"privacy": {"shares": {"codec": "abc"}}}, "shares.codec=abc"),
        ({"privacy": {"shares": {"codec": -0.1}}}, "shares.codec=-0.1"),
        ({"privacy": {"shares": {"foo": 0.1}}}, "foo"),
        ({"codec": {"foo": 1}}, "foo"),
    ],
)
def test_a_recipe_refuses_unknown_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe(**{"model": "vae", **settings})


@pytest.mark.parametrize(
    ("settings", "epsilon", "words"),
    [
        ({"options": {"latent": 0}}, 1.0, "latent=0"),
        ({"options": {"foo": 1}}, 1.0, "model=vae: .*foo"),
        ({"options": {"hidden": 5}}, 1.0, "model=vae"),
        ({"options": {"hidden": [0]}}, 1.0, "=0"),
        ({"options": {"hidden": [-1]}}, 1.0, "=-1"),
        ({"options": {"block": 0}}, 1.0, "block=0"),
        ({"codec": {"bins": 1}}, 1.0, "bins=1"),
        ({"codec": {"bins": "abc"}}, 1.0, "bins=abc"),
        ({"codec": {"heaps": -1}}, 1.0, "heaps=-1"),
        ({"privacy": {"delta": 0.01}}, 1.0, "delta=0.01"),
        ({"privacy": {"delta": "abc"}}, 1.0, "delta=abc"),
        ({"privacy": {"delta": "abc"}}, math.inf, "delta=abc"),
        ({"privacy": {"batch": 0}}, 1.0, "batch=0"),
        ({"privacy": {"steps": -1}}, 1.0, "steps=-1"),
        ({"privacy": {"clip": -1}}, 1.0, "clip=-1"),
        ({"privacy": {"unit": "person"}}, 1.0, "unit=person"),
        ({"privacy": {"shares": {"marginals": 0.95}}}, 1.0, "privacy.shares"),
        ({}, 0.0, "epsilon=0"),
        ({}, -1.0, "epsilon=-1"),
        ({}, math.nan, "epsilon=nan"),
    ],
)
def test_a_seat_refuses_what_its_training_would(
    settings: dict[str, Any], epsilon: float, words: str, tmp_path: Path
) -> None:
    """Before any work: no key is drawn and nothing is written."""
    wrong = recipe(**settings)
    with pytest.raises(UsageError, match=words):
        check_seat(wrong, seat(epsilon))
    with pytest.raises(UsageError, match=words):
        train_fleet(wrong, [seat(epsilon)], state=tmp_path / "state")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["decay", "anchor"])
@pytest.mark.parametrize("value", [-1.0, math.nan, "abc"])
def test_a_gan_refuses_a_weight_that_is_none(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"{name}={value}"):
        check_seat(recipe("gan", options={name: value}), seat())
    check_seat(recipe("gan", options={name: 0}), seat())


def test_an_undeclared_number_of_rows_needs_a_share() -> None:
    free = recipe(privacy={"shares": {"rows": 0.0}})
    with pytest.raises(UsageError, match="expected_rows"):
        train_fleet(free, [seat(1.0, 0, expected_rows=None)])
    check_seat(free, seat(1.0))
    check_seat(free, seat(math.inf, 0, expected_rows=None))


def test_an_empty_fleet_is_refused() -> None:
    with pytest.raises(UsageError, match="seats=0"):
        train_fleet(recipe(), [])


@pytest.mark.parametrize(
    "other",
    [
        replace(SCHEMA, target=None),
        SCHEMA.select(["job", "age", "pay", "rich"]),
        replace(SCHEMA, columns=(Column("age", "integer", lower=0, upper=99), *SCHEMA.columns[1:])),
    ],
)
def test_seats_under_different_schemas_are_refused(other: Any) -> None:
    stranger = Seat(Table.from_frame(frame(), other), math.inf)
    with pytest.raises(UsageError, match="schemas"):
        train_fleet(recipe(), [seat(), stranger])


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda"):
        train_fleet(recipe(device="cuda"), [seat()])


def test_an_unknown_option_names_the_family() -> None:
    layout = train_fleet(recipe("independent"), [seat()])[0].codec.layout
    with pytest.raises(UsageError, match=r"model=independent: .*hidden"):
        build(Recipe("independent", {"hidden": [8]}), layout, 1)


# Interrupted and resumed


class Stop(Callback):
    """Ctrl-C after so many blocks."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.blocks -= 1
        if not self.blocks:
            raise KeyboardInterrupt


def interrupted(made: Recipe, seats: Sequence[Seat], state: Path, *, keep: bool) -> None:
    """Stop after two blocks, with or without a checkpoint of the second."""
    callbacks: list[Callback] = [LastCheckpoint(state, seconds=0), Stop(2)]
    with pytest.raises(KeyboardInterrupt):
        train_fleet(made, seats, state=state, callbacks=callbacks if keep else callbacks[::-1])
    assert (state / "last.ckpt").is_file()


@pytest.mark.parametrize("keep", [True, False], ids=["between blocks", "within a block"])
@of(*NETWORKS)
def test_a_resumed_fleet_is_the_uninterrupted_one(
    trio: list[Trained], keep: bool, tmp_path: Path
) -> None:
    made = trio[0].recipe
    interrupted(made, SEATS, tmp_path, keep=keep)
    resumed = train_fleet(made, SEATS, state=tmp_path)
    for left, right in zip(trio, resumed, strict=True):
        assert_same_run(left, right)


def test_a_resumed_capture_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The checkpoint is restored before anything is recorded."""
    made, seats = recipe("vae", capture=True), [seat(0.5, 1), seat(math.inf, 1)]
    interrupted(made, seats, tmp_path, keep=False)
    resumed = train_fleet(made, seats, state=tmp_path)
    for left, right in zip(train_fleet(made, seats), resumed, strict=True):
        assert_same_weights(left.generator, right.generator, atol=0)
        assert right.ledger.noise == "aes256-ctr+threefry:seed"
    with pytest.raises(UsageError, match="belongs to another fleet"):
        train_fleet(recipe("vae", capture=False), seats, state=tmp_path)


def test_a_resumed_fleet_repeats_only_what_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers: list[int] = []
    step = PrivateEngine.step

    def counted(self: PrivateEngine, rng: Any, number: int) -> None:
        numbers.append(number)
        step(self, rng, number)

    monkeypatch.setattr(PrivateEngine, "step", counted)
    interrupted(recipe(), [seat()], tmp_path, keep=False)
    (run,) = train_fleet(recipe(), [seat()], state=tmp_path)
    # Two blocks of two, of which one was kept; then the rest, each once.
    assert numbers == [0, 1, 2, 3, 2, 3, 4]
    assert int(run.generator.completed) == 5


def test_before_the_first_checkpoint_a_fleet_begins_anew_with_its_keys(tmp_path: Path) -> None:
    seats = [seat(math.inf, None)]
    with pytest.raises(KeyboardInterrupt):
        train_fleet(recipe(), seats, state=tmp_path, callbacks=[Stop(1)])
    assert not (tmp_path / "last.ckpt").exists()
    first, again = (train_fleet(recipe(), seats, state=tmp_path)[0] for _ in range(2))
    assert_same_run(first, again)


def test_unseeded_runs_resume_with_the_keys_they_began_with(tmp_path: Path) -> None:
    seats = [seat(0.5, None), seat(math.inf, None)]
    interrupted(recipe(), seats, tmp_path / "a", keep=True)
    assert stat.S_IMODE((tmp_path / "a" / "keys").stat().st_mode) == 0o600
    (tmp_path / "b").mkdir()
    shutil.copy(tmp_path / "a" / "keys", tmp_path / "b" / "keys")
    resumed = train_fleet(recipe(), seats, state=tmp_path / "a")
    whole = train_fleet(recipe(), seats, state=tmp_path / "b")
    for left, right in zip(resumed, whole, strict=True):
        assert_same_run(left, right)
    (other, _) = train_fleet(recipe(), seats, state=tmp_path / "c")
    assert not torch.equal(resumed[0].generator.given_logits, other.generator.given_logits)


OTHERS = {
    "one run more": (recipe(), [seat(), seat(math.inf, 1)]),
    "another seed": (recipe(), [seat(math.inf, 1)]),
    "no seed": (recipe(), [seat(math.inf, None)]),
    "another budget": (recipe(), [seat(0.5)]),
    "another recipe": (recipe(options={"lr": 0.1}), [seat()]),
    "another family": (recipe("gan"), [seat()]),
    "another role": (recipe(), [replace(seat(), role="reference")]),
    "other rows": (recipe(), [Seat(table(seed=7), math.inf, 0)]),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_the_state_of_another_fleet_is_refused(
    other: tuple[Recipe, list[Seat]], tmp_path: Path
) -> None:
    """Weights that one budget paid for must not go on under another."""
    interrupted(recipe(), [seat()], tmp_path, keep=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="another fleet"):
        train_fleet(*other, state=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_another_engine_may_go_on(tmp_path: Path) -> None:
    interrupted(recipe(), [seat(0.5, 3)], tmp_path, keep=True)
    (resumed,) = train_fleet(recipe(engine="opacus_hooks"), [seat(0.5, 3)], state=tmp_path)
    (whole,) = train_fleet(recipe(), [seat(0.5, 3)])
    assert_same_weights(resumed.generator, whole.generator, atol=1e-4)


def test_a_training_that_is_told_to_stop_does_not_pass_for_done(tmp_path: Path) -> None:
    class Enough(Callback):
        def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
            trainer.should_stop = True

    with pytest.raises(KeyboardInterrupt):
        train_fleet(recipe(), [seat()], callbacks=[Enough()])


# Callbacks


def plan_of(epsilon: float) -> PrivacyPlan:
    return train_fleet(recipe(), [seat(epsilon)])[0].plan


def test_spent_grows_with_steps_and_ends_above_the_ledger() -> None:
    (run,) = train_fleet(recipe(), [seat(0.5)])
    curve = [spent(run.plan, steps) for steps in range(run.plan.steps + 1)]
    assert all(before < after for before, after in pairwise(curve))
    assert curve[0] > 0, "measuring has spent something before the first step"
    assert run.ledger.epsilon <= curve[-1] < 0.5 * 1.05
    assert spent(plan_of(math.inf), 3) == math.inf


class Kept(Logger):
    """A logger that remembers."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[Mapping[str, float], int | None]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.records.append((dict(metrics), step))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""


def test_only_steps_and_epsilon_are_logged() -> None:
    """A loss on private rows is private."""
    logger, watched = Kept(), SpentEpsilon()
    made = recipe(options={"block": 1})
    (first, _, _) = train_fleet(
        made, [seat(0.5), seat(0.5, 1), seat()], logger=[logger], callbacks=[watched]
    )
    assert [step for _, step in logger.records] == [1, 2, 3, 4, 5]
    assert {name for metrics, _ in logger.records for name in metrics} == {"steps", "epsilon/0.5"}
    curve = [metrics["epsilon/0.5"] for metrics, _ in logger.records]
    assert curve == sorted(curve)
    assert watched.latest == {0.5: curve[-1]}
    assert first.ledger.epsilon <= curve[-1]


def test_epsilon_is_logged_ten_times_at_most() -> None:
    logger = Kept()
    many = recipe(options={"block": 1}, privacy={"steps": 33})
    train_fleet(many, [seat()], logger=[logger], callbacks=[SpentEpsilon()])
    assert 10 <= len(logger.records) <= 11
    assert logger.records[-1] == ({"steps": 33.0}, 33)


def test_a_runs_own_loggers_see_it_as_if_it_had_trained_alone() -> None:
    lengths = [{"steps": 23}, {"steps": 7, "batch": 60}, {"steps": 23}]
    recipes = [recipe(options={"block": 1}, privacy=own) for own in lengths]
    seats = [seat(0.5, 1), seat(2.0, 1), seat(math.inf, 1)]
    together, every = [Kept() for _ in seats], Kept()
    own = SpentEpsilon([[logger] for logger in together])
    train_fleet(recipes, seats, logger=[every], callbacks=[own])
    for made, one, logger in zip(recipes, seats, together, strict=True):
        alone = Kept()
        train_fleet(made, [one], logger=[alone], callbacks=[SpentEpsilon()])
        assert logger.records == alone.records
        assert logger.records[-1][1] == made.privacy["steps"]
    assert set(every.records[0][0]) == {"steps", "epsilon/0.5", "epsilon/2"}


def shown(console: Console, seats: Sequence[Seat], *extra: Callback) -> str:
    watched = SpentEpsilon()
    progress = TrainingProgress("tiny", watched, console)
    callbacks = [watched, progress, *extra]
    try:
        train_fleet(recipe(), seats, callbacks=callbacks)
    finally:
        bar = progress._progress
        assert bar is None or not bar.live.is_started, "the bar must let go of the terminal"
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_progress_is_plain_lines_where_no_terminal_is() -> None:
    text = shown(Console(file=StringIO()), [seat(0.5)])
    lines = text.splitlines()
    assert [line.split(" steps")[0] for line in lines] == ["tiny: 2/5", "tiny: 4/5", "tiny: 5/5"]
    assert all("records/s" in line and "ε" in line and "/0.5" in line for line in lines)
    assert "\x1b" not in text


def test_progress_is_a_bar_on_a_terminal() -> None:
    text = shown(Console(file=StringIO(), force_terminal=True, width=120), [seat()])
    assert "━" in text and "5/5 steps" in text
    assert "ε" not in text, "without privacy there is no ε to show"


def test_progress_lets_go_of_the_terminal_on_ctrl_c() -> None:
    with pytest.raises(KeyboardInterrupt):
        shown(Console(file=StringIO(), force_terminal=True), [seat()], Stop(1))


def test_checkpoints_are_whole_and_not_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[Path] = []
    save = lightning.Trainer.save_checkpoint

    def counted(self: lightning.Trainer, path: Any, *rest: Any, **more: Any) -> None:
        saved.append(Path(path))
        save(self, path, *rest, **more)

    monkeypatch.setattr(lightning.Trainer, "save_checkpoint", counted)
    train_fleet(recipe(), [seat()], callbacks=[LastCheckpoint(tmp_path / "never", seconds=1e6)])
    assert not saved and not (tmp_path / "never").exists()
    train_fleet(recipe(), [seat()], callbacks=[LastCheckpoint(tmp_path / "always", seconds=0)])
    assert len(saved) >= 3, "one a block"
    assert [path.name for path in (tmp_path / "always").iterdir()] == ["last.ckpt"]
    assert "last.ckpt" not in {path.name for path in saved}, "written under another name first"


def test_default_callbacks_keep_checkpoints_where_there_is_a_folder(tmp_path: Path) -> None:
    console = Console(file=StringIO())
    kinds = [type(callback) for callback in default_callbacks("tiny", tmp_path, console)]
    assert kinds == [SpentEpsilon, TrainingProgress, LastCheckpoint]
    assert [type(c) for c in default_callbacks("tiny", None, console)] == kinds[:2]


def test_a_fleet_leaves_no_rows_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is saved from holds neither codes nor the optimizer that saw them."""
    made: list[Generator] = []
    original = fleet_module.build_fleet

    def kept(*arguments: Any) -> Generator:
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(fleet_module, "build_fleet", kept)
    train_fleet(recipe(), [seat()])
    for generator in made[1:]:  # the first was built to see whether the settings are sound
        for name in ("_codes", "_batches", "_engine", "_rng", "_optimizers", "_average"):
            assert not hasattr(generator, name)
        assert not any(parameter.requires_grad for parameter in generator.parameters())
        sizes = {n for tensor in generator.state_dict().values() for n in tensor.shape}
        assert ROWS not in sizes
    assert np.isfinite(sum(float(p.sum()) for p in made[-1].parameters()))
