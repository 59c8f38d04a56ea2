"""Keyed streams: the same for the same name, unrelated for another, and of the law they claim."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsynth import randomness
from dpsynth.randomness import FleetRng, derive, fresh_key, stream

keys = st.integers(0, 2**128 - 1)
purposes = st.text(max_size=10)
steps = st.integers(0, 10**9)


@given(keys, purposes, steps)
def test_a_stream_is_reproducible(key: int, purpose: str, step: int) -> None:
    first, again = (stream(key, purpose, step).random(3) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert derive(key, purpose, step) == derive(key, purpose, step)
    assert 0 <= derive(key, purpose, step) < 2**128


@given(
    st.lists(st.tuples(keys, purposes, steps), min_size=2, max_size=6, unique=True),
)
def test_two_names_never_share_a_stream(names: list[tuple[int, str, int]]) -> None:
    assert len({derive(*name) for name in names}) == len(names)
    assert len({stream(*name).random() for name in names}) == len(names)


def test_names_that_read_alike_are_kept_apart() -> None:
    """What one argument ends with and the next begins with cannot be confused."""
    names = [(1, "a", 23), (1, "a/2", 3), (12, "a", 3), (1, "2/a", 3), (1, "a2", 3), (1, "a", 3)]
    names += [(1, "", 0), (1, "/", 0), (1, "0", 0), (10, "", 0)]
    assert len({derive(*name) for name in names}) == len(names)


def test_streams_of_neighbouring_names_are_uncorrelated() -> None:
    names = [(k, p, s) for k in (0, 1, 2**64) for p in ("noise", "draws") for s in (0, 1)]
    drawn = np.stack([stream(*name).standard_normal(20_000) for name in names])
    correlation = np.corrcoef(drawn) - np.eye(len(names))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(20_000)
    for row in drawn:
        assert stats.kstest(row, "norm").pvalue > 1e-4


def test_keys_use_all_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a key nor what is derived from it is cut to the 32 or 64 bits of a common seed."""
    alike = [12345 + (1 << bit) for bit in range(20, 128)]
    assert len({derive(key, "x") for key in alike}) == len(alike)
    monkeypatch.setattr(randomness, "derive", lambda key, purpose, step: key)
    assert len({stream(key, "x").random() for key in alike}) == len(alike)


def test_fresh_keys_are_fresh() -> None:
    drawn = {fresh_key() for _ in range(200)}
    assert len(drawn) == 200
    assert all(0 <= key < 2**128 for key in drawn)
    assert max(drawn) > 2**120


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["normal", "uniform", "gumbel"])
def test_draws_have_the_shape_type_and_device_asked_for(method: str, dtype: torch.dtype) -> None:
    rng = FleetRng([1, 2, 3], dtype=dtype)
    for shape in ((), (4,), (2, 0), (2, 3, 5)):
        drawn = getattr(rng.at("x"), method)(*shape)
        assert drawn.shape == (3, *shape)
        assert drawn.dtype == dtype
        assert drawn.device == torch.device("cpu")
        assert drawn.isfinite().all()
    assert rng.runs == 3


def test_uniform_draws_may_be_finer_than_the_rest() -> None:
    rng = FleetRng([1], dtype=torch.float32)
    fine = rng.at("x").uniform(1000, dtype=torch.float64)
    assert fine.dtype == torch.float64
    assert (fine != fine.float()).any()


LAWS = {
    "normal": stats.norm,
    "uniform": stats.uniform,
    "gumbel": stats.gumbel_r,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", LAWS)
def test_draws_follow_their_law_in_every_run(method: str, dtype: torch.dtype) -> None:
    drawn = getattr(FleetRng([1, 2], dtype=dtype).at("x"), method)(30_000).double().numpy()
    for row in drawn:
        assert stats.kstest(row, LAWS[method].cdf).pvalue > 1e-4
    assert abs(np.corrcoef(drawn)[0, 1]) < 4 / math.sqrt(30_000)
    if method == "uniform":
        assert (drawn >= 0).all()
        assert (drawn < 1).all()


def test_extreme_uniforms_give_finite_gumbels(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.float64):
        rng = FleetRng([1], dtype=dtype).at("x")
        ends = torch.tensor([[0.0, 1 - torch.finfo(dtype).eps / 2]], dtype=dtype)
        monkeypatch.setattr(rng, "uniform", lambda *shape, ends=ends: ends)
        low, high = rng.gumbel(2)[0].tolist()
        assert math.isfinite(low)
        assert math.isfinite(high)
        assert low < -3 < 10 < high


@pytest.mark.parametrize("method", LAWS)
def test_a_run_draws_the_same_alone_and_in_a_fleet(method: str) -> None:
    together = getattr(FleetRng([5, 6, 7]).at("x", 3), method)(4, 2)
    for run, key in enumerate((5, 6, 7)):
        assert torch.equal(getattr(FleetRng([key]).at("x", 3), method)(4, 2)[0], together[run])


def test_streams_are_opened_anew_and_then_go_on() -> None:
    rng = FleetRng([5, 6])
    opened = rng.at("x")
    first, second = opened.normal(8), opened.normal(8)
    assert not torch.equal(first, second)
    assert torch.equal(rng.at("x").normal(8), first)
    assert torch.equal(opened.at("x").normal(8), first)
    others = [rng.at("x", 1), rng.at("y"), FleetRng([6, 5]).at("x")]
    drawn = [first, *(other.normal(8) for other in others)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_nothing_global_is_read_or_moved() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    first = FleetRng([5]).at("x").normal(8)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(FleetRng([5]).at("x").normal(8), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")
def test_a_gpu_draws_by_the_same_rules() -> None:
    rng = FleetRng([1, 2], device="cuda")
    for method, law in LAWS.items():
        first, again = (getattr(rng.at("x"), method)(30_000) for _ in range(2))
        assert first.device.type == "cuda"
        assert torch.equal(first, again)
        assert not torch.equal(first, getattr(rng.at("x", 1), method)(30_000))
        for row in first.cpu().double().numpy():
            assert stats.kstest(row, law.cdf).pvalue > 1e-4
        alone = getattr(FleetRng([2], device="cuda").at("x"), method)(30_000)
        assert torch.equal(alone[0], first[1])
