"""Coarse tables: levels merged by noisy tables alone, counts that add up, fits that meet them."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import ROWS, apart, columns_of, every, marginals_of, sharp_law, summed
from test_survey import FREE, codes_of, counted, purse_of, scales, survey_of

from dpsynth.chosen import candidates
from dpsynth.coarse import PARTS, Coarse, Groups
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.mixture import Effort, Mixture, anchored, fit_mixture
from dpsynth.randomness import secure_stream

LAYOUT = Layout((9, 2, 7, 12), target=1)
SHAPES = pytest.mark.parametrize(
    "layout",
    [LAYOUT, Layout((9, 7, 12), target=None), Layout((9, 10, 7), target=1), Layout((3, 2, 2), 0)],
    ids=["label", "none", "many", "few"],
)


def grouped(start: Marginals, layout: Layout, used: torch.Tensor) -> Groups:
    """As tables are chosen by."""
    return Groups.found(start, layout, used, apart=anchored(layout))


def merged(counts: np.ndarray, columns: Sequence[int], groups: Groups) -> np.ndarray:
    """Cells of a table added up to groups, one by one."""
    found = np.zeros([groups.layout.levels[c] for c in columns])
    for place in np.ndindex(*counts.shape):
        found[tuple(groups.of[c][i] for c, i in zip(columns, place, strict=True))] += counts[place]
    return found


def marginals(layout: Layout, seed: int, *, ordered: bool = True) -> Marginals:
    rng = np.random.default_rng(seed)
    blocks = [rng.dirichlet(np.ones(n), layout.groups) for n in layout.levels]
    prior = rng.dirichlet(np.ones(layout.groups))
    if layout.target is not None:
        blocks[layout.target] = np.tile(prior, (layout.groups, 1))
    places = [rng.permutation(n).astype(float) for n in layout.levels]
    values = torch.from_numpy(np.concatenate(places))
    values = values if ordered else torch.full_like(values, math.nan)
    given = torch.from_numpy(np.concatenate(blocks, axis=1))
    return Marginals(torch.from_numpy(prior), given, values, 0.0, 1000.0)


@SHAPES
@pytest.mark.parametrize("ordered", [True, False])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_groups_hold_about_the_same_mass_and_follow_the_order(
    layout: Layout, ordered: bool, seed: int
) -> None:
    noisy = marginals(layout, seed, ordered=ordered)
    used = torch.from_numpy(np.random.default_rng(seed).random(layout.width) < 0.8)
    starts = np.cumsum([0, *layout.levels[:-1]])
    used[starts] = True
    groups = grouped(noisy, layout, used)
    joint = noisy.given.numpy() * noisy.prior.numpy()[:, None]
    for column, (start, levels, group) in enumerate(
        zip(starts, layout.levels, groups.of, strict=True)
    ):
        block = slice(start, start + levels)
        if anchored(layout) and column == layout.target:
            assert group.tolist() == list(range(levels))
            assert groups.layout.levels[column] == levels
            continue
        assert groups.layout.levels[column] == PARTS
        inside, mass = used.numpy()[block], joint[:, block].sum(0)
        assert len(group) == levels
        assert group.min() >= 0 and group.max() < PARTS
        if inside.sum() <= PARTS:
            assert len(set(group[inside])) == inside.sum()
            continue
        mass = np.where(inside, mass, 0) / mass[inside].sum()
        held = np.bincount(group, weights=mass, minlength=PARTS)
        assert (np.abs(held - 1 / PARTS) <= mass.max() + 1e-9).all()
        rate = joint[-1, block] / joint[:, block].sum(0)
        order = noisy.values.numpy()[block] if ordered else rate
        ranked = np.argsort(np.where(inside, order, np.inf), kind="stable")[: inside.sum()]
        assert (np.diff(group[ranked]) >= 0).all()


def test_a_missing_level_comes_last_and_does_not_undo_an_order() -> None:
    layout = Layout((8,), target=None)
    values = torch.tensor([3.0, 1.0, 0.0, 2.0, 5.0, 4.0, 6.0, math.nan], dtype=torch.float64)
    given = torch.full((1, 8), 1 / 8, dtype=torch.float64)
    flat = Marginals(torch.ones(1, dtype=torch.float64), given, values, 0.0)
    (group,) = Groups.found(flat, layout, torch.ones(8, dtype=torch.bool)).of
    assert group.tolist() == [1, 0, 0, 1, 2, 2, 3, 3]


def drawn_groups(layout: Layout, seed: int) -> Groups:
    """Any groups, some of them empty; a target that components belong to has its own levels."""
    rng = np.random.default_rng(seed)
    of = [rng.integers(0, PARTS, n) for n in layout.levels]
    sizes = [PARTS] * layout.columns
    if anchored(layout) and layout.target is not None:
        sizes[layout.target] = layout.levels[layout.target]
        of[layout.target] = np.arange(sizes[layout.target])
    return Groups(tuple(of), Layout(tuple(sizes), layout.target))


@pytest.mark.parametrize("columns", [(0, 2), (3, 0), (1, 0, 3), (0, 3, 2), (1, 3, 2, 0)])
@pytest.mark.parametrize("cuts", [(), (0, 77, 499)])
def test_merged_counts_are_counts_of_merged_levels(
    columns: tuple[int, ...], cuts: tuple[int, ...]
) -> None:
    codes, groups = codes_of(500, layout=LAYOUT), drawn_groups(LAYOUT, 1)
    frame = pd.DataFrame({j: groups.of[j][codes[:, j].numpy()] for j in range(LAYOUT.columns)})
    due = frame.groupby(list(columns)).size()
    survey = survey_of(codes.tensor_split(cuts), purse_of(FREE), LAYOUT)
    (found,) = survey.merged([columns], 0.5, groups)
    assert found.columns == columns and found.sigma == 0
    assert found.counts.shape == tuple(groups.layout.levels[j] for j in columns)
    assert found.counts.sum() == 500
    for place, size in zip(due.index.tolist(), due.tolist(), strict=True):
        assert found.counts[place] == size


@SHAPES
@pytest.mark.parametrize(("mu", "share"), [(FREE, 0.2), (0.5, 0.2), (2.0, 0.9)])
def test_all_tables_together_cost_one_share(layout: Layout, mu: float, share: float) -> None:
    """Each has the noise of its part, and nothing else was added to the counts."""
    codes, asked, groups = codes_of(400, layout=layout), candidates(layout), drawn_groups(layout, 2)
    exact = survey_of([codes], purse_of(FREE), layout).merged(asked, 1.0, groups)
    due = 0.0 if mu == FREE else math.sqrt(len(asked) / share) / mu
    gaps = []
    for number in range(1 if mu == FREE else 100):
        rng = secure_stream((number + 9) << 190, "coarse")
        survey = survey_of([codes], purse_of(mu, rng), layout)
        found = survey.merged(asked, share, groups)
        assert survey.purse.left == pytest.approx(1 - share)
        for columns, table, known in zip(asked, found, exact, strict=True):
            assert table.columns == columns
            assert table.sigma == pytest.approx(due)
            gaps.append((table.counts - known.counts).ravel())
    if mu == FREE:
        assert not np.concatenate(gaps).any()
    else:
        scales(np.concatenate(gaps), due)


def test_distances_of_groups_count_the_rows_that_are_in_others() -> None:
    codes, groups = codes_of(300, layout=LAYOUT), drawn_groups(LAYOUT, 3)
    rng = np.random.default_rng(1)
    asked = [(1, 0, 3, 2), (0, 2, 3)]
    sizes = groups.layout.levels
    expected = {c: rng.uniform(0, 9, [sizes[j] for j in c]) for c in asked}
    survey = survey_of(codes.split(77), purse_of(FREE), LAYOUT)
    found = survey.distances(expected, 0.5, groups)
    for columns, distance in zip(asked, found, strict=True):
        counts = merged(counted(codes, columns, LAYOUT), columns, groups)
        assert distance == np.abs(counts - np.round(expected[columns])).sum()


@SHAPES
def test_a_mixture_of_groups_has_the_merged_tables(layout: Layout) -> None:
    model = Mixture.naive_bayes(marginals(layout, 5), layout)
    groups = drawn_groups(layout, 5)
    for columns in itertools.permutations(range(layout.columns), 3):
        due = merged(model.table(columns, layout), columns, groups)
        found = model.merged(groups).table(columns, groups.layout)
        np.testing.assert_allclose(found, due, atol=1e-12)


@pytest.mark.parametrize(
    "layout", [Layout((9, 2, 7, 6), target=1), Layout((9, 7, 6), None), Layout((9, 10, 7), 1)]
)
def test_a_fit_meets_coarse_tables(layout: Layout) -> None:
    """Known from label × column tables and merged ones alone: these are met, and with them fine
    tables that were never asked come nearer."""
    law = sharp_law(layout)
    start = marginals_of(law, layout)
    groups = grouped(start, layout, every(layout))
    asked = candidates(layout)
    tables = tuple(
        NoisyTable(columns, merged(ROWS * summed(law, columns), columns, groups), 0.0)
        for columns in asked
    )
    alone = [columns for columns in columns_of(layout) if columns not in asked]
    known = [NoisyTable(columns, ROWS * summed(law, columns), 0.0) for columns in alone]
    effort = Effort(1, 48, 800)
    coarse, fine = [], []
    for more in (None, Coarse(groups), Coarse(groups, pairs=tables)):
        found = fit_mixture(known, start, layout, every(layout), effort, coarse=more)
        both = [(found.table(columns, layout), summed(law, columns)) for columns in asked]
        fine.append(np.mean([apart(*pair) for pair in both]))
        merging = zip(both, asked, strict=True)
        coarse.append(
            np.mean(
                [apart(*(merged(t, columns, groups) for t in pair)) for pair, columns in merging]
            )
        )
    assert coarse[0] == coarse[1] and fine[0] == fine[1]
    assert coarse[2] < 0.01 < 0.2 * coarse[0]
    assert fine[2] < 0.8 * fine[0]


def test_levels_that_cannot_occur_have_no_part_in_a_fit() -> None:
    layout = Layout((9, 2, 7, 5), target=1)
    used = every(layout)
    used[[0, 3, 12]] = False
    law = sharp_law(layout, used=used)
    start = marginals_of(law, layout)
    groups = grouped(start, layout, used)
    pairs, triples = (
        tuple(NoisyTable(c, merged(ROWS * summed(law, c), c, groups), 0.0) for c in asked)
        for asked in (candidates(layout), [(1, 0, 2, 3)])
    )
    coarse = Coarse(groups, pairs, triples)
    found = fit_mixture([], start, layout, used, Effort(1, 32, 400), coarse=coarse)
    assert isinstance(found, Mixture)
    assert not found.levels[:, ~used].any()
    for columns in itertools.combinations((0, 2, 3), 2):
        assert abs(found.table(columns, layout).sum() - 1) < 1e-6
