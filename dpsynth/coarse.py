"""Coarse tables: levels merged into a few groups, so that a cell has many rows for its noise.

Detail of a table costs noise in each of its cells. Merged to four by four groups the same table
says how two columns go together on the whole, which is most of what a model of little data can
keep, for a small part of the budget; so all of them are asked, and fine ones only where they are
worth it. (Hierarchical answers to range queries: Hay, Rastogi, Miklau & Suciu 2010; here in two
dimensions and of two depths.)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable

__all__ = ["PARTS", "Coarse", "groups_of", "merged"]

# Groups of a column.
PARTS = 4


@dataclass(frozen=True, eq=False)
class Coarse:
    """Noisy tables of merged levels.

    Attributes:
        groups: The group of each level, one array a column.
        tables: Their counts have `PARTS` groups an axis, but for the target's of three columns,
            whose levels stay apart.
    """

    groups: tuple[np.ndarray, ...]
    tables: tuple[NoisyTable, ...]


def groups_of(marginals: Marginals, layout: Layout, used: Tensor) -> tuple[np.ndarray, ...]:
    """Groups of about equal mass, by noisy tables alone: neighbours in a column's order, or where
    most levels have no place in one, levels with which the target's last level is about as likely.

    Args:
        marginals: Noisy label × column tables.
        layout: Public shape.
        used: Levels that can occur (W,).
    """
    ends = np.cumsum([0, *layout.levels])
    joint = (marginals.given * marginals.prior[:, None]).numpy()
    values, occurs = marginals.values.numpy(), used.numpy()
    found = []
    for first, end in itertools.pairwise(ends.tolist()):
        mass, inside = joint[:, first:end], occurs[first:end]
        order = values[first:end]
        if np.isnan(order[inside]).sum() * 2 > inside.sum():
            order = mass[-1] / mass.sum(0).clip(1e-12)
        found.append(_cut(np.where(inside, order, np.inf), mass.sum(0) * inside, inside))
    return tuple(found)


def _cut(order: np.ndarray, mass: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Groups of levels by the middle of each level's mass in that order; few levels stay apart."""
    if inside.sum() <= PARTS:
        return np.clip(inside.cumsum() - 1, 0, PARTS - 1)
    ranked = np.argsort(order, kind="stable")
    share = mass[ranked] / max(mass.sum(), 1e-12)
    group = np.empty(len(order), dtype=np.int64)
    group[ranked] = (PARTS * (share.cumsum() - share / 2)).astype(np.int64).clip(0, PARTS - 1)
    return group


def merged(counts: np.ndarray, columns: Sequence[int], groups: Sequence[np.ndarray]) -> np.ndarray:
    """Counts of a table by groups of its last two columns."""
    for axis, column in ((-1, columns[-1]), (-2, columns[-2])):
        moved = np.moveaxis(counts, axis, 0)
        whole = np.zeros((PARTS, *moved.shape[1:]), dtype=counts.dtype)
        np.add.at(whole, groups[column], moved)
        counts = np.moveaxis(whole, 0, axis)
    return counts
