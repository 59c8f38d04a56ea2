"""Chosen tables: all of them with merged levels, then those that a model still gets wrong, apart
for each label or not, asked in rounds, then some of three columns with merged levels; and the
mixture that agrees with all of them."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from dpsynth.coarse import Coarse, Groups
from dpsynth.codec import Layout
from dpsynth.leading import Answers, Leading, ask_leading
from dpsynth.marginals import NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, classed, fit_mixture
from dpsynth.survey import Survey
from dpsynth.triples import ask_triples, columns_for
from dpsynth.worth import WORTH, blurred, by_chance

__all__ = ["Choice", "choose_tables"]

_Columns = tuple[int, ...]

# Part of the purse for coarse tables of all candidates, where not all are asked in full; and of a
# round for its scores.
_COARSE, _SCORES = 0.15, 0.05
# Fit between rounds.
_BETWEEN = Effort(1, 128, 150)


@dataclass(frozen=True)
class Choice:
    """How tables are chosen, settled before any is seen.

    Attributes:
        tables: How many are asked for, all rounds together.
        rounds: Each scores all candidates against the model of the last one.
        effort: Of the last fit.
        joined: Whether a table may be asked for all labels together in place of apart.
        triples: Part of the purse for coarse tables of three columns.
    """

    tables: int
    rounds: int
    effort: Effort
    joined: bool = True
    triples: float = 0.1

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
    answers so far may have done. Elsewhere it would take from what tells labels apart. Of a target
    of many levels the table of the column that says most of it comes first, beside all others.

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
    groups = Groups.found(marginals, layout, survey.used, apart=not again)
    # What triples will cost stays behind.
    deep = choice.triples * survey.purse.left
    deep = deep if deep and columns_for(survey, deep, apart=not again) else 0.0
    pairs: list[NoisyTable] = []
    if tables < len(left):
        pairs = survey.merged(left, (survey.purse.left - deep) * _COARSE, groups)
    coarse = Coarse(groups, tuple(pairs))
    leads = None
    if again and classed(layout):
        leads = ask_leading(survey, survey.purse.left - deep)
        held += leads.alone[1:]
    model, joined = Mixture.naive_bayes(marginals, layout), _joined(left, choice, layout)
    for turn in range(rounds):
        share = (survey.purse.left - deep) / (rounds - turn)
        wanted = _turn(tables, rounds, turn)
        options = left + [joined[columns] for columns in left if columns in joined]
        expected = {columns: marginals.rows * model.table(columns, layout) for columns in options}
        new = _asked(survey, expected, held, wanted, share)
        taken = [table.columns for table in new]
        held += new
        if not again:
            left = [columns for columns in left if columns not in taken]
            joined = {apart: one for apart, one in joined.items() if one not in taken}
        last = turn == rounds - 1 and not deep
        effort = choice.effort if last else _BETWEEN.within(choice.effort.components)
        facts = held, marginals, layout, survey.used, effort
        model = fit_mixture(*facts, coarse=coarse, device=device)
    if deep:
        triples = ask_triples(survey, model, groups, survey.purse.left, apart=not again)
        facts = held, marginals, layout, survey.used, choice.effort
        model = fit_mixture(*facts, coarse=replace(coarse, triples=triples), device=device)
    return model if leads is None else replace(model, leading=_led(leads, model, survey))


def _led(leads: Answers, model: Mixture, survey: Survey) -> Leading | None:
    """What leads, in the counts that the mixture expects."""
    asked = [leads.alone[0].columns]
    if leads.both is not None:
        asked.append(leads.both.columns[1:])
    rows, layout = survey.marginals.rows, survey.layout
    return leads.found({columns: rows * model.table(columns, layout) for columns in asked})


def _asked(
    survey: Survey,
    expected: Mapping[_Columns, np.ndarray],
    held: Sequence[NoisyTable],
    wanted: int,
    share: float,
) -> list[NoisyTable]:
    """Answers of one round: so many tables that a model expects other counts of."""
    taken = list(expected)
    if wanted < len(taken):
        scores = survey.distances(expected, share * _SCORES)
        share *= 1 - _SCORES
        sigma = survey.purse.sigma(share / wanted)
        mended = _by_asking(expected, scores, held)
        taken = _worst(expected, mended, sigma, survey.layout)[:wanted]
    return survey.tables(taken, _shares([expected[columns] for columns in taken], survey, share))


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
    exact: dict[frozenset[int], float] = defaultdict(float)
    for table in held:
        exact[frozenset(table.columns)] += 1 / max(table.sigma, 1e-9) ** 2
    found = []
    for (columns, table), score in zip(expected.items(), scores, strict=True):
        known = exact.get(frozenset(columns))
        if known is not None:
            score = min(score, by_chance(table) + blurred(table, known**-0.5))
        found.append(score)
    return found


def _worst(
    expected: Mapping[_Columns, np.ndarray], scores: Sequence[float], sigma: float, layout: Layout
) -> list[_Columns]:
    """Tables by what asking would mend, most first; of two columns apart for each label or not, the
    one that would have more right. That is the one apart where there is no noise, whatever chance
    does to sparse cells."""
    right = {
        columns: score - WORTH * blurred(expected[columns], sigma)
        for columns, score in zip(expected, scores, strict=True)
    }
    best: dict[_Columns, _Columns] = {}
    for columns in sorted(expected, key=lambda columns: right[columns]):
        best[tuple(column for column in columns if column != layout.target)] = columns
    worth = {columns: right[columns] - by_chance(expected[columns]) for columns in best.values()}
    return sorted(worth, key=lambda columns: -worth[columns])


def _turn(tables: int, rounds: int, turn: int) -> int:
    """Tables of one round."""
    return tables * (turn + 1) // rounds - tables * turn // rounds


def _shares(expected: Sequence[np.ndarray], survey: Survey, share: float) -> list[float]:
    """Parts of the purse for each table, adding up to `share`: with error N_t ∝ σ_t in each,
    ΣN_t is least where 1/σ_t² ∝ N_t^(2/3)."""
    sigma = survey.purse.sigma(share / len(expected))
    size = np.array([max(blurred(table, sigma), 1.0) for table in expected]) ** (2 / 3)
    # Together a little less, so that rounding never asks for more than is there.
    return (size / size.sum() * share * (1 - 1e-9)).tolist()
