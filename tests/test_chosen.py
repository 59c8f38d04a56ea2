"""Chosen tables: what is asked follows from noisy answers, and goes where the structure is."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_survey import FREE, Counting, counted, survey_of
from torch import Tensor

from dpsynth.chosen import Choice, candidates, choose_tables
from dpsynth.coarse import Groups
from dpsynth.codec import Codec, Layout
from dpsynth.datasets import simulated
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, classed
from dpsynth.models import Vae
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import stream
from dpsynth.survey import Survey
from dpsynth.triples import columns_for
from dpsynth.worth import by_chance

QUICK = Effort(1, 16, 40)
LAYOUT = Layout((3, 4, 2, 5), target=2)
MANY = Layout((3, 10, 4, 2), target=1)
NO_TARGET = Layout((3, 4, 2, 5), target=None)


# What may be asked, and how much of it


@pytest.mark.parametrize(
    ("layout", "due"),
    [
        (LAYOUT, [(2, 0, 1), (2, 0, 3), (2, 1, 3)]),
        (NO_TARGET, list(itertools.combinations(range(4), 2))),
        (MANY, list(itertools.combinations(range(4), 2))),
        (Layout((3, 9), target=1), [(0, 1)]),
        (Layout((3, 9, 4), target=2), [(2, 0, 1)]),
        (Layout((3, 2), target=1), []),
        (Layout((3,), target=0), []),
        (Layout((3,), target=None), []),
    ],
)
def test_candidates_are_pairs_with_the_label_where_it_has_few_levels(
    layout: Layout, due: list[tuple[int, ...]]
) -> None:
    assert candidates(layout) == due


ADULT = Layout((20, 9, 16, 7, 14, 6, 5, 2, 20, 20, 20, 42, 36, 2), target=13)


@settings(max_examples=100)
@given(st.floats(1e-3, 100), st.floats(1e-3, 100), st.integers(100, 10**7))
def test_a_larger_signal_asks_for_more_tables_in_fewer_rounds_and_fits_longer(
    first: float, second: float, rows: int
) -> None:
    low, high = (Choice.planned(ADULT, mu, rows) for mu in sorted((first, second)))
    assert 1 <= low.tables <= high.tables <= len(candidates(ADULT))
    assert min(low.tables, high.rounds) <= low.rounds and high.rounds >= 1
    sizes = [c.effort.components * c.effort.restarts * c.effort.steps for c in (low, high)]
    assert sizes[0] <= sizes[1]
    assert low.effort.components <= high.effort.components <= 512
    for choice in (low, high):
        assert choice.effort.components * choice.effort.restarts <= 512
        assert (choice.rounds == 1) == (choice.tables in (1, len(candidates(ADULT))))
    # Rows count as a budget does: what matters is their product.
    assert Choice.planned(ADULT, first, 2 * rows) == Choice.planned(ADULT, 2 * first, rows)


def test_what_is_planned_reaches_from_one_table_to_all() -> None:
    made = [Choice.planned(ADULT, mu, 30_000) for mu in (1e-6, 0.2, 1e3, FREE)]
    assert made[0].tables == 1
    assert 1 < made[1].tables < len(candidates(ADULT))
    assert (made[2].tables, made[2].rounds) == (len(candidates(ADULT)), 1)
    assert made[3] == made[2]
    for layout in (Layout((3, 2), target=1), Layout((3,), target=None)):
        assert Choice.planned(layout, 1.0, 1000).tables == 0


def test_slots_that_cannot_occur_do_not_count() -> None:
    """As if the columns had the levels that can; fewer cells, more tables."""
    used = torch.arange(sum(ADULT.levels)) < 0
    kept = tuple(min(n, 6) for n in ADULT.levels)
    for start, number in zip(ADULT.offsets, kept, strict=True):
        used[start : start + number] = True
    for mu, rows in itertools.product((0.05, 0.3, 2.0), (3000, 40_000)):
        found = Choice.planned(ADULT, mu, rows, used)
        assert found == Choice.planned(Layout(kept, ADULT.target), mu, rows)
        assert found.tables >= Choice.planned(ADULT, mu, rows).tables
    assert Choice.planned(ADULT, 0.05, 3000, used).tables > Choice.planned(ADULT, 0.05, 3000).tables
    every = torch.ones_like(used)
    assert Choice.planned(ADULT, 0.3, 3000, every) == Choice.planned(ADULT, 0.3, 3000)


# What is spent


class Watched(Survey):
    """Writes down the questions."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[tuple[tuple[int, ...], float]] = []
        self.rounds: list[list[tuple[int, ...]]] = []
        self.scored: list[list[tuple[int, ...]]] = []
        self.coarse: list[tuple[list[tuple[int, ...]], float]] = []
        self.triples: list[list[tuple[int, ...]]] = []

    def tables(self, asked: Sequence[tuple[int, ...]], shares: Sequence[float]) -> list[NoisyTable]:
        self.asked += zip(asked, shares, strict=True)
        self.rounds.append(list(asked))
        return super().tables(asked, shares)

    def merged(
        self, asked: Sequence[tuple[int, ...]], share: float, groups: Groups
    ) -> list[NoisyTable]:
        if self.triples:
            assert set(asked) <= set(self.triples[-1])
        else:
            assert not self.asked
            self.coarse.append((list(asked), share))
        return super().merged(asked, share, groups)

    def distances(self, expected: Any, share: float, groups: Groups | None = None) -> list[float]:
        (self.scored if groups is None else self.triples).append(list(expected))
        return super().distances(expected, share, groups)


def watched(codes: Tensor, layout: Layout, measurer: Measurer, mu: float = FREE) -> Watched:
    plain = survey_of([codes], measurer.purse("tables"), layout)
    marginals = plain.marginals
    if mu != FREE:
        noisy = Measurer(Ledger(1e-5), mu, Marginals.asked(layout), stream(1, "m"))
        names = [f"c{j}" for j in range(layout.columns)]
        marginals = Marginals.measure(codes, layout, plain.used, noisy, names)
    return Watched([codes], layout, plain.used, marginals, plain.purse)


def even(rows: int, layout: Layout, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, layout.levels, (rows, layout.columns)))


WIDE = Layout((3, 2, 4, 2, 3, 2), target=1)


@pytest.mark.parametrize(
    ("layout", "tables", "rounds"),
    [
        (WIDE, 6, 2),
        (WIDE, 5, 3),
        (WIDE, 1, 2),
        (WIDE, 1, 1),
        (WIDE, 10, 1),
        (WIDE, 10, 2),
        (WIDE, 99, 3),
        (NO_TARGET, 3, 2),
        (MANY, 2, 2),
        (LAYOUT, 3, 5),
        (LAYOUT, 0, 1),
        (Layout((3, 2), target=1), 4, 2),
    ],
)
@pytest.mark.parametrize("mu", [0.3, 5.0, FREE])
@pytest.mark.parametrize("joined", [False, True])
def test_all_rounds_together_cost_what_was_paid_at_most(
    layout: Layout, tables: int, rounds: int, mu: float, joined: bool
) -> None:
    """Σ queries/σ² ≤ μ², nearly all of it; each table is asked for once, or once a round."""
    measurer = Counting(Ledger(1e-5), mu, 1, stream(0, "x"))
    survey = watched(even(600, layout), layout, measurer, mu)
    choice = Choice(tables, rounds, QUICK, joined)
    mixture = choose_tables(survey, choice)
    assert len(mixture.weight) == 16
    number = min(tables, len(candidates(layout)))
    if number and anchored(layout) != classed(layout):
        survey.rounds.pop(0)
        survey.asked.pop(0)
    chosen = [columns for columns, _ in survey.asked]
    assert len(chosen) == number
    assert len(survey.rounds) == min(rounds, number)
    for turn in survey.rounds:
        pairs = [columns[-2:] for columns in turn]
        assert len(pairs) == len(set(pairs)) > 0
    assert len(chosen) == len(set(chosen)) or not anchored(layout)
    either = {columns[1:] for columns in candidates(layout) if joined and len(columns) == 3}
    assert set(chosen) <= set(candidates(layout)) | either
    if not math.isinf(mu):
        assert sum(paid**2 for paid in measurer.paid) <= mu**2 * (1 + 1e-12)
    if number:
        assert 0 <= survey.purse.left < 1e-6
    # Triples are looked at once, of as many columns as noise allows; what they cost stays behind.
    head = (layout.target,) if anchored(layout) else ()
    deep = choice.triples if survey.triples else 0.0
    purse = Measurer(Ledger(1e-5), mu, 1, stream(0, "x")).purse("tables")
    fresh = Survey([even(600, layout)], layout, survey.used, survey.marginals, purse)
    number_of = columns_for(fresh, choice.triples, apart=anchored(layout))
    assert len(survey.triples) == (number > 0 and number_of > 2)
    for some in survey.triples:
        assert len(some) == len(set(some)) == math.comb(number_of, 3)
        assert {len(columns) for columns in some} == {3 + len(head)}
        assert all(columns[: len(head)] == head for columns in some)
    # All are asked with merged levels first, unless all will be asked in full.
    merged = [] if number in (0, len(candidates(layout))) else [candidates(layout)]
    assert [asked for asked, _ in survey.coarse] == merged
    assert all(share == pytest.approx(0.15 * (1 - deep)) for _, share in survey.coarse)
    # A round scores what is left, or all there are, unless it asks for all of it.
    assert len(survey.scored) <= min(rounds, number)
    for earlier, later in itertools.pairwise(survey.scored):
        assert set(later) < set(earlier) if anchored(layout) else later == earlier
    some = number < len(candidates(layout)) or bool(either) or min(rounds, number) > 1
    assert bool(survey.scored) == (number > 0 and some)


def test_a_small_table_under_a_small_budget_asks_for_one() -> None:
    choice = Choice.planned(LAYOUT, 0.01, 300)
    assert (choice.tables, choice.rounds) == (1, 1)
    measurer = Measurer(Ledger(1e-5), 0.01, 1, stream(0, "x"))
    choose_tables(watched(even(300, LAYOUT), LAYOUT, measurer, 0.01), Choice(1, 1, QUICK))


def test_a_table_on_which_noise_moves_more_rows_has_less_of_it() -> None:
    layout = Layout((2, 2, 30, 30, 2), target=0)
    measurer = Measurer(Ledger(1e-5), 1.0, 1, stream(0, "x"))
    survey = watched(even(2000, layout), layout, measurer, 1.0)
    choose_tables(survey, Choice(6, 1, QUICK, joined=False))
    shares = dict(survey.asked)
    assert shares[0, 2, 3] == max(shares.values())
    assert shares[0, 1, 4] == min(shares.values())
    assert shares[0, 2, 3] > 2 * shares[0, 1, 4]


# What is chosen


def encoded(name: str, rows: int, seed: int = 0) -> tuple[Tensor, Layout]:
    """A simulated table by a codec without noise, with a few bins a number."""
    table = simulated.draw(name, rows, np.random.default_rng(seed))
    sizes = {"bins": 6, "heaps": 2}
    asked = Codec.questions(table.schema, **sizes)
    free = Measurer(Ledger(1e-5), FREE, sum(parts for _, parts in asked), stream(0, "c"))
    codec = Codec.fit(table, free, rows=rows, **sizes)
    return codec.encode(table), codec.layout


def dependence(codes: Tensor, layout: Layout, columns: tuple[int, ...]) -> float:
    """Of the last two columns on one another given the first, by counts, in nats."""
    table = counted(codes, columns, layout) / len(codes)
    total = 0.0
    for part in table:
        alone = np.outer(part.sum(1), part.sum(0)) / max(part.sum(), 1e-12)
        inside = part > 0
        total += float((part[inside] * np.log(part[inside] / alone[inside])).sum())
    return total


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("joined", [False, True])
def test_tables_with_structure_are_asked_for_before_those_without(
    rounds: int, joined: bool
) -> None:
    codes, layout = encoded("scm", 8000)
    codes = torch.cat([codes, even(8000, Layout((6, 5), None), seed=77)], dim=1)
    layout = Layout((*layout.levels, 6, 5), layout.target)
    noise = {layout.columns - 1, layout.columns - 2}
    measurer = Measurer(Ledger(1e-5), 1.0, 1, stream(0, "x"))
    survey = watched(codes, layout, measurer, 1.0)
    choose_tables(survey, Choice(8, rounds, QUICK, joined))
    assert not any(noise & set(columns) for columns, _ in survey.asked)
    chosen = [(layout.target, *columns[-2:]) for columns, _ in survey.asked]
    # Of all others the strongest are among them.
    strength = {c: dependence(codes, layout, c) for c in candidates(layout)}
    strongest = sorted(strength, key=lambda c: -strength[c])
    assert set(strongest[:4]) <= set(chosen)
    rest = [strength[c] for c in candidates(layout) if c not in chosen]
    assert np.mean([strength[c] for c in chosen]) > 4 * np.mean(rest)


def alike(rows: int, seed: int = 0) -> tuple[Tensor, Layout]:
    """Two pairs of columns that repeat each other: the first a little more often by the label, the
    second forwards or backwards by it."""
    layout, rng = Layout((2, 8, 8, 8, 8), target=0), np.random.default_rng(seed)
    first, third = rng.integers(0, 8, (2, rows))
    label, other = rng.integers(0, 2, rows), rng.integers(0, 8, (2, rows))
    kept = rng.random((2, rows)) < 0.9
    kept[0] &= (label > 0) | (rng.random(rows) < 0.9)
    second = np.where(kept[0], first, other[0])
    fourth = np.where(kept[1], np.where(label, third, 7 - third), other[1])
    return torch.from_numpy(np.stack([label, first, second, third, fourth], axis=1)), layout


@pytest.mark.parametrize(("mu", "expected"), [(0.05, [(0, 3, 4), (1, 2)]), (FREE, None)])
def test_labels_are_told_apart_where_they_differ_or_noise_allows_it(
    mu: float, expected: list[tuple[int, ...]] | None
) -> None:
    codes, layout = alike(20_000)
    measurer = Measurer(Ledger(1e-5), mu, 1, stream(0, "x"))
    survey = watched(codes, layout, measurer)
    choose_tables(survey, Choice(2, 1, QUICK))
    assert sorted(columns for columns, _ in survey.asked) == (expected or [(0, 1, 2), (0, 3, 4)])


def test_tables_asked_joined_may_be_asked_apart_later_and_never_the_other_way_round() -> None:
    codes, layout = alike(4000)
    measurer = Measurer(Ledger(1e-5), 0.2, 1, stream(0, "x"))
    survey = watched(codes, layout, measurer)
    choose_tables(survey, Choice(6, 6, QUICK))
    chosen = [columns for columns, _ in survey.asked]
    for number, columns in enumerate(chosen):
        assert len(columns) == 2 or columns[1:] not in chosen[number:]
    assert {len(columns) for columns in chosen} == {2, 3}


def test_what_noise_blurs_is_asked_again_and_what_is_well_known_is_not() -> None:
    """Columns 1 and 2 decide each other, the others are independent: with little budget they are
    asked for again; without noise nothing is, however roughly it is fitted between."""
    layout, rng = Layout((9, 24, 24, 6, 6), target=0), np.random.default_rng(3)
    codes = rng.integers(0, layout.levels, (4000, 5))
    codes[:, 2] = (codes[:, 1] * 5 + 1) % 24
    choice = Choice(4, 4, Effort(1, 48, 200))
    asked: dict[float, list[tuple[int, ...]]] = {}
    for mu in (0.2, FREE):
        measurer = Measurer(Ledger(1e-5), mu, 1, stream(0, "x"))
        survey = watched(torch.from_numpy(codes), layout, measurer)
        choose_tables(survey, choice)
        # Before them a column of pure noise has been asked about, as the leading one.
        asked[mu] = [columns for columns, _ in survey.asked[1:]]
        assert asked[mu][0][-2:] == (1, 2)
    assert asked[0.2].count((1, 2)) >= 2
    assert len(set(asked[FREE])) == len(asked[FREE])


@pytest.mark.parametrize("mu", [0.2, FREE])
def test_of_many_levels_the_column_that_says_most_is_asked_about_first(mu: float) -> None:
    """With as much of the budget as a table of 20 has, however many are asked for."""
    layout, rng = Layout((3, 10, 30, 2, 4), target=1), np.random.default_rng(5)
    codes = rng.integers(0, layout.levels, (5000, 5))
    codes[:, 2] = 3 * codes[:, 1] + rng.integers(0, 3, 5000)
    codes[:, 4] = np.where(rng.random(5000) < 0.5, codes[:, 1] // 3, codes[:, 4])
    measurer = Measurer(Ledger(1e-5), mu, 1, stream(0, "x"))
    survey = watched(torch.from_numpy(codes), layout, measurer, mu)
    choice = Choice(4, 2, QUICK, triples=0.0)
    model = choose_tables(survey, choice)
    first, share = survey.asked[0]
    assert survey.rounds[0] == [first] == [(1, 2)]
    assert share == pytest.approx(0.85 * 0.05)
    assert len(survey.asked) == 5
    assert model.leading is not None and model.leading.columns == (2,)


@pytest.mark.parametrize("mu", [0.3, 3.0, FREE])
def test_two_columns_that_decide_a_target_of_many_levels_lead_together(mu: float) -> None:
    """Its levels are tenths of a number apart for each level of another column."""
    layout, rng = Layout((3, 10, 30, 4, 5), target=1), np.random.default_rng(6)
    codes = rng.integers(0, layout.levels, (20_000, 5))
    codes[:, 2] = (codes[:, 1] * 2 + rng.integers(0, 2, 20_000) + 3 * codes[:, 3]).clip(max=29)
    measurer = Measurer(Ledger(1e-5), mu, 1, stream(0, "x"))
    survey = watched(torch.from_numpy(codes), layout, measurer, mu)
    model = choose_tables(survey, Choice(4, 2, QUICK, triples=0.0))
    assert [asked for asked, _ in survey.asked[:2]] == [(1, 2), (1, 2, 3)]
    assert model.leading is not None and model.leading.columns == (2, 3)
    fresh = torch.from_numpy(codes[:2000])
    right = (model.leading.scores(fresh, layout).argmax(1) == fresh[:, 1]).double().mean()
    assert right > (0.75 if mu < 1 else 0.93)


def test_much_budget_asks_for_all_tables_apart() -> None:
    choice = Choice.planned(ADULT, 1e3, 30_000)
    assert not choice.joined and choice.tables == len(candidates(ADULT))
    assert Choice.planned(ADULT, 0.2, 30_000).joined


@pytest.mark.parametrize("mu", [0.5, 2.0, FREE])
def test_a_fit_to_chosen_tables_is_nearer_to_the_truth_than_naive_bayes(mu: float) -> None:
    """On all pairs of columns; and on those of other rows of the same law."""
    both, layout = encoded("scm", 12_000)
    codes, more = both[:6000], both[6000:]
    measurer = Measurer(Ledger(1e-5), mu, 1, stream(0, "x"))
    survey = watched(codes, layout, measurer, mu)
    found = choose_tables(survey, Choice(12, 2, Effort(1, 64, 150)))
    plain = Mixture.naive_bayes(survey.marginals, layout)
    others = [j for j in range(layout.columns) if j != layout.target]
    for part in (codes, more):
        far = {"found": 0.0, "plain": 0.0}
        for columns in itertools.combinations(others, 2):
            law = counted(part, columns, layout) / len(part)
            for kind, model in (("found", found), ("plain", plain)):
                far[kind] += float(np.abs(model.table(columns, layout) - law).sum() / 2)
        assert far["found"] < (0.8 if mu < 1 else 0.65) * far["plain"]


# What may depend on rows


class Fixed(Measurer):
    """Answers whatever it likes, the same for all tables."""

    def __init__(self, mu: float, seed: int = 0) -> None:
        super().__init__(Ledger(1e-5), mu, 1, stream(seed, "fixed"))
        self.rng = np.random.default_rng(seed)
        self.spent: list[tuple[float, int]] = []

    def answering(self, what: str, mu: float, queries: int) -> HistogramNoise:
        self.spent.append((mu, queries))
        return _Fixed(super().answering(what, mu, queries), self.rng)

    def choosing(self, what: str, epsilon: float, scores: np.ndarray, sensitivity: float) -> int:
        self.spent.append((epsilon, len(scores)))
        super().choosing(what, epsilon, scores, sensitivity)
        return int(self.rng.integers(len(scores)))


class _Fixed(HistogramNoise):
    def __init__(self, noise: HistogramNoise, rng: np.random.Generator) -> None:
        self.sigma, self._noise, self._drawn = noise.sigma, noise, rng

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        self._noise(counts)  # refuses what is not counts, and too many of them
        return self._drawn.exponential(40.0, counts.shape)


@pytest.mark.parametrize("layout", [WIDE, MANY, NO_TARGET], ids=["few", "many", "none"])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_asked_and_fitted_follows_from_noisy_answers_alone(
    layout: Layout, seed: int
) -> None:
    """Two tables without a row in common, of other sizes: equal answers, equal questions."""
    found = []
    known = watched(even(500, layout, 9), layout, Measurer(Ledger(1e-5), FREE, 1, stream(0, "x")))
    for rows, own in ((500, 1), (90, 2)):
        measurer = Fixed(3.0, seed)
        used, codes = known.used, even(rows, layout, own)
        survey = Watched([codes], layout, used, known.marginals, measurer.purse("tables"))
        number = len(candidates(layout)) // 2 + 1
        mixture = choose_tables(survey, Choice(number, 2, QUICK))
        asked = survey.asked, survey.scored, survey.triples
        assert all(asked)
        found.append((*asked, measurer.spent, mixture))
    assert found[0][:4] == found[1][:4]
    assert torch.equal(found[0][4].levels, found[1][4].levels)
    assert torch.equal(found[0][4].weight, found[1][4].weight)


def test_other_answers_lead_to_other_questions() -> None:
    """Else the law above would hold of anything."""
    asked = []
    for seed in range(2):
        measurer = Fixed(0.5, seed)
        survey = watched(even(300, WIDE), WIDE, measurer)
        choose_tables(survey, Choice(4, 2, QUICK))
        asked.append(survey.asked)
    assert asked[0] != asked[1]


# What families make of it


def test_a_family_spends_its_whole_share_on_a_mixture_that_it_can_hold() -> None:
    measurer = Measurer(Ledger(1e-5), 1.0, 1, stream(0, "x"))
    survey = watched(even(900, LAYOUT), LAYOUT, measurer, 1.0)
    shares = {"codec": 0.1, "marginals": 0.1, "tables": 0.5}
    plan = PrivacyPlan(1.0, 1e-5, rows=900, batch=90, steps=3, shares=shares).calibrate()
    found = Vae.survey(survey, plan, {}, "cpu")
    assert isinstance(found, Mixture)
    assert survey.purse.left < 1e-6
    due = Choice.planned(LAYOUT, plan.mu("tables"), 900)
    assert len(survey.asked) == due.tables
    assert len(found.weight) == due.effort.restarts * due.effort.components


@pytest.mark.parametrize("size", [3e-3, 0.4, 0.5, 2.3, 40.0])
def testby_chance_is_how_far_counts_of_a_right_model_are(size: float) -> None:
    """Against draws; of sparse tables it is all there is."""
    expected = np.full((4, 5), size)
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.poisson(size, (20_000, 20)) - np.round(size)).sum(1)
    assert abs(by_chance(expected) - gaps.mean()) < 4 * gaps.std() / len(gaps) ** 0.5
    assert by_chance(np.zeros(3)) == 0
