"""Slow and plain versions of what the library computes fast; they share no code with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

__all__ = [
    "by_bisection",
    "chi_square",
    "record_gradients",
    "sum_clipped",
    "total_variation",
]


def record_gradients(
    losses: Callable[[], Tensor], parameters: Sequence[nn.Parameter]
) -> list[list[list[Tensor]]]:
    """Gradient of each record of each run, one at a time: [run][record][parameter], own run only.

    Also insists that a record of one run moves no other run's parameters.
    """
    loss = losses()
    runs, records = loss.shape
    found = []
    for r in range(runs):
        rows = []
        for i in range(records):
            whole = torch.autograd.grad(
                loss[r, i], parameters, retain_graph=True, allow_unused=True
            )
            parts = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, whole, strict=True)
            ]
            others = [torch.cat([g[:r], g[r + 1 :]]) for g in parts]
            assert all((other == 0).all() for other in others)
            rows.append([g[r] for g in parts])
        found.append(rows)
    return found


def sum_clipped(
    gradients: Sequence[Sequence[Sequence[Tensor]]], bounds: Sequence[float], counts: Tensor
) -> list[Tensor]:
    """Σ_i g_i · min(1, C / (‖g_i‖ + 10⁻⁶)) over the records that count, a run at a time.

    The 10⁻⁶ is the one that DP-SGD libraries add to a norm; it only ever clips a little more.
    """
    sums = []
    for place in range(len(gradients[0][0])):
        runs = []
        for r, rows in enumerate(gradients):
            total = torch.zeros_like(rows[0][place])
            for i, row in enumerate(rows):
                norm = float(torch.cat([g.flatten() for g in row]).norm())
                if counts[r, i]:
                    total = total + row[place] * min(1.0, bounds[r] / (norm + 1e-6))
            runs.append(total)
        sums.append(torch.stack(runs))
    return sums


def by_bisection(counts: np.ndarray, total: float) -> np.ndarray:
    """Nearest point to `counts` with no negative entry and sum `total`: the shift by halving."""
    low, high = counts.min() - total, counts.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(counts - middle, 0).sum() > total:
            low = middle
        else:
            high = middle
    return np.maximum(counts - high, 0)


def chi_square(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of counts under `probabilities`; cells with fewer than 5 expected are pooled."""
    expected = np.asarray(probabilities, dtype=float) * observed.sum()
    assert (observed[expected == 0] == 0).all(), "something impossible was observed"
    thick = expected >= 5
    seen, hoped = list(observed[thick]), list(expected[thick])
    if expected[~thick].sum() >= 1:
        seen.append(observed[~thick].sum())
        hoped.append(expected[~thick].sum())
    if len(seen) == 1:
        return 1.0
    hoped = np.array(hoped) * (sum(seen) / sum(hoped))
    return float(stats.chisquare(seen, hoped).pvalue)


def total_variation(observed: np.ndarray, probabilities: np.ndarray) -> float:
    """Half the L1 distance of the shares of `observed` from `probabilities`."""
    return float(np.abs(observed / observed.sum() - probabilities).sum() / 2)
