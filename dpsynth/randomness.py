"""Keyed randomness: one independent stream for every (key, purpose, step), so nothing is global."""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.normals import normals

__all__ = [
    "AesStream",
    "FleetRng",
    "Stream",
    "derive",
    "fresh_key",
    "keyed_stream",
    "secure_stream",
    "stream",
]

_Kind = type[np.float32] | type[np.float64]

# Words that are worked on at a time: they stay in the processor's cache.
_BLOCK = 1 << 14
_ZEROS = memoryview(bytes(8 * _BLOCK))


def fresh_key() -> int:
    """A key of 256 bits from the operating system's entropy."""
    return secrets.randbits(256)


def _digest(key: int, purpose: str, step: int) -> bytes:
    text = f"{key}/{purpose}/{step}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def derive(key: int, purpose: str, step: int = 0) -> int:
    """A key of its own for (key, purpose, step)."""
    return int.from_bytes(_digest(key, purpose, step), "little")


def stream(key: int, purpose: str, step: int = 0) -> np.random.Generator:
    """The stream of (key, purpose, step): Philox under a 128-bit hashed key.

    The same three arguments give the same draws; two different ones collide with probability
    2^-128, which a 32-bit seed (what a CPU `torch.Generator` keeps) would not give.
    """
    entropy = np.random.SeedSequence(derive(key, purpose, step))
    return np.random.Generator(np.random.Philox(entropy))


class AesStream:
    """Uniform and normal draws from AES-256 in counter mode; the calls are those of
    `numpy.random.Generator`.

    Whoever does not hold the key cannot tell the draws from true ones, nor from some of them guess
    others; a Philox stream promises neither. It says nothing about how long a call takes. Every
    draw takes one 64-bit word, so draws do not depend on how many are asked for at a time.

    Args:
        key: AES key (32 bytes). Block i of the key stream is that of counter i; counters from 2^64
            on are for normal draws that one word does not decide (see `normals`).
    """

    def __init__(self, key: bytes) -> None:
        self._counting = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._at_counter = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
        self._taken = 0

    def _fill(self, out: np.ndarray) -> None:
        """Put the next 64-bit words into `out`, `_BLOCK` at most."""
        self._counting.update_into(_ZEROS[: 8 * out.size], out.data.cast("B"))
        self._taken += out.size

    def random(
        self,
        size: int | Sequence[int] = (),
        dtype: _Kind = np.float64,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Uniform draws in [0, 1): multiples of 2^-53, or of 2^-24 in float32."""
        bits = 53 if dtype is np.float64 else 24
        out = np.empty(size, dtype) if out is None else out
        flat = out.reshape(-1)
        for at in range(0, flat.size, _BLOCK):
            piece = flat[at : at + _BLOCK]
            words = np.empty(piece.size, np.uint64)
            self._fill(words)
            words >>= np.uint64(64 - bits)
            np.multiply(words, 2.0**-bits, out=piece, casting="same_kind")
        if not np.shares_memory(flat, out):
            out[...] = flat.reshape(out.shape)
        return out

    def standard_normal(
        self,
        size: int | Sequence[int] = (),
        dtype: _Kind = np.float64,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Standard normal draws (`normals.fill`), computed in float64 and cast afterwards."""
        out = np.empty(size, dtype) if out is None else out
        plain = out.dtype == np.float64 and out.flags.c_contiguous
        drawn = out if plain else np.empty(out.shape)
        _fill_normals([self], drawn.reshape(1, drawn.size))
        if not plain:
            out[...] = drawn
        return out


def _counters(numbers: np.ndarray, attempt: int) -> memoryview:
    """Two counters for each word of a stream that are those of no other (word, attempt)."""
    counters = np.empty((numbers.size, 2, 2), ">u8")
    counters[..., 0] = attempt + 1
    counters[:, 0, 1] = 2 * numbers
    counters[:, 1, 1] = 2 * numbers + 1
    return counters.data.cast("B")


def _fill_normals(streams: Sequence[AesStream], out: np.ndarray) -> None:
    """Standard normals, row r of `out` (runs, draws) from stream r."""
    width = out.shape[1]
    # Draw i of all takes word i + before[run] of its run's stream.
    before = np.array([opened._taken - r * width for r, opened in enumerate(streams)])
    ends = width * np.arange(1, len(streams) + 1)

    def words(at: int, block: np.ndarray) -> None:
        done = 0
        while done < block.size:
            run, begun = divmod(at + done, width)
            piece = block[done : done + width - begun]
            streams[run]._fill(piece)
            done += piece.size

    def redraw(places: np.ndarray, attempt: int) -> np.ndarray:
        cuts = [0, *np.searchsorted(places, ends).tolist()]
        plain = _counters(places + np.repeat(before, np.diff(cuts)), attempt)
        # A cipher wants room for one octet less than a block more than it fills.
        drawn = bytearray(len(plain) + 15)
        room = memoryview(drawn)
        for opened, start, end in zip(streams, cuts, cuts[1:], strict=False):
            if start < end:
                opened._at_counter.update_into(
                    plain[32 * start : 32 * end], room[32 * start : 32 * end + 15]
                )
        return np.frombuffer(drawn, np.uint64, 4 * places.size).reshape(-1, 4)

    normals(out.reshape(-1), words, redraw)


Stream = np.random.Generator | AesStream


def secure_stream(key: int, purpose: str, step: int = 0) -> AesStream:
    """The cryptographic stream of (key, purpose, step): an AES key of its own, by BLAKE2b keyed
    with the 256-bit run key.

    The same three arguments give the same draws, so a replayed step repeats its noise. Two
    different ones never share an AES key but with probability 2^-256.

    Raises:
        UsageError: On a key that cannot be one of 256 bits, e.g. one that came from a seed.
    """
    _check_secure(key)
    digest = hashlib.blake2b(
        f"{purpose}/{step}".encode(),
        key=key.to_bytes(32, "little"),
        person=b"dpsynth noise",
        digest_size=32,
    )
    return AesStream(digest.digest())


def keyed_stream(key: int, purpose: str, step: int = 0) -> AesStream:
    """The stream of (key, purpose, step) for any key: no better kept than that key is."""
    text = f"{key}/{purpose}/{step}".encode()
    return AesStream(hashlib.blake2b(text, person=b"dpsynth draws", digest_size=32).digest())


def _check_secure(key: int) -> None:
    # A 256-bit key falls below 2^128 with probability 2^-128; what derives from a seed always does.
    if not 1 << 128 <= key < 1 << 256:
        raise UsageError(
            f"secure noise: a key of {key.bit_length()} bits; draw one with fresh_key()"
        )


class FleetRng:
    """Draws for R runs at once, each run from its own key, so that a run draws the same numbers
    whether it trains alone or in a fleet.

    Every method returns a tensor with a leading `runs` axis. Streams are opened by `at`.

    Args:
        keys: One key a run.
        device: Where draws are wanted.
        dtype: Type of draws where none is named.
        secure: Take 256-bit keys only, and draw from AES-256 (`secure_stream`) on a GPU too, where
            a draw is otherwise the device's Philox. The cipher runs on the CPU: each draw is then
            computed by one core and copied, which dominates a step of large networks. On a CPU
            every draw is from AES-256 and `secure` costs nothing.
    """

    def __init__(
        self,
        keys: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        secure: bool = False,
    ) -> None:
        self.keys = tuple(keys)
        self.device = torch.device(device)
        self.dtype = dtype
        self.secure = secure
        if secure:
            for key in self.keys:
                _check_secure(key)
        self._streams: Sequence[AesStream] = []
        self._generators: list[torch.Generator] = []

    @property
    def runs(self) -> int:
        """Number of runs R."""
        return len(self.keys)

    def at(self, purpose: str, step: int = 0) -> FleetRng:
        """Open the streams of (purpose, step).

        On a GPU, unless `secure`, a stream is the device's Philox under 63 bits of a hash: some two
        of n streams are the same with probability below n²/2^64, e.g. 1e-5 for 32 runs of 1e5 steps
        with four streams each.
        """
        opened = FleetRng(self.keys, device=self.device, dtype=self.dtype, secure=self.secure)
        if self.secure:
            opened._streams = [secure_stream(key, purpose, step) for key in self.keys]
        elif self.device.type == "cpu":
            opened._streams = [keyed_stream(key, purpose, step) for key in self.keys]
        else:
            seeds = [_device_seed(key, purpose, step) for key in self.keys]
            opened._generators = [torch.Generator(self.device).manual_seed(s) for s in seeds]
        return opened

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal draws (runs, *shape); those of AES are rounded from float64."""
        dtype = dtype or self.dtype
        if self._generators:
            draws = [self._on_device(torch.randn, shape, g, dtype) for g in self._generators]
            return torch.stack(draws)
        drawn = self._empty(shape, np.float64)
        _fill_normals(self._streams, drawn.reshape(self.runs, math.prod(shape)))
        return torch.from_numpy(drawn).to(self.device, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1), (runs, *shape)."""
        dtype = dtype or self.dtype
        if self._generators:
            draws = [self._on_device(torch.rand, shape, g, dtype) for g in self._generators]
            return torch.stack(draws)
        kind = _kind(dtype)
        drawn = self._empty(shape, kind)
        for run, opened in enumerate(self._streams):
            opened.random(shape, kind, drawn[run, ...])
        return torch.from_numpy(drawn).to(self.device, dtype)

    def _empty(self, shape: Sequence[int], kind: _Kind) -> np.ndarray:
        if not self._streams:
            raise UsageError("draws: no stream is open; call at() first")
        return np.empty((self.runs, *shape), kind)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel draws (runs, *shape)."""
        tiny = torch.finfo(self.dtype).tiny
        return -(-self.uniform(*shape).clamp_min(tiny).log()).clamp_min(tiny).log()

    def _on_device(self, draw, shape, generator, dtype) -> Tensor:
        return draw(shape, generator=generator, device=self.device, dtype=dtype)


def _kind(dtype: torch.dtype) -> Any:
    return np.float64 if dtype == torch.float64 else np.float32


def _device_seed(key: int, purpose: str, step: int) -> int:
    """63 bits of the key of (key, purpose, step): what a CUDA generator takes as its seed."""
    return int.from_bytes(_digest(key, purpose, step)[:8], "little") >> 1
