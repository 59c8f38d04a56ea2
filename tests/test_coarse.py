"""Coarse tables: levels merged by noisy tables alone, counts that add up, fits that meet them."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mixture import ROWS, apart, columns_of, every, marginals_of, sharp_law, summed
from test_survey import FREE, codes_of, purse_of, scales, survey_of

from dpsynth.chosen import candidates
from dpsynth.coarse import PARTS, Coarse, groups_of, merged
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.mixture import Effort, Mixture, fit_mixture
from dpsynth.randomness import secure_stream

LAYOUT = Layout((9, 2, 7, 12), target=1)
SHAPES = pytest.mark.parametrize(
    "layout",
    [LAYOUT, Layout((9, 7, 12), target=None), Layout((9, 10, 7), target=1), Layout((3, 2, 2), 0)],
    ids=["label", "none", "many", "few"],
)


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
    found = groups_of(noisy, layout, used)
    joint = noisy.given.numpy() * noisy.prior.numpy()[:, None]
    for start, levels, group in zip(starts, layout.levels, found, strict=True):
        block = slice(start, start + levels)
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
    (group,) = groups_of(flat, layout, torch.ones(8, dtype=torch.bool))
    assert group.tolist() == [1, 0, 0, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("columns", [(0, 2), (3, 0), (1, 0, 3), (1, 3, 2)])
def test_merged_counts_are_counts_of_merged_levels(columns: tuple[int, ...]) -> None:
    codes, rng = codes_of(500, layout=LAYOUT), np.random.default_rng(1)
    groups = [rng.integers(0, PARTS, n) for n in LAYOUT.levels]
    frame = pd.DataFrame(codes.numpy())
    shape = [LAYOUT.levels[j] for j in columns]
    counts = np.zeros(shape)
    np.add.at(counts, tuple(codes[:, j].numpy() for j in columns), 1)
    for j in columns[-2:]:
        frame[j] = groups[j][frame[j]]
    due = frame.groupby(list(columns)).size()
    found = merged(counts, columns, groups)
    assert found.shape == (*shape[:-2], PARTS, PARTS)
    assert found.sum() == 500
    for place, size in zip(due.index.tolist(), due.tolist(), strict=True):
        assert found[place] == size


@SHAPES
@pytest.mark.parametrize(("mu", "share"), [(FREE, 0.2), (0.5, 0.2), (2.0, 0.9)])
def test_all_tables_together_cost_one_share(layout: Layout, mu: float, share: float) -> None:
    """Each has the noise of its part, and nothing else was added to the counts."""
    codes, asked = codes_of(400, layout=layout), candidates(layout)
    exact = survey_of([codes], purse_of(FREE), layout).tables(asked, [1 / 20] * len(asked))
    due = 0.0 if mu == FREE else math.sqrt(len(asked) / share) / mu
    gaps = []
    for number in range(1 if mu == FREE else 100):
        rng = secure_stream((number + 9) << 190, "coarse")
        survey = survey_of([codes], purse_of(mu, rng), layout)
        found = survey.coarse(asked, share)
        assert survey.purse.left == pytest.approx(1 - share)
        for columns, table, fine in zip(asked, found.tables, exact, strict=True):
            assert table.columns == columns
            assert table.sigma == pytest.approx(due)
            gaps.append((table.counts - merged(fine.counts, columns, found.groups)).ravel())
    if mu == FREE:
        assert not np.concatenate(gaps).any()
    else:
        scales(np.concatenate(gaps), due)


@pytest.mark.parametrize(
    "layout", [Layout((9, 2, 7, 6), target=1), Layout((9, 7, 6), None), Layout((9, 10, 7), 1)]
)
def test_a_fit_meets_coarse_tables(layout: Layout) -> None:
    """Known from label × column tables and merged ones alone: these are met, and with them fine
    tables that were never asked come nearer."""
    law = sharp_law(layout)
    start = marginals_of(law, layout)
    groups = groups_of(start, layout, every(layout))
    asked = candidates(layout)
    tables = tuple(
        NoisyTable(columns, merged(ROWS * summed(law, columns), columns, groups), 0.0)
        for columns in asked
    )
    alone = [columns for columns in columns_of(layout) if columns not in asked]
    known = [NoisyTable(columns, ROWS * summed(law, columns), 0.0) for columns in alone]
    effort = Effort(1, 48, 800)
    coarse, fine = [], []
    for more in (None, Coarse(groups, tables)):
        found = fit_mixture(known, start, layout, every(layout), effort, coarse=more)
        both = [(found.table(columns, layout), summed(law, columns)) for columns in asked]
        fine.append(np.mean([apart(*pair) for pair in both]))
        merging = zip(both, asked, strict=True)
        coarse.append(
            np.mean(
                [apart(*(merged(t, columns, groups) for t in pair)) for pair, columns in merging]
            )
        )
    assert coarse[1] < 0.01 < 0.2 * coarse[0]
    assert fine[1] < 0.8 * fine[0]


def test_levels_that_cannot_occur_have_no_part_in_a_fit() -> None:
    layout = Layout((9, 2, 7), target=1)
    used = every(layout)
    used[[0, 3, 12]] = False
    law = sharp_law(layout, used=used)
    start = marginals_of(law, layout)
    groups = groups_of(start, layout, used)
    tables = [
        NoisyTable(c, merged(ROWS * summed(law, c), c, groups), 0.0) for c in candidates(layout)
    ]
    coarse = Coarse(groups, tuple(tables))
    found = fit_mixture([], start, layout, used, Effort(1, 32, 400), coarse=coarse)
    assert isinstance(found, Mixture)
    assert not found.levels[:, ~used].any()
    pairs = itertools.combinations((0, 2), 2)
    assert all(abs(found.table(p, layout).sum() - 1) < 1e-6 for p in pairs)
