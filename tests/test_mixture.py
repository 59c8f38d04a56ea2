"""Mixture of products: its tables, and fits that recover a known law from tables of it."""

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from fleets import random_marginals, random_mixture
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, fit_mixture

LAYOUT = Layout((3, 4, 2, 5), target=2)
NO_TARGET = Layout((3, 4, 2, 5), target=None)
MANY = Layout((3, 10, 4), target=1)
LAYOUTS = {"few": LAYOUT, "none": NO_TARGET, "many": MANY}
ROWS = 20_000
QUICK, LONG = Effort(2, 12, 300), Effort(1, 32, 1000)

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def every(layout: Layout) -> Tensor:
    return torch.ones(layout.width, dtype=torch.bool)


def joint_of(mixture: Mixture, layout: Layout) -> np.ndarray:
    """Probability of each row that there is, one by one."""
    law = np.zeros(layout.levels)
    for row in itertools.product(*(range(n) for n in layout.levels)):
        for weight, levels in zip(mixture.weight.tolist(), mixture.levels.tolist(), strict=True):
            share = weight
            for j, level in enumerate(row):
                share *= levels[layout.offsets[j] + level]
            law[row] += share
    return law


def summed(law: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """A table of a law of whole rows."""
    gone = tuple(j for j in range(law.ndim) if j not in columns)
    order = [sorted(columns).index(j) for j in columns]
    return law.sum(gone).transpose(order)


def columns_of(layout: Layout) -> list[tuple[int, ...]]:
    """All that may be measured: label × column, then label × pairs, or pairs."""
    if layout.target is None:
        alone = [(j,) for j in range(layout.columns)]
        return alone + list(itertools.combinations(range(layout.columns), 2))
    others = [j for j in range(layout.columns) if j != layout.target]
    label = [(layout.target, j) for j in others]
    pairs = list(itertools.combinations(others, 2))
    return label + ([(layout.target, *pair) for pair in pairs] if anchored(layout) else pairs)


def tables_of(law: np.ndarray, layout: Layout, sigma: float, seed: int = 0) -> list[NoisyTable]:
    rng = np.random.default_rng(seed)
    found = []
    for columns in columns_of(layout):
        counts = ROWS * summed(law, columns)
        found.append(NoisyTable(columns, counts + sigma * rng.standard_normal(counts.shape), sigma))
    return found


def marginals_of(law: np.ndarray, layout: Layout) -> Marginals:
    """Label × column tables without noise."""
    target = layout.target
    prior = np.ones(1) if target is None else summed(law, [target])
    blocks = []
    for j in range(layout.columns):
        if j == target:
            blocks.append(np.tile(prior, (len(prior), 1)))
        elif target is None:
            blocks.append(summed(law, [j])[None])
        else:
            blocks.append(summed(law, [target, j]) / np.maximum(prior, 1e-12)[:, None])
    given = torch.from_numpy(np.concatenate(blocks, axis=1))
    values = torch.full((layout.width,), torch.nan)
    return Marginals(torch.from_numpy(prior), given, values, 0.0, float(ROWS))


def sharp_law(layout: Layout, seed: int = 3, used: Tensor | None = None) -> np.ndarray:
    """A law whose columns depend on one another."""
    mixture = random_mixture(layout, seed, used)
    blocks = [b**4 / (b**4).sum(1, keepdim=True) for b in mixture.levels.split(layout.levels, -1)]
    return joint_of(Mixture(mixture.weight, torch.cat(blocks, -1)), layout)


def apart(found: np.ndarray, law: np.ndarray) -> float:
    return float(np.abs(found - law).sum() / 2)


def fitted(law: np.ndarray, layout: Layout, sigma: float = 0.0, **settings: int) -> Mixture:
    tables = tables_of(law, layout, sigma, settings.pop("seed", 0))
    effort = replace(QUICK, **settings)
    return fit_mixture(tables, marginals_of(law, layout), layout, every(layout), effort)


# What a mixture says


@layouts
def test_a_table_is_the_sum_over_all_rows(layout: Layout) -> None:
    mixture = random_mixture(layout, 3)
    law = joint_of(mixture, layout)
    assert law.sum() == pytest.approx(1, abs=1e-9)
    for size in (1, 2, 3):
        for columns in itertools.permutations(range(layout.columns), size):
            found = mixture.table(columns, layout)
            np.testing.assert_allclose(found, summed(law, columns), atol=1e-12)


@layouts
def test_marginals_of_a_mixture_are_its_tables(layout: Layout) -> None:
    mixture, measured = random_mixture(layout, 3), random_marginals(layout, 5)
    found, law = mixture.marginals(measured, layout), joint_of(mixture, layout)
    prior = np.ones(1) if layout.target is None else summed(law, [layout.target])
    np.testing.assert_allclose(found.prior, prior, atol=1e-9)
    blocks = np.split(found.given.numpy(), layout.offsets[1:], axis=1)
    for j, block in enumerate(blocks):
        if j == layout.target:
            due = np.tile(prior, (len(prior), 1))
        elif layout.target is None:
            due = summed(law, [j])[None]
        else:
            due = summed(law, [layout.target, j]) / prior[:, None]
        np.testing.assert_allclose(block, due, atol=1e-9)
    np.testing.assert_allclose(found.one_way(), torch.from_numpy(prior) @ found.given)
    # What it does not know of stays as it was measured.
    torch.testing.assert_close(found.values, measured.values, equal_nan=True)
    assert (found.noise, found.rows, found.tables) == (measured.noise, measured.rows, ())


def test_a_target_level_without_a_component_keeps_its_tables() -> None:
    layout = Layout((3, 4, 6), target=2)
    mixture, measured = random_mixture(layout, 3), random_marginals(layout, 5)
    start = layout.offsets[2]
    bare = (mixture.levels[:, start:].sum(0) == 0).nonzero().flatten()
    assert len(bare)
    found = mixture.marginals(measured, layout)
    assert (found.prior[bare] == 0).all()
    torch.testing.assert_close(found.given[bare, :start], measured.given[bare, :start])


@layouts
def test_logits_are_smoothed_towards_the_columns_own_shares(layout: Layout) -> None:
    mixture = random_mixture(layout, 3)
    tables = random_marginals(layout, 5)
    found = mixture.logits(tables, layout).exp().split(list(layout.levels), -1)
    alone = tables.one_way().split(list(layout.levels))
    for j, block in enumerate(mixture.levels.split(list(layout.levels), -1)):
        if j == layout.target and anchored(layout):
            np.testing.assert_array_equal(found[j].numpy(), block.numpy())
        else:
            due = 0.999 * block + 0.001 * alone[j]
            np.testing.assert_allclose(found[j], due, rtol=1e-9)
            assert (found[j] > 0).all()


@layouts
def test_naive_bayes_is_its_tables(layout: Layout) -> None:
    """The prior and each column given the target; columns independent given it."""
    tables = random_marginals(layout, 7)
    mixture = Mixture.naive_bayes(tables, layout)
    assert len(mixture.weight) == layout.groups
    law = joint_of(mixture, layout)
    given = np.split(tables.given.numpy(), layout.offsets[1:], axis=1)
    prior = tables.prior.numpy()
    for row in itertools.product(*(range(n) for n in layout.levels)):
        group = 0 if layout.target is None else row[layout.target]
        due = prior[group]
        for j, level in enumerate(row):
            due *= 1.0 if j == layout.target else given[j][group, level]
        assert law[row] == pytest.approx(due, abs=1e-12)
    torch.testing.assert_close(mixture.levels[0, 0], tables.given[0, 0])
    mixture.levels.zero_()  # a copy
    assert (tables.given > 0).any()


# Fits


@layouts
def test_a_fit_to_exact_tables_has_them(layout: Layout) -> None:
    law = sharp_law(layout)
    found = fit_mixture(
        tables_of(law, layout, 0.0), marginals_of(law, layout), layout, every(layout), LONG
    )
    assert float(found.weight.sum()) == pytest.approx(1, abs=1e-5)
    for columns in columns_of(layout):
        assert apart(found.table(columns, layout), summed(law, columns)) < 0.01, columns
    # Naive Bayes, where it starts, does not have them.
    start = Mixture.naive_bayes(marginals_of(law, layout), layout)
    far = [apart(start.table(c, layout), summed(law, c)) for c in columns_of(layout)]
    assert max(far) > 0.03


@layouts
def test_each_component_is_a_distribution_and_has_one_target_level_at_most(layout: Layout) -> None:
    found = fitted(joint_of(random_mixture(layout, 3), layout), layout, steps=20)
    assert found.weight.shape == (QUICK.restarts * QUICK.components,)
    blocks = found.levels.split(list(layout.levels), -1)
    for j, block in enumerate(blocks):
        assert (block >= 0).all()
        torch.testing.assert_close(block.sum(1), torch.ones(len(block)).double(), atol=1e-5, rtol=0)
        if j == layout.target and anchored(layout):
            assert block.unique().tolist() == [0.0, 1.0]
            assert (block.sum(0) > 0).all()


def test_tables_that_say_more_count_for_more() -> None:
    """Two tables of the same columns: the mean, by the inverse of their variances."""
    layout = Layout((2,), target=None)
    law = np.array([0.5, 0.5])
    tables = [
        NoisyTable((0,), np.array([14_000.0, 6_000.0]), 100.0),
        NoisyTable((0,), np.array([8_000.0, 12_000.0]), 50.0),
    ]
    found = fit_mixture(tables, marginals_of(law, layout), layout, every(layout), QUICK)
    due = (14_000 / 100**2 + 8_000 / 50**2) / (1 / 100**2 + 1 / 50**2) / ROWS
    assert found.table([0], layout)[0] == pytest.approx(due, abs=2e-3)


def test_negative_counts_pull_down_and_are_no_mistake() -> None:
    """A cell that no row is in stays near 0 however far below the noise puts it."""
    law = sharp_law(LAYOUT)
    law[0, 0] = 0
    law /= law.sum()
    tables = tables_of(law, LAYOUT, 40.0)
    assert any((table.counts < 0).any() for table in tables)
    found = fit_mixture(tables, marginals_of(law, LAYOUT), LAYOUT, every(LAYOUT), QUICK)
    alone = float(law[0].sum() * law[:, 0].sum())
    assert found.table([0, 1], LAYOUT)[0, 0] < 0.2 * alone
    for columns in columns_of(LAYOUT):
        table = found.table(columns, LAYOUT)
        assert (table >= 0).all()
        assert apart(table, summed(law, columns)) < 0.05


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, MANY], ids=LAYOUTS)
def test_levels_that_cannot_occur_have_no_mass(layout: Layout) -> None:
    """Whatever noise has put there."""
    used = every(layout)
    used[[1, layout.offsets[1] + 2, layout.width - 1]] = False
    law = joint_of(random_mixture(layout, 3, used), layout)
    tables = tables_of(law, layout, 200.0)
    found = fit_mixture(tables, marginals_of(law, layout), layout, used, replace(QUICK, steps=60))
    assert (found.levels[:, ~used] == 0).all()
    for block in found.levels.split(list(layout.levels), -1):
        torch.testing.assert_close(block.sum(1), torch.ones(len(block)).double(), atol=1e-5, rtol=0)


def test_unused_target_levels_have_no_component() -> None:
    layout = Layout((3, 4, 6), target=2)
    used = every(layout)
    used[[layout.offsets[2], layout.offsets[2] + 3]] = False
    law = joint_of(random_mixture(layout, 3, used), layout)
    # Two more target levels than the mixture has components for.
    law = 0.9 * law + 0.1 * np.full(law.shape, 1 / law.size)
    law[:, :, [0, 3]] = 0
    law /= law.sum()
    tables, start = tables_of(law, layout, 0.0), marginals_of(law, layout)
    found = fit_mixture(tables, start, layout, used, replace(QUICK, components=24))
    held = found.levels[:, layout.offsets[2] :].sum(0)
    assert (held[[0, 3]] == 0).all()
    assert (held[[1, 2, 4, 5]] > 0).all()
    for columns in columns_of(layout):
        assert apart(found.table(columns, layout), summed(law, columns)) < 0.015, columns


@layouts
def test_equal_tables_give_equal_mixtures(layout: Layout) -> None:
    law = joint_of(random_mixture(layout, 3), layout)
    first, again = (fitted(law, layout, 30.0, steps=15) for _ in range(2))
    other = fitted(law, layout, 30.0, steps=15, seed=1)
    assert torch.equal(first.levels, again.levels)
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.levels, other.levels)


def dependence(table: np.ndarray) -> float:
    """Of the last two columns on one another, given the first of three, in nats."""
    total = 0.0
    for part in table.reshape(-1, *table.shape[-2:]):
        alone = np.outer(part.sum(1), part.sum(0)) / part.sum()
        inside = part > 0
        total += float((part[inside] * np.log(part[inside] / alone[inside])).sum())
    return total


@layouts
def test_tables_of_pure_noise_leave_columns_independent(layout: Layout) -> None:
    """Given the target where it is in the tables; read cell by cell they would depend."""
    rng = np.random.default_rng(0)
    law = np.ones(())
    for levels in layout.levels:
        law = np.multiply.outer(law, rng.dirichlet(np.full(levels, 5.0)))
    tables = tables_of(law, layout, 200.0)
    found = fit_mixture(tables, marginals_of(law, layout), layout, every(layout), QUICK)
    pairs = [t for t in tables if layout.target not in t.columns or len(t.columns) == 3]
    pairs = [t for t in pairs if len(t.columns) > 1]
    read = [dependence(t.counts.clip(0) / t.counts.clip(0).sum()) for t in pairs]
    held = [dependence(found.table(t.columns, layout)) for t in pairs]
    assert np.mean(held) < 0.15 * np.mean(read)


def test_more_steps_fit_better() -> None:
    law = sharp_law(LAYOUT)
    far = []
    for steps in (5, 60, 300):
        found = fitted(law, LAYOUT, steps=steps)
        gaps = [apart(found.table(c, LAYOUT), summed(law, c)) for c in columns_of(LAYOUT)]
        far.append(float(np.mean(gaps)))
    assert far[0] > 2 * far[1] > 4 * far[2]


def test_components_belong_to_few_target_levels_only() -> None:
    for levels, few in ((1, False), (2, True), (8, True), (9, False)):
        assert anchored(Layout((3, levels), target=1)) == few
    assert not anchored(Layout((3, 4), target=None))


def test_a_target_alone_is_fitted_by_its_own_table() -> None:
    for levels in (3, 10):
        layout = Layout((levels,), target=0)
        law = np.random.default_rng(levels).dirichlet(np.ones(levels))
        tables = [NoisyTable((0,), ROWS * law, 0.0)]
        found = fit_mixture(tables, marginals_of(law, layout), layout, every(layout), QUICK)
        assert apart(found.table([0], layout), law) < 0.01
