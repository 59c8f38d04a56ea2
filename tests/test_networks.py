"""Fleet networks: every run as if it were alone, and columns as softmax distributions."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import chi_square
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.networks import (
    FleetEmbedding,
    FleetGroupNorm,
    FleetLayerNorm,
    FleetLinear,
    FleetMaskedLinear,
    FleetRMSNorm,
    Mlp,
    column_log_likelihood,
    evenly,
    sample_columns,
)
from dpsynth.randomness import FleetRng

LEVELS = (3, 1, 5, 2)


def fleet_rng(*keys: int) -> FleetRng:
    return FleetRng(keys, dtype=torch.float64)


def mlp(*keys: int, widths: tuple[int, ...] = (5, 6, 6, 4), zero: bool = False) -> Mlp:
    network = Mlp(len(keys), widths).double()
    network.reset(fleet_rng(*keys), "net", zero=zero)
    return network


# Layers


@settings(max_examples=30)
@given(st.tuples(*(st.integers(1, 4) for _ in range(4))), st.lists(st.integers(1, 3), max_size=2))
def test_linear_is_a_matrix_product_of_each_run(shape: tuple[int, ...], draws: list[int]) -> None:
    runs, batch, inputs, outputs = shape
    layer = FleetLinear(runs, inputs, outputs).double()
    rng = fleet_rng(*range(runs)).at("x")
    layer.weight.data, layer.bias.data = rng.normal(inputs, outputs), rng.normal(outputs)
    x = rng.normal(batch, *draws, inputs)
    found = layer(x)
    assert found.shape == (runs, batch, *draws, outputs)
    for run in range(runs):
        expected = x[run] @ layer.weight[run] + layer.bias[run]
        torch.testing.assert_close(found[run], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("draws", [(), (2,)])
def test_a_masked_layer_leads_from_each_column_to_those_after_it(draws: tuple[int, ...]) -> None:
    layer, rng = FleetMaskedLinear(2, LEVELS).double(), fleet_rng(0, 1).at("x")
    layer.rank[1] = torch.tensor([2, 0, 3, 1])
    layer.weight.data = rng.normal(11, 11)
    x = rng.normal(6, *draws, 11)
    column = [j for j, count in enumerate(LEVELS) for _ in range(count)]
    expected = torch.zeros_like(x)
    for run, order in enumerate(([0, 1, 2, 3], [1, 3, 0, 2])):
        for i, o in np.ndindex(11, 11):
            if order.index(column[i]) < order.index(column[o]):
                expected[run, ..., o] += x[run, ..., i] * layer.weight[run, i, o].detach()
    torch.testing.assert_close(layer(x), expected)
    layer.reset(rng)
    assert (layer.weight == 0).all()
    with pytest.raises(UsageError, match="levels=0"):
        FleetMaskedLinear(2, (3, 0))


@pytest.mark.parametrize(("inputs", "fan"), [(200, None), (200, 8)])
def test_initial_weights_have_the_scale_of_their_inputs(inputs: int, fan: int | None) -> None:
    layer = FleetLinear(2, inputs, 150)
    layer.bias.data += 1
    layer.reset(FleetRng([1, 2]).at("init"), fan=fan)
    assert (layer.bias == 0).all()
    for run in range(2):
        scale = float(layer.weight[run].std()) * math.sqrt(fan or inputs)
        assert scale == pytest.approx(1, abs=4 / math.sqrt(2 * inputs * 150))
    both = torch.corrcoef(layer.weight.detach().flatten(1))[0, 1]
    assert abs(both) < 4 / math.sqrt(inputs * 150)


@settings(max_examples=30)
@given(st.tuples(*(st.integers(1, 4) for _ in range(4))), st.lists(st.integers(1, 3), max_size=2))
def test_embedding_is_a_row_of_each_runs_table(shape: tuple[int, ...], draws: list[int]) -> None:
    runs, batch, levels, width = shape
    layer, rng = FleetEmbedding(runs, levels, width).double(), fleet_rng(*range(runs))
    layer.reset(rng.at("table"))
    codes = (rng.at("codes").uniform(batch, *draws) * levels).long()
    found = layer(codes)
    assert found.shape == (runs, batch, *draws, width)
    for place in np.ndindex(*codes.shape):
        assert torch.equal(found[place], layer.weight[place[0], codes[place]])


@pytest.mark.parametrize("code", [-1, 5])
def test_a_code_outside_the_table_is_no_other_runs(code: int) -> None:
    codes = torch.zeros(2, 3, dtype=torch.long)
    codes[0, 1] = code
    with pytest.raises(RuntimeError, match="out of bounds"):
        FleetEmbedding(2, 5, 4)(codes)


def test_tables_start_as_standard_normal_draws_of_their_run() -> None:
    layer = FleetEmbedding(2, 300, 100)
    layer.reset(FleetRng([1, 2]).at("table"))
    assert layer.weight.std().item() == pytest.approx(1, abs=0.02)
    both = torch.corrcoef(layer.weight.detach().flatten(1))[0, 1]
    assert abs(both) < 4 / math.sqrt(300 * 100)


NORMS = {
    "layer": (lambda runs: FleetLayerNorm(runs, 6), 6, True),
    "rms": (lambda runs: FleetRMSNorm(runs, 6), 6, False),
    "group": (lambda runs: FleetGroupNorm(runs, 6, 2), 3, True),
}


@pytest.mark.parametrize("draws", [(), (3,), (3, 2)])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_are_their_formula_on_each_record(kind: str, draws: tuple[int, ...]) -> None:
    """Over the features of one draw of one record, then each run's own weight and bias."""
    make, block, centred = NORMS[kind]
    layer, rng = make(2).double(), fleet_rng(1, 2).at("x")
    for parameter in layer.parameters():
        parameter.data = rng.normal(6)
    x = rng.normal(4, *draws, 6) * 3 + 1
    found = layer(x)
    assert found.shape == x.shape
    for place in np.ndindex(*x.shape[:-1]):
        for start in range(0, 6, block):
            cut = slice(start, start + block)
            part = x[place][cut]
            part = part - part.mean() if centred else part
            expected = part / (part.square().mean() + 1e-5).sqrt() * layer.weight[place[0], cut]
            expected = expected + layer.bias[place[0], cut] if centred else expected
            torch.testing.assert_close(found[place][cut], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_start_as_the_normalised_input(kind: str) -> None:
    layer, rng = NORMS[kind][0](2).double(), fleet_rng(1, 2).at("x")
    x = rng.normal(4, 6)
    assert torch.equal(layer(x), layer.normalize(x))
    for parameter in layer.parameters():
        parameter.data = rng.normal(6)
    assert not torch.equal(layer(x), layer.normalize(x))
    layer.reset(rng)
    assert torch.equal(layer(x), layer.normalize(x))
    assert len(list(layer.parameters())) == (1 if kind == "rms" else 2)


def test_sizes_that_make_no_layer_are_refused() -> None:
    for make, part in (
        (lambda: FleetEmbedding(1, 0, 2), "levels=0"),
        (lambda: FleetEmbedding(1, 2, 0), "width=0"),
        (lambda: FleetLayerNorm(1, 0), "features=0"),
        (lambda: FleetGroupNorm(1, 6, 0), "groups=0"),
        (lambda: FleetGroupNorm(1, 6, 4), "groups=4: must divide features=6"),
    ):
        with pytest.raises(UsageError, match=part):
            make()


def test_mlp_is_its_formula() -> None:
    """SiLU between the layers, a skip where two widths agree, and nothing after the last."""
    network, x = mlp(3), fleet_rng(3).at("x").normal(7, 5)
    first, second, last = [(layer.weight[0], layer.bias[0]) for layer in network.layers]  # type: ignore[union-attr]

    def silu(t: Tensor) -> Tensor:
        return t / (1 + (-t).exp())

    h = silu(x[0] @ first[0] + first[1])
    h = silu(h @ second[0] + second[1]) + h
    torch.testing.assert_close(network(x)[0], h @ last[0] + last[1], rtol=1e-12, atol=1e-12)
    square = mlp(3, widths=(4, 4))
    y = fleet_rng(3).at("x").normal(7, 4)
    weight = square.layers[0].weight[0]  # type: ignore[index, union-attr]
    torch.testing.assert_close(square(y)[0], y[0] @ weight, rtol=1e-12, atol=1e-12)


def test_a_network_starts_at_zero_where_asked() -> None:
    x = fleet_rng(1, 2).at("x").normal(7, 5)
    assert (mlp(1, 2, zero=True)(x) == 0).all()
    assert (mlp(1, 2)(x) != 0).all()


def test_a_run_feels_no_other_run() -> None:
    network, x = mlp(1, 2, 3), fleet_rng(1, 2, 3).at("x").normal(7, 2, 5)
    other, moved = copy.deepcopy(network), x.clone()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter[1] = parameter[1] * 3 + 1
    moved[1] = math.nan
    before, after = network(x), other(moved)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert after[1].isnan().all()
    gradients = torch.autograd.grad(before[0].sum(), list(network.parameters()))
    assert all((gradient[1:] == 0).all() for gradient in gradients)


def test_a_run_starts_alike_alone_and_in_a_fleet() -> None:
    together = mlp(7, 8, 9)
    for run, key in enumerate((7, 8, 9)):
        for one, of_many in zip(mlp(key).parameters(), together.parameters(), strict=True):
            assert torch.equal(one[0], of_many[run])
    weights = [layer.weight.detach().flatten() for layer in together.layers]  # type: ignore[union-attr]
    assert not torch.equal(weights[0][:36], weights[1][:36])


# Columns


@pytest.mark.parametrize("middle", [(), (4,), (4, 3)])
def test_likelihood_is_the_log_softmax_of_each_column(middle: tuple[int, ...]) -> None:
    logits = fleet_rng(1, 2).at("l").normal(*middle, sum(LEVELS)) * 5
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers(0, LEVELS, (2, *middle, len(LEVELS))))
    found = column_log_likelihood(logits, codes, LEVELS)
    assert found.shape == codes.shape
    for j, block in enumerate(logits.split(LEVELS, dim=-1)):
        expected = block.log_softmax(-1).gather(-1, codes[..., j : j + 1])[..., 0]
        torch.testing.assert_close(found[..., j], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[..., 1], torch.zeros(2, *middle).double())


def test_likelihood_spreads_codes_over_draws() -> None:
    logits = fleet_rng(1, 2).at("l").normal(4, 3, sum(LEVELS))
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, LEVELS, (2, 4, len(LEVELS))))
    found = column_log_likelihood(logits, codes[:, :, None], LEVELS)
    for draw in range(3):
        expected = column_log_likelihood(logits[:, :, draw], codes, LEVELS)
        assert torch.equal(found[:, :, draw], expected)


def test_likelihood_stays_finite_for_impossible_levels() -> None:
    logits = torch.tensor([[[0.0, -1e4, 900.0]]])
    found = column_log_likelihood(logits, torch.tensor([[[1]]]), (3,))
    assert found.item() == pytest.approx(-10_900)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampled_columns_follow_their_softmax(dtype: torch.dtype) -> None:
    """Each run, each column, and pairs of columns as independent draws."""
    logits = fleet_rng(1, 2).at("l").normal(sum(LEVELS)).to(dtype) * 1.5
    logits[0, 4] = -1e4
    rows = 20_000
    rng = FleetRng([5, 6], dtype=dtype).at("sample")
    codes = sample_columns(logits[:, None].expand(-1, rows, -1), LEVELS, rng).numpy()
    assert codes.shape == (2, rows, len(LEVELS))
    for run in range(2):
        blocks = [b.softmax(-1).double().numpy() for b in logits[run].split(LEVELS)]
        for j, shares in enumerate(blocks):
            seen = np.bincount(codes[run, :, j], minlength=LEVELS[j])
            assert chi_square(seen, shares) > 1e-4
        pair = codes[run, :, 0] * LEVELS[2] + codes[run, :, 2]
        law = np.outer(blocks[0], blocks[2]).ravel()
        assert chi_square(np.bincount(pair, minlength=law.size), law) > 1e-4
    assert (codes[0, :, 2] != 0).all()
    assert not np.array_equal(codes[0], codes[1])


def test_the_stream_decides_the_levels() -> None:
    logits = fleet_rng(1).at("l").normal(50, 2, sum(LEVELS))
    first, again, other = (
        sample_columns(logits, LEVELS, fleet_rng(3).at("sample", step)) for step in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Levels in even numbers


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("offset", [0.0, 0.5, 0.9999])
def test_levels_are_as_many_as_they_are_due(rows: int, offset: float) -> None:
    """In each run, but for less than one row; a share of 0 is never drawn."""
    share = torch.tensor([[0.0, 0.301, 0.0, 0.699, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]).double()
    order = fleet_rng(1, 2).at("order").uniform(rows)
    found = evenly(share, torch.full((2,), offset).double(), order)
    assert found.shape == (2, rows)
    for run in range(2):
        counts = torch.bincount(found[run], minlength=5)
        assert (counts - rows * share[run]).abs().max() < 1
        assert (counts[share[run] == 0] == 0).all()


def test_one_row_has_the_level_that_its_offset_falls_into() -> None:
    """So over offsets the shares are exact, however few rows there are."""
    share = torch.tensor([[0.1, 0.6, 0.3]]).double().expand(5000, -1)
    rng = fleet_rng(*range(5000)).at("one")
    for rows in (1, 2):
        found = evenly(share, rng.uniform(1)[:, 0], rng.uniform(rows))
        for place in range(rows):
            counts = torch.bincount(found[:, place], minlength=3).numpy()
            assert chi_square(counts, share[0].numpy()) > 1e-4


def test_the_order_of_rows_is_that_of_their_draws() -> None:
    share, rows = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).double(), 400
    offset, order = torch.tensor([0.3, 0.6]).double(), fleet_rng(1, 2).at("order").uniform(rows)
    found = evenly(share, offset, order)
    sorted_, ranked = evenly(share, offset, torch.arange(rows).double().expand(2, -1) / rows), order
    for run in range(2):
        # Rows in the order of their draws' ranks, from levels in rising order.
        places = ranked[run].argsort()
        assert torch.equal(found[run], sorted_[run][places])
        assert (sorted_[run].diff() >= 0).all()
        early = torch.bincount(found[run, :100], minlength=2).numpy()
        assert chi_square(early, share[run].numpy()) > 1e-4
    again = evenly(share[1:], offset[1:], order[1:])
    assert torch.equal(again[0], found[1])
