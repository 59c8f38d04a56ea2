"""Choosing among attacks: level and power of the max-T band, selection, intervals over models."""

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from dpsynth.audit.selection import MaxT, choose, max_t, two_level
from dpsynth.audit.statistics import Scores, auc, aucs, null_band, tprs
from dpsynth.checks import UsageError


def correlated(
    ones: int, zeros: int, rng: np.random.Generator, *, attacks: int = 6, shift: float = 0.0
) -> dict[str, Scores]:
    """Attacks that share half of their variance, one in two with many ties; the first one knows."""
    rows = ones + zeros
    scores = rng.normal(size=rows) + rng.normal(size=(attacks, rows))
    scores[0, :ones] += shift
    scores[::2] = np.round(scores[::2] / 1.5)
    return {f"a{i}": (row[:ones], row[ones:]) for i, row in enumerate(scores)}


def exhaustive(scores: Mapping[str, Scores]) -> MaxT:
    """All ways to deal the labels, AUC by counting pairs, p-values by the textbook."""
    together = np.stack([np.concatenate(pair) for pair in scores.values()])
    ones = len(next(iter(scores.values()))[0])
    rows = range(together.shape[1])
    dealt = []
    for chosen in itertools.combinations(rows, ones):
        rest = [row for row in rows if row not in chosen]
        pairs = together[:, chosen][:, :, None] - together[:, rest][:, None]
        dealt.append(((pairs > 0) + (pairs == 0) / 2).mean(axis=(1, 2)))
    dealt = np.array(dealt)
    found, spread = dealt[0], dealt.std(axis=0)
    standard = (dealt - 0.5) / np.where(spread > 0, spread, 1)
    reached = standard[0]
    p_values, worst = np.empty(len(found)), 0.0
    left = list(np.argsort(-reached, kind="stable"))
    while left:
        best = left[0]
        worst = max(worst, (standard[:, left].max(axis=1) >= reached[best] - 1e-9).mean())
        p_values[best] = worst
        left = left[1:]
    critical = np.quantile(standard.max(axis=1), 0.95, method="inverted_cdf")
    return MaxT(tuple(scores), found, 0.5 + critical * spread, p_values)


def test_permutations_agree_with_all_of_them() -> None:
    rng = np.random.default_rng(0)
    scores = correlated(5, 6, rng, shift=2.0)
    scores["flat"] = (np.ones(5), np.ones(6))
    known = exhaustive(scores)
    found = max_t(scores, rng, permutations=39_999)
    assert found.names == known.names
    np.testing.assert_allclose(found.aucs, known.aucs)
    np.testing.assert_allclose(found.p_values, known.p_values, atol=0.01)
    np.testing.assert_allclose(found.band, known.band, atol=0.012)
    assert (found.p_values[-1], found.band[-1], found.aucs[-1]) == (1, 0.5, 0.5)


def test_level_holds_over_correlated_attacks() -> None:
    """400 fair trials at 5 %: between 8 and 34 alarms but for once in 1000 suites."""
    rng = np.random.default_rng(1)
    results = [max_t(correlated(40, 50, rng), rng, permutations=199) for _ in range(400)]
    alarms = sum((result.aucs > result.band).any() for result in results)
    assert 8 <= alarms <= 34
    # The band of a single attack, used for the best of six, would cry wolf far too often.
    lone = 0.5 + (null_band(40, 50)[1] - 0.5) * 1.645 / 1.96
    assert np.mean([(result.aucs > lone).any() for result in results]) > 0.1


def test_band_and_p_values_say_the_same() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.3, 0.6, 1.0):
        for alpha in (0.05, 0.2):
            scores = correlated(40, 50, rng, shift=shift)
            result = max_t(scores, rng, permutations=299, alpha=alpha)
            assert (result.aucs > result.band).any() == (result.p_values <= alpha).any()
            assert ((result.aucs > result.band) <= (result.p_values <= alpha)).all()


def test_one_untied_attack_is_the_rank_sum_test() -> None:
    rng = np.random.default_rng(3)
    pair = (rng.normal(0.2, 1, 200), rng.normal(size=150))
    result = max_t({"one": pair}, rng, permutations=9_999)
    known = stats.mannwhitneyu(*pair, alternative="greater").pvalue
    assert result.p_values[0] == pytest.approx(known, abs=0.012)
    high = 0.5 + (null_band(200, 150)[1] - 0.5) * 1.6449 / 1.95996
    assert result.band[0] == pytest.approx(high, abs=0.003)


def test_a_leak_is_found_and_the_others_stay_clean() -> None:
    rng = np.random.default_rng(4)
    result = max_t(correlated(200, 200, rng, shift=1.0), rng)
    assert result.p_values[0] == 1 / 2000
    assert (result.p_values[1:] > 0.05).all()
    assert result.aucs[0] > result.band[0]


def test_copies_of_an_attack_cost_nothing() -> None:
    """Bonferroni would multiply the p-value by ten."""
    rng = np.random.default_rng(5)
    pair = (rng.normal(0.25, 1, 200), rng.normal(size=200))
    alone, many = (
        max_t({str(i): pair for i in range(count)}, np.random.default_rng(0)) for count in (1, 10)
    )
    assert (many.p_values == alone.p_values[0]).all()
    assert (many.band == alone.band[0]).all()


def test_halves_choose_on_one_and_report_on_the_other() -> None:
    rng = np.random.default_rng(6)
    scores = correlated(61, 80, rng, shift=4.0)
    choice = choose(scores, [], rng)
    assert (choice.name, choice.on_models) == ("a0", False)
    assert (len(choice.members), len(choice.holdout)) == (31, 40)
    inner = np.setdiff1d(np.arange(61), choice.members)
    outer = np.setdiff1d(np.arange(80), choice.holdout)
    assert (len(inner), len(outer)) == (30, 40)
    picked = choice.pick(scores["a1"])
    np.testing.assert_array_equal(picked[0], scores["a1"][0][choice.members])
    np.testing.assert_array_equal(picked[1], scores["a1"][1][choice.holdout])
    # An attack that is good on the reporting half only is not the one chosen.
    late = (np.isin(np.arange(61), choice.members) * 9.0, rng.random(80))
    again = choose({**scores, "late": late}, [], np.random.default_rng(6))
    assert again.name == "a0"


def test_models_choose_by_their_mean_and_leave_all_rows() -> None:
    rng = np.random.default_rng(7)
    scores = correlated(20, 30, rng, attacks=3)
    good, bad = (np.arange(10.0) + 10, np.arange(12.0)), (np.arange(10.0), np.arange(12.0) + 9)
    pseudo = [{"a0": good, "a1": good, "a2": bad}, {"a0": bad, "a1": good, "a2": good, "else": bad}]
    choice = choose(scores, pseudo, rng)
    assert (choice.name, choice.on_models) == ("a1", True)
    np.testing.assert_array_equal(choice.members, np.arange(20))
    np.testing.assert_array_equal(choice.holdout, np.arange(30))


def test_luck_in_choosing_is_not_reported() -> None:
    rng = np.random.default_rng(8)
    best, reported = [], []
    for _ in range(100):
        scores = correlated(40, 40, rng, attacks=20)
        choice = choose(scores, [], rng)
        best.append(max(auc(*pair) for pair in scores.values()))
        reported.append(auc(*choice.pick(scores[choice.name])))
    # 100 AUCs of 20 rows a side each: their mean has a standard error of .0093.
    assert abs(np.mean(reported) - 0.5) < 0.03
    assert np.mean(best) > 0.57


@pytest.mark.parametrize("fpr", [None, 0.1])
def test_resampling_by_counts_is_resampling_rows(fpr: float | None) -> None:
    """The same draws, each measured row by row."""
    rng = np.random.default_rng(9)
    models = [
        (np.round(rng.normal(0.5, 1, 30), 1), np.round(rng.normal(size=40), 1)) for _ in range(3)
    ]
    found = two_level(models, np.random.default_rng(1), fpr=fpr, draws=60)
    again = np.random.default_rng(1)
    picked = again.integers(3, size=(60, 3))
    totals = np.zeros(60)

    def measured(pair: Scores) -> np.ndarray:
        return aucs(*pair) if fpr is None else tprs(*pair, fpr)

    for number, (members, holdout) in enumerate(models):
        owners = np.nonzero(picked == number)[0]
        rows = [side[again.integers(len(side), size=(len(owners), len(side)))]
                for side in (members, holdout)]  # fmt: skip
        np.add.at(totals, owners, measured((rows[0], rows[1])))
    low, high = np.quantile(totals / 3, [0.025, 0.975])
    mean = np.mean([measured((m[None], h[None])) for m, h in models])
    assert found == pytest.approx((mean, low, high))


def test_interval_over_models_covers_where_pooling_does_not() -> None:
    """Models differ in how much they leak; the truth is the mean over all models."""
    rng = np.random.default_rng(10)
    levels = rng.normal(0.6, 0.5, 200_000)
    truth = stats.norm.cdf(levels / math.sqrt(2)).mean()
    covered = pooled = 0
    for _ in range(200):
        models = [
            (rng.normal(level, 1, 60), rng.normal(size=60)) for level in rng.normal(0.6, 0.5, 12)
        ]
        _, low, high = two_level(models, rng, draws=200)
        covered += low <= truth <= high
        mean = np.mean([auc(*pair) for pair in models])
        # What records alone would vary by.
        narrow = 1.96 * math.sqrt(121 / (12 * 60 * 60 * 12))
        pooled += abs(mean - truth) <= narrow
    assert 0.88 <= covered / 200 <= 0.99
    assert pooled / 200 < 0.75


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    pair = (np.arange(5.0), np.arange(6.0))
    with pytest.raises(UsageError, match=r"permutations=18: alpha=0\.05 needs at least 19"):
        max_t({"a": pair}, rng, permutations=18)
    with pytest.raises(UsageError, match="permutations=0"):
        max_t({"a": pair}, rng, permutations=0)
    with pytest.raises(UsageError, match="alpha=1"):
        max_t({"a": pair}, rng, alpha=1)
    with pytest.raises(UsageError, match="no attack scores"):
        max_t({}, rng)
    with pytest.raises(UsageError, match="different numbers of rows"):
        max_t({"a": pair, "b": (pair[1], pair[0])}, rng)
    with pytest.raises(UsageError, match="not finite"):
        max_t({"a": (pair[0] + math.inf, pair[1])}, rng)
    with pytest.raises(UsageError, match="no attack scores"):
        choose({}, [], rng)
    with pytest.raises(UsageError, match="halves need at least 2"):
        choose({"a": (pair[0][:1], pair[1])}, [], rng)
    with pytest.raises(UsageError, match="selection model 1 has no scores of a, b;"):
        choose({"a": pair, "b": pair}, [{"a": pair, "b": pair}, {}], rng)
    with pytest.raises(UsageError, match="draws=39"):
        two_level([pair, pair], rng, draws=39)
    with pytest.raises(UsageError, match="at least 2"):
        two_level([pair], rng)
    with pytest.raises(UsageError, match="fpr=0"):
        two_level([pair, pair], rng, fpr=0)
    with pytest.raises(UsageError, match="not finite"):
        two_level([pair, (pair[0], pair[1] + math.nan)], rng)
