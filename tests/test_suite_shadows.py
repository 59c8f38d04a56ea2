"""Shadows: trained once as one fleet, honest about rows and coins, and attacks whose answer is
known: a model that learnt its rows by heart, and one that is private."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from tiny import SCHEMA, frame, recipe

from dpsynth.audit.attacks import ATTACKS, DIAGNOSTICS
from dpsynth.audit.membership import auc, null_band
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.models import Diffusion
from dpsynth.randomness import FleetRng
from dpsynth.suite import shadows as suite
from dpsynth.suite.shadows import (
    ShadowSet,
    pseudo_targets,
    shadow_attacks,
    targeted_attack,
    train_shadows,
)
from dpsynth.suite.signals import Evidence, Settings, as_fleet, losses_of, signals_of
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat
from dpsynth.training.run import Run

SIZE, ATTACKED, COUNT = 140, 100, 10
SETTINGS = Settings(draws=6, population=200, targets=20, queries=16)


def rows() -> Table:
    """Different rows of the tiny table."""
    unknown = replace(SCHEMA, expected_rows=None)
    unique = frame(4000, 5).drop_duplicates().reset_index(drop=True)
    return Table.from_frame(unique, unknown)


ALL = rows()
MEMBERS, HOLDOUT = ALL.take(np.arange(ATTACKED)), ALL.take(np.arange(1000, 1000 + ATTACKED))
POPULATION = ALL.take(np.arange(2000, 2600))
CANDIDATES = Table(ALL.schema, pd.concat([MEMBERS.frame, HOLDOUT.frame], ignore_index=True))
QUIET = Console(file=StringIO())


def audited(
    epsilon: float, model: str = "diffusion", *, steps: int = 200, secure: bool = False
) -> Run:
    options = {"hidden": [32, 32], "lr": 5e-3}
    how = recipe(
        model,
        options=options if model != "naive_bayes" else {},
        privacy={
            "batch": 70,
            "steps": steps,
            "delta": 1e-4,
            **({"secure": True} if secure else {}),
        },
        codec={"bins": 16, "heaps": 0},
    )
    table = ALL.take(np.arange(SIZE))
    table = replace(table, schema=replace(table.schema, expected_rows=SIZE))
    return Run.of(train_fleet(how, [Seat(table, epsilon, None if secure else 1)])[0], data="tiny")


def trained(run: Run, folder: Path, *, count: int = COUNT, console: Console = QUIET) -> ShadowSet:
    return train_shadows(
        run,
        CANDIDATES,
        POPULATION,
        count=count,
        seed=7,
        folder=folder,
        console=console,
        device="cpu",
    )


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ShadowSet]:
    run = audited(math.inf)
    return run, trained(run, tmp_path_factory.mktemp("heart"))


def test_a_model_that_knows_its_rows_by_heart_is_told_by_its_shadows(
    by_heart: tuple[Run, ShadowSet],
) -> None:
    run, shadows = by_heart
    settings = {"console": QUIET, "settings": SETTINGS}
    rng = np.random.default_rng(0)
    scores = shadow_attacks(run, shadows, MEMBERS, HOLDOUT, rng=rng, **settings)
    found = {name: auc(*pair) for name, pair in scores.items()}
    names = run.generator.signal_names
    expected = {f"{kind} {name}" for kind in ("lira", "lira_offline", "rmia") for name in names}
    assert set(found) == {*expected, "timestep_mlp", "meta"}
    synthetic = run.sample_table(SIZE, rng=3)
    quick = []
    for name in set(ATTACKS) - DIAGNOSTICS:
        one = ATTACKS[name](CANDIDATES, synthetic, shadows.known, rng)
        quick.append(auc(one[:ATTACKED], one[ATTACKED:]))
    for name in ("lira mean", "lira_offline mean", "rmia mean", "timestep_mlp", "meta"):
        assert found[name] > max(0.7, max(quick))
    (inside, outside), places = targeted_attack(run, shadows, MEMBERS, HOLDOUT, **settings)
    assert len(inside) == len(outside) == len(places[0]) == len(places[1]) == 20
    assert places[1].max() < ATTACKED
    played = pseudo_targets(run, shadows, MEMBERS, HOLDOUT, count=2, rng=rng, **settings)
    for target, one in enumerate(played):
        assert set(one) == {*found, "targeted"}
        coins = shadows.inside[target]
        assert one["lira mean"][0].shape == (coins.sum(),)
        assert one["lira mean"][1].shape == ((~coins).sum(),)
        for name in ("lira mean", "rmia mean", "meta"):
            assert auc(*one[name]) > 0.7


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, ShadowSet]:
    run = audited(0.5, steps=20)
    return run, trained(run, tmp_path_factory.mktemp("private"))


def test_a_private_model_is_not(private: tuple[Run, ShadowSet]) -> None:
    run, shadows = private
    assert all(one.epsilon <= 0.5 for one in shadows.runs)
    assert {one.plan.sigma for one in shadows.runs} == {run.plan.sigma}
    found = shadow_attacks(
        run,
        shadows,
        MEMBERS,
        HOLDOUT,
        rng=np.random.default_rng(0),
        console=QUIET,
        settings=SETTINGS,
    )
    low, high = null_band(ATTACKED, ATTACKED)
    reach = (high - low) / 2 / 1.96 * 4  # one in 16 000 an attack
    for name, pair in found.items():
        assert abs(auc(*pair) - 0.5) < reach, name


def test_shadows_are_one_fleet_of_equal_size_with_noise_and_coins_of_their_own(
    by_heart: tuple[Run, ShadowSet],
) -> None:
    run, shadows = by_heart
    packing = json.loads((shadows.folder / "packing.json").read_text())
    assert [len(fleet) for fleet in packing["fleets"]] == [COUNT]
    (keys,) = (shadows.folder / "fleets").glob("*/keys")
    assert len(set(keys.read_text().split())) == COUNT + 1  # and the fleet's name
    assert shadows.rows == (SIZE,) * COUNT
    assert shadows.notes == ()
    seen = shadows.inside.sum(axis=0)
    assert seen.min() >= suite.LEAST
    assert seen.max() <= COUNT - suite.LEAST
    assert len({coins.tobytes() for coins in shadows.inside}) == COUNT
    # The coins of any two shadows agree on half of the rows, of 200: five standard deviations.
    agree = (shadows.inside[:, None] == shadows.inside[None]).mean(axis=2)
    assert (abs(agree[~np.eye(COUNT, dtype=bool)] - 0.5) < 5 * 0.0354).all()
    assert all(one.recipe.options == run.recipe.options for one in shadows.runs)
    assert all(one.plan.q == run.plan.q for one in shadows.runs)
    assert all(one.plan.steps == run.plan.steps for one in shadows.runs)


def test_a_shadow_sees_its_coins_and_strangers_and_nothing_of_what_is_kept(
    by_heart: tuple[Run, ShadowSet],
) -> None:
    run, shadows = by_heart
    missing = SIZE - shadows.inside.sum(axis=1)
    filler, known = suite._halves(POPULATION, missing, 7)
    assert filler is not None
    assert len(filler) == len(POPULATION) // 2
    assert known.digest() == shadows.known.digest()

    def texts(table: Table) -> list[str]:
        return [repr(tuple(map(str, row))) for row in table.frame.itertuples(index=False)]

    strangers, kept, candidates = map(texts, (filler, known, CANDIDATES))
    assert sorted([*strangers, *kept]) == sorted(texts(POPULATION))
    for number, coins in enumerate(shadows.inside):
        seen = texts(suite._rows_of(run, CANDIDATES, filler, coins, 7, number))
        assert {row in set(seen) for row, coin in zip(candidates, coins, strict=True) if coin} == {
            True
        }
        assert not set(seen) & {
            row for row, coin in zip(candidates, coins, strict=True) if not coin
        }
        assert len(set(seen) & set(strangers)) == missing[number]
        assert not set(seen) & set(kept)


def test_coins_are_fair_and_leave_every_row_both_kinds() -> None:
    inside = suite._coins(8, 20_000, 1)
    assert np.minimum(inside.sum(axis=0), 8 - inside.sum(axis=0)).min() == suite.LEAST
    assert (abs(inside.mean(axis=1) - 0.5) < 5 * 0.5 / math.sqrt(20_000)).all()
    np.testing.assert_array_equal(inside, suite._coins(8, 20_000, 1))
    assert (inside != suite._coins(8, 20_000, 2)).any()


def test_few_strangers_are_said() -> None:
    run = audited(math.inf, "naive_bayes")
    assert "shadows saw 90 to 110 rows where the run saw 140" in suite._notes(run, (90, 110))[0]
    assert suite._notes(run, (140, 150)) == ("shadows saw 140 to 150 rows, the run 140",)
    none, known = suite._halves(POPULATION, np.array([0, -3]), 7)
    assert none is None
    assert len(known) == len(POPULATION)
    half, rest = suite._halves(POPULATION, np.array([5000]), 7)
    assert half is not None
    assert len(half) == len(rest) == 300


def test_a_killed_training_goes_on_and_finished_shadows_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = audited(math.inf, steps=20)
    whole = trained(run, tmp_path / "whole", count=8)
    save, saved = Run.save, []

    def dying(self: Run, folder: Path) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(folder)
        save(self, folder)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", dying)
        with pytest.raises(KeyboardInterrupt):
            trained(run, tmp_path / "killed", count=8)
    again = trained(run, tmp_path / "killed", count=8)
    np.testing.assert_array_equal(again.inside, whole.inside)
    for one, other in zip(whole.runs, again.runs, strict=True):
        for name, value in one.generator.state_dict().items():
            assert (value == other.generator.state_dict()[name]).all()
    with monkeypatch.context() as patched:
        patched.setattr("dpsynth.training.grid.train_fleet", None)
        said = StringIO()
        trained(run, tmp_path / "killed", count=8, console=Console(file=said))
        assert "all 8 shadows are there" in said.getvalue()


def test_the_time_is_said_before_it_is_spent(tmp_path: Path) -> None:
    said = StringIO()
    trained(audited(math.inf, steps=20), tmp_path, count=8, console=Console(file=said, width=200))
    lines = said.getvalue().splitlines()
    assert "8 runs in 1 fleet" in lines[0]
    assert lines[1].startswith("8 shadows of 20 steps: about ")
    assert lines[1].endswith(" s")
    assert suite.minutes(150) == "2.5 min"


def test_evidence_is_measured_once(
    by_heart: tuple[Run, ShadowSet], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, shadows = by_heart
    shutil.copytree(shadows.folder, tmp_path / "copy")
    moved = replace(shadows, folder=tmp_path / "copy")
    synthetic = run.sample_table(SIZE, rng=3)

    def measure() -> Evidence:
        return suite._evidence(run, moved, MEMBERS, HOLDOUT, synthetic, SETTINGS, "cpu", QUIET)

    first = measure()
    monkeypatch.setattr(Diffusion, "by_pieces", None)
    monkeypatch.setattr(Diffusion, "sample", None)
    again = measure()
    assert again.names == first.names
    assert first.losses is not None
    for name in ("signals", "population", "losses", "targets", "counts"):
        np.testing.assert_array_equal(getattr(again, name), getattr(first, name))
    for one, other in zip(again.features, first.features, strict=True):
        pd.testing.assert_frame_equal(one, other)
    # A row more among the targets belongs to other evidence.
    with pytest.raises(TypeError, match="not callable"):
        suite._evidence(run, moved, MEMBERS, HOLDOUT, synthetic, Settings(targets=21), "cpu", QUIET)


# Signals


def test_signals_of_a_fleet_are_those_of_each_run_with_its_own_codec(
    by_heart: tuple[Run, ShadowSet],
) -> None:
    run, shadows = by_heart
    runs = [run, *shadows.runs[:3]]
    found = signals_of(runs, HOLDOUT, key=5, draws=4)
    assert found.shape == (4, ATTACKED, 6)
    for place, one in enumerate(runs):
        alone = one.generator.signals(one.codec.encode(HOLDOUT)[None], FleetRng([5]), draws=4)
        np.testing.assert_allclose(found[place], alone[0].numpy(), rtol=1e-4, atol=1e-5)
    losses = losses_of(runs, HOLDOUT, key=5, draws=4)
    assert losses is not None
    np.testing.assert_allclose(losses.mean(axis=-1), found[..., 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses.mean(axis=(-1, -2)), found[..., 0], rtol=1e-4, atol=1e-5)


def test_a_family_that_is_not_trained_is_attacked_too(tmp_path: Path) -> None:
    run = audited(math.inf, "naive_bayes")
    shadows = trained(run, tmp_path, count=8)
    assert losses_of([run], HOLDOUT, key=5) is None
    synthetic = run.sample_table(SIZE, rng=3)
    measured = suite._evidence(run, shadows, MEMBERS, HOLDOUT, synthetic, SETTINGS, "cpu", QUIET)
    found = suite._attack(measured, shadows.inside, 0, np.random.default_rng(0))
    assert set(found) == {"lira loss", "lira_offline loss", "rmia loss"}


# Refusals


def test_what_cannot_be_audited_is_refused(by_heart: tuple[Run, ShadowSet], tmp_path: Path) -> None:
    run, shadows = by_heart

    def train(**changes) -> None:
        given = {
            "run": run,
            "candidates": CANDIDATES,
            "population": POPULATION,
            "count": 8,
            "seed": 7,
            "folder": tmp_path,
            "console": QUIET,
            **changes,
        }
        train_shadows(given.pop("run"), given.pop("candidates"), given.pop("population"), **given)

    for changes, part in (
        ({"count": 7}, "count of shadows=7"),
        ({"seed": -1}, "seed of shadows=-1"),
        ({"seed": 1}, "is the run's own"),
        ({"candidates": CANDIDATES.select(["age", "rich"])}, "candidates and the run"),
        ({"population": POPULATION.select(["age", "rich"])}, "population and the run"),
        ({"population": ALL}, "200 rows in common"),
        ({"run": replace(run, plan=replace(run.plan, unit="owner"))}, "unit='owner'"),
        ({"folder": shadows.folder}, "were begun for another run"),
    ):
        with pytest.raises(UsageError, match=part):
            train(**changes)
    common = {"console": QUIET, "rng": np.random.default_rng(0)}
    with pytest.raises(UsageError, match="not the candidates of the shadows"):
        shadow_attacks(run, shadows, HOLDOUT, MEMBERS, **common)
    for count, part in ((0, "count of pseudo-targets=0"), (99, "there are only 10 shadows")):
        with pytest.raises(UsageError, match=part):
            pseudo_targets(run, shadows, MEMBERS, HOLDOUT, count=count, **common)
    with pytest.raises(UsageError, match="at least one model"):
        as_fleet([])
    with pytest.raises(UsageError, match="differ in recipe or schema"):
        as_fleet([run, audited(math.inf, "naive_bayes")])
    for name in ("draws", "population", "targets", "queries"):
        with pytest.raises(UsageError, match=f"{name}=0"):
            Settings(**{name: 0})


def test_shadows_of_a_run_with_secure_noise_follow_from_the_auditors_seed(tmp_path: Path) -> None:
    run = audited(math.inf, steps=10, secure=True)
    shadows = trained(run, tmp_path, count=8)
    assert run.recipe.privacy["secure"]
    assert all("secure" not in one.recipe.privacy for one in shadows.runs)
    assert signals_of([run, *shadows.runs], HOLDOUT, key=1, draws=2).shape == (9, ATTACKED, 6)
