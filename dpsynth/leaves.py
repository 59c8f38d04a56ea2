"""Leaves: the cells of a long grid in stretches of about equal mass, by a tree of histograms.

Every histogram counts all rows in the leaves there are by then, so a leaf that is split late, or
never, is counted again and again; counts of leaves and of what they were split from are made
consistent by their variances, as far as no mass is negative (Hay et al. 2010, with leaves of
unequal depth).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dpsynth.simplex import onto_simplex

__all__ = ["FANOUT", "grow_leaves"]

# Children of a node.
FANOUT = 4


def grow_leaves(
    count: Callable[[np.ndarray], np.ndarray],
    free: Callable[[np.ndarray, np.ndarray], np.ndarray],
    cells: int,
    histograms: int,
    limits: Callable[[], tuple[float, float]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First cell, mass and relative variance of each leaf (leaves,).

    Args:
        count: Noisy counts of the stretches that begin at these cells, ascending, and end where the
            next begins; one histogram.
        free: Of stretches from a first to a last cell, how many cells may hold rows; those with
            none get no mass.
        cells: Of the grid; each is reached by `histograms` splits.
        histograms: How often `count` is asked.
        limits: Known after the first count: all mass together, and the mass from which a leaf is
            split.

    Returns:
        Variances are relative to that of one count.
    """
    tree = _Tree(cells, FANOUT ** (histograms - 1), free)
    tree.ask(count)
    for _ in range(histograms - 1):
        total, heavy = limits()
        mass = tree.masses(total)
        tree.split(np.flatnonzero(tree.leaf & (mass > heavy) & (tree.width > 1)))
        tree.ask(count)
    mass, order = tree.masses(limits()[0]), np.flatnonzero(tree.leaf)
    order = order[np.argsort(tree.start[order])]
    return tree.start[order], mass[order], 1 / np.maximum(tree.times[order], 1)


class _Tree:
    """Nodes in the order in which they came to be; those of a root that is no node come first."""

    def __init__(
        self, cells: int, width: int, free: Callable[[np.ndarray, np.ndarray], np.ndarray]
    ) -> None:
        self.cells, self._free = cells, free
        self.start = np.zeros(0, dtype=np.int64)
        self.width = np.zeros(0, dtype=np.int64)
        self.sums, self.times = np.zeros(0), np.zeros(0)
        self.leaf, self.empty = np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)
        # Of each round of splits: nodes (m,), -1 for the root, and their children (m, F), -1 where
        # there are no cells.
        self.families: list[tuple[np.ndarray, np.ndarray]] = []
        self._children(np.array([-1]), np.zeros(1, dtype=np.int64), np.array([width]))

    def _children(self, parents: np.ndarray, start: np.ndarray, width: np.ndarray) -> None:
        """Children of `width` cells each for nodes that begin at `start`."""
        first = start[:, None] + width[:, None] * np.arange(FANOUT)
        inside = first < self.cells
        ids = np.full(first.shape, -1)
        ids[inside] = len(self.start) + np.arange(inside.sum())
        self.families.append((parents, ids))
        begun, wide = first[inside], np.broadcast_to(width[:, None], first.shape)[inside]
        self.start = np.append(self.start, begun)
        self.width = np.append(self.width, wide)
        fresh = np.zeros(len(begun))
        self.sums, self.times = np.append(self.sums, fresh), np.append(self.times, fresh)
        self.leaf = np.append(self.leaf, np.ones(len(begun), dtype=bool))
        room = self._free(begun, np.minimum(begun + wide, self.cells))
        self.empty = np.append(self.empty, room == 0)

    def split(self, nodes: np.ndarray) -> None:
        if len(nodes):
            self.leaf[nodes] = False
            self._children(nodes, self.start[nodes], self.width[nodes] // FANOUT)

    def ask(self, count: Callable[[np.ndarray], np.ndarray]) -> None:
        """One histogram of the leaves that may hold rows."""
        some = np.flatnonzero(self.leaf & ~self.empty)
        some = some[np.argsort(self.start[some])]
        self.sums[some] += count(self.start[some])
        self.times[some] += 1

    def masses(self, total: float) -> np.ndarray:
        """Mass of every node: least squares, weighed by variances, among those that add up to
        `total` and to their nodes; none below 0."""
        value = np.divide(self.sums, self.times, out=np.zeros_like(self.sums), where=self.times > 0)
        variance = np.divide(1.0, self.times, out=np.zeros_like(value), where=self.times > 0)
        # Upwards: what a node's own counts and those of its children say of it.
        for nodes, children in self.families[:0:-1]:
            some = children >= 0
            above, spread = (np.where(some, v[children], 0).sum(1) for v in (value, variance))
            own = variance[nodes]
            value[nodes] = (value[nodes] * spread + above * own) / (own + spread)
            variance[nodes] = own * spread / (own + spread)
        # Downwards: each shares what it has.
        mass = np.zeros_like(value)
        for nodes, children in self.families:
            some = (children >= 0) & ~self.empty[children]
            totals = np.where(nodes < 0, total, mass[nodes])
            shared = onto_simplex(
                np.where(some, value[children], -np.inf),
                totals,
                np.where(some, variance[children], 1.0),
            )
            mass[children[some]] = shared[some]
        return mass
