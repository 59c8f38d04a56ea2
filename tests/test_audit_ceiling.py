"""Ceilings against closed forms, an accountant, and the laws of trade-off curves."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from dpsynth.audit import Ceiling
from dpsynth.checks import UsageError

EPSILONS = np.linspace(0, 12, 1200)


def gdp_profile(mu: float) -> np.ndarray:
    """δ(ε) of μ-GDP (Balle & Wang 2018, theorem 8)."""
    low, high = -EPSILONS / mu + mu / 2, -EPSILONS / mu - mu / 2
    return norm.cdf(low) - np.exp(EPSILONS) * norm.cdf(high)


def all_ceilings() -> list[Ceiling]:
    return [
        Ceiling.from_epsilon_delta(0.0, 0.0),
        Ceiling.from_epsilon_delta(1.0, 1e-5),
        Ceiling.from_epsilon_delta(1000.0, 1e-5),
        Ceiling.from_gdp(0.268),
        Ceiling.from_profile(list(EPSILONS), list(gdp_profile(0.925))),
        Ceiling.none(),
    ]


@pytest.mark.parametrize("ceiling", all_ceilings())
def test_is_monotone_concave_and_never_below_guessing(ceiling: Ceiling) -> None:
    assert (np.diff(ceiling.tpr) >= 0).all()
    # On even steps; slopes over the grid's least steps, 1e-14 apart, would be mostly rounding.
    even = np.interp(np.linspace(0, 1, 401), ceiling.fpr, ceiling.tpr)
    assert (np.diff(even, 2) <= 1e-12).all()
    assert (ceiling.tpr >= ceiling.fpr - 1e-12).all()


@pytest.mark.parametrize(("epsilon", "known"), [(1, 0.731), (4, 0.982), (10, 0.99995)])
def test_epsilon_delta_auc(epsilon: float, known: float) -> None:
    exact = 1 - (1 - 1e-5) ** 2 / (1 + math.exp(epsilon))
    area = Ceiling.from_epsilon_delta(epsilon, 1e-5).auc
    assert area == pytest.approx(known, abs=6e-4)
    assert exact <= area <= exact + 1e-4


@pytest.mark.parametrize(("mu", "known"), [(0.268, 0.575), (0.925, 0.744), (2.0, 0.921)])
def test_gdp_auc(mu: float, known: float) -> None:
    exact = norm.cdf(mu / math.sqrt(2))
    area = Ceiling.from_gdp(mu).auc
    assert area == pytest.approx(known, abs=6e-4)
    assert exact <= area <= exact + 1e-4


@pytest.mark.parametrize("fpr", [1e-9, 1e-3, 0.01, 0.1, 0.5, 0.999, 0.12345678])
def test_tpr_is_that_of_the_closed_form_and_never_below(fpr: float) -> None:
    bound = min(1, math.e * fpr + 1e-5, 1 - (1 - 1e-5 - fpr) / math.e)
    assert Ceiling.from_epsilon_delta(1, 1e-5).tpr_at(fpr) == pytest.approx(bound, abs=3e-4)
    assert Ceiling.from_epsilon_delta(1, 1e-5).tpr_at(fpr) >= bound - 1e-12
    bound = norm.cdf(norm.ppf(fpr) + 1)
    assert bound - 1e-12 <= Ceiling.from_gdp(1).tpr_at(fpr) <= bound + 3e-4


def test_points_that_are_reported_lie_on_the_grid() -> None:
    ceiling = Ceiling.from_gdp(1)
    for fpr in (0.001, 0.01, 0.1):
        assert ceiling.tpr_at(fpr) == pytest.approx(norm.cdf(norm.ppf(fpr) + 1), abs=1e-12)


def test_profile_of_a_gaussian_gives_the_gaussian_curve_from_above() -> None:
    exact = Ceiling.from_gdp(0.925)
    profile = Ceiling.from_profile(list(EPSILONS), list(gdp_profile(0.925)))
    assert (profile.tpr >= exact.tpr - 1e-9).all()
    assert profile.auc == pytest.approx(exact.auc, abs=2e-4)


def test_fewer_pairs_only_loosen() -> None:
    deltas = gdp_profile(0.925)
    fine = Ceiling.from_profile(list(EPSILONS), list(deltas))
    coarse = Ceiling.from_profile(list(EPSILONS[::100]), list(deltas[::100]))
    assert (coarse.tpr >= fine.tpr).all()
    assert coarse.auc > fine.auc


def test_no_guarantee_allows_everything() -> None:
    assert Ceiling.none().auc == 1
    assert Ceiling.from_epsilon_delta(math.inf, 1e-5).tpr_at(0) == 1
    assert Ceiling.from_gdp(math.inf).tpr_at(0.01) == 1


def test_perfect_privacy_allows_guessing_only() -> None:
    assert Ceiling.from_epsilon_delta(0, 0).auc == pytest.approx(0.5, abs=1e-4)


def test_subsampled_gaussian_against_an_accountant() -> None:
    pld = pytest.importorskip("dp_accounting.pld.privacy_loss_distribution")
    one = pld.from_gaussian_mechanism(
        0.8226379394531251, sampling_prob=0.01, value_discretization_interval=1e-3
    )
    run = one.self_compose(2000)
    assert run.get_epsilon_for_delta(1e-5) == pytest.approx(4, abs=1e-2)
    ceiling = Ceiling.from_profile(list(EPSILONS), run.get_delta_for_epsilon(EPSILONS))
    assert ceiling.auc == pytest.approx(0.715, abs=1e-3)
    assert ceiling.tpr_at(0.01) == pytest.approx(0.068, abs=1e-3)


@pytest.mark.parametrize(
    ("epsilons", "deltas", "part"),
    [
        ([], [], "at least one"),
        ([1.0], [0.1, 0.2], "equally"),
        ([-1.0], [0.1], "epsilon"),
        ([math.inf], [0.1], "epsilon"),
        ([math.nan], [0.1], "epsilon"),
        ([1.0], [1.1], "delta"),
        ([1.0], [-0.1], "delta"),
        ([1.0], [math.nan], "delta"),
    ],
)
def test_refuses_a_profile(epsilons: list[float], deltas: list[float], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Ceiling.from_profile(epsilons, deltas)


def test_rounding_noise_of_an_accountant_counts_as_zero() -> None:
    noisy = Ceiling.from_profile([1.0], [-1e-14])
    assert (noisy.tpr == Ceiling.from_epsilon_delta(1.0, 0.0).tpr).all()


@pytest.mark.parametrize(
    ("fpr", "tpr", "part"),
    [
        ([0, 1], [1], "equally long"),
        ([0], [1], "equally long"),
        ([0, 0.5, 0.5, 1], [0, 1, 1, 1], "strictly"),
        ([0.1, 1], [0, 1], "strictly"),
        ([0, 0.9], [0, 1], "strictly"),
        ([0, 0.5, 1], [0.5, 0.4, 1], "decrease"),
        ([0, 1], [0, 1.1], "0, 1"),
        ([0, 1], [0, math.nan], "0, 1"),
    ],
)
def test_refuses_a_curve(fpr: list[float], tpr: list[float], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Ceiling(np.array(fpr, dtype=float), np.array(tpr, dtype=float))


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_refuses_an_fpr(fpr: float) -> None:
    with pytest.raises(UsageError, match="fpr"):
        Ceiling.none().tpr_at(fpr)


@pytest.mark.parametrize("mu", [0.0, -1.0, math.nan])
def test_refuses_mu(mu: float) -> None:
    with pytest.raises(UsageError, match="mu"):
        Ceiling.from_gdp(mu)
