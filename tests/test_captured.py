"""Captured steps: the same steps as in plain Python, and the same law of batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import chi_square
from scipy import stats
from tiny import recipe, seat

from dpsynth.capture import capture
from dpsynth.checks import UsageError
from dpsynth.counter import CounterRng
from dpsynth.models import captured
from dpsynth.models.captured import CapturedSteps
from dpsynth.optimizers import FleetAdam
from dpsynth.privacy import engine
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.training.fleet import Trained, train_fleet

FAMILIES = ["vae", "gan", "diffusion", "autoregressive"]
devices = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
        ),
    ],
)


# What a fleet starts from is not captured.
pytestmark = pytest.mark.usefixtures("hasty")


def train(model: str) -> list[Trained]:
    """Three runs that differ in all that a run has of its own."""
    own = [{"steps": 5, "batch": 40}, {"steps": 3, "batch": 90, "clip": 0.5}, {"steps": 5}]
    rates: list[dict[str, Any]] = [{}, {"lr": 0.02}, {}]
    recipes = [
        recipe(model, options={**rate, "block": 3}, privacy=p, capture=True)
        for rate, p in zip(rates, own, strict=True)
    ]
    seats = [seat(0.5, 1), seat(4.0, 2), seat(math.inf, 3)]
    return train_fleet(recipes, seats)


def weights(trained: Trained) -> dict[str, torch.Tensor]:
    return dict(trained.generator.state_dict())


def assert_same(left: list[Trained], right: list[Trained], atol: float) -> None:
    for one, other in zip(left, right, strict=True):
        for name, value in weights(one).items():
            torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=atol, msg=name)


def plainly(work: Callable[[], None], state: Any, *, compiled: bool) -> Callable[[], None]:
    return work


@pytest.mark.parametrize("model", FAMILIES)
def test_a_captured_fleet_is_its_steps_and_its_runs_alone(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_PIECE", 32)  # how noise is cut must not show
    replayed = train(model)
    (alone,) = train_fleet(replayed[1].recipe, [replayed[1].seat])
    assert_same([replayed[1]], [alone], atol=1e-5)
    monkeypatch.setattr(captured, "capture", plainly)
    assert_same(replayed, train(model), atol=1e-6)


@devices
@pytest.mark.parametrize("settings", [{"piece": 16}, {"piece": 2048}])
@pytest.mark.parametrize("model", FAMILIES)
def test_batches_in_pieces_and_longer_than_their_buffer_give_the_same_run(
    model: str, settings: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_SPREAD", -1.0)
    few = recipe(model, capture=True, device=device, **settings)
    replayed = train_fleet(few, [seat(0.5, 1), seat(math.inf, 1)])
    monkeypatch.setattr(captured, "capture", plainly)
    again = train_fleet(few, [seat(0.5, 1), seat(math.inf, 1)])
    assert_same(replayed, again, atol=1e-6 if device == "cpu" else 1e-3)


def steps_of(
    monkeypatch: pytest.MonkeyPatch, rows: int, q: float, keys: list[int], block: int
) -> CapturedSteps:
    """The sampler of captured steps alone."""
    made = CapturedSteps.__new__(CapturedSteps)

    class Fleet:
        device = torch.device("cpu")
        _batches = PoissonBatches([rows] * len(keys), [q] * len(keys))
        _steps = torch.full((len(keys),), 1e9)
        _codes = torch.zeros(len(keys), rows, 1)

    made._of, made._rng = Fleet(), CounterRng(keys)  # type: ignore[assignment]
    made._batches(block)
    return made


def batches_of(made: CapturedSteps, first: int, last: int) -> list[np.ndarray]:
    """Who is in each step's batch of the first run."""
    made._base.fill_(first)
    made._ahead.fill_(first)
    for _ in range(first, last):
        made._draw()
    members = []
    for slot, longer in enumerate(made._more.tolist()[: last - first]):
        pair = made._again(first + slot) if longer else (made._index[slot], made._inside[slot])
        members.append(pair[0][0, pair[1][0]].numpy())
    return members


@pytest.mark.parametrize("spread", [6.0, -1.0])
@pytest.mark.parametrize(("rows", "q"), [(60, 0.2), (40, 0.9), (30, 1.0)])
def test_batches_are_poisson_batches(
    rows: int, q: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "_SPREAD", spread)
    steps = 1500 if q < 1 else 100  # all rows at every step take no statistics
    members = batches_of(steps_of(monkeypatch, rows, q, [3, 4], steps), 0, steps)
    table = np.zeros((steps, rows), dtype=bool)
    for step, batch in enumerate(members):
        assert (np.diff(batch) > 0).all()
        table[step, batch] = True
    assert [len(batch) for batch in members] == table.sum(1).tolist()
    if q == 1:
        assert table.all()
        return
    for record in range(rows):
        assert stats.binomtest(int(table[:, record].sum()), steps, q).pvalue > 1e-4 / rows
    sizes = np.bincount(table.sum(1), minlength=rows + 1)
    assert chi_square(sizes, stats.binom(rows, q).pmf(np.arange(rows + 1))) > 1e-4
    assert chi_square(sizes, stats.binom(rows, 0.9 * q).pmf(np.arange(rows + 1))) < 1e-6
    both = int((table[:-1] & table[1:]).sum())
    assert stats.binomtest(both, table[1:].size, q * q).pvalue > 1e-4


def test_batches_are_those_of_the_sampler_with_the_same_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = steps_of(monkeypatch, 500, 0.05, [8, 9], 40)
    for step, batch in enumerate(batches_of(made, 100, 140), start=100):
        ((index, inside),) = PoissonBatches([500], [0.05]).draw(CounterRng([8]), step)
        np.testing.assert_array_equal(batch, index[0, inside[0]].numpy())


def counting() -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A step of an optimizer on weights, with a counter and moments that live on."""
    weight = torch.nn.Parameter(torch.linspace(1, 2, 4)[None])
    step = torch.zeros((), dtype=torch.long)
    optimizer = FleetAdam([weight], torch.tensor([0.1]))
    optimizer.prepare()
    optimizer.static = True

    def work() -> None:
        loss = (weight.square() * (step + 1)).sum()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
        with torch.no_grad():
            step.add_(1)

    return work, [weight, step, *optimizer.state[weight].values()]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_capture_does_what_the_function_does_and_leaves_the_state(compiled: bool) -> None:
    work, state = counting()
    before = [tensor.detach().clone() for tensor in state]
    call = capture(work, state, compiled=compiled)
    assert all(torch.equal(t, b) for t, b in zip(state, before, strict=True))
    for _ in range(4):
        call()
    again, expected = counting()
    for _ in range(4):
        again()
    for found, wanted in zip(state, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_cannot_be_compiled_is_taken_as_it_is_and_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    work, state = counting()
    with pytest.warns(UserWarning, match="cannot compile a step, so it is slower: no compiler$"):
        call = capture(work, state, compiled=True)
    again, expected = counting()
    call()
    again()
    for found, wanted in zip(state, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_is_not_in_the_state_is_noticed() -> None:
    """Operations on tensors that the trace does not follow are done once and then stand still."""
    work, state = counting()
    with pytest.raises(RuntimeError, match="does not do what its function does"):
        capture(work, [state[0], *state[2:]], compiled=False)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"capture": "yes"}, "capture=yes"),
        ({"capture": True, "engine": "opacus_ghost"}, "engine=opacus_ghost"),
        ({"capture": True, "privacy": {"secure": True}}, "privacy.secure=true"),
    ],
)
def test_what_cannot_be_captured_is_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        recipe("vae", **settings)
