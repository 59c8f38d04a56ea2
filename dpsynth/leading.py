"""Leading: the column, or two of them, that all but decide a target of many levels.

Where a target's levels are stretches of a number, as deciles are, the table of that one column says
nearly all there is to know of it, and where they are stretches apart for each level of another, as
deciles by region are, the table of both. So the first is asked once more, and for the second each
other column is looked at: whether the target hangs on it where the leading column is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.simplex import onto_simplex
from dpsynth.survey import Survey
from dpsynth.worth import blurred, by_chance, contingency

__all__ = ["Answers", "Leading", "ask_leading", "cells_of"]

_Columns = tuple[int, ...]

# Parts of the purse: for the table of the column that leads, for the choice of one beside it, and
# for the table of both.
_LEADING, _CHOICE, _BOTH = 0.05, 0.02, 0.15
# Part of all rows that the table of both must have right beyond those of either.
_LEAST = 0.01
# What a table must have right for each row that its noise can move.
_WORTH = 0.05
# Most cells of a table with the target.
_CELLS = 1 << 18
# Rows of a cell that there are usually none of.
_LITTLE = 0.02


@dataclass(frozen=True, eq=False)
class Leading:
    """The target given the columns that lead.

    Attributes:
        columns: One or two.
        logits: Log-probability of each level of the target in each cell of these columns, the last
            column's levels fastest (groups, cells).
    """

    columns: _Columns
    logits: Tensor

    def scores(self, codes: Tensor, layout: Layout) -> Tensor:
        """Log-probabilities of encoded rows (rows, D) -> (rows, groups)."""
        cell = torch.zeros(len(codes), dtype=torch.long)
        for column in self.columns:
            cell = cell * layout.levels[column] + codes[:, column].long()
        return self.logits.T[cell]


def cells_of(layout: Layout) -> int:
    """Most cells that the leading columns can have."""
    assert layout.target is not None
    alone = [layout.levels[j] for j in range(layout.columns) if j != layout.target]
    both = [a * b for i, a in enumerate(alone) for b in alone[:i]]
    return max([*alone, *(cells for cells in both if layout.groups * cells <= _CELLS)])


@dataclass(frozen=True, eq=False)
class Answers:
    """Noisy tables of the target and what leads.

    Attributes:
        alone: Of the column that leads, one or several that say the same.
        both: With a second column, the target first, if one was found.
    """

    alone: tuple[NoisyTable, ...]
    both: NoisyTable | None = None

    @classmethod
    def measured(cls, tables: Sequence[NoisyTable], prior: Tensor) -> Answers:
        """That of largest contingency.

        Args:
            tables: Of the target and one column each.
            prior: The target's shares (groups,).
        """

        def strength(table: NoisyTable) -> float:
            counts = torch.from_numpy(table.counts)
            expected = prior[:, None] * counts.sum(0).clamp_min(0)
            return contingency(counts, expected, table.sigma)

        return cls((max(tables, key=strength),))

    @classmethod
    def settled(cls, marginals: Marginals, layout: Layout) -> Answers:
        """The same of tables that have been made distributions."""
        assert layout.target is not None
        blocks = marginals.given.split(list(layout.levels), dim=1)
        counts = [(marginals.rows * marginals.prior[:, None] * block).numpy() for block in blocks]
        sigma = marginals.rows * marginals.noise
        tables = [NoisyTable((layout.target, j), table, sigma) for j, table in enumerate(counts)]
        return cls.measured(tables[: layout.target] + tables[layout.target + 1 :], marginals.prior)

    @property
    def column(self) -> int:
        """The one that leads."""
        return self.alone[0].columns[-1]

    def counted(self) -> tuple[np.ndarray, float]:
        """Counts by target level and level of the column that leads, and their σ."""
        weights = np.array([1 / max(table.sigma, 1e-9) ** 2 for table in self.alone])
        counts = np.stack([table.counts for table in self.alone])
        return np.tensordot(weights / weights.sum(), counts, 1), float(weights.sum() ** -0.5)

    def found(self, expected: Mapping[_Columns, np.ndarray]) -> Leading | None:
        """What they say of the target; `None` where noise is more than what the first shows.

        Args:
            expected: Counts that a model expects of the first table, and of the second without its
                target. Tables are drawn to it as far as noise explains how far they are from it.
        """
        alone, sigma = self.counted()
        if not _tells(alone, sigma):
            return None
        columns = self.alone[0].columns
        usual = expected[columns]
        # Levels that a model has no rows of have the shares of the whole.
        usual = usual + _LITTLE * usual.sum(1, keepdims=True) / usual.sum()
        given = _given(usual, _normal(usual), alone, sigma)
        if self.both is None:
            return Leading(columns[1:], _logits(given))
        columns = self.both.columns[1:]
        wider = np.broadcast_to(given[:, :, None], self.both.counts.shape)
        given = _given(wider * expected[columns], wider, self.both.counts, self.both.sigma)
        return Leading(columns, _logits(given))


def ask_leading(survey: Survey, purse: float) -> Answers:
    """Ask for the tables of what leads.

    Args:
        survey: Answers.
        purse: Part of its purse that shares are of; not all is spent.
    """
    marginals = survey.marginals
    known = Answers.measured(marginals.tables, marginals.prior).alone[0]
    again = survey.tables([known.columns], [purse * _LEADING])
    found = Answers((known, *again))
    expected = _independent(survey, found)
    if not expected:
        return found
    alone, sigma = found.counted()
    # What noise in the first table moves, it moves in each.
    spoilt, sigma = blurred(_settled(alone), sigma), survey.purse.sigma(purse * _BOTH)
    penalties = [
        by_chance(table) - by_chance(table.sum(0)) + spoilt + _WORTH * blurred(table, sigma)
        for table in expected.values()
    ]
    least = _LEAST * marginals.rows
    both = survey.interacting(expected, purse * _CHOICE, penalties=penalties, least=least)
    if both is None:
        return found
    return Answers(found.alone, survey.tables([both], [purse * _BOTH])[0])


def _independent(survey: Survey, found: Answers) -> dict[_Columns, np.ndarray]:
    """Counts of the target, the column that leads, and each other one, where the target hangs on
    the first alone: the two columns are as naive Bayes has them."""
    layout, marginals = survey.layout, survey.marginals
    assert layout.target is not None
    counts = _settled(found.counted()[0])
    given = _normal(counts + _LITTLE)[:, :, None]
    blocks = marginals.given.split(list(layout.levels), dim=1)
    table = {}
    for column in range(layout.columns):
        cells = layout.groups * layout.levels[found.column] * layout.levels[column]
        if column not in (layout.target, found.column) and cells <= _CELLS:
            joint = counts.T @ blocks[column].numpy()
            table[layout.target, found.column, column] = given * joint
    return table


def _settled(counts: np.ndarray) -> np.ndarray:
    """Noisy counts as counts, none below 0, with the same totals of the target's levels."""
    return onto_simplex(counts, np.maximum(counts.sum(1), 1.0))


def _tells(counts: np.ndarray, sigma: float) -> bool:
    """Whether a table shows more of the target than noise adds to it."""
    settled = _settled(counts)
    usual = np.outer(settled.sum(1), settled.sum(0)) / settled.sum()
    table, expected = torch.from_numpy(counts), torch.from_numpy(usual)
    noise = -contingency(expected, expected, sigma)
    return contingency(table, expected, sigma) > noise


def _logits(given: np.ndarray) -> Tensor:
    return torch.from_numpy(given.reshape(len(given), -1)).clamp_min(1e-9).log()


def _given(usual: np.ndarray, share: np.ndarray, counts: np.ndarray, sigma: float) -> np.ndarray:
    """Shares of the target's levels in each cell, by its counts, which are usually `usual`."""
    return _normal(_drawn_to(usual, counts, sigma) + _LITTLE * share)


def _normal(counts: np.ndarray) -> np.ndarray:
    """Shares of the target's levels, the first axis."""
    return counts / counts.sum(0).clip(1e-300)


def _drawn_to(usual: np.ndarray, counts: np.ndarray, sigma: float) -> np.ndarray:
    """Noisy counts drawn to what is usual as far as noise explains how far they are from it: counts
    are N(m, τm) around their means m, with τ by the squares that are left, less what these vary by
    chance."""
    weight = (usual / (usual + sigma + 1e-9)) ** 2
    gap = counts - usual
    left = (weight * (gap**2 - sigma**2)).sum() - sigma**2 * np.sqrt(2 * (weight**2).sum())
    own = max(left / max((weight * usual).sum(), 1e-300), 0.0) * usual
    return np.maximum(usual + gap * own / (own + sigma**2 + 1e-12), 0.0)
