"""Accounting: what a list of events costs together, by two accountants that share no code."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from dp_accounting.pld import pld_pmf
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld import privacy_loss_mechanism as losses
from scipy.optimize import brentq
from scipy.special import log_ndtr, logsumexp, ndtr
from scipy.stats import binom

from dpsynth.checks import UsageError, check_count, check_fraction
from dpsynth.privacy import prv, renyi
from dpsynth.privacy.events import Event

__all__ = [
    "WIDTH",
    "advantage",
    "compose_epsilon",
    "failure",
    "gdp_delta",
    "gdp_epsilon",
    "mu",
    "profile",
    "rounding",
    "second_opinion",
    "tradeoff",
]

# Grid interval over the standard deviation of the loss of one step. Connecting the dots inflates
# the variance by interval²/6 a step, so this is 3e-4 of it, and 1e-4 of ε.
WIDTH = 0.04
# Longest grids, of one step and of a composition; beyond, the interval grows and ε is looser, never
# lower.
_LONGEST_STEP, _LONGEST = 2**16, 2**20
# How much finer the grid is where several losses end in atoms that cannot all fall on it.
_BETWEEN = 20
_DEVIATIONS = 12.0


class Row(NamedTuple):
    """Equal events together: what is counted, and how often.

    `number` is σ over the unit's sensitivity (over one row's for `sampled`), or ε for `pure`.
    """

    kind: str
    number: float
    q: float
    group: int
    steps: int


def compose_epsilon(
    events: Sequence[Event], delta: float, interval: float | None = None, *, group: int = 1
) -> float:
    """ε(δ) of all `events` together under add/remove of one unit.

    By PLD (connecting the dots, so from above), and where a choice among repetitions was made by
    Rényi DP.

    Args:
        events: What was paid, in order.
        delta: δ that ε is stated at.
        interval: Grid of the PLD; by default fine enough for 2e-4 of ε.
        group: Rows of one unit.

    Returns:
        ε; 0 for nothing, inf where one of them adds no noise.
    """
    check_count("group", group)
    if any(event.mechanism == "none" for event in events):
        return math.inf
    if any(event.mechanism == "repeat_select" for event in events):
        return renyi.epsilon(tuple(events), delta, group)
    lost = failure(events)
    if lost >= delta:
        return 0.0 if not events else math.inf
    # With probability f anything happens, else the rest: δ = f + (1 − f) δ'.
    rows = _merged(events, group)
    return _epsilon(rows, (delta - lost) / (1 - lost), interval)


def second_opinion(events: Sequence[Event], delta: float, *, group: int = 1) -> float:
    """Upper ε of the same events by the second accountant: privacy loss random variables (Gopi et
    al. 2021), or this package's own Rényi DP where a choice among repetitions was made."""
    check_count("group", group)
    if any(event.mechanism == "none" for event in events):
        return math.inf
    if not events:
        return 0.0
    if any(event.mechanism == "repeat_select" for event in events):
        return renyi.second_epsilon(tuple(events), delta, group)
    return prv.epsilon(tuple(events), delta, group)


def profile(events: Sequence[Event], epsilons: Sequence[float], *, group: int = 1) -> np.ndarray:
    """δ(ε) of all `events` together at each of `epsilons`, from above."""
    check_count("group", group)
    wanted = np.asarray(epsilons, dtype=float)
    if any(event.mechanism == "none" for event in events):
        return np.ones(len(wanted))
    if any(event.mechanism == "repeat_select" for event in events):
        return renyi.profile(tuple(events), wanted, group)
    lost, rows = failure(events), _merged(events, group)
    rest = np.maximum(0.0, -np.expm1(wanted))
    if _is_gaussian(rows):
        rest = gdp_delta(wanted, 1 / rows[0].number)
    elif rows:
        order = np.argsort(wanted)
        rest[order] = _compose(rows, None).get_delta_for_epsilon(list(wanted[order]))
    # The library rounds pessimistically; beyond 1 a δ says nothing more.
    return np.clip(lost + (1 - lost) * rest, 0.0, 1.0)


def tradeoff(events: Sequence[Event], fprs: Sequence[float], *, group: int = 1) -> np.ndarray:
    """Least false negative rate of any test between two neighbouring tables, at each of `fprs`.

    f(α) = sup_ε max{0, 1 − δ(ε) − e^ε α, e^−ε (1 − δ(ε) − α)} (Dong, Roth & Su 2022, proposition
    6), over a dense grid of ε: every ε gives a valid bound, so a grid errs towards more leakage.
    """
    wanted = np.asarray(fprs, dtype=float)
    if not ((wanted >= 0) & (wanted <= 1)).all():
        raise UsageError(f"fprs={list(fprs)}: a false positive rate lies between 0 and 1")
    if any(event.mechanism == "none" for event in events):
        return np.zeros(len(wanted))
    grid = _epsilons(events, group)
    deltas = profile(events, list(grid), group=group)
    rates = wanted[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        steep = 1 - deltas - np.where(rates > 0, np.exp(grid) * rates, 0.0)
    flat = np.exp(-grid) * (1 - deltas - rates)
    return np.maximum(0.0, np.maximum(steep, flat)).max(axis=1)


def advantage(events: Sequence[Event], *, group: int = 1) -> float:
    """Largest TPR − FPR of any test between two neighbouring tables: δ(0)."""
    return float(profile(events, [0.0], group=group)[0])


def mu(events: Sequence[Event], delta: float, *, group: int = 1) -> float:
    """Least μ whose Gaussian profile covers δ(ε) of the events wherever that δ, or the Gaussian's,
    is at least `delta`.

    The central limit's μ is no bound (Dong et al. 2022 give it as an approximation), and neither
    is the μ of one (ε, δ).
    """
    check_fraction("delta", delta)
    if not events:
        return 0.0
    if any(event.mechanism == "none" for event in events) or failure(events) >= delta:
        return math.inf
    grid = _epsilons(events, group, least=max(delta * 1e-6, 1e-13))
    deltas = profile(events, list(grid), group=group)
    needed = _matching_mu(grid, deltas)
    inside = deltas >= delta
    found = float(needed[inside].max(initial=0.0))
    while True:
        inside |= gdp_delta(grid, found) >= delta
        wider = float(needed[inside].max(initial=0.0))
        if wider <= found:
            return found
        found = wider


def gdp_delta(epsilon: float | np.ndarray, mu: float | np.ndarray) -> np.ndarray:
    """δ(ε) of μ-GDP, Φ(−ε/μ + μ/2) − e^ε Φ(−ε/μ − μ/2) (Balle & Wang 2018, theorem 8)."""
    if np.ndim(mu) == 0 and mu <= 0:
        return np.zeros(np.shape(epsilon))
    e, m = np.asarray(epsilon, dtype=float), np.asarray(mu, dtype=float)
    return ndtr(-e / m + m / 2) - np.exp(e + log_ndtr(-e / m - m / 2))


def gdp_epsilon(delta: float, mu: float) -> float:
    """ε(δ) of μ-GDP, rounded up."""

    def excess(epsilon: float) -> float:
        return float(gdp_delta(epsilon, mu)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = mu * mu / 2 + mu * (1 + math.sqrt(2 * math.log(1 / delta)))
    found = float(brentq(excess, 0.0, high, xtol=1e-14, rtol=1e-14))
    while excess(found) > 0:
        found *= 1 + 1e-13
    return found


def rounding(events: Sequence[Event], *, group: int = 1) -> tuple[float, float]:
    """Grid interval that `events` are composed on, and the variance that rounding to it adds to
    that of the whole loss: about what one more Gaussian of that μ² would."""
    rows = _merged(events, group)
    if _is_gaussian(rows):
        return WIDTH / rows[0].number, 0.0
    interval = _interval(rows)
    return interval, sum(row.steps for row in rows) * interval**2 / 6


def _matching_mu(epsilons: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """The μ with δ_μ(ε) = δ for each pair, from above by 1e-10 of it, by bisection on log μ."""
    low, high = np.full(len(deltas), -20.0), np.full(len(deltas), 14.0)
    for _ in range(60):
        middle = (low + high) / 2
        short = gdp_delta(epsilons, np.exp(middle)) < deltas
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    return np.where(deltas > 0, np.exp(high), 0.0)


def _epsilons(events: Sequence[Event], group: int, least: float = 1e-12) -> np.ndarray:
    """ε from 0 to where δ falls to `least` beyond the failures, dense where the profile bends."""
    least = min(0.5, least + failure(events))
    top = compose_epsilon(events, least * 1.0001, group=group)
    top = min(top, 600.0) if math.isfinite(top) else 600.0
    return max(top, 1e-6) * np.linspace(0.0, 1.0, 2001) ** 1.5


def failure(events: Sequence[Event]) -> float:
    """Bound on the probability that one of the `failure` events happens; each is stated for a
    whole unit."""
    return min(1.0, math.fsum(e.delta for e in events if e.mechanism == "failure"))


def _merged(events: Sequence[Event], group: int) -> tuple[Row, ...]:
    """Rows in an order of their own: full-batch Gaussians folded into one (Σ 1/σ² adds up
    exactly), equal events of the rest counted."""
    mu2 = 0.0
    counted: dict[tuple[str, float, float, int], int] = {}
    for event in events:
        if event.mechanism == "failure":
            continue
        if event.mechanism in ("gaussian", "poisson_gaussian") and event.q == 1:
            mu2 += event.steps * (group / event.sigma) ** 2
            continue
        if event.mechanism == "poisson_gaussian":
            key = ("sampled", event.sigma, event.q, group)
        elif event.mechanism == "laplace":
            key = ("laplace", event.sigma / group, 1.0, 1)
        else:
            key = ("pure", event.epsilon * group, 1.0, 1)
        counted[key] = counted.get(key, 0) + event.steps
    rows = [Row("gaussian", mu2**-0.5, 1.0, 1, 1)] if mu2 else []
    rows += [Row(*key, steps) for key, steps in counted.items()]
    return tuple(sorted(rows))


@functools.lru_cache(maxsize=4096)
def _epsilon(rows: tuple[Row, ...], delta: float, interval: float | None) -> float:
    if not rows:
        return 0.0
    if _is_gaussian(rows) and interval is None:
        return gdp_epsilon(delta, 1 / rows[0].number)
    return float(_compose(rows, interval).get_epsilon_for_delta(delta))


def _is_gaussian(rows: Sequence[Row]) -> bool:
    """Whether a closed form says it all, without a grid."""
    return len(rows) == 1 and rows[0].kind == "gaussian"


@functools.lru_cache(maxsize=16)
def _compose(rows: tuple[Row, ...], interval: float | None) -> pld.PrivacyLossDistribution:
    interval = _interval(rows) if interval is None else interval
    composed = None
    for row in rows:
        one = _single(row, interval).self_compose(row.steps)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return composed


def _interval(rows: Sequence[Row]) -> float:
    """Grid that inflates the whole variance by a known part, or that memory still holds."""
    count = sum(row.steps for row in rows)
    spreads = [_spread(row) for row in rows]
    variance = sum(row.steps * s * s for row, s in zip(rows, spreads, strict=True))
    fine = WIDTH * math.sqrt(variance / count)
    reach = 2 * _DEVIATIONS * math.sqrt(variance) + variance
    ends = {row.number if row.kind == "pure" else 1 / row.number for row in rows if _ended(row)}
    if len(ends) > 1:
        fine /= _BETWEEN
    fine = max(fine, reach / _LONGEST, max(_reach(row) for row in rows) / _LONGEST_STEP)
    # The largest of the losses that end in an atom falls on the grid itself.
    return max(ends) / math.ceil(max(ends) / fine) if ends else fine


def _ended(row: Row) -> bool:
    return row.kind in ("pure", "laplace")


def _spread(row: Row) -> float:
    """Standard deviation of the loss of one step, between that of both orders of the tables."""
    if row.kind == "gaussian":
        return 1 / row.number
    if row.kind == "laplace":
        return 1 / row.number / (1 + 1 / row.number)
    if row.kind == "pure":
        return row.number / math.cosh(min(row.number, 40.0) / 2)
    return _sampled_spread(row.number, row.q, row.group)


@functools.lru_cache(maxsize=1024)
def _sampled_spread(sigma: float, q: float, group: int) -> float:
    sensitivities, weights = _sensitivities(q, group)
    top = float(sensitivities[-1])
    x = np.linspace(-10 * sigma, top + 10 * sigma, 2001)
    ratio = np.full(x.shape, -np.inf)
    for number, weight in zip(sensitivities, weights, strict=True):
        rise = number * (2 * x - number) / (2 * sigma**2)
        ratio = np.logaddexp(ratio, math.log(weight) + rise)
    product = 1.0
    for logs in (np.zeros(x.shape), ratio):
        density = np.exp(logs - (x / sigma) ** 2 / 2)
        density = density / density.sum()
        product *= float(((ratio - ratio @ density) ** 2) @ density)
    return product**0.25


def _reach(row: Row) -> float:
    """About how far the loss of one step can go."""
    if row.kind == "gaussian":
        return 2 * _DEVIATIONS / row.number + row.number**-2
    if row.kind == "laplace":
        return 2 / row.number
    if row.kind == "pure":
        return 2 * row.number
    top = float(_sensitivities(row.q, row.group)[0][-1])
    return top * (top + 2 * _DEVIATIONS * row.number) / (2 * row.number**2)


def _sensitivities(q: float, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of one unit in a batch, and their probabilities; what is rarer than 1e-30 counts as all
    rows at once, which costs more."""
    rows = np.arange(group + 1)
    weights = binom.pmf(rows, group, q)
    held = weights > 1e-30
    held[-1] = True
    weights[-1] += weights[~held].sum()
    held &= weights > 0
    return rows[held], weights[held]


def _single(row: Row, interval: float) -> pld.PrivacyLossDistribution:
    """One step of a row as a dense PLD: a sparse one counts in whole numbers of `steps` digits."""
    if row.kind == "pure":
        return pld.PrivacyLossDistribution(_pure(row.number, interval))
    if row.kind == "laplace":
        return pld.PrivacyLossDistribution(_dots(losses.LaplacePrivacyLoss(row.number), interval))
    if row.kind == "gaussian":
        return pld.PrivacyLossDistribution(_dots(losses.GaussianPrivacyLoss(row.number), interval))
    both = []
    for direction in (losses.AdjacencyType.REMOVE, losses.AdjacencyType.ADD):
        if row.group == 1:
            loss = losses.GaussianPrivacyLoss(
                row.number, sampling_prob=row.q, adjacency_type=direction
            )
        else:
            loss = _Mixture(row.number, *_sensitivities(row.q, row.group), adjacency_type=direction)
        both.append(_dots(loss, interval))
    return pld.PrivacyLossDistribution(*both)


class _Mixture(losses.MixtureGaussianPrivacyLoss):
    """The library's mixture, with δ(ε) of a whole grid at once instead of point by point."""

    def get_delta_for_epsilon(self, epsilon):
        """The same δ: what the best test between the two gains, found by its threshold."""
        wanted = np.asarray(epsilon, dtype=float)
        rows, sigma = self.sensitivities[:, None], self._standard_deviation
        logs = np.log(self.sampling_probs)[:, None]
        removed = self.adjacency_type == losses.AdjacencyType.REMOVE
        goal = wanted if removed else -wanted
        reach = 60 * sigma + 2 * float(rows.max())
        low, high = np.full(goal.shape, -reach), np.full(goal.shape, reach)
        for _ in range(60):  # the loss of a removal grows with the outcome
            middle = (low + high) / 2
            ratio = logsumexp(logs + rows * (2 * middle - rows) / (2 * sigma**2), axis=0)
            short = ratio < goal
            low, high = np.where(short, middle, low), np.where(short, high, middle)
        sign = 1.0 if removed else -1.0
        with_unit = logsumexp(logs + log_ndtr(sign * (rows - high) / sigma), axis=0)
        without = log_ndtr(-sign * high / sigma)
        more, less = (with_unit, without) if removed else (without, with_unit)
        return np.clip(np.exp(more) - np.exp(wanted + less), 0.0, 1.0)


def _dots(loss: losses.MonotonePrivacyLoss, interval: float) -> pld_pmf.PLDPmf:
    """The smallest distribution on the grid that dominates `loss` (Doroshenko et al. 2022)."""
    bounds = loss.connect_dots_bounds()
    lower = math.floor(bounds.epsilon_lower / interval)
    upper = math.ceil(bounds.epsilon_upper / interval)
    deltas = loss.get_delta_for_epsilon(np.arange(lower, upper + 1) * interval)
    pmf = pld_pmf.create_pmf_pessimistic_connect_dots_fixed_gap(interval, lower, upper, deltas)
    return pmf.to_dense_pmf()


def _pure(epsilon: float, interval: float) -> pld_pmf.PLDPmf:
    """Randomised response, which every ε-DP mechanism is a processing of (Kairouz et al. 2015)."""
    cells = epsilon / interval
    ends = sorted({math.floor(-cells), math.ceil(-cells), math.floor(cells), math.ceil(cells)})
    at = np.array(ends) * interval
    inside = -np.expm1(at - epsilon) / (1 + math.exp(-epsilon))
    deltas = np.where(at <= -epsilon, -np.expm1(at), np.maximum(0.0, inside))
    return pld_pmf.create_pmf_pessimistic_connect_dots(interval, ends, deltas).to_dense_pmf()
