"""Budgets in terms of what an attacker may achieve."""

import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats
from scipy.optimize import brentq

from dpsynth.checks import UsageError
from dpsynth.privacy import cache
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan, gaussian_mu
from dpsynth.privacy.targets import Target, epsilon_for

DELTA = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))


def measuring(epsilon: float, **changed: Any) -> PrivacyPlan:
    """A plan that is one Gaussian mechanism and nothing else."""
    shares = {"codec": 0.25, "marginals": 0.75}
    return PrivacyPlan(epsilon, DELTA, 2000, **{"steps": 0, "shares": shares, **changed})


def exact_mu(target: Target) -> float:
    """The μ at which the closed form of a Gaussian meets the target."""
    if target.mu is not None:
        return target.mu
    if target.advantage is not None:
        return float(2 * stats.norm.ppf((1 + target.advantage) / 2))
    return float(stats.norm.ppf(target.tpr) - stats.norm.ppf(target.fpr))


@pytest.mark.parametrize(
    "target",
    [
        Target(mu=0.3),
        Target(mu=2.0),
        Target(advantage=0.02),
        Target(advantage=0.2),
        Target(advantage=0.7),
        Target(tpr=0.02),
        Target(tpr=0.5),
        Target(tpr=0.3, fpr=0.1),
    ],
)
def test_one_gaussian_meets_its_closed_form(target: Target) -> None:
    epsilon = epsilon_for(target, measuring)
    found = target.reached(measuring(epsilon).calibrate())
    assert target.bound * 0.995 <= found <= target.bound
    strength, most = gaussian_mu(epsilon, DELTA), exact_mu(target)
    assert strength <= most * (1 + 1e-4)
    assert strength >= most * 0.98


@pytest.mark.parametrize(
    ("target", "changed"),
    [
        (Target(advantage=0.2), {}),
        (Target(tpr=0.05), {"spent": (Event("b", "laplace", sigma=20.0),)}),
        (Target(mu=0.8), {"unit": "person", "contributions": 2}),
    ],
)
def test_a_training_keeps_to_it_and_uses_it_up(target: Target, changed: dict[str, Any]) -> None:
    def plan_at(epsilon: float) -> PrivacyPlan:
        return measuring(epsilon, steps=30, batch=100, shares={"marginals": 0.3}, **changed)

    epsilon = epsilon_for(target, lambda e: plan_at(e).calibrate())
    found = target.reached(plan_at(epsilon).calibrate())
    assert target.bound * 0.995 <= found <= target.bound
    assert target.reached(plan_at(epsilon * 1.02).calibrate()) > target.bound


def test_it_is_the_curve_that_counts_and_not_one_point_of_it() -> None:
    """The worst curve through (ε, δ) would allow an advantage of tanh(ε/2) and hence less ε."""
    epsilon = epsilon_for(Target(advantage=0.2), measuring)
    by_point = float(brentq(lambda e: math.tanh(e / 2) + DELTA - 0.2, 1e-3, 5))
    assert epsilon > 3 * by_point


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, "got none"),
        ({"mu": 1.0, "advantage": 0.2}, "got mu, advantage"),
        ({"epsilon": 1.0}, "unknown key 'epsilon'"),
        ({"mu": 0.0}, "mu=0"),
        ({"mu": math.inf}, "mu=inf"),
        ({"mu": "1"}, "mu=1: must be a number"),
        ({"advantage": True}, "advantage=True"),
        ({"advantage": 0.0}, "advantage=0"),
        ({"advantage": 1.0}, "advantage=1"),
        ({"advantage": math.nan}, "advantage=nan"),
        ({"tpr": 0.01}, "tpr=0.01"),
        ({"tpr": 0.2, "fpr": 0.3}, "fpr=0.3"),
        ({"tpr": 1.0}, "tpr=1"),
        ({"tpr": 0.2, "fpr": 0.0}, "fpr=0"),
        ({"advantage": 0.2, "fpr": 0.1}, "nothing without tpr"),
        ("advantage", "must map one name"),
    ],
)
def test_targets_that_cannot_be_are_refused(settings: Any, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Target.from_dict(settings)


def test_targets_survive_their_dict() -> None:
    for settings in ({"mu": 1.0}, {"advantage": 0.2}, {"tpr": 0.2, "fpr": 0.05}):
        assert Target.from_dict(settings).to_dict() == settings
    assert Target.from_dict({"tpr": 0.2, "mu": None}).to_dict() == {"tpr": 0.2, "fpr": 0.01}


def test_targets_out_of_reach_are_refused() -> None:
    with pytest.raises(UsageError, match="needs epsilon below"):
        epsilon_for(Target(advantage=1e-6), measuring)
    with pytest.raises(UsageError, match="allows epsilon=256"):
        epsilon_for(Target(mu=1e4), measuring)
