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

__all__ = [
    "FleetRng",
    "SecureStream",
    "Stream",
    "derive",
    "fresh_key",
    "secure_stream",
    "stream",
]

_Kind = type[np.float32] | type[np.float64]

# Words enciphered at a time: what is worked on stays in the processor's cache.
_BLOCK = 1 << 14
_ZEROS = memoryview(bytes(8 * _BLOCK))


def fresh_key(*, secure: bool = False) -> int:
    """A key from the operating system's entropy: 128 bits, or 256 for secure noise."""
    return secrets.randbits(256 if secure else 128)


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


class SecureStream:
    """Uniform and normal draws from AES-256 in counter mode; the calls are those of
    `numpy.random.Generator`.

    Whoever does not hold the key cannot tell the draws from true ones, nor from some of them guess
    others; a Philox stream promises neither. It says nothing about how long a call takes.

    Args:
        secret: AES key (32 bytes) and first counter block (16 bytes).
    """

    def __init__(self, secret: bytes) -> None:
        cipher = Cipher(algorithms.AES(secret[:32]), modes.CTR(secret[32:]))
        self._encryptor = cipher.encryptor()

    def _words(self, count: int) -> Tensor:
        """The next `count` 64-bit words of the key stream, as signed integers."""
        words = np.empty(count, np.int64)
        if count:
            self._encryptor.update_into(_ZEROS[: 8 * count], words.data.cast("B"))
        return torch.from_numpy(words)

    def random(
        self,
        size: int | Sequence[int] = (),
        dtype: _Kind = np.float64,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Uniform draws in [0, 1): multiples of 2^-53, or of 2^-24 in float32; one word each."""
        bits = 53 if dtype is np.float64 else 24
        out = np.empty(size, dtype) if out is None else out
        for piece in torch.from_numpy(out.reshape(-1)).split(_BLOCK):
            words = (self._words(len(piece)) >> (64 - bits)) & ((1 << bits) - 1)
            torch.mul(words.to(piece.dtype), 2.0**-bits, out=piece)
        return out

    def standard_normal(
        self,
        size: int | Sequence[int] = (),
        dtype: _Kind = np.float64,
        out: np.ndarray | None = None,
    ) -> np.ndarray:
        """Standard normal draws by Box & Muller (1958), computed in float64 and cast afterwards.

        The radius comes from 63 bits, so the tails end at ±9.4 (probability 1e-20), the angle from
        53 bits. An odd number of draws uses up one more, which nobody sees.
        """
        out = np.empty(size, dtype) if out is None else out
        for piece in torch.from_numpy(out.reshape(-1)).split(_BLOCK):
            half = (len(piece) + 1) // 2
            # (k + ½)·2^-63 lies in (0, 1], so the logarithm is finite.
            radius = (self._words(half) & ((1 << 63) - 1)).double().add_(0.5).mul_(2.0**-63)
            radius.log_().mul_(-2).sqrt_()
            angle = (self._words(half) >> 11).double().mul_(math.pi * 2.0**-52)
            torch.mul(radius, angle.cos(), out=piece[:half])
            rest = len(piece) - half
            torch.mul(radius[:rest], angle.sin_()[:rest], out=piece[half:])
        return out


Stream = np.random.Generator | SecureStream


def secure_stream(key: int, purpose: str, step: int = 0) -> SecureStream:
    """The cryptographic stream of (key, purpose, step): an AES key and first counter of its own,
    by BLAKE2b keyed with the 256-bit run key.

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
        digest_size=48,
    )
    return SecureStream(digest.digest())


def _check_secure(key: int) -> None:
    # A 256-bit key falls below 2^128 with probability 2^-128; what derives from a seed always does.
    if not 1 << 128 <= key < 1 << 256:
        raise UsageError(
            f"secure noise: a key of {key.bit_length()} bits; draw one with fresh_key(secure=True)"
        )


class FleetRng:
    """Draws for R runs at once, each run from its own key, so that a run draws the same numbers
    whether it trains alone or in a fleet.

    Every method returns a tensor with a leading `runs` axis. Streams are opened by `at`.

    Args:
        keys: One key a run.
        device: Where draws are wanted.
        dtype: Type of draws where none is named.
        secure: Draw from AES-256 (`secure_stream`) instead of Philox, under 256-bit keys. The
            cipher runs on the CPU: on a GPU each draw is computed by one core (about as long as a
            Philox draw on the CPU takes) and copied, which then dominates a step of large networks.
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
        self._streams: Sequence[Stream] = []
        self._generators: list[torch.Generator] = []

    @property
    def runs(self) -> int:
        """Number of runs R."""
        return len(self.keys)

    def at(self, purpose: str, step: int = 0) -> FleetRng:
        """Open the streams of (purpose, step).

        On a GPU, unless `secure`, a stream is the device's Philox under the first 63 bits of what
        the CPU's would be keyed with: some two of n streams are the same with probability below
        n²/2^64, e.g. 1e-5 for 32 runs of 1e5 steps with four streams each.
        """
        opened = FleetRng(self.keys, device=self.device, dtype=self.dtype, secure=self.secure)
        if self.secure:
            opened._streams = [secure_stream(key, purpose, step) for key in self.keys]
        elif self.device.type == "cpu":
            opened._streams = [stream(key, purpose, step) for key in self.keys]
        else:
            seeds = [_device_seed(key, purpose, step) for key in self.keys]
            opened._generators = [torch.Generator(self.device).manual_seed(s) for s in seeds]
        return opened

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal draws (runs, *shape)."""
        dtype = dtype or self.dtype
        if self._generators:
            draws = [self._on_device(torch.randn, shape, g, dtype) for g in self._generators]
            return torch.stack(draws)
        kind = _kind(dtype)
        drawn = np.empty((self.runs, *shape), kind)
        for run, opened in enumerate(self._streams):
            opened.standard_normal(shape, kind, drawn[run, ...])
        return torch.from_numpy(drawn).to(self.device, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1), (runs, *shape)."""
        dtype = dtype or self.dtype
        if self._generators:
            draws = [self._on_device(torch.rand, shape, g, dtype) for g in self._generators]
            return torch.stack(draws)
        kind = _kind(dtype)
        drawn = np.empty((self.runs, *shape), kind)
        for run, opened in enumerate(self._streams):
            opened.random(shape, kind, drawn[run, ...])
        return torch.from_numpy(drawn).to(self.device, dtype)

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
