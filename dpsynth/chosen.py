"""Chosen tables: all of them with merged levels, then those that a model still gets wrong, apart
for each label or not, asked in rounds; and the mixture that agrees with all of them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import poisson
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, fit_mixture
from dpsynth.survey import Survey

__all__ = ["Choice", "choose_tables"]

_Columns = tuple[int, ...]

# Part of the purse for coarse tables of all candidates, where not all are asked in full; and of a
# round for its scores.
_COARSE, _SCORES = 0.15, 0.05
# A table is worth asking for where it is wrong, beyond chance, by more than this part of what noise
# would do to it.
_WORTH = 0.3
# Fit between rounds.
_BETWEEN = Effort(1, 128, 150)
# E|N(0, σ²)| / σ.
_MEAN = math.sqrt(2 / math.pi)


@dataclass(frozen=True)
class Choice:
    """How tables are chosen, settled before any is seen.

    Attributes:
        tables: How many are asked for, all rounds together.
        rounds: Each scores all candidates against the model of the last one.
        effort: Of the last fit.
        joined: Whether a table may be asked for all labels together in place of apart.
    """

    tables: int
    rounds: int
    effort: Effort
    joined: bool = True

    def within(self, most: int) -> Choice:
        """The same with at most so many components."""
        return replace(self, effort=self.effort.within(most))

    @classmethod
    def planned(cls, layout: Layout, mu: float, rows: int, used: Tensor | None = None) -> Choice:
        """What suits a budget μ for `rows` rows and the levels that can occur (W,), by default all;
        public.

        The signal is what a count has against its noise when all candidates are asked: the mean
        number of rows a cell over σ = √candidates/μ. At 1 half of the candidates are asked, in
        five rounds; more of them, at last all in one round, and longer fits, the larger it is.
        Beyond 6 noise is so little that all are asked apart for each label. Constants are those of
        docs/design/quality.md.
        """
        asked = candidates(layout)
        if not asked:
            return cls(0, 1, Effort(1, 128, 150))
        counts = layout.levels
        if used is not None:
            counts = [int(block.sum()) for block in used.split(list(layout.levels))]
        cells = float(np.mean([math.prod(counts[c] for c in columns) for columns in asked]))
        signal = min(mu, 1e6) * rows / (math.sqrt(len(asked)) * cells)
        share = min(1.0, 0.5 * signal**0.5)
        effort = Effort(4, 128, 300)
        if signal > 2.5:
            effort = Effort(2, 256, 600)
        if signal > 6:
            effort = Effort(1, 512, 800)
        number = max(1, round(share * len(asked)))
        rounds = 1 if number == len(asked) else min(5, number)
        return cls(number, rounds, effort, joined=signal <= 6)


def candidates(layout: Layout) -> list[_Columns]:
    """Label × two-way tables where the target has few levels, else all two-way ones: those of a
    target of many levels too, since their first answers are noisy."""
    if anchored(layout):
        assert layout.target is not None
        others = [j for j in range(layout.columns) if j != layout.target]
        return [(layout.target, i, j) for i, j in itertools.combinations(others, 2)]
    return list(itertools.combinations(range(layout.columns), 2))


def choose_tables(survey: Survey, choice: Choice, *, device: str = "cpu") -> Mixture:
    """Ask for the tables that are worth most, and fit a mixture to them and the ones before.

    Where labels are not told apart, what was asked in one round may be asked again in a later one:
    where two columns all but decide each other, noise blurs what the model makes of their table,
    and it stays the worst there is. But nothing is mended by it beyond what the noise of its
    answers so far may have done. Elsewhere it would take from what tells labels apart.

    Args:
        survey: Answers from its whole purse.
        choice: How many and how.
        device: Where fits are computed.
    """
    layout, marginals = survey.layout, survey.marginals
    held: list[NoisyTable] = list(marginals.tables)
    left, again = candidates(layout), not anchored(layout)
    tables = min(choice.tables, len(left))
    rounds = min(choice.rounds, tables)
    if not tables:
        return fit_mixture(held, marginals, layout, survey.used, choice.effort, device=device)
    model, joined = Mixture.naive_bayes(marginals, layout), _joined(left, choice, layout)
    coarse = survey.coarse(left, survey.purse.left * _COARSE) if tables < len(left) else None
    for turn in range(rounds):
        share = survey.purse.left / (rounds - turn)
        wanted = _turn(tables, rounds, turn)
        options = left + [joined[columns] for columns in left if columns in joined]
        expected = {columns: marginals.rows * model.table(columns, layout) for columns in options}
        taken = options
        if wanted < len(options):
            scores = survey.distances(expected, share * _SCORES)
            share *= 1 - _SCORES
            sigma = survey.purse.sigma(share / wanted)
            mended = _by_asking(expected, scores, held)
            taken = _worst(expected, mended, sigma, layout)[:wanted]
        shares = _shares([expected[columns] for columns in taken], survey, share)
        held += survey.tables(taken, shares)
        if not again:
            left = [columns for columns in left if columns not in taken]
            joined = {apart: one for apart, one in joined.items() if one not in taken}
        last = turn == rounds - 1
        effort = choice.effort if last else _BETWEEN.within(choice.effort.components)
        facts = held, marginals, layout, survey.used, effort
        model = fit_mixture(*facts, coarse=coarse, device=device)
    return model


def _joined(asked: Sequence[_Columns], choice: Choice, layout: Layout) -> dict[_Columns, _Columns]:
    """Of tables of three columns, those that do not tell labels apart: half of the cells or less,
    with all the rows in them."""
    if not choice.joined:
        return {}
    return {
        columns: tuple(column for column in columns if column != layout.target)
        for columns in asked
        if len(columns) == 3
    }


def _by_asking(
    expected: Mapping[_Columns, np.ndarray], scores: Sequence[float], held: Sequence[NoisyTable]
) -> list[float]:
    """Noisy distances, at most what chance and the noise of all answers so far explain."""
    exact: dict[_Columns, float] = defaultdict(float)
    for table in held:
        exact[table.columns] += 1 / max(table.sigma, 1e-9) ** 2
    return [
        min(
            score,
            _by_chance(expected[columns]) + _blurred(expected[columns], exact[columns] ** -0.5),
        )
        if columns in exact
        else score
        for columns, score in zip(expected, scores, strict=True)
    ]


def _worst(
    expected: Mapping[_Columns, np.ndarray], scores: Sequence[float], sigma: float, layout: Layout
) -> list[_Columns]:
    """Tables by what asking would mend, most first; of two columns apart for each label or not, the
    one that would have more right. That is the one apart where there is no noise, whatever chance
    does to sparse cells."""
    right = {
        columns: score - _WORTH * _blurred(expected[columns], sigma)
        for columns, score in zip(expected, scores, strict=True)
    }
    best: dict[_Columns, _Columns] = {}
    for columns in sorted(expected, key=lambda columns: right[columns]):
        best[tuple(column for column in columns if column != layout.target)] = columns
    worth = {columns: right[columns] - _by_chance(expected[columns]) for columns in best.values()}
    return sorted(worth, key=lambda columns: -worth[columns])


def _turn(tables: int, rounds: int, turn: int) -> int:
    """Tables of one round."""
    return tables * (turn + 1) // rounds - tables * turn // rounds


def _blurred(expected: np.ndarray, sigma: float) -> float:
    """Σ over cells of what noise can move: σ·E|N(0, 1)|, but no more rows than a cell has."""
    return float(np.minimum(_MEAN * sigma, expected).sum())


def _by_chance(expected: np.ndarray) -> float:
    """Distance that a right model would have: E|X - r| of Poisson counts X from the whole rows r
    that they are compared with, summed over cells. Sparse tables have most of it."""
    whole = np.round(expected)
    below = whole * poisson.cdf(whole, expected) - expected * poisson.cdf(whole - 1, expected)
    return float((expected - whole + 2 * below).sum())


def _shares(expected: Sequence[np.ndarray], survey: Survey, share: float) -> list[float]:
    """Parts of the purse for each table, adding up to `share`: with error N_t ∝ σ_t in each,
    ΣN_t is least where 1/σ_t² ∝ N_t^(2/3)."""
    sigma = survey.purse.sigma(share / len(expected))
    size = np.array([max(_blurred(table, sigma), 1.0) for table in expected]) ** (2 / 3)
    # Together a little less, so that rounding never asks for more than is there.
    return (size / size.sum() * share * (1 - 1e-9)).tolist()
