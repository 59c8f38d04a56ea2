"""Keyed randomness: one independent stream for every (key, purpose, step), so nothing is global."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["FleetRng", "derive", "fresh_key", "stream"]


def fresh_key() -> int:
    """A 128-bit key from the operating system's entropy."""
    return secrets.randbits(128)


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


class FleetRng:
    """Draws for R runs at once, each run from its own key, so that a run draws the same numbers
    whether it trains alone or in a fleet.

    Every method returns a tensor with a leading `runs` axis. Streams are opened by `at`.
    """

    def __init__(
        self,
        keys: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.keys = tuple(keys)
        self.device = torch.device(device)
        self.dtype = dtype
        self._streams: list[np.random.Generator] = []
        self._generators: list[torch.Generator] = []

    @property
    def runs(self) -> int:
        """Number of runs R."""
        return len(self.keys)

    def at(self, purpose: str, step: int = 0) -> FleetRng:
        """Open the streams of (purpose, step)."""
        opened = FleetRng(self.keys, device=self.device, dtype=self.dtype)
        if self.device.type == "cpu":
            opened._streams = [stream(key, purpose, step) for key in self.keys]
            return opened
        # A CUDA generator is Philox with a 64-bit seed, enough for distinct streams.
        seeds = [int.from_bytes(_digest(k, purpose, step)[:8], "little") >> 1 for k in self.keys]
        opened._generators = [torch.Generator(self.device).manual_seed(seed) for seed in seeds]
        return opened

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws (runs, *shape)."""
        if self._generators:
            return torch.stack([self._on_device(torch.randn, shape, g) for g in self._generators])
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        draws = [s.standard_normal(shape, dtype=kind) for s in self._streams]
        return torch.from_numpy(np.stack(draws)).to(self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1), (runs, *shape)."""
        dtype = dtype or self.dtype
        if self._generators:
            draws = [self._on_device(torch.rand, shape, g, dtype) for g in self._generators]
            return torch.stack(draws)
        kind = np.float64 if dtype == torch.float64 else np.float32
        draws = [s.random(shape, dtype=kind) for s in self._streams]
        return torch.from_numpy(np.stack(draws)).to(dtype)

    def gumbel(self, *shape: int) -> Tensor:
        """Standard Gumbel draws (runs, *shape)."""
        tiny = torch.finfo(self.dtype).tiny
        return -(-self.uniform(*shape).clamp_min(tiny).log()).clamp_min(tiny).log()

    def _on_device(self, draw, shape, generator, dtype=None) -> Tensor:
        return draw(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)
