"""Leaves of a long grid: what is asked, and masses against dense least squares."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsynth.leaves import FANOUT, grow_leaves


class Asked:
    """Counts rows by their cells, with noise, and keeps what it told."""

    def __init__(self, cells: np.ndarray, sigma: float, seed: int = 0) -> None:
        self.cells, self.sigma, self.rng = np.sort(cells), sigma, np.random.default_rng(seed)
        self.told: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, starts: np.ndarray) -> np.ndarray:
        exact = np.diff(np.append(np.searchsorted(self.cells, starts), len(self.cells)))
        self.told.append((starts, exact + self.sigma * self.rng.standard_normal(len(starts))))
        return self.told[-1][1]


def all_free(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    return last - first


def grown(asked: Asked, cells: int, heavy: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    depth = math.ceil(math.log(cells, FANOUT))
    return grow_leaves(asked, all_free, cells, depth, lambda: (float(len(asked.cells)), heavy))


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=200),
    st.sampled_from([0.0, 1.0, 20.0]),
    st.sampled_from([1.0, 10.0, 1e9]),
)
def test_every_row_is_in_one_stretch_of_each_histogram(
    rows: list[int], sigma: float, heavy: float
) -> None:
    """So one row more or less changes one count by 1, whatever was answered before."""
    asked = Asked(np.array(rows), sigma)
    starts, mass, variance = grown(asked, 100, heavy)
    assert len(asked.told) == math.ceil(math.log(100, FANOUT))
    for begun, _ in asked.told:
        assert begun[0] == 0
        assert (np.diff(begun) > 0).all()
        assert set(begun) <= set(starts)
    assert starts[-1] < 100
    assert (mass >= 0).all()
    assert mass.sum() == pytest.approx(len(rows))
    assert ((variance <= 1) & (variance >= 1 / len(asked.told))).all()


@given(st.lists(st.integers(0, 99), min_size=1, max_size=200), st.sampled_from([1.0, 10.0]))
def test_without_noise_masses_are_counts(rows: list[int], heavy: float) -> None:
    """And no leaf that could be split is heavier than it should be."""
    asked = Asked(np.array(rows), 0.0)
    starts, mass, _ = grown(asked, 100, heavy)
    edges = np.append(np.searchsorted(np.sort(rows), starts), len(rows))
    np.testing.assert_allclose(mass, np.diff(edges), atol=1e-9)
    assert (mass[np.diff(np.append(starts, 100)) > 1] <= heavy + 1e-9).all()


@pytest.mark.parametrize("seed", range(5))
def test_masses_are_the_least_squares_of_all_that_was_told(seed: int) -> None:
    """Rows enough that no mass comes near 0; leaves of unequal depth."""
    rng = np.random.default_rng(seed)
    rows = np.r_[rng.integers(0, 256, 20_000), rng.integers(0, 32, 20_000)]
    asked = Asked(rows, 20.0, seed)
    starts, mass, variance = grown(asked, 256, 2_000.0)
    assert len(set(np.diff(np.append(starts, 256)))) > 1
    assert len(set(variance)) > 1
    design, target = [], []
    for begun, told in asked.told:
        inside = np.searchsorted(begun, starts, side="right") - 1
        design.append(inside == np.arange(len(begun))[:, None])
        target.append(told)
    told, seen = np.concatenate(target), np.concatenate(design).astype(float)
    # The nearest masses with the right sum, by Lagrange's multiplier.
    size = len(starts)
    system = np.block([[seen.T @ seen, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
    wanted = np.linalg.solve(system, np.append(seen.T @ told, len(rows)))[:size]
    assert (mass > 100).all()
    np.testing.assert_allclose(mass, wanted, rtol=1e-9)


def test_stretches_that_cannot_hold_rows_are_not_asked_and_get_none() -> None:
    taken = np.r_[np.arange(16, 32), 40]

    def free(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        held = np.searchsorted(taken, last) - np.searchsorted(taken, first)
        return last - first - held

    rows = np.random.default_rng(0).integers(0, 64, 5_000)
    asked = Asked(rows[~np.isin(rows, taken)], 5.0)
    starts, mass, _ = grow_leaves(asked, free, 64, 3, lambda: (float(len(asked.cells)), 50.0))
    assert mass[starts == 16] == 0
    assert mass[starts == 40] == 0
    assert all(16 not in begun for begun, _ in asked.told)
    assert 40 not in asked.told[-1][0]
    assert mass.sum() == pytest.approx(len(asked.cells))


def test_leaves_that_are_not_split_are_counted_again() -> None:
    """Histograms that the tree has no use for lower the noise: four of one size, half of it."""
    rows = np.repeat(np.arange(4), 1_000) * 64
    once = [_one(rows, seed) for seed in range(200)]
    again = [grown(Asked(rows, 30.0, seed), 256, 1e9)[1] for seed in range(200)]
    ratio = np.std(again) / np.std(once)
    assert 0.42 < ratio < 0.58


def _one(rows: np.ndarray, seed: int) -> np.ndarray:
    counts = Asked(rows, 30.0, seed)(np.arange(0, 256, 64))
    return counts - (counts.sum() - len(rows)) / 4
