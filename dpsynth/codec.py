"""Codec: a table of mixed columns ⟷ a matrix of level numbers, every column discrete.

Categories keep their declared levels. A number becomes one of `bins` intervals of about equal mass
or one of `heaps` values that hold far more rows than their neighbours (zeros, round numbers, caps):
on a short grid both are found in one noisy histogram of all its cells, on a long one by a noisy
histogram and a noisy tree, and one more says how round the values inside bins are. Missing is a
level of its own. The number of levels is public (it
follows from the schema and the settings), so that runs with different noise share one network
shape; levels that a run leaves empty are marked unused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from torch import Tensor

from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.leaves import FANOUT, grow_leaves
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer
from dpsynth.rounding import STRETCHES, Leaves, kept, ladder, steps_of, weights_of
from dpsynth.schema import Column, Schema
from dpsynth.simplex import onto_simplex

__all__ = ["Codec", "Layout"]

_MAX_CELLS = 2**22
_UNKNOWN_STEP_CELLS = 2**16
# Up to so many cells one noisy count a cell costs less than a tree does.
_SHORT_CELLS = 1024
# Parts of the budget of a short grid; of the heap histogram and of the tree: of a grid that is not
# exact, three spots are all that could be heaps; of round steps.
_SHORT_PARTS, _EXACT_PARTS, _LONG_PARTS, _ROUND_PARTS = 4, (8, 4), (4, 8), 1
# A node is split where its mass is so many σ: of less, its children show noise.
_CLEAR = 5.0
# A share of the rows, and a count that neighbours of a few rows do not reach by chance.
_HEAP_MASS, _HEAP_ROWS = 0.0005, 10
_HEAP_PROMINENCE = 4.0
_HEAP_WINDOW = 4
_LEAST_BIN = 0.001
# Leaves that a bin is made of where noise allows.
_PIECES = 8
_REDRAWS = 32


@dataclass(frozen=True)
class Layout:
    """Public shape of encoded rows: number of levels of each column, and where the target is."""

    levels: tuple[int, ...]
    target: int | None

    @classmethod
    def of(cls, schema: Schema, *, bins: int, heaps: int) -> Layout:
        """The layout of every codec with these settings under `schema`; reads no rows."""
        check_count("bins", bins, least=2)
        check_count("heaps", heaps, least=0)
        levels = []
        for column in schema.columns:
            count = len(column.levels)
            if column.numeric:
                count = min(Grid.of(column).cells, bins + heaps)
            levels.append(count + int(column.nullable))
        target = None if schema.target is None else schema.names.index(schema.target)
        return cls(tuple(levels), target)

    @property
    def columns(self) -> int:
        """Number of columns D."""
        return len(self.levels)

    @property
    def width(self) -> int:
        """Total number of levels W, the length of a one-hot row."""
        return sum(self.levels)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each column's block begins in a one-hot row."""
        return tuple(itertools.accumulate((0, *self.levels[:-1])))

    @property
    def groups(self) -> int:
        """Number of target levels, 1 without a target: what conditional models condition on."""
        return 1 if self.target is None else self.levels[self.target]

    def group_of(self, codes: Tensor) -> Tensor:
        """Target level of each encoded row (..., D) -> (...), 0 without a target."""
        if self.target is None:
            return torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        return codes[..., self.target]

    def one_hot(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Level numbers (..., D) -> one-hot rows (..., W)."""
        flat = torch.zeros(*codes.shape[:-1], self.width, dtype=dtype, device=codes.device)
        return flat.scatter_(-1, codes + torch.tensor(self.offsets, device=codes.device), 1.0)


@dataclass(frozen=True, eq=False)
class Grid:
    """The public cells of a numeric column.

    On an exact grid cell c is the value lower + c·step. A grid too long for that holds `per`
    neighbouring values a cell; one of unknown resolution (`per` 0) an interval of length `step`.
    A *spot* is a single value that could be a heap: every cell of an exact grid; else only 0 and
    the two bounds, where values of unknown resolution pile up.
    """

    lower: float
    upper: float
    step: float
    cells: int
    per: int
    values: int

    @classmethod
    def of(cls, column: Column) -> Grid:
        """The finest grid that the declared bounds and step allow, of at most 2^22 cells."""
        assert column.lower is not None and column.upper is not None
        span = column.upper - column.lower
        if math.isinf(span):
            raise UsageError(
                f"column {column.name!r}: bounds {column.lower:g}..{column.upper:g} are too far "
                "apart; narrow them"
            )
        if column.step is not None and span / column.step < 2**53:
            values = round(span / column.step) + 1
            per = 1 if values <= _MAX_CELLS else math.ceil(values / _UNKNOWN_STEP_CELLS)
            cells, step = values // per, column.step
        else:
            values, per, cells = 0, 0, _UNKNOWN_STEP_CELLS
            step = span / cells
        return cls(column.lower, column.upper, step, cells, per, values)

    @property
    def exact(self) -> bool:
        """Whether a cell is one value."""
        return self.per == 1

    @property
    def short(self) -> bool:
        """Whether every cell is counted by itself."""
        return self.exact and self.cells <= _SHORT_CELLS

    @property
    def points(self) -> np.ndarray:
        """Values of the spots of a grid that is not exact."""
        inner = [0.0] if self.lower < 0 < self.upper else []
        return np.array([self.lower, *inner, self.upper])

    @property
    def spots(self) -> int:
        """Number of spots."""
        return self.cells if self.exact else len(self.points)

    def spot(self, values: np.ndarray) -> np.ndarray:
        """Spot of each value, -1 where it lies on none (missing values too)."""
        if self.exact:
            return np.where(np.isnan(values), -1, self.cell(values))
        place = np.searchsorted(self.points, values).clip(max=len(self.points) - 1)
        return np.where(self.points[place] == values, place, -1)

    def at(self, spot: np.ndarray) -> np.ndarray:
        """Value of each spot."""
        return self._on_grid(spot) if self.exact else self.points[spot]

    def taken(self, heaps: np.ndarray) -> np.ndarray:
        """Cells in which there is nothing but a heap, ascending."""
        return np.sort(heaps) if self.exact else heaps[:0]

    @property
    def steps(self) -> np.ndarray:
        """Round steps that its values may be multiples of, in steps: of a long grid whose
        resolution is known."""
        return ladder(1 if self.short else self.values)

    @property
    def origin(self) -> int:
        """The whole number of steps that the lower bound is, the nearest to it."""
        number = self.lower / self.step
        return round(number) if self.per and abs(number) < 2**53 else 0

    def number(self, values: np.ndarray) -> np.ndarray:
        """Whole number of steps of each value."""
        return np.round((values - self.lower) / self.step).astype(np.int64) + self.origin

    def leaves(self, starts: np.ndarray, heaps: np.ndarray) -> Leaves:
        """Numbers of the leaves that begin at these cells, all but heaps; where the resolution is
        unknown, cells stand for them."""
        edges = self.origin + np.append(starts * max(self.per, 1), self.values or self.cells)
        taken = heaps[:0]
        if self.per:
            points = self.at(heaps)
            numbers = self.number(points)
            taken = np.sort(numbers[self._on_grid(numbers - self.origin) == points])
        return Leaves(edges, taken, self.steps)

    def cell(self, values: np.ndarray) -> np.ndarray:
        """Cell number of each value (missing values give 0)."""
        scaled = (np.nan_to_num(values, nan=self.lower) - self.lower) / self.step
        number = np.round(scaled) // self.per if self.per else np.floor(scaled)
        return np.clip(number, 0, self.cells - 1).astype(np.int64)

    def value(self, number: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The value of each whole number of steps, or one in each cell."""
        if self.per:
            return self._on_grid(number - self.origin)
        return self.lower + (number + rng.random(len(number))) * self.step

    def _on_grid(self, number: np.ndarray) -> np.ndarray:
        # Without the rounding .1 + 2·.1 would read 0.30000000000000004.
        digits = max(0, 6 - math.floor(math.log10(self.step)))
        return np.round(self.lower + number * self.step, digits)


@dataclass(frozen=True, eq=False)
class NumericCoder:
    """Bins and heaps of one number.

    Attributes:
        column: The public facts.
        bins: Bin slots.
        slots: Heap slots.
        starts: First cell of each leaf of the tree, ascending (leaves,).
        mass: Noisy share of rows in each leaf (leaves,), at least 0.
        leaf_bin: Which bin a leaf belongs to (leaves,), ascending.
        heaps: Spots that are levels of their own (at most `slots`,).
        weights: How much likelier than by an even draw values of each round step are, in each
            stretch of bins (G, S).
    """

    column: Column
    bins: int
    slots: int
    starts: np.ndarray
    mass: np.ndarray
    leaf_bin: np.ndarray
    heaps: np.ndarray
    weights: np.ndarray

    @property
    def levels(self) -> int:
        return self.bins + self.slots + int(self.column.nullable)

    @property
    def used(self) -> np.ndarray:
        mask = np.zeros(self.levels, dtype=bool)
        mask[self.leaf_bin[self._leaves.free.sum(1) > 0]] = True
        mask[self.bins : self.bins + len(self.heaps)] = True
        if self.column.nullable:
            mask[-1] = True
        return mask

    @property
    def values(self) -> np.ndarray:
        """Where each level lies: a heap's value, the mean of a bin; NaN for missing ones."""
        grid, places = Grid.of(self.column), np.full(self.levels, np.nan)
        ends = np.append(self.starts[1:], grid.cells)
        # Values of a grid are points, where its resolution is unknown an interval.
        both = (self.starts + ends) * max(grid.per, 1) - int(grid.per > 0)
        middle = grid.lower + grid.step / 2 * both
        weight = self.mass + 1e-12 * (ends - self.starts)
        held = np.bincount(self.leaf_bin, weight, minlength=self.bins)
        total = np.bincount(self.leaf_bin, weight * middle, minlength=self.bins)
        places[: self.bins] = np.divide(total, held, out=places[: self.bins], where=held > 0)
        places[self.bins : self.bins + len(self.heaps)] = grid.at(self.heaps)
        return places

    def encode(self, values: pd.Series) -> np.ndarray:
        numbers = values.to_numpy(dtype=float, na_value=np.nan)
        grid = Grid.of(self.column)
        leaf = np.searchsorted(self.starts, grid.cell(numbers), side="right") - 1
        codes = self.leaf_bin[leaf]
        if len(self.heaps):
            spot = grid.spot(numbers)
            order = np.argsort(self.heaps)
            place = np.searchsorted(self.heaps[order], spot).clip(max=len(self.heaps) - 1)
            heap = self.heaps[order][place] == spot
            codes = np.where(heap, self.bins + order[place], codes)
        return np.where(np.isnan(numbers), self.levels - 1, codes)

    def decode(self, codes: np.ndarray, rng: np.random.Generator) -> pd.Series:
        grid = Grid.of(self.column)
        missing = (codes == self.levels - 1) & self.column.nullable
        heap = (codes >= self.bins) & ~missing
        binned = ~(heap | missing)
        values = np.full(len(codes), np.nan)
        values[heap] = grid.at(self.heaps[codes[heap] - self.bins])
        values[binned] = self._value_in_bin(codes[binned], grid, rng)
        series = pd.Series(values, name=self.column.name)
        if self.column.kind == "integer":
            return series.round().astype("Int64")
        return series.clip(self.column.lower, self.column.upper)

    @property
    def _leaves(self) -> Leaves:
        return Grid.of(self.column).leaves(self.starts, self.heaps)

    def _value_in_bin(self, codes: np.ndarray, grid: Grid, rng: np.random.Generator) -> np.ndarray:
        """A value of each bin that is no heap."""
        values = grid.value(self._number_in_bin(codes, rng), rng)
        # Where the resolution is unknown, doubles may not tell values apart from a spot.
        for _ in range(0 if grid.per else _REDRAWS):
            again = np.flatnonzero(np.isin(grid.spot(values), self.heaps))
            if not len(again):
                break
            values[again] = grid.value(self._number_in_bin(codes[again], rng), rng)
        return values

    def _number_in_bin(self, codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A leaf of the bin by its noisy mass, a round step by its weight there, a free number of
        both uniformly."""
        leaves = self._leaves
        free = leaves.free
        stretch = _stretches(self.leaf_bin, len(self.weights))
        weighed, size = self.weights[stretch] * free, free.sum(1)
        held = self.mass * kept(self.weights[stretch], free)
        chosen = np.zeros(len(codes), dtype=np.int64)
        for number in np.unique(codes):
            rows = codes == number
            inside = np.flatnonzero((self.leaf_bin == number) & (size > 0))
            ways = (held[inside], self.mass[inside], size[inside])
            weight = next(way for way in ways if way.sum() > 0)
            chosen[rows] = rng.choice(inside, rows.sum(), p=weight / weight.sum())
        weighed = np.where(weighed.sum(1, keepdims=True) > 0, weighed, free)
        edges = np.cumsum(weighed, axis=1)[chosen]
        step = (rng.random(len(codes))[:, None] * edges[:, -1:] >= edges).sum(1)
        return leaves.draw(chosen, step, rng)

    def to_dict(self) -> dict[str, Any]:
        return {
            "bins": self.bins,
            "slots": self.slots,
            "starts": self.starts.tolist(),
            "mass": self.mass.tolist(),
            "leaf_bin": self.leaf_bin.tolist(),
            "heaps": self.heaps.tolist(),
            "weights": self.weights.tolist(),
        }

    @classmethod
    def from_dict(cls, column: Column, state: dict[str, Any]) -> NumericCoder:
        kinds = {"starts": np.int64, "mass": float, "leaf_bin": np.int64, "heaps": np.int64}
        arrays = {name: np.asarray(state[name], dtype=kind) for name, kind in kinds.items()}
        # Earlier codecs drew evenly.
        weights = state.get("weights", _evenly(column).tolist())
        return cls(column, state["bins"], state["slots"], **arrays, weights=np.asarray(weights))

    @classmethod
    def direct(cls, column: Column) -> NumericCoder:
        """A short grid: every cell is a level, and no row is read."""
        cells = Grid.of(column).cells
        ids, no_heaps = np.arange(cells), np.zeros(0, dtype=np.int64)
        return cls(column, cells, 0, ids, np.ones(cells), ids, no_heaps, _evenly(column))

    @staticmethod
    def questions(column: Column, heaps: int) -> list[tuple[str, int]]:
        """What `fit` asks: name of the event and parts of the budget, in order; reads no row."""
        grid = Grid.of(column)
        if grid.short:
            return [(f"cells:{column.name}", _SHORT_PARTS)]
        spots, tree = _EXACT_PARTS if grid.exact else _LONG_PARTS
        before = [(f"heaps:{column.name}", spots)] if heaps else []
        after = [(f"round:{column.name}", _ROUND_PARTS)] if len(grid.steps) > 1 else []
        return [*before, (f"bins:{column.name}", tree), *after]

    @classmethod
    def fit(
        cls,
        column: Column,
        values: pd.Series,
        measurer: Measurer,
        *,
        rows: int,
        bins: int,
        heaps: int,
        wanted: int,
    ) -> NumericCoder:
        """Find heaps on the finest grid, then bins on what is left, then how round values of these
        are; all pay the ledger.

        The `rows` that are neither on a heap nor missing, by noisy counts, are the mass of the
        leaves: what is counted in them is projected onto that sum.
        """
        seen, asked = _Seen.of(column, values), iter(cls.questions(column, heaps))

        def ask(queries: int) -> HistogramNoise:
            what, parts = next(asked)
            return measurer.histograms(what, queries, parts)

        if seen.grid.short:
            found, starts, mass, sigma = _count_cells(seen, ask, rows, heaps)
        else:
            found, starts, mass, sigma = _count_nodes(seen, ask, rows, wanted, heaps)
        leaf_bin = _merge_leaves(mass, wanted, rows * _LEAST_BIN)
        coder = cls(column, bins, heaps, starts, mass / rows, leaf_bin, found, _evenly(column))
        coder = coder._shrunk(sigma / rows)
        return coder._rounded(seen, ask(1), rows) if len(seen.grid.steps) > 1 else coder

    def _shrunk(self, sigma: np.ndarray) -> NumericCoder:
        """Masses pulled together inside a bin as far as their noise of `sigma` explains that they
        differ (leaves,). Only among leaves of equally many cells: others have no common density.
        """
        pairs = np.stack([self.leaf_bin, self._leaves.free.sum(1)], axis=1)
        group = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        return replace(self, mass=_shrink(self.mass, group, sigma))

    def _rounded(self, seen: _Seen, noise: HistogramNoise, rows: int) -> NumericCoder:
        """With weights of round steps, by one noisy histogram of the rows on no heap."""
        numbers, leaves = seen.without(self.heaps).numbers, self._leaves
        leaf = np.searchsorted(self.starts, seen.grid.cell(numbers), side="right") - 1
        groups, steps = self.weights.shape
        stretch = _stretches(self.leaf_bin, groups)
        place = stretch[leaf] * steps + steps_of(seen.grid.number(numbers), leaves.steps)
        noisy = noise(np.bincount(place, minlength=groups * steps).astype(float))
        noisy = noisy.reshape(groups, steps)
        found = weights_of(noisy, noise.sigma, self.mass * rows, leaves.free, stretch)
        return replace(self, weights=found)


def _evenly(column: Column) -> np.ndarray:
    """Weights of round steps by which values are drawn evenly."""
    return np.ones((STRETCHES, len(Grid.of(column).steps)))


def _stretches(leaf_bin: np.ndarray, number: int) -> np.ndarray:
    """Stretch of each leaf: as many bins in each, which hold about as many rows."""
    return leaf_bin * number // (leaf_bin[-1] + 1)


@dataclass(frozen=True, eq=False)
class _Seen:
    """Private rows of one number.

    Attributes:
        grid: Public cells.
        numbers: Values that are not missing.
        missing: How many are missing; `None` where the column is not nullable, or they have been
            counted already.
    """

    grid: Grid
    numbers: np.ndarray
    missing: int | None

    @classmethod
    def of(cls, column: Column, values: pd.Series) -> _Seen:
        present = values.dropna().to_numpy(dtype=float)
        missing = len(values) - len(present) if column.nullable else None
        return cls(Grid.of(column), present, missing)

    def without(self, spots: np.ndarray) -> _Seen:
        """The rows that lie on none of these spots."""
        return replace(self, numbers=self.numbers[~np.isin(self.grid.spot(self.numbers), spots)])

    def histogram(
        self, noise: HistogramNoise, place: np.ndarray, size: int
    ) -> tuple[np.ndarray, float]:
        """Noisy counts of `size` places, and of the missing rows, one cell more of the same
        histogram; 0 where none are to be counted."""
        counts = np.bincount(place, minlength=size).astype(float)
        if self.missing is None:
            return noise(counts), 0.0
        noisy = noise(np.append(counts, self.missing))
        return noisy[:-1], max(float(noisy[-1]), 0.0)


# Heaps; first cell, mass and σ of each leaf.
_Counted = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _count_cells(
    seen: _Seen, ask: Callable[[int], HistogramNoise], rows: int, heaps: int
) -> _Counted:
    """A short grid: every cell is a leaf, of one histogram."""
    noise, cells = ask(1), seen.grid.cells
    noisy, missing = seen.histogram(noise, seen.grid.cell(seen.numbers), cells)
    found = _find_heaps(noisy, noise.sigma, rows, _HEAP_WINDOW)[:heaps]
    rest = max(rows - noisy[found].sum() - missing, 1.0)
    noisy[found] = -np.inf
    mass = onto_simplex(noisy, rest)
    return found, np.arange(cells), mass, np.full(cells, noise.sigma)


def _count_nodes(
    seen: _Seen, ask: Callable[[int], HistogramNoise], rows: int, bins: int, heaps: int
) -> _Counted:
    """A long grid: a histogram of its spots, if there may be heaps, and a tree."""
    found, rest, grid = np.zeros(0, dtype=np.int64), float(rows), seen.grid
    if heaps:
        noise, spot = ask(1), grid.spot(seen.numbers)
        noisy, missing = seen.histogram(noise, spot[spot >= 0], grid.spots)
        around = _HEAP_WINDOW if grid.exact else 0
        found = _find_heaps(noisy, noise.sigma, rows, around)[:heaps]
        rest = max(rows - noisy[found].sum() - missing, 1.0)
        seen = replace(seen.without(found), missing=None)
    depth, taken = math.ceil(math.log(grid.cells, FANOUT)), grid.taken(found)
    counts = _Stretches(seen, ask(depth), rest)

    def limits() -> tuple[float, float]:
        heavy = max(counts.rest / bins, rows * _LEAST_BIN) / _PIECES
        return counts.rest, max(heavy, _CLEAR * counts.noise.sigma)

    def free(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return (last - np.searchsorted(taken, last)) - (first - np.searchsorted(taken, first))

    starts, mass, spread = grow_leaves(counts, free, grid.cells, depth, limits)
    return found, starts, mass, counts.noise.sigma * np.sqrt(spread)


class _Stretches:
    """Noisy counts of stretches of cells; the first histogram counts missing rows too, unless they
    have been.

    Attributes:
        rest: Rows that are to be found in cells, by noisy counts; known after the first histogram.
    """

    def __init__(self, seen: _Seen, noise: HistogramNoise, rest: float) -> None:
        self._seen, self._cell = seen, np.sort(seen.grid.cell(seen.numbers))
        self.noise, self.rest = noise, rest

    def __call__(self, starts: np.ndarray) -> np.ndarray:
        place = np.searchsorted(starts, self._cell, side="right") - 1
        noisy, missing = self._seen.histogram(self.noise, place, len(starts))
        self.rest = max(self.rest - missing, 1.0)
        self._seen = replace(self._seen, missing=None)
        return noisy


def _find_heaps(noisy: np.ndarray, sigma: float, rows: int, around: int) -> np.ndarray:
    """Spots far above the noise and above their `around` neighbours on each side, heaviest first.

    The noise threshold lets half a false spot through in expectation over the whole grid.
    """
    clear, least = norm.isf(0.5 / len(noisy)), max(rows * _HEAP_MASS, _HEAP_ROWS)
    spots = np.flatnonzero(noisy > max(clear * sigma, least))
    heavy = noisy[spots]
    if around:
        total = np.concatenate([[0.0], np.cumsum(noisy)])
        first = np.maximum(spots - around, 0)
        last = np.minimum(spots + around + 1, len(noisy))
        beside = last - first - 1
        usual = np.maximum((total[last] - total[first] - heavy) / beside, 0)
        # Rows that the neighbours have too count for nothing against the noise; how many a value
        # has varies by the square root, and the mean over neighbours has its share of both.
        chance = np.sqrt((sigma**2 + usual) * (1 + 1 / beside))
        enough = np.maximum(clear * chance, least)
        prominent = (heavy > _HEAP_PROMINENCE * usual) & (heavy - usual > enough)
        spots, heavy = spots[prominent], heavy[prominent]
    return spots[np.argsort(-heavy, kind="stable")]


def _shrink(mass: np.ndarray, group: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Positive-part James–Stein towards the mean of each group, whose sum stays (Efron & Morris
    1973); without noise nothing moves."""
    size = np.bincount(group)
    mean = np.bincount(group, mass) / size
    spread = np.bincount(group, (mass - mean[group]) ** 2)
    noise = (size - 1) / size * np.bincount(group, sigma**2)
    kept = 1 - np.divide(noise, spread, out=np.ones(len(size)), where=spread > noise)[group]
    return kept * mass + (1 - kept) * mean[group]


def _merge_leaves(mass: np.ndarray, bins: int, heavy: float) -> np.ndarray:
    """Bin number of each leaf: neighbours share a bin until it holds about `heavy` rows."""
    heavy = max(heavy, mass.sum() / bins)
    number, held = 0, 0.0
    assigned = np.zeros(len(mass), dtype=np.int64)
    for leaf, weight in enumerate(mass):
        if held > 0 and held + weight / 2 > heavy and number < bins - 1:
            number, held = number + 1, 0.0
        assigned[leaf] = number
        held += weight
    return assigned


@dataclass(frozen=True, eq=False)
class CategoryCoder:
    """Levels of one category as declared; reads no row."""

    column: Column

    @property
    def levels(self) -> int:
        return len(self.column.levels) + int(self.column.nullable)

    @property
    def used(self) -> np.ndarray:
        return np.ones(self.levels, dtype=bool)

    @property
    def values(self) -> np.ndarray:
        """Where each level lies: its number where they are ordered, else nowhere (NaN)."""
        places = np.full(self.levels, np.nan)
        if self.column.ordered:
            places[: len(self.column.levels)] = np.arange(len(self.column.levels))
        return places

    def encode(self, values: pd.Series) -> np.ndarray:
        codes = values.cat.codes.to_numpy().astype(np.int64)
        return np.where(codes < 0, self.levels - 1, codes)

    def decode(self, codes: np.ndarray, rng: np.random.Generator) -> pd.Series:
        del rng  # a level is one value
        number = np.where(codes < len(self.column.levels), codes, -1)
        levels = list(self.column.levels)
        dtype = pd.CategoricalDtype(levels, ordered=self.column.ordered)
        values = pd.Categorical.from_codes(number, dtype=dtype)
        return pd.Series(values, name=self.column.name)

    def to_dict(self) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, eq=False)
class Codec:
    """Coders of all columns of a schema, in order."""

    schema: Schema
    coders: tuple[NumericCoder | CategoryCoder, ...]

    @staticmethod
    def measured_columns(schema: Schema, bins: int, heaps: int) -> list[Column]:
        """The numeric columns whose grid is too long to be taken as it is."""
        return [c for c in schema.columns if c.numeric and Grid.of(c).cells > bins + heaps]

    @classmethod
    def questions(cls, schema: Schema, bins: int, heaps: int) -> list[tuple[str, int]]:
        """What `fit` asks of a table under `schema`: name of the event and parts of the budget of
        each question, in order. It is the schema's and the settings', so a plan can tell."""
        columns = cls.measured_columns(schema, bins, heaps)
        return [asked for column in columns for asked in NumericCoder.questions(column, heaps)]

    @classmethod
    def fit(
        cls,
        table: Table,
        measurer: Measurer,
        *,
        rows: int,
        bins: int = 20,
        heaps: int = 16,
        wanted: int | None = None,
    ) -> Codec:
        """Learn bins and heaps through `measurer`.

        Args:
            table: Private rows.
            measurer: Pays for and adds noise to every count; its `parts` are those of all
                `questions` together.
            rows: Public number of rows, the scale of what counts as heavy.
            bins: Bin slots a number.
            heaps: Heap slots a number.
            wanted: How many bins to make of a number, at most `bins`, which it is by default; the
                slots that are left stay empty, so that no shape hangs on it.

        Raises:
            UsageError: On too few bins or heaps, or more wanted than there are slots.
        """
        check_count("bins", bins, least=2)
        wanted = bins if wanted is None else wanted
        if not 2 <= wanted <= bins:
            raise UsageError(f"wanted={wanted}: must be between 2 and bins={bins}")
        check_count("heaps", heaps, least=0)
        measured = {c.name for c in cls.measured_columns(table.schema, bins, heaps)}
        coders: list[NumericCoder | CategoryCoder] = []
        for column in table.schema.columns:
            if not column.numeric:
                coders.append(CategoryCoder(column))
            elif column.name not in measured:
                coders.append(NumericCoder.direct(column))
            else:
                values = table.frame[column.name]
                slots = {"bins": bins, "heaps": heaps, "wanted": wanted}
                coders.append(NumericCoder.fit(column, values, measurer, rows=rows, **slots))
        return cls(table.schema, tuple(coders))

    @property
    def layout(self) -> Layout:
        """Public shape of encoded rows."""
        target = self.schema.target
        place = None if target is None else self.schema.names.index(target)
        return Layout(tuple(coder.levels for coder in self.coders), place)

    @property
    def used(self) -> Tensor:
        """Which of the W levels can occur at all (W,)."""
        return torch.from_numpy(np.concatenate([coder.used for coder in self.coders]))

    @property
    def values(self) -> Tensor:
        """Where each of the W levels lies in its column's order, NaN where it has no place (W,)."""
        return torch.from_numpy(np.concatenate([coder.values for coder in self.coders]))

    def encode(self, table: Table) -> Tensor:
        """Rows as level numbers (rows, D), int64."""
        columns = [coder.encode(table.frame[coder.column.name]) for coder in self.coders]
        return torch.from_numpy(np.stack(columns, axis=1))

    def decode(self, codes: Tensor, rng: np.random.Generator) -> Table:
        """Level numbers (rows, D) as a table; numbers are drawn inside their bins."""
        matrix = codes.cpu().numpy()
        columns = [c.decode(matrix[:, j], rng) for j, c in enumerate(self.coders)]
        return Table(self.schema, pd.concat(columns, axis=1))

    def code_of(self, name: str, value: object) -> int:
        """Level number of one value of a column, as `encode` gives it."""
        coder = self.coders[self.schema.names.index(name)]
        missing = value is None or value is pd.NA or value != value
        if coder.column.nullable and missing:
            return coder.levels - 1
        frame = pd.DataFrame({name: [value]})
        one = Table.from_frame(frame, self.schema.select([name]))
        return int(coder.encode(one.frame[name])[0])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready state, without the schema."""
        return {"format": 1, "columns": {c.column.name: c.to_dict() for c in self.coders}}

    @classmethod
    def from_dict(cls, schema: Schema, state: dict[str, Any]) -> Codec:
        """Inverse of `to_dict`."""
        coders = [
            NumericCoder.from_dict(column, state["columns"][column.name])
            if column.numeric
            else CategoryCoder(column)
            for column in schema.columns
        ]
        return cls(schema, tuple(coders))
