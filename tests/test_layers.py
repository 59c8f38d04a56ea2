"""Rules of the layers that a tabular network uses, against gradients of one record at a time."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import record_gradients, sum_clipped
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpsynth.networks import (
    FleetEmbedding,
    FleetGroupNorm,
    FleetLayerNorm,
    FleetLinear,
    FleetMaskedLinear,
    FleetRMSNorm,
)
from dpsynth.privacy.clipping import ENGINES, Clipper, TapClipper
from dpsynth.privacy.layers import RULES, embedding_squared_norms, masked_squared_norms
from dpsynth.privacy.precision import FULL, PRECISIONS
from dpsynth.randomness import FleetRng

MODES = list(ENGINES)
RECORDS, LEVELS, COLUMNS, WIDTH, NUMBERS = 6, 5, 4, 6, 3


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fleet_rng(runs: int) -> FleetRng:
    return FleetRng(range(runs), dtype=torch.float64)


class Residual(nn.Module):
    """Every layer that has a rule: embedded columns and numbers, residual blocks under norms.

    Args:
        runs: R.
        twice: Whether table, first block and first norm are used a second time.
    """

    def __init__(self, runs: int, twice: bool) -> None:
        super().__init__()
        self.twice = twice
        self.table = FleetEmbedding(runs, LEVELS, WIDTH)
        self.numbers = FleetLinear(runs, NUMBERS, WIDTH)
        self.first = FleetLinear(runs, WIDTH, WIDTH)
        self.second = FleetLinear(runs, WIDTH, WIDTH)
        self.layer_norm = FleetLayerNorm(runs, WIDTH)
        self.rms_norm = FleetRMSNorm(runs, WIDTH)
        self.group_norm = FleetGroupNorm(runs, WIDTH, 2)

    def forward(self, codes: Tensor, x: Tensor) -> Tensor:
        h = self.table(codes).sum(-2) + self.numbers(x)
        h = h + self.first(self.layer_norm(h)).tanh()
        if self.twice:
            h = h + self.first(self.layer_norm(h)).sin() + self.table(codes[..., 0])
        h = h + self.second(self.rms_norm(h)).tanh()
        return self.group_norm(h).square() + h


class Case:
    """A network that is the same at each call, and its rows."""

    def __init__(self, runs: int, draws: int | None, twice: bool) -> None:
        self.runs, self.twice = runs, twice
        middle = () if draws is None else (draws,)
        rng = fleet_rng(runs).at("rows")
        # Four columns of five levels share a table: many a record holds a level twice.
        self.codes = (rng.uniform(RECORDS, *middle, COLUMNS) * LEVELS).long()
        self.x = rng.normal(RECORDS, *middle, NUMBERS)
        self.weight = torch.ones(runs, RECORDS, dtype=torch.float64)

    def network(self) -> Residual:
        network = Residual(self.runs, self.twice).double()
        for number, layer in enumerate(network.children()):
            layer.reset(fleet_rng(self.runs).at("reset", number))  # type: ignore[operator]
        with torch.no_grad():
            for number, p in enumerate(network.parameters()):
                p += 0.3 * fleet_rng(self.runs).at("jitter", number).normal(*p.shape[1:])
        return network

    def losses(self, network: nn.Module) -> Callable[[], Tensor]:
        def losses() -> Tensor:
            out = network(self.codes, self.x).square().sum(-1)
            return (out if out.dim() == 2 else out.mean(-1)) * self.weight

        return losses

    def gradients(self) -> list[list[list[Tensor]]]:
        network = self.network()
        return record_gradients(self.losses(network), list(network.parameters()))

    def clipped(self, mode: str, bound: Tensor, counts: Tensor) -> list[Tensor]:
        network = self.network()
        ENGINES[mode](network, bound).accumulate(self.losses(network), counts)
        return sums_of(network)


def sums_of(network: nn.Module) -> list[Tensor]:
    return [p.summed_grad for p in network.parameters()]  # type: ignore[attr-defined]


def norms_of(gradients: list[list[list[Tensor]]]) -> np.ndarray:
    return np.array(
        [[float(torch.cat([g.flatten() for g in row]).norm()) for row in run] for run in gradients]
    )


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


# Clipped sums


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("draws", [None, 3])
@pytest.mark.parametrize("runs", [1, 3])
def test_residual_networks_are_clipped_as_one_record_at_a_time(
    runs: int, draws: int | None, twice: bool
) -> None:
    """A bound a run that cuts some records and leaves others, and one record of padding."""
    case = Case(runs, draws, twice)
    gradients = case.gradients()
    norms = norms_of(gradients)
    bound = doubles([np.quantile(norms[r], 0.3 + 0.2 * r) for r in range(runs)])
    counts = torch.ones(runs, RECORDS, dtype=torch.float64)
    counts[-1, 2] = 0
    expected = sum_clipped(gradients, bound.tolist(), counts)
    assert all(total.abs().max() > 1e-3 for total in expected)
    for mode in MODES:
        if twice and mode == "opacus_ghost":
            with pytest.raises(NotImplementedError, match="tying"):
                case.clipped(mode, bound, counts)
        else:
            assert_close(case.clipped(mode, bound, counts), expected)


@pytest.mark.parametrize("bound", [0.7, math.inf])
@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "nan loss", "inf loss"])
@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_is_not_finite_counts_nothing(mode: str, kind: str, bound: float) -> None:
    bounds, counts = doubles([bound] * 3), torch.ones(3, RECORDS, dtype=torch.float64)
    counts[1, 2] = 0
    case = Case(3, 2, False)
    expected = sum_clipped(case.gradients(), bounds.tolist(), counts)
    if kind.endswith("loss"):
        case.weight[1, 2] = math.nan if kind == "nan loss" else math.inf
    else:  # finite itself, with a square that is not
        value = {"nan": math.nan, "inf": math.inf, "overflow": 1e200}[kind]
        case.x[1, 2, 0, 1] = value
    found = case.clipped(mode, bounds, torch.ones_like(counts))
    assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_what_padding_holds_changes_nothing(mode: str) -> None:
    case, other = Case(2, None, False), Case(2, None, False)
    counts = torch.ones(2, RECORDS, dtype=torch.float64)
    counts[0, 1] = counts[1, -2:] = 0
    other.codes = torch.where(counts[..., None] > 0, case.codes, (case.codes + 1) % LEVELS)
    other.x = torch.where(counts[..., None] > 0, case.x, case.x * 3 + 1)
    assert (other.codes != case.codes).any()
    bound = doubles([0.1, 2.0])
    assert_close(other.clipped(mode, bound, counts), case.clipped(mode, bound, counts))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_is_not_used_or_does_not_reach_the_loss_gets_no_sum(mode: str) -> None:
    """Beside one that is: in this step, not in another. What runs under no_grad adds nothing."""
    network = nn.ModuleDict(
        {name: FleetLinear(2, 3, 3) for name in ("used", "idle", "lost", "target")}
    ).double()
    x = fleet_rng(2).at("x").normal(4, 3)

    def first() -> Tensor:
        return sum(layer(x).sum(-1) for layer in network.values())  # type: ignore[return-value]

    def second() -> Tensor:
        network["lost"](x)
        with torch.no_grad():
            network["target"](x)
        return network["used"](x).sum(-1)

    counts = torch.ones(2, 4, dtype=torch.float64)
    clipper = ENGINES[mode](network, doubles([1.0, 1.0]))
    clipper.accumulate(first, counts)
    for _ in range(2):  # a use that reached no loss leaves nothing behind
        for parameter in network.parameters():
            parameter.summed_grad = None  # type: ignore[attr-defined]
        clipper.accumulate(second, counts)
    fresh = nn.ModuleDict({"used": FleetLinear(2, 3, 3)}).double()
    TapClipper(fresh, doubles([1.0, 1.0])).accumulate(lambda: fresh["used"](x).sum(-1), counts)
    assert_close(
        [p.summed_grad for p in network["used"].parameters()],  # type: ignore[attr-defined]
        sums_of(fresh),
    )
    for name in ("idle", "lost", "target"):
        for parameter in network[name].parameters():
            total = parameter.summed_grad  # type: ignore[attr-defined]
            assert total is None or (total == 0).all()


# Each rule


def masked(runs: int, width: int) -> nn.Module:
    """Columns of one level and of many, in another order for each run."""
    levels = [1, width - 3, 2] if width > 3 else [1] * width
    layer = FleetMaskedLinear(runs, levels)
    layer.rank.copy_(fleet_rng(runs).at("rank").uniform(len(levels)).argsort(-1))
    return layer


KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": lambda runs, width: FleetLinear(runs, 3, width),
    "masked linear": masked,
    "embedding": lambda runs, width: FleetEmbedding(runs, LEVELS, width),
    "layer norm": FleetLayerNorm,
    "rms norm": FleetRMSNorm,
    "group norm": lambda runs, width: FleetGroupNorm(runs, width, 1),
}


def input_of(kind: str, rng: FleetRng, rows: Sequence[int], width: int) -> Tensor:
    if kind == "embedding":
        return (rng.uniform(*rows) * LEVELS).long()
    return rng.normal(*rows, inputs_of(kind, width))


def inputs_of(kind: str, width: int) -> int:
    return 3 if kind == "linear" else width


def test_every_rule_is_tested_here() -> None:
    assert {type(make(1, 2)) for make in KINDS.values()} == set(RULES)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    st.tuples(*(st.integers(1, 6) for _ in range(3))),
    st.lists(st.integers(1, 3), max_size=2),
    st.integers(1, 2),
)
def test_norms_and_sums_are_those_of_the_gradients_written_out(
    kind: str, shape: tuple[int, ...], draws: list[int], uses: int
) -> None:
    runs, records, width = shape
    layer, rng = KINDS[kind](runs, width).double(), fleet_rng(runs).at(kind)
    rule, rows = RULES[type(layer)], (records, *draws)
    seen_uses = [
        ([input_of(kind, rng, rows, width)], rng.normal(*rows, width)) for _ in range(uses)
    ]
    samples = [torch.zeros(runs, records, *p.shape[1:]).double() for p in layer.parameters()]
    for (inputs,), b in seen_uses:
        for record in range(records):
            out = layer(inputs[:, [record]])
            found = torch.autograd.grad((out * b[:, [record]]).sum(), list(layer.parameters()))
            for sample, one in zip(samples, found, strict=True):
                sample[:, record] += one
    seen = rule.gather(layer, seen_uses, FULL)
    expected = sum(s.flatten(2).square().sum(-1) for s in samples)
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(rule.squared_norms(seen, FULL), expected, rtol=1e-10, atol=1e-12)
    factor = rng.uniform(records)
    sums = rule.sums(layer, seen, factor, FULL)
    for parameter, sample in zip(layer.parameters(), samples, strict=True):
        torch.testing.assert_close(
            sums[parameter], torch.einsum("rb,rb...->r...", factor, sample), rtol=1e-10, atol=1e-12
        )


def test_taking_records_out_changes_nothing_where_all_are_finite() -> None:
    for kind, make in KINDS.items():
        layer, rng = make(2, 4), FleetRng(range(2)).at(kind)
        uses = [([input_of(kind, rng, (9, 3), 4)], rng.normal(9, 3, 4))]
        rule = RULES[type(layer)]
        seen, factor = rule.gather(layer, uses, FULL), rng.uniform(9)
        factor[:, 4] = 0
        whole = rule.sums(layer, seen, factor, FULL)
        without = rule.sums(layer, rule.without(seen, factor > 0), factor, FULL)
        for parameter, total in whole.items():
            assert torch.equal(total, without[parameter])
            assert (total != 0).any()


# Floating point


def share(layer: nn.Module, x: Tensor, pull: Tensor, bound: float, mode: str) -> np.ndarray:
    """Norm in float64 of what the one record of each run adds, with `pull` at the output."""
    network = nn.Sequential(layer)
    clipper = ENGINES[mode](network, torch.full((len(x),), bound))
    clipper.accumulate(lambda: (network(x) * pull).flatten(2).sum(-1), torch.ones(len(x), 1))
    return torch.cat([s.double().flatten(1) for s in sums_of(network)], dim=1).norm(dim=1).numpy()


def pulled(rng: np.random.Generator, shape: tuple[int, ...], spread: Any, residue: float) -> Tensor:
    """Gradients at an output (runs, 1, draws, features) with lengths of 10^spread, of which
    `residue` is left where draws are added up."""
    b = rng.normal(size=shape) * 10 ** rng.uniform(*spread, (shape[0], 1, 1))
    b -= b.mean(1, keepdims=True) * (1 - residue)
    return torch.from_numpy(b.astype(np.float32))[:, None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
def test_no_magnitude_lets_a_record_exceed_its_bound(kind: str, mode: str) -> None:
    """Denormal numbers, overflow, draws that cancel all but a residue; codes that repeat.

    The second backward of ghost clipping rounds on its own: under a norm, draws do not cancel."""
    runs, rng, full = 64, np.random.default_rng(0), 0
    again = mode == "opacus_ghost" and kind != "embedding"
    for draws in (1, 2, 9):
        for spread in ((-3, 3), (-45, -30), (15, 19), (-30, 38)):
            for residue in (1.0,) if again else (1.0, 1e-7, 0.0):
                pull = pulled(rng, (runs, draws, WIDTH), spread, residue)
                if kind == "embedding":
                    x = torch.from_numpy(rng.integers(0, 2, (runs, 1, draws)))
                else:
                    one = rng.normal(size=(runs, 1, 1, inputs_of(kind, WIDTH))).repeat(draws, 2)
                    x = torch.from_numpy(one.astype(np.float32))
                for bound in (1e-3, 1e3):
                    found = share(KINDS[kind](runs, WIDTH), x, pull, bound, mode)
                    assert (found <= bound).all()
                    full += int((found > 0.99 * bound).sum())
    assert full > 300


@pytest.mark.parametrize("draws", [1, 2])
def test_an_overflow_that_is_not_seen_does_not_count(draws: int) -> None:
    layer = FleetMaskedLinear(1, [1, 1])
    a, b = torch.tensor([3.0, 1e30]), torch.tensor([2.0, 1.0])
    found = masked_squared_norms(*(x.expand(1, 1, draws, 2) for x in (a, b)), layer)
    assert float(found) == pytest.approx((3 * draws) ** 2, rel=1e-4)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1.0, 1e-3, 1e-7, 0.0]))
def test_norms_of_embeddings_are_never_below_the_true_ones(
    seed: int, draws: int, residue: float
) -> None:
    """In float32 against rational arithmetic, where draws of a level cancel as where not."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3, draws)
    b = rng.normal(size=(draws, 3)) * 10 ** rng.uniform(-3, 3)
    b = (b - b.mean(0) * (1 - residue)).astype(np.float32)
    one = torch.from_numpy(codes)[None, None], torch.from_numpy(b)[None, None]
    found = embedding_squared_norms(*one)
    exact = np.vectorize(Fraction, otypes=[object])(b.astype(float))
    true = sum((exact[codes == level].sum(0) ** 2).sum() for level in set(codes.tolist()))
    assert Fraction(float(found)) >= true
    if residue == 1 and true:
        length = sum(float((row**2).sum()) ** 0.5 for row in b.astype(float))
        assert math.sqrt(float(found)) <= math.sqrt(true) * (1 + 1e-5) + 1e-5 * length


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("draws", [None, 3])
def test_a_record_of_a_residual_network_stays_within_its_bound(
    draws: int | None, precision: str
) -> None:
    """In float32 and in shorter formats, from small weights to large ones."""
    case = Case(40, draws, True)
    network, counts = case.network().float(), torch.zeros(40, RECORDS)
    case.x, case.weight, counts[:, 0] = case.x.float(), torch.ones(40, RECORDS), 1
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= torch.logspace(-1, 1, 40).reshape(-1, *(1,) * (parameter.dim() - 1))
    for bound in (1e-3, 0.1):
        clipper = TapClipper(network, torch.full((40,), bound), precision=precision)
        clipper.accumulate(case.losses(network), counts)
        found = torch.cat([s.double().flatten(1) for s in sums_of(network)], dim=1).norm(dim=1)
        assert (found <= bound).all()
        assert (found > 0.98 * bound).sum() > 20
        for parameter in network.parameters():
            parameter.summed_grad = None  # type: ignore[attr-defined]


# Memory and capture


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that anything returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


@pytest.mark.parametrize("mode", ["taps", "opacus_ghost"])
def test_no_table_is_formed_for_each_record(mode: str) -> None:
    """The largest tensor is the table, or what comes out of it, not one table a record."""
    levels, width, records, columns = 3000, 4, 50, 7
    network = nn.Sequential(FleetEmbedding(1, levels, width), FleetLayerNorm(1, width))
    codes = (FleetRng([1]).at("codes").uniform(records, columns) * levels).long()
    clipper = ENGINES[mode](network, torch.ones(1))
    with Largest() as largest:
        clipper.accumulate(lambda: network(codes).square().sum((-1, -2)), torch.ones(1, records))
    assert largest.numbers == levels * width
    assert levels * width < records * levels * width / 10


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("draws", [None, 2])
def test_a_captured_step_clips_other_rows_alike(draws: int | None, precision: str) -> None:
    """Nothing looks at a value: what was traced on one batch holds for another, NaN included."""
    case = Case(2, draws, True)
    network = case.network().float()
    bound, counts = torch.tensor([0.3, 5.0]), torch.ones(2, RECORDS)
    clipper: Clipper = TapClipper(network, bound, precision=precision)
    clipper.static = True

    def step(codes: Tensor, x: Tensor, counts: Tensor) -> list[Tensor]:
        case.codes, case.x, case.weight = codes, x, torch.ones(2, RECORDS)
        clipper.accumulate(case.losses(network), counts)
        sums = sums_of(network)
        for parameter in network.parameters():
            parameter.summed_grad = None  # type: ignore[attr-defined]
        return sums

    codes, x = case.codes, case.x.float()
    captured = make_fx(step)(codes, x, counts)
    y = x * 2 - 1
    y[0, 1] = math.nan
    counts[1, 3] = 0
    others = ((codes + 1) % LEVELS, y, counts)
    for left, right in zip(captured(*others), step(*others), strict=True):
        torch.testing.assert_close(left, right)
        assert left.isfinite().all()
        assert (left != 0).any()
