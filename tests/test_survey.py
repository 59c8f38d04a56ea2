"""Survey: exact where nothing is hidden, noisy as its purse says, and never more than was paid."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer, Purse
from dpsynth.randomness import Stream, secure_stream, stream
from dpsynth.survey import Survey

LAYOUT = Layout((3, 4, 2, 5), target=2)
ASKED = [(0,), (2, 0), (3, 1), (2, 0, 3), (2, 3, 0), (0, 1, 2, 3)]
FREE = math.inf


def codes_of(rows: int, seed: int = 0, layout: Layout = LAYOUT) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, layout.levels, (rows, layout.columns)))


def purse_of(mu: float, rng: Stream | None = None, ledger: Ledger | None = None) -> Purse:
    noise = stream(0, "tables") if rng is None else rng
    return Measurer(ledger or Ledger(1e-5), mu, 1, noise).purse("tables")


def survey_of(pieces: Sequence[Tensor], purse: Purse, layout: Layout = LAYOUT) -> Survey:
    used = torch.ones(layout.width, dtype=torch.bool)
    free = Measurer(Ledger(1e-5), FREE, Marginals.asked(layout), stream(0, "m"))
    names = [f"c{j}" for j in range(layout.columns)]
    return Survey(pieces, layout, used, Marginals.measure(pieces, layout, used, free, names), purse)


def counted(codes: Tensor, columns: tuple[int, ...], layout: Layout = LAYOUT) -> np.ndarray:
    """Rows with each combination of levels, by pandas."""
    frame = pd.DataFrame(codes.numpy())
    sizes = frame.groupby(list(columns)).size()
    table = np.zeros([layout.levels[j] for j in columns])
    for place, size in zip(sizes.index.tolist(), sizes.tolist(), strict=True):
        table[place] = size
    return table


# Tables


@pytest.mark.parametrize("cuts", [(), (100,), (0, 1, 399)])
def test_without_noise_tables_are_counts_over_all_pieces(cuts: tuple[int, ...]) -> None:
    codes = codes_of(400)
    pieces = [p.to(torch.int16) for p in codes.tensor_split(cuts)]
    found = survey_of(pieces, purse_of(FREE)).tables(ASKED, [1 / 8] * len(ASKED))
    assert [table.columns for table in found] == ASKED
    for table in found:
        np.testing.assert_array_equal(table.counts, counted(codes, table.columns))
        assert table.sigma == 0
    crossed = pd.crosstab(codes[:, 2].numpy(), codes[:, 0].numpy()).to_numpy()
    np.testing.assert_array_equal(found[1].counts, crossed)


def scales(drawn: np.ndarray, sigma: float) -> None:
    """Draws have this standard deviation, not two thirds of it nor half as much again."""
    assert stats.kstest(drawn, stats.norm(0, sigma).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn, stats.norm(0, wrong * sigma).cdf).pvalue < 1e-12


WIDE = Layout((60, 50, 2), target=2)


@pytest.mark.parametrize(("mu", "share"), [(1.0, 0.25), (0.1, 0.5), (2.0, 0.01)])
def test_each_table_has_the_noise_of_its_share(mu: float, share: float) -> None:
    codes = codes_of(500, layout=WIDE)
    purse = purse_of(mu, secure_stream(5 << 190, "tables"))
    survey = survey_of([codes], purse, WIDE)
    found = survey.tables([(0, 1), (2, 0, 1)], [share, share / 4])
    for table, part in zip(found, (share, share / 4), strict=True):
        due = 1 / (mu * math.sqrt(part))
        assert table.sigma == pytest.approx(due)
        scales((table.counts - counted(codes, table.columns, WIDE)).ravel(), due)
    first, second = (t.counts - counted(codes, t.columns, WIDE) for t in found)
    both = np.corrcoef(first.ravel(), second[0].ravel())[0, 1]
    assert abs(both) < 5 / math.sqrt(first.size)


# Distances


def test_without_noise_a_distance_counts_the_rows_that_are_elsewhere() -> None:
    codes, rng = codes_of(300), np.random.default_rng(1)
    columns = [(2, 0, 1), (0, 3), (1,)]
    expected = {c: rng.uniform(0, 30, [LAYOUT.levels[j] for j in c]) for c in columns}
    found = survey_of(codes.split(77), purse_of(FREE)).distances(expected, 0.5)
    for columns_, distance in zip(columns, found, strict=True):
        due = np.abs(counted(codes, columns_) - np.round(expected[columns_])).sum()
        assert distance == due == int(due)


@pytest.mark.parametrize(("mu", "share"), [(1.0, 0.05), (0.3, 1.0)])
def test_distances_share_their_noise(mu: float, share: float) -> None:
    """σ = √(number of distances / share)/μ each."""
    layout = Layout((2,) * 9, target=0)
    asked = [*itertools.permutations(range(9), 2), *itertools.permutations(range(9), 3)]
    expected = {columns: np.full((2,) * len(columns), 20.3) for columns in asked}
    codes, drawn = codes_of(80, layout=layout), []
    due = [np.abs(counted(codes, columns, layout) - 20).sum() for columns in asked]
    for key in range(4):
        purse = purse_of(mu, secure_stream((9 << 190) + key, "tables"))
        found = survey_of([codes], purse, layout).distances(expected, share)
        assert purse.left == pytest.approx(1 - share)
        drawn += (np.array(found) - due).tolist()
    scales(np.array(drawn), math.sqrt(len(asked) / share) / mu)


@settings(max_examples=60)
@given(st.integers(0, 40), st.integers(0, 2**32), st.floats(0, 20))
def test_one_row_more_moves_every_distance_by_one(rows: int, seed: int, scale: float) -> None:
    """Whatever row, whatever was expected: the stated sensitivity is that of the worst case."""
    layout, rng = Layout((2, 3, 2), target=2), np.random.default_rng(seed)
    asked = [(0,), (2, 0), (2, 0, 1)]
    expected = {c: scale * rng.random([layout.levels[j] for j in c]) for c in asked}
    codes = codes_of(rows, seed, layout)

    def distances(held: Tensor) -> np.ndarray:
        return np.array(survey_of([held], purse_of(FREE), layout).distances(expected, 1.0))

    before = distances(codes)
    assert (before == np.round(before)).all()
    for row in np.ndindex(*layout.levels):
        moved = distances(torch.cat([codes, torch.tensor([row])])) - before
        assert (np.abs(moved) == 1).all()


def test_noisy_distances_are_whole_numbers_and_noise_on_the_grid() -> None:
    """A part that were no whole number would show in the low bits."""
    codes, expected = codes_of(90), {(0, 1): np.full((3, 4), 7.77)}
    (noisy,) = survey_of([codes], purse_of(1.0)).distances(expected, 1.0)
    assert noisy * 1024 == round(noisy * 1024)
    more = torch.cat([codes, codes[:1]])
    (moved,) = survey_of([more], purse_of(1.0)).distances(expected, 1.0)
    assert abs(moved - noisy) == 1


# Refusals


@pytest.mark.parametrize("columns", [(), (4,), (-1, 0), (0, 0), (2, 1, 2)])
def test_columns_that_make_no_table_are_refused(columns: tuple[int, ...]) -> None:
    survey = survey_of([codes_of(20)], purse_of(FREE))
    with pytest.raises(UsageError, match=r"columns=.*must be different columns of 4"):
        survey.tables([(0, 1), columns], [0.1, 0.1])
    with pytest.raises(UsageError, match="must be different columns of 4"):
        survey.distances({columns: np.zeros(())}, 0.1)


@pytest.mark.parametrize("mu", [1.0, FREE])
def test_a_survey_asks_for_no_more_than_its_purse_holds(mu: float) -> None:
    survey = survey_of([codes_of(20)], purse_of(mu))
    survey.tables([(0, 1)], [0.6])
    with pytest.raises(UsageError, match=r"share=0\.5 is more than 0\.4"):
        survey.tables([(0, 3)], [0.5])
    with pytest.raises(UsageError, match=r"share=0\.5 is more than 0\.4"):
        survey.distances({(0,): np.zeros(3)}, 0.5)
    with pytest.raises(UsageError, match=r"is more than"):
        survey.tables([(0, 3), (1, 3)], [0.3, 0.2])
    with pytest.raises(UsageError, match="queries=0"):
        survey.distances({}, 0.05)


class Counting(Measurer):
    """Writes down the budget of every answer."""

    def __init__(self, ledger: Ledger, mu: float, parts: int, rng: Stream) -> None:
        super().__init__(ledger, mu, parts, rng)
        self.paid: list[float] = []

    def answering(self, what: str, mu: float, queries: int) -> HistogramNoise:
        self.paid.append(mu)
        return super().answering(what, mu, queries)


@settings(max_examples=100)
@given(
    st.floats(0.01, 50),
    st.lists(st.tuples(st.floats(1e-6, 1), st.integers(1, 9)), min_size=1, max_size=20),
)
def test_whatever_is_asked_the_answers_cost_what_was_paid_at_most(
    mu: float, asked: list[tuple[float, int]]
) -> None:
    """Σ μ_i² ≤ μ², and by the noise itself: Σ queries/σ² ≤ μ²."""
    measurer = Counting(Ledger(1e-5), mu, 1, stream(0, "x"))
    purse, shown = measurer.purse("tables"), 0.0
    for share, queries in asked:
        if share > purse.left:
            with pytest.raises(UsageError, match="is more than"):
                purse.histograms(share, queries)
            continue
        assert purse.sigma(share, queries) == pytest.approx(math.sqrt(queries / share) / mu)
        shown += queries / purse.histograms(share, queries).sigma ** 2
    assert sum(paid**2 for paid in measurer.paid) <= mu**2 * (1 + 1e-12)
    assert shown <= mu**2 * (1 + 1e-12)


# The table that is farthest


def far(codes: Tensor) -> dict[tuple[int, ...], np.ndarray]:
    """Expectations that are 0, 6 and 3 rows off."""
    found = {columns: counted(codes, columns) for columns in [(0, 1), (2, 3), (1, 3)]}
    found[2, 3][0, 0] += 6
    found[1, 3][1, 1] -= 3
    return found


def test_without_noise_the_farthest_table_by_its_score_is_taken() -> None:
    codes = codes_of(400)
    survey = survey_of([codes], purse_of(FREE))
    assert survey.farthest(far(codes), 0.1) == (2, 3)
    assert survey.farthest(far(codes), 0.1, weights=[1, 1, 3]) == (1, 3)
    assert survey.farthest(far(codes), 0.1, penalties=[-9, 1, 0]) == (0, 1)
    assert survey.purse.left == pytest.approx(0.7)


def test_a_noisy_choice_follows_the_exponential_mechanism() -> None:
    """With the weights' greatest as sensitivity: scores 0, 12 and 3 for weights 1, 2 and 1."""
    codes = codes_of(400)
    survey = survey_of([codes], purse_of(1.0))
    asked: list[tuple[np.ndarray, float, float]] = []

    class Watched:
        left = 1.0

        def choose(self, scores: np.ndarray, share: float, sensitivity: float) -> int:
            asked.append((scores, share, sensitivity))
            return 0

    survey.purse = Watched()  # type: ignore[assignment]
    assert survey.farthest(far(codes), 0.25, weights=[1, 2, 1]) == (0, 1)
    ((scores, share, sensitivity),) = asked
    np.testing.assert_array_equal(scores, [0, 12, 3])
    assert (share, sensitivity) == (0.25, 2.0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 399), st.lists(st.floats(0.5, 4), min_size=3, max_size=3))
def test_one_row_less_moves_a_score_by_its_weight_at_most(row: int, weights: list[float]) -> None:
    codes = codes_of(400)
    expected = far(codes)
    seen: list[np.ndarray] = []

    class Watched:
        def choose(self, scores: np.ndarray, share: float, sensitivity: float) -> int:
            assert sensitivity == max(weights)
            seen.append(scores)
            return 0

    for rows in (codes, torch.cat([codes[:row], codes[row + 1 :]])):
        survey = survey_of([rows], purse_of(FREE))
        survey.purse = Watched()  # type: ignore[assignment]
        survey.farthest(expected, 0.1, weights=weights)
    assert (np.abs(seen[0] - seen[1]) <= np.array(weights) + 1e-9).all()


# What hangs on a column where others are known


def interacting(codes: Tensor) -> dict[tuple[int, ...], np.ndarray]:
    """Expectations: of three rows in another level of the first column; of six rows in other levels
    of both others."""
    found = {columns: counted(codes, columns) for columns in [(2, 0, 1), (2, 0, 3)]}
    found[2, 0, 1][:, 0, 0] += (3, -3)
    found[2, 0, 3][:, 0, 0] += 6
    return found


def test_the_table_is_taken_that_is_wrong_beyond_its_last_columns_or_none() -> None:
    codes = codes_of(400)
    survey = survey_of([codes], purse_of(FREE))
    expected = interacting(codes)

    def taken(penalties: list[float], least: float) -> tuple[int, ...] | None:
        return survey.interacting(expected, 0.1, penalties=penalties, least=least)

    assert taken([0, 0], 5) == (2, 0, 1)
    assert taken([0, 0], 7) is taken([2, 2], 5) is None
    assert taken([2, -5], 3) == (2, 0, 3)
    assert survey.purse.left == pytest.approx(0.6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 399), st.integers(0, 2**16))
def test_one_row_less_moves_what_it_is_wrong_by_by_2_at_most(row: int, seed: int) -> None:
    codes, rng = codes_of(400), np.random.default_rng(seed)
    expected = {
        columns: rng.exponential(
            counted(codes, columns).mean(), [LAYOUT.levels[c] for c in columns]
        )
        for columns in [(2, 0, 1), (2, 0, 3), (2, 3, 1)]
    }
    seen: list[np.ndarray] = []

    class Watched:
        def choose(self, scores: np.ndarray, share: float, sensitivity: float) -> int:
            assert (share, sensitivity) == (0.25, 2.0)
            seen.append(scores)
            return 0

    for rows in (codes, torch.cat([codes[:row], codes[row + 1 :]])):
        survey = survey_of([rows], purse_of(FREE))
        survey.purse = Watched()  # type: ignore[assignment]
        survey.interacting(expected, 0.25, penalties=[1, 2, 3], least=4.0)
    assert (np.abs(seen[0] - seen[1]) <= 2 + 1e-9).all()
    assert seen[0][-1] == seen[1][-1] == 4.0
