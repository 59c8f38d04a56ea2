"""Poisson batches as statistics: who is in, who is in together, how many, and never cut short."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import chi_square
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.randomness import FleetRng

# The seeds are fixed, so a p-value below this is a defect and not bad luck.
LEAST = 1e-4


def drawn(
    rows: Sequence[int], q: Sequence[float], keys: Sequence[int], step: int, piece: int = 1024
) -> list[np.ndarray]:
    """Positions in one step's batch of each run, in the order in which they come."""
    runs: list[list[int]] = [[] for _ in rows]
    for index, inside in PoissonBatches(rows, q, piece=piece).draw(FleetRng(list(keys)), step):
        assert index.shape == inside.shape
        assert index.shape[1] <= piece
        assert (index[~inside] == 0).all()
        for run in range(len(rows)):
            runs[run] += index[run, inside[run]].tolist()
    return [np.array(run, dtype=np.int64) for run in runs]


def membership(rows: int, q: float, steps: int, key: int = 0) -> np.ndarray:
    """Which record is in which step's batch (steps, rows)."""
    table = np.zeros((steps, rows), dtype=bool)
    for step in range(steps):
        table[step, drawn([rows], [q], [key], step)[0]] = True
    return table


@pytest.mark.parametrize(("rows", "q"), [(60, 0.05), (25, 0.4), (40, 0.93)])
def test_each_record_enters_each_step_with_probability_q_by_itself(rows: int, q: float) -> None:
    steps = 2500
    table = membership(rows, q, steps)
    bar = LEAST / rows
    for record in range(rows):
        assert stats.binomtest(int(table[:, record].sum()), steps, q).pvalue > bar
    # Neighbours in a batch, neighbours one apart, and the same record in the next step.
    for left, right in (
        (table[:, :-1], table[:, 1:]),
        (table[:, :-2], table[:, 2:]),
        (table[:-1], table[1:]),
        (table[:-1, :-1], table[1:, 1:]),
    ):
        for record in range(left.shape[1]):
            both = int((left[:, record] & right[:, record]).sum())
            assert stats.binomtest(both, len(left), q * q).pvalue > bar
        share = [(~left & ~right).mean(), (~left & right).mean(), (left & ~right).mean()]
        expected = np.array([(1 - q) ** 2, q * (1 - q), q * (1 - q), q * q])
        cells = np.array([*share, (left & right).mean()]) * left.size
        assert chi_square(cells, expected) > LEAST
    sizes = np.bincount(table.sum(1), minlength=rows + 1)
    assert chi_square(sizes, stats.binom(rows, q).pmf(np.arange(rows + 1))) > LEAST


def test_a_wrong_rate_would_be_noticed() -> None:
    """The same test of sizes refuses a rate that is off by a tenth."""
    sizes = np.bincount(membership(60, 0.2, 1500).sum(1), minlength=61)
    assert chi_square(sizes, stats.binom(60, 0.2).pmf(np.arange(61))) > LEAST
    for wrong in (0.18, 0.22):
        assert chi_square(sizes, stats.binom(60, wrong).pmf(np.arange(61))) < 1e-9


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1.0)), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(0, 2**64),
)
def test_a_tiny_buffer_draws_the_same_batch(
    runs: list[tuple[int, float]], piece: int, key: int
) -> None:
    rows, q = zip(*runs, strict=True)
    keys = [key + run for run in range(len(runs))]
    whole, parts = (drawn(rows, q, keys, 3, size) for size in (1024, piece))
    for run, (batch, again) in enumerate(zip(whole, parts, strict=True)):
        np.testing.assert_array_equal(batch, again)
        assert (np.diff(batch) > 0).all()
        assert batch.size == 0 or (batch[0] >= 0 and batch[-1] < rows[run])


def test_a_batch_longer_than_the_buffer_is_not_cut() -> None:
    """With room for four records the long batches come as often as the binomial law says."""
    assert PoissonBatches([400], [0.02], piece=4).capacity == 4
    sizes = np.array([drawn([400], [0.02], [1], step, piece=4)[0].size for step in range(2000)])
    for bar in (4, 8, 12, 16):
        law = stats.binom(400, 0.02).sf(bar)
        assert stats.binomtest(int((sizes > bar).sum()), 2000, law).pvalue > LEAST
    assert drawn([400], [0.9], [1], 0, piece=7)[0].size > 300


def test_q_one_takes_every_record_every_time() -> None:
    for rows in (1, 7, 500):
        for piece in (3, 1024):
            np.testing.assert_array_equal(drawn([rows], [1.0], [5], 2, piece)[0], np.arange(rows))


def test_batches_may_be_empty() -> None:
    sizes = np.array([drawn([5], [0.1], [0], step)[0].size for step in range(800)])
    assert stats.binomtest(int((sizes == 0).sum()), 800, 0.9**5).pvalue > LEAST
    pieces = list(PoissonBatches([5], [1e-9]).draw(FleetRng([0]), 0))
    assert len(pieces) == 1
    assert not pieces[0][1].any()


def test_secure_batches_follow_the_same_law() -> None:
    """From AES in place of Philox: sizes, and how often each record is in."""
    rng = FleetRng([3 << 200], secure=True)
    table = np.zeros((1500, 40), dtype=bool)
    for step in range(1500):
        for index, inside in PoissonBatches([40], [0.15], piece=4).draw(rng, step):
            table[step, index[inside].numpy()] = True
    sizes = np.bincount(table.sum(1), minlength=41)
    assert chi_square(sizes, stats.binom(40, 0.15).pmf(np.arange(41))) > LEAST
    for record in range(40):
        assert stats.binomtest(int(table[:, record].sum()), 1500, 0.15).pvalue > LEAST / 40


def test_a_sampler_says_its_rates_and_has_no_variants() -> None:
    """What binds it to a plan compares these; `final` stops a subclass with another draw."""
    assert PoissonBatches([10, 20], [0.25, 1.0]).q == (0.25, 1.0)
    assert PoissonBatches.__final__  # type: ignore[attr-defined]


def test_runs_of_a_fleet_draw_what_each_draws_alone() -> None:
    rows, q, keys = [200, 50, 90], [0.1, 0.6, 1.0], [11, 12, 13]
    for step in range(20):
        fleet = drawn(rows, q, keys, step, piece=16)
        for run in range(3):
            alone = drawn([rows[run]], [q[run]], [keys[run]], step)[0]
            np.testing.assert_array_equal(fleet[run], alone)


def test_keys_and_steps_tell_batches_apart() -> None:
    first = [drawn([500], [0.5], [key], step)[0] for key in (1, 2) for step in (0, 1)]
    for i, left in enumerate(first):
        for right in first[:i]:
            # Two independent halves of 500 records share 125 of them on average.
            common = len(np.intersect1d(left, right))
            assert abs(common - 125) < 5 * math.sqrt(500 * 0.25 * 0.75)
    np.testing.assert_array_equal(first[0], drawn([500], [0.5], [1], 0)[0])


@pytest.mark.parametrize(
    ("rows", "q", "piece", "part"),
    [
        ([10], [0.0], 8, "q=0.0"),
        ([10], [-0.1], 8, "q=-0.1"),
        ([10], [1.1], 8, "q=1.1"),
        ([10], [math.nan], 8, "q=nan"),
        ([10, 10], [0.5], 8, "rows=2 and q=1"),
        ([], [], 8, "rows=0"),
        ([10], [0.5], 0, "piece=0"),
        ([10], [0.5], 2.5, "piece=2.5"),
    ],
)
def test_refusals(rows: list[int], q: list[float], piece: int, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        PoissonBatches(rows, q, piece=piece)
