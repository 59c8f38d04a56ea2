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
    """Exact Bernoulli(q) inclusion for R runs by geometric gaps; no pass over all rows.

    What a plan of Poisson sampling is accounted for; it must not be made into another sampler.

    The gap to the next included record is geometric: ⌊ln u / ln(1−q)⌋ + 1. A batch longer than a
    piece goes on in a further one; none is cut short.

    Args:
        rows: Records of each run (R,).
        q: Sampling probability of each run (R,), in (0, 1].
        piece: Most records of a run at a time; bounds memory, never the law.
    """

    def __init__(self, rows: Sequence[int], q: Sequence[float], *, piece: int = 1024) -> None:
        check_count("piece", piece)
        if len(rows) != len(q) or not rows:
            raise UsageError(f"rows={len(rows)} and q={len(q)}: give one of each a run")
        for probability in q:
            if not 0 < probability <= 1:
                raise UsageError(f"q={probability}: must be in (0, 1]")
        self.q, self.piece = tuple(q), piece
        self.rows = torch.tensor(list(rows), dtype=torch.float64)
        self.log_miss = torch.tensor([_log_miss(p) for p in q], dtype=torch.float64)
        batch = max(n * p for n, p in zip(rows, q, strict=True))
        # Gaps that are drawn at a time.
        self.capacity = max(1, min(piece, math.ceil(batch + 4 * math.sqrt(batch)), max(rows)))

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of one step's batch: positions and which of them count, both (runs, width) with
        width ≤ piece.

        A run's k-th record is the (k mod piece)-th of piece ⌊k/piece⌋, whoever trains beside it.
        Positions that do not count are 0. An empty batch is one piece where none counts.
        """
        opened = rng.at("poisson", step)
        held = torch.empty(len(self.rows), 0, dtype=torch.float64)
        last = torch.full((len(self.rows), 1), -1.0, dtype=torch.float64)
        done = begun = False
        while True:
            while not done and held.shape[1] < self.piece:
                index = last + self._gaps(opened).cumsum(1)
                held, last = torch.cat([held, index], 1), index[:, -1:]
                done = bool((last >= self.rows[:, None] - 1).all())
            part, held = held[:, : self.piece], held[:, self.piece :]
            inside = part < self.rows[:, None]
            width = int(inside.sum(1).max())
            if width == 0 and begun:
                return
            begun = True
            part, inside = part[:, : max(width, 1)], inside[:, : max(width, 1)]
            yield torch.where(inside, part, 0).long(), inside
            if width < self.piece:
                return

    def _gaps(self, opened: FleetRng) -> Tensor:
        """Steps from one included record to the next (runs, capacity)."""
        uniform = opened.uniform(self.capacity, dtype=torch.float64).cpu()
        # 1 - u lies in (0, 1], so the logarithm is finite.
        return torch.floor(torch.log1p(-uniform) / self.log_miss[:, None]) + 1


def _log_miss(q: float) -> float:
    return -math.inf if q == 1 else math.log1p(-q)
