"""Reconciliation while sampling: what is drawn meets the noisy tables, and spreads evenly."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["corrected", "evenly_within"]

_SWEEPS = 15


def corrected(
    logits: Float[Tensor, "rows levels"],
    start: Float[Tensor, "rows levels"],
    group: Int[Tensor, " rows"],
) -> Float[Tensor, "rows levels"]:
    """Logits shifted by one vector a group, so that in each the mean of the probabilities is that
    of the logits `start`, which follow the tables: iterative proportional fitting of one column.

    Nothing is reweighted, so no row is lost to it; rows that differ go on to differ.
    """
    rows = torch.bincount(group).clamp_min(1)[:, None]
    zero = logits.new_zeros(len(rows), logits.shape[1])
    wanted = zero.index_add(0, group, start.softmax(-1)) / rows
    shift = torch.zeros_like(wanted)
    for _ in range(_SWEEPS):
        share = (logits + shift[group]).softmax(-1)
        mean = zero.index_add(0, group, share) / rows
        shift += (wanted.clamp_min(1e-8) / mean.clamp_min(1e-8)).log().clamp(-3, 3)
    return logits + shift[group]


def evenly_within(
    part: Int[Tensor, " rows"], draws: Float[Tensor, "rows columns"]
) -> Float[Tensor, "rows columns"]:
    """Draws of which each is uniform, and in each column those of one part are spread evenly: a
    Latin hypercube sample in every part (McKay, Beckman & Conover 1979).

    Where rows of a part have one distribution, its levels then come as often as they are due but
    for less than one row.

    Args:
        part: Which rows belong together.
        draws: Independent uniform draws.
    """
    count = torch.bincount(part)
    first = (count.cumsum(0) - count)[part, None]
    # Ranks by (part, draw): sorting draws first and then, stably, parts.
    order = draws.argsort(0)
    order = order.gather(0, part[order].argsort(dim=0, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(0, order, torch.arange(len(part), device=part.device)[:, None].expand_as(order))
    # Within its slot a row keeps a fresh draw: the digits of its own that the rank does not use.
    return ((rank - first) + (draws * 4096) % 1) / count[part, None]
