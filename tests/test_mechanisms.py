"""Noisy counts: exact sums on a grid, so that the noise never tells which count it was added to."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer
from dpsynth.randomness import secure_stream, stream

MOST = 2**42 - 1
sigmas = st.floats(1e-6, 2.0**38)
counts = st.integers(-MOST, MOST - 1)


def released(values: list[int], sigma: float, key: int) -> np.ndarray:
    return HistogramNoise(sigma, stream(key, "x"), 1)(np.array(values, dtype=float))


@settings(max_examples=200)
@given(st.lists(counts, min_size=1, max_size=8), sigmas, st.integers(0, 2**64))
def test_one_row_more_moves_the_same_noise_by_exactly_one(
    values: list[int], sigma: float, key: int
) -> None:
    """So the law of output - count is the same for all counts: nothing but the sum is released."""
    before = released(values, sigma, key)
    after = released([value + 1 for value in values], sigma, key)
    np.testing.assert_array_equal(after - before, 1)


@settings(max_examples=200)
@given(st.lists(counts, min_size=1, max_size=8), sigmas, st.integers(0, 2**64))
def test_the_output_is_the_count_plus_noise_on_the_grid_in_exact_arithmetic(
    values: list[int], sigma: float, key: int
) -> None:
    found = released(values, sigma, key)
    noise = sigma * stream(key, "x").standard_normal(len(values))
    for value, drawn, out in zip(values, noise, found, strict=True):
        assert Fraction(float(out)) == value + Fraction(round(Fraction(drawn) * 1024), 1024)


@pytest.mark.parametrize("sigma", [0.7, 30.0, 2.0**38])
def test_noise_under_a_secure_stream_has_the_scale_of_the_plan(sigma: float) -> None:
    noise = HistogramNoise(sigma, secure_stream(5 << 190, "x"), 1)
    drawn = noise(np.full(30_000, 12.0)) - 12
    assert stats.kstest(drawn, stats.norm(0, sigma).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn, stats.norm(0, wrong * sigma).cdf).pvalue < 1e-12


def test_noise_far_below_the_grid_is_none_at_all() -> None:
    """What rounding may do: less noise is shown, none is added."""
    np.testing.assert_array_equal(released([3, 5], 1e-6, 0), [3, 5])


@pytest.mark.parametrize("value", [0.5, 1 + 2**-40, 2.0**42, -(2.0**42), math.inf, math.nan])
@pytest.mark.parametrize("mu", [1.0, math.inf])
def test_counts_that_are_none_are_refused_without_saying_what_they_were(
    value: float, mu: float
) -> None:
    """A weight, a mean or a sum out of range would not be hidden by the grid."""
    noise = Measurer(Ledger(1e-5), mu, 1, stream(0, "x")).histograms("x", 1)
    with pytest.raises(UsageError, match="whole numbers below 2\\^42") as refusal:
        noise(np.array([7.0, value]))
    assert str(value) not in str(refusal.value)
    # Nothing was drawn and nothing used up.
    again = noise(np.array([7.0]))
    plain = Measurer(Ledger(1e-5), mu, 1, stream(0, "x")).histograms("x", 1)
    np.testing.assert_array_equal(again, plain(np.array([7.0])))


@pytest.mark.parametrize("sigma", [2.0**38 * 1.001, 1e300])
def test_noise_too_wide_to_be_added_exactly_is_refused(sigma: float) -> None:
    with pytest.raises(UsageError, match=r"sigma=.*cannot be added exactly"):
        HistogramNoise(sigma, stream(0, "x"), 1)
