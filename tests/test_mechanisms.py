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
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer, Purse
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


# Several parts of a budget


def measurer_of(mu: float, parts: int = 1) -> tuple[Ledger, Measurer]:
    ledger = Ledger(1e-5)
    return ledger, Measurer(ledger, mu, parts, stream(0, "x"))


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("queries", [1, 3])
def test_several_parts_are_one_event_of_their_squared_sum(parts: int, queries: int) -> None:
    """μ_i² = μ²·parts/total, and σ of a count √queries/μ_i."""
    ledger, measurer = measurer_of(2.0, 7)
    noise = measurer.histograms("x", queries, parts)
    (event,) = ledger.events
    assert event.sigma == pytest.approx(1 / (2 * math.sqrt(parts / 7)))
    assert noise.sigma == pytest.approx(math.sqrt(queries) * event.sigma)
    rest = measurer.histograms("rest", 1, 7 - parts)
    assert 1 / event.sigma**2 + 1 / rest.sigma**2 == pytest.approx(4.0)
    with pytest.raises(UsageError, match=r"more: parts=7 of the budget are spent already"):
        measurer.histograms("more", 1)


def test_parts_that_are_none_or_too_many_are_refused_and_cost_nothing() -> None:
    ledger, measurer = measurer_of(1.0, 3)
    for parts, part in ((0, "parts=0"), (-1, "parts=-1"), (1.5, "parts=1.5"), (4, "parts=3")):
        with pytest.raises(UsageError, match=part):
            measurer.histograms("x", 1, parts)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="queries=0"):
        measurer.histograms("x", 0)
    assert not ledger.events
    measurer.histograms("x", 1, 3)


# A purse


def test_a_purse_is_paid_as_one_event_and_spent_without_another() -> None:
    ledger, measurer = measurer_of(0.5, 3)
    measurer.histograms("first", 1)
    purse = measurer.purse("tables")
    assert isinstance(purse, Purse)
    assert [event.what for event in ledger.events] == ["first", "tables"]
    assert ledger.events[1].sigma == pytest.approx(1 / (0.5 * math.sqrt(2 / 3)))
    sigma = ledger.events[1].sigma
    assert purse.histograms(0.25).sigma == pytest.approx(2 * sigma)
    assert purse.histograms(0.5, 8).sigma == pytest.approx(4 * sigma)
    assert len(ledger.events) == 2
    assert purse.left == pytest.approx(0.25)
    for again in (measurer.purse, lambda what: measurer.histograms(what, 1)):
        with pytest.raises(UsageError, match="more: parts=3 of the budget are spent already"):
            again("more")


@pytest.mark.parametrize("share", [0.0, -0.1, math.nan, math.inf])
@pytest.mark.parametrize("mu", [1.0, math.inf])
def test_a_share_that_is_none_is_refused(share: float, mu: float) -> None:
    purse = measurer_of(mu)[1].purse("tables")
    with pytest.raises(UsageError, match="share="):
        purse.histograms(share)
    assert purse.left == 1.0


@pytest.mark.parametrize("mu", [1.0, math.inf])
def test_an_empty_purse_pays_nothing_however_small(mu: float) -> None:
    purse = measurer_of(mu)[1].purse("tables")
    with pytest.raises(UsageError, match=r"tables: share=1\.5 is more than 1, the rest"):
        purse.histograms(1.5)
    with pytest.raises(UsageError, match="queries=0"):
        purse.histograms(0.5, 0)
    purse.histograms(1.0)
    for share in (1e-3, 1e-9, 1e-12, 1e-300):
        with pytest.raises(UsageError, match=r"is more than 0, the rest"):
            purse.histograms(share)


def test_a_purse_without_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="tables: has no budget"):
        measurer_of(0.0)[1].purse("tables")


def test_a_purse_without_noise_adds_none() -> None:
    ledger, measurer = measurer_of(math.inf)
    purse = measurer.purse("tables")
    assert purse.sigma(0.1, 5) == 0
    np.testing.assert_array_equal(purse.histograms(0.1, 2)(np.array([3.0, 4.0])), [3, 4])
    assert [event.mechanism for event in ledger.events] == ["none"]


def test_one_noise_is_for_as_many_histograms_as_were_paid() -> None:
    noise = measurer_of(1.0)[1].purse("tables").histograms(0.5, 2)
    noise(np.zeros(3))
    noise(np.zeros(4))
    with pytest.raises(UsageError, match="queries=2 of this noise are used up"):
        noise(np.zeros(3))
