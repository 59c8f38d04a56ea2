"""CounterRng: keyed draws computed from their position alone, in tensor operations that a compiler
fuses and a CUDA graph replays. The generator is Threefry-2×64-20 (Salmon et al. 2011)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from dpsynth.randomness import FleetRng

__all__ = ["CounterRng", "threefry"]

# Skein's rotations for two words and its key parity.
_ROTATIONS = (16, 42, 12, 31, 16, 32, 24, 21)
_PARITY = 0x1BD11BDAA9FC1A22


def _rotate(x: Tensor, bits: int) -> Tensor:
    """64-bit words rotated to the left; a shift to the right carries the sign, hence the mask."""
    return (x << bits) | ((x >> (64 - bits)) & ((1 << bits) - 1))


def threefry(
    key: Int64[Tensor, "runs 2"], low: Int64[Tensor, " blocks"], high: int | Tensor
) -> tuple[Int64[Tensor, "runs blocks"], Int64[Tensor, "runs blocks"]]:
    """Both words of each block, for every key and counter, in 20 rounds.

    Words are signed integers of the same bits; sums wrap.

    Args:
        key: 128-bit keys.
        low: First word of the counters.
        high: Second word of all counters, a number or a 0-dimensional tensor.
    """
    first, second = key[:, :1], key[:, 1:]
    schedule = (first, second, first ^ second ^ _PARITY)
    x, y = low + first, high + second + torch.zeros_like(low)
    for round_ in range(20):
        x = x + y
        y = _rotate(y, _ROTATIONS[round_ % 8]) ^ x
        if round_ % 4 == 3:
            turn = round_ // 4 + 1
            x = x + schedule[turn % 3]
            y = y + schedule[(turn + 1) % 3] + turn
    return x, y


def _uniform(word: Tensor, bits: int) -> Tensor:
    """The leading `bits` of 64-bit words as float64 in [0, 1)."""
    return ((word >> (64 - bits)) & ((1 << bits) - 1)).double() * 2.0**-bits


def _normals(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal draws from two words, by Box & Muller (1958), in float64.

    The radius has 63 bits, so the tails end at ±9.4 (probability 1e-20), the angle 53.
    """
    # (k + ½)·2^-63 lies in (0, 1], so the logarithm is finite.
    radius = ((x & ((1 << 63) - 1)).double() + 0.5) * 2.0**-63
    radius = (-2 * radius.log()).sqrt()
    angle = _uniform(y, 53) * (2 * math.pi)
    return radius * angle.cos(), radius * angle.sin()


class CounterRng(FleetRng):
    """Draws of R runs as a function of (key, purpose, step, piece, call, position).

    Nothing is kept between draws but the number of calls, so a step that was traced once draws
    anew whenever `step` and `piece`, tensors, have moved on. Position counts along the flattened
    shape of one run: a draw with more rows begins with the draw with fewer.

    Different (key, purpose) share a stream with probability 2^-128. It is no cryptographic
    generator: a fleet with secure noise does not draw from it.

    Args:
        keys: One key a run, of at most 256 bits.
        device: Where draws are computed.
        dtype: Type of draws where none is named.
    """

    def __init__(
        self,
        keys: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(keys, device=device, dtype=dtype)
        self._words: dict[str, Tensor] = {}
        self._key: Tensor | None = None
        self._place: Any = 0
        self._calls = 0

    def at(self, purpose: str, step: int | Tensor = 0, piece: int | Tensor = 0) -> CounterRng:
        """Open the streams of (purpose, step, piece), below 2^31 and 2^16; both may be
        0-dimensional int64 tensors."""
        if purpose not in self._words:
            words = [_words(key, purpose) for key in self.keys]
            self._words[purpose] = torch.tensor(words, device=self.device)
        opened = CounterRng(self.keys, device=self.device, dtype=self.dtype)
        opened._words, opened._key = self._words, self._words[purpose]
        opened._place = step * (1 << 32) + piece * (1 << 16)
        return opened

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal draws (runs, *shape)."""
        return self._shaped(_normals(*self._blocks(shape)), shape, dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1), (runs, *shape): multiples of 2^-53, or of 2^-24 in float32."""
        bits = 53 if (dtype or self.dtype) == torch.float64 else 24
        x, y = self._blocks(shape)
        return self._shaped((_uniform(x, bits), _uniform(y, bits)), shape, dtype)

    def _blocks(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As many blocks as the shape needs; every call has blocks of its own."""
        assert self._key is not None, "open the streams with at() first"
        blocks = torch.arange((math.prod(shape) + 1) // 2, device=self.device)
        self._calls += 1
        return threefry(self._key, blocks, self._place + self._calls)

    def _shaped(
        self, draws: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype | None
    ) -> Tensor:
        """The draws of all blocks in turn, cut to (runs, *shape)."""
        flat = torch.stack([draw.to(dtype or self.dtype) for draw in draws], -1).flatten(1)
        return flat[:, : math.prod(shape)].reshape(self.runs, *shape)


def _words(key: int, purpose: str) -> list[int]:
    """Threefry key of (key, purpose) by BLAKE2b keyed with the run's key."""
    digest = hashlib.blake2b(
        purpose.encode(), key=key.to_bytes(32, "little"), person=b"dpsynth counter", digest_size=16
    ).digest()
    return [int.from_bytes(digest[p : p + 8], "little", signed=True) for p in (0, 8)]
