"""Step audit of a given run, and the planted defects that stand beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from tiny import recipe, seat

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.ledger import Ledger
from dpsynth.randomness import derive
from dpsynth.schema import Column, Schema
from dpsynth.suite import defects
from dpsynth.suite.defects import EXPECTED, HalfNoise, NoClip, Shuffled, missed, run_defects
from dpsynth.suite.steps import AUDITED_Q, RunStepAudit, _recomposed, audit_run_steps, observe_steps
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import FAMILIES, Seat
from dpsynth.training.run import Run

TRAINED = [name for name, family in FAMILIES.items() if family.trained]


def run_of(model: str = "vae", epsilon: float = 4.0, **others: Any) -> Run:
    seed = others.pop("seed", 0)
    (trained,) = train_fleet(recipe(model, **others), [seat(epsilon, seed)])
    return Run.of(trained, data="tiny")


@pytest.fixture(scope="module")
def vae() -> Run:
    return run_of()


def audited(run: Run, **settings: Any) -> RunStepAudit:
    return audit_run_steps(run, **{"runs": 2, "steps": 40, "device": "cpu", **settings})


@pytest.mark.parametrize("model", TRAINED)
def test_the_steps_are_those_of_the_run(model: str) -> None:
    """Noise, clipping and layers are the run's in every family; nothing sound is flagged."""
    run = run_of(model)
    audit = audited(run)
    assert audit.flags == ()
    assert audit.noise.sigma == run.plan.noise
    assert audit.noise.claimed == pytest.approx(run.epsilon, rel=1e-6)
    assert (audit.q, audit.clip, audit.trained) == (run.plan.q, run.plan.clip, run.plan.steps)
    assert (audit.runs, audit.steps, audit.planned, audit.noise.guesses) == (2, 40, 40, 80)
    assert audit.sampler.q == AUDITED_Q
    assert audit.sampler.batches == 80
    assert 0 <= audit.epsilon <= audit.noise.claimed


@pytest.mark.parametrize("engine", ["opacus_hooks", "opacus_ghost"])
def test_the_engine_is_that_of_the_run(engine: str) -> None:
    run = run_of(engine=engine)
    used: list[str] = []

    class Noted(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            used.append(type(pl_module._engine.clipper).__name__)

    assert audited(run, plant=[Noted()]).flags == ()
    assert used == [{"opacus_hooks": "HooksClipper", "opacus_ghost": "GhostClipper"}[engine]]


def test_secure_noise_is_audited_with_keys_of_its_own() -> None:
    run = run_of(privacy={"secure": True}, seed=None)
    first, second = (observe_steps(run, runs=2, steps=8, seed=3, device="cpu") for _ in range(2))
    assert not np.allclose(first.noise, second.noise)
    np.testing.assert_array_equal(first.present, second.present)


def test_the_seed_is_all_there_is(vae: Run) -> None:
    first, again, other = (
        observe_steps(vae, runs=2, steps=8, seed=seed, device="cpu") for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.scores, again.scores)
    assert (first.scores != other.scores).any()


def test_only_rows_that_the_run_makes_up_are_read(vae: Run, tmp_path: Path) -> None:
    """A run from its folder knows no others; weights and tables are its own."""
    vae.save(tmp_path / "run")
    run = Run.load(tmp_path / "run")
    rows: list[torch.Tensor] = []

    class Noted(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            rows.append(pl_module._codes.clone())
            for name, value in run.generator.state_dict().items():
                mine = pl_module.state_dict()[name]
                if name != "completed":
                    torch.testing.assert_close(mine, value.expand_as(mine))

    observe_steps(run, runs=3, steps=4, seed=5, device="cpu", plant=[Noted()])
    made = run.codec.encode(run.sample_table(256, rng=derive(5, "rows")))
    torch.testing.assert_close(rows[0].long(), made.expand(3, -1, -1))
    assert run.generator.completed == vae.generator.completed
    assert not any(p.requires_grad for p in run.generator.parameters())


def test_epsilon_is_recomposed_with_everything_in_the_ledger(vae: Run) -> None:
    epsilon_of = _recomposed(vae)
    assert epsilon_of(vae.plan.noise) == pytest.approx(vae.epsilon)
    louder = 2 * vae.plan.noise
    last = vae.ledger.events[-1]
    events = [*vae.ledger.events[:-1], replace(last, sigma=louder)]
    assert len(events) > 3
    assert epsilon_of(louder) == pytest.approx(compose_epsilon(events, vae.ledger.delta))
    assert epsilon_of(louder) < vae.epsilon


def test_steps_end_with_the_time(vae: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", lambda text, **_: told.append(text))
    short = audited(vae, steps=120, seconds=1e-9, console=console)
    assert (short.steps, short.planned) == (10, 120)
    assert short.limit == 1e-9
    assert short.attainable < audited(vae, steps=120, console=console).attainable
    assert any("120 of 120 steps, about 0 s left" in line for line in told)
    assert len(told) <= 11


def test_by_default_as_many_steps_as_the_run_took() -> None:
    run = run_of(privacy={"steps": 12})
    assert audit_run_steps(run, runs=2, device="cpu").steps == 12


@pytest.mark.parametrize(
    ("plant", "flag"),
    [(HalfNoise, "scale"), (NoClip, "contribution"), (Shuffled, "batch sizes")],
)
def test_a_planted_defect_is_flagged(vae: Run, plant: type[Callback], flag: str) -> None:
    assert flag in audited(vae, plant=[plant()]).flags


def test_half_the_noise_shows_in_the_bound(vae: Run) -> None:
    audit = audited(vae, steps=160, plant=[HalfNoise()])
    assert audit.epsilon > audit.noise.claimed
    assert audit.noise.bound.sigma < vae.plan.noise


def test_a_report_is_json(vae: Run) -> None:
    body = json.loads(json.dumps(audited(vae, steps=8, runs=1).to_dict()))
    assert body["flags"] == []
    assert body["noise"]["sigma"] == vae.plan.noise
    assert {"epsilon", "attainable", "steps", "limit", "seconds"} <= set(body)


def without_training(run: Run) -> Run:
    ledger = Ledger(run.ledger.delta)
    for event in run.ledger.events[:-1]:
        ledger.pay(event)
    return replace(run, ledger=ledger)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda run: audited(run_of(epsilon=math.inf)), "epsilon=inf"),
        (lambda run: audited(run_of("naive_bayes")), "model=naive_bayes"),
        (lambda run: observe_steps(run_of("independent"), runs=1, steps=9, seed=0), "independent"),
        (lambda run: audited(run, steps=3), "steps=3"),
        (lambda run: audited(run, runs=0), "runs=0"),
        (lambda run: audited(run, seconds=0.0), "seconds=0.0"),
        (lambda run: audited(without_training(run)), "no single event 'dpsgd:vae'"),
    ],
)
def test_a_run_that_cannot_be_audited_is_refused(vae: Run, call: Any, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call(vae)


# Defects


def test_every_defect_of_the_default_is_flagged_and_the_sound_engine_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", lambda text, **_: told.append(text))
    flagged = run_defects(device="cpu", console=console)
    assert dict(flagged) == dict(EXPECTED)
    assert missed(flagged) == ()
    assert told[0] == "sound: not flagged"
    assert "sigma/2: flagged" in told


def test_every_defect_of_a_run_is_flagged() -> None:
    """A category with numbers beside it, some of them missing; the run's own schema is used."""
    assert missed(run_defects(run_of("diffusion"), seed=2, device="cpu")) == ()


def test_an_audit_without_power_is_found_out(vae: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planted, so nothing may be flagged; a refusal that never comes is seen too."""
    monkeypatch.setattr(HalfNoise, "on_train_start", lambda *_: None)
    monkeypatch.setattr(Schema, "check_public", lambda _: None)
    flagged = run_defects(vae, device="cpu")
    assert missed(flagged) == ("sigma/2", "private min/max")


@pytest.mark.parametrize("kind", ["numbers", "levels"])
def test_schemas_of_one_kind_have_their_defects_too(vae: Run, kind: str) -> None:
    """Bounds stand for levels, and the other way round, where there are no others."""
    columns = {
        "numbers": Column("age", "integer", lower=0, upper=9),
        "levels": Column("job", "categorical", ("cook", "nurse")),
    }
    schema = Schema((columns[kind],), expected_rows=400)
    column = columns[kind]
    levels = list(column.levels) or list(range(10))
    frame = {column.name: np.random.default_rng(0).choice(levels, 400)}
    table = Table.from_frame(pd.DataFrame(frame), schema)
    (trained,) = train_fleet(recipe("independent"), [Seat(table, 4.0, 0)])
    run = Run.of(trained, data="tiny")
    assert defects._refused(lambda: defects._train_on_private_bounds(run))
    assert defects._refused(lambda: defects._read_unseen(run, 0))
