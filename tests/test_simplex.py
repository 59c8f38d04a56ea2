"""Projection onto the simplex, against bisection."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from oracles import by_bisection

from dpsynth.simplex import onto_simplex


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=12), st.floats(1, 1e4))
def test_projection_is_the_nearest_point(counts: list[float], total: float) -> None:
    point = np.array(counts)
    found = onto_simplex(point, total)
    assert (found >= 0).all()
    np.testing.assert_allclose(found, by_bisection(point, total), atol=1e-6)
    # Nothing on the simplex is nearer (Duchi et al. 2008): the corners are all farther away.
    for corner in np.eye(len(counts)):
        inner = (point - found) @ (corner * total - found)
        assert inner <= 1e-6 * max(1.0, total * np.abs(counts).max())


@given(
    st.lists(
        st.lists(st.floats(-1e4, 1e4) | st.just(-math.inf), min_size=3, max_size=3), min_size=1
    ),
    st.floats(1, 1e4),
)
def test_each_row_by_itself(counts: list[list[float]], total: float) -> None:
    """Without those that may have nothing."""
    table = np.array(counts)
    table[:, 0] = np.maximum(table[:, 0], -1e4)
    totals = total * np.arange(1, len(table) + 1)
    found = onto_simplex(table, totals)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(axis=1), totals)
    for row, whole, shared in zip(table, totals, found, strict=True):
        some = np.isfinite(row)
        assert (shared[~some] == 0).all()
        np.testing.assert_allclose(shared[some], by_bisection(row[some], whole), atol=1e-6)


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0.1, 10)), min_size=1, max_size=12),
    st.floats(1, 1e3),
)
def test_distances_are_weighed_by_variances(
    points: list[tuple[float, float]], total: float
) -> None:
    """The conditions of optimality (Karush, Kuhn & Tucker): one multiplier for all that are above
    0, and for the others none that would move them there."""
    counts, spread = np.array(points).T
    found = onto_simplex(counts, total, spread)
    assert (found >= 0).all()
    assert abs(found.sum() - total) < 1e-6 * total
    force = (counts - found) / spread
    some = found > 1e-9
    assert np.ptp(force[some]) < 1e-5
    assert (force[~some] <= force[some].max() + 1e-5).all()


def test_of_nothing_there_is_nothing() -> None:
    np.testing.assert_array_equal(onto_simplex(np.array([[3.0, -1.0]]), np.zeros(1)), 0)
