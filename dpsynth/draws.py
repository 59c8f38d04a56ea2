"""RecordRng: the draws of a piece of a batch, each run for its own records alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpsynth.randomness import FleetRng

__all__ = ["RecordRng"]


class RecordRng(FleetRng):
    """Opened streams whose first axis is a piece's records, padded to the longest run.

    What a run draws follows from its own records only: a wider piece, because another run of the
    fleet has more, changes none of its draws. Padding is 0.

    Args:
        rng: Keys of the runs.
        purpose: What is drawn for.
        step: At which step.
        records: Records of each run in this piece (R,), which come first.
        width: Records of the piece, padding included.
    """

    def __init__(
        self, rng: FleetRng, purpose: str, step: int, records: Sequence[int], width: int
    ) -> None:
        super().__init__(rng.keys, device=rng.device, dtype=rng.dtype, secure=rng.secure)
        self._records, self._width = tuple(records), width
        self._runs = [
            FleetRng([key], device="cpu", dtype=rng.dtype, secure=rng.secure).at(purpose, step)
            for key in rng.keys
        ]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal draws (runs, *shape); the first of `shape` is a multiple of the width."""
        return self._padded("normal", shape, dtype or self.dtype)

    def uniform(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uniform draws in [0, 1) (runs, *shape)."""
        return self._padded("uniform", shape, dtype or self.dtype)

    def _padded(self, law: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        each = shape[0] // self._width
        drawn = torch.zeros(self.runs, *shape, dtype=dtype)
        for run, (records, opened) in enumerate(zip(self._records, self._runs, strict=True)):
            rows = records * each
            if rows:
                drawn[run, :rows] = getattr(opened, law)(rows, *shape[1:], dtype=dtype)[0]
        return drawn.to(self.device)
