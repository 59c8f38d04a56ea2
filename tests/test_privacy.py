"""Ledger, plan and mechanisms: known figures, a second accountant, and noise as statistics."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.privacy import cache
from dpsynth.privacy.accounting import compose_epsilon, second_opinion
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Executed, Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.privacy.plan import NoPrivacy, PrivacyPlan, gaussian_event, gaussian_mu

DELTA = 1e-5


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path))


SLACK = 1 + 1e-9  # rounding of doubles, not of an accountant


def delta_of(epsilon: float, mu: float) -> float:
    """δ(ε) of μ-GDP (Balle & Wang 2018, theorem 8)."""
    tail = math.exp(epsilon) * stats.norm.cdf(-epsilon / mu - mu / 2)
    return float(stats.norm.cdf(-epsilon / mu + mu / 2) - tail)


def sampled(q: float, sigma: float, steps: int) -> Event:
    return Event("dpsgd:test", "poisson_gaussian", sigma=sigma, q=q, steps=steps)


def plan(**settings: Any) -> PrivacyPlan:
    shares = {"codec": 0.1, "marginals": 0.3}
    return PrivacyPlan(
        **{"epsilon": 1.0, "delta": DELTA, "rows": 2000, "shares": shares, **settings}
    )


# Composition


@pytest.mark.parametrize(
    ("event", "exact", "upper"),
    [(sampled(256 / 32561, 1.0, 3000), 2.4423, 2.4524), (sampled(0.128, 4.0, 400), 2.729, 2.739)],
)
def test_both_accountants_give_the_known_figures(event: Event, exact: float, upper: float) -> None:
    assert compose_epsilon([event], DELTA) == pytest.approx(exact, abs=5e-4)
    assert second_opinion([event], DELTA) == pytest.approx(upper, abs=0.02)


@pytest.mark.parametrize("mu", [0.05, 0.268, 0.925, 2.0])
def test_one_gaussian_composes_to_its_closed_form(mu: float) -> None:
    """PLD rounds up, never down."""
    epsilon = compose_epsilon([gaussian_event("x", mu)], DELTA)
    assert delta_of(epsilon, mu) <= DELTA
    assert delta_of(epsilon - 1e-3 * max(1, epsilon), mu) > DELTA
    assert second_opinion([gaussian_event("x", mu)], DELTA) == pytest.approx(epsilon, abs=0.02)


@pytest.mark.parametrize("parts", [1, 3, 40])
def test_gaussians_add_up_in_squares(parts: int) -> None:
    whole = compose_epsilon([gaussian_event("x", 0.9)], DELTA)
    one = gaussian_event("x", 0.9 / math.sqrt(parts))
    assert compose_epsilon([one] * parts, DELTA) == pytest.approx(whole, rel=1e-9)
    assert compose_epsilon([replace(one, steps=parts)], DELTA) == pytest.approx(whole, rel=1e-9)
    as_sample = Event("x", "poisson_gaussian", sigma=one.sigma, q=1.0, steps=parts)
    assert compose_epsilon([as_sample], DELTA) == pytest.approx(whole, rel=1e-9)


def test_steps_of_equal_events_add_up_and_order_does_not_matter() -> None:
    a, b = sampled(0.1, 2.0, 30), gaussian_event("x", 0.4)
    split = [sampled(0.1, 2.0, 10), b, sampled(0.1, 2.0, 20)]
    assert compose_epsilon(split, DELTA) == compose_epsilon([a, b], DELTA)
    assert compose_epsilon([b, a], DELTA) == compose_epsilon([a, b], DELTA)


def test_every_event_costs_something() -> None:
    events = [sampled(0.1, 3.0, 30), gaussian_event("x", 0.3), sampled(0.05, 3.0, 10)]
    whole = compose_epsilon(events, DELTA)
    for left in range(3):
        assert compose_epsilon(events[:left] + events[left + 1 :], DELTA) < whole
    for worse in (replace(events[0], steps=31), replace(events[0], sigma=2.99)):
        assert compose_epsilon([worse, *events[1:]], DELTA) > whole


def test_nothing_costs_nothing_and_no_noise_everything() -> None:
    for compose in (compose_epsilon, second_opinion):
        assert compose([], DELTA) == 0
        assert compose([sampled(0.1, 2.0, 5), Event("x", "none")], DELTA) == math.inf
    grid = [0.0, 1.0, 30.0]
    ledger = Ledger(DELTA)
    assert ledger.epsilon == 0
    np.testing.assert_array_equal(ledger.profile(grid), 0)
    ledger.pay(Event("x", "none"))
    assert ledger.epsilon == math.inf
    np.testing.assert_array_equal(ledger.profile(grid), 1)


def test_profile_is_the_closed_form_from_above() -> None:
    ledger = Ledger(DELTA)
    for part in range(4):
        ledger.pay(gaussian_event(f"x{part}", 0.5))
    grid = np.linspace(0, 8, 50)
    found = ledger.profile(list(grid))
    exact = np.array([delta_of(epsilon, 1.0) for epsilon in grid])
    assert (np.diff(found) <= 0).all()
    assert (found >= exact - 1e-12).all()
    np.testing.assert_allclose(found, exact, atol=2e-3, rtol=2e-2)
    assert ledger.profile([ledger.epsilon])[0] == pytest.approx(DELTA, rel=0.01)
    assert (ledger.profile([-50.0, -1.0]) <= 1).all()


# Ledger


def test_events_keep_their_order_and_get_a_time() -> None:
    ledger = Ledger(DELTA)
    ledger.pay(Event("first", "gaussian", sigma=2.0))
    held = ledger.events
    ledger.pay(Event("second", "gaussian", sigma=3.0, when="2020-01-01T00:00:00+00:00"))
    assert [event.what for event in ledger.events] == ["first", "second"]
    assert [event.what for event in held] == ["first"]
    assert ledger.events[0].when.endswith("+00:00")
    assert ledger.events[1].when.startswith("2020-01-01")
    with pytest.raises(FrozenInstanceError):
        ledger.events[0].sigma = 9.0  # type: ignore[misc]


names = st.text(max_size=12)
scales = st.floats(1e-3, 1e6)
events = st.one_of(
    st.builds(Event, names, st.just("gaussian"), scales, steps=st.integers(1, 10**9)),
    st.builds(
        Event,
        names,
        st.just("poisson_gaussian"),
        scales,
        st.floats(0, 1, exclude_min=True),
        st.integers(1, 10**9),
        when=names,
    ),
    st.builds(Event, names, st.just("laplace"), scales),
    st.builds(Event, names, st.just("pure"), epsilon=scales),
    st.builds(Event, names, st.just("failure"), delta=st.floats(1e-12, 0.4)),
    st.builds(
        Event,
        names,
        st.just("repeat_select"),
        mean=st.floats(1, 1e3),
        shape=st.sampled_from([0.0, 0.5, 1.0, math.inf]),
    ),
    st.builds(Event, names, st.just("none")),
)


@given(st.lists(events, max_size=5), st.floats(1e-12, 0.4))
def test_ledger_json_round_trip(paid: list[Event], delta: float) -> None:
    ledger = Ledger(delta, executed=Executed(30, 2))
    for event in paid:
        ledger.pay(event)
    again = Ledger.from_json(ledger.to_json())
    assert again.events == ledger.events
    assert (again.delta, again.unit, again.relation) == (delta, "record", "add_remove")
    assert again.executed == Executed(30, 2)
    assert again.to_json() == ledger.to_json()


def body(**changes: Any) -> dict[str, Any]:
    ledger = Ledger(DELTA)
    ledger.pay(sampled(0.1, 2.0, 30))
    ledger.pay(gaussian_event("codec", 0.4))
    return {**json.loads(ledger.to_json()), **changes}


def row(**changes: Any) -> dict[str, Any]:
    return {**sampled(0.1, 2.0, 30).to_dict(), **changes}


def test_a_saved_ledger_costs_what_it_did() -> None:
    again = Ledger.from_json(json.dumps(body()))
    assert again.epsilon == compose_epsilon(
        [sampled(0.1, 2.0, 30), gaussian_event("codec", 0.4)], DELTA
    )


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        (body(format=1), "format=1"),
        (body(unit="person"), "differs from its hash"),
        (body(relation="replace"), "differs from its hash"),
        (body(delta=1e-4), "differs from its hash"),
        (body(head=""), "differs from its hash"),
        (body(executed={"steps": 7, "replayed": 0}), "differs from its hash"),
        (body(seal={"model": "00"}), "differs from its hash"),
        (body(seal=[]), "seal"),
        (body(executed=[]), "executed"),
        (body(events=3), "must be a list"),
        (body(events=[]), "differs from its hash"),
        (body(events=[row()]), "differs from its hash"),
        (body(events=body()["events"][::-1]), "differs from its hash"),
        (body(extra=1), "unknown key 'extra'"),
        (body(events=[row(mechanism="guess")]), "guess: unknown"),
        (body(events=[row(sensitivity=2.0)]), "unknown key 'sensitivity'"),
        (body(events=[row(sigma=0.0)]), "sigma=0.0"),
        (body(events=[row(sigma="2.0")]), "sigma='2.0'"),
        (body(events=[row(q="0.1")]), "q='0.1'"),
        (body(events=["none"]), "event"),
        (body(events=[row(q=2.0)]), "q=2.0"),
        (body(events=[row(steps=0)]), "steps"),
    ],
)
def test_a_ledger_that_says_something_unknown_is_refused(
    changed: dict[str, Any], part: str
) -> None:
    with pytest.raises(UsageError, match=part):
        Ledger.from_json(json.dumps(changed))


@pytest.mark.parametrize("key", ["format", "unit", "relation", "delta", "events", "head"])
def test_a_ledger_that_lacks_something_is_refused(key: str) -> None:
    held = body()
    del held[key]
    with pytest.raises(UsageError, match=key):
        Ledger.from_json(json.dumps(held))


@pytest.mark.parametrize("key", ["what", "mechanism", "sigma", "q", "steps"])
def test_an_event_that_lacks_a_parameter_is_refused(key: str) -> None:
    """A default would be an invention: without its `steps` a training would count as one step."""
    held = row()
    del held[key]
    with pytest.raises(UsageError, match=key):
        Ledger.from_json(json.dumps(body(events=[held])))


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"format": 1, "events": 3}'])
def test_a_ledger_that_is_no_ledger_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ledger"):
        Ledger.from_json(text)


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"mechanism": "guess"}, "guess: unknown"),
        ({"mechanism": "pure", "epsilon": 1.0}, "sigma=1 means nothing"),
        ({"steps": 0}, "steps of 'x'=0"),
        ({"steps": 1.5}, "steps of 'x'=1.5"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"sigma": math.inf}, "sigma=inf"),
        ({"mechanism": "poisson_gaussian", "q": 0.0}, "q=0.0"),
        ({"mechanism": "poisson_gaussian", "q": 1.01}, "q=1.01"),
        ({"q": math.nan}, "q=nan"),
        ({"q": 0.5}, "q=0.5 means nothing"),
    ],
)
def test_events_that_cannot_be_are_refused(facts: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Event(**{"what": "x", "mechanism": "gaussian", "sigma": 1.0, **facts})


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"unit": ""}, "unit=''"),
        ({"contributions": 3}, "contributions=3"),
        ({"noise": ""}, "noise=''"),
        ({"relation": "replace_one"}, "relation=replace_one"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": math.nan}, "delta=nan"),
    ],
)
def test_ledgers_that_cannot_be_are_refused(facts: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Ledger(**{"delta": DELTA, **facts})


# Plan


@pytest.mark.parametrize(("epsilon", "mu"), [(1, 0.268), (4, 0.925), (10, 2.000)])
def test_gaussian_mu_of_the_known_table(epsilon: float, mu: float) -> None:
    assert gaussian_mu(epsilon, DELTA) == pytest.approx(mu, abs=5e-4)


@given(st.floats(0.01, 30), st.floats(1e-9, 0.1))
def test_gaussian_mu_solves_its_equation(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert delta_of(epsilon, mu) == pytest.approx(delta, rel=1e-5)
    assert gaussian_mu(epsilon * 1.01, delta) > mu
    assert gaussian_mu(epsilon, delta * 1.01) > mu


def assert_spends_its_target(given_plan: PrivacyPlan) -> None:
    """No more by either accountant, and a thousandth less noise would be too little."""
    ready = given_plan.calibrate()
    spent = [*ready.measured(), ready.training_event("dpsgd")]
    assert compose_epsilon(spent, ready.delta) <= ready.epsilon
    assert second_opinion(spent, ready.delta) <= ready.epsilon + 0.02
    less = [*ready.measured(), replace(spent[-1], sigma=ready.noise * 0.999)]
    assert compose_epsilon(less, ready.delta) > ready.epsilon


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon": 0.05, "batch": 100, "steps": 10},
        {"epsilon": 0.5, "batch": 400, "steps": 50},
        {"epsilon": 1.0, "batch": 200, "steps": 100, "shares": {}},
        {"epsilon": 1.0, "batch": 2000, "steps": 30},
        {"epsilon": 1.0, "batch": 9999, "steps": 1, "shares": {"marginals": 0.9}},
        {"epsilon": 3.0, "batch": 1000, "steps": 60, "delta": 1e-7},
        {"epsilon": 1.0, "batch": 64, "steps": 60, "shares": {"rows": 0.01, "codec": 0.2}},
    ],
)
def test_calibration_is_safe_and_tight(settings: dict[str, Any]) -> None:
    assert_spends_its_target(plan(**settings))


@settings(max_examples=5)
@given(
    epsilon=st.floats(0.1, 1.0),
    batch=st.integers(100, 2500),
    steps=st.integers(1, 60),
    share=st.floats(0, 0.9),
    delta=st.sampled_from([1e-4, 1e-6]),
)
def test_any_plan_is_safe_and_tight(
    epsilon: float, batch: int, steps: int, share: float, delta: float
) -> None:
    assert_spends_its_target(
        plan(epsilon=epsilon, batch=batch, steps=steps, shares={"codec": share}, delta=delta)
    )


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_a_plan_that_only_measures_spends_its_target_too(epsilon: float) -> None:
    measuring = plan(epsilon=epsilon, steps=0, shares={"codec": 0.25, "marginals": 0.75})
    assert measuring.calibrate().noise == 0
    spent = compose_epsilon(measuring.measured(), DELTA)
    assert spent <= epsilon * SLACK
    assert spent == pytest.approx(epsilon, rel=1e-3)


def test_what_is_paid_part_by_part_is_what_was_planned() -> None:
    """All the parts of both measuring stages and the training, as a run writes them."""
    ready = plan(batch=300, steps=40).calibrate()
    ledger = ready.ledger()
    assert (ledger.delta, ledger.unit, ledger.relation) == (DELTA, "record", "add_remove")
    rng = np.random.default_rng(0)
    for stage, parts in (("codec", 6), ("marginals", 11)):
        measurer = Measurer(ledger, ready.mu(stage), parts, rng)
        for part in range(parts):
            measurer.histograms(f"{stage}:{part}", queries=1 + part % 4)
    ledger.pay(ready.training_event("dpsgd"))
    assert ledger.epsilon <= ready.epsilon * SLACK
    assert ledger.epsilon == pytest.approx(ready.epsilon, rel=1e-3)


def test_shares_split_the_squared_budget() -> None:
    shares = {"rows": 0.01, "codec": 0.2, "marginals": 0.3}
    split = plan(epsilon=2.0, shares=shares)
    for stage, share in shares.items():
        assert split.mu(stage) ** 2 == pytest.approx(share * gaussian_mu(2.0, DELTA) ** 2)
    assert [event.what for event in split.measured()] == list(shares)
    assert [1 / e.sigma for e in split.measured()] == pytest.approx([split.mu(s) for s in shares])
    left = plan(shares={"codec": 0.2})
    assert left.mu("marginals") == 0
    assert [event.what for event in left.measured()] == ["codec"]


def test_a_plan_is_frozen_down_to_its_shares() -> None:
    shares = {"codec": 0.2}
    held = plan(shares=shares, steps=10)
    shares["codec"] = 0.9
    assert held.shares["codec"] == 0.2
    with pytest.raises(TypeError):
        held.shares["codec"] = 0.9  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        held.epsilon = 9.0  # type: ignore[misc]
    ready = held.calibrate()
    assert held.sigma is None
    assert replace(ready, sigma=None) == held


def test_rate_and_event_follow_from_the_plan() -> None:
    ready = plan(batch=500, steps=7, clip=0.5, sigma=3.0)
    assert (ready.q, ready.bound, ready.private) == (0.25, 0.5, True)
    assert ready.training_event("t") == Event("t", "poisson_gaussian", sigma=3.0, q=0.25, steps=7)
    whole = plan(batch=5000, steps=7, sigma=3.0)
    assert whole.q == 1
    assert whole.training_event("t") == Event("t", "gaussian", sigma=3.0, steps=7)


def test_no_privacy_is_a_plan_like_any_other() -> None:
    free = NoPrivacy(2000, steps=7, batch=100, clip=0.5).calibrate()
    assert (free.noise, free.bound, free.q, free.private) == (0.0, math.inf, 0.05, False)
    assert all(free.mu(stage) == math.inf for stage in ("rows", "codec", "marginals"))
    spent = [*free.measured(), free.training_event("t")]
    assert {event.mechanism for event in spent} == {"none"}
    assert spent[-1].steps == 7
    assert compose_epsilon(spent, free.delta) == math.inf
    assert NoPrivacy(10).delta == 1e-5
    assert NoPrivacy(10**7).delta == 0.5e-7
    ledger = Ledger.from_json(_paid(free).to_json())
    assert ledger.epsilon == math.inf


def _paid(spending: PrivacyPlan) -> Ledger:
    ledger = spending.ledger()
    for event in [*spending.measured(), spending.training_event("t")]:
        ledger.pay(event)
    return ledger


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"epsilon": 0.0}, "epsilon=0"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 1.0}, "delta=1"),
        ({"delta": math.nan}, "delta=nan"),
        ({"delta": 1 / 2000}, "below 1/rows"),
        ({"delta": 0.1}, "below 1/rows"),
        ({"rows": 0}, "rows=0"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"steps": -1}, "steps=-1"),
        ({"clip": 0.0}, "clip=0"),
        ({"clip": math.inf}, "clip=inf"),
        ({"unit": ""}, "unit=''"),
        ({"contributions": 2}, "contributions=2"),
        ({"unit": "person", "contributions": 0}, "contributions=0"),
        ({"unit": "person", "contributions": 3, "delta": 1e-3}, "below 1/rows"),
        ({"secure": 1}, "secure=1"),
        ({"spent": "events"}, "privacy.spent"),
        ({"spent": [{"mechanism": "gaussian"}]}, "missing"),
        ({"relation": "replace_one"}, "relation=replace_one"),
        ({"shares": {"training": 0.1}}, "privacy.shares=training"),
        ({"shares": {"codec": -0.1}}, "privacy.shares.codec=-0.1"),
        ({"shares": {"codec": 1.5}}, "privacy.shares.codec=1.5"),
        ({"shares": {"codec": math.nan}}, "privacy.shares.codec=nan"),
        ({"shares": {"codec": 0.6, "marginals": 0.6}, "steps": 0}, "add up to 1.2"),
        ({"shares": {"codec": 0.5, "marginals": 0.5}}, "leave some"),
    ],
)
def test_plans_that_cannot_be_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        plan(**settings)


def test_a_large_delta_is_fine_where_nothing_is_promised() -> None:
    assert plan(epsilon=math.inf, delta=0.1).bound == math.inf


def test_a_plan_refuses_what_it_cannot_say() -> None:
    with pytest.raises(UsageError, match="calibrate"):
        _ = plan().noise
    with pytest.raises(UsageError, match="calibrate"):
        plan().training_event("t")
    with pytest.raises(UsageError, match="stage=training"):
        plan().mu("training")


def test_a_budget_that_no_noise_fits_is_refused() -> None:
    """Beside metadata that took all but one millionth of the budget."""
    taken = Event("bounds", "gaussian", sigma=(1 + 1e-6) / gaussian_mu(1.0, DELTA))
    for batch in (100, 2000):
        crowded = plan(batch=batch, steps=10**6, shares={"marginals": 0.999}, spent=(taken,))
        with pytest.raises(UsageError, match="no noise is enough"):
            crowded.calibrate()


# Mechanisms


@pytest.mark.parametrize(("mu", "parts", "queries"), [(0.5, 1, 1), (2.0, 6, 4), (0.05, 9, 2)])
def test_measured_noise_has_the_scale_that_was_paid_for(
    mu: float, parts: int, queries: int
) -> None:
    ledger = Ledger(DELTA)
    noise = Measurer(ledger, mu, parts, np.random.default_rng(1)).histograms("x", queries)
    assert noise.sigma == pytest.approx(math.sqrt(parts * queries) / mu)
    # The event is that of one part: standard deviation over the sensitivity √queries of it.
    assert ledger.events[0].sigma == pytest.approx(noise.sigma / math.sqrt(queries))
    counts = np.arange(30_000) % 7
    drawn = noise(counts) - counts
    assert stats.kstest(drawn, stats.norm(0, noise.sigma).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(drawn, stats.norm(0, wrong * noise.sigma).cdf).pvalue < 1e-12
    np.testing.assert_array_equal(drawn * 1024, np.round(drawn * 1024))


def test_noise_of_several_answers_is_independent() -> None:
    measurer = Measurer(Ledger(DELTA), 1.0, 3, np.random.default_rng(2))
    drawn = []
    for part in range(3):
        noise = measurer.histograms(f"x{part}", 2)
        drawn += [noise(np.zeros(20_000)), noise(np.zeros(20_000))]
    correlation = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlation).max() < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_all_answers_together_cost_the_budget(parts: int) -> None:
    ledger = Ledger(DELTA)
    measurer = Measurer(ledger, 0.7, parts, np.random.default_rng(0))
    for part in range(parts):
        measurer.histograms(f"x{part}", queries=part + 1)
    assert [event.what for event in ledger.events] == [f"x{part}" for part in range(parts)]
    one = compose_epsilon([gaussian_event("all", 0.7)], DELTA)
    assert ledger.epsilon == pytest.approx(one, rel=1e-9)


def test_an_answer_is_paid_before_a_row_is_counted() -> None:
    ledger = Ledger(DELTA)

    class Watched(np.ndarray):
        """Counts that must not be touched before the ledger holds the event."""

        def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
            assert len(ledger.events) == 1
            plain = [np.asarray(a) if isinstance(a, Watched) else a for a in args]
            return getattr(ufunc, method)(*plain, **kwargs)

    measurer = Measurer(ledger, 1.0, 1, np.random.default_rng(0))
    assert not ledger.events
    noise = measurer.histograms("x", 1)
    assert len(ledger.events) == 1
    assert noise(np.zeros(3).view(Watched)).shape == (3,)


def test_without_privacy_counts_are_exact_and_the_ledger_says_so() -> None:
    ledger = Ledger(DELTA)
    noise = Measurer(ledger, math.inf, 5, np.random.default_rng(0)).histograms("x", 3)
    np.testing.assert_array_equal(noise(np.array([0.0, 3.0, 1e6])), [0.0, 3.0, 1e6])
    assert [event.mechanism for event in ledger.events] == ["none"]


def test_a_measurer_answers_no_more_than_it_was_given_for() -> None:
    """One answer too many, from either of the two places it could be asked, would overspend."""
    ledger = Ledger(DELTA)
    measurer = Measurer(ledger, 1.0, 2, np.random.default_rng(0))
    noise = measurer.histograms("a", 2)
    measurer.histograms("b", 1)
    with pytest.raises(UsageError, match="parts=2"):
        measurer.histograms("c", 1)
    assert len(ledger.events) == 2
    noise(np.zeros(3))
    noise(np.zeros(3))
    with pytest.raises(UsageError, match="queries=2"):
        noise(np.zeros(3))


@pytest.mark.parametrize(
    ("mu", "part"), [(0.0, "no budget"), (-1.0, "no budget"), (math.nan, "nan")]
)
def test_a_measurer_without_a_budget_refuses(mu: float, part: str) -> None:
    """A stage without a share, asked all the same."""
    ledger = Ledger(DELTA)
    measurer = Measurer(ledger, mu, 1, np.random.default_rng(0))
    with pytest.raises(UsageError, match=part):
        measurer.histograms("heaps:age", 1)
    assert not ledger.events


def test_a_measurer_refuses_to_count_nothing() -> None:
    """Zero queries would mean zero noise."""
    with pytest.raises(UsageError, match="queries=0"):
        Measurer(Ledger(DELTA), 1.0, 1, np.random.default_rng(0)).histograms("x", 0)


def test_two_accountants_must_agree(monkeypatch):
    ledger = Ledger(1e-5)
    ledger.cross_check()  # nothing spent
    ledger.pay(Event("dpsgd", "poisson_gaussian", sigma=1.0, q=0.01, steps=100))
    ledger.cross_check()
    right = second_opinion(ledger.events, 1e-5)
    for wrong in (right * 1.05, right - 0.1):
        monkeypatch.setattr(
            "dpsynth.privacy.accounting.second_opinion", lambda *_, w=wrong, **__: w
        )
        with pytest.raises(UsageError, match="first accountant says"):
            ledger.cross_check()
