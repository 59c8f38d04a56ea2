"""Labels drawn last: scores of two models, and draws that are balanced without being biased."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fleets import make_fleet
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.leading import Leading
from dpsynth.models.labels import LabelHead, balanced
from dpsynth.randomness import FleetRng

LAYOUT = Layout((4, 3, 2), target=2)


def test_every_label_has_the_chance_that_its_scores_give() -> None:
    """Over all offsets, whatever the order of rows."""
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.normal(size=(60, 3)))
    features = rng.normal(size=(60, 2))
    offsets = (np.arange(500) + 0.5) / 500
    drawn = torch.stack([balanced(scores, features, offset) for offset in offsets])
    shares = torch.nn.functional.one_hot(drawn, 3).double().mean(0)
    torch.testing.assert_close(shares, scores.softmax(-1), atol=2.5 / 500, rtol=0)


@pytest.mark.parametrize("levels", [2, 5])
def test_rows_that_are_alike_have_their_labels_in_the_right_shares(levels: int) -> None:
    """Independent draws would miss by the root of their number."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, 8, 4000)
    scores = torch.from_numpy(rng.normal(size=(8, levels)))[kind]
    drawn = balanced(scores, kind[:, None].astype(float), 0.3)
    for one in range(8):
        rows = kind == one
        found = np.bincount(drawn[rows], minlength=levels)
        wanted = scores[rows][0].softmax(-1).numpy() * rows.sum()
        assert np.abs(found - wanted).max() < 4


def truth(rows: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Rows whose label hangs on the sum of two columns and on whether they agree, and its odds."""
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 4, rows), rng.integers(0, 3, rows)
    odds = first - 1.5 + 0.8 * (second - 1) + 2.0 * (first == second) - 0.6
    label = rng.random(rows) < 1 / (1 + np.exp(-odds))
    return torch.from_numpy(np.stack([first, second, label], 1).astype(np.int64)), odds


def tables_of(codes: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for column, levels in enumerate(LAYOUT.levels[:2]):
        table = np.zeros((2, levels))
        np.add.at(table, (codes[:, 2].numpy(), codes[:, column].numpy()), 1 / len(codes))
        found.append(torch.from_numpy(table))
    return found


def test_a_head_knows_tables_and_what_the_generator_drew() -> None:
    """Scores follow the true odds; without trees the interaction would be missed, and on the whole
    each level is as frequent as the prior says."""
    drawn, _ = truth(20_000, 0)
    rows, odds = truth(6000, 1)
    rank = torch.cat([torch.arange(n) for n in LAYOUT.levels]).float()
    prior = torch.tensor([0.55, 0.45], dtype=torch.float64)
    head = LabelHead(drawn, rank, LAYOUT)
    scores = head.scores(rows, tables_of(drawn), prior.log(), 0.0)
    found = (scores[:, 1] - scores[:, 0]).numpy()
    agree = (rows[:, 0] == rows[:, 1]).numpy()
    residual = found - odds
    # Half of the interaction comes from the trees, half is missed by the additive scores.
    step = residual[~agree].mean() - residual[agree].mean()
    assert 0.5 < step < 1.5
    assert stats.spearmanr(found, odds).statistic > 0.93
    assert scores.softmax(-1).mean(0)[1] == pytest.approx(0.45, abs=1e-3)
    again = LabelHead(drawn, rank, LAYOUT).scores(rows, tables_of(drawn), prior.log(), 0.0)
    torch.testing.assert_close(again, scores, rtol=0, atol=0)


@pytest.mark.parametrize("flipped", [0.0, 0.2])
def test_labels_of_a_parity_are_those_that_the_generator_drew(flipped: float) -> None:
    """Whatever the tables say, which is nothing: with half of the trees' scores alone a label would
    be right far less often."""
    rng = np.random.default_rng(3)
    layout = Layout((2, 2, 2, 7, 2), target=4)
    codes = np.stack([rng.integers(0, n, 12_000) for n in layout.levels], axis=1)
    wrong = rng.random(len(codes)) < flipped
    codes[:, 4] = (codes[:, 0] + codes[:, 1] + codes[:, 2] + wrong) % 2
    rows = torch.from_numpy(codes)
    rank = torch.cat([torch.arange(n) for n in layout.levels]).float()
    tables = [torch.full((2, n), 0.5 / n, dtype=torch.float64) for n in layout.levels[:4]]
    prior = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    scores = LabelHead(rows, rank, layout).scores(rows, tables, prior, 0.0)
    right = scores.softmax(-1).gather(1, rows[:, :3].sum(1, keepdim=True) % 2).mean()
    assert right == pytest.approx(1 - flipped, abs=0.06)


def test_trees_have_more_leaves_only_where_these_explain_much_more() -> None:
    """A label of its own for each cell of four columns asks for them; one that hangs on one column,
    noise on top, does not, however many more leaves would fit the rows they were grown on."""
    rng = np.random.default_rng(4)
    layout = Layout((6, 6, 6, 6, 2), target=4)
    codes = np.stack([rng.integers(0, 6, 20_000) for _ in range(4)], axis=1)
    cells = rng.integers(0, 2, (6, 6, 6, 6))[tuple(codes.T)]
    simple = codes[:, 0] < 3
    rank = torch.arange(6).repeat(5)[:26].float()
    used = []
    for label in (cells, simple):
        flipped = np.where(rng.random(len(codes)) < 0.1, 1 - label, label)
        rows = torch.from_numpy(np.column_stack([codes, flipped]))
        head = LabelHead(rows, rank, layout)
        assert head._trees is not None
        used.append(head._trees.max_leaf_nodes)
    assert used[0] > used[1] == 31


def test_what_tables_explain_alone_is_half_theirs() -> None:
    """Labels that hang on one column: both models say the same, and both count."""
    head = LabelHead(truth(4000, 5)[0], torch.zeros(9), LAYOUT)
    label = head._held[:, 2]
    wise = torch.where(torch.arange(2) == label[:, None], 0.9, 0.1).log().double()
    even = torch.full_like(wise, 0.5).log()
    assert head._explained(wise, wise) == pytest.approx(1.0)
    assert head._explained(even, wise) == pytest.approx(0.0, abs=0.02)
    between = torch.where(torch.arange(2) == label[:, None], 0.7, 0.3).log().double()
    gains = [np.log(2) + np.log(p) for p in (0.7, 0.9)]
    assert head._explained(between, wise) == pytest.approx(gains[0] / gains[1], abs=0.02)
    # Trees that say less than nothing leave the additive scores their whole half.
    assert head._explained(wise, even - 1) == head._explained(even - 2, even - 1) == 1.0


def test_tables_count_for_more_where_components_do_not_know_the_target() -> None:
    """Of a target of many levels four parts of five, though they are surer of it than the
    generator's rows; nothing where they explain nothing."""
    rng, found = np.random.default_rng(7), []
    for levels in (8, 9):
        layout = Layout((levels, levels), target=1)
        codes = np.arange(2000) % levels
        label = np.where(rng.random(2000) < 0.5, codes, rng.integers(0, levels, 2000))
        rows = torch.from_numpy(np.stack([codes, label], 1))
        head = LabelHead(rows, torch.arange(2 * levels).float(), layout)
        known = torch.nn.functional.one_hot(head._held[:, 0], levels).double()
        boosted = (0.5 * known + 0.5 / levels).log()
        sure = (0.99 * known + 0.01 / levels).log()
        models = sure, boosted, torch.zeros_like(sure).log_softmax(-1)
        found.append([head._share(additive, boosted) for additive in models])
    assert found[0][0] == 0.0 and found[0][1:] == pytest.approx([0.5, 0.0], abs=0.02)
    assert found[1] == pytest.approx([0.8, 0.8, 0.0], abs=0.02)


def test_a_level_that_never_came_up_stays_unlikely_and_alone_it_is_certain_to_the_tables() -> None:
    drawn, _ = truth(2000, 2)
    rank = torch.cat([torch.arange(n) for n in LAYOUT.levels]).float()
    lonely = drawn.clone()
    lonely[:, 2] = 0
    prior = torch.tensor([1 - 1e-6, 1e-6], dtype=torch.float64)
    tables = [torch.stack([t.sum(0), t.sum(0) * 1e-9]) for t in tables_of(drawn)]
    scores = LabelHead(lonely, rank, LAYOUT).scores(drawn, tables, prior.log(), 0.0)
    assert torch.isfinite(scores).all()
    assert (scores.argmax(-1) == 0).all()


def test_a_head_follows_the_weights_and_is_not_fitted_twice() -> None:
    model = make_fleet("autoregressive", LAYOUT, [1], double=False, reconcile=True)
    rng = FleetRng([3])
    model.sample(50, rng)
    (first,) = model._label_heads(rng)
    model.sample(50, rng)
    assert model._label_heads(rng)[0] is first
    with torch.no_grad():
        next(iter(model.parameters())).add_(0.5)
    assert model._label_heads(rng)[0] is not first


class AnewError(Exception):
    pass


@pytest.mark.parametrize(("levels", "anew"), [(2, True), (9, True), (32, True), (33, False)])
def test_a_class_is_drawn_last_and_a_number_is_not(
    levels: int, anew: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AnewError

    monkeypatch.setattr("dpsynth.models.base.LabelHead", refuse)
    model = make_fleet("autoregressive", Layout((4, 3, levels), 2), [1], reconcile=True)
    with pytest.raises(AnewError) if anew else nullcontext():
        model.sample(9, FleetRng([3]))


def test_tables_sharpen_what_a_generator_blurs_of_a_class_of_many_levels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The generator keeps the column that decides the label in half of its rows, tables in nine of
    ten; twelve columns tell nothing."""
    monkeypatch.setattr("dpsynth.models.labels._TREES", 30)
    rng, levels = np.random.default_rng(6), 10
    layout = Layout((levels, *[5] * 12, levels), target=13)
    codes = np.stack([rng.integers(0, n, 8000) for n in layout.levels], axis=1)
    kept = rng.random(len(codes)) < 0.5
    codes[kept, 13] = codes[kept, 0]
    rank = torch.cat([torch.arange(n) for n in layout.levels]).float()
    prior = torch.full((levels,), 1 / levels, dtype=torch.float64)
    tables = [torch.full((levels, n), 1 / levels / n, dtype=torch.float64) for n in layout.levels]
    tables[0] = (0.9 * torch.eye(levels, dtype=torch.float64) + 0.1 / levels) / levels
    noise = 0.1 / levels / 5
    noisy = [t + noise * torch.from_numpy(rng.standard_normal(t.shape)) for t in tables[:-1]]
    rows = torch.from_numpy(codes)
    given = (noisy[0].clamp_min(0) + 1e-6) / (noisy[0].clamp_min(0) + 1e-6).sum(0)
    head = LabelHead(rows, rank, layout, Leading((0,), given.log()))
    scores = head.scores(rows, [t.clamp_min(0) for t in noisy], prior.log(), noise)
    right = scores.softmax(-1).gather(1, rows[:, :1]).mean()
    # By the generator's rows alone it would be .54.
    assert 0.58 < right < 0.95


def test_reconcile_is_true_or_false() -> None:
    with pytest.raises(UsageError, match="reconcile=2: must be true or false"):
        make_fleet("vae", LAYOUT, [1], reconcile=2)
