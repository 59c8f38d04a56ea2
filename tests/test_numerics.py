"""Floating point: no record exceeds its bound, and of a sum only its grid points survive."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dpsynth.checks import UsageError
from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.clipping import ENGINES, TapClipper
from dpsynth.privacy.engine import FleetOptimizer, PrivateEngine
from dpsynth.privacy.layers import squared_norms
from dpsynth.randomness import FleetRng

MODES = list(ENGINES)
RUNS, INSIDE, OUTSIDE = 64, 7, 5


def shares(mode: str, a: Tensor, b: Tensor, bound: float) -> np.ndarray:
    """Norm in float64 of what the one record of each run adds, for one layer with inputs `a` and
    gradients `b` at its output, both (runs, draws, features)."""
    network = nn.Sequential(FleetLinear(len(a), a.shape[-1], b.shape[-1])).to(a.dtype)
    clipper = ENGINES[mode](network, torch.full((len(a),), bound, dtype=a.dtype))
    x, pull = a[:, None], b[:, None]
    clipper.accumulate(
        lambda: (network(x) * pull).sum((-1, -2)), torch.ones(len(a), 1, dtype=a.dtype)
    )
    sums = [p.summed_grad.double().flatten(1) for p in network.parameters()]  # type: ignore[attr-defined]
    return torch.cat(sums, dim=1).norm(dim=1).numpy()


def magnitudes(rng: np.random.Generator, draws: int, features: int, low: int, high: int) -> Tensor:
    """Directions at random, lengths from 10^low to 10^high, a record or a feature at a time."""
    spread = rng.uniform(low, high, size=(RUNS, 1, 1))
    each = np.where(
        np.arange(RUNS)[:, None, None] % 2, 0, rng.uniform(-6, 6, (RUNS, draws, features))
    )
    values = rng.normal(size=(RUNS, draws, features)) * 10.0 ** np.clip(spread + each, low, high)
    return torch.from_numpy(values.astype(np.float32))


def cancelling(rng: np.random.Generator, draws: int, residue: float) -> tuple[Tensor, Tensor]:
    """Draws whose gradients add up to almost nothing: equal inputs, output gradients of sum
    `residue` times their size, and one draw moved by `residue`."""
    a = np.repeat(rng.normal(size=(RUNS, 1, INSIDE)), draws, axis=1) * 10 ** rng.uniform(0, 5)
    b = rng.normal(size=(RUNS, draws, OUTSIDE)) * 10 ** rng.uniform(0, 5)
    b -= b.mean(1, keepdims=True) * (1 - residue)
    a[:, 0] *= 1 + residue
    return torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("draws", [1, 2, 9])
def test_no_magnitude_lets_a_record_exceed_its_bound(mode: str, draws: int) -> None:
    """From denormal numbers to squares that overflow, in float32."""
    rng = np.random.default_rng(draws)
    full = 0
    for low, high in ((-3, 3), (-45, -30), (-30, 18), (15, 19), (-30, 38)):
        for other in ((-3, 3), (-30, 18), (-45, -20)):
            a = magnitudes(rng, draws, INSIDE, low, high)
            b = magnitudes(rng, draws, OUTSIDE, *other)
            for bound in (1e-3, 1.0, 1e3):
                found = shares(mode, a, b, bound)
                assert (found <= bound).all()
                full += int((found > 0.99 * bound).sum())
    assert full > 500


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("residue", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_draws_that_cancel_do_not_exceed_the_bound(mode: str, residue: float) -> None:
    """What is left of such a record is rounding, of its norm as of its gradient."""
    rng = np.random.default_rng(5)
    for draws in (2, 3, 8, 32):
        for _ in range(4):
            a, b = cancelling(rng, draws, residue)
            for bound in (1e-6, 1e-2, 1.0):
                assert (shares(mode, a, b, bound) <= bound).all()


def test_squared_norms_are_never_below_the_true_ones() -> None:
    """In float32 against rational arithmetic, where draws cancel as where they do not."""
    rng = np.random.default_rng(0)
    for draws, residue in ((1, 1.0), (2, 1.0), (2, 0.0), (3, 1e-7), (5, 1e-5)):
        a, b = (part[:3] for part in cancelling(rng, draws, residue))
        found = squared_norms(a[:, None], b[:, None])[:, 0]
        for record in range(3):
            left = np.vectorize(Fraction, otypes=[object])(a[record].double().numpy())
            right = np.vectorize(Fraction, otypes=[object])(b[record].double().numpy())
            true = ((left.T @ right) ** 2).sum() + (right.sum(0) ** 2).sum()
            assert Fraction(float(found[record])) >= true
            if residue == 1:
                assert float(found[record]) <= float(true) * (1 + 1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_is_used_up(mode: str) -> None:
    """What secures the bound costs an ordinary record a thousandth at most."""
    rng = np.random.default_rng(1)
    for draws in (1, 8):
        a = torch.from_numpy(rng.normal(size=(RUNS, draws, 100)).astype(np.float32))
        b = torch.from_numpy(rng.normal(size=(RUNS, draws, 80)).astype(np.float32))
        found = shares(mode, a, b, 1.0)
        assert (found > 0.999).all()


@pytest.mark.parametrize("mode", MODES)
def test_records_of_a_network_stay_within_their_bound(mode: str) -> None:
    """Three layers with large and small weights. The second backward of ghost clipping rounds on
    its own, so only there a few roundings come on top."""
    network = Mlp(RUNS, [6, 40, 40, 5])
    network.reset(FleetRng(range(RUNS)), "x", zero=False)
    x = FleetRng(range(RUNS)).at("x").normal(1, 4, 6)
    with torch.no_grad():
        for layer, scale in zip(network.layers, (1e3, 1e-4, 1e2), strict=True):
            layer.weight *= scale  # type: ignore[operator]
    clipper = ENGINES[mode](network, torch.full((RUNS,), 0.3))
    clipper.accumulate(lambda: network(x).square().sum((-1, -2)), torch.ones(RUNS, 1))
    sums = [p.summed_grad.double().flatten(1) for p in network.parameters()]  # type: ignore[attr-defined]
    found = torch.cat(sums, dim=1).norm(dim=1)
    assert (found > 0.3 * (1 - 1e-3)).all()
    assert (found <= 0.3 * (1 + (1e-5 if mode == "opacus_ghost" else 0))).all()


def test_a_long_float32_sum_moves_by_little_more_than_one_bound() -> None:
    """The gap that the engine states: 1024 records all alike, the worst for rounding."""
    rng = np.random.default_rng(2)
    a = torch.from_numpy(rng.normal(size=(1, 1, 60)).astype(np.float32)).repeat(1, 1024, 1)
    b = torch.from_numpy(rng.normal(size=(1, 1, 40)).astype(np.float32)).repeat(1, 1024, 1)
    sums = []
    for records in (1024, 1023, 600, 599):
        network = nn.Sequential(FleetLinear(1, 60, 40))
        counts = torch.zeros(1, 1024)
        counts[:, :records] = 1
        TapClipper(network, torch.ones(1)).accumulate(lambda n=network: (n(a) * b).sum(-1), counts)
        parts = [p.summed_grad.double().flatten() for p in network.parameters()]  # type: ignore[attr-defined]
        sums.append(torch.cat(parts))
    for whole, fewer in zip(sums[::2], sums[1::2], strict=True):
        assert 0.99 < float((whole - fewer).norm()) < 1 + 1e-4


# Records that are not finite


@pytest.mark.parametrize("mode", MODES)
def test_a_square_that_overflows_counts_nothing(mode: str) -> None:
    """A norm of 1e25 is a float32, its square is none: the record is left out, not let through."""
    a, b = torch.full((2, 1, INSIDE), 1e12), torch.full((2, 1, OUTSIDE), 1e13)
    b[1] = 1.0
    found = shares(mode, a, b, 1.0)
    assert found[0] == 0
    assert 0.99 < found[1] <= 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_counts_nothing_even_with_a_finite_slope(
    mode: str, value: float
) -> None:
    network = nn.Sequential(FleetLinear(2, INSIDE, OUTSIDE))
    x = FleetRng([1, 2]).at("x").normal(3, INSIDE)
    shift = torch.zeros(2, 3)
    shift[0] = value
    ENGINES[mode](network, torch.ones(2)).accumulate(
        lambda: network(x).sum(-1) + shift, torch.ones(2, 3)
    )
    for parameter in network.parameters():
        assert (parameter.summed_grad[0] == 0).all()  # type: ignore[attr-defined]
        assert (parameter.summed_grad[1] != 0).all()  # type: ignore[attr-defined]


def test_taking_records_out_changes_nothing_where_all_are_finite() -> None:
    """A GPU always does it, the CPU where it must: the same sums to the last bit."""
    for draws in (1, 3):
        network = nn.Sequential(FleetLinear(2, INSIDE, OUTSIDE))
        rng = FleetRng([1, 2]).at("x")
        pairs = [(network[0], rng.normal(9, draws, INSIDE), rng.normal(9, draws, OUTSIDE))]
        factor = rng.uniform(9)
        factor[:, 4] = 0
        sums = []
        for broken in (False, True):
            TapClipper(network, torch.ones(2)).reduce(pairs, factor, broken=broken)  # type: ignore[arg-type]
            sums.append([p.summed_grad for p in network.parameters()])  # type: ignore[attr-defined]
            for parameter in network.parameters():
                parameter.summed_grad = None  # type: ignore[attr-defined]
        for left, right in zip(*sums, strict=True):
            assert torch.equal(left, right)
            assert (left != 0).any()


# Sum and noise


def released(
    total: Tensor | None, sigma: float, bound: float, step: int = 0
) -> tuple[Tensor, FleetOptimizer]:
    """What a step with batch size 1 releases of a sum (inputs, outputs), in float64; biases 0."""
    shape = (4, 6) if total is None else tuple(total.shape)
    layer = FleetLinear(1, *shape).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    noisy = FleetOptimizer(
        optimizer,
        sigma=torch.tensor([sigma], dtype=torch.float64),
        bound=torch.tensor([bound], dtype=torch.float64),
        batch=torch.ones(1, dtype=torch.float64),
    )
    if total is not None:
        layer.weight.summed_grad = total[None]  # type: ignore[attr-defined]
    noisy.release(FleetRng([3], dtype=torch.float64), step)
    return -layer.weight.detach()[0], noisy


scales = st.tuples(st.floats(1e-2, 1e3), st.floats(1e-6, 1e6))


@settings(max_examples=40, deadline=None)
@given(scales, st.floats(-6, 3), st.integers(0, 2**32 - 1))
def test_sum_and_noise_meet_on_a_grid_and_add_exactly(
    scale: tuple[float, float], size: float, seed: int
) -> None:
    """What is released is round(sum) + round(noise), in whole cells: rational arithmetic agrees,
    so noise does not depend on the sum and no bit below the grid is left of either."""
    sigma, bound = scale
    total = np.random.default_rng(seed).normal(size=(4, 6)) * bound * 10**size
    alone, noisy = released(None, sigma, bound)
    both, _ = released(torch.from_numpy(total), sigma, bound)
    grid = float(noisy.grid)
    assert math.frexp(grid)[0] == 0.5  # a power of two
    for value, noise, held in zip(both.flatten(), alone.flatten(), total.flatten(), strict=True):
        cell = round(Fraction(held) / Fraction(grid))
        cells = (Fraction(float(value)) / Fraction(grid), Fraction(float(noise)) / Fraction(grid))
        assert all(part.denominator == 1 for part in cells)
        assert cells[0] - cells[1] == cell


@given(st.floats(1e-9, 1e9), st.integers(1, 10**9))
def test_rounding_is_paid_for(bound: float, parameters: int) -> None:
    """Rounding moves two neighbouring sums apart by √P cells at most; the noise grows with it."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(1).expand(parameters)[None])
    noisy = FleetOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        sigma=torch.tensor([2.0], dtype=torch.float64),
        bound=torch.tensor([bound], dtype=torch.float64),
        batch=torch.ones(1),
    )
    extra = float(noisy.grid) * math.sqrt(parameters)
    assert bound * 2**-14 * (1 - 1e-9) < extra <= bound * 2**-13 * (1 + 1e-9)
    assert float(noisy.scale) == pytest.approx(2 * (bound + extra), rel=1e-12)


def test_rounded_neighbours_are_no_further_apart_than_that() -> None:
    """Sums half a cell off the grid with a record that tips each of them over: the worst case."""
    _, noisy = released(None, 1.0, 1.0)
    grid = float(noisy.grid)
    total = torch.full((4, 6), 0.5, dtype=torch.float64) * grid
    record = torch.full((4, 6), 1 / math.sqrt(24), dtype=torch.float64)
    moved = released(total + record, 1.0, 1.0)[0] - released(total, 1.0, 1.0)[0]
    assert 1 < float(moved.norm()) <= float(noisy.scale)


def test_a_noiseless_run_of_a_noisy_fleet_is_not_rounded() -> None:
    layer = FleetLinear(2, 4, 6)
    noisy = FleetOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        sigma=torch.tensor([0.0, 1.0]),
        bound=torch.tensor([math.inf, 1e3]),
        batch=torch.tensor([3.0, 3.0]),
    )
    total = FleetRng([1, 2]).at("sum").normal(4, 6)
    layer.weight.summed_grad = total  # type: ignore[attr-defined]
    noisy.release(FleetRng([1, 2]), 0)
    assert torch.equal(-layer.weight[0], total[0] / 3)
    assert (-layer.weight[1] - total[1] / 3).abs().min() > 1e-3
    assert (layer.bias[0] == 0).all()


# Refusals


@pytest.fixture
def precision() -> Iterator[None]:
    held = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(held)


def engine(network: nn.Module, bound: float = 1.0) -> PrivateEngine:
    sigma = 0.0 if math.isinf(bound) else 1.0
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    return PrivateEngine(network, optimizer, sigma=[sigma], bound=[bound], batch=[1.0])


@pytest.mark.parametrize("chosen", ["high", "medium"])
@pytest.mark.usefixtures("precision")
def test_matrix_products_of_fewer_bits_are_refused(chosen: str) -> None:
    torch.set_float32_matmul_precision(chosen)
    with pytest.raises(UsageError, match="matrix products in"):
        engine(Mlp(1, [2, 2]))
    engine(Mlp(1, [2, 2]).double())
    engine(Mlp(1, [2, 2]), bound=math.inf)
    torch.set_float32_matmul_precision("highest")
    engine(Mlp(1, [2, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_weights_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=f"weights in {dtype}"):
        engine(Mlp(1, [2, 2]).to(dtype))


def test_ghost_clipping_of_one_layer_is_exact_too() -> None:
    """With one layer the second backward only multiplies, so its share is that of the taps."""
    rng = np.random.default_rng(3)
    a, b = cancelling(rng, 4, 1.0)
    taps, ghost = (shares(mode, a, b, 1.0) for mode in ("taps", "opacus_ghost"))
    np.testing.assert_allclose(taps, ghost, rtol=1e-5)
