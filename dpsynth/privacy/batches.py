"""Poisson batches: every record enters every step independently with probability q."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from dpsynth.checks import UsageError, check_count
from dpsynth.randomness import FleetRng

__all__ = ["PoissonBatches"]


@final
class PoissonBatches:
    """Exact Bernoulli(q) inclusion for R runs by geometric gaps, in static shapes.

    What a plan of Poisson sampling is accounted for; it must not be made into another sampler.

    The gap to the next included record is geometric: ⌊ln u / ln(1−q)⌋ + 1. A draw longer than the
    buffer goes on in a further piece; none is cut short.

    Args:
        rows: Records of each run (R,).
        q: Sampling probability of each run (R,), in (0, 1].
        piece: Largest buffer, in records; bounds memory, never the law.
    """

    def __init__(self, rows: Sequence[int], q: Sequence[float], *, piece: int = 1024) -> None:
        check_count("piece", piece)
        if len(rows) != len(q) or not rows:
            raise UsageError(f"rows={len(rows)} and q={len(q)}: give one of each a run")
        for probability in q:
            if not 0 < probability <= 1:
                raise UsageError(f"q={probability}: must be in (0, 1]")
        self.q = tuple(q)
        self.rows = torch.tensor(list(rows), dtype=torch.float64)
        self.log_miss = torch.tensor([_log_miss(p) for p in q], dtype=torch.float64)
        batch = max(n * p for n, p in zip(rows, q, strict=True))
        self.capacity = max(1, min(piece, math.ceil(batch + 4 * math.sqrt(batch)), max(rows)))

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of one step's batch: positions (runs, capacity) and which of them count.

        Positions that do not count are 0. An empty batch is one piece where none counts.
        """
        last = torch.full((len(self.rows), 1), -1.0, dtype=torch.float64)
        opened = rng.at("poisson", step)
        while True:
            uniform = opened.uniform(self.capacity, dtype=torch.float64).cpu()
            # 1 - u lies in (0, 1], so the logarithm is finite.
            gaps = torch.floor(torch.log1p(-uniform) / self.log_miss[:, None]) + 1
            index = last + gaps.cumsum(1)
            inside = index < self.rows[:, None]
            yield torch.where(inside, index, 0).long(), inside
            last = index[:, -1:]
            if not (last < self.rows[:, None] - 1).any():
                return


def _log_miss(q: float) -> float:
    return -math.inf if q == 1 else math.log1p(-q)
