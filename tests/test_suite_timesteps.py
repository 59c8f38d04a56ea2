"""The timestep network learns from shadows what moves with membership, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from dpsynth.audit.membership import auc, null_band
from dpsynth.checks import UsageError
from dpsynth.suite.timesteps import timestep_scores

MODELS, ROWS, RATES, MASKS = 12, 600, 3, 4


def world(shift: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Own losses, shadows' losses, coins and membership: a member's loss is lower by `shift` at the
    middle rate only; how hard rows and masks are differs far more."""
    rng = np.random.default_rng(seed)
    coins = rng.random((MODELS + 1, ROWS)) < 0.5
    coins[1::2] = ~coins[2::2]  # as many shadows of either kind
    hard = rng.gamma(2, 2, (ROWS, RATES, MASKS))
    losses = hard + rng.normal(0, 1, (MODELS + 1, ROWS, RATES, MASKS))
    losses[:, :, 1] -= shift * coins[:, :, None]
    return losses[0], losses[1:], coins[1:], coins[0]


def test_a_lower_loss_of_members_is_found_under_the_differences_of_rows() -> None:
    own, shadows, coins, member = world(1.0)
    scores = timestep_scores(own, shadows, coins, np.random.default_rng(0))
    found = auc(scores[member], scores[~member])
    # Four masks that shift by one against unit noise: Φ(2/√2) = .921 at best.
    assert 0.86 < found < 0.96
    plain = -own.mean(axis=(1, 2))
    assert auc(plain[member], plain[~member]) < 0.7
    again = timestep_scores(own, shadows, coins, np.random.default_rng(0))
    np.testing.assert_array_equal(scores, again)


def test_its_sign_is_learnt() -> None:
    """Were members' losses higher, that would be found too: labels are the coins."""
    own, shadows, coins, member = world(-1.0)
    scores = timestep_scores(own, shadows, coins, np.random.default_rng(0))
    assert auc(scores[member], scores[~member]) > 0.86


def test_nothing_is_found_where_nothing_moves() -> None:
    own, shadows, coins, member = world(0.0)
    scores = timestep_scores(own, shadows, coins, np.random.default_rng(0))
    low, high = null_band(int(member.sum()), int((~member).sum()))
    reach = 2 * (high - low) / 2
    assert abs(auc(scores[member], scores[~member]) - 0.5) < reach


def test_how_hard_a_row_is_under_a_mask_cancels() -> None:
    own, shadows, coins, _ = world(1.0)
    shift = np.random.default_rng(1).normal(0, 5, own.shape)
    before = timestep_scores(own, shadows, coins, np.random.default_rng(0))
    moved = timestep_scores(own + shift, shadows + shift, coins, np.random.default_rng(0))
    np.testing.assert_allclose(moved, before, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    own, shadows, coins, _ = world(0.0)
    rng = np.random.default_rng(0)
    for arguments in (
        (own[0], shadows, coins),
        (own[1:], shadows, coins),
        (own, shadows, coins[1:]),
    ):
        with pytest.raises(UsageError, match="losses of shapes"):
            timestep_scores(*arguments, rng)
    alone = coins.copy()
    alone[1:, 0] = True
    with pytest.raises(UsageError, match="fewer than 2 OUT"):
        timestep_scores(own, shadows, alone, rng)
