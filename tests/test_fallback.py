"""Layers of a type without a rule: clipped as any other, and said to be so, or refused."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from oracles import record_gradients, sum_clipped
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from dpsynth.checks import UsageError
from dpsynth.networks import FleetLayerNorm, FleetLinear
from dpsynth.privacy.clipping import ENGINES, TapClipper
from dpsynth.randomness import FleetRng

MODES = list(ENGINES)
OPACUS = [mode for mode in MODES if mode != "taps"]
RECORDS, WIDTH = 6, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*no closed form:UserWarning")


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Square(nn.Module):
    """xᵀ W x of each draw, a bilinear weight of its own."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(runs, WIDTH, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("rb...i,rijo,rb...j->rb...o", x, self.weight, x)


class Pair(Square):
    """xᵀ W y, with a buffer, which Opacus does not carry."""

    def __init__(self, runs: int) -> None:
        super().__init__(runs)
        self.register_buffer("shift", torch.full((WIDTH,), 0.5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        shifted = y + self.shift
        return torch.einsum("rb...i,rijo,rb...j->rb...o", x, self.weight, shifted)


class Scaled(nn.Module):
    """A parameter of its own beside layers that have rules: all of it is one layer."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(runs, WIDTH))
        self.linear = FleetLinear(runs, WIDTH, WIDTH)
        self.norm = FleetLayerNorm(runs, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale.reshape(len(self.scale), *(1,) * (x.dim() - 2), WIDTH)
        return self.norm(self.linear(x).tanh()) * scale


class Twisted(FleetLinear):
    """A subclass whose gradient is not that of its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.bias.sum(-1).reshape(-1, *(1,) * (x.dim() - 1))


class Mixed(nn.Module):
    """Layers of known and of unknown type, some of them used twice."""

    def __init__(self, runs: int, *, pair: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice
        self.linear = FleetLinear(runs, WIDTH, WIDTH)
        self.square = Square(runs)
        self.scaled = Scaled(runs)
        self.twisted = Twisted(runs, WIDTH, WIDTH)
        self.pair = Pair(runs) if pair else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h = h + self.square(h) + self.scaled(h)
        if self.twice:
            h = h + self.square(h.tanh()) + self.scaled(x)
        if self.pair is not None:
            h = h + self.pair(h, x)
        return h + self.twisted(h)


def network_of(runs: int, **settings: Any) -> Mixed:
    network = Mixed(runs, **settings).double()
    rng = FleetRng(range(runs), dtype=torch.float64)
    with torch.no_grad():
        for number, p in enumerate(network.parameters()):
            p += 0.4 * rng.at("weights", number).normal(*p.shape[1:])
    return network


def rows(runs: int, draws: int | None = None) -> Tensor:
    middle = () if draws is None else (draws,)
    return FleetRng(range(runs), dtype=torch.float64).at("x").normal(RECORDS, *middle, WIDTH)


def losses_of(network: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: network(x).square().flatten(2).sum(-1)


def sums_of(network: nn.Module) -> list[Tensor]:
    return [p.summed_grad for p in network.parameters()]  # type: ignore[attr-defined]


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


# Clipped sums


@pytest.mark.parametrize("settings", [{}, {"twice": True}, {"pair": True, "twice": True}])
@pytest.mark.parametrize("draws", [None, 3])
@pytest.mark.parametrize("runs", [1, 3])
def test_unknown_layers_are_clipped_as_one_record_at_a_time(
    runs: int, draws: int | None, settings: dict[str, bool]
) -> None:
    x, counts = rows(runs, draws), torch.ones(runs, RECORDS, dtype=torch.float64)
    counts[-1, 2] = 0
    network = network_of(runs, **settings)
    gradients = record_gradients(losses_of(network, x), list(network.parameters()))
    norms = [[float(torch.cat([g.flatten() for g in row]).norm()) for row in r] for r in gradients]
    bound = [float(np.quantile(norms[r], 0.3 + 0.2 * r)) for r in range(runs)]
    expected = sum_clipped(gradients, bound, counts)
    assert all(total.abs().max() > 1e-3 for total in expected)
    for mode in ["taps"] if "pair" in settings else MODES:
        network = network_of(runs, **settings)
        clipper = ENGINES[mode](network, doubles(bound))
        if mode == "opacus_ghost" and "twice" in settings:
            with pytest.raises(NotImplementedError, match="tying"):
                clipper.accumulate(losses_of(network, x), counts)
        else:
            clipper.accumulate(losses_of(network, x), counts)
            assert_close(sums_of(network), expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("mode", MODES)
def test_a_record_that_is_not_finite_counts_nothing(mode: str, value: float) -> None:
    x, counts = rows(2), torch.ones(2, RECORDS, dtype=torch.float64)
    network = network_of(2)
    gradients = record_gradients(losses_of(network, x), list(network.parameters()))
    kept = counts.clone()
    kept[1, 2] = 0
    expected = sum_clipped(gradients, [0.5, 0.5], kept)
    x[1, 2, 0] = value
    network = network_of(2)
    ENGINES[mode](network, doubles([0.5, 0.5])).accumulate(losses_of(network, x), counts)
    assert_close(sums_of(network), expected)


@pytest.mark.parametrize("precision", ["32", "tf32", "bf16"])
def test_in_float32_no_record_exceeds_its_bound(precision: str) -> None:
    """One record a run: what is formed is measured, whatever rounded it on the way."""
    network = network_of(40, pair=True, twice=True).float()
    x = rows(40, 3)[:, :1].float() * torch.logspace(-3, 3, 40)[:, None, None, None]
    for bound in (1e-3, 1.0):
        clipper = TapClipper(network, torch.full((40,), bound), precision=precision)
        clipper.accumulate(losses_of(network, x), torch.ones(40, 1))
        found = torch.cat([s.double().flatten(1) for s in sums_of(network)], dim=1).norm(dim=1)
        assert (found <= bound).all()
        assert (found > 0.95 * bound).sum() > 10
        for parameter in network.parameters():
            parameter.summed_grad = None  # type: ignore[attr-defined]


def test_a_captured_step_forms_the_same_gradients() -> None:
    network, counts = network_of(2, pair=True), torch.ones(2, RECORDS, dtype=torch.float64)
    clipper = TapClipper(network, doubles([0.3, 5.0]))
    clipper.static = True

    def step(x: Tensor) -> list[Tensor]:
        clipper.accumulate(losses_of(network, x), counts)
        sums = sums_of(network)
        for parameter in network.parameters():
            parameter.summed_grad = None  # type: ignore[attr-defined]
        return sums

    captured, other = make_fx(step)(rows(2)), rows(2) * 2 - 1
    assert_close(captured(other), step(other))


def test_autocast_around_a_step_changes_the_record_but_not_the_bound() -> None:
    """Shorter activations are the record's own affair; norms and sums are taken in float32."""
    network = network_of(8, pair=True, twice=True).float()
    x = rows(8, 2)[:, :1].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clipper = TapClipper(network, torch.full((8,), 1e-2))
        clipper.accumulate(losses_of(network, x), torch.ones(8, 1))
    sums = sums_of(network)
    assert all(total.dtype == torch.float32 for total in sums)
    found = torch.cat([s.double().flatten(1) for s in sums], dim=1).norm(dim=1)
    assert (found <= 1e-2).all()
    assert (found > 0.99e-2).all()


# What is said


@pytest.mark.parametrize("mode", MODES)
def test_one_line_names_each_unknown_layer_and_its_cost(mode: str) -> None:
    network = network_of(3).float()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clipper = ENGINES[mode](network, torch.ones(3))
        for _ in range(2):
            clipper.accumulate(losses_of(network, rows(3).float()), torch.ones(3, RECORDS))
    said = [str(w.message) for w in caught if "no closed form" in str(w.message)]
    assert len(said) == 3
    for line, name, held in zip(
        said,
        ("'square' (Square)", "'scaled' (Scaled)", "'twisted' (Twisted)"),
        (WIDTH**3, WIDTH**2 + 4 * WIDTH, WIDTH**2 + WIDTH),
        strict=True,
    ):
        assert name in line
        assert f"{3 * held * 4} bytes a record" in line
        assert "B times its parameters" in line
        assert "\n" not in line


# Refusals


def refused(network: nn.Module, runs: int, part: str, mode: str = "taps") -> None:
    with pytest.raises(UsageError, match=part) as caught:
        ENGINES[mode](network, torch.ones(runs))
    assert "\n" not in str(caught.value)


class Bare(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(), (3,), (1, 2)])
def test_a_parameter_without_an_axis_of_runs_is_refused(mode: str, shape: tuple[int, ...]) -> None:
    refused(nn.Sequential(Bare(*shape)), 2, r"'weight' of shape .* a leading axis of 2 runs", mode)


def test_a_fleet_of_another_number_of_runs_is_refused() -> None:
    refused(FleetLinear(3, 2, 2), 2, "a leading axis of 2 runs")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "layer",
    [nn.LayerNorm(2), nn.Linear(3, 2), nn.Embedding(2, 3), type("Mine", (nn.RMSNorm,), {})(2)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_torch_are_refused_although_their_first_axis_is_as_long(
    mode: str, layer: nn.Module
) -> None:
    refused(nn.Sequential(layer), 2, "torch's own and has no axis of runs", mode)


def test_a_layer_of_torch_inside_an_unknown_one_is_refused() -> None:
    outer = Bare(2, 3)
    outer.below = nn.Linear(2, 2)
    refused(outer, 2, "layer '' .Bare.: Linear is torch's own")


def test_parameters_that_belong_to_no_layer_are_refused() -> None:
    for lone in (nn.ParameterList([torch.zeros(2)]), nn.ParameterDict({"a": torch.zeros(2)})):
        refused(nn.ModuleList([lone]), 2, "belongs to no layer")


def test_one_parameter_in_two_layers_is_refused() -> None:
    """Their shares would be measured apart and added up together."""
    tied = nn.ModuleDict({"a": FleetLinear(2, 3, 3), "b": FleetLinear(2, 3, 3)})
    tied["b"].weight = tied["a"].weight
    refused(tied, 2, "layer 'b' .FleetLinear.: shares parameter 'weight' with layer 'a'")


def test_a_layer_that_mixes_records_below_an_unknown_one_is_refused() -> None:
    outer = Bare(2, 3)
    outer.below = nn.BatchNorm1d(2, affine=False)
    refused(outer, 2, "'below' .BatchNorm1d.: mixes records")


class Odd(Square):
    """Returns or takes what cannot be taken apart into records."""

    def __init__(self, runs: int, kind: str) -> None:
        super().__init__(runs)
        self.kind = kind

    def forward(self, x: Any, factor: Any = None) -> Any:
        out = super().forward(x[0] if isinstance(x, tuple) else x)
        if self.kind == "tuple":
            return out, out
        if self.kind == "merged":
            return out.sum(1)
        if self.kind == "mean":
            return out - out.mean(1, keepdim=True)
        if self.kind == "random":
            return out + torch.rand_like(out)
        if self.kind == "value":
            return out if float(out.sum().detach()) > 0 else -out
        return out


def used(kind: str, call: Callable[[Odd, Tensor], Any], mode: str = "taps") -> None:
    layer, x = Odd(2, kind), rows(2).float()
    nn.init.ones_(layer.weight)  # nothing of an output of 0 tells records apart
    clipper = ENGINES[mode](nn.Sequential(layer), torch.ones(2))

    def losses() -> Tensor:
        out = call(layer, x)
        return (out[0] if isinstance(out, tuple) else out).sum(-1)

    clipper.accumulate(losses, torch.ones(2, RECORDS))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kind", "call", "part"),
    [
        ("tuple", lambda layer, x: layer(x), "must return a tensor, not a tuple"),
        ("", lambda layer, x: layer((x, x)), "its inputs must be tensors"),
        ("", lambda layer, x: layer(x, 2.0), "its inputs must be tensors"),
        ("", lambda layer, x: layer(x, factor=x), "none of them given by name"),
        ("", lambda layer, x: layer(x=x), "none of them given by name"),
        ("merged", lambda layer, x: layer(x), r"shape \(2, 4\); it must start with \(2, 6\)"),
        ("", lambda layer, x: layer(x[:, :1]).expand(-1, RECORDS, -1), "it must start with"),
        ("", lambda layer, x: layer(x, x[0]), r"shape \(6, 4\); it must|one input"),
    ],
)
def test_a_use_that_has_no_records_of_its_own_is_refused(
    kind: str, call: Callable[[Odd, Tensor], Any], part: str, mode: str
) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        used(kind, call, mode)
    assert "layer '0' (Odd)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_layer_that_looks_at_values_is_refused_by_its_type() -> None:
    with pytest.raises(UsageError, match=r"type Odd: torch.func finds no gradient") as caught:
        used("value", lambda layer, x: layer(x))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mean", "random"])
def test_a_layer_in_which_a_record_is_another_alone_is_refused(kind: str, mode: str) -> None:
    with pytest.raises(UsageError, match=r"'0' \(Odd\): gives a record something else") as caught:
        used(kind, lambda layer, x: layer(x), mode)
    assert "\n" not in str(caught.value)


def test_a_layer_is_tried_once_and_with_two_records() -> None:
    """Not with one record, which is always alone, nor where a value must not be looked at."""
    network = nn.Sequential(Odd(2, ""))
    with torch.no_grad():
        network[0].weight += 1
    calls: list[int] = []
    whole = network[0].forward
    network[0].forward = lambda x: (calls.append(x.shape[1]), whole(x))[1]
    clipper = TapClipper(network, torch.ones(2))
    for static, records, seen in (
        (False, 1, [1, 1]),
        (True, 6, [6, 1]),
        (False, 6, [6, 1, 1]),
        (False, 6, [6, 1]),
    ):
        calls.clear()
        clipper.static = static
        x = rows(2).float()[:, :records]
        clipper.accumulate(losses_of(network, x), torch.ones(2, records))
        assert calls == seen


@pytest.mark.parametrize("mode", OPACUS)
def test_what_opacus_does_not_carry_is_refused_with_the_engine_that_does(mode: str) -> None:
    refused(nn.Sequential(Pair(2)), 2, r"'0' \(Pair\): Opacus takes no layer with buffers", mode)
    with pytest.raises(UsageError, match="Opacus takes layers of one input; use engine=taps"):
        used("", lambda layer, x: layer(x, x), mode)
    network, x = network_of(2).float(), rows(2).float()
    clipper = ENGINES[mode](network, torch.ones(2))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(UsageError, match=r"autocast: .* use engine=taps"),
    ):
        clipper.accumulate(losses_of(network, x), torch.ones(2, RECORDS))
