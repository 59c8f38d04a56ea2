"""LiRA and RMIA against slow loops over records, and in a world whose best attack is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dpsynth.audit.lira import VARIANCES, lira, lira_offline, out_means, rmia
from dpsynth.audit.membership import auc, auc_interval
from dpsynth.checks import UsageError

MODELS, ROWS = 12, 30


class World:
    """Scores N(mean of the row + shift · inside, spread of the row)."""

    def __init__(
        self, models: int = MODELS, rows: int = ROWS, shift: float = 1.0, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.mean = rng.normal(0, 3, rows)
        self.spread = rng.uniform(0.5, 1.5, rows)
        self.member = rng.random(rows) < 0.5
        self.inside = rng.random((models, rows)) < 0.5
        for kind in (True, False):  # three of each at least
            self.inside[: 3 if kind else 6][3 * (not kind) :] = kind
        noise = rng.normal(size=(models + 1, rows))
        seen = np.vstack([self.member, self.inside])
        scores = self.mean + self.spread * (noise + shift * seen)
        self.own, self.shadows = scores[0], scores[1:]

    def auc(self, scores: np.ndarray) -> tuple[float, float, float]:
        return auc_interval(scores[self.member], scores[~self.member])


def spread_of(world: World, row: int, kind: bool, variance: str) -> float:
    """Unbiased variance of one row's side, by loops."""

    def values(r: int, k: bool) -> np.ndarray:
        return world.shadows[world.inside[:, r] == k, r]

    groups = {
        "side": [values(row, kind)],
        "row": [values(row, k) for k in (True, False)],
        "all": [values(r, kind) for r in range(ROWS)],
    }[variance]
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return squares / sum(len(group) - 1 for group in groups)


@pytest.mark.parametrize("variance", VARIANCES)
def test_lira_is_the_log_ratio_of_two_normal_densities(variance: str) -> None:
    world = World()
    found = lira(world.own, world.shadows, world.inside, variance=variance)
    for row in range(ROWS):
        logs = []
        for kind in (True, False):
            mean = world.shadows[world.inside[:, row] == kind, row].mean()
            scale = np.sqrt(spread_of(world, row, kind, variance))
            logs.append(stats.norm.logpdf(world.own[row], mean, scale))
        assert found[row] == pytest.approx(logs[0] - logs[1], rel=1e-9, abs=1e-9)


def test_the_offline_form_is_the_quantile_among_models_that_did_not_see_the_row() -> None:
    world = World()
    found = lira_offline(world.own, world.shadows, world.inside)
    for row in range(ROWS):
        mean = world.shadows[~world.inside[:, row], row].mean()
        scale = np.sqrt(spread_of(world, row, False, "all"))
        above = 1 - stats.norm.sf(world.own[row], mean, scale)  # Pr[N(μ, σ²) ≤ own]
        assert stats.norm.cdf(found[row]) == pytest.approx(above, rel=1e-9)
    many = World(models=80)
    found = lira_offline(many.own, many.shadows, many.inside)
    own = [np.std(many.shadows[~many.inside[:, r], r], ddof=1) for r in range(ROWS)]
    means = [many.shadows[~many.inside[:, r], r].mean() for r in range(ROWS)]
    if (~many.inside).sum(axis=0).min() >= 32:
        np.testing.assert_allclose(found, (many.own - means) / own)


@pytest.mark.parametrize(("models", "variance"), [(160, "side"), (16, "row"), (6, "all")])
def test_spreads_are_pooled_where_models_are_few(models: int, variance: str) -> None:
    world = World(models)
    world.inside = np.tile(np.arange(models)[:, None] % 2 == 0, (1, ROWS))
    found = lira(world.own, world.shadows, world.inside)
    for kind in VARIANCES:
        same = np.allclose(
            found, lira(world.own, world.shadows, world.inside, variance=kind), rtol=1e-12
        )
        assert same == (kind == variance)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("offline", [None, 0.3])
def test_rmia_counts_the_population_rows_that_a_row_beats(
    gamma: float, offline: float | None
) -> None:
    world = World()
    own, shadows = -np.exp(world.own / 5), -np.exp(world.shadows / 5)  # log-probabilities
    rng = np.random.default_rng(1)
    z, shadows_z = -rng.random(40) * 2, -rng.random((MODELS, 40)) * 2
    found = rmia(own, shadows, world.inside, z, shadows_z, gamma=gamma, offline=offline)
    for row in range(ROWS):
        inner = np.exp(shadows[world.inside[:, row], row]).mean()
        outer = np.exp(shadows[~world.inside[:, row], row]).mean()
        wins = 0
        for k in range(40):
            known = np.exp(shadows_z[:, k]).mean()
            if offline is None:
                p_x, p_z = (inner + outer) / 2, known
            else:
                p_x, p_z = (((1 + offline) * p + (1 - offline)) / 2 for p in (outer, known))
            wins += np.exp(own[row]) / p_x >= gamma * np.exp(z[k]) / p_z
        assert found[row] == wins / 40


def test_more_score_is_never_less_member() -> None:
    """By moving one row's score up: always for offline LiRA and RMIA, and for online LiRA where
    both sides have one spread and members score higher."""
    world = World(shift=4.0)
    steps = np.linspace(-3, 3, 13)[:, None]
    z, shadows_z = world.own[:10], world.shadows[:, :10]
    for variance in (None, "row"):
        ladder = [
            lira(world.own + s, world.shadows, world.inside, variance=variance) for s in steps
        ]
        if variance == "row":
            assert (np.diff(ladder, axis=0) > 0).all()
    offline = [lira_offline(world.own + s, world.shadows, world.inside) for s in steps]
    assert (np.diff(offline, axis=0) > 0).all()
    ranks = [rmia(world.own + s, world.shadows, world.inside, z, shadows_z) for s in steps]
    assert (np.diff(ranks, axis=0) >= 0).all()
    assert (np.diff(ranks, axis=0) > 0).any()


def test_how_hard_a_row_is_cancels() -> None:
    """A shift of all models' scores of one row changes nothing; a common scale neither for LiRA."""
    world = World()
    shift = np.random.default_rng(2).normal(0, 100, ROWS)
    own, shadows, inside = world.own, world.shadows, world.inside
    z, shadows_z = own[:10] + 0.1, shadows[:, :10]  # without a tie
    for variance in VARIANCES:
        before = lira(own, shadows, inside, variance=variance)
        moved = lira(own + shift, shadows + shift, inside, variance=variance)
        np.testing.assert_allclose(moved, before, atol=1e-7)
        np.testing.assert_allclose(
            lira(3 * own, 3 * shadows, inside, variance=variance), before, atol=1e-9
        )
    np.testing.assert_allclose(
        lira_offline(own + shift, shadows + shift, inside),
        lira_offline(own, shadows, inside),
        atol=1e-9,
    )
    np.testing.assert_allclose(
        rmia(own + shift, shadows + shift, inside, z, shadows_z),
        rmia(own, shadows, inside, z, shadows_z),
        atol=1e-9,
    )


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.5])
def test_the_best_possible_auc_is_reached(shift: float) -> None:
    """Members score N(μ + d·σ, σ²), others N(μ, σ²): no attack beats Φ(d/√2), and calibrated ones
    come as close as 200 shadows allow; uncalibrated scores do not."""
    world = World(models=200, rows=6000, shift=shift, seed=3)
    best = float(stats.norm.cdf(shift / np.sqrt(2)))
    for variance in ("side", "row"):
        _, low, high = world.auc(lira(world.own, world.shadows, world.inside, variance=variance))
        assert low - 0.01 <= best <= high + 0.01
    _, low, high = world.auc(lira_offline(world.own, world.shadows, world.inside))
    assert low - 0.01 <= best <= high + 0.01
    if shift:
        assert world.auc(world.own)[2] < best


@pytest.mark.parametrize("seed", range(5))
def test_shadows_tell_nothing_where_membership_moves_nothing(seed: int) -> None:
    world = World(models=16, rows=4000, shift=0.0, seed=seed)
    own, shadows, inside = world.own, world.shadows, world.inside
    z, shadows_z = own[:500], shadows[:, :500]
    for scores in (
        lira(own, shadows, inside),
        lira_offline(own, shadows, inside),
        rmia(own, shadows, inside, z, shadows_z),
    ):
        # 4.4 standard errors of a know-nothing AUC: one in 1e5 for each of 15.
        assert abs(auc(scores[world.member], scores[~world.member]) - 0.5) < 4.4 * 0.0092


def test_out_means_leave_a_shadow_out_of_its_own() -> None:
    world = World()
    numbers = np.random.default_rng(4).normal(size=(MODELS, ROWS, 2))
    mean, means = out_means(numbers, world.inside)
    for row in range(ROWS):
        out = ~world.inside[:, row]
        np.testing.assert_allclose(mean[row], numbers[out, row].mean(axis=0))
        for model in range(MODELS):
            others = out & (np.arange(MODELS) != model)
            np.testing.assert_allclose(means[model, row], numbers[others, row].mean(axis=0))
    inside = world.inside.copy()
    inside[1:, 0] = True
    inside[0, 0] = False
    with pytest.raises(UsageError, match="fewer than 2 OUT"):
        out_means(numbers, inside)


@pytest.mark.parametrize("attack", [lira, lira_offline])
def test_what_cannot_be_scored_is_refused(attack) -> None:
    world = World()
    own, shadows, inside = world.own, world.shadows, world.inside
    alone = inside.copy()
    alone[:, 3] = True
    nobody = inside.copy()
    nobody[:, 3] = False
    hole = own.copy()
    hole[2] = np.nan
    for arguments, part in (
        ((own[1:], shadows, inside), "own of shape"),
        ((own[None], shadows, inside), "own of shape"),
        ((own[:0], shadows[:, :0], inside[:, :0]), "own of shape"),
        ((own, shadows, inside[1:]), "inside of shape"),
        ((own, shadows, inside.astype(int)), "inside of shape"),
        ((hole, shadows, inside), "not finite"),
        ((own, np.where(inside, np.inf, shadows), inside), "not finite"),
        ((own, shadows, alone), "no IN or no OUT"),
        ((own, shadows, nobody), "no IN or no OUT"),
        ((own, np.ones_like(shadows), inside), "never differ"),
    ):
        with pytest.raises(UsageError, match=part):
            attack(*arguments)


def test_settings_are_checked() -> None:
    world = World()
    own, shadows, inside = world.own, world.shadows, world.inside
    with pytest.raises(UsageError, match="variance=each"):
        lira(own, shadows, inside, variance="each")
    few = np.zeros((2, ROWS), bool)
    few[0] = True
    with pytest.raises(UsageError, match="too few shadows a row"):
        lira(own, shadows[:2], few, variance="row")
    z, shadows_z = own[:5], shadows[:, :5]
    with pytest.raises(UsageError, match="gamma=0"):
        rmia(own, shadows, inside, z, shadows_z, gamma=0)
    with pytest.raises(UsageError, match=r"offline=1\.5"):
        rmia(own, shadows, inside, z, shadows_z, offline=1.5)
    with pytest.raises(UsageError, match="log-probabilities"):
        rmia(own, np.abs(shadows), inside, z, shadows_z, offline=0.3)
    with pytest.raises(UsageError, match="own of shape"):
        rmia(own, shadows, inside, z[1:], shadows_z)
