"""Clipping: three engines against gradients taken one record at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fleets import TRAINED, make_fleet, random_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import record_gradients, sum_clipped
from torch import Tensor, nn

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.models import Generator
from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.layers import squared_norms
from dpsynth.randomness import FleetRng

LAYOUT = Layout((3, 4, 2, 5), target=2)
RECORDS = 6
MODES = list(ENGINES)


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(family: str, runs: int) -> Generator:
    """The same fleet at each call: an engine may be put on a network only once."""
    return make_fleet(family, LAYOUT, list(range(100, 100 + runs)))


def codes(runs: int, seed: int = 0) -> Tensor:
    return random_codes(LAYOUT, runs, RECORDS, seed)


def draws(runs: int) -> FleetRng:
    """The streams of one step, opened anew for each evaluation so that all see equal noise."""
    return FleetRng(list(range(runs)), dtype=torch.float64).at("draws", 0)


def clipped(
    mode: str, network: nn.Module, losses: Callable[[], Tensor], bound: Tensor, counts: Tensor
) -> list[Tensor]:
    ENGINES[mode](network, bound).accumulate(losses, counts)
    return [p.summed_grad for p in network.parameters()]  # type: ignore[attr-defined]


def of_family(mode: str, family: str, rows: Tensor, bound: Tensor, counts: Tensor) -> list[Tensor]:
    model = generator(family, len(rows))
    losses = lambda: model.record_loss(rows, draws(len(rows)))  # noqa: E731
    return clipped(mode, model.network, losses, bound, counts)


def oracle(family: str, rows: Tensor) -> tuple[list[list[list[Tensor]]], np.ndarray]:
    """Every record's gradient and its norm (runs, records)."""
    model = generator(family, len(rows))
    parameters = list(model.network.parameters())
    found = record_gradients(lambda: model.record_loss(rows, draws(len(rows))), parameters)
    norms = [[float(torch.cat([g.flatten() for g in row]).norm()) for row in r] for r in found]
    return found, np.array(norms)


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


# Clipped sums


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("family", TRAINED)
def test_engines_sum_what_one_record_at_a_time_gives(family: str, runs: int) -> None:
    """With a bound a run that cuts some records and leaves others, and one record of padding."""
    rows = codes(runs)
    gradients, norms = oracle(family, rows)
    bound = doubles([np.quantile(norms[r], 0.3 + 0.2 * r) for r in range(runs)])
    assert ((norms > bound[:, None].numpy()).any(1) & (norms < bound[:, None].numpy()).any(1)).all()
    counts = torch.ones(runs, RECORDS, dtype=torch.float64)
    counts[-1, 2] = 0
    expected = sum_clipped(gradients, bound.tolist(), counts)
    assert all(total.abs().max() > 1e-3 for total in expected)
    for mode in MODES:
        assert_close(of_family(mode, family, rows, bound, counts), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TRAINED)
def test_no_bound_gives_the_plain_sum(family: str, mode: str) -> None:
    rows = codes(2)
    gradients, _ = oracle(family, rows)
    counts = torch.ones(2, RECORDS, dtype=torch.float64)
    plain = [
        torch.stack([torch.stack([row[place] for row in run]).sum(0) for run in gradients])
        for place in range(len(gradients[0][0]))
    ]
    assert_close(of_family(mode, family, rows, doubles([math.inf] * 2), counts), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TRAINED)
def test_one_record_moves_its_own_run_by_its_bound_at_most(family: str, mode: str) -> None:
    """The sensitivity that the accountant is told: adding record i moves the sum by C or less."""
    bound, rows = doubles([0.05, 0.4]), codes(2)
    counts = torch.ones(2, RECORDS, dtype=torch.float64)
    whole = of_family(mode, family, rows, bound, counts)
    for record in range(RECORDS):
        fewer = counts.clone()
        fewer[0, record] = 0
        parts = of_family(mode, family, rows, bound, fewer)
        moved = torch.cat([(a - b).flatten(1) for a, b in zip(whole, parts, strict=True)], dim=1)
        norms = moved.norm(dim=1)
        assert 0 < norms[0] <= 0.05 * (1 + 1e-12)
        assert norms[1] == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", TRAINED)
def test_what_padding_holds_changes_nothing(family: str, mode: str) -> None:
    rows, bound = codes(2), doubles([0.1, 2.0])
    counts = torch.ones(2, RECORDS, dtype=torch.float64)
    counts[0, 1] = counts[1, -2:] = 0
    other = torch.where(counts[..., None] > 0, rows, codes(2, seed=9))
    assert (other != rows).any()
    found = of_family(mode, family, other, bound, counts)
    assert_close(found, of_family(mode, family, rows, bound, counts))
    nothing = of_family(mode, family, rows, bound, torch.zeros_like(counts))
    assert all((total == 0).all() for total in nothing)


def plain_network(runs: int = 2) -> Mlp:
    network = Mlp(runs, [4, 5, 3]).double()
    network.reset(FleetRng(list(range(runs)), dtype=torch.float64), "plain", zero=False)
    return network


def inputs(runs: int = 2, records: int = 7) -> Tensor:
    return FleetRng(list(range(runs)), dtype=torch.float64).at("inputs").normal(records, 4)


def poisoned(kind: str, network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Loss whose record (0, 2) has a gradient that is not finite."""
    x, weight = x.clone(), torch.ones(x.shape[:2], dtype=x.dtype)
    if kind in ("nan", "inf"):
        x[0, 2, 1] = math.nan if kind == "nan" else math.inf
    elif kind == "overflow":  # finite itself, with a square that is not
        x[0, 2] = 1e200
    elif kind in ("nan loss", "inf loss"):
        weight[0, 2] = math.nan if kind == "nan loss" else math.inf
    losses = lambda: network(x).square().sum(-1) * weight  # noqa: E731
    if kind != "slope":
        return losses
    cliff = torch.zeros_like(weight)
    cliff[0, 2] = 1

    def steep() -> Tensor:
        """A finite loss with an infinite slope: √t at t = 0."""
        out = network(x)
        zero = (out.sum(-1) - out.sum(-1).detach()).abs() + 1 - cliff
        return out.square().sum(-1) + zero.sqrt()

    return steep


@pytest.mark.parametrize("bound", [0.7, math.inf])
@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "nan loss", "inf loss", "slope"])
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_counts_nothing(mode: str, kind: str, bound: float) -> None:
    x, counts = inputs(), torch.ones(2, 7, dtype=torch.float64)
    counts[0, 2] = 0
    bounds = doubles([bound, bound])
    network = plain_network()
    gradients = record_gradients(lambda: network(x).square().sum(-1), list(network.parameters()))
    expected = sum_clipped(gradients, bounds.tolist(), counts)
    network = plain_network()
    broken = poisoned(kind, network, x)
    found = clipped(mode, network, broken, bounds, torch.ones(2, 7, dtype=torch.float64))
    assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_pieces_of_a_batch_add_up(mode: str) -> None:
    x, bound = inputs(), doubles([0.5, 1.5])
    counts = torch.ones(2, 7, dtype=torch.float64)
    network = plain_network()
    whole = clipped(mode, network, lambda: network(x).square().sum(-1), bound, counts)
    network = plain_network()
    engine = ENGINES[mode](network, bound)
    for part in (slice(0, 3), slice(3, 7)):
        losses = lambda p=part: network(x[:, p]).square().sum(-1)  # noqa: E731
        returned = engine.accumulate(losses, counts[:, part])
        assert not returned.requires_grad
        torch.testing.assert_close(returned, losses().detach())
    assert_close([p.summed_grad for p in network.parameters()], whole)  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", MODES)
def test_runs_do_not_feel_one_another(mode: str) -> None:
    x, counts = inputs(3), torch.ones(3, 7, dtype=torch.float64)
    network = plain_network(3)
    losses = lambda: network(x).square().sum(-1)  # noqa: E731
    first = clipped(mode, network, losses, doubles([0.5, 1.0, 2.0]), counts)
    network, x = plain_network(3), x.clone()
    x[1] = x[1] * 100
    with torch.no_grad():
        for parameter in network.parameters():
            parameter[1] += 1
    other = clipped(
        mode, network, lambda: network(x).square().sum(-1), doubles([0.5, 7.0, 2.0]), counts
    )
    for left, right in zip(first, other, strict=True):
        torch.testing.assert_close(left[[0, 2]], right[[0, 2]], rtol=1e-12, atol=1e-12)
        assert (left[1] != right[1]).any()


def shared_layer() -> tuple[nn.Sequential, Callable[[], Tensor]]:
    """One layer used twice, the second time on what the first gave and with a draws axis."""
    network = nn.Sequential(FleetLinear(2, 4, 4)).double()
    network[0].reset(FleetRng([5, 6], dtype=torch.float64).at("shared"))  # type: ignore[operator]
    x = inputs()
    noise = FleetRng([5, 6], dtype=torch.float64).at("noise").normal(7, 3, 4)

    def losses() -> Tensor:
        once = network(x).tanh()
        again = network(once[:, :, None] + noise)
        return once.square().sum(-1) + again.square().sum(-1).mean(-1)

    return network, losses


@pytest.mark.parametrize("mode", ["taps", "opacus_hooks"])
def test_a_layer_used_twice_is_clipped_as_one(mode: str) -> None:
    network, losses = shared_layer()
    gradients = record_gradients(losses, list(network.parameters()))
    counts = torch.ones(2, 7, dtype=torch.float64)
    for bound in ([1.0, 2.5], [math.inf, 1e-3]):
        network, losses = shared_layer()
        found = clipped(mode, network, losses, doubles(bound), counts)
        assert_close(found, sum_clipped(gradients, bound, counts))


def test_ghost_norms_refuse_a_layer_used_twice() -> None:
    network, losses = shared_layer()
    with pytest.raises(NotImplementedError, match="tying"):
        clipped("opacus_ghost", network, losses, doubles([1.0, 1.0]), torch.ones(2, 7))


@settings(max_examples=30)
@given(st.tuples(*(st.integers(1, 4) for _ in range(5))), st.integers(0, 2**32 - 1), st.booleans())
def test_squared_norms_are_those_of_the_gradients_written_out(
    shape: tuple[int, ...], seed: int, zeros: bool
) -> None:
    runs, records, many, inside, outside = shape
    rng = np.random.default_rng(seed)
    a = torch.from_numpy(rng.normal(size=(runs, records, many, inside)) * (0 if zeros else 1))
    b = torch.from_numpy(rng.normal(size=(runs, records, many, outside)))
    weight, bias = torch.einsum("rbki,rbko->rbio", a, b), b.sum(2)
    expected = weight.square().sum((-1, -2)) + bias.square().sum(-1)
    torch.testing.assert_close(squared_norms(a, b), expected, rtol=1e-10, atol=1e-10)


# Refusals


def running_minimum() -> nn.Module:
    module = nn.Identity()
    module.register_buffer("running_min", torch.zeros(3))
    return module


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(3, affine=False),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.SyncBatchNorm(3, affine=False),
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.GroupNorm(1, 3, affine=False),
        nn.LocalResponseNorm(2),
        nn.CrossMapLRN2d(2),
        nn.LayerNorm((3, 2), elementwise_affine=False),
        nn.RMSNorm((3, 2), elementwise_affine=False),
        running_minimum(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_mixes_records_is_refused_by_name(mode: str, layer: nn.Module) -> None:
    network = nn.Sequential(FleetLinear(1, 2, 2), layer)
    with pytest.raises(UsageError, match=rf"layer '1' \({type(layer).__name__}\): mixes records"):
        ENGINES[mode](network, torch.ones(1))


def test_layers_without_weights_that_keep_records_apart_are_taken() -> None:
    for layer in (nn.SiLU(), nn.Flatten(2), nn.LayerNorm(2, elementwise_affine=False)):
        ENGINES["taps"](nn.Sequential(FleetLinear(1, 2, 2), layer), torch.ones(1))
