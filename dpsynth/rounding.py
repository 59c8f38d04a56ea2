"""Round numbers: how many rows lie on multiples of 5, 10, 50, … where a grid has finer values.

People round what they report, and a bin whose values are drawn evenly has none of it. So one noisy
histogram of a long grid counts, for a few stretches of it, the largest round step that divides each
value; what it says more than an even draw weighs values inside their bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["STRETCHES", "Leaves", "ladder", "steps_of", "weights_of"]

# Stretches of a column that have weights of their own, of about as many rows each: larger numbers
# are rounder.
STRETCHES = 3
# Multiples that a step must have on the grid.
_MULTIPLES = 8
# A count is clear of another at so many σ.
_CLEAR = 4.0
# Weight of its numbers, on average, from which on a leaf keeps all its rows.
_KEPT = 0.5
_PASSES = 50


def ladder(values: int) -> np.ndarray:
    """Round steps 1, 5, 10, 50, … of a grid of so many values, each a divisor of the next."""
    steps = [1]
    while values >= _MULTIPLES * (following := steps[-1] * (5 if len(steps) % 2 else 2)):
        steps.append(following)
    return np.array(steps, dtype=np.int64)


def steps_of(numbers: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Place on the ladder of the largest step that divides each whole number."""
    place = np.zeros(len(numbers), dtype=np.int64)
    for step in steps[1:]:
        place += numbers % step == 0
    return place


@dataclass(frozen=True, eq=False)
class Leaves:
    """Stretches of whole numbers, and which numbers of them are free.

    Attributes:
        edges: First number of each leaf, and the one after the last (leaves + 1,).
        taken: Numbers that belong to no leaf, ascending.
        steps: The ladder (S,).
    """

    edges: np.ndarray
    taken: np.ndarray
    steps: np.ndarray

    @property
    def free(self) -> np.ndarray:
        """Free numbers of each leaf by their largest step (leaves, S)."""
        ranks = [self._rank(self.edges, place) for place in range(len(self.steps))]
        return np.diff(np.stack(ranks, axis=1), axis=0)

    def draw(self, leaf: np.ndarray, step: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A free number of each leaf (rows,), uniform among those whose largest step is in place
        `step` (rows,); there must be one."""
        drawn, inside = np.empty(len(leaf), dtype=np.int64), rng.random(len(leaf))
        for place in np.unique(step):
            rows = step == place
            ranks, gone = self._rank(self.edges, place), self._taken(place)
            size = np.diff(ranks)[leaf[rows]]
            rank = ranks[leaf[rows]] + np.floor(inside[rows] * size).astype(np.int64)
            rank += np.searchsorted(gone - np.arange(len(gone)), rank, side="right")
            drawn[rows] = self._number(rank, place)
        return drawn

    def _rank(self, numbers: np.ndarray, place: int) -> np.ndarray:
        """How many free numbers of a step lie below each number, up to a constant."""
        rank = self._below(numbers, place)
        return rank - np.searchsorted(self._taken(place), rank)

    def _taken(self, place: int) -> np.ndarray:
        """Ranks among all numbers of a step of the taken ones, ascending."""
        return self._below(self.taken[steps_of(self.taken, self.steps) == place], place)

    def _below(self, numbers: np.ndarray, place: int) -> np.ndarray:
        """How many numbers of a step lie below each number, counted from 0."""
        multiples = -(-numbers // self.steps[place])
        if place == len(self.steps) - 1:
            return multiples
        return multiples + -numbers // self.steps[place + 1]

    def _number(self, rank: np.ndarray, place: int) -> np.ndarray:
        """The number of a step below which there are `rank` others of it."""
        if place == len(self.steps) - 1:
            return rank * self.steps[place]
        others = self.steps[place + 1] // self.steps[place] - 1
        return (rank + rank // others + 1) * self.steps[place]


def kept(weights: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Part of its mass that each leaf keeps: all, but of a narrow one between two round numbers,
    where next to all rows lie on these (leaves,).

    Args:
        weights: Of the steps in each leaf (leaves, S).
        free: Free numbers of each leaf by step (leaves, S).
    """
    size = np.maximum(free.sum(1), 1)
    return np.minimum((weights * free).sum(1) / size / _KEPT, 1.0)


def weights_of(
    noisy: np.ndarray, sigma: float, mass: np.ndarray, free: np.ndarray, stretch: np.ndarray
) -> np.ndarray:
    """How much likelier than by an even draw a number of each step is, in each stretch (G, S).

    Steps are too fine as long as next to no row lies on the finest of them. Counts that noise could
    have made of those of an even draw from there on are these; then, in each stretch, those that it
    could have made of what all stretches together say.

    Args:
        noisy: Rows by stretch and step, N(0, σ²) added (G, S).
        sigma: σ.
        mass: Rows of each leaf (leaves,).
        free: Free numbers of each leaf by step (leaves, S).
        stretch: Stretch of each leaf (leaves,).
    """
    groups, steps = noisy.shape
    if steps == 1:
        return np.ones((groups, 1))
    everywhere, total = np.zeros_like(stretch), np.bincount(stretch, mass, minlength=groups)
    together, spread = noisy.sum(0)[None], sigma * groups**0.5
    even, finest = np.ones((1, steps)), 0
    expected = _drawn(even, mass, free, everywhere)
    while finest < steps - 1 and _none(together[0, finest], expected[0, finest], spread):
        even[0, finest] = 0.0
        expected, finest = _drawn(even, mass, free, everywhere), finest + 1
    wanted = _cleared(together, expected, spread, total.sum()[None])
    shared = _fitted(wanted, mass, free, everywhere).repeat(groups, axis=0)
    expected = _drawn(shared, mass, free, stretch)
    return _fitted(_cleared(noisy, expected, sigma, total), mass, free, stretch)


def _drawn(
    weights: np.ndarray, mass: np.ndarray, free: np.ndarray, stretch: np.ndarray
) -> np.ndarray:
    """Rows by stretch and step that weights lead to (G, S)."""
    weighed = weights[stretch] * free
    held = mass * kept(weights[stretch], free)
    share = held / np.maximum(weighed.sum(1), 1e-300)
    rows = np.zeros_like(weights)
    np.add.at(rows, stretch, share[:, None] * weighed)
    wanted = np.bincount(stretch, mass, minlength=len(weights))
    return rows * (wanted / np.maximum(rows.sum(1), 1e-300))[:, None]


def _none(noisy: float, expected: float, sigma: float) -> bool:
    """Whether noise explains all of a count, and not how far from the expected one it is."""
    return noisy <= _CLEAR * sigma < expected - noisy


def _cleared(
    noisy: np.ndarray, expected: np.ndarray, sigma: float, total: np.ndarray
) -> np.ndarray:
    """Counts of at least 0 that add up to `total` (G,). Noisy ones where noise does not explain how
    far from those expected they are, or none where it explains all of them; what they leave is
    shared among the others as expected (G, S)."""
    clear = (np.abs(noisy - expected) > _CLEAR * sigma) & (expected > 0)
    counts = np.where(clear & (noisy > _CLEAR * sigma), noisy, 0.0)
    rest = np.where(clear, 0.0, expected)
    left = np.maximum(total - counts.sum(1), 0.0)
    counts += rest * (left / np.maximum(rest.sum(1), 1e-300))[:, None]
    return counts * (total / np.maximum(counts.sum(1), 1e-300))[:, None]


def _fitted(
    wanted: np.ndarray, mass: np.ndarray, free: np.ndarray, stretch: np.ndarray
) -> np.ndarray:
    """Weights that lead to the wanted rows (G, S), by iterative proportional fitting; an even draw
    of all leaves together weighs 1."""
    weights = np.ones_like(wanted)
    even = _drawn(weights, mass, free, stretch)
    scale = np.maximum(even.sum(1, keepdims=True), 1e-300)
    for _ in range(_PASSES):
        made = _drawn(weights, mass, free, stretch)
        weights = weights * np.divide(wanted, made, out=np.zeros_like(made), where=made > 0)
        weights /= np.maximum((weights * even).sum(1, keepdims=True) / scale, 1e-300)
    weights[~(weights > 0).any(1)] = 1.0
    return weights
