"""Attacks on tables of which it is known how much they give away."""

import numpy as np
import pandas as pd
import pytest

from dpsynth.audit.attacks import ATTACKS, DIAGNOSTICS, blind, nn_ratio_quantile
from dpsynth.audit.membership import auc, null_band
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

LEVELS = tuple("abcdef")
SCHEMA = Schema(
    (
        *(Column(f"x{i}", "decimal", lower=-9.0, upper=9.0, nullable=i == 0) for i in range(3)),
        Column("wide", "categorical", levels=tuple(map(str, range(300)))),
        Column("job", "categorical", levels=LEVELS, nullable=True),
    )
)


def simulated(rows: int, rng: np.random.Generator, shift: float = 0.0) -> Table:
    """Correlated normals, one of them with gaps, and two categories."""
    x = np.clip(rng.normal(size=(rows, 3)) @ rng.normal(size=(3, 3)) + shift, -9, 9)
    frame = pd.DataFrame(x, columns=["x0", "x1", "x2"])
    frame.loc[rng.random(rows) < 0.1, "x0"] = np.nan
    frame["wide"] = rng.integers(0, 300, rows).astype(str)
    frame["job"] = rng.choice(np.array([*LEVELS, None]), rows)
    return Table.from_frame(frame, SCHEMA)


def parts(sizes: list[int], seed: int) -> list[Table]:
    rng = np.random.default_rng(seed)
    pool = simulated(sum(sizes), rng)
    return [pool.take(rows) for rows in np.split(np.arange(len(pool)), np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("name", ATTACKS)
def test_scores_are_finite_aligned_and_repeatable(name: str) -> None:
    candidates, synthetic, reference = parts([60, 200, 300], 0)
    first, again = (
        ATTACKS[name](candidates, synthetic, reference, np.random.default_rng(7)) for _ in range(2)
    )
    assert first.shape == (60,)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    order = np.random.default_rng(1).permutation(60)
    moved = ATTACKS[name](candidates.take(order), synthetic, reference, np.random.default_rng(7))
    np.testing.assert_allclose(moved, first[order])


@pytest.mark.parametrize("name", ["nn_ratio_quantile", "nn_ratio_range", "dcr"])
def test_neighbours_are_searched_on_the_device_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, synthetic, reference = parts([20, 30, 30], 0)
    rng = np.random.default_rng(7)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU"):
        ATTACKS[name](candidates, synthetic, reference, rng, device="cuda")
    assert len(ATTACKS[name](candidates, synthetic, reference, rng, device="auto")) == 20


@pytest.mark.parametrize("name", [n for n in ATTACKS if n.startswith("nn_")])
def test_a_copy_is_recognised(name: str) -> None:
    members, holdout, reference = parts([400, 400, 400], 1)
    scores = [
        ATTACKS[name](rows, members, reference, np.random.default_rng(0))
        for rows in (members, holdout)
    ]
    assert auc(scores[0], scores[1]) >= 0.999


def test_trees_see_an_overfitted_corner() -> None:
    """A generator that puts out only the members' half of the space."""
    members, holdout, reference = parts([1500, 1500, 1500], 2)
    low = [np.flatnonzero(part.frame["x1"] < 0) for part in (members, holdout)]
    inside, outside = members.take(low[0]), holdout.take(np.flatnonzero(holdout.frame["x1"] > 0))
    scores = [
        ATTACKS["discriminator"](rows, inside, reference, np.random.default_rng(0))
        for rows in (inside, outside)
    ]
    assert auc(scores[0], scores[1]) > 0.95


@pytest.mark.parametrize("name", ATTACKS)
def test_strangers_say_nothing(name: str) -> None:
    found = []
    for seed in range(4):
        members, holdout, synthetic, reference = parts([500] * 4, 10 + seed)
        rng = np.random.default_rng(seed)
        both = Table(SCHEMA, pd.concat([members.frame, holdout.frame], ignore_index=True))
        scores = ATTACKS[name](both, synthetic, reference, rng)
        found.append(auc(scores[:500], scores[500:]))
    # The mean over four seeds has half the spread of one.
    low, _ = null_band(500, 500)
    assert abs(np.mean(found) - 0.5) < (0.5 - low) * 0.75


def test_reference_is_cut_to_the_synthetic_size() -> None:
    """Twice-as-dense reference rows would make every score negative."""
    candidates, synthetic, reference = parts([400, 300, 6000], 3)
    scores = nn_ratio_quantile(candidates, synthetic, reference, np.random.default_rng(0))
    assert abs(np.median(scores)) < 0.1


def test_an_exact_match_beats_every_near_one() -> None:
    members, holdout, reference = parts([300, 300, 300], 4)
    synthetic = Table(SCHEMA, pd.concat([members.frame[:1], holdout.frame], ignore_index=True))
    scores = nn_ratio_quantile(members, synthetic, reference, np.random.default_rng(0))
    assert scores.argmax() == 0


def test_only_numbers_and_only_categories_work() -> None:
    candidates, synthetic, reference = parts([50, 80, 80], 5)
    for names in (["x0", "x1", "x2"], ["job", "wide"]):
        rows, made, known = (part.select(names) for part in (candidates, synthetic, reference))
        for attack in ATTACKS.values():
            assert np.isfinite(attack(rows, made, known, np.random.default_rng(0))).all()


def test_dcr_is_the_diagnostic() -> None:
    assert {"dcr"} == DIAGNOSTICS
    with pytest.raises(TypeError):
        ATTACKS["new"] = ATTACKS["dcr"]  # pyright: ignore[reportIndexIssue]


def test_blind_control_is_even_on_an_honest_split_and_sees_a_shifted_one() -> None:
    members, holdout = parts([800, 800], 6)
    low, high = null_band(800, 800)
    assert low < auc(*blind(members, holdout, np.random.default_rng(0))) < high
    moved = simulated(800, np.random.default_rng(8), shift=2.0)
    assert auc(*blind(members, moved, np.random.default_rng(0))) > 0.8


def test_blind_control_refuses_a_handful() -> None:
    few, many = parts([4, 40], 7)
    with pytest.raises(UsageError, match="at least 5"):
        blind(few, many, np.random.default_rng(0))
    with pytest.raises(UsageError, match="at least 5"):
        blind(many, few, np.random.default_rng(0))
