"""Rényi DP of one outcome chosen among repetitions, by two accountants that share no code."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from dp_accounting import dp_event
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import rdp_privacy_accountant as rdp
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import binom

from dpsynth.privacy.events import Event

__all__ = ["epsilon", "profile", "second_epsilon", "success"]

# Both accountants minimise over the same orders: close together where ε is large.
_ORDERS = np.unique(
    np.concatenate(
        [
            np.arange(1.02, 2, 0.02),
            np.arange(2, 6, 0.05),
            np.arange(6, 16, 0.25),
            np.geomspace(16, 1024, 60),
        ]
    ).round(4)
)


class _CurveEvent(dp_event.DpEvent):
    """A mechanism given by its Rényi DP at `_ORDERS`."""

    curve: np.ndarray

    def __init__(self, curve: np.ndarray) -> None:
        object.__setattr__(self, "curve", curve)  # the library freezes its events


class _Accountant(rdp.RdpAccountant):
    """The library's accountant, that also takes a curve."""

    def _maybe_compose(self, event, count, do_compose):
        if not isinstance(event, _CurveEvent):
            return super()._maybe_compose(event, count, do_compose)
        if do_compose:
            self._rdp = self._rdp + count * event.curve
        return None


def epsilon(events: tuple[Event, ...], delta: float, group: int = 1) -> float:
    """ε(δ) by the library's Rényi accountant; inf where the failures alone exceed δ."""
    curve, failure = _library(events, group)
    if failure >= delta:
        return math.inf
    return float(rdp.compute_epsilon(_ORDERS, curve, (delta - failure) / (1 - failure))[0])


def profile(events: tuple[Event, ...], epsilons: np.ndarray, group: int = 1) -> np.ndarray:
    """δ(ε) by the library's Rényi accountant."""
    curve, failure = _library(events, group)
    # The conversion is stated for ε ≥ 0; below, what no mechanism exceeds at ε = 0 is kept.
    rest = [rdp.compute_delta(_ORDERS, curve, max(0.0, float(e)))[0] for e in epsilons]
    rest = np.where(epsilons < 0, 1.0, np.minimum(rest, 1.0))
    return np.clip(failure + (1 - failure) * rest, 0.0, 1.0)


@functools.lru_cache(maxsize=64)
def _library(events: tuple[Event, ...], group: int) -> tuple[np.ndarray, float]:
    """The whole's Rényi DP, and the probability of a failure.

    A repetition that fails spoils the choice: with K repetitions the chance that one of them does
    is at most E[K] times that of one. Given that none does, K is distributed as if its success
    probability were higher and its mean lower, which costs less.
    """
    paid: list[dp_event.DpEvent] = []
    failure = 0.0
    for event in events:
        if event.mechanism == "failure":
            failure = min(1.0, failure + event.delta)
        elif event.mechanism == "repeat_select":
            trial = dp_event.ComposedDpEvent(paid)
            paid = [dp_event.RepeatAndSelectDpEvent(trial, event.mean, event.shape)]
            failure = min(1.0, event.mean * failure)
        else:
            paid.append(dp_event.SelfComposedDpEvent(_library_event(event, group), event.steps))
    accountant = _Accountant(_ORDERS)
    accountant.compose(dp_event.ComposedDpEvent(paid))
    return accountant.rdp, failure


def _library_event(event: Event, group: int) -> dp_event.DpEvent:
    if event.mechanism == "laplace":
        return dp_event.LaplaceDpEvent(event.sigma / group)
    if event.mechanism == "pure":
        response = rdp.RdpAccountant(_ORDERS, NeighboringRelation.REPLACE_ONE)
        lie = 2 / (1 + math.exp(min(event.epsilon * group, 700.0)))
        response.compose(dp_event.RandomizedResponseDpEvent(lie, 2))
        return _CurveEvent(response.rdp)
    if event.q == 1:
        return dp_event.GaussianDpEvent(event.sigma / group)
    if group == 1:
        return dp_event.PoissonSampledDpEvent(event.q, dp_event.GaussianDpEvent(event.sigma))
    return _CurveEvent(_polynomial(event.sigma, event.q, group))


@functools.lru_cache(maxsize=64)
def _polynomial(sigma: float, q: float, group: int) -> np.ndarray:
    """Rényi DP of a Gaussian sum over a sample with Binomial(k, q) rows of the unit.

    At whole orders a, E_Q[(P/Q)^a] = Σ_s c_s exp(s²/2σ²) with c_s the coefficients of (Σⱼ wⱼ
    exp(−j²/2σ²) t^j)^a; between them (a − 1) times the divergence is convex, so its chord is above.
    The other direction has w₀ ≤ P/Q, hence is cheap to integrate.
    """
    rows = np.arange(group + 1)
    base = binom.logpmf(rows, group, q) - rows**2 / (2 * sigma**2)
    wanted = {int(a) for order in _ORDERS for a in (math.floor(order), math.ceil(order))}
    power, moments = np.zeros(1), {}
    for order in range(1, max(wanted) + 1):
        longer = np.full(len(power) + group, -np.inf)
        for row, log in enumerate(base):
            part = longer[row : row + len(power)]
            np.logaddexp(part, power + log, out=part)
        power = longer
        if order in wanted:
            moments[order] = float(logsumexp(power + np.arange(len(power)) ** 2 / (2 * sigma**2)))
    orders = np.array(sorted(moments))
    removed = np.interp(_ORDERS, orders, [moments[int(a)] for a in orders]) / (_ORDERS - 1)
    return np.maximum(removed, _added(sigma, base, rows))


def _added(sigma: float, base: np.ndarray, rows: np.ndarray) -> np.ndarray:
    x = np.linspace(-60 * sigma, 15 * sigma, 6001)
    ratio = logsumexp(base[:, None] + rows[:, None] * x / sigma**2, axis=0)
    weight = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    step = math.log(x[1] - x[0])
    values = [logsumexp(weight + (1 - order) * ratio) + step for order in _ORDERS]
    return np.array(values) / (_ORDERS - 1)


# The second accountant.


@functools.lru_cache(maxsize=256)
def second_epsilon(events: tuple[Event, ...], delta: float, group: int = 1) -> float:
    """ε(δ) by this file's own formulas and integrals."""
    curve, failure = np.zeros(len(_ORDERS)), 0.0
    for event in events:
        if event.mechanism == "failure":
            failure += event.delta
        elif event.mechanism == "repeat_select":
            curve = _repeated(curve, event.mean, event.shape)
            failure *= event.mean
        else:
            curve = curve + event.steps * _own(event, group)
    if failure >= delta:
        return math.inf
    return _converted(curve, delta - failure)


def _converted(curve: np.ndarray, delta: float) -> float:
    """ε(δ) of a Rényi curve (Canonne, Kamath & Steinke 2020, proposition 12)."""
    a = _ORDERS
    found = curve + np.log1p(-1 / a) - np.log(delta * a) / (a - 1)
    return max(0.0, float(found.min()))


def _repeated(curve: np.ndarray, mean: float, shape: float) -> np.ndarray:
    """Rényi DP of the best of K runs (Papernot & Steinke 2022, theorems 2 and 6)."""
    a = _ORDERS
    if math.isinf(shape):
        hat = np.log1p(1 / (a - 1))
        # δ(ε̂) of the base, by the conversion above solved for δ.
        logs = (a - 1) * (curve - hat[:, None]) + (a - 1) * np.log1p(-1 / a) - np.log(a)
        deltas = np.minimum(1.0, np.exp(np.minimum(logs, 0.0).min(axis=1)))
        return curve + mean * deltas + math.log(mean) / (a - 1)
    gamma = success(mean, shape)
    constant = (1 + shape) * float(np.min((1 - 1 / a) * curve - math.log(gamma) / a))
    raised = curve + constant + math.log(mean) / (a - 1)
    # A Rényi divergence grows with its order.
    return np.minimum.accumulate(raised[::-1])[::-1]


def success(mean: float, shape: float) -> float:
    """γ of the truncated negative binomial of `shape` η with E[K] = `mean` (definition 1 there)."""
    if mean == 1:
        return 1.0

    def excess(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        if shape == 0:
            return (1 / gamma - 1) / -log_gamma - mean
        return shape * (1 - gamma) / (gamma * -math.expm1(shape * log_gamma)) - mean

    return math.exp(float(brentq(excess, -60.0, -1e-12, xtol=1e-14)))


def _own(event: Event, group: int) -> np.ndarray:
    """Rényi DP of one step, the larger of both directions."""
    a = _ORDERS
    if event.mechanism == "laplace":
        top = group / event.sigma  # Mironov 2017, proposition 6
        parts = [np.log(a / (2 * a - 1)) + (a - 1) * top, np.log((a - 1) / (2 * a - 1)) - a * top]
        return logsumexp(parts, axis=0) / (a - 1)
    if event.mechanism == "pure":
        top = event.epsilon * group
        # The more likely answer, and the less likely.
        yes, no = -np.logaddexp(0, -top), -np.logaddexp(0, top)
        return np.logaddexp(a * yes + (1 - a) * no, a * no + (1 - a) * yes) / (a - 1)
    if event.q == 1:
        return a * (group / event.sigma) ** 2 / 2
    return _integrated(event.sigma, event.q, group)


@functools.lru_cache(maxsize=64)
def _integrated(sigma: float, q: float, group: int) -> np.ndarray:
    """By the trapezoidal rule, whose error for an analytic integrand falls exponentially."""
    rows = np.arange(group + 1)
    logs = (
        gammaln(group + 1)
        - gammaln(rows + 1)
        - gammaln(group - rows + 1)
        + rows * math.log(q)
        + (group - rows) * math.log1p(-q)
    )
    values = []
    for order in _ORDERS:
        forward = _moment(lambda p, s=order: s * p, sigma, logs, order * group)
        backward = _moment(lambda p, s=order: (1 - s) * p, sigma, logs, group)
        values.append(max(forward, backward) / (order - 1))
    return np.array(values)


def _moment(
    power: Callable[[np.ndarray], np.ndarray], sigma: float, logs: np.ndarray, top: float
) -> float:
    """log ∫ exp(power(log P/Q)) dQ, for Q = N(0, σ²) and P with rows weighted by exp(`logs`)."""
    step = sigma / 8
    x = np.arange(-40 * sigma, top + 14 * sigma, step)
    ratio = np.full(x.shape, -np.inf)
    for row, log in enumerate(logs):
        ratio = np.logaddexp(ratio, log + row * (2 * x - row) / (2 * sigma**2))
    density = -((x / sigma) ** 2) / 2 - math.log(sigma * math.sqrt(2 * math.pi))
    return float(logsumexp(density + power(ratio))) + math.log(step)
