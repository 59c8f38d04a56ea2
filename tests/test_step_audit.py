"""Step audit: bounds against slow oracles and simulated attackers, tests that err as they say, and
a canary that is what it claims to be in every engine."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import recipe, seat
from torch import Tensor

from dpsynth.audit import step as step_module
from dpsynth.audit.bounds import (
    epsilon_from_rates,
    mu_from_guesses,
    mu_from_rates,
    upper_rate,
)
from dpsynth.audit.step import Bound, audit_sampler, audit_steps
from dpsynth.checks import UsageError
from dpsynth.networks import FleetLinear, Mlp
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.randomness import FleetRng
from dpsynth.training.canary import CanaryEngine, StepCanary, WatchedBatches
from dpsynth.training.fleet import train_fleet

# Bounds from counts


def refuted(rate: float, errors: int, trials: int, alpha: float) -> bool:
    """Whether `errors` or fewer would be rarer than `alpha` at that rate: the terms added up."""
    terms = [math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(errors + 1)]
    return math.fsum(terms) < alpha


@pytest.mark.parametrize("alpha", [0.3, 0.05, 1e-4])
@pytest.mark.parametrize(("errors", "trials"), [(0, 1), (0, 40), (3, 7), (17, 60), (39, 40)])
def test_upper_rate_is_where_the_errors_would_be_too_few(
    errors: int, trials: int, alpha: float
) -> None:
    found = upper_rate(errors, trials, alpha)
    assert refuted(found + 1e-9, errors, trials, alpha)
    assert not refuted(found - 1e-9, errors, trials, alpha)


def test_upper_rate_of_nothing_but_errors_is_one() -> None:
    assert upper_rate(5, 5, 0.05) == 1.0


def test_epsilon_from_rates_is_the_stated_formula() -> None:
    fnr, fpr = stats.beta.ppf(0.975, 13, 88), stats.beta.ppf(0.975, 4, 97)
    expected = math.log((1 - fnr - 1e-5) / fpr)
    assert epsilon_from_rates(12, 100, 3, 100, delta=1e-5) == pytest.approx(expected, rel=1e-12)
    assert epsilon_from_rates(60, 100, 50, 100, delta=1e-5) == 0.0
    assert epsilon_from_rates(100, 100, 0, 100, delta=1e-5) == 0.0


def test_mu_from_rates_is_the_stated_formula() -> None:
    fnr, fpr = stats.beta.ppf(0.975, 13, 88), stats.beta.ppf(0.975, 4, 97)
    expected = stats.norm.ppf(1 - fpr) - stats.norm.ppf(fnr)
    assert mu_from_rates(12, 100, 3, 100) == pytest.approx(expected, rel=1e-12)
    assert mu_from_rates(50, 100, 50, 100) == 0.0
    assert mu_from_rates(100, 100, 0, 100) == 0.0


def test_no_guess_through_a_gaussian_is_better_than_the_one_behind_the_bound() -> None:
    """Φ(μ/2) against every threshold: what `mu_from_guesses` inverts is the best that can be."""
    cuts = np.linspace(-8, 12, 4001)
    for mu in (0.1, 0.7, 2.0, 4.0):
        right = (stats.norm.cdf(cuts) + stats.norm.sf(cuts - mu)) / 2
        assert right.max() == pytest.approx(stats.norm.cdf(mu / 2), abs=1e-6)
        many = 10**9
        found = mu_from_guesses(int(many * right.max()), many)
        assert mu * 0.998 < found < mu


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_bounds_lie_above_the_truth_no_more_often_than_stated(mu: float) -> None:
    """2000 perfect attacks a case; both bounds are also sharp: most come near."""
    rng, times, size, alpha = np.random.default_rng(1), 2000, 300, 0.1
    rate = stats.norm.cdf(-mu / 2)
    missed, false = rng.binomial(size, rate, times), rng.binomial(size, rate, times)
    pairs = list(zip(missed.tolist(), false.tolist(), strict=True))
    guessed = np.array([mu_from_guesses(2 * size - m - f, 2 * size, alpha=alpha) for m, f in pairs])
    rated = np.array([mu_from_rates(m, size, f, size, alpha=alpha) for m, f in pairs])
    slack = 4 * math.sqrt(alpha * (1 - alpha) / times)
    assert 0.3 * alpha < (guessed > mu).mean() < alpha + slack
    assert (rated > mu).mean() < alpha + slack
    assert np.median(guessed) > mu - 0.2
    assert np.median(guessed) > np.median(rated)


def test_clopper_pearson_epsilon_holds_for_the_worst_mechanism() -> None:
    """Randomised response, whose rates meet (ε, 0) exactly."""
    rng, times, size = np.random.default_rng(2), 2000, 400
    for epsilon in (0.5, 2.0):
        wrong = 1 / (1 + math.exp(epsilon))
        missed, false = rng.binomial(size, wrong, times), rng.binomial(size, wrong, times)
        found = np.array(
            [
                epsilon_from_rates(m, size, f, size, delta=0.0, alpha=0.1)
                for m, f in zip(missed.tolist(), false.tolist(), strict=True)
            ]
        )
        assert (found > epsilon).mean() < 0.1
        assert np.median(found) > 0.6 * epsilon


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: upper_rate(5, 4, 0.05), "errors=5"),
        (lambda: upper_rate(-1, 4, 0.05), "errors=-1"),
        (lambda: upper_rate(0, 0, 0.05), "trials=0"),
        (lambda: upper_rate(1, 4, 1.0), "alpha=1.0"),
        (lambda: mu_from_guesses(9, 8), "errors=-1"),
    ],
)
def test_counts_that_cannot_be_are_refused(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


# Noise


def steps_of(
    seed: int = 0, runs: int = 2, steps: int = 400, sigma: float = 1.3, coordinates: int = 5
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, coins and noise of an honest engine."""
    rng = np.random.default_rng(seed)
    present = rng.random((runs, steps)) < 0.5
    scores = present + sigma * rng.standard_normal((runs, steps))
    return scores, present, sigma * rng.standard_normal((runs, steps, coordinates))


def judged(scores: np.ndarray, present: np.ndarray, noise: np.ndarray, **settings: Any):
    chosen = {"sigma": 1.3, "epsilon_of": lambda sigma: 1 / sigma, **settings}
    return audit_steps(scores, present, noise, **chosen)


def test_an_honest_engine_is_flagged_as_rarely_as_stated_and_bounds_hold() -> None:
    """250 audits at α = .1: in all, and every continuous p-value is uniform."""
    audits = [judged(*steps_of(seed, steps=120), alpha=0.1) for seed in range(250)]
    flagged = np.mean([bool(audit.flags) for audit in audits])
    assert 0.02 < flagged < 0.1 + 4 * math.sqrt(0.1 * 0.9 / 250)
    above = np.mean([audit.bound.mu > 1 / 1.3 for audit in audits])
    assert above < 0.05 + 4 * math.sqrt(0.05 * 0.95 / 250)
    for name in ("contribution", "offset", "scale", "law"):
        p = [audit.p_values[name] for audit in audits]
        assert stats.kstest(p, "uniform").pvalue > 1e-3, name
    for name in ("guesses", "parameters", "steps", "repeats", "coordinates", "runs"):
        p = np.array([audit.p_values[name] for audit in audits])
        for bar in (0.02, 0.1):
            assert (p <= bar).mean() < bar + 4 * math.sqrt(bar * (1 - bar) / 250), name
    repeats = np.array([audit.p_values["repeats"] for audit in audits])
    assert (repeats <= 0.2).mean() > 0.08  # the union bound is nearly tight where p is small


def test_every_second_audit_shows_what_is_attainable() -> None:
    audits = [judged(*steps_of(seed, steps=60)) for seed in range(300)]
    attainable = audits[0].attainable.mu
    assert all(audit.attainable.mu == attainable for audit in audits)
    assert 0.4 < np.mean([audit.bound.mu >= attainable for audit in audits]) < 0.65
    assert attainable < 1 / 1.3


def test_epsilon_is_recomposed_from_the_bounded_noise() -> None:
    audit = judged(*steps_of(), epsilon_of=lambda sigma: 7 / sigma**2)
    for bound in (audit.bound, audit.by_rates, audit.attainable):
        assert bound.epsilon == pytest.approx(7 * bound.mu**2)
        assert bound.sigma == pytest.approx(1 / bound.mu)
    assert audit.claimed == pytest.approx(7 / 1.3**2)
    scores, present, _ = steps_of()
    assert audit.right == ((scores > 0.5) == present).sum()
    assert audit.guesses == scores.size
    nothing = Bound.of(0.0, lambda sigma: math.nan)
    assert (nothing.epsilon, nothing.sigma) == (0.0, math.inf)


Triple = tuple[np.ndarray, np.ndarray, np.ndarray]


def half(triple: Triple) -> Triple:
    scores, present, noise = triple
    return (scores + present) / 2, present, noise / 2


def silent(triple: Triple) -> Triple:
    return triple[1].astype(float), triple[1], 0 * triple[2]


def unclipped(triple: Triple) -> Triple:
    return triple[0] + 9 * triple[1], triple[1], triple[2]


def shifted(triple: Triple) -> Triple:
    return triple[0] + 0.6, triple[1], triple[2]


def flat(triple: Triple) -> Triple:
    """Uniform noise of the same variance."""
    even = stats.norm.cdf(triple[2] / 1.3)
    return triple[0], triple[1], 1.3 * math.sqrt(12) * (even - 0.5)


def one_quiet(triple: Triple) -> Triple:
    quiet = triple[2].copy()
    quiet[..., 3] *= 0.7
    return triple[0], triple[1], quiet


def periodic(triple: Triple) -> Triple:
    noise = triple[2].copy()
    noise[:, 50:] = noise[:, :-50] * 0.3 + noise[:, 50:] * math.sqrt(1 - 0.09)
    return triple[0], triple[1], noise


def once_again(triple: Triple) -> Triple:
    noise = triple[2].copy()
    noise[1, 300] = noise[0, 7]
    return triple[0], triple[1], noise


def coupled(triple: Triple) -> Triple:
    noise = triple[2].copy()
    noise[..., 4] = -0.3 * noise[..., 1] + math.sqrt(1 - 0.09) * noise[..., 4]
    return triple[0], triple[1], noise


def shared(triple: Triple) -> Triple:
    noise = triple[2].copy()
    noise[1] = noise[0]
    return triple[0], triple[1], noise


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (half, "guesses"),
        (half, "scale"),
        (half, "parameters"),
        (silent, "guesses"),
        (silent, "repeats"),
        (silent, "coordinates"),
        (unclipped, "contribution"),
        (unclipped, "guesses"),
        (shifted, "offset"),
        (flat, "law"),
        (one_quiet, "parameters"),
        (periodic, "steps"),
        (once_again, "repeats"),
        (coupled, "coordinates"),
        (shared, "runs"),
    ],
)
def test_every_check_sees_its_defect(plant: Callable[[Triple], Triple], name: str) -> None:
    honest = steps_of()
    assert not judged(*honest).flags
    assert name in judged(*plant(honest)).flags


def test_a_single_run_and_a_single_coordinate_are_enough() -> None:
    audit = judged(*steps_of(runs=1, coordinates=1))
    assert not audit.flags
    assert {"runs", "coordinates"}.isdisjoint(audit.p_values)


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = math.nan
    return array


SCORES, PRESENT, NOISE = steps_of()


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: judged(SCORES[0], PRESENT[0], NOISE[0]), "must agree"),
        (lambda: judged(SCORES[:, 1:], PRESENT, NOISE), "must agree"),
        (lambda: judged(SCORES, PRESENT, NOISE[..., 0]), "coordinates"),
        (lambda: judged(SCORES, PRESENT, NOISE[..., :0]), "coordinates"),
        (lambda: judged(with_nan(SCORES), PRESENT, NOISE), "finite"),
        (lambda: judged(SCORES, PRESENT, with_nan(NOISE)), "finite"),
        (lambda: judged(SCORES, PRESENT & False, NOISE), "0 of them with the canary"),
        (lambda: judged(SCORES[:, :3], PRESENT[:, :3], NOISE[:, :3]), "3 steps"),
        (lambda: judged(SCORES, PRESENT, NOISE, sigma=0.0), "sigma=0.0"),
        (lambda: judged(SCORES, PRESENT, NOISE, alpha=0.0), "alpha=0.0"),
        (lambda: judged(SCORES, PRESENT, NOISE, confidence=1.0), "confidence=1.0"),
    ],
)
def test_observations_that_cannot_be_are_refused(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


# Batches

Q, RECORDS = 0.1, 60
GROUPS = np.repeat([0, 1, 2], [40, 15, 5])


def bits_of(
    seed: int = 0, runs: int = 1, steps: int = 300, records: int = RECORDS, q: float = Q
) -> np.ndarray:
    return np.random.default_rng(seed).random((runs, steps, records)) < q


@pytest.mark.parametrize("q", [0.02, 0.1, 0.5])
def test_poisson_batches_are_flagged_as_rarely_as_stated(q: float) -> None:
    """200 audits at α = .1, down to batches of 1.2 records and 3 batches a record."""
    audits = [
        audit_sampler(bits_of(seed, runs=2, steps=150, q=q), q=q, groups=GROUPS, alpha=0.1)
        for seed in range(200)
    ]
    assert np.mean([bool(audit.flags) for audit in audits]) < 0.1 + 4 * math.sqrt(0.09 / 200)
    for name in audits[0].p_values:
        p = np.array([audit.p_values[name] for audit in audits])
        for bar in (0.02, 0.1):
            assert (p <= bar).mean() < bar + 4 * math.sqrt(bar * (1 - bar) / 200), name


def exact_tail(total: float, pairs: int, q: float) -> float:
    """Two-sided p-value of Σ (x − q)(y − q) over independent pairs, summed over how many pairs
    are both in and how many have one in."""
    both = np.arange(pairs + 1)
    weight = stats.binom(pairs, q * q).pmf(both)
    one = stats.binom(pairs - both, 2 * q * (1 - q) / (1 - q * q))
    cut = (both * (1 - 2 * q) + q * q * pairs - total) / q
    above = (weight * one.cdf(np.floor(cut + 1e-9))).sum()
    below = (weight * one.sf(np.ceil(cut - 1e-9) - 1)).sum()
    return 2 * min(above, below)


@pytest.mark.parametrize(("pairs", "q"), [(12000, 0.02), (5000, 0.1), (2000, 0.3), (3000, 0.5)])
def test_the_law_of_products_errs_on_the_safe_side(pairs: int, q: float) -> None:
    """Far out too, where a normal law would be wrong by a factor of hundreds."""
    for z in (-3, -2, 2, 3, 4, 5, 6):
        total = z * q * (1 - q) * math.sqrt(pairs)
        exact = exact_tail(total, pairs, q)
        found = step_module._product_tail(total, pairs, q)
        assert found >= exact
        if z > 0:
            assert found < 4 * exact


Rng = np.random.Generator


def fixed_size(rng: Rng) -> np.ndarray:
    ranks = rng.random((1, 300, RECORDS)).argsort(-1)
    return ranks < round(Q * RECORDS)


def shuffled(rng: Rng) -> np.ndarray:
    """Epochs: every record once in ten batches."""
    size = round(Q * RECORDS)
    bits = np.zeros((1, 300, RECORDS), dtype=bool)
    for start in range(0, 300, 10):
        for step, part in enumerate(rng.permutation(RECORDS).reshape(10, size)):
            bits[0, start + step, part] = True
    return bits


def too_many(rng: Rng) -> np.ndarray:
    return rng.random((1, 300, RECORDS)) < 1.15 * Q


def uneven(rng: Rng) -> np.ndarray:
    rates = np.where(np.arange(RECORDS) % 2, 1.4, 0.6) * Q
    return rng.random((1, 300, RECORDS)) < rates


def by_category(rng: Rng) -> np.ndarray:
    """A category by an even coin, then rows in it: what train-by-sampling does."""
    chosen = rng.integers(0, 3, (1, 300, 1)) == GROUPS
    rates = Q * RECORDS / np.bincount(GROUPS)[GROUPS]
    return chosen & (rng.random((1, 300, RECORDS)) < rates)


def slightly_more_of_a_group(rng: Rng) -> np.ndarray:
    return rng.random((1, 300, RECORDS)) < np.where(GROUPS == 2, 1.5 * Q, Q)


def together(rng: Rng) -> np.ndarray:
    bits = rng.random((1, 300, RECORDS)) < Q
    bits[..., 50] = bits[..., 3]
    return bits


def neighbourly(rng: Rng) -> np.ndarray:
    bits = rng.random((1, 300, RECORDS)) < Q
    moved = np.roll(bits, 1, axis=2)
    return np.where(rng.random(bits.shape) < 0.15, moved, bits)


def held_over(rng: Rng) -> np.ndarray:
    """A tenth of every batch stays for the next one."""
    bits = rng.random((1, 300, RECORDS)) < Q
    for step in range(1, 300):
        kept = rng.random(RECORDS) < 0.1
        bits[0, step] = np.where(kept, bits[0, step - 1], bits[0, step])
    return bits


def again(rng: Rng) -> np.ndarray:
    """One batch comes a second time, long after."""
    bits = rng.random((1, 300, RECORDS)) < Q
    largest = int(bits[0, :140].sum(-1).argmax())
    bits[0, 260] = bits[0, largest]
    return bits


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (fixed_size, "batch sizes"),
        (shuffled, "batch sizes"),
        (shuffled, "records"),
        (shuffled, "steps"),
        (too_many, "rate"),
        (uneven, "records"),
        (by_category, "batch sizes"),
        (by_category, "records"),
        (by_category, "records together"),
        (by_category, "group rates"),
        (by_category, "group sizes"),
        (slightly_more_of_a_group, "group rates"),
        (together, "records together"),
        (neighbourly, "neighbours"),
        (held_over, "steps"),
        (again, "batches again"),
    ],
)
def test_every_check_of_batches_sees_its_defect(
    plant: Callable[[Rng], np.ndarray], name: str
) -> None:
    bits = plant(np.random.default_rng(5))
    assert name in audit_sampler(bits, q=Q, groups=GROUPS).flags


def test_many_records_and_batches_are_compared_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "PAIRED", 100)
    bits = bits_of(steps=240, records=220)
    assert not audit_sampler(bits, q=Q).flags
    bits[0, 40] = bits[0, 17]
    assert "batches again" in audit_sampler(bits, q=Q).flags


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: audit_sampler(bits_of()[0], q=Q), "bits"),
        (lambda: audit_sampler(bits_of(steps=3), q=Q), "4 steps"),
        (lambda: audit_sampler(bits_of(records=1), q=Q), "2 records"),
        (lambda: audit_sampler(bits_of(), q=1.0), "q=1.0"),
        (lambda: audit_sampler(bits_of(), q=Q, groups=GROUPS[1:]), "groups"),
        (lambda: audit_sampler(bits_of(), q=Q, alpha=2.0), "alpha=2.0"),
    ],
)
def test_batches_that_cannot_be_are_refused(call: Callable[[], Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


# The canary

WIDTHS = [3, 4, 2]
BOUND = [0.7, 2.0]


def canary(mode: str, sigma: float, *, scale: float = 10.0) -> tuple[Mlp, CanaryEngine]:
    network = Mlp(2, WIDTHS).double()
    network.reset(FleetRng([1, 2], dtype=torch.float64), "plain", zero=False)
    mover = torch.optim.SGD(network.parameters(), lr=1e-3)
    batch = [5.0, 8.0]
    engine = PrivateEngine(network, mover, sigma=[sigma] * 2, bound=BOUND, batch=batch, mode=mode)
    return network, CanaryEngine(
        engine, network, mover, bound=BOUND, batch=batch, key=3, scale=scale
    )


def walk(network: Mlp, watched: CanaryEngine, steps: int) -> None:
    rng = FleetRng([11, 12], dtype=torch.float64)
    for step in range(steps):
        x = rng.at("rows", step).normal(6, WIDTHS[0])
        watched.accumulate(
            lambda x=x: network(x).square().sum(-1), torch.ones(2, 6, dtype=torch.float64)
        )
        watched.step(rng, step)


@pytest.mark.parametrize("mode", list(ENGINES))
def test_with_next_to_no_noise_scores_are_the_coins(mode: str) -> None:
    """The engine clips the canary to C, other records do not move the score, and what is left in
    any coordinate is noise: in all layers, weights and biases, of all engines."""
    network, watched = canary(mode, 1e-4)
    walk(network, watched, 40)
    scores, present, noise = watched.observed()
    assert scores.shape == present.shape == (2, 40)
    assert noise.shape == (2, 40, 2 * 4)
    np.testing.assert_allclose(scores, present, rtol=0, atol=1e-3)
    assert np.abs(noise).max() < 1e-3
    assert np.abs(noise).std() > 1e-5
    assert 0.25 < present.mean() < 0.75
    assert (present[0] != present[1]).any()


def test_a_gradient_shorter_than_the_bound_is_not_stretched() -> None:
    network, watched = canary("taps", 1e-4, scale=0.25)
    walk(network, watched, 20)
    scores, present, _ = watched.observed()
    np.testing.assert_allclose(scores, 0.25 * present, rtol=0, atol=1e-3)


def test_the_gradient_of_a_canary_is_its_direction() -> None:
    """By autograd: norm, direction, and nothing in any other layer."""
    network, watched = canary("taps", 1.0)
    layers = [m for m in network.modules() if isinstance(m, FleetLinear)]
    seen = set()
    for step in range(2 * len(layers)):
        one = watched._canary(step)
        parameters = list(network.parameters())
        loss = one.losses(layers).squeeze(1)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        flat = torch.cat([g.flatten(1) for g in gradients], dim=1)
        wanted = 10 * torch.tensor(BOUND, dtype=torch.float64)
        torch.testing.assert_close(flat.norm(dim=1), wanted)
        unit = torch.cat([one.direction(p) for p in parameters], dim=1)  # type: ignore[arg-type]
        torch.testing.assert_close(unit, flat / wanted[:, None])
        place = [p is one.layer.weight for p in parameters].index(True)
        torch.testing.assert_close(one.along(dict(zip(parameters, gradients, strict=True))), wanted)
        seen.add((place, bool(gradients[place].any())))
    assert seen == {(place, kind) for place in (0, 2) for kind in (False, True)}


def test_a_watched_sampler_draws_what_it_drew() -> None:
    rng = FleetRng([1, 2])
    plain = PoissonBatches([50, 30], [0.3, 0.6], piece=4)
    watched = WatchedBatches(PoissonBatches([50, 30], [0.3, 0.6], piece=4), 50)
    for step in range(5):
        pairs = zip(plain.draw(rng, step), watched.draw(rng, step), strict=True)
        taken: list[set[int]] = [set(), set()]
        for (index, inside), (again, within) in pairs:
            assert torch.equal(index, again)
            assert torch.equal(inside, within)
            for run in range(2):
                taken[run] |= set(index[run, inside[run]].tolist())
        bits = watched.observed()[:, step]
        assert [set(np.flatnonzero(row).tolist()) for row in bits] == taken


def test_a_fleet_is_watched_from_the_first_step_to_the_last() -> None:
    watch = StepCanary(key=1)
    trained = train_fleet(recipe("gan"), [seat(4.0, s) for s in range(2)], callbacks=[watch])
    seen = watch.observed()
    assert seen.scores.shape == (2, trained[0].plan.steps)
    assert seen.batches.shape == (2, trained[0].plan.steps, 400)
    assert np.isfinite(seen.scores).all()


def test_nothing_seen_is_refused() -> None:
    _, watched = canary("taps", 1.0)
    for empty in (
        StepCanary().observed,
        watched.observed,
        WatchedBatches(PoissonBatches([5], [0.5]), 5).observed,
    ):
        with pytest.raises(UsageError, match="nothing was observed"):
            empty()


def test_a_run_without_privacy_is_not_audited() -> None:
    with pytest.raises(UsageError, match="epsilon=inf"):
        train_fleet(recipe("vae"), [seat()], callbacks=[StepCanary()])


class Still:
    """An engine that never moves."""

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        return losses()

    def step(self, rng: FleetRng, step: int) -> None:
        pass


def test_an_engine_that_does_not_move_is_refused() -> None:
    network = Mlp(1, WIDTHS)
    mover = torch.optim.SGD(network.parameters(), lr=1.0)
    watched = CanaryEngine(Still(), network, mover, bound=[1.0], batch=[1.0], key=0)
    with pytest.raises(UsageError, match="did not move"):
        watched.step(FleetRng([0]), 0)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"bound": [math.inf]}, "clip=inf"),
        ({"batch": [0.0]}, "batch=0.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"coordinates": 0}, "coordinates=0"),
    ],
)
def test_a_canary_that_cannot_be_is_refused(settings: dict[str, Any], part: str) -> None:
    network = Mlp(1, WIDTHS)
    mover = torch.optim.SGD(network.parameters(), lr=1.0)
    chosen = {"bound": [1.0], "batch": [1.0], "key": 0, **settings}
    with pytest.raises(UsageError, match=part):
        CanaryEngine(Still(), network, mover, **chosen)


def test_a_sampler_of_no_rows_is_refused() -> None:
    class Empty:
        def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
            yield torch.zeros(1, 1).long(), torch.zeros(1, 1).bool()

    with pytest.raises(UsageError, match="rows=0"):
        WatchedBatches(Empty(), 0)
