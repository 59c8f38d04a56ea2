"""Shorter formats: what is rounded how, and that no record exceeds its bound by it."""

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import record_gradients, sum_clipped
from torch import Tensor, nn

from dpsynth.checks import UsageError
from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy import clipping
from dpsynth.privacy.clipping import ENGINES, TapClipper, check_precision
from dpsynth.privacy.layers import Linear, squared_norms
from dpsynth.privacy.precision import FULL, PRECISIONS, Precision
from dpsynth.randomness import FleetRng

SHORT = [format_ for format_ in PRECISIONS.values() if format_.short]
RUNS, INSIDE, OUTSIDE = 64, 7, 5
patterns = st.integers(0, 2**32 - 1)


def floats(bits: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, np.uint32).view(np.float32))


def named(format_: Precision) -> str:
    return format_.name


# Formats


@pytest.mark.parametrize("format_", SHORT, ids=named)
@settings(max_examples=300)
@given(patterns)
def test_rounding_is_to_the_nearest_and_truncation_towards_zero(
    format_: Precision, pattern: int
) -> None:
    """Of all patterns of bits: denormal, infinite and NaN too."""
    x = floats([pattern])
    near, cut = (float(t.float()) for t in (format_.round(x), format_.truncate(x)))
    if not math.isfinite(float(x)):
        assert not math.isfinite(near)
        assert not math.isfinite(cut)
        return
    below = pattern >> format_.dropped << format_.dropped
    assert cut == float(floats([below]))
    ends = [float(floats([below])), float(floats([below + (1 << format_.dropped)]))]
    assert abs(cut) <= abs(float(x))
    if abs(float(x)) >= torch.finfo(torch.float32).tiny:
        assert abs(float(x) - cut) < format_.step * abs(float(x))
    assert near in ends
    if math.isfinite(ends[1]):
        gaps = [abs(Fraction(end) - Fraction(float(x))) for end in ends]
        assert abs(Fraction(near) - Fraction(float(x))) == min(gaps)


@pytest.mark.parametrize("format_", SHORT, ids=named)
def test_no_nan_becomes_a_number(format_: Precision) -> None:
    """A carry would turn the last of them into ±0."""
    x = floats([0x7F800001, 0xFF800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFF000])
    assert x.isnan().all()
    for found in (format_.round(x), format_.truncate(x)):
        assert not found.isfinite().any()


@given(patterns)
def test_rounding_to_bfloat16_is_that_of_torch(pattern: int) -> None:
    x = floats([pattern])
    expected = x.to(torch.bfloat16)
    assert torch.equal(PRECISIONS["bf16"].round(x), expected) or bool(expected.isnan())


def test_the_full_format_changes_nothing() -> None:
    x = FleetRng([1]).at("x").normal(9)
    assert FULL.round(x) is x
    assert FULL.truncate(x) is x
    assert FULL.step == 0
    assert [f.step for f in SHORT] == [2**-10, 2**-7]


@pytest.mark.parametrize("format_", SHORT, ids=named)
@given(patterns, patterns)
def test_products_are_exact(format_: Precision, left: int, right: int) -> None:
    a, b = format_.round(floats([left])), format_.truncate(floats([right]))
    exact = float(a) * float(b)
    if not math.isfinite(exact) or not 2**-100 < abs(exact) < 2**100:
        return
    product = format_.product(a.reshape(1, 1, 1), b.reshape(1, 1, 1))
    assert product.dtype == torch.float32
    assert Fraction(float(product)) == Fraction(float(a)) * Fraction(float(b))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("format_", PRECISIONS.values(), ids=named)
def test_a_gpu_multiplies_the_same_numbers(format_: Precision) -> None:
    rng = FleetRng([1, 2]).at("x")
    a, b = format_.round(rng.normal(40, 30)), format_.truncate(rng.normal(30, 20))
    found = format_.product(a.cuda(), b.cuda())
    assert found.dtype == torch.float32
    exact = a.double() @ b.double()
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-4)


# The bound


def shares(format_: Precision, a: Tensor, b: Tensor, bound: float) -> np.ndarray:
    """Norm in float64 over `bound` of what the one record of each run adds, for one layer with
    inputs `a` and gradients `b` at its output, both (runs, draws, features)."""
    network = nn.Sequential(FleetLinear(len(a), a.shape[-1], b.shape[-1]))
    clipper = TapClipper(network, torch.full((len(a),), bound))
    clipper.precision = format_
    x, pull = a[:, None], b[:, None]
    clipper.accumulate(lambda: (network(x) * pull).sum((-1, -2)), torch.ones(len(a), 1))
    sums = [p.summed_grad.double().flatten(1) for p in network.parameters()]  # type: ignore[attr-defined]
    return torch.cat(sums, dim=1).norm(dim=1).numpy() / bound


def record(rng: np.random.Generator, draws: int, residue: float, spread: float, same: bool) -> Any:
    """Inputs and output gradients (runs, draws, features) in float32; what `residue` leaves of
    their sum; with `same`, all entries of a vector are alike, so that they round alike."""
    many = (RUNS, 1, 1 if same else INSIDE), (RUNS, draws, 1 if same else OUTSIDE)
    a = np.broadcast_to(rng.normal(size=many[0]), (RUNS, draws, INSIDE)).copy()
    b = np.broadcast_to(rng.normal(size=many[1]), (RUNS, draws, OUTSIDE)).copy()
    a *= 10 ** rng.uniform(-spread, spread, (RUNS, 1, 1))
    b *= 10 ** rng.uniform(-spread, spread, (RUNS, 1, 1))
    if draws > 1:
        b -= b.mean(1, keepdims=True) * (1 - residue)
        a[:, 0] *= 1 + residue
    return torch.from_numpy(a.astype(np.float32)), torch.from_numpy(b.astype(np.float32))


cases = st.tuples(
    st.integers(1, 4),
    st.sampled_from([1.0, 1e-1, 1e-2, 1e-3, 1e-5, 0.0]),
    st.sampled_from([0.0, 3.0, 12.0, 20.0]),
    st.booleans(),
)


@pytest.mark.parametrize("format_", SHORT, ids=named)
@settings(max_examples=150)
@given(cases, st.integers(0, 2**32 - 1), st.floats(-4, 4))
def test_no_record_exceeds_its_bound(
    format_: Precision, case: tuple[int, float, float, bool], seed: int, bound: float
) -> None:
    a, b = record(np.random.default_rng(seed), *case)
    assert (shares(format_, a, b, 10**bound) <= 1).all()


@pytest.mark.parametrize("format_", SHORT, ids=named)
@settings(max_examples=50)
@given(cases, st.integers(0, 2**32 - 1))
def test_norms_cover_every_way_of_truncation(
    format_: Precision, case: tuple[int, float, float, bool], seed: int
) -> None:
    """The inequality itself, in float64: each entry shortened by a share of its own in [0, h],
    as far off as it goes where draws cancel, not only as the bits happen to fall."""
    rng = np.random.default_rng(seed)
    a, b = (format_.round(t)[:, None] for t in record(rng, *case))
    norms = squared_norms(a, b, format_).double().sqrt()[:, 0]
    left = torch.cat([a.double(), torch.ones(*a.shape[:3], 1).double()], dim=-1)[:, 0]
    for trial in range(4):
        cut = rng.integers(0, 2, b.shape) if trial % 2 else rng.uniform(size=b.shape)
        moved = (b.double() * (1 - format_.step * torch.from_numpy(cut)))[:, 0]
        found = torch.einsum("rki,rko->rio", left, moved).flatten(1).norm(dim=1)
        assert (found <= norms).logical_or(~norms.isfinite()).all()


class Nearest(Precision):
    """Rounds the re-weighted gradients to nearest, as a conversion by the hardware would."""

    def truncate(self, x: Tensor) -> Tensor:
        return self.round(x)


class Straight(Precision):
    """Forgets that truncation turns what is left of draws that cancel."""

    @property
    def step(self) -> float:
        return 0.0


class Unrounded(Linear):
    """Norms of the tensors as they were, sums of the rounded ones."""

    def gather(self, layer: nn.Module, uses: Any, precision: Precision) -> tuple[Tensor, Tensor]:
        return super().gather(layer, uses, FULL)

    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Tensor:
        return super().squared_norms(seen, FULL)

    def sums(self, layer: nn.Module, seen: Any, factor: Tensor, precision: Precision) -> Any:
        a, b = (precision.round(t) for t in seen)
        return super().sums(layer, (a, b), factor, precision)


def worst(format_: Precision, draws: int) -> float:
    rng = np.random.default_rng(0)
    residues, spreads = (1.0, 1e-2, 1e-3, 0.0), (0.0, 3.0)
    return max(
        shares(format_, *record(rng, draws, residue, spread, same), 1.0).max()
        for residue, spread, same in itertools.product(residues, spreads, (False, True))
    )


@pytest.mark.parametrize("format_", SHORT, ids=named)
def test_each_part_of_the_rule_is_needed(
    format_: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out one at a time, each lets some record exceed its bound by far more than float32's
    roundoff; with all of them none does."""
    fields = (format_.name, format_.dropped, format_.products)
    beyond = 1 + format_.step / 16
    for draws in (1, 2, 4):
        assert worst(format_, draws) <= 1
        assert worst(Nearest(*fields), draws) > beyond
    assert worst(Straight(*fields), 1) <= 1  # one draw is only shortened
    for draws in (2, 4):
        assert worst(Straight(*fields), draws) > beyond
    monkeypatch.setattr(clipping, "rule_of", lambda layer: Unrounded())
    for draws in (1, 2, 4):
        assert worst(format_, draws) > beyond


# What it costs


def network_of(runs: int) -> Mlp:
    network = Mlp(runs, [6, 20, 20, 5])
    network.reset(FleetRng(range(runs)), "x", zero=False)
    return network


@pytest.mark.parametrize("draws", [1, 3])
def test_sums_differ_from_exact_ones_by_the_roundoff(draws: int) -> None:
    """The sum of clipped records against one record at a time in float64, by format."""
    x, counts = FleetRng(range(2)).at("x").normal(12, draws, 6), torch.ones(2, 12)
    exact, bounds = network_of(2).double(), [0.5, 2.0]
    gradients = record_gradients(
        lambda: exact(x.double()).square().sum((-1, -2)), list(exact.parameters())
    )
    expected = sum_clipped(gradients, bounds, counts)
    size = math.sqrt(sum(float(total.square().sum()) for total in expected))
    gaps = {}
    for name, format_ in PRECISIONS.items():
        network = network_of(2)
        clipper = TapClipper(network, torch.tensor(bounds), precision=name)
        clipper.accumulate(lambda n=network: n(x).square().sum((-1, -2)), counts)
        sums = [p.summed_grad for p in network.parameters()]  # type: ignore[attr-defined]
        assert all(total.dtype == torch.float32 for total in sums)
        parts = zip(sums, expected, strict=True)
        gaps[name] = math.sqrt(sum(float((a - b).square().sum()) for a, b in parts)) / size
        assert gaps[name] < (2 * format_.step or 1e-4)
    assert gaps["32"] < gaps["tf32"] < gaps["bf16"]
    assert gaps["tf32"] > PRECISIONS["tf32"].step / 16
    assert gaps["bf16"] > PRECISIONS["bf16"].step / 16


@pytest.mark.parametrize("format_", SHORT, ids=named)
def test_a_record_that_is_not_finite_counts_nothing(format_: Precision) -> None:
    for value in (math.nan, math.inf, 3e38, float(floats([0x7FFFFFFF]))):
        sums = []
        for broken in (False, True):
            network = network_of(2)
            x, counts = FleetRng(range(2)).at("x").normal(7, 6), torch.ones(2, 7)
            if broken:
                x[0, 3, 1] = value
            else:
                counts[0, 3] = 0
            clipper = TapClipper(network, torch.ones(2), precision=format_.name)
            clipper.accumulate(lambda n=network, x=x: n(x).square().sum(-1), counts)
            sums.append([p.summed_grad for p in network.parameters()])  # type: ignore[attr-defined]
        for left, right in zip(*sums, strict=True):
            torch.testing.assert_close(left, right)


# Refusals


@pytest.fixture
def global_precision() -> Iterator[None]:
    held = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(held)


@pytest.mark.usefixtures("global_precision")
def test_a_global_setting_is_taken_where_the_format_covers_it() -> None:
    """On a CPU 'high' is TF32 and 'medium' is bfloat16."""
    covered = {"32": ["highest"], "tf32": ["highest", "high"]}
    covered["bf16"] = ["highest", "high", "medium"]
    like = torch.zeros(1)
    for name, chosen in itertools.product(PRECISIONS, covered["bf16"]):
        torch.set_float32_matmul_precision(chosen)
        if chosen in covered[name]:
            check_precision(like, name)
        else:
            with pytest.raises(UsageError, match=f"matrix products in .* precision={name}"):
                check_precision(like, name)
        check_precision(like.double())


@pytest.mark.parametrize("mode", [mode for mode in ENGINES if mode != "taps"])
@pytest.mark.parametrize("name", [format_.name for format_ in SHORT])
def test_opacus_is_refused_in_short_formats(mode: str, name: str) -> None:
    with pytest.raises(UsageError, match=f"precision={name}: .* use engine=taps"):
        ENGINES[mode](network_of(1), torch.ones(1), precision=name)


@pytest.mark.parametrize("name", [format_.name for format_ in SHORT])
def test_float64_weights_are_refused_in_short_formats(name: str) -> None:
    for refused in (
        lambda: TapClipper(network_of(1).double(), torch.ones(1), precision=name),
        lambda: check_precision(torch.zeros(1).double(), name),
    ):
        with pytest.raises(UsageError, match=f"precision={name}: needs weights in float32"):
            refused()


def test_an_unknown_format_is_refused() -> None:
    for name in ("16", "fp8", ""):
        with pytest.raises(UsageError, match=r"precision=.*choose one of 32, bf16, tf32"):
            TapClipper(network_of(1), torch.ones(1), precision=name)
