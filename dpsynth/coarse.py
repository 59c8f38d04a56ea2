"""Coarse tables: levels merged into a few groups, so that a cell has many rows for its noise.

Detail of a table costs noise in each of its cells. Merged to four by four groups the same table
says how two columns go together on the whole, which is most of what a model of little data can
keep, for a small part of the budget; so all of them are asked, and fine ones only where they are
worth it. (Hierarchical answers to range queries: Hay, Rastogi, Miklau & Suciu 2010; here in two
dimensions and of two depths.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable

__all__ = ["PARTS", "Coarse", "Groups"]

# Groups of a column.
PARTS = 4


@dataclass(frozen=True, eq=False)
class Groups:
    """Which levels count as one.

    Attributes:
        of: The group of each level, one array a column.
        layout: Shape of rows whose levels are groups.
    """

    of: tuple[np.ndarray, ...]
    layout: Layout

    @classmethod
    def found(
        cls, marginals: Marginals, layout: Layout, used: Tensor, *, apart: bool = False
    ) -> Groups:
        """Groups of about equal mass, by noisy tables alone: neighbours in a column's order, or
        where most levels have no place in one, levels with which the target's last level is about
        as likely.

        Args:
            marginals: Noisy label × column tables.
            layout: Public shape.
            used: Levels that can occur (W,).
            apart: Whether each level of the target is a group of its own.
        """
        ends = np.cumsum([0, *layout.levels])
        joint = (marginals.given * marginals.prior[:, None]).numpy()
        values, occurs = marginals.values.numpy(), used.numpy()
        kept = layout.target if apart else None
        found = []
        for column, (first, end) in enumerate(itertools.pairwise(ends.tolist())):
            mass, inside = joint[:, first:end], occurs[first:end]
            order = values[first:end]
            if np.isnan(order[inside]).sum() * 2 > inside.sum():
                order = mass[-1] / mass.sum(0).clip(1e-12)
            cut = _cut(np.where(inside, order, np.inf), mass.sum(0) * inside, inside)
            found.append(np.arange(end - first) if column == kept else cut)
        sizes = [PARTS] * layout.columns
        if kept is not None:
            sizes[kept] = layout.levels[kept]
        return cls(tuple(found), Layout(tuple(sizes), layout.target))

    @property
    def places(self) -> np.ndarray:
        """Where each level's group lies in a row of groups side by side (W,)."""
        pairs = zip(self.layout.offsets, self.of, strict=True)
        return np.concatenate([first + group for first, group in pairs])


@dataclass(frozen=True, eq=False)
class Coarse:
    """Noisy tables of groups.

    Attributes:
        groups: Of levels.
        pairs: Tables of two columns, apart for each label where components belong to labels.
        triples: The same of three columns.
    """

    groups: Groups
    pairs: tuple[NoisyTable, ...] = ()
    triples: tuple[NoisyTable, ...] = ()


def _cut(order: np.ndarray, mass: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Groups of levels by the middle of each level's mass in that order; few levels stay apart."""
    if inside.sum() <= PARTS:
        return np.clip(inside.cumsum() - 1, 0, PARTS - 1)
    ranked = np.argsort(order, kind="stable")
    share = mass[ranked] / max(mass.sum(), 1e-12)
    group = np.empty(len(order), dtype=np.int64)
    group[ranked] = (PARTS * (share.cumsum() - share / 2)).astype(np.int64).clip(0, PARTS - 1)
    return group
