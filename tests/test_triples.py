"""Triples: few enough to be told apart by noise, chosen by what they mend, paid for once."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import ROWS, apart, columns_of, every, marginals_of, summed
from test_survey import FREE, purse_of, survey_of
from torch import Tensor

from dpsynth.chosen import Choice, choose_tables
from dpsynth.coarse import PARTS, Coarse, Groups
from dpsynth.codec import Layout
from dpsynth.marginals import NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, fit_mixture
from dpsynth.survey import Survey
from dpsynth.triples import _numbers, _tied, _worthwhile, ask_triples, columns_for
from dpsynth.worth import blurred, by_chance

PARITY = Layout((2, 2, 2, 2, 3, 3), target=0)
SHAPES = pytest.mark.parametrize(
    "layout",
    [PARITY, Layout((2, 2, 2, 3, 3), None), Layout((2, 2, 2, 10, 3), 3)],
    ids=["label", "none", "many"],
)


def odd(rows: int, layout: Layout, seed: int = 0) -> Tensor:
    """Independent columns, but that the first is the parity of others: of the next three where it
    is the label, else of the next two."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, layout.levels, (rows, layout.columns))
    codes[:, 0] = codes[:, 1 : 4 if anchored(layout) else 3].sum(1) % 2
    return torch.from_numpy(codes)


def wanted(layout: Layout) -> tuple[int, ...]:
    return (0, 1, 2, 3) if anchored(layout) else (0, 1, 2)


def start_of(survey: Survey) -> tuple[Mixture, Groups]:
    groups = Groups.found(
        survey.marginals, survey.layout, survey.used, apart=anchored(survey.layout)
    )
    return Mixture.naive_bayes(survey.marginals, survey.layout), groups


# How many may be looked at


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.floats(0.01, 5), st.integers(200, 30_000), st.booleans())
def test_distances_of_all_that_are_looked_at_say_something(
    columns: int, mu: float, rows: int, labelled: bool
) -> None:
    """Their noise is 3 % of the rows at most, and would be more with one column more."""
    layout = Layout((2,) * columns, target=0)
    survey = survey_of([torch.zeros(rows, columns, dtype=torch.long)], purse_of(mu), layout)
    number = columns_for(survey, 0.1, apart=labelled)

    def fits(number: int) -> bool:
        tables = math.comb(number, 3)
        noise = math.sqrt(tables / (0.1 * 0.2)) / mu
        return tables <= 10_000 and noise <= 0.03 * survey.marginals.rows

    most = columns - labelled
    assert 0 <= number <= most and number not in (1, 2)
    assert number == 0 or fits(number)
    assert number == most or most < 3 or not fits(max(number + 1, 3))


def test_without_noise_as_many_are_looked_at_as_time_allows() -> None:
    for columns, due in ((9, 9), (39, 39), (40, 40), (50, 40)):
        layout = Layout((2,) * columns, target=None)
        survey = survey_of([torch.zeros(5, columns, dtype=torch.long)], purse_of(FREE), layout)
        assert columns_for(survey, 0.1, apart=False) == due


def test_columns_that_hang_on_others_are_looked_at_first() -> None:
    """Of the model's own tables: 1, 3 and 4 repeat each other; 5 follows the label alone."""
    layout, rng = Layout((2, 4, 4, 4, 4, 2), target=0), np.random.default_rng(0)
    codes = rng.integers(0, layout.levels, (400, 6))
    codes[:, 3] = codes[:, 4] = codes[:, 1]
    codes[:, 5] = codes[:, 0]
    rows = torch.from_numpy(codes)
    model = Mixture(torch.full((400,), 1 / 400).double(), layout.one_hot(rows, torch.double))
    survey = survey_of([rows], purse_of(FREE), layout)
    groups = start_of(survey)[1]
    merged = model.merged(groups)
    assert _tied(merged, groups, 3, (0,)) == [1, 3, 4]
    assert _tied(merged, groups, 4, (0,)) == [1, 3, 4, 5]
    assert _tied(merged, groups, 5, (0,)) == [1, 2, 3, 4, 5]


# Which are asked


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000), st.floats(0, 60))
def test_what_is_asked_mends_more_than_any_other_number_of_tables(
    tables: int, seed: int, sigma: float
) -> None:
    """Against all subsets: distance beyond chance, less .3 of what noise moves, whose variance
    grows with the number of tables."""
    rng = np.random.default_rng(seed)
    expected = {(j,): rng.gamma(1.0, 20.0, rng.integers(1, 9)) for j in range(tables)}
    scores = rng.normal(60, 60, tables).tolist()

    def noise(number: int) -> float:
        return sigma * math.sqrt(number)

    def worth(some: tuple[tuple[int, ...], ...]) -> float:
        return sum(
            scores[c[0]] - by_chance(expected[c]) - 0.3 * blurred(expected[c], noise(len(some)))
            for c in some
        )

    subsets = [
        some for number in range(1, tables + 1) for some in itertools.combinations(expected, number)
    ]
    found = tuple(_worthwhile(expected, scores, noise))
    assert len(set(found)) == len(found) > 0
    assert worth(found) == pytest.approx(max(map(worth, subsets)))


def test_all_numbers_are_tried_while_they_are_few() -> None:
    assert _numbers(1) == [1]
    assert _numbers(6) == [1, 2, 3, 4, 5, 6]
    found = _numbers(200)
    assert found[-1] == 200 and found == sorted(set(found))
    assert max(b / a for a, b in itertools.pairwise(found[5:])) <= 1.25


@SHAPES
@pytest.mark.parametrize("mu", [0.3, 2.0, FREE])
def test_what_three_columns_make_together_is_asked_for(layout: Layout, mu: float) -> None:
    """And nothing is spent but the share: distances, and one sum of histograms."""
    codes = odd(4000, layout)
    survey = survey_of([codes], purse_of(mu), layout)
    model, groups = start_of(survey)
    found = ask_triples(survey, model, groups, 0.4, apart=anchored(layout))
    assert survey.purse.left == pytest.approx(0.6)
    asked = [table.columns for table in found]
    assert asked[0] == wanted(layout)
    assert len(asked) == len(set(asked))
    for table in found:
        assert table.counts.shape[-3:] == (PARTS,) * 3
        due = 0.0 if mu == FREE else math.sqrt(len(found) / (0.4 * 0.8)) / mu
        assert table.sigma == pytest.approx(due)


# What a model makes of them


def law_of(layout: Layout) -> np.ndarray:
    """Probability of each row of `odd`."""
    law = np.zeros(layout.levels)
    for place in np.ndindex(*layout.levels):
        law[place] = place[0] == sum(place[1 : 4 if anchored(layout) else 3]) % 2
    return law / law.sum()


@SHAPES
def test_a_fit_meets_triples_that_no_pair_shows(layout: Layout) -> None:
    """All of its pairs are independent, whatever is asked of them."""
    law = law_of(layout)
    start = marginals_of(law, layout)
    groups = Groups.found(start, layout, every(layout), apart=anchored(layout))
    known = [NoisyTable(c, ROWS * summed(law, c), 0.0) for c in columns_of(layout)]
    columns = wanted(layout)
    shape = [groups.layout.levels[c] for c in columns]
    counts = np.zeros(shape)
    counts[tuple(slice(0, layout.levels[c]) for c in columns)] = ROWS * summed(law, columns)
    triples = (NoisyTable(columns, counts, 0.0),)
    gaps = []
    for more in (None, Coarse(groups, triples=triples)):
        found = fit_mixture(known, start, layout, every(layout), Effort(2, 48, 500), coarse=more)
        gaps.append(apart(found.table(columns, layout), summed(law, columns)))
    assert gaps[1] < 0.02 < 0.4 < gaps[0]


def test_what_is_surer_counts_for_more() -> None:
    """Two answers that contradict each other: a fit goes with the one of less noise."""
    layout = PARITY
    law = law_of(layout)
    flat = np.full(layout.levels, 1 / law.size)
    start = marginals_of(law, layout)
    groups = Groups.found(start, layout, every(layout), apart=True)
    near = []
    for sure, unsure in ((law, flat), (flat, law)):
        triples = []
        for kind, columns, sigma in ((sure, (0, 1, 2, 3), 20.0), (unsure, (0, 3, 2, 1), 2000.0)):
            counts = np.zeros((2, *[PARTS] * 3))
            counts[:, :2, :2, :2] = ROWS * summed(kind, columns)
            triples.append(NoisyTable(columns, counts, sigma))
        coarse = Coarse(groups, triples=tuple(triples))
        found = fit_mixture([], start, layout, every(layout), Effort(1, 32, 400), coarse=coarse)
        near.append(apart(found.table((0, 1, 2, 3), layout), summed(sure, (0, 1, 2, 3))))
    assert max(near) < 0.05


@pytest.mark.parametrize("mu", [0.5, FREE])
def test_chosen_tables_learn_a_parity_by_their_triples_alone(mu: float) -> None:
    codes = odd(6000, PARITY)
    right = {}
    for part in (0.0, 0.15):
        choice = Choice(4, 2, Effort(1, 48, 600), triples=part)
        found = choose_tables(survey_of([codes], purse_of(mu), PARITY), choice)
        law = found.table((0, 1, 2, 3), PARITY)
        right[part] = sum(law[p] for p in np.ndindex(*law.shape) if p[0] == sum(p[1:]) % 2)
    assert abs(right[0.0] - 0.5) < 0.05
    assert right[0.15] > 0.9


def test_where_noise_would_hide_distances_nothing_is_kept_back_for_triples() -> None:
    codes = odd(300, PARITY)
    purse = purse_of(0.05)
    survey = survey_of([codes], purse, PARITY)
    assert columns_for(survey, 0.15, apart=True) == 0
    choose_tables(survey, Choice(3, 2, Effort(1, 16, 20)))
    assert purse.left < 1e-6
