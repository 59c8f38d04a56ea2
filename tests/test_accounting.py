"""Accounting of every mechanism: closed forms, a brute-force oracle, two accountants, both
directions; the cache and calibration on random plans."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_mechanism as losses
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opacus.accountants import RDPAccountant
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.privacy import accounting, cache, calibration, prv, renyi
from dpsynth.privacy.accounting import (
    advantage,
    compose_epsilon,
    gdp_delta,
    mu,
    profile,
    second_opinion,
    tradeoff,
)
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.plan import SECURE_NOISE, PrivacyPlan, gaussian_mu

DELTA = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


def sampled(q: float, sigma: float, steps: int) -> Event:
    return Event("dpsgd", "poisson_gaussian", sigma=sigma, q=q, steps=steps)


def gaussian(sigma: float, steps: int = 1) -> Event:
    return Event("g", "gaussian", sigma=sigma, steps=steps)


def laplace(scale: float, steps: int = 1) -> Event:
    return Event("l", "laplace", sigma=scale, steps=steps)


def pure(epsilon: float, steps: int = 1) -> Event:
    return Event("p", "pure", epsilon=epsilon, steps=steps)


def failure(delta: float) -> Event:
    return Event("f", "failure", delta=delta)


def chosen(mean: float, shape: float) -> Event:
    return Event("c", "repeat_select", mean=mean, shape=shape)


# The table of known figures


@pytest.mark.parametrize(
    ("event", "delta", "pld", "upper", "rdp"),
    [
        (sampled(256 / 32561, 1.0, 3000), 1e-5, 2.4423, 2.4524, 2.6985),
        (sampled(0.01, 0.6, 1000), 1e-6, 8.711, 8.722, 9.964),
        (sampled(0.128, 4.0, 400), 1e-5, 2.729, 2.739, 2.969),
    ],
)
def test_the_known_table_in_three_columns(
    event: Event, delta: float, pld: float, upper: float, rdp: float
) -> None:
    assert compose_epsilon([event], delta) == pytest.approx(pld, rel=5e-4)
    assert second_opinion([event], delta) == pytest.approx(upper, rel=5e-4)
    library = RDPAccountant()
    library.history = [(event.sigma, event.q, event.steps)]
    assert library.get_epsilon(delta) == pytest.approx(rdp, rel=5e-4)
    # Ours has other orders of Rényi divergence to choose from.
    assert renyi.epsilon((event,), delta) == pytest.approx(rdp, rel=2e-3)


# Brute force: all outcomes of a few steps, both directions


def brute_delta(pairs: list[tuple[np.ndarray, np.ndarray]], epsilon: float) -> float:
    """max over directions of Σ (P − e^ε Q)₊ over the product of discrete pairs."""
    p, q = np.ones(1), np.ones(1)
    for one, other in pairs:
        p, q = np.outer(p, one).ravel(), np.outer(q, other).ravel()
    return max(float(np.maximum(a - math.exp(epsilon) * b, 0).sum()) for a, b in ((p, q), (q, p)))


def cells(rows: dict[int, float], sigma: float, number: int = 700) -> Any:
    """A mixture of Gaussians against N(0, σ²) in fine cells of the outcome."""
    edges = np.concatenate([[-np.inf], np.linspace(-7 * sigma, 5 + 7 * sigma, number), [np.inf]])
    p = sum(w * np.diff(stats.norm.cdf(edges, j, sigma)) for j, w in rows.items())
    return p, np.diff(stats.norm.cdf(edges, 0, sigma))


def responses(epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    yes = 1 / (1 + math.exp(-epsilon))
    return np.array([yes, 1 - yes]), np.array([1 - yes, yes])


def laplaces(scale: float, shift: float, number: int = 700) -> tuple[np.ndarray, np.ndarray]:
    edges = np.concatenate([[-np.inf], np.linspace(0, shift, number), [np.inf]])
    return tuple(np.diff(stats.laplace.cdf(edges, at, scale)) for at in (0.0, shift))  # type: ignore


def binomial(k: int, q: float) -> dict[int, float]:
    return {j: math.comb(k, j) * q**j * (1 - q) ** (k - j) for j in range(k + 1)}


CASES = [
    ([pure(0.7)], 1, [responses(0.7)]),
    ([pure(0.3, 3)], 1, [responses(0.3)] * 3),
    ([pure(0.3, 2)], 2, [responses(0.6)] * 2),
    ([laplace(1.5)], 1, [laplaces(1.5, 1)]),
    ([laplace(3.0, 2)], 2, [laplaces(3.0, 2)] * 2),
    ([sampled(0.2, 1.0, 2)], 1, [cells(binomial(1, 0.2), 1.0)] * 2),
    ([sampled(0.2, 1.5, 2)], 3, [cells(binomial(3, 0.2), 1.5)] * 2),
    ([gaussian(2.0), pure(0.5)], 2, [cells({2: 1.0}, 2.0), responses(1.0)]),
    ([laplace(2.0), sampled(0.3, 1.0, 1)], 1, [laplaces(2.0, 1), cells(binomial(1, 0.3), 1.0)]),
]


@pytest.mark.parametrize(("events", "group", "pairs"), CASES)
def test_every_mechanism_is_what_all_its_outcomes_say(
    events: list[Event], group: int, pairs: list[Any]
) -> None:
    for delta in (1e-2, 1e-4):
        first = compose_epsilon(events, delta, group=group)
        assert brute_delta(pairs, first) <= delta * (1 + 1e-9)
        assert brute_delta(pairs, first - 0.004 - 2e-3 * first) > delta
        second = second_opinion(events, delta, group=group)
        assert brute_delta(pairs, second) <= delta
        assert brute_delta(pairs, second - 2.1 * prv.ERROR) > delta


@pytest.mark.parametrize(("events", "group", "pairs"), CASES)
def test_the_profile_covers_all_outcomes(events: list[Event], group: int, pairs: list[Any]) -> None:
    grid = [2.0, 0.0, 0.4]
    found = profile(events, grid, group=group)
    exact = np.array([brute_delta(pairs, epsilon) for epsilon in grid])
    assert (found >= exact * (1 - 1e-9)).all()
    np.testing.assert_allclose(found, exact, rtol=0.01, atol=2e-4)
    assert advantage(events, group=group) == pytest.approx(exact[1], rel=5e-3)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("q", "sigma", "group"), [(0.1, 0.7, 1), (0.3, 1.0, 4), (0.01, 3.0, 2)])
def test_a_loss_has_the_law_of_its_draws(q: float, sigma: float, group: int, added: bool) -> None:
    loss = prv.mixture(sigma, q, group, added=added)
    rng = np.random.default_rng(1)
    rows = 0 if added else rng.binomial(group, q, 20_000)
    x = rng.normal(rows, sigma, 20_000)
    ratio = sum(
        w * np.exp((2 * x * j - j * j) / 2 / sigma**2) for j, w in binomial(group, q).items()
    )
    drawn = np.log(ratio) * (-1 if added else 1)
    assert stats.kstest(drawn, loss.cdf).pvalue > 1e-3
    assert abs(drawn.mean() - loss.mean) < 5 * drawn.std() / math.sqrt(20_000)
    assert loss.variance == pytest.approx(drawn.var(), rel=0.15)


@pytest.mark.parametrize("direction", list(losses.AdjacencyType)[:2])
@pytest.mark.parametrize(("q", "sigma", "group"), [(0.005, 0.9, 2), (0.3, 1.0, 4), (0.02, 5.0, 9)])
def test_a_mixture_at_once_is_the_librarys_point_by_point(
    q: float, sigma: float, group: int, direction: losses.AdjacencyType
) -> None:
    given_by = (sigma, *accounting._sensitivities(q, group))
    slow = losses.MixtureGaussianPrivacyLoss(*given_by, adjacency_type=direction)
    fast = accounting._Mixture(*given_by, adjacency_type=direction)
    bounds = slow.connect_dots_bounds()
    grid = np.linspace(bounds.epsilon_lower, bounds.epsilon_upper, 90)
    np.testing.assert_allclose(
        fast.get_delta_for_epsilon(grid), slow.get_delta_for_epsilon(grid), rtol=1e-9, atol=1e-15
    )


def test_a_coarse_grid_keeps_the_mean_of_the_whole() -> None:
    """What rounding moves a loss by must not add up over the steps."""
    parts = [(prv.pure(0.07), 200), (prv.laplace(11.0), 30), (prv.gaussian(0.3), 1)]
    exact = sum(loss.mean * steps for loss, steps in parts)
    for step in (0.05, 0.031, 0.01):
        composed = prv.compose(parts, step, 1e-9)
        assert composed.mass.sum() == pytest.approx(1, abs=1e-9)
        assert composed.losses @ composed.mass == pytest.approx(exact, rel=1e-7)


def test_its_own_grid_agrees_with_opacus() -> None:
    for event in (sampled(0.05, 1.2, 200), sampled(0.3, 3.0, 50)):
        parts = prv.parts_of([event], 1, added=False)
        step = 0.01 * math.sqrt(parts[0][0].variance)
        own = prv.compose(parts, step, 1e-9).epsilon(DELTA)
        assert second_opinion([event], DELTA) == pytest.approx(own + prv.ERROR, abs=2e-3)


MIXED = [
    [laplace(20, 100), gaussian(3.0)],
    [pure(0.02, 300), sampled(0.02, 1.5, 200), failure(2e-6)],
    [sampled(0.02, 1.5, 100), sampled(0.05, 3.0, 60), laplace(5)],
    [failure(3e-6), gaussian(2.0), failure(3e-6)],
]


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("events", MIXED)
def test_two_accountants_agree_on_mixed_ledgers(events: list[Event], group: int) -> None:
    ledger = Ledger(DELTA, unit="u" if group > 1 else "record", contributions=group)
    for event in events:
        ledger.pay(event)
    ledger.cross_check()
    worse = compose_epsilon([*events, pure(0.05)], DELTA, group=group)
    assert worse > ledger.epsilon > compose_epsilon(events[1:], DELTA, group=group)


def test_a_group_costs_what_its_rows_could() -> None:
    for alone, together in [
        (gaussian(1.0), gaussian(3.0)),
        (laplace(1.0), laplace(3.0)),
        (pure(0.6), pure(0.2)),
    ]:
        exact = compose_epsilon([alone], DELTA)
        assert compose_epsilon([together], DELTA, group=3) == pytest.approx(exact, rel=1e-9)
    event, one = sampled(0.05, 2.0, 50), compose_epsilon([sampled(0.05, 2.0, 50)], DELTA)
    most = compose_epsilon([sampled(0.05, 2.0 / 3, 50)], DELTA)
    assert one < compose_epsilon([event], DELTA, group=3)
    # All three rows drawn at once, or none, at the chance that any is drawn.
    drawn = 1 - 0.95**3
    assert compose_epsilon([event], DELTA, group=3) < compose_epsilon(
        [sampled(drawn, 2.0 / 3, 50)], DELTA
    )
    assert most > one
    with pytest.raises(UsageError, match="group=0"):
        compose_epsilon([event], DELTA, group=0)


def test_failures_add_up_and_may_eat_delta() -> None:
    base = gaussian(1.5)
    for compose in (compose_epsilon, second_opinion):
        assert compose([failure(4e-6), failure(4e-6), base], DELTA) == pytest.approx(
            compose([base], 2e-6), rel=1e-3
        )
        assert compose([base, failure(DELTA)], DELTA) == math.inf
        assert compose([failure(1e-6)], DELTA) == 0
    np.testing.assert_allclose(profile([failure(0.1)], [0.0, 5.0]), 0.1)
    assert advantage([failure(0.1)]) == pytest.approx(0.1)


# One outcome chosen among repetitions


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 4.0, math.inf])
@pytest.mark.parametrize(
    ("trial", "group"),
    [
        ([gaussian(6.0)], 1),
        ([sampled(0.02, 2.0, 100), gaussian(20.0)], 1),
        ([laplace(20.0), pure(0.05)], 2),
        ([sampled(0.02, 6.0, 100)], 3),
    ],
)
def test_two_accountants_agree_on_a_choice(trial: list[Event], group: int, shape: float) -> None:
    events = [*trial, failure(1e-7), chosen(5, shape), gaussian(9.0)]
    first = compose_epsilon(events, DELTA, group=group)
    assert second_opinion(events, DELTA, group=group) == pytest.approx(first, rel=2e-3)
    once = compose_epsilon([*trial, failure(1e-7), gaussian(9.0)], DELTA, group=group)
    assert first > once
    more = [*trial, failure(1e-7), chosen(10, shape), gaussian(9.0)]
    assert compose_epsilon(more, DELTA, group=group) > first


@pytest.mark.parametrize(("gamma", "epsilon"), [(0.2, 0.1), (0.5, 1.0)])
def test_a_choice_among_pure_trials_stays_below_the_known_bound(
    gamma: float, epsilon: float
) -> None:
    """Geometric repetition of an ε-DP trial is 3ε-DP at most (Liu & Talwar 2019), and no less than
    what choosing the best of answers really does."""
    events = [pure(epsilon), chosen(1 / gamma, 1.0)]
    yes = 1 / (1 + math.exp(-epsilon))

    def best(p: float) -> float:
        """P[some trial says yes] for a geometric number of trials."""
        return 1 - (1 - p) * gamma / (1 - (1 - gamma) * (1 - p))

    a, b = np.array([best(yes), 1 - best(yes)]), np.array([best(1 - yes), 1 - best(1 - yes)])
    for compose in (compose_epsilon, second_opinion):
        found = compose(events, DELTA)
        assert brute_delta([(a, b)], found) <= DELTA
        assert found < 3 * epsilon + math.log(1 / DELTA) / 1000


def test_a_failure_within_a_trial_counts_for_every_repetition() -> None:
    assert compose_epsilon([failure(1.01e-6), chosen(10, 1)], DELTA) == math.inf
    assert second_opinion([failure(1.01e-6), chosen(10, 1)], DELTA) == math.inf
    after = [gaussian(5), chosen(10, 1), failure(1e-6)]
    within = [gaussian(5), failure(1e-6), chosen(5, 1)]
    assert math.isfinite(compose_epsilon(after, DELTA))
    assert math.isfinite(compose_epsilon(within, DELTA))
    deltas = profile(after, [-1.0, 0.0, 1.0, 3.0])
    assert (np.diff(deltas) <= 0).all()
    assert deltas[0] == 1
    epsilon = compose_epsilon(after, DELTA)
    assert profile(after, [epsilon])[0] == pytest.approx(DELTA, rel=1e-3)


@pytest.mark.parametrize(("q", "sigma", "group"), [(0.1, 1.0, 1), (0.3, 2.0, 3), (0.01, 0.8, 2)])
def test_renyi_integrals_are_the_closed_form(q: float, sigma: float, group: int) -> None:
    """At whole orders, against the multinomial sum written out."""
    own, library = renyi._integrated(sigma, q, group), renyi._polynomial(sigma, q, group)
    for order in (2, 3):
        moment = 0.0
        for rows in np.ndindex(*([group + 1] * order)):
            weight = math.prod(binomial(group, q)[j] for j in rows)
            cross = (sum(rows) ** 2 - sum(j * j for j in rows)) / (2 * sigma**2)
            moment += weight * math.exp(cross)
        index = int(np.argmin(np.abs(renyi._ORDERS - order)))
        exact = math.log(moment) / (order - 1)
        assert own[index] == pytest.approx(exact, rel=1e-9)
        assert library[index] == pytest.approx(exact, rel=1e-9)
    assert (library >= own * (1 - 1e-9)).all()


# Other terms: trade-off, advantage, μ


@pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
def test_the_terms_of_one_gaussian_are_closed_forms(strength: float) -> None:
    events = [gaussian(math.sqrt(2) / strength, 2)]
    rates = np.array([0.0, 1e-3, 0.01, 0.3, 1.0])
    exact = stats.norm.cdf(stats.norm.ppf(1 - rates) - strength)
    found = tradeoff(events, list(rates))
    assert (found <= exact + 1e-12).all()
    np.testing.assert_allclose(found, exact, atol=2e-4)
    assert advantage(events) == pytest.approx(2 * stats.norm.cdf(strength / 2) - 1, rel=1e-9)
    assert mu(events, 1e-9) == pytest.approx(strength, rel=1e-6)
    assert mu([gaussian(1.0)], DELTA, group=2) == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(
    ("epsilon", "sigma", "point", "covering", "rate"),
    [(1, 1.84297, 0.268, 0.2718, 0.020), (4, 0.82255, 0.925, 1.019, 0.068)],
)
def test_the_terms_of_a_training_are_the_known_table(
    epsilon: float, sigma: float, point: float, covering: float, rate: float
) -> None:
    events = [sampled(0.01, sigma, 2000)]
    assert compose_epsilon(events, DELTA) == pytest.approx(epsilon, rel=1e-3)
    assert mu(events, DELTA) == pytest.approx(point, rel=1e-3)
    found = mu(events, 1e-9)
    assert found == pytest.approx(covering, rel=1e-3)
    assert 1 - tradeoff(events, [0.01])[0] == pytest.approx(rate, abs=6e-4)
    grid = np.linspace(0, 3 * epsilon, 40)
    covered = gdp_delta(grid, found)
    held = covered >= 1e-9
    assert (profile(events, list(grid))[held] <= covered[held] * (1 + 1e-6)).all()


def test_the_terms_of_nothing_and_of_no_noise() -> None:
    none = [Event("x", "none")]
    assert tradeoff(none, [0.0, 0.5]).tolist() == [0, 0]
    assert (advantage(none), mu(none, DELTA)) == (1, math.inf)
    assert (advantage([]), mu([], DELTA)) == (0, 0)
    np.testing.assert_allclose(tradeoff([], [0.0, 0.3, 1.0]), [1, 0.7, 0])
    assert mu([failure(1e-4)], DELTA) == math.inf
    with pytest.raises(UsageError, match="between 0 and 1"):
        tradeoff([], [1.5])
    with pytest.raises(UsageError, match="delta=0"):
        mu([gaussian(1.0)], 0.0)


def test_a_loss_without_a_grid_is_refused() -> None:
    with pytest.raises(UsageError, match="common grid"):
        prv.compose([(prv.pure(1e7), 1), (prv.pure(1e-3), 1)], 1e-4, 1e-9)


# Calibration


def plan(**changed: Any) -> PrivacyPlan:
    shares = {"codec": 0.1, "marginals": 0.3}
    return PrivacyPlan(
        **{"epsilon": 1.0, "delta": DELTA, "rows": 2000, "shares": shares, **changed}
    )


@st.composite
def plans(draw: st.DrawFn) -> PrivacyPlan:
    """Cheap ones: at most a thousand steps, and every rate above one in two hundred."""
    rows = draw(st.integers(200, 50_000))
    steps = draw(st.sampled_from([0, 1, 7, 60, 300, 1000]))
    share = draw(st.floats(0, 0.9))
    shares = {"codec": share / 3, "marginals": 2 * share / 3}
    contributions = draw(st.sampled_from([1] * 29 + [2]))
    return PrivacyPlan(
        epsilon=math.exp(draw(st.floats(math.log(0.05), math.log(16)))),
        delta=10 ** draw(st.floats(-9, math.log10(0.9 / rows))),
        rows=rows,
        batch=max(1, math.ceil(rows * draw(st.sampled_from([0.005, 0.0157, 0.1, 0.5, 1.0])))),
        steps=steps,
        shares=shares if steps else {"codec": 0.25, "marginals": 0.75},
        unit="record" if contributions == 1 else "person",
        contributions=contributions,
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_any_plan_spends_its_target_and_no_more(drawn: PrivacyPlan) -> None:
    ready = drawn.calibrate()
    ledger = ready.ledger()
    for event in ready.events():
        ledger.pay(event)
    assert ledger.epsilon <= ready.epsilon
    ledger.cross_check()
    if ready.steps:
        less = replace(ready, sigma=ready.noise * 0.999).events()
        spent = compose_epsilon(less, ready.delta, group=ready.contributions)
    else:
        spent = ledger.epsilon * 1.0001
    assert spent > ready.epsilon


SPENT = [
    (Event("bounds", "gaussian", sigma=12.0, steps=2),),
    (laplace(15.0), failure(2e-6)),
    (pure(0.2), gaussian(20.0)),
    (sampled(0.01, 2.0, 20),),
    (gaussian(30.0), chosen(3, 1.0)),
]


@pytest.mark.parametrize("steps", [0, 50])
@pytest.mark.parametrize("spent", SPENT)
def test_measured_metadata_is_within_the_target(spent: tuple[Event, ...], steps: int) -> None:
    shares = {"codec": 0.3, "marginals": 0.7 if steps == 0 else 0.3}
    ready = plan(spent=spent, steps=steps, batch=100, shares=shares).calibrate()
    events = ready.events()
    assert events[: len(spent)] == spent
    found = compose_epsilon(events, DELTA)
    assert found <= 1.0
    assert found == pytest.approx(1.0, rel=2e-3)
    assert (
        compose_epsilon([*spent, *plan(steps=0, shares=shares).measured()], DELTA) > found or steps
    )
    freed = plan(steps=steps, batch=100, shares=shares)
    assert ready.mu("codec") < freed.mu("codec")


def test_metadata_that_took_it_all_is_refused() -> None:
    for spent in ((gaussian(1.0),), (pure(1.1),), (failure(DELTA),), (Event("x", "none"),)):
        for steps in (0, 10):
            with pytest.raises(UsageError, match="measured metadata"):
                plan(spent=spent, steps=steps).calibrate()
    spent = (laplace(10.0), gaussian(5.0))
    cost = compose_epsilon(spent, DELTA)
    with pytest.raises(UsageError, match="nothing is left"):
        plan(epsilon=cost * (1 + 1e-14), spent=spent, steps=0).calibrate()


def test_a_unit_gets_the_noise_of_all_its_rows() -> None:
    one, many = plan(steps=0), plan(steps=0, unit="person", contributions=4)
    assert many.mu("codec") == pytest.approx(one.mu("codec") / 4)
    assert compose_epsilon(many.measured(), DELTA, group=4) == pytest.approx(
        compose_epsilon(one.measured(), DELTA), rel=1e-9
    )
    trained = plan(steps=20, batch=100, unit="person", contributions=3).calibrate()
    assert trained.noise > plan(steps=20, batch=100).calibrate().noise
    ledger = trained.ledger("philox:seed")
    assert (ledger.unit, ledger.contributions, ledger.noise) == ("person", 3, "philox:seed")


def test_a_plan_survives_its_dict() -> None:
    held = plan(spent=SPENT[1], unit="person", contributions=2, secure=True, steps=5, sigma=2.0)
    again = PrivacyPlan(**json.loads(json.dumps(held.to_dict())))
    assert again == held
    assert again.spent == SPENT[1]
    assert again.ledger().noise == SECURE_NOISE
    assert plan().ledger().noise == "aes256-ctr"
    with pytest.raises(UsageError, match="the plan is secure"):
        held.ledger("philox:seed")


def test_extremes_are_calibrated_or_refused_in_a_line() -> None:
    start = time.process_time()
    many = plan(rows=10**6, delta=1e-7, batch=1000, steps=200_000).calibrate()
    assert compose_epsilon(many.events(), 1e-7) <= 1
    with pytest.raises(UsageError, match="steps=1000000000: at most"):
        plan(steps=10**9).calibrate()
    with pytest.raises(UsageError, match="no noise is enough"):
        plan(epsilon=0.01, batch=2000, steps=10**8, shares={"codec": 0.999}).calibrate()
    assert time.process_time() - start < 40


def test_search_and_settling_do_not_need_a_good_start() -> None:
    found = calibration._root(lambda x: 3.0 - x, -5.0, 1.0)
    assert found == pytest.approx(3.0, abs=1e-4)
    assert calibration._root(lambda x: 3.0 - x, 12.0, 1.0) == pytest.approx(3.0, abs=1e-4)
    for start, slope in ((0.0, 1.0), (0.5, 0.2), (-0.3, 5.0)):
        sigma, reached = calibration._settle(lambda x: math.exp(-x), start, slope, 0.9, 1.0)
        assert 0.9 * (1 - 1e-3) <= reached <= 0.9
        assert sigma == pytest.approx(1 / 0.9, rel=1e-3)


# The cache


def test_the_second_time_comes_from_the_disk(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = plan(batch=100, steps=20).calibrate()
    assert (own_cache / "sigma.json").is_file()
    assert [path.name for path in own_cache.iterdir()] == ["sigma.json"]
    monkeypatch.setattr("dpsynth.privacy.plan.noise_multiplier", lambda *_: pytest.fail("again"))
    assert plan(batch=100, steps=20).calibrate() == first
    for other in (
        {"epsilon": 1.01},
        {"delta": 1e-6},
        {"steps": 21},
        {"shares": {}},
        {"unit": "u", "contributions": 2},
        {"spent": (gaussian(50.0),)},
    ):
        with pytest.raises(pytest.fail.Exception):
            plan(**{"batch": 100, "steps": 20, **other}).calibrate()


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"{",
        lambda body: b"[]",
        lambda body: json.dumps({**body, "maker": "dp-accounting 0.1, calibration 0"}).encode(),
        lambda body: json.dumps({**body, "entries": 3}).encode(),
        lambda body: json.dumps({**body, "entries": {k: 1 for k in body["entries"]}}).encode(),
        lambda body: json.dumps(
            {**body, "entries": {k: [v[0] / 2, *v[1:]] for k, v in body["entries"].items()}}
        ).encode(),
        lambda body: json.dumps(
            {**body, "entries": {k: ["2", *v[1:]] for k, v in body["entries"].items()}}
        ).encode(),
    ],
)
def test_a_damaged_cache_is_calibrated_again(own_cache: Path, damage: Any) -> None:
    right = plan(batch=100, steps=20).calibrate()
    path = own_cache / "sigma.json"
    path.write_bytes(damage(json.loads(path.read_bytes())))
    assert plan(batch=100, steps=20).calibrate() == right
    assert cache.load(right._key()) is not None


def test_an_entry_of_another_target_is_not_used() -> None:
    wanted = plan(batch=100, steps=20)
    right = wanted.calibrate()
    for reached in (1.0001, 0.9):
        cache.store(wanted._key(), 0.7, reached)
        assert wanted.calibrate() == right


def test_the_cache_is_bounded_and_never_in_the_way(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_MOST", 3)
    for number in range(5):
        cache.store(f"k{number}", 1.0 + number, 0.5)
    assert [cache.load(f"k{n}") for n in range(5)] == [
        None,
        None,
        (3.0, 0.5),
        (4.0, 0.5),
        (5.0, 0.5),
    ]
    (own_cache / "sigma.json").unlink()
    assert cache.load("k4") is None
    (own_cache / "sigma.json").mkdir()  # cannot be replaced by a file
    cache.store("k9", 1.0, 0.5)
    assert [path.name for path in own_cache.iterdir()] == ["sigma.json"]
    monkeypatch.setenv(cache.FOLDER, "")
    cache.store("k9", 1.0, 0.5)
    assert (cache.folder(), cache.load("k9")) == (None, None)
    monkeypatch.delenv(cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.folder() == Path("/x/dpsynth")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "dpsynth"

    def nobody() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", nobody)
    assert cache.folder() is None


def test_gaussian_mu_is_where_the_profile_meets_delta() -> None:
    for epsilon in (0.05, 1.0, 16.0, 300.0):
        strength = gaussian_mu(epsilon, DELTA)
        assert float(gdp_delta(epsilon, strength)) == pytest.approx(DELTA, rel=1e-6)
        found = accounting.gdp_epsilon(DELTA, strength)
        assert found == pytest.approx(epsilon, rel=1e-9)
        assert gdp_delta(found, strength) <= DELTA
