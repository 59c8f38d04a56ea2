"""Labels drawn last: scores of two models, and draws that are balanced without being biased."""

import numpy as np
import pytest
import torch
from fleets import make_fleet
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
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


def test_reconcile_is_true_or_false() -> None:
    with pytest.raises(UsageError, match="reconcile=2: must be true or false"):
        make_fleet("vae", LAYOUT, [1], reconcile=2)
