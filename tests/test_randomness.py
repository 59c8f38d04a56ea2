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
from dpsynth.checks import UsageError
from dpsynth.randomness import FleetRng, SecureStream, derive, fresh_key, secure_stream, stream

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


# Secure streams

wide_keys = st.integers(2**128, 2**256 - 1)
SECURE = 7 << 240


def test_secure_words_are_those_of_the_standard() -> None:
    """AES-256 in counter mode on the key and counter of NIST SP 800-38A, F.5.5: the first word of
    each of its first three output blocks, as a uniform draw."""
    secret = bytes.fromhex(
        "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
        "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
    )
    blocks = [
        "0bdf7df1591716335e9a8b15c860c502",
        "5a6e699d536119065433863c8f657b94",
        "1bc12c9c01610d5d0d8bd6a3378eca62",
    ]
    drawn = SecureStream(secret).random(6)
    for place, block in enumerate(blocks):
        word = int.from_bytes(bytes.fromhex(block)[:8], "little")
        assert drawn[2 * place] == (word >> 11) / 2**53


@given(wide_keys, purposes, steps)
def test_a_secure_stream_is_reproducible(key: int, purpose: str, step: int) -> None:
    first, again = (secure_stream(key, purpose, step) for _ in range(2))
    np.testing.assert_array_equal(first.random(3), again.random(3))
    np.testing.assert_array_equal(first.standard_normal(3), again.standard_normal(3))


@given(st.lists(st.tuples(wide_keys, purposes, steps), min_size=2, max_size=6, unique=True))
def test_two_names_never_share_a_secure_stream(names: list[tuple[int, str, int]]) -> None:
    assert len({float(secure_stream(*name).random()) for name in names}) == len(names)


def test_secure_names_that_read_alike_are_kept_apart() -> None:
    names = [("a", 23), ("a/2", 3), ("a2", 3), ("2/a", 3), ("a", 3), ("", 0), ("/", 0), ("0", 0)]
    drawn = {float(secure_stream(SECURE, *name).random()) for name in names}
    assert len(drawn) == len(names)


def test_every_bit_of_a_secure_key_counts() -> None:
    alike = [SECURE] + [SECURE ^ (1 << bit) for bit in range(256)]
    assert len({float(secure_stream(key, "x").random()) for key in alike}) == 257


def test_secure_keys_are_fresh_and_long() -> None:
    drawn = {fresh_key(secure=True) for _ in range(200)}
    assert len(drawn) == 200
    assert all(0 <= key < 2**256 for key in drawn)
    assert max(drawn) > 2**248


@pytest.mark.parametrize("key", [0, 5, 2**128 - 1, 2**256, -(2**200)])
def test_a_key_that_came_from_a_seed_is_refused(key: int) -> None:
    """What `derive` gives, and what no 256-bit key is; the message does not hold the key."""
    for refused in (lambda: secure_stream(key, "x"), lambda: FleetRng([SECURE, key], secure=True)):
        with pytest.raises(UsageError, match="fresh_key") as refusal:
            refused()
        assert str(abs(key)) not in str(refusal.value) or key in (0, 5)
    with pytest.raises(UsageError, match="fresh_key"):
        secure_stream(derive(1, "run"), "x")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_secure_draws_follow_their_laws(dtype: type) -> None:
    opened = secure_stream(SECURE, "laws")
    size = 200_001
    uniform, normal = opened.random(size, dtype), opened.standard_normal(size, dtype)
    assert uniform.dtype == normal.dtype == dtype
    assert stats.kstest(uniform, "uniform").pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3
    assert (uniform >= 0).all()
    assert (uniform < 1).all()
    for bar in (2.0, 3.0, 4.0):
        beyond = int((np.abs(normal) > bar).sum())
        assert stats.binomtest(beyond, size, 2 * stats.norm.sf(bar)).pvalue > 1e-3
    for order, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(1, 2 * order, 2)) / size)
        assert abs((normal.astype(float) ** order).mean() - moment) < 4 * spread
    bits = 53 if dtype is np.float64 else 24
    scaled = uniform.astype(float) * 2**bits
    np.testing.assert_array_equal(scaled, np.round(scaled))
    assert (scaled % 2 == 1).any()


def test_the_two_halves_of_a_secure_pair_are_independent() -> None:
    """Draws of one block share a radius, half a block apart: they, their squares and their signs
    are unrelated; so are neighbours."""
    block = randomness._BLOCK
    drawn = secure_stream(SECURE, "pairs").standard_normal((20, 2, block // 2))
    ones, others = drawn[:, 0].ravel(), drawn[:, 1].ravel()
    for left, right in ((ones, others), (ones[:-1], ones[1:])):
        for law in (lambda x: x, np.square, np.sign, np.abs):
            assert abs(np.corrcoef(law(left), law(right))[0, 1]) < 4.5 / math.sqrt(left.size)
    assert stats.kstest((ones**2 + others**2) / 2, "expon").pvalue > 1e-3
    assert (
        stats.kstest(np.arctan2(others, ones), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3
    )


@pytest.mark.parametrize("word", [0, -1, 1, 2**63 - 1, -(2**63)])
def test_extreme_secure_words_give_finite_draws(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = secure_stream(SECURE, "x")
    monkeypatch.setattr(opened, "_words", lambda count: torch.full((count,), word))
    normal = opened.standard_normal(4)
    assert np.isfinite(normal).all()
    assert (np.abs(normal) < 9.5).all()
    for dtype in (np.float32, np.float64):
        uniform = opened.random(4, dtype)
        assert (uniform >= 0).all()
        assert (uniform < 1).all()


def test_the_longest_secure_draw_is_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Radius from the least of 63 bits: √(2 · 64 ln 2), at angle 0."""
    opened = secure_stream(SECURE, "x")
    monkeypatch.setattr(opened, "_words", lambda count: torch.zeros(count, dtype=torch.int64))
    assert opened.standard_normal(2)[0] == pytest.approx(math.sqrt(128 * math.log(2)), rel=1e-12)


def test_secure_uniforms_go_on_where_they_stopped() -> None:
    """In pieces of any size the same draws: a sampler's buffer is not part of its law."""
    whole = secure_stream(SECURE, "x").random(40_000)
    opened, cuts = secure_stream(SECURE, "x"), (1, 2, 16_384, 16_385, 5, 7223)
    np.testing.assert_array_equal(np.concatenate([opened.random(cut) for cut in cuts]), whole)
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("size", [0, 1, 2, 3, 16_383, 16_384, 16_385, 50_001])
def test_secure_normals_of_any_number_are_all_filled(size: int) -> None:
    for dtype in (np.float32, np.float64):
        out = np.full(size, np.nan, dtype)
        drawn = secure_stream(SECURE, "x").standard_normal(size, dtype, out)
        assert drawn is out
        assert np.isfinite(out).all()
        assert len(np.unique(out)) >= 0.99 * size
        np.testing.assert_array_equal(secure_stream(SECURE, "x").standard_normal(size, dtype), out)


def test_float32_normals_are_the_float64_ones_rounded() -> None:
    fine, coarse = (
        secure_stream(SECURE, "x").standard_normal(999, kind) for kind in (np.float64, np.float32)
    )
    np.testing.assert_array_equal(fine.astype(np.float32), coarse)


@pytest.mark.parametrize("method", LAWS)
def test_a_secure_fleet_draws_from_secure_streams_alone(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a secure fleet opened another stream")

    monkeypatch.setattr(randomness, "stream", refuse)
    keys = [SECURE, SECURE + 1]
    rng = FleetRng(keys, secure=True)
    assert rng.at("x").secure
    first = getattr(rng.at("x", 3).at("x", 3), method)(30_000)
    assert torch.equal(first, getattr(rng.at("x", 3), method)(30_000))
    assert not torch.equal(first, getattr(rng.at("x", 4), method)(30_000))
    for run, key in enumerate(keys):
        assert stats.kstest(first[run].double().numpy(), LAWS[method].cdf).pvalue > 1e-4
        alone = FleetRng([key], secure=True).at("x", 3)
        assert torch.equal(getattr(alone, method)(30_000)[0], first[run])
    if method == "normal":
        expected = secure_stream(SECURE, "x", 3).standard_normal(30_000, np.float32)
        np.testing.assert_array_equal(first[0].numpy(), expected)


@pytest.mark.parametrize("secure", [False, True])
def test_normal_draws_may_be_finer_than_the_rest(secure: bool) -> None:
    fine = FleetRng([SECURE], secure=secure).at("x").normal(2, 500, dtype=torch.float64)
    assert fine.shape == (1, 2, 500)
    assert fine.dtype == torch.float64
    assert (fine != fine.float()).any()


# A GPU


def test_device_seeds_use_all_of_63_bits() -> None:
    seeds = np.array([randomness._device_seed(1, "noise", step) for step in range(20_000)])
    assert len(np.unique(seeds)) == seeds.size
    for bit in range(63):
        assert stats.binomtest(int((seeds >> bit & 1).sum()), seeds.size, 0.5).pvalue > 1e-5
    assert (seeds >= 0).all()


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")
def test_secure_draws_on_a_gpu_are_those_of_the_cpu() -> None:
    for method in LAWS:
        drawn = [
            getattr(FleetRng([SECURE], device=d, secure=True).at("x"), method)(1000)
            for d in ("cpu", "cuda")
        ]
        assert drawn[1].device.type == "cuda"
        torch.testing.assert_close(drawn[0], drawn[1].cpu())
