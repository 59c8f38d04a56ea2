"""Measured baselines and SMOTE: what they choose, how they fit, and what it costs."""

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from fleets import make_fleet, random_marginals
from oracles import chi_square, total_variation
from scipy import stats
from torch import Tensor

from dpsynth.baselines import graphical
from dpsynth.baselines.copula import Copula, Correlated, nearest_correlation, polychoric
from dpsynth.baselines.smote import smote
from dpsynth.baselines.tree import (
    Branches,
    Tree,
    combined,
    consistent,
    one_way_counts,
    shares_by_size,
)
from dpsynth.checks import RefusedError, UsageError
from dpsynth.codec import Layout
from dpsynth.data import Table
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import Measurer, Purse
from dpsynth.privacy.plan import NoPrivacy
from dpsynth.randomness import FleetRng, stream
from dpsynth.release.verify import verify
from dpsynth.schema import Column, Schema
from dpsynth.survey import Survey
from dpsynth.training.expected import expected_events
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import FAMILIES, Recipe, build
from dpsynth.training.run import Run

LAYOUT = Layout((2, 3, 4, 3, 2), target=0)
NO_TARGET = Layout((2, 3, 4, 3, 2), target=None)
FAMILY = ("tree", "copula", "mst", "aim")


def purse(mu: float, key: int = 0) -> Purse:
    return Measurer(Ledger(1e-5), mu, 1, stream(key, "purse")).purse("tables")


def survey(codes: Tensor, layout: Layout, mu: float, key: int = 0) -> Survey:
    """As a training would make it, with the same μ for label tables and purse."""
    used = torch.ones(layout.width, dtype=torch.bool)
    answers = Measurer(Ledger(1e-5), mu, Marginals.asked(layout), stream(key, "marginals"))
    names = [str(j) for j in range(layout.columns)]
    marginals = Marginals.measure(codes, layout, used, answers, names)
    return Survey([codes], layout, used, marginals, purse(mu, key))


def fitted(family: str, asked: Survey, **options: Any) -> Any:
    """One run, prepared from a survey."""
    plan = NoPrivacy(int(asked.marginals.rows))
    found = FAMILIES[family].survey(asked, plan, options, "cpu")
    model = FAMILIES[family](asked.layout, 1, **options)
    model.prepare([asked.marginals], [asked.used], FleetRng([0]), [found])
    return model


def distance(first: np.ndarray, second: np.ndarray) -> float:
    return total_variation(first.ravel(), second.ravel() / second.sum())


def table_of(codes: np.ndarray, columns: Sequence[int], layout: Layout) -> np.ndarray:
    counts = np.zeros([layout.levels[c] for c in columns])
    np.add.at(counts, tuple(codes[:, c] for c in columns), 1)
    return counts


# The exponential mechanism


def chances(scores: np.ndarray, epsilon: float) -> np.ndarray:
    weight = np.exp(epsilon / 2 * (scores - scores.max()))
    return weight / weight.sum()


def epsilon_of(mu: float) -> float:
    return 2 * float(stats.norm.logcdf(mu / 2) - stats.norm.logcdf(-mu / 2))


def excess(first: np.ndarray, second: np.ndarray) -> float:
    """Largest μ that a best test between two distributions needs: over all Neyman-Pearson tests,
    Φ⁻¹(1 - α) - Φ⁻¹(β)."""
    order = np.argsort(second / first)
    alpha, beta = 1 - np.cumsum(first[order])[:-1], np.cumsum(second[order])[:-1]
    return float(np.max(stats.norm.isf(alpha) - stats.norm.ppf(beta)))


@pytest.mark.parametrize("mu", [0.01, 0.1, 0.5, 2.0, 5.0])
def test_no_test_tells_two_neighbouring_choices_apart_better_than_mu(mu: float) -> None:
    """Against the best test there is, on scores that a row moves as far as it may."""
    rng, epsilon = np.random.default_rng(0), epsilon_of(mu)
    worst = 0.0
    for size in (2, 3, 20):
        for _ in range(100):
            scores = rng.normal(0, 3 / epsilon, size)
            moved = scores + rng.choice([-1, 1, 0, rng.uniform(-1, 1)], size)
            worst = max(worst, excess(chances(scores, epsilon), chances(moved, epsilon)))
    assert worst <= mu * (1 + 1e-9)
    # One pair needs all of it.
    two = [chances(np.array(pair), epsilon) for pair in ((0.5, -0.5), (-0.5, 0.5))]
    assert excess(*two) == pytest.approx(mu, rel=1e-9)


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 4.0, 12.0])
def test_of_all_two_point_pairs_of_a_range_the_even_one_is_hardest(epsilon: float) -> None:
    """The claim of the proof, on a grid of t."""
    t = np.linspace(0, epsilon, 4001)[1:-1]
    b = -np.expm1(t - epsilon) / (np.exp(t) * -np.expm1(-epsilon))
    a = np.exp(t - epsilon) * (1 - b)
    np.testing.assert_allclose(1 - a, np.exp(t) * b, rtol=1e-9)
    mu = stats.norm.isf(a) - stats.norm.ppf(b)
    assert epsilon_of(float(mu.max())) == pytest.approx(epsilon, rel=1e-6)
    assert abs(t[mu.argmax()] - epsilon / 2) <= epsilon / 2000
    slope = np.diff(np.log(stats.norm.cdf(x := np.linspace(0, 6, 500))) - stats.norm.logsf(x))
    assert (np.diff(slope) > 0).all(), "s is convex"


def test_places_are_drawn_as_often_as_their_scores_say() -> None:
    scores, spent = np.array([0.0, 1.0, 3.0, -2.0, 3.0]) * 2.5, purse(2.0)
    share, draws = 1 / 20_001, 20_000
    places = [spent.choose(scores, share, sensitivity=2.5) for _ in range(draws)]
    law = chances(scores / 2.5, epsilon_of(2.0 * math.sqrt(share)))
    assert chi_square(np.bincount(places, minlength=5), law) > 1e-3
    strong = purse(8.0)
    places = [strong.choose(scores / 2.5, 1 / 1001) for _ in range(1000)]
    law = chances(scores / 2.5, epsilon_of(8.0 / math.sqrt(1001)))
    assert chi_square(np.bincount(places, minlength=5), law) > 1e-3


def test_a_choice_is_paid_from_the_purse() -> None:
    spent = purse(1.0)
    spent.choose(np.zeros(3), 0.25)
    assert spent.left == pytest.approx(0.75)
    spent.histograms(0.75)
    with pytest.raises(UsageError, match=r"share=0\.1 is more than 0, the rest"):
        spent.choose(np.zeros(3), 0.1)
    assert purse(math.inf).choose(np.array([1.0, 7.0, 3.0]), 0.5) == 1
    for scores in (np.array([]), np.array([1.0, math.nan]), np.array([math.inf])):
        with pytest.raises(UsageError, match="scores: must be finite"):
            spent.choose(scores, 0.1)
    for settings, part in (({"share": 0.0}, "share=0"), ({"sensitivity": 0.0}, "sensitivity=0")):
        with pytest.raises(UsageError, match=part):
            purse(1.0).choose(np.zeros(2), **{"share": 0.1, **settings})


# What noisy tables say together


def test_one_way_counts_weigh_each_table_by_its_noise() -> None:
    """Against the formula, cell by cell; and they lie nearer to the truth than any one table."""
    rng, layout = np.random.default_rng(1), Layout((2, 3, 4), target=0)
    masks = [np.ones(n, bool) for n in layout.levels]
    masks[2][1] = False
    truth = rng.multinomial(90_000, np.full(24, 1 / 24)).reshape(2, 3, 4).astype(float)
    truth[..., 1] = 0
    rows, errors = truth.sum(), []
    for _ in range(60):
        tables = [
            NoisyTable((0, 1), truth.sum(2) + rng.normal(0, 30, (2, 3)), 30.0),
            NoisyTable((1, 2), truth.sum(0) + rng.normal(0, 60, (3, 4)), 60.0),
            NoisyTable((2,), truth.sum((0, 1)) + rng.normal(0, 80, 4), 80.0),
        ]
        found = one_way_counts(tables, layout, masks, rows)
        first, second = tables[0].counts.sum(0), tables[1].counts[:, masks[2]].sum(1)
        weight = np.array([1 / (2 * 30**2), 1 / (3 * 60**2)])
        pooled = (weight[0] * first + weight[1] * second) / weight.sum()
        # Thick counts: nearest point with the right sum is a shift.
        np.testing.assert_allclose(found[1], pooled + (rows - pooled.sum()) / 3)
        assert found[2][1] == 0
        assert all(counts.sum() == pytest.approx(rows) for counts in found)
        exact = truth.sum((0, 2))
        errors.append([np.abs(x - exact).sum() for x in (found[1], first, second)])
    pooled, first, second = np.mean(errors, axis=0)
    assert pooled < first < second


def test_tables_of_one_pair_are_one_by_the_inverse_of_their_variances() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    tables = [NoisyTable((0, 1), a, 1.0), NoisyTable((1, 0), b, 2.0), NoisyTable((0, 2), a, 1.0)]
    counts, sigma = combined(tables, (0, 1))
    np.testing.assert_allclose(counts, (a + b.T / 4) / 1.25)
    assert sigma == pytest.approx(math.sqrt(1 / 1.25))


@pytest.mark.parametrize("sigma", [0.0, 5.0, 200.0])
def test_a_fitted_pair_has_its_margins_and_no_negative_cell(sigma: float) -> None:
    rng = np.random.default_rng(2)
    masks = np.array([1, 1, 0, 1], bool), np.array([1, 0, 1], bool)
    truth = rng.integers(0, 300, (4, 3)) * np.outer(*masks)
    truth[3] = [7, 0, 0]
    margins = truth.sum(1).astype(float), truth.sum(0).astype(float)
    found = consistent(truth + rng.normal(0, 1, (4, 3)) * sigma, *margins, *masks)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), margins[0], rtol=1e-9, atol=1e-6)
    np.testing.assert_allclose(found.sum(0), margins[1], rtol=1e-2, atol=1e-6)
    if sigma == 0:
        np.testing.assert_allclose(found, truth, atol=1e-4)
    empty = consistent(np.ones((2, 2)), np.zeros(2), np.zeros(2), *[np.ones(2, bool)] * 2)
    np.testing.assert_array_equal(empty, 0)


def test_shares_follow_the_rows_that_noise_can_move() -> None:
    codes = torch.zeros(1000, 5, dtype=torch.int16)
    asked = survey(codes, LAYOUT, 0.05)
    flat, few = np.full((4, 4), 100.0), np.zeros((4, 4))
    few[0, 0] = 1600.0
    shares = shares_by_size([flat, few], asked, 0.5)
    assert sum(shares) == pytest.approx(0.5) and sum(shares) <= 0.5
    sigma = 1 / (0.05 * math.sqrt(0.25))
    blurred = [16 * math.sqrt(2 / math.pi) * sigma, math.sqrt(2 / math.pi) * sigma]
    assert shares[0] / shares[1] == pytest.approx((blurred[0] / blurred[1]) ** (2 / 3))


# Tree


def known_tree(rows: int, seed: int = 0) -> tuple[Tensor, set[frozenset[int]]]:
    """Rows of a tree over the columns of `LAYOUT` whose edges are far from independence."""
    rng, levels = np.random.default_rng(seed), LAYOUT.levels
    parents = {0: None, 3: 0, 1: 3, 2: 3, 4: 1}
    codes = np.zeros((rows, 5), dtype=np.int64)
    for column, parent in parents.items():
        above = np.zeros(rows, int) if parent is None else codes[:, parent]
        law = rng.dirichlet(np.full(levels[column], 0.4), 4)
        law = 0.8 * law + 0.2 / levels[column]
        law[:2] = np.roll(np.eye(levels[column]), 1, 0)[:2] * 0.5 + 0.5 * law[:2]
        ends = law.cumsum(1)[above]
        codes[:, column] = (rng.random(rows)[:, None] * ends[:, -1:] > ends).sum(1)
    edges = {frozenset((j, p)) for j, p in parents.items() if p is not None}
    return torch.from_numpy(codes).to(torch.int16), edges


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET], ids=["target", "none"])
@pytest.mark.parametrize("mu", [math.inf, 2.0])
def test_a_tree_finds_the_tree_that_rows_come_from(layout: Layout, mu: float) -> None:
    codes, edges = known_tree(20_000)
    model = fitted("tree", survey(codes, layout, mu))
    parents = model.parent[0].tolist()
    assert {frozenset((j, p)) for j, p in enumerate(parents) if j != p} == edges
    assert parents[0] == 0
    rows = codes.numpy()
    made = model.sample(20_000, FleetRng([1]))[0].numpy()
    for pair in itertools.combinations(range(5), 2):
        within = 0.006 if frozenset(pair) in edges else 0.02
        assert distance(table_of(made, pair, layout), table_of(rows, pair, layout)) < within


def test_without_noise_a_trees_conditionals_are_the_rows_own() -> None:
    codes, _ = known_tree(5000)
    model = fitted("tree", survey(codes, LAYOUT, math.inf))
    assert isinstance(model, Tree)
    loss = model.record_loss(codes[None].long(), FleetRng([0]))[0].numpy()
    rows, expected = codes.numpy(), np.zeros(5000)
    for column, parent in enumerate(model.parent[0].tolist()):
        own = table_of(rows, [column], LAYOUT) / 5000
        law = own[rows[:, column]]
        if parent != column:
            pair = table_of(rows, [parent, column], LAYOUT)
            given = pair / pair.sum(1, keepdims=True)
            law = 0.999 * given[rows[:, parent], rows[:, column]] + 0.001 * law
        expected -= np.log(law)
    np.testing.assert_allclose(loss, expected, atol=2e-4)


def test_of_all_spanning_trees_a_tree_takes_the_best() -> None:
    """By trying every set of edges."""
    from dpsynth.baselines.tree import _spanning

    rng, pairs = np.random.default_rng(3), list(itertools.combinations(range(5), 2))
    for _ in range(20):
        worth = rng.normal(0, 100, len(pairs)).round(1)
        value = dict(zip(pairs, worth, strict=True))
        best = max(
            sum(value[edge] for edge in edges)
            for edges in itertools.combinations(pairs, 4)
            if _connected(edges)
        )
        found = _spanning(pairs, worth.tolist(), 5)
        assert len(found) == 4 and _connected(found)
        assert sum(value[edge] for edge in found) == pytest.approx(best)


def _connected(edges: Sequence[tuple[int, int]]) -> bool:
    reached = {0}
    for _ in range(5):
        reached |= {b for edge in edges for a, b in (edge, edge[::-1]) if a in reached}
    return len(reached) == 5


def test_a_tree_draws_each_level_as_often_as_it_is_due() -> None:
    """Given the parent's level, but for less than one row and the thousandth of smoothing."""
    codes, _ = known_tree(8000)
    model = fitted("tree", survey(codes, LAYOUT, math.inf))
    made = model.sample(8000, FleetRng([5]))[0].numpy()
    block = model.branch_logits[0].exp().numpy()
    for column, parent in enumerate(model.parent[0].tolist()):
        start, levels = LAYOUT.offsets[column], LAYOUT.levels[column]
        above = made[:, parent] if parent != column else np.zeros(8000, int)
        for level in np.unique(above):
            drawn = np.bincount(made[above == level, column], minlength=levels)
            due = block[start : start + levels, level] * (above == level).sum()
            assert np.abs(drawn - due).max() < 1.01


def test_trees_of_one_fleet_may_differ() -> None:
    codes, _ = known_tree(4000)
    asked = survey(codes, LAYOUT, math.inf)
    found = Tree.survey(asked, NoPrivacy(4000), {}, "cpu")
    other = Branches(
        (0, 0, 1, 2, 3),
        tuple(
            np.full((LAYOUT.levels[p] if j else 1, n), 1 / n)
            for j, (p, n) in enumerate(zip((0, 0, 1, 2, 3), LAYOUT.levels, strict=True))
        ),
    )
    both = Tree(LAYOUT, 2)
    both.prepare([asked.marginals] * 2, [asked.used] * 2, FleetRng([1, 2]), [found, other])
    for run, (branches, key) in enumerate(((found, 1), (other, 2))):
        alone = Tree(LAYOUT, 1)
        alone.prepare([asked.marginals], [asked.used], FleetRng([key]), [branches])
        for given in ({}, {0: 1}):
            rows = both.sample(300, FleetRng([1, 2]), given)[run]
            assert torch.equal(rows, alone.sample(300, FleetRng([key]), given)[0])


# Copula


def cells(correlation: float, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mass of each rectangle of a bivariate normal, by SciPy."""
    law = stats.multivariate_normal([0, 0], [[1, correlation], [correlation, 1]])
    a, b = (stats.norm.ppf(np.r_[0, np.cumsum(p)].clip(1e-15, 1 - 1e-15)) for p in (first, second))
    corner = law.cdf(np.stack(np.meshgrid(a, b, indexing="ij"), -1))
    return np.diff(np.diff(corner, axis=0), axis=1)


@pytest.mark.parametrize("correlation", [-0.9, -0.4, 0.0, 0.25, 0.7, 0.93])
def test_a_polychoric_correlation_is_that_of_the_cells(correlation: float) -> None:
    first, second = np.array([0.1, 0.35, 0.0, 0.55]), np.array([0.5, 0.2, 0.2, 0.1])
    exact = 10_000 * cells(correlation, first, second)
    assert polychoric(exact, first, second, 0.0) == pytest.approx(correlation, abs=5e-3)
    rng = np.random.default_rng(4)
    noisy = [
        polychoric(exact + rng.normal(0, 60, exact.shape), first, second, 60.0) for _ in "x" * 30
    ]
    assert np.mean(noisy) == pytest.approx(correlation, abs=0.03)


def test_the_nearest_correlation_matrix() -> None:
    """None of many others is nearer; one that is fine stays as it is."""
    rng = np.random.default_rng(5)
    broken = np.array([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])
    found = nearest_correlation(broken)
    np.testing.assert_allclose(np.diag(found), 1)
    assert np.linalg.eigvalsh(found).min() > 0
    for _ in range(300):
        factor = np.linalg.cholesky(found) + rng.normal(0, rng.choice([0.01, 0.1, 1]), (3, 3))
        factor /= np.linalg.norm(factor, axis=1, keepdims=True)
        other = factor @ factor.T
        if np.linalg.eigvalsh(other).min() >= 1e-3:
            assert np.linalg.norm(found - broken) <= np.linalg.norm(other - broken) + 1e-3
    fine = np.array([[1, 0.3, 0.1], [0.3, 1, -0.5], [0.1, -0.5, 1]])
    np.testing.assert_allclose(nearest_correlation(fine), fine, atol=1e-9)


def known_copula(rows: int, layout: Layout = LAYOUT) -> tuple[Tensor, np.ndarray]:
    """Rows of a Gaussian copula whose levels lie in their own order."""
    rng = np.random.default_rng(6)
    loading = np.array([0.8, 0.6, 0.7, 0.5, 0.3])
    correlation = np.outer(loading, loading)
    np.fill_diagonal(correlation, 1)
    normals = rng.multivariate_normal(np.zeros(5), correlation, rows)
    cuts = [np.linspace(0, 1, n + 1)[1:-1] ** 1.3 for n in layout.levels]
    columns = [np.searchsorted(stats.norm.ppf(c), z) for c, z in zip(cuts, normals.T, strict=True)]
    return torch.from_numpy(np.stack(columns, 1)).to(torch.int16), correlation


@pytest.mark.parametrize("mu", [math.inf, 2.0])
def test_a_copula_finds_the_copula_that_rows_come_from(mu: float) -> None:
    codes, correlation = known_copula(30_000)
    values = torch.cat([torch.arange(n).double() for n in LAYOUT.levels])
    asked = [survey(codes, LAYOUT, mu) for _ in range(2)]
    for one in asked:
        one.marginals = replace(one.marginals, values=values)
    found = Copula.survey(asked[0], NoPrivacy(30_000), {}, "cpu")
    np.testing.assert_allclose(found.correlation, correlation, atol=0.03)
    model = fitted("copula", asked[1])
    rows = codes.numpy()
    made = model.sample(30_000, FleetRng([2]))[0].numpy()
    for pair in itertools.combinations(range(5), 2):
        assert distance(table_of(made, pair, LAYOUT), table_of(rows, pair, LAYOUT)) < 0.02


def test_a_given_target_gives_the_rows_that_have_it() -> None:
    codes, _ = known_copula(20_000)
    model = fitted("copula", survey(codes, LAYOUT, math.inf))
    free = model.sample(60_000, FleetRng([3]))[0].numpy()
    for level in range(2):
        fixed = model.sample(20_000, FleetRng([4]), {0: level})[0].numpy()
        assert (fixed[:, 0] == level).all()
        own = free[free[:, 0] == level]
        for pair in itertools.combinations(range(1, 5), 2):
            assert distance(table_of(fixed, pair, LAYOUT), table_of(own, pair, LAYOUT)) < 0.03


def test_categories_lie_in_the_order_of_the_targets_odds() -> None:
    """And without a target in that of their sizes; numbers in their own, missing ones last."""
    from dpsynth.baselines.copula import _order

    layout, bare = Layout((2, 4, 5), target=0), Layout((2, 4, 5), target=None)
    tables = random_marginals(layout, 9)
    given = tables.given[:, 2:6]
    odds = (given[1] / given[0]).numpy()
    found = _order(1, replace(tables, values=torch.full((11,), math.nan)), layout)
    assert found.tolist() in (np.argsort(odds).tolist(), np.argsort(-odds).tolist())
    alone = random_marginals(bare, 9)
    sizes = alone.given[0, 2:6].numpy()
    found = _order(1, replace(alone, values=torch.full((11,), math.nan)), bare)
    assert found.tolist() == np.argsort(-sizes).tolist()
    values = torch.tensor([math.nan] * 6 + [3.0, math.nan, 1.0, 2.0, 0.5]).double()
    assert _order(2, replace(tables, values=values), layout).tolist() == [4, 2, 3, 0, 1]


def test_a_copulas_loss_is_that_of_its_density_between_the_cells() -> None:
    """With many fine cells it nears the normal density itself, by SciPy."""
    layout, matrix = Layout((400, 400), None), np.array([[1, 0.6], [0.6, 1]])
    even, order = np.full(400, 1 / 400), np.arange(400)
    model = make_fleet("copula", layout, [1])
    assert isinstance(model, Copula)
    model._take_copula(
        0, Correlated((order, order[::-1]), (even, even), matrix), torch.ones(800, dtype=torch.bool)
    )
    codes = torch.tensor([[[200, 100], [30, 350], [399, 5]]])
    z = stats.norm.ppf((np.array([[200, 299], [30, 49], [399, 394]]) + 0.5) / 400)
    joint = stats.multivariate_normal([0, 0], matrix).logpdf(z)
    expected = -(joint - stats.norm.logpdf(z).sum(1) + 2 * np.log(1 / 400))
    np.testing.assert_allclose(model.record_loss(codes, FleetRng([1]))[0], expected, atol=1e-6)


# Pools


def pooled(rows: np.ndarray, layout: Layout = LAYOUT) -> graphical.Mst:
    model = graphical.Mst(layout, 1, pool=len(rows))
    tables = random_marginals(layout, 1)
    used = torch.ones(layout.width, dtype=torch.bool)
    model.prepare([tables], [used], FleetRng([1]), [torch.from_numpy(rows).to(torch.int16)])
    return model


def test_a_pool_is_drawn_without_replacement_as_often_as_it_takes() -> None:
    layout = Layout((2, 50), target=0)
    rows = np.stack([np.arange(50) % 5 == 0, np.arange(50)], axis=1).astype(np.int64)
    model = pooled(rows, layout)
    for number in (20, 50, 130):
        made = model.sample(number, FleetRng([2]))[0].numpy()
        often = np.bincount(made[:, 1], minlength=50)
        assert set(often) <= {number // 50, -(-number // 50)}
        np.testing.assert_array_equal(made[:, 0], made[:, 1] % 5 == 0)
    made = model.sample(25, FleetRng([2]), {0: 1})[0].numpy()
    assert (made[:, 0] == 1).all()
    assert set(np.bincount(made[:, 1])[::5]) == {2, 3}
    assert not torch.equal(model.sample(50, FleetRng([2])), model.sample(50, FleetRng([3])))


def test_a_target_level_that_no_row_of_the_pool_has_is_refused() -> None:
    model = pooled(np.zeros((30, 5), dtype=np.int64))
    with pytest.raises(UsageError, match="target level 1: no row of the pool"):
        model.sample(5, FleetRng([1]), {0: 1})


# Graphical models


def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes, _ = known_tree(500)
    monkeypatch.setitem(sys.modules, "mbi", None)
    with pytest.raises(UsageError, match=r"pip install 'dpsynth\[marginals\]'"):
        fitted("aim", survey(codes, LAYOUT, 1.0))


@pytest.mark.parametrize("mu", [math.inf, 2.0])
def test_mst_finds_the_tree_that_rows_come_from(mu: float) -> None:
    pytest.importorskip("mbi")
    codes, edges = known_tree(20_000)
    state = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]  # noqa: NPY002
    asked = survey(codes, LAYOUT, mu)
    model = fitted("mst", asked, pool=20_000)
    assert asked.purse.left < 1e-6
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]  # noqa: NPY002
    made = model.sample(20_000, FleetRng([1]))[0].numpy()
    for pair in itertools.combinations(range(5), 2):
        within = 0.015 if frozenset(pair) in edges else 0.03
        true = table_of(codes.numpy(), pair, LAYOUT)
        assert distance(table_of(made, pair, LAYOUT), true) < within


def parity(rows: int) -> Tensor:
    """Three columns of which any two are independent, and two that follow them."""
    rng = np.random.default_rng(7)
    a, b = rng.integers(0, 2, (2, rows))
    flips = rng.random((2, rows)) < 0.05
    columns = [a, b + rng.integers(0, 2, rows), (a ^ (b > 0)) ^ flips[0], a + b, b ^ flips[1]]
    return torch.from_numpy(np.stack(columns, 1)).to(torch.int16)


@pytest.mark.parametrize("mu", [math.inf, 3.0])
def test_aim_finds_what_no_pair_of_columns_shows(mu: float) -> None:
    """Tables of three columns, also of those whose pairs are independent; a purse spent to the
    end, and two tables of two columns where it may not choose larger ones."""
    pytest.importorskip("mbi")
    codes = parity(20_000)
    asked = survey(codes, LAYOUT, mu)
    model = fitted("aim", asked, pool=20_000, rounds=2)
    assert asked.purse.left < 1e-6
    made = model.sample(20_000, FleetRng([1]))[0].numpy()
    for triple in itertools.combinations(range(5), 3):
        true = table_of(codes.numpy(), triple, LAYOUT)
        assert distance(table_of(made, triple, LAYOUT), true) < 0.03


def test_aim_keeps_to_its_model_size() -> None:
    """So small that nothing but parts of what is measured fits: naive Bayes' pairs stay."""
    pytest.importorskip("mbi")
    codes = parity(5000)
    asked = survey(codes, LAYOUT, math.inf)
    fits: list[Any] = []

    class Seen(graphical.Aim):
        @classmethod
        def measure(cls, fit: Any, survey: Survey, options: Any) -> None:
            super().measure(fit, survey, options)
            fits.append(fit)

    Seen.survey(asked, NoPrivacy(5000), {"max_model_mb": 1e-6, "pool": 100, "rounds": 1}, "cpu")
    cliques = {measurement.clique for measurement in fits[0]._measured}
    assert all(len(clique) == 2 and 0 in clique for clique in cliques)


# All of them, end to end


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
@pytest.mark.parametrize("family", FAMILY)
def test_a_run_keeps_to_its_budget_and_is_what_it_was_saved_as(
    family: str, epsilon: float, tmp_path: Path
) -> None:
    if family in ("mst", "aim"):
        pytest.importorskip("mbi")
    options: dict[str, Any] = {"pool": 500} if family in ("mst", "aim") else {}
    if family == "aim":
        options["rounds"] = 1
    recipe = Recipe(family, options, {"delta": 1e-5}, device="cpu")
    (trained,) = train_fleet(recipe, [tiny.seat(epsilon)])
    events = expected_events(recipe, trained.codec.schema, trained.plan)
    assert [(e.what, e.mechanism, e.sigma) for e in trained.ledger.events] == [
        (e.what, e.mechanism, e.sigma) for e in events
    ]
    assert [e.what for e in events].count("tables") == 1
    assert trained.ledger.epsilon <= epsilon
    if math.isfinite(epsilon):
        assert trained.ledger.epsilon > 0.98 * epsilon
    run = Run.of(trained)
    run.save(tmp_path / "run")
    again = Run.load(tmp_path / "run")
    first, second = (r.sample(200, rng=3) for r in (run, again))
    pd.testing.assert_frame_equal(first, second)
    given = again.sample(50, where={"rich": "yes"}, rng=1)
    assert (given["rich"] == "yes").all()
    assert verify(tmp_path / "run").epsilon <= epsilon


@pytest.mark.parametrize("layout", [Layout((4,), 0), Layout((4,), None)])
@pytest.mark.parametrize("family", FAMILY)
def test_one_column_leaves_nothing_to_ask(family: str, layout: Layout) -> None:
    codes = torch.arange(4).repeat_interleave(25)[:, None].to(torch.int16)
    made = fitted(family, survey(codes, layout, math.inf)).sample(100, FleetRng([1]))
    assert np.abs(np.bincount(made[0, :, 0], minlength=4) - 25).max() < 20


@pytest.mark.parametrize("family", FAMILY)
def test_settings_that_make_no_sense_are_refused(family: str) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [({"components": 3}, f"components=3: model={family}")]
    if family in ("mst", "aim"):
        wrong.append(({"pool": 0}, "pool=0"))
    if family == "aim":
        wrong += [({"degree": 1}, "degree=1"), ({"max_model_mb": 0.0}, "max_model_mb=0")]
        wrong.append(({"rounds": 0}, "rounds=0"))
    for options, part in wrong:
        with pytest.raises(UsageError, match=part):
            build(Recipe(family, options), LAYOUT, 1)


# SMOTE


def lines(made: pd.DataFrame, members: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Whether each made row lies on a line between two members, all pairs tried."""
    real, rows = members[list(columns)].to_numpy(float), made[list(columns)].to_numpy(float)
    start, step = real[:, None], real[None] - real[:, None]
    length = np.maximum((step**2).sum(-1), 1e-30)
    found = []
    for row in rows:
        point = (((row - start) * step).sum(-1) / length).clip(0, 1)
        off = np.abs(start + point[..., None] * step - row).max(-1)
        found.append(off.min() < 1e-6)
    return np.array(found)


def members(rows: int = 60) -> Table:
    rng = np.random.default_rng(8)
    group = rng.random(rows) < 0.3
    schema = Schema(
        (
            Column("x", "decimal", lower=-10, upper=10),
            Column("y", "decimal", lower=-10, upper=10),
            Column("n", "integer", lower=0, upper=50, nullable=True),
            Column("c", "categorical", ("a", "b", "c"), nullable=True),
            Column("t", "categorical", ("no", "yes", "once")),
        ),
        target="t",
        expected_rows=rows,
    )
    frame = pd.DataFrame(
        {
            "x": rng.normal(np.where(group, 4, -4), 1),
            "y": rng.normal(0, 1, rows),
            "n": pd.array(rng.integers(0, 50, rows), dtype="Int64"),
            "c": rng.choice(["a", "b", "c"], rows),
            "t": np.where(group, "yes", "no"),
        }
    )
    frame.loc[::7, "n"] = pd.NA
    frame.loc[::9, "c"] = None
    frame.loc[0, "t"] = "once"
    return Table.from_frame(frame, schema)


def test_smote_rows_lie_between_rows_of_their_class() -> None:
    table = members()
    made = smote(table, 400, np.random.default_rng(0))
    assert Table.from_frame(made.frame, table.schema).digest() == made.digest()
    for level in ("no", "yes"):
        inside = [frame[frame["t"] == level] for frame in (made.frame, table.frame)]
        assert len(inside[0]) / 400 == pytest.approx(len(inside[1]) / 60, abs=0.08)
        assert lines(inside[0], inside[1], ["x", "y"]).all()
    # Rows of two classes have no line of their own in common.
    cross = made.frame[made.frame["t"] == "no"]
    assert cross["x"].max() < 0
    single = made.frame[made.frame["t"] == "once"]
    assert len(single) > 0
    assert (single["x"] == table.frame["x"][0]).all()
    assert made.frame["n"].isna().mean() == pytest.approx(1 / 7, abs=0.06)


def test_smote_takes_the_nearest_neighbours_by_the_papers_distance() -> None:
    """Every pair of rows by itself: standard deviations for numbers, one for a category."""
    from dpsynth.baselines.smote import _nearest

    table = members().take(np.arange(5, 30))
    frame = table.frame
    found = _nearest(table, 3)
    total = np.zeros((25, 25))
    for name in ("x", "y", "n"):
        values = frame[name].to_numpy(float, na_value=np.nan)
        scaled = np.nan_to_num((values - np.nanmean(values)) / np.nanstd(values))
        total += (scaled[:, None] - scaled) ** 2
        total += np.isnan(values)[:, None] != np.isnan(values)
    for name in ("c", "t"):
        text = frame[name].astype(object).fillna("missing").to_numpy()
        total += text[:, None] != text
    np.fill_diagonal(total, np.inf)
    by_hand = np.sort(total, axis=1)[:, :3]
    np.testing.assert_allclose(np.take_along_axis(total, found, 1), by_hand)


def test_a_category_is_the_most_frequent_one_of_the_neighbours() -> None:
    table = members()
    frame = table.frame.assign(c=pd.Categorical(["a"] * 60, categories=["a", "b", "c"]))
    frame.loc[5, "c"] = "b"
    made = smote(Table(table.schema, frame), 300, np.random.default_rng(1))
    assert (made.frame["c"] == "a").all(), "one b is never most of five"


def test_smote_on_few_rows_a_numeric_target_and_none_at_all() -> None:
    table = members()
    for target in ("x", None):
        other = Table(replace(table.schema, target=target), table.frame)
        made = smote(other, 200, np.random.default_rng(2), neighbours=3)
        assert lines(made.frame, table.frame, ["x", "y"]).all()
    few = smote(table.take(np.arange(3, 6)), 50, np.random.default_rng(3), neighbours=5)
    assert len(few) == 50


def test_smote_is_never_private() -> None:
    with pytest.raises(RefusedError, match=r"epsilon=1\.0: smote .* no ε but inf"):
        smote(members(), 10, np.random.default_rng(0), epsilon=1.0)
    for settings, part in (({"n": 0}, "n=0"), ({"neighbours": 0}, "neighbours=0")):
        with pytest.raises(UsageError, match=part):
            smote(members(), **{"n": 5, "rng": np.random.default_rng(0), **settings})
