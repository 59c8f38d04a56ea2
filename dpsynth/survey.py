"""Survey: what may be asked of private rows once label × column tables are known, out of one
purse; whoever asks sees noisy answers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.coarse import Groups
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.privacy.mechanisms import Purse

__all__ = ["Survey"]

_Columns = tuple[int, ...]


class Survey:
    """Noisy tables of any columns, and how far given tables are from the true ones.

    Attributes:
        layout: Public shape of encoded rows.
        used: Levels that can occur (W,).
        marginals: Label × column tables, measured before.
        purse: The budget; shares are parts of it.
    """

    def __init__(
        self,
        pieces: Sequence[Tensor],
        layout: Layout,
        used: Tensor,
        marginals: Marginals,
        purse: Purse,
    ) -> None:
        self._pieces = [piece.numpy() for piece in pieces]
        self.layout, self.used, self.marginals, self.purse = layout, used, marginals, purse
        # Exact, so it must never leave this class; a model that asks round by round counts once.
        self._known: dict[_Columns, np.ndarray] = {}

    def tables(self, asked: Sequence[_Columns], shares: Sequence[float]) -> list[NoisyTable]:
        """Count and add noise: one table for each of `asked`, each for its share of the purse.

        Raises:
            UsageError: On columns that do not exist or repeat, or when the purse is too small.
        """
        noises = [self.purse.histograms(share) for share in shares]
        counted = self._count(asked)
        return [
            NoisyTable(columns, noise(counts), noise.sigma)
            for columns, noise, counts in zip(asked, noises, counted, strict=True)
        ]

    def merged(self, asked: Sequence[_Columns], share: float, groups: Groups) -> list[NoisyTable]:
        """Tables of groups of levels, each one histogram, for one share of the purse together.

        Args:
            asked: Columns of each table.
            share: Part of the purse.
            groups: Of all columns.
        """
        noise = self.purse.histograms(share, queries=len(asked))
        counted = self._count(asked, groups)
        return [
            NoisyTable(columns, noise(counts), noise.sigma)
            for columns, counts in zip(asked, counted, strict=True)
        ]

    def distances(
        self,
        expected: Mapping[_Columns, np.ndarray],
        share: float,
        groups: Groups | None = None,
    ) -> list[float]:
        """Noisy Σ|count - expected| of each table, for one share of the purse together.

        A table is rounded to whole rows first, so a distance is a whole number that one row more or
        less changes by 1: `len(expected)` of them have L2 sensitivity √len(expected).

        Args:
            expected: Expected counts by columns, in the shape of `tables`.
            share: Part of the purse.
            groups: Where they are counts of groups of levels.
        """
        noise = self.purse.histograms(share, queries=len(expected))
        counted = self._count(list(expected), groups)
        found = [
            np.abs(counts - np.round(wanted)).sum()
            for counts, wanted in zip(counted, expected.values(), strict=True)
        ]
        return [float(noise(np.array([distance]))[0]) for distance in found]

    def farthest(
        self,
        expected: Mapping[_Columns, np.ndarray],
        share: float,
        *,
        weights: Sequence[float] | None = None,
        penalties: Sequence[float] | None = None,
    ) -> _Columns:
        """One table that is far from what is expected of it, by the exponential mechanism.

        Its score is weight·(Σ|count - expected| - penalty), which one row more or less changes by
        the weight at most.

        Args:
            expected: Expected counts by columns.
            share: Part of the purse.
            weights: Positive, one a table; by default 1.
            penalties: One a table; by default 0.
        """
        asked = list(expected)
        new = [columns for columns in asked if columns not in self._known]
        self._known.update(zip(new, self._count(new), strict=True))
        heavy = np.ones(len(asked)) if weights is None else np.asarray(weights, dtype=float)
        less = np.zeros(len(asked)) if penalties is None else np.asarray(penalties, dtype=float)
        gaps = [np.abs(self._known[columns] - expected[columns]).sum() for columns in asked]
        scores = heavy * (np.array(gaps) - less)
        return asked[self.purse.choose(scores, share, float(heavy.max()))]

    def interacting(
        self,
        expected: Mapping[_Columns, np.ndarray],
        share: float,
        *,
        penalties: Sequence[float],
        least: float,
    ) -> _Columns | None:
        """One table of three columns that is farther from what is expected of it than it is without
        its first column, by the exponential mechanism; `None` where none is by so much.

        Its score is Σ|count - expected| of its cells, less the same of its last two columns, less
        its penalty, which one row more or less changes by 2 at most; that of none is `least`.

        Args:
            expected: Expected counts by columns.
            share: Part of the purse.
            penalties: One a table.
            least: Rows.
        """
        gaps = [
            np.abs(counts - wanted).sum() - np.abs((counts - wanted).sum(0)).sum()
            for counts, wanted in zip(self._count(list(expected)), expected.values(), strict=True)
        ]
        scores = np.append(np.array(gaps) - np.asarray(penalties), least)
        return [*expected, None][self.purse.choose(scores, share, 2.0)]

    def _count(self, asked: Sequence[_Columns], groups: Groups | None = None) -> list[np.ndarray]:
        """Exact counts, piece by piece: rows may lie on disk."""
        levels = self.layout.levels if groups is None else groups.layout.levels
        for columns in asked:
            known = all(0 <= c < len(levels) for c in columns)
            if not known or not columns or len(set(columns)) < len(columns):
                raise UsageError(f"columns={columns}: must be different columns of {len(levels)}")
        shapes = [tuple(levels[c] for c in columns) for columns in asked]
        counted = [np.zeros(int(np.prod(shape))) for shape in shapes]
        for piece in self._pieces:
            own = {c: piece[:, c].astype(np.int64) for c in {c for cs in asked for c in cs}}
            if groups is not None:
                own = {c: groups.of[c][codes] for c, codes in own.items()}
            for columns, shape, counts in zip(asked, shapes, counted, strict=True):
                cell = np.zeros(len(piece), dtype=np.int64)
                for column, size in zip(columns, shape, strict=True):
                    cell = cell * size + own[column]
                counts += np.bincount(cell, minlength=len(counts))
        return [counts.reshape(shape) for counts, shape in zip(counted, shapes, strict=True)]
