"""Keyed streams: the same for the same name, unrelated for another, and of the law they claim."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsynth import randomness
from dpsynth.checks import UsageError
from dpsynth.randomness import AesStream, FleetRng, derive, fresh_key, secure_stream, stream

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


def test_words_are_those_of_the_cipher() -> None:
    """AES-256 of counters 0, 1, …: block 0 is the first of NIST's KeySbox vectors for 256 bits, the
    others those of the cipher block by block."""
    key = bytes.fromhex("c47b0294dbbbee0fec4757f22ffeee3587ca4730c3d33b691df38bab076bc558")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    blocks = [block.update(counter.to_bytes(16, "big")) for counter in range(20_000)]
    assert blocks[0].hex() == "46f2fb342d6f0ab477476fc501242c5f"
    words = np.frombuffer(b"".join(blocks), np.uint64)
    np.testing.assert_array_equal(AesStream(key).random(40_000), (words >> 11) / 2.0**53)


def test_redraws_are_blocks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempt a of the draw from word i: counters (a + 1)·2^64 + 2i and the next, in every run and
    at any place of the stream; so no two are the same, nor one of the words that come in order."""
    secrets = [bytes([r]) * 32 for r in range(3)]
    asked = []

    def fake(out: np.ndarray, words: object, redraw: Callable[..., np.ndarray]) -> None:
        for places in ([0, 7, 8, 13, 20], [9], [0]):
            for attempt in (0, 5):
                asked.append((places, attempt, redraw(np.array(places, np.intp), attempt)))

    streams = [AesStream(secret) for secret in secrets]
    for opened, taken in zip(streams, (0, 11, 4), strict=True):
        opened.random(taken)
    monkeypatch.setattr(randomness, "normals", fake)
    randomness._fill_normals(streams, np.empty((3, 7)))
    for places, attempt, found in asked:
        assert found.shape == (len(places), 4)
        for place, words in zip(places, found, strict=True):
            run, at = divmod(place, 7)
            word = at + (0, 11, 4)[run]
            block = Cipher(algorithms.AES(secrets[run]), modes.ECB()).encryptor()
            counters = [((attempt + 1) << 64) + 2 * word + i for i in (0, 1)]
            wanted = b"".join(block.update(c.to_bytes(16, "big")) for c in counters)
            np.testing.assert_array_equal(words, np.frombuffer(wanted, np.uint64))


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


def test_fresh_keys_are_fresh_and_long() -> None:
    drawn = {fresh_key() for _ in range(200)}
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


@pytest.mark.parametrize("word", [0, -1, 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_words_give_uniforms_below_one(
    word: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = secure_stream(SECURE, "x")
    monkeypatch.setattr(opened, "_fill", lambda out: out.view(np.int64).fill(word))
    uniform = opened.random(4, dtype)
    assert (uniform >= 0).all()
    assert (uniform < 1).all()


def test_secure_uniforms_go_on_where_they_stopped() -> None:
    """In pieces of any size the same draws: a sampler's buffer is not part of its law."""
    whole = secure_stream(SECURE, "x").random(40_000)
    opened, cuts = secure_stream(SECURE, "x"), (1, 2, 16_384, 16_385, 5, 7223)
    np.testing.assert_array_equal(np.concatenate([opened.random(cut) for cut in cuts]), whole)
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["normal", "uniform"])
@pytest.mark.parametrize("runs", [1, 3])
def test_draws_do_not_depend_on_how_they_are_cut(
    runs: int, method: str, dtype: torch.dtype, secure: bool
) -> None:
    """One draw takes one word, and what it needs beyond that is its own."""
    rng = FleetRng(range(SECURE, SECURE + runs), secure=secure, dtype=dtype)
    whole = getattr(rng.at("x", 5), method)(60_000)
    opened, cuts = rng.at("x", 5), (1, 2, 16_384, 0, 16_385, 5, 20_000, 7223)
    pieces = [getattr(opened, method)(cut) for cut in cuts]
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert torch.equal(getattr(rng.at("x", 5), method)(3, 200), whole[:, :600].view(runs, 3, 200))


def test_draws_are_the_same_in_every_process() -> None:
    """Four that were drawn in another one, bit by bit."""
    drawn = FleetRng([5, 6]).at("noise", 3).normal(200, dtype=torch.float64)[0, :4]
    assert [value.hex() for value in drawn.tolist()] == [
        "0x1.995235af1ccbcp-3",
        "-0x1.71bdc639ecea3p-2",
        "0x1.03b0129401f5fp+0",
        "0x1.0d5eefafa480cp-1",
    ]


def test_normals_and_uniforms_in_turn_use_no_word_twice() -> None:
    rng = FleetRng([5], dtype=torch.float64)
    normal, uniform = rng.at("x").normal(3000), rng.at("x").uniform(3000)
    opened = rng.at("x")
    for at in range(0, 3000, 1000):
        assert torch.equal(opened.normal(500), normal[:, at : at + 500])
        assert torch.equal(opened.uniform(500), uniform[:, at + 500 : at + 1000])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 16_383, 16_384, 16_385, 50_001])
def test_secure_normals_of_any_number_are_all_filled(size: int) -> None:
    for dtype in (np.float32, np.float64):
        out = np.full(size, np.nan, dtype)
        drawn = secure_stream(SECURE, "x").standard_normal(size, dtype, out)
        assert drawn is out
        assert np.isfinite(out).all()
        assert len(np.unique(out)) >= 0.99 * size
        np.testing.assert_array_equal(secure_stream(SECURE, "x").standard_normal(size, dtype), out)


@pytest.mark.parametrize("method", ["random", "standard_normal"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_draws_may_be_put_into_memory_with_gaps(method: str, dtype: type) -> None:
    wanted = getattr(secure_stream(SECURE, "x"), method)((40, 6), dtype)
    for out in (np.full((40, 12), np.nan, dtype)[:, ::2], np.full((6, 40), np.nan, dtype).T):
        found = getattr(secure_stream(SECURE, "x"), method)((40, 6), dtype, out)
        assert found is out
        np.testing.assert_array_equal(out, wanted)


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
    monkeypatch.setattr(randomness, "keyed_stream", refuse)
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


def test_seeded_streams_of_neighbouring_names_are_apart() -> None:
    """The same laws for the streams of a fleet as for `stream` and `secure_stream`."""
    names = [(1, "a", 23), (1, "a/2", 3), (12, "a", 3), (1, "2/a", 3), (1, "a2", 3), (1, "a", 3)]
    names += [(1, "", 0), (1, "/", 0), (1, "0", 0), (10, "", 0)]
    names += [(12345 + (1 << bit), "x", 0) for bit in range(20, 256)]
    drawn = [FleetRng([k], dtype=torch.float64).at(p, s).uniform(1) for k, p, s in names]
    assert len({float(value) for value in drawn}) == len(names)


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
