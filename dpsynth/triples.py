"""Triples: coarse tables of three columns, where a model of all pairs is still wrong.

No table of two columns, for each label or not, shows what hangs on three at once. Of groups of
levels a table of three columns has few cells, so that noise leaves of it what matters; which of
the many are worth asking for, noisy distances say.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dpsynth.coarse import Groups
from dpsynth.marginals import NoisyTable
from dpsynth.mixture import Mixture
from dpsynth.survey import Survey
from dpsynth.worth import WORTH, blurred, by_chance

__all__ = ["ask_triples", "columns_for"]

_Columns = tuple[int, ...]

# Part of the share that goes on distances, and the most noise in them, as a part of all rows.
_SCORES, _BLUNT = 0.2, 0.03
# Most tables that are looked at, and asked for.
_SEEN, _MOST = 10_000, 200


def columns_for(survey: Survey, share: float, *, apart: bool) -> int:
    """Of how many columns triples may be asked, so that noise leaves of their distances what they
    are chosen by; 0 where no three would.

    Args:
        survey: Would answer.
        share: Part of the purse.
        apart: Whether tables tell the target's levels apart, which then is none of the columns.
    """
    most = _BLUNT * survey.marginals.rows
    for number in range(survey.layout.columns - apart, 2, -1):
        tables = math.comb(number, 3)
        if tables <= _SEEN and survey.purse.sigma(share * _SCORES, tables) <= most:
            return number
    return 0


def ask_triples(
    survey: Survey, model: Mixture, groups: Groups, share: float, *, apart: bool
) -> tuple[NoisyTable, ...]:
    """As many tables as are worth their noise, at least one.

    Args:
        survey: Answers from its purse.
        model: What is known so far.
        groups: Of levels.
        share: Part of the purse, for which `columns_for` is not 0.
        apart: Whether tables tell the target's levels apart.
    """
    layout, rows, merged = groups.layout, survey.marginals.rows, model.merged(groups)
    head = () if layout.target is None or not apart else (layout.target,)
    columns = _tied(merged, groups, columns_for(survey, share, apart=apart), head)
    expected = {
        (*head, *some): rows * merged.table((*head, *some), layout)
        for some in itertools.combinations(columns, 3)
    }
    scores = survey.distances(expected, share * _SCORES, groups)
    # A little less, so that rounding never asks for more than is there.
    left = share * (1 - _SCORES) * (1 - 1e-9)
    taken = _worthwhile(expected, scores, lambda number: survey.purse.sigma(left, number))
    return tuple(survey.merged(taken, left, groups))


def _tied(model: Mixture, groups: Groups, number: int, but: _Columns) -> list[int]:
    """So many columns, in their order: those that hang most on the others by the model (mean
    square contingency)."""
    joint = (model.levels.T @ (model.weight[:, None] * model.levels)).numpy()
    alone = (model.weight @ model.levels).numpy()
    expected = np.outer(alone, alone).clip(1e-12)
    starts = groups.layout.offsets
    cells = (joint - expected) ** 2 / expected
    tied = np.add.reduceat(np.add.reduceat(cells, starts, axis=0), starts, axis=1)
    np.fill_diagonal(tied, 0.0)
    order = [column for column in np.argsort(-tied.sum(0)).tolist() if column not in but]
    return sorted(order[:number])


def _worthwhile(
    expected: Mapping[_Columns, np.ndarray],
    scores: Sequence[float],
    sigma: Callable[[int], float],
) -> list[_Columns]:
    """The tables that mend most together: each is wrong by its distance beyond chance, and the more
    are asked, the more noise spoils each."""
    options = list(expected)
    wrong = np.array(scores) - [by_chance(table) for table in expected.values()]
    best, taken = -math.inf, options[:1]
    for number in _numbers(min(_MOST, len(options))):
        spoilt = [WORTH * blurred(table, sigma(number)) for table in expected.values()]
        worth = wrong - spoilt
        order = np.argsort(-worth, kind="stable")[:number]
        if worth[order].sum() > best:
            best, taken = worth[order].sum(), [options[place] for place in order]
    return taken


def _numbers(most: int) -> list[int]:
    """1 to `most`, by ever larger steps."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(1.2 * found[-1]))))
    return found
