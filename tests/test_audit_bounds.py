"""Lower bounds against closed forms and slow searches; how often they lie above the truth, and what
a perfect attack can show."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpsynth.audit import bounds
from dpsynth.audit.bounds import (
    Curve,
    Errors,
    Family,
    attainable,
    clopper_pearson,
    curve_of_profile,
    epsilon_from_family,
    epsilon_of_mu,
    gaussian,
    gaussian_curve,
    gaussian_family,
    lower_bounds,
    mu_from_rates,
    noise,
    optimal_levels,
)
from dpsynth.checks import UsageError
from dpsynth.privacy.accounting import gdp_delta, gdp_epsilon
from dpsynth.privacy.calibration import gaussian_mu, training
from dpsynth.training.canaries import scaled_epsilon, scaled_profile

DELTA = 1e-5
RATES = np.linspace(0.001, 0.999, 201)
# DP-SGD, ε = 4.0: q = .05, T = 100.
SGD = [training(0.9434, 0.05, 100)]


def sgd_family(steps: int = 8) -> Family:
    return Family.of_profiles(
        lambda s: scaled_profile(SGD, s), lambda s: scaled_epsilon(SGD, s, DELTA), steps
    )


# Curves and families


@pytest.mark.parametrize("mu", [0.1, 0.925, 3.0])
def test_gaussian_curve_is_that_of_the_likelihood_ratio_test(mu: float) -> None:
    """Every threshold of N(0, 1) against N(μ, 1) gives a point of the curve."""
    cuts = np.linspace(-3, 6, 50)
    fpr, fnr = stats.norm.sf(cuts), stats.norm.cdf(cuts - mu)
    np.testing.assert_allclose(gaussian_curve(mu)(fpr), fnr, atol=1e-12)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_curve_of_a_gaussian_profile_lies_just_below_the_gaussian_curve(mu: float) -> None:
    epsilons = np.linspace(0, 6 * mu + mu * mu, 2000)
    found, exact = curve_of_profile(epsilons, gdp_delta(epsilons, mu))(RATES), gaussian_curve(mu)
    assert (found <= exact(RATES) + 1e-12).all()
    np.testing.assert_allclose(found, exact(RATES), atol=2e-3)


def test_curve_of_one_pair_is_its_two_lines() -> None:
    epsilon, delta = 1.3, 0.02
    steep, flat = 1 - delta - math.exp(1.3) * RATES, math.exp(-1.3) * (1 - delta - RATES)
    expected = np.maximum(0, np.maximum(steep, flat))
    found = curve_of_profile(np.array([epsilon]), np.array([delta]))(RATES)
    np.testing.assert_allclose(found, expected, atol=1e-15)


@pytest.mark.parametrize("mu", [1e-3, 0.268, 2.0, 12.0])
def test_epsilon_of_mu_is_the_accountants(mu: float) -> None:
    assert epsilon_of_mu(mu, DELTA) == pytest.approx(gdp_epsilon(DELTA, mu), abs=1e-9)
    assert epsilon_of_mu(0.0, DELTA) == 0.0


@pytest.mark.parametrize("truth", [1.5e-3, 0.3, 0.99, 1.0, 1.01, 7.0, 1000.0])
@pytest.mark.parametrize("steps", [1, 32])
def test_the_least_refuted_scale_is_found_from_above(truth: float, steps: int) -> None:
    """The scale itself stands for the curve here, so that a scan of all of them is the oracle."""
    asked = []

    def curve(scale: float) -> Any:
        asked.append(scale)
        return scale

    found = Family(curve, lambda s: 1 / s, steps).least_refuted(lambda s: s >= truth)  # type: ignore[operator]
    scan = [2.0 ** (k / steps) for k in range(-10 * steps, 10 * steps + 1)]
    assert found == next(s for s in scan if s >= truth)
    assert len(asked) == len(set(asked)) <= 10 + 2 * math.log2(2 * steps) + 2


def test_a_family_without_a_refuted_scale_shows_nothing() -> None:
    family = gaussian_family(DELTA)
    assert family.least_refuted(lambda _: False) == math.inf
    assert family.bound(lambda _: False) == 0.0
    assert family.least_refuted(lambda _: True) == 2.0**-10


# Bounds from errors


@pytest.mark.parametrize(
    ("missed", "false"), [(12, 3), (31, 20), (0, 0), (45, 45), (60, 50), (100, 0)]
)
def test_the_family_of_gaussians_gives_the_gaussian_bound(missed: int, false: int) -> None:
    mu = mu_from_rates(missed, 100, false, 100)
    found = epsilon_from_family(missed, 100, false, 100, gaussian_family(DELTA))
    step = 2 ** (1 / 1024)
    low = epsilon_of_mu(mu / step, DELTA) if mu > 2**-10 else 0.0
    assert low - 1e-9 <= found <= epsilon_of_mu(mu, DELTA) + 1e-9


def test_more_errors_never_show_more() -> None:
    family = gaussian_family(DELTA)
    forms = [clopper_pearson(DELTA), gaussian(DELTA), noise(family)]
    for form in forms:
        shown = [form(Errors(k, 60, k, 60), 0.05) for k in range(0, 61, 4)]
        assert shown == sorted(shown, reverse=True)
        assert shown[0] > 2 and shown[-1] == 0


def truths() -> list[tuple[str, Curve, Callable[[], Any], float]]:
    """A mechanism on the edge of each form's claim, and its ε."""
    epsilon, family = 2.0, sgd_family()
    pure = curve_of_profile(np.array([epsilon]), np.array([0.0]))
    mu = 0.925
    return [
        ("randomised response", pure, lambda: clopper_pearson(0.0), epsilon),
        ("gaussian", gaussian_curve(mu), lambda: gaussian(DELTA), epsilon_of_mu(mu, DELTA)),
        ("dp-sgd", family.curve(1.0), lambda: noise(family), family.epsilon(1.0)),
    ]


@pytest.mark.parametrize("case", truths(), ids=lambda case: case[0])
@pytest.mark.parametrize("rule", ["fixed", "grid", "half"])
def test_bounds_from_scores_lie_above_the_truth_as_rarely_as_stated(
    case: tuple[str, Curve, Callable[[], Any], float],
    rule: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scores are minus the levels of the mechanism's best test: every threshold is tight."""
    monkeypatch.setattr(bounds, "attainable", lambda *_, **__: math.nan)
    name, curve, form, truth = case
    rng, alpha, size = np.random.default_rng(7), 0.2, 200
    times = 25 if name == "dp-sgd" else 150
    grid = {"fixed": [-0.2], "grid": list(-np.geomspace(0.01, 0.7, 12)), "half": None}[rule]
    bound, found = form(), []
    for _ in range(times):
        levels = optimal_levels(curve, np.repeat([True, False], size), rng)
        inside, outside = -levels[:size], -levels[size:]
        shown = lower_bounds(
            inside, outside, {"it": bound}, _none, rng, thresholds=grid, confidence=1 - alpha
        )
        found.append(shown["it"].epsilon)
    assert (np.array(found) > truth).mean() <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / times)
    assert np.median(found) > 0.2 * truth


def _none(fpr: np.ndarray) -> np.ndarray:
    """A claim of nothing, whose attainable best costs nothing to find."""
    return 1 - np.asarray(fpr)


def test_choosing_the_best_of_many_thresholds_unpaid_would_be_flagged() -> None:
    """What the test above would see of it: the level is not divided."""
    rng, alpha = np.random.default_rng(7), 0.2
    pure = curve_of_profile(np.array([0.5]), np.array([0.0]))
    form, above = clopper_pearson(0.0), 0
    for _ in range(200):
        levels = optimal_levels(pure, np.repeat([True, False], 200), rng)
        made = [Errors.at(t, -levels[:200], -levels[200:]) for t in -np.geomspace(0.005, 0.9, 60)]
        above += max(form(e, 2 * alpha) for e in made) > 0.5
    assert above / 200 > alpha + 3 * math.sqrt(alpha * (1 - alpha) / 200)


def test_scores_are_cut_where_it_says() -> None:
    inside, outside = np.array([0.2, 0.9, 0.8]), np.array([0.1, 0.85, 0.3, 0.4])
    rng = np.random.default_rng(0)
    forms = {"cp": clopper_pearson(DELTA)}
    found = lower_bounds(inside, outside, forms, _none, rng, thresholds=[0.5])["cp"]
    assert (found.threshold, found.errors, found.alpha) == (
        0.5,
        Errors(1, 3, 1, 4),
        pytest.approx(0.05),
    )
    many = lower_bounds(inside, outside, forms, _none, rng, thresholds=[0.5, 0.95])["cp"]
    assert many.alpha == pytest.approx(0.025)


def test_a_threshold_that_was_chosen_is_judged_by_other_scores() -> None:
    inside, outside = np.arange(40) + 20.0, np.arange(50) + 0.0
    forms = {"cp": clopper_pearson(DELTA), "gdp": gaussian(DELTA)}
    found = lower_bounds(inside, outside, forms, _none, np.random.default_rng(0))
    for bound in found.values():
        assert (bound.errors.members, bound.errors.others) == (20, 25)


# What is attainable


@pytest.mark.parametrize("mu", [0.3, 2.0])
def test_optimal_levels_follow_the_curve(mu: float) -> None:
    rng = np.random.default_rng(3)
    curve = gaussian_curve(mu)
    present = np.repeat([True, False], 40_000)
    levels = optimal_levels(curve, present, rng)
    for rate in (0.001, 0.05, 0.4, 0.9):
        assert (levels[~present] <= rate).mean() == pytest.approx(rate, abs=0.012)
        power = 1 - float(curve(np.array([rate]))[0])
        assert (levels[present] <= rate).mean() == pytest.approx(power, abs=0.012)


def test_no_attack_of_another_threshold_shows_more_than_is_attainable() -> None:
    rng, size = np.random.default_rng(4), 500
    curve = gaussian_curve(1.2)
    for form in (clopper_pearson(DELTA), gaussian(DELTA)):
        best = attainable(form, curve, size, size, rng)
        shown = []
        for rate in (0.003, 0.01, 0.05, 0.2, 0.27, 0.5):
            fnr = float(curve(np.array([rate]))[0])
            pairs = zip(rng.binomial(size, fnr, 300), rng.binomial(size, rate, 300), strict=True)
            shown.append(
                np.median([form(Errors(int(m), size, int(f), size), 0.05) for m, f in pairs])
            )
        assert max(shown) == pytest.approx(best, rel=0.1)
        assert max(shown) < 1.05 * best


@pytest.mark.parametrize(
    ("epsilon", "pairs", "gaussians"), [(1, 0.12, 0.40), (4, 1.28, 3.2), (10, 3.15, 8.8)]
)
def test_a_thousand_runs_a_side_show_what_the_table_says(
    epsilon: float, pairs: float, gaussians: float
) -> None:
    """Table of `experiments/one-run`: μ-GDP with that ε at δ = 1e-5, the best fixed threshold."""
    curve, rng = gaussian_curve(gaussian_mu(epsilon, DELTA)), np.random.default_rng(0)
    found = [attainable(f(DELTA), curve, 1000, 1000, rng) for f in (clopper_pearson, gaussian)]
    assert found == pytest.approx([pairs, gaussians], rel=0.08)
    assert max(found) < epsilon


# Refusals


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: epsilon_of_mu(-1.0, DELTA), "mu=-1.0"),
        (lambda: epsilon_of_mu(1.0, 0.0), "delta=0.0"),
        (lambda: gaussian_curve(0.0), "mu=0.0"),
        (lambda: curve_of_profile(np.zeros(2), np.zeros(3)), "equally long"),
        (lambda: curve_of_profile(np.array([-1.0]), np.zeros(1)), "every epsilon"),
        (lambda: curve_of_profile(np.array([1.0]), np.array([1.5])), "every delta"),
        (lambda: Family(gaussian_curve, abs, 0), "steps=0"),
        (lambda: scored(np.array([np.nan, 1.0])), "finite"),
        (lambda: scored(np.zeros((2, 2))), "one row"),
        (lambda: scored(np.zeros(1)), "scores inside=1"),
        (lambda: scored(np.zeros(4), thresholds=[]), "at least one"),
        (lambda: scored(np.zeros(4), confidence=1.0), "confidence=1.0"),
        (lambda: attainable(gaussian(DELTA), _none, 0, 5, np.random.default_rng(0)), "members=0"),
        (lambda: attainable(gaussian(DELTA), _none, 5, 0, np.random.default_rng(0)), "others=0"),
        (
            lambda: attainable(gaussian(DELTA), _none, 5, 5, np.random.default_rng(0), times=0),
            "times=0",
        ),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


def scored(inside: np.ndarray, **settings: Any) -> Any:
    forms = {"cp": clopper_pearson(DELTA)}
    return lower_bounds(inside, np.zeros(4), forms, _none, np.random.default_rng(0), **settings)
