"""The private step: noise, denominators and refusals."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.engine import FleetOptimizer, PrivateEngine
from dpsynth.randomness import FleetRng

MODES = list(ENGINES)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def plain_network(runs: int = 2) -> Mlp:
    network = Mlp(runs, [4, 5, 3]).double()
    network.reset(FleetRng(list(range(runs)), dtype=torch.float64), "plain", zero=False)
    return network


def inputs(runs: int = 2, records: int = 7) -> Tensor:
    return FleetRng(list(range(runs)), dtype=torch.float64).at("inputs").normal(records, 4)


def engine_of(runs: int = 1, **settings: Any) -> PrivateEngine:
    network = plain_network(runs)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    chosen = {"sigma": [1.0] * runs, "bound": [1.0] * runs, "batch": [4.0] * runs, **settings}
    return PrivateEngine(network, optimizer, **chosen)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"mode": "loops"}, "engine=loops"),
        ({"sigma": [1.0], "bound": [math.inf]}, "finite clipping bound"),
        ({"sigma": [0.0], "bound": [1.0]}, "not private"),
        ({"sigma": [-1.0]}, "sigma=-1.0"),
        ({"sigma": [math.nan]}, "sigma=nan"),
        ({"sigma": [math.inf]}, "sigma=inf"),
        ({"bound": [0.0]}, "clip=0.0"),
        ({"bound": [-1.0]}, "clip=-1.0"),
        ({"bound": [math.nan]}, "clip=nan"),
        ({"sigma": [0.0], "bound": [math.nan]}, "clip=nan"),
        ({"batch": [0.0]}, "batch=0.0"),
        ({"batch": [math.nan]}, "batch=nan"),
    ],
)
def test_refuses_noise_and_bounds_that_do_not_go_together(
    settings: dict[str, Any], part: str
) -> None:
    with pytest.raises(UsageError, match=part):
        engine_of(**settings)


def test_every_run_needs_its_own_settings() -> None:
    for chosen in ({"sigma": [1.0]}, {"bound": [1.0]}, {"batch": [4.0]}):
        with pytest.raises(ValueError):
            engine_of(2, **chosen)


# Noise

WIDE = 250


def wide_optimizer(runs: int, sigma: list[float], bound: list[float], batch: list[float]):
    """A layer with 62 500 weights a run, and the optimizer that releases its sums."""
    layer = FleetLinear(runs, WIDE, WIDE).double()
    start = torch.optim.SGD(layer.parameters(), lr=1.0)
    noisy = FleetOptimizer(start, sigma=doubles(sigma), bound=doubles(bound), batch=doubles(batch))
    return layer, noisy


def moved(runs: int, sigma: list[float], bound: list[float], batch: list[float], step: int = 0):
    """What one step with an empty batch moves (runs, weights and biases)."""
    layer, noisy = wide_optimizer(runs, sigma, bound, batch)
    noisy.release(FleetRng(list(range(40, 40 + runs)), dtype=torch.float64), step)
    return torch.cat([p.detach().flatten(1) for p in (layer.weight, layer.bias)], dim=1).numpy()


def test_noise_has_the_scale_of_the_plan_and_no_other() -> None:
    """N(0, (σC/batch)²) for each run; two thirds of it and half as much again are told apart."""
    sigma, bound, batch = [0.8, 1.5, 4.0], [1.0, 0.3, 2.0], [64.0, 10.0, 500.0]
    for run, drawn in enumerate(moved(3, sigma, bound, batch)):
        scale = sigma[run] * bound[run] / batch[run]
        assert stats.kstest(drawn, stats.norm(0, scale).cdf).pvalue > 1e-3
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(drawn, stats.norm(0, wrong * scale).cdf).pvalue < 1e-12
        assert abs(drawn.mean()) < 4 * scale / math.sqrt(drawn.size)


def test_noise_is_never_used_twice() -> None:
    """Other steps, other runs and other parameters draw other numbers; each pair correlates by
    chance only."""
    settings = ([1.0, 1.0], [1.0, 1.0], [1.0, 1.0])
    drawn = [*moved(2, *settings, step=0), *moved(2, *settings, step=1)]
    pieces = [part for d in drawn for part in (d[:20_000], d[20_000:40_000], d[40_000:60_000])]
    # The biases, and the weights that were drawn first: a stream opened twice would repeat them.
    pieces += [part for d in drawn for part in (d[-WIDE:], d[:WIDE])]
    for i, left in enumerate(pieces):
        for right in pieces[:i]:
            if left.size == right.size:
                assert abs(np.corrcoef(left, right)[0, 1]) < 4.5 / math.sqrt(left.size)


def test_the_same_step_draws_the_same_noise() -> None:
    settings = ([1.0], [1.0], [1.0])
    np.testing.assert_array_equal(moved(1, *settings), moved(1, *settings))


def test_noise_is_added_to_the_sum_and_divided_with_it() -> None:
    layer, noisy = wide_optimizer(1, [2.0], [0.5], [8.0])
    total = FleetRng([3], dtype=torch.float64).at("sum").normal(WIDE, WIDE)
    layer.weight.summed_grad = total  # type: ignore[attr-defined]
    noisy.release(FleetRng([40], dtype=torch.float64), 0)
    with_sum = layer.weight.detach().clone()
    without = moved(1, [2.0], [0.5], [8.0])[:, : WIDE**2].reshape(1, WIDE, WIDE)
    # Each entry of the sum is rounded to the nearest point of the grid first.
    half = float(noisy.grid) / 2 / 8
    assert half < 1e-6
    torch.testing.assert_close(with_sum, torch.from_numpy(without) - total / 8, rtol=0, atol=half)


def test_without_noise_and_bound_a_step_is_the_mean_gradient() -> None:
    x, counts = inputs(), torch.ones(2, 7, dtype=torch.float64)
    counts[1, 5:] = 0
    network = plain_network()
    start = [p.detach().clone() for p in network.parameters()]
    loss = (network(x).square().sum(-1) * counts).sum()
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    engine = PrivateEngine(
        network,
        torch.optim.SGD(network.parameters(), lr=1.0),
        sigma=[0.0, 0.0],
        bound=[math.inf, math.inf],
        batch=[7.0, 4.0],
    )
    engine.accumulate(lambda: network(x).square().sum(-1), counts)
    engine.step(FleetRng([0, 1], dtype=torch.float64), 0)
    for parameter, before, gradient in zip(network.parameters(), start, gradients, strict=True):
        mean = gradient / doubles([7.0, 4.0]).view(2, *(1,) * (gradient.dim() - 1))
        torch.testing.assert_close(before - parameter, mean, rtol=1e-12, atol=1e-12)
        assert parameter.grad is None


def test_a_run_without_privacy_gets_no_noise_beside_one_with() -> None:
    drawn = moved(2, [0.0, 1.0], [math.inf, 1.0], [1.0, 1.0])
    assert (drawn[0] == 0).all()
    assert (drawn[1] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_a_step_of_noise_alone(mode: str) -> None:
    """With a batch in which nothing counts, and with no batch at all: the same step."""
    ends = []
    for records in (5, 0):
        engine = engine_of(mode=mode)
        network = engine.clipper.network
        before = torch.cat([p.detach().flatten() for p in network.parameters()])
        if records:
            x = inputs(1, records)
            engine.accumulate(
                lambda n=network, x=x: n(x).square().sum(-1),
                torch.zeros(1, records, dtype=torch.float64),
            )
        engine.step(FleetRng([9], dtype=torch.float64), 0)
        ends.append(torch.cat([p.detach().flatten() for p in network.parameters()]) - before)
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert (ends[0] != 0).all()
    assert stats.kstest(ends[0].numpy(), stats.norm(0, 1 / 4).cdf).pvalue > 1e-3


def test_sums_are_cleared_after_each_step() -> None:
    """A second step holds nothing of the first one's rows."""
    engine = engine_of(sigma=[0.0], bound=[math.inf])
    network = engine.clipper.network
    rng = FleetRng([9], dtype=torch.float64)
    engine.accumulate(lambda: network(inputs(1)).square().sum(-1), torch.ones(1, 7).double())
    engine.step(rng, 0)
    after = [p.detach().clone() for p in network.parameters()]
    engine.step(rng, 1)
    for parameter, held in zip(network.parameters(), after, strict=True):
        assert (parameter == held).all()
