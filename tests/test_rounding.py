"""Round numbers: counting by brute force, drawing as it is counted, weights by known shares."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpsynth.codec import Codec, Grid, NumericCoder
from dpsynth.data import Table
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.rounding import STRETCHES, Leaves, kept, ladder, steps_of, weights_of
from dpsynth.schema import Column, Schema

PAY = Column("pay", "integer", lower=-20_000, upper=400_000)
ROWS = 20_000


def place_of(number: int, steps: np.ndarray) -> int:
    """The last step that divides it, one after the other."""
    return max(place for place, step in enumerate(steps.tolist()) if number % step == 0)


@pytest.mark.parametrize("values", [1, 39, 40, 41, 10**4, 2**53])
def test_each_step_divides_the_next_and_has_eight_multiples(values: int) -> None:
    steps = ladder(values)
    assert steps[0] == 1
    assert (steps[1:] % steps[:-1] == 0).all() and (steps[1:] > steps[:-1]).all()
    assert len(steps) == 1 or values // steps[-1] >= 8
    assert set(steps.tolist()) <= {a * 10**b for a in (1, 5) for b in range(16)}
    assert values < 40 or values // steps[-1] < 40


@st.composite
def leaves(draw: st.DrawFn) -> Leaves:
    edges = sorted(draw(st.sets(st.integers(-300, 300), min_size=2, max_size=8)))
    taken = sorted(draw(st.sets(st.integers(-320, 320), max_size=30)))
    steps = ladder(draw(st.sampled_from([1, 40, 90, 500, 2000])))
    return Leaves(*(np.array(found, dtype=np.int64) for found in (edges, taken)), steps)


@given(leaves())
def test_free_numbers_are_those_that_one_by_one_are_found(made: Leaves) -> None:
    held = np.zeros((len(made.edges) - 1, len(made.steps)), dtype=int)
    for leaf, (first, last) in enumerate(itertools.pairwise(made.edges.tolist())):
        for number in range(first, last):
            if number not in made.taken:
                held[leaf, place_of(number, made.steps)] += 1
    np.testing.assert_array_equal(made.free, held)


@settings(max_examples=50)
@given(leaves(), st.integers(0, 2**32 - 1))
def test_a_draw_is_one_of_all_free_numbers_of_its_leaf_and_step(made: Leaves, seed: int) -> None:
    """Each of them alike: a hundred draws a number miss none, and none comes twice as often."""
    ways = np.argwhere(made.free > 0)
    asked = np.repeat(ways, 100 * made.free[tuple(ways.T)], axis=0)
    drawn = made.draw(asked[:, 0], asked[:, 1], np.random.default_rng(seed))
    np.testing.assert_array_equal(steps_of(drawn, made.steps), asked[:, 1])
    assert (drawn >= made.edges[asked[:, 0]]).all()
    assert (drawn < made.edges[asked[:, 0] + 1]).all()
    assert not np.isin(drawn, made.taken).any()
    if len(drawn):
        numbers, times = np.unique(drawn, return_counts=True)
        assert len(numbers) == made.free.sum()
        assert times.min() > 40 and times.max() < 200


def test_a_narrow_leaf_between_round_numbers_keeps_nothing() -> None:
    steps = ladder(4000)
    made = Leaves(np.array([0, 99, 199, 1000, 1001]), np.zeros(0, dtype=np.int64), steps)
    weights = np.where(steps >= 100, 100.0, 0.0)[None].repeat(4, axis=0)
    only = Leaves(np.array([1, 99]), made.taken, steps)
    np.testing.assert_array_equal(kept(weights[:1], only.free), [0.0])
    np.testing.assert_array_equal(kept(weights, made.free), [1.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(kept(np.ones_like(weights), made.free), np.ones(4))


# -- weights -----------------------------------------------------------------------------------


def drawn(shares: dict[int, float], rng: np.random.Generator, rows: int = ROWS) -> np.ndarray:
    """Numbers up to 100 000, of which shares are multiples of steps."""
    steps = rng.choice(list(shares), rows, p=list(shares.values()))
    return np.floor(rng.random(rows) * 100_000 / steps).astype(np.int64) * steps


def weighed(numbers: np.ndarray, sigma: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights of numbers in ten leaves, and the rows that they lead to by step, drawn anew."""
    edges = np.arange(0, 100_001, 10_000)
    made = Leaves(edges, np.zeros(0, dtype=np.int64), ladder(100_000))
    leaf = np.searchsorted(edges, numbers, side="right") - 1
    stretch = np.arange(10) * STRETCHES // 10
    noisy = np.zeros((STRETCHES, len(made.steps)))
    np.add.at(noisy, (stretch[leaf], steps_of(numbers, made.steps)), 1)
    noisy += sigma * np.random.default_rng([seed, 1]).standard_normal(noisy.shape)
    mass = np.bincount(leaf, minlength=10).astype(float)
    found = weights_of(noisy, sigma, mass, made.free, stretch)
    rows = np.zeros_like(noisy)
    for number in range(10):
        share = found[stretch[number]] * made.free[number]
        rows[stretch[number]] += mass[number] * share / share.sum()
    return found, rows


ROUND = {"even": {1: 1.0}, "tens": {10: 0.5, 1000: 0.5}, "mixed": {1: 0.6, 100: 0.3, 5000: 0.1}}


@pytest.mark.parametrize("shares", ROUND)
def test_without_noise_weights_lead_to_the_rows_that_were_counted(shares: str) -> None:
    numbers = drawn(ROUND[shares], np.random.default_rng(1))
    found, rows = weighed(numbers, 0.0)
    steps = steps_of(numbers, ladder(100_000))
    np.testing.assert_allclose(rows.sum(0), np.bincount(steps, minlength=found.shape[1]), atol=1.0)


@pytest.mark.parametrize("seed", range(5))
def test_numbers_that_are_not_round_are_drawn_evenly_whatever_the_noise(seed: int) -> None:
    numbers = drawn(ROUND["even"], np.random.default_rng(seed))
    found, _ = weighed(numbers, 100.0, seed)
    np.testing.assert_allclose(found, 1.0, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_what_has_no_fine_values_gets_none_under_noise(seed: int) -> None:
    """Multiples of ten and of a thousand: next to nothing in between, and both as often."""
    numbers = drawn(ROUND["tens"], np.random.default_rng(seed))
    found, rows = weighed(numbers, 100.0, seed)
    np.testing.assert_array_equal(found[:, :2], 0.0)
    fine = ladder(100_000) < 1000
    assert rows[:, fine].sum() / ROWS == pytest.approx(0.495, abs=0.07)


def test_a_grid_of_one_step_has_nothing_to_weigh() -> None:
    counts = np.ones((STRETCHES, 1))
    found = weights_of(counts, 1.0, np.ones(3), np.ones((3, 1), dtype=np.int64), np.arange(3))
    np.testing.assert_array_equal(found, counts)


@pytest.mark.parametrize("rows", [0, 1])
def test_empty_columns_have_weights_too(rows: int) -> None:
    found, _ = weighed(np.zeros(rows, dtype=np.int64), 50.0)
    assert np.isfinite(found).all() and (found >= 0).all() and (found.sum(1) > 0).all()


# -- in the codec ------------------------------------------------------------------------------


def fitted(numbers: np.ndarray, mu: float, column: Column = PAY) -> tuple[Table, Codec]:
    table = Table.from_frame(pd.DataFrame({column.name: numbers}), Schema((column,)), strict=False)
    parts = sum(part for _, part in Codec.questions(table.schema, 20, 4))
    asked = Measurer(Ledger(1e-5), mu, parts, np.random.default_rng(3))
    return table, Codec.fit(table, asked, rows=len(table), bins=20, heaps=4)


@pytest.mark.parametrize("mu", [np.inf, 0.3])
def test_decoded_numbers_are_as_round_as_the_encoded_ones(mu: float) -> None:
    numbers = drawn(ROUND["mixed"], np.random.default_rng(5))
    table, codec = fitted(numbers, mu)
    again = codec.decode(codec.encode(table), np.random.default_rng(6))
    made = again.frame["pay"].to_numpy()
    for step in (5, 100, 500, 5000):
        assert (made % step == 0).mean() == pytest.approx((numbers % step == 0).mean(), abs=0.025)


def test_a_column_of_large_round_numbers_has_no_others() -> None:
    """Limits in ten thousands: leaves that lie between two of them keep no rows."""
    rng = np.random.default_rng(7)
    numbers = 10_000 * rng.integers(1, 40, ROWS)
    table, codec = fitted(numbers, 0.3)
    made = codec.decode(codec.encode(table), rng).frame["pay"].to_numpy()
    assert (made % 10_000 == 0).mean() > 0.98
    again = Table.from_frame(pd.DataFrame({"pay": made}), codec.schema, strict=False)
    assert (codec.encode(again) == codec.encode(table)).all()


@pytest.mark.parametrize(
    "column",
    [
        Column("x", "integer", lower=0, upper=1000),
        Column("x", "decimal", lower=0.0, upper=1.0),
    ],
)
def test_short_grids_and_those_of_unknown_steps_are_not_asked(column: Column) -> None:
    assert not [what for what, _ in NumericCoder.questions(column, 4) if what.startswith("round")]
    assert len(Grid.of(column).steps) == 1


def test_steps_count_from_zero_wherever_the_grid_begins() -> None:
    """Tenths from −7.5 on: whole numbers are multiples of ten steps."""
    column = Column("x", "decimal", lower=-7.5, upper=992.5, step=0.1)
    rng = np.random.default_rng(8)
    table, codec = fitted(rng.integers(-7, 990, ROWS).astype(float), 0.5, column)
    made = codec.decode(codec.encode(table), rng).frame["x"].to_numpy(float)
    assert (made == np.round(made)).mean() > 0.98


def test_a_codec_of_before_draws_evenly() -> None:
    _, codec = fitted(drawn(ROUND["mixed"], np.random.default_rng(9)), 1.0)
    state = json.loads(json.dumps(codec.to_dict()))
    del state["columns"]["pay"]["weights"]
    (coder,) = Codec.from_dict(codec.schema, state).coders
    assert isinstance(coder, NumericCoder)
    np.testing.assert_array_equal(coder.weights, np.ones((STRETCHES, len(Grid.of(PAY).steps))))
