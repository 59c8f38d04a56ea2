"""Optimizers of a fleet: every run moves as torch's own would move it alone."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dpsynth.optimizers import FleetAdam, FleetSgd

RATES = [1e-3, 0.3, 0.02]


def parameters(runs: int = 3) -> list[nn.Parameter]:
    made = torch.Generator().manual_seed(0)
    shapes = [(runs, 5, 3), (runs, 3), (runs, 1)]
    return [nn.Parameter(torch.randn(s, generator=made, dtype=torch.float64)) for s in shapes]


def gradients(like: list[nn.Parameter], step: int) -> list[Tensor]:
    made = torch.Generator().manual_seed(100 + step)
    scale = 10.0 ** (step % 5 - 3)
    return [torch.randn(p.shape, generator=made, dtype=p.dtype) * scale for p in like]


def optimizer(held: list[nn.Parameter], rates: list[float], **settings) -> FleetAdam:
    return FleetAdam(held, torch.tensor(rates, dtype=torch.float64), **settings)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("rates", [RATES, [0.05] * 3])
def test_every_run_moves_as_it_would_alone(
    rates: list[float], decay: float, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleetAdam, "static", static)
    held = parameters()
    alone = [[nn.Parameter(p[r].detach().clone()) for p in held] for r in range(3)]
    fleet = optimizer(held, rates, betas=(0.7, 0.95), eps=1e-6, weight_decay=decay)
    theirs = [
        torch.optim.AdamW(one, lr=rate, betas=(0.7, 0.95), eps=1e-6, weight_decay=decay)
        for one, rate in zip(alone, rates, strict=True)
    ]
    for step in range(12):
        for parameter, gradient in zip(held, gradients(held, step), strict=True):
            parameter.grad = gradient
            for run in range(3):
                place = next(i for i, p in enumerate(held) if p is parameter)
                alone[run][place].grad = gradient[run].clone()
        fleet.step()
        for one in theirs:
            one.step()
    for place, parameter in enumerate(held):
        for run in range(3):
            torch.testing.assert_close(parameter[run], alone[run][place], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("static", [False, True])
def test_a_schedule_is_a_new_rate_and_rate_zero_keeps_the_weights(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FleetAdam, "static", static)
    held = parameters()
    fleet = optimizer(held, RATES, weight_decay=0.5)
    for step in range(4):
        before = [p.detach().clone() for p in held]
        left = torch.tensor([1.0, 0.5, 0.0 if step > 1 else 1.0], dtype=torch.float64)
        for group in fleet.param_groups:
            group["lr"] = group["base_lr"] * left
        for parameter, gradient in zip(held, gradients(held, step), strict=True):
            parameter.grad = gradient
        fleet.step()
        for parameter, old in zip(held, before, strict=True):
            assert (parameter[:2] != old[:2]).all()
            assert torch.equal(parameter[2], old[2]) == (step > 1)


def test_what_has_no_gradient_stays() -> None:
    held = parameters()
    before = [p.detach().clone() for p in held]
    held[0].grad = torch.ones_like(held[0])
    optimizer(held, RATES).step()
    assert (held[0] != before[0]).all()
    assert all(torch.equal(p, b) for p, b in zip(held[1:], before[1:], strict=True))


def test_a_first_step_has_the_length_of_its_rate() -> None:
    """m̂/√v̂ is ±1 whatever the gradient's size, down to what eps allows."""
    held = parameters()
    before = held[0].detach().clone()
    held[0].grad = gradients(held, 4)[0]
    optimizer(held, RATES, eps=1e-300).step()
    for run, rate in enumerate(RATES):
        moved = (held[0][run] - before[run]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-9, atol=0)


def test_a_stored_state_goes_on_the_same() -> None:
    held = parameters()
    fleet = optimizer(held, RATES)
    for step in range(6):
        if step == 3:
            kept, state = copy.deepcopy(held), copy.deepcopy(fleet.state_dict())
        for parameter, gradient in zip(held, gradients(held, step), strict=True):
            parameter.grad = gradient
        fleet.step()
    again = optimizer(kept, [math.nan] * 3)
    again.load_state_dict(state)
    for step in range(3, 6):
        for parameter, gradient in zip(kept, gradients(kept, step), strict=True):
            parameter.grad = gradient
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def test_descent_is_torchs_own_run_by_run() -> None:
    """With a rate each, one of them 0 from the middle on; what has no gradient stays."""
    held = parameters()
    alone = [[nn.Parameter(p[r].detach().clone()) for p in held] for r in range(3)]
    fleet = FleetSgd(held, torch.tensor(RATES, dtype=torch.float64))
    fleet.prepare()
    for step in range(6):
        left = torch.tensor([1.0, 0.5, 0.0 if step > 2 else 1.0], dtype=torch.float64)
        for group in fleet.param_groups:
            group["lr"] = group["base_lr"] * left
        found = gradients(held, step)
        for place, parameter in enumerate(held[:2]):
            parameter.grad = found[place]
        fleet.step()
        for run, own in enumerate(alone):
            for place, parameter in enumerate(own[:2]):
                parameter.grad = found[place][run].clone()
            torch.optim.SGD(own, lr=RATES[run] * float(left[run])).step()
    assert not fleet.state
    for place, parameter in enumerate(held):
        for run in range(3):
            torch.testing.assert_close(parameter[run], alone[run][place], rtol=1e-12, atol=1e-12)
