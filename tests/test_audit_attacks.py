"""Attacks on tables of which it is known how much they give away."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpsynth.audit.attacks import (
    ATTACKS,
    DIAGNOSTICS,
    QUICK,
    blind,
    nn_ratio_quantile,
    row_hashes,
    score_all,
)
from dpsynth.audit.neighbours import distances, quantile_map, range_map
from dpsynth.audit.statistics import auc, null_band
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


@pytest.mark.parametrize("name", QUICK)
def test_scores_are_finite_aligned_and_repeatable(name: str) -> None:
    candidates, synthetic, reference = parts([60, 200, 300], 0)
    first, again = (
        QUICK[name](candidates, synthetic, reference, np.random.default_rng(7)) for _ in range(2)
    )
    assert first.shape == (60,)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    order = np.random.default_rng(1).permutation(60)
    moved = QUICK[name](candidates.take(order), synthetic, reference, np.random.default_rng(7))
    np.testing.assert_allclose(moved, first[order])


@pytest.mark.parametrize("name", sorted(set(QUICK) - {"discriminator", "identical"}))
def test_neighbours_are_searched_on_the_device_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, synthetic, reference = parts([20, 30, 30], 0)
    rng = np.random.default_rng(7)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU"):
        QUICK[name](candidates, synthetic, reference, rng, device="cuda")
    assert len(QUICK[name](candidates, synthetic, reference, rng, device="auto")) == 20


@pytest.mark.parametrize(
    "name", sorted(set(QUICK) - {"discriminator", "domias_quantile", "domias_range"})
)
def test_a_copy_is_recognised(name: str) -> None:
    members, holdout, reference = parts([400, 400, 400], 1)
    scores = [
        QUICK[name](rows, members, reference, np.random.default_rng(0))
        for rows in (members, holdout)
    ]
    assert auc(scores[0], scores[1]) >= 0.999


def test_attacks_together_score_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And search each metric and each side once."""
    candidates, synthetic, reference = parts([60, 90, 200], 20)
    alone = {
        name: attack(candidates, synthetic, reference, np.random.default_rng(3))
        for name, attack in QUICK.items()
    }
    searches = []

    def counted(*args: Any, **options: Any) -> np.ndarray:
        searches.append((options["k"], options["power"], len(args[1])))
        return distances(*args, **options)

    monkeypatch.setattr("dpsynth.audit.attacks.distances", counted)
    rng = np.random.default_rng(3)
    together = score_all(QUICK, candidates, synthetic, reference, rng)
    assert list(together) == list(QUICK)
    for name, scores in alone.items():
        np.testing.assert_allclose(together[name], scores, rtol=1e-9, err_msg=name)
    # The reference is cut to the synthetic size.
    assert sorted(searches) == [(5, 1, 90), (5, 1, 90), (5, 2, 90), (5, 2, 90)]
    assert score_all({}, candidates, synthetic, reference, rng) == {}


def brute(rows: Table, keys: Table, reference: Table, power: int) -> np.ndarray:
    """Sorted distances (rows, keys), one pair at a time."""
    measure = quantile_map(reference) if power == 1 else range_map(reference.schema)
    x, y = measure(rows), measure(keys)
    gaps = np.minimum(np.abs(x.numbers[:, None] - y.numbers[None]), 1) ** power
    gaps = gaps.sum(axis=2) + (x.codes[:, None] != y.codes[None]).sum(axis=2)
    return np.sort(gaps ** (1 / power), axis=1)


@pytest.mark.parametrize("power", [1, 2])
def test_density_ratio_is_that_of_the_fifth_radii(power: int) -> None:
    candidates, synthetic, reference = parts([30, 50, 50], 21)
    radii = [brute(candidates, part, reference, power)[:, 4] for part in (reference, synthetic)]
    name = {1: "domias_quantile", 2: "domias_range"}[power]
    scores = QUICK[name](candidates, synthetic, reference, np.random.default_rng(0))
    np.testing.assert_allclose(scores, np.log(radii[0] / radii[1]), rtol=1e-6)


def test_diagnostics_and_matches_by_hand() -> None:
    members, holdout, reference = parts([40, 40, 60], 22)
    frames = [members.frame[:10], members.frame[:5], holdout.frame[:30]]
    synthetic = Table(SCHEMA, pd.concat(frames, ignore_index=True))
    found = score_all(QUICK, members, synthetic, reference, np.random.default_rng(0))
    near = brute(members, synthetic, reference, 1)
    known = brute(members, reference.take(np.arange(60)), reference, 1)[:, 0]
    copied = np.arange(40) < 10
    np.testing.assert_array_equal(found["identical"], copied)
    np.testing.assert_allclose(found["dcr"], -near[:, 0], atol=1e-12)
    expected = np.where(near[:, 1] == 0, -1, -near[:, 0] / np.where(near[:, 1], near[:, 1], 1))
    np.testing.assert_allclose(found["nndr"], expected, atol=1e-7)
    # Fewer synthetic rows than reference rows: the nearest known row may be one that was cut.
    cut = found["identical_calibrated"]
    assert (cut[~copied] == 0).all()
    assert (cut[copied] >= known[copied] - 1e-12).all()
    assert (cut[copied] > 0).all()
    seen = Table(SCHEMA, pd.concat([reference.frame, members.frame], ignore_index=True))
    large = Table(SCHEMA, pd.concat([synthetic.frame] * 3, ignore_index=True))
    again = QUICK["identical_calibrated"](members, large, seen, np.random.default_rng(0))
    assert (again == 0).all()


def test_row_hashes_are_equal_where_rows_are() -> None:
    (rows,) = parts([300], 23)
    twice = Table(SCHEMA, pd.concat([rows.frame, rows.frame], ignore_index=True))
    hashes = row_hashes(twice)
    np.testing.assert_array_equal(hashes[:300], hashes[300:])
    assert len(np.unique(hashes)) == 300


def test_refuses_too_few_rows_for_its_neighbours() -> None:
    candidates, synthetic, reference = parts([10, 4, 40], 24)
    for name in ("domias_quantile", "domias_range"):
        with pytest.raises(UsageError, match="k=5: there are only 4 rows"):
            QUICK[name](candidates, synthetic, reference, np.random.default_rng(0))


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


@pytest.mark.parametrize("name", QUICK)
def test_strangers_say_nothing(name: str) -> None:
    found = []
    for seed in range(4):
        members, holdout, synthetic, reference = parts([500] * 4, 10 + seed)
        rng = np.random.default_rng(seed)
        both = Table(SCHEMA, pd.concat([members.frame, holdout.frame], ignore_index=True))
        scores = QUICK[name](both, synthetic, reference, rng)
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
        for attack in QUICK.values():
            assert np.isfinite(attack(rows, made, known, np.random.default_rng(0))).all()


def test_what_has_no_reference_is_a_diagnostic() -> None:
    assert {"dcr", "identical", "nndr"} == DIAGNOSTICS
    assert list(QUICK)[: len(ATTACKS)] == list(ATTACKS)
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
