"""Controls: which rows they hand out, and the audit result that theory gives them."""

import numpy as np
import pandas as pd
import pytest

from dpsynth.audit.attacks import nn_ratio_quantile, nn_ratio_range
from dpsynth.audit.membership import auc, null_band, tpr_at
from dpsynth.baselines import controls
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

ROWS = 5000
SCHEMA = Schema(tuple(Column(f"x{i}", "decimal", lower=-9.0, upper=9.0) for i in range(4)))


def simulated(rows: int, rng: np.random.Generator) -> Table:
    frame = pd.DataFrame(rng.normal(size=(rows, 4)).clip(-9, 9), columns=SCHEMA.names)
    return Table.from_frame(frame, SCHEMA)


def keys(table: Table) -> set[float]:
    return set(table.frame["x0"])


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_p_leak_hands_out_that_share_of_the_members(fraction: float) -> None:
    rng = np.random.default_rng(0)
    members, population = simulated(200, rng), simulated(300, rng)
    leaky = controls.p_leak(members, population, fraction, 200, rng)
    assert len(leaky) == 200
    assert len(keys(leaky) & keys(members)) == round(200 * fraction)
    assert len(keys(leaky) & keys(population)) == 200 - round(200 * fraction)


def test_p_leak_repeats_a_small_population() -> None:
    rng = np.random.default_rng(0)
    members, population = simulated(200, rng), simulated(30, rng)
    leaky = controls.p_leak(members, population, 0.1, 200, rng)
    assert len(leaky) == 200
    assert len(keys(leaky) & keys(members)) == 20


def test_fresh_hands_out_different_strangers() -> None:
    population = simulated(50, np.random.default_rng(0))
    table = controls.fresh(population, 50, np.random.default_rng(1))
    assert keys(table) == keys(population)
    assert len(controls.fresh(population, 7, np.random.default_rng(1))) == 7


def test_copy_is_every_member_once() -> None:
    members = simulated(50, np.random.default_rng(0))
    assert controls.copy(members).digest() == members.digest()


def test_halves_are_disjoint_and_whole() -> None:
    reference = simulated(51, np.random.default_rng(0))
    first, second = controls.halve(reference, np.random.default_rng(1))
    assert (len(first), len(second)) == (25, 26)
    assert keys(first) | keys(second) == keys(reference)
    assert not keys(first) & keys(second)


def scored(attack, synthetic: Table, parts: list[Table]) -> tuple[np.ndarray, np.ndarray]:
    members, holdout, reference = parts
    both = Table(SCHEMA, pd.concat([members.frame, holdout.frame], ignore_index=True))
    scores = attack(both, synthetic, reference, np.random.default_rng(0))
    return scores[: len(members)], scores[len(members) :]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_p_leak_scores_what_theory_says(fraction: float) -> None:
    rng = np.random.default_rng(3)
    members, holdout, reference, population = (simulated(ROWS, rng) for _ in range(4))
    leaky = controls.p_leak(members, population, fraction, ROWS, rng)
    pair = scored(nn_ratio_quantile, leaky, [members, holdout, reference])
    assert auc(*pair) == pytest.approx((1 + fraction) / 2, abs=0.02)
    point = tpr_at(*pair, 0.01, rng)
    assert point.tpr == pytest.approx(fraction + (1 - fraction) * 0.01, abs=0.015)


def test_copy_scores_one_and_a_bootstrap_copy_does_not() -> None:
    rng = np.random.default_rng(4)
    parts = [simulated(1500, rng) for _ in range(3)]
    assert auc(*scored(nn_ratio_range, controls.copy(parts[0]), parts)) >= 0.999
    bootstrap = parts[0].take(rng.integers(1500, size=1500))
    area = auc(*scored(nn_ratio_range, bootstrap, parts))
    assert area == pytest.approx((2 - np.exp(-1)) / 2, abs=0.03)


def test_fresh_stays_in_the_null_band() -> None:
    low, high = null_band(1000, 1000)
    inside = 0
    for seed in range(10):
        rng = np.random.default_rng(100 + seed)
        parts = [simulated(1000, rng) for _ in range(3)]
        synthetic = controls.fresh(simulated(1000, rng), 1000, rng)
        inside += low < auc(*scored(nn_ratio_quantile, synthetic, parts)) < high
    # Binomial(10, .95): fewer than 8 happen once in 90 suites; the seeds are fixed.
    assert inside >= 8


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    table = simulated(10, rng)
    with pytest.raises(UsageError, match="only 10 rows"):
        controls.fresh(table, 11, rng)
    with pytest.raises(UsageError, match="n=0"):
        controls.fresh(table, 0, rng)
    with pytest.raises(UsageError, match="n=0"):
        controls.p_leak(table, table, 0.5, 0, rng)
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="fraction"):
            controls.p_leak(table, table, fraction, 10, rng)
    with pytest.raises(UsageError, match="raise n"):
        controls.p_leak(table, table, 1.0, 9, rng)
    with pytest.raises(UsageError, match="different schemas"):
        controls.p_leak(table, table.select(["x0"]), 0.5, 10, rng)
    with pytest.raises(UsageError, match="at least 4"):
        controls.halve(table.take(np.arange(3)), rng)
