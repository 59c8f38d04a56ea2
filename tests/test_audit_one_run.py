"""One-run bounds against enumeration, recurrences written out, and simulated honest trainings."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dpsynth.audit import one_run
from dpsynth.audit.bounds import Curve, curve_of_profile, gaussian_curve, gaussian_family
from dpsynth.audit.one_run import (
    OneRunAudit,
    attainable_right,
    audit_one_run,
    best_guesses,
    epsilon_from_guesses,
    epsilon_from_guesses_fdp,
    guess,
    guess_p_value,
    refutes,
)
from dpsynth.checks import UsageError
from dpsynth.privacy.calibration import gaussian_mu

DELTA = 1e-5


def pure(epsilon: float) -> Curve:
    return curve_of_profile(np.array([epsilon]), np.array([0.0]))


def mixed(epsilon: float, delta: float) -> Curve:
    return curve_of_profile(np.array([epsilon]), np.array([delta]))


# p-values of (ε, δ)


def p_value_written_out(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The formula of the paper, sum by sum."""
    rate = 1 / (1 + math.exp(-epsilon))

    def mass(k: int) -> float:
        return math.comb(r, k) * rate**k * (1 - rate) ** (r - k)

    above = math.fsum(mass(k) for k in range(v, r + 1))
    near = [math.fsum(mass(k) for k in range(max(0, v - i), v)) / i for i in range(1, v + 1)]
    return min(1.0, above + 2 * m * delta * max(near, default=0.0))


@pytest.mark.parametrize("delta", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize(("m", "r", "v"), [(1, 1, 1), (9, 5, 0), (9, 5, 4), (40, 40, 31)])
def test_the_p_value_is_the_formula(m: int, r: int, v: int, epsilon: float, delta: float) -> None:
    expected = p_value_written_out(m, r, v, epsilon, delta)
    assert guess_p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("epsilon", [0.3, 1.5])
@pytest.mark.parametrize("m", [1, 3, 6])
def test_randomised_response_meets_the_p_value_at_every_count(m: int, epsilon: float) -> None:
    """All coins and all answers of m coins, each told truly with probability e^ε/(1 + e^ε)."""
    truth = 1 / (1 + math.exp(-epsilon))
    chance = np.zeros(m + 1)
    for coins in itertools.product([0, 1], repeat=m):
        for told in itertools.product([0, 1], repeat=m):
            right = sum(c == t for c, t in zip(coins, told, strict=True))
            chance[right] += 0.5**m * truth**right * (1 - truth) ** (m - right)
    for v in range(m + 1):
        p = guess_p_value(m, m, v, epsilon, 0.0)
        assert p == pytest.approx(chance[v:].sum(), rel=1e-9)


@pytest.mark.parametrize("delta", [0.01, 0.1])
@pytest.mark.parametrize("guesses", [1, 2, 4])
def test_no_mechanism_that_fails_outright_beats_the_p_value(guesses: int, delta: float) -> None:
    """Each of 4 coins is shown with probability δ, else told as at random: with r guesses the
    attacker names those shown first. Counted over all ways to show them."""
    m, chance = 4, np.zeros(5)
    for shown in itertools.product([0, 1], repeat=m):
        weight = math.prod(delta if s else 1 - delta for s in shown)
        sure = min(sum(shown), guesses)
        for lucky in range(guesses - sure + 1):
            chance[sure + lucky] += weight * stats.binom.pmf(lucky, guesses - sure, 0.5)
    for v in range(guesses + 1):
        seen = chance[v:].sum()
        assert seen <= guess_p_value(m, guesses, v, 0.0, delta) + 1e-12
        # The same mechanism has the trade-off curve of (0, δ).
        assert not refutes(mixed(0.0, delta), m, guesses, v, alpha=0.999 * seen)


@pytest.mark.parametrize("delta", [0.0, DELTA])
def test_epsilon_is_where_the_p_value_reaches_the_level(delta: float) -> None:
    for m, r, v in [(1000, 100, 87), (1000, 1000, 560), (50, 50, 50)]:
        found = epsilon_from_guesses(m, r, v, delta=delta)
        assert guess_p_value(m, r, v, found, delta) <= 0.05
        assert guess_p_value(m, r, v, found + 1e-6, delta) > 0.05
    assert epsilon_from_guesses(1000, 100, 52, delta=delta) == 0.0
    # A large δ explains a few right guesses by itself.
    assert epsilon_from_guesses(1000, 10, 10, delta=0.1) == 0.0


# f-DP


def refuted_by_search(curve: Curve, m: int, r: int, v: int, alpha: float) -> bool:
    """The recurrence for P[j ≥ i] itself, forwards from its least values: the derivation in
    `refutes`, in other variables."""
    tail, share = alpha, alpha * v / m
    for i in range(v, 0, -1):
        # H_{i−1} = r/m · P_{i−1} − R_{i−1} and R_{i−1} = R_i + (i−1)/m · (P_{i−1} − P_i).
        needed = float(curve(np.array([max(0.0, 1 - share)]))[0])
        before = max(tail, (needed + share - (i - 1) / m * tail) * m / (r - i + 1))
        share += (i - 1) / m * (before - tail)
        tail = before
        if tail > 1 + 1e-9 or share > 1:
            return True
    return tail > 1 + 1e-9


@pytest.mark.parametrize("curve", [pure(0.4), mixed(1.0, 0.001), gaussian_curve(0.6)])
def test_refuting_agrees_with_the_recurrence_in_other_variables(curve: Curve) -> None:
    verdicts = []
    for m, r in [(1, 1), (6, 4), (40, 40), (100, 30)]:
        for v in range(0, r + 1, max(1, r // 15)):
            expected = refuted_by_search(curve, m, r, v, 0.05)
            assert refutes(curve, m, r, v) == expected, (m, r, v)
            verdicts.append(expected)
    assert len(set(verdicts)) == 2


@pytest.mark.parametrize("m", [3, 8])
def test_what_randomised_response_does_is_never_refuted(m: int) -> None:
    """Its chance of v right ones, exactly, as the level: any curve it has would be a lie."""
    for epsilon in (0.2, 1.0):
        truth = 1 / (1 + math.exp(-epsilon))
        for v in range(m + 1):
            level = float(stats.binom.sf(v - 1, m, truth)) * 0.999999
            assert not refutes(pure(epsilon), m, m, v, alpha=level)
    assert refutes(pure(0.2), m, m, m, alpha=0.95)


def test_more_right_guesses_show_more_and_more_canaries_of_the_same_less() -> None:
    family = gaussian_family(DELTA)
    forms: list[Callable[[int, int, int], float]] = [
        lambda m, r, v: epsilon_from_guesses(m, r, v, delta=DELTA),
        lambda m, r, v: epsilon_from_guesses_fdp(m, r, v, family),
    ]
    for form in forms:
        shown = [form(400, 60, v) for v in range(20, 61, 4)]
        assert shown == sorted(shown)
        assert shown[0] == 0 and shown[-1] > 2
        assert form(4000, 60, 55) <= form(400, 60, 55) <= form(60, 60, 55)


@pytest.mark.parametrize(
    ("m", "r", "v", "delta", "any_epsilon", "fdp_epsilon"),
    [
        (1000, 100, 87, 1e-5, 1.3903, 2.0833),
        (1000, 1000, 677, 1e-5, 0.6267, 1.1819),
        (500, 50, 50, 1e-6, 2.7833, 4.9582),
        (200, 120, 90, 1e-4, 0.7332, 1.2249),
    ],
)
def test_bounds_are_those_of_another_implementation(
    m: int, r: int, v: int, delta: float, any_epsilon: float, fdp_epsilon: float
) -> None:
    """Figures of `jax_privacy.auditing` 2.0 (`_epsilon_one_run`, `_epsilon_one_run_fdp`)."""
    assert epsilon_from_guesses(m, r, v, delta=delta) == pytest.approx(any_epsilon, abs=1e-3)
    found = epsilon_from_guesses_fdp(m, r, v, gaussian_family(delta))
    assert found == pytest.approx(fdp_epsilon, rel=2e-3)


# Honest trainings


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_bounds_on_randomised_response_lie_above_as_rarely_as_stated(epsilon: float) -> None:
    """1500 trainings at exactly ε: the tight case, so the rate is also near α."""
    rng, times, m, alpha = np.random.default_rng(5), 1500, 200, 0.1
    right = rng.binomial(m, 1 / (1 + math.exp(-epsilon)), times)
    found = {v: epsilon_from_guesses(m, m, int(v), delta=0.0, alpha=alpha) for v in set(right)}
    above = np.mean([found[v] > epsilon for v in right])
    slack = 4 * math.sqrt(alpha * (1 - alpha) / times)
    assert 0.3 * alpha < above < alpha + slack
    # The trade-off curve of ε alone shows no more.
    refuted = {v: refutes(pure(epsilon), m, m, int(v), alpha=alpha) for v in set(right)}
    assert np.mean([refuted[v] for v in right]) < alpha + slack


@pytest.mark.parametrize("mu", [0.5, 2.0])
@pytest.mark.parametrize("r", [20, 150])
def test_bounds_on_gaussians_lie_above_as_rarely_as_stated(mu: float, r: int) -> None:
    rng, times, m, alpha = np.random.default_rng(6), 400, 150, 0.1
    family, curve = gaussian_family(DELTA), gaussian_curve(mu)
    counts = []
    for _ in range(times):
        coins = rng.random(m) < 0.5
        scores = mu * coins + rng.standard_normal(m)
        said = guess(scores, r)
        counts.append(int(((said > 0) & coins).sum() + ((said < 0) & ~coins).sum()))
    slack = 4 * math.sqrt(alpha * (1 - alpha) / times)
    refuted = {v: refutes(curve, m, r, v, alpha=alpha) for v in set(counts)}
    assert np.mean([refuted[v] for v in counts]) < alpha + slack
    median = int(np.median(counts))
    assert attainable_right(curve, m, r, rng) == pytest.approx(median, abs=2)
    shown = epsilon_from_guesses_fdp(m, r, median, family, alpha=alpha)
    assert shown > epsilon_from_guesses(m, r, median, delta=DELTA, alpha=alpha) >= 0


# Guesses


def test_guesses_are_the_extremes() -> None:
    scores = np.array([0.1, 5.0, -2.0, 0.0, 3.0, -0.5])
    assert guess(scores, 4).tolist() == [0, 1, -1, 0, 1, -1]
    assert guess(scores, 3).tolist() == [0, 1, -1, 0, 1, 0]
    assert np.abs(guess(scores, 6)).sum() == 6
    assert guess(np.zeros(4), 2).tolist() == [1, 0, 0, -1]


@pytest.mark.parametrize(
    ("epsilon", "either", "fdp"), [(1, 0.22, 0.35), (4, 1.4, 2.2), (10, 3.5, 5.8)]
)
def test_a_thousand_canaries_show_what_the_table_says(
    epsilon: float, either: float, fdp: float
) -> None:
    """Table of `experiments/one-run`: μ-GDP with that ε at δ = 1e-5, r chosen by the claim."""
    rng, curve = np.random.default_rng(1), gaussian_curve(gaussian_mu(epsilon, DELTA))
    family = gaussian_family(DELTA)

    def shown(form: Callable[[int, int, int, float], float]) -> float:
        return best_guesses(form, curve, 1000, rng)[1]

    first = shown(lambda m, r, v, a: epsilon_from_guesses(m, r, v, delta=DELTA, alpha=a))
    second = shown(lambda m, r, v, a: epsilon_from_guesses_fdp(m, r, v, family, alpha=a))
    assert (first, second) == (pytest.approx(either, abs=0.1), pytest.approx(fdp, abs=0.15))


def test_the_number_of_guesses_is_the_one_that_shows_most() -> None:
    rng, curve = np.random.default_rng(2), gaussian_curve(1.5)

    def form(m: int, r: int, v: int, alpha: float) -> float:
        return epsilon_from_guesses(m, r, v, delta=DELTA, alpha=alpha)

    number, shown = best_guesses(form, curve, 300, rng)
    each = {
        r: form(300, r, attainable_right(curve, 300, r, rng), 0.05) for r in (6, 15, 60, 150, 300)
    }
    assert shown >= 0.8 * max(each.values())
    assert 6 < number < 300


# Audit


def trained(mu: float, m: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    return mu * coins + rng.standard_normal(m), coins


def claim(epsilon: float = 4.0) -> Any:
    """A family whose scale 1 is the Gaussian of that ε."""
    mu = gaussian_mu(epsilon, DELTA)
    unit = gaussian_family(DELTA)
    family = one_run.Family(lambda s: unit.curve(s / mu), lambda s: unit.epsilon(s / mu), 64)
    return family, mu


def audited(mu: float, seed: int = 0, **settings: Any) -> OneRunAudit:
    scores, coins = trained(mu, seed=seed)
    rng = np.random.default_rng(9)
    return audit_one_run(
        scores, coins, claim()[0], **{"delta": DELTA, "kind": "gradient", "rng": rng, **settings}
    )


def test_an_audit_shows_what_is_attainable_and_flags_what_is_not() -> None:
    mu = claim()[1]
    honest = [audited(mu, seed) for seed in range(3)]
    assert not any(audit.violated for audit in honest)
    assert np.median([audit.fdp.epsilon for audit in honest]) == pytest.approx(
        honest[0].fdp.attainable, rel=0.4
    )
    assert all(audit.fdp.epsilon >= audit.any.epsilon for audit in honest)
    assert honest[0].claimed == pytest.approx(4.0)
    assert audited(4 * mu).violated
    meets = replace(honest[0], fdp=replace(honest[0].fdp, epsilon=honest[0].claimed))
    assert meets.violated  # that very noise was refuted
    assert f"{honest[0].fdp.right}/{honest[0].fdp.guesses} right" in honest[0].line
    assert OneRunAudit.from_json(honest[0].to_json()) == honest[0]


def test_how_many_coins_are_guessed_does_not_depend_on_scores() -> None:
    first, second = audited(0.1), audited(3.0, seed=4)
    assert (first.any.guesses, first.fdp.guesses) == (second.any.guesses, second.fdp.guesses)
    assert (first.any.attainable, first.fdp.attainable) == (
        second.any.attainable,
        second.fdp.attainable,
    )


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: guess_p_value(5, 6, 2, 1.0, 0.0), "guesses=6, canaries=5"),
        (lambda: guess_p_value(5, 3, 4, 1.0, 0.0), "right=4"),
        (lambda: guess_p_value(5, 3, 2, -1.0, 0.0), "epsilon=-1.0"),
        (lambda: guess_p_value(5, 3, 2, 1.0, 2.0), "delta=2.0"),
        (lambda: epsilon_from_guesses(5, 3, 2, delta=0.0, alpha=0.0), "alpha=0.0"),
        (lambda: epsilon_from_guesses_fdp(5, 3, 4, gaussian_family(DELTA)), "right=4"),
        (lambda: refutes(pure(1.0), 5, 3, 4), "right=4"),
        (lambda: refutes(pure(1.0), 5, 3, 2, alpha=1.0), "alpha=1.0"),
        (lambda: guess(np.zeros(3), 4), "guesses=4"),
        (lambda: guess(np.zeros(3), 0), "guesses=0"),
        (lambda: guess(np.array([np.nan]), 1), "finite"),
        (lambda: attainable_right(pure(1.0), 5, 6, np.random.default_rng(0)), "guesses=6"),
        (
            lambda: best_guesses(lambda *_: 0.0, pure(1.0), 0, np.random.default_rng(0)),
            "canaries=0",
        ),
        (lambda: OneRunAudit.from_json("[]"), "canaries.json"),
        (lambda: audited(1.0, confidence=0.0), "confidence=0.0"),
        (lambda: audited(1.0, delta=0.0), "delta=0.0"),
        (lambda: unfit(np.zeros(3), np.zeros(4, dtype=bool)), "give one of each a canary"),
        (lambda: unfit(np.full(3, np.inf), np.zeros(3, dtype=bool)), "finite"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


def unfit(scores: np.ndarray, coins: np.ndarray) -> OneRunAudit:
    rng = np.random.default_rng(0)
    return audit_one_run(scores, coins, claim()[0], delta=DELTA, kind="gradient", rng=rng)
