"""Second accountant: privacy loss random variables on a grid, composed by FFT."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from opacus.accountants import PRVAccountant
from scipy.fft import irfft, next_fast_len, rfft
from scipy.special import ndtr
from scipy.stats import binom

from dpsynth.checks import UsageError
from dpsynth.privacy.events import Event

__all__ = [
    "ERROR",
    "Loss",
    "compose",
    "epsilon",
    "gaussian",
    "laplace",
    "mixture",
    "parts_of",
    "pure",
    "upper",
]

# Half the width of the interval that ε is stated in.
ERROR = 0.01
# Part of δ that truncation, wrapping around and rounding may each use up.
_PART = 1e-4
_DEVIATIONS = 13.0  # a Gaussian lies beyond with probability 6e-39
_LARGEST = 2**23
_CELLS = 2048  # of the coarse grid that bounds the tails


@dataclass(frozen=True)
class Loss:
    """Privacy loss Y = log(dP/dQ) of one mechanism under P, for one order of the two tables.

    Attributes:
        cdf: P[Y ≤ t] at an array of t.
        mean: E[Y].
        variance: Var[Y], used for scales only.
        low: All but a negligible part of Y is above.
        high: And below.
    """

    cdf: Callable[[np.ndarray], np.ndarray]
    mean: float
    variance: float
    low: float
    high: float


def gaussian(mu: float) -> Loss:
    """Loss of μ-GDP: N(μ²/2, μ²)."""
    mean = mu * mu / 2
    reach = _DEVIATIONS * mu
    return Loss(lambda t: ndtr((t - mean) / mu), mean, mu * mu, mean - reach, mean + reach)


def laplace(scale: float) -> Loss:
    """Loss of noise of scale b on a sum of sensitivity 1: ±1/b at the ends, a density between."""
    top = 1 / scale

    def cdf(t: np.ndarray) -> np.ndarray:
        inside = 0.5 * np.exp(-(top - np.clip(t, -top, top)) / 2)
        return np.where(t < -top, 0.0, np.where(t >= top, 1.0, inside))

    mean = top + math.expm1(-top)
    return Loss(cdf, mean, 2 * mean - mean * mean + _laplace_rest(top), -top, top)


def _laplace_rest(top: float) -> float:
    """E[Y²] − 2 E[Y], so that the variance is E[Y²] − E[Y]²."""
    grid = np.linspace(-top, top, 4001)
    density = 0.25 * np.exp(-(top - grid) / 2)
    second = float(np.trapezoid(grid**2 * density, grid)) + top**2 * (0.5 + 0.5 * math.exp(-top))
    return second - 2 * (top + math.expm1(-top))


def pure(top: float) -> Loss:
    """Loss of randomised response, which every ε-DP mechanism is a processing of (Kairouz et al.
    2015): ε with probability e^ε/(1+e^ε), else −ε."""
    yes = 1 / (1 + math.exp(-top))
    mean = top * (2 * yes - 1)

    def cdf(t: np.ndarray) -> np.ndarray:
        return np.where(t < -top, 0.0, np.where(t >= top, 1.0, 1 - yes))

    return Loss(cdf, mean, top * top - mean * mean, -top, top)


def mixture(sigma: float, q: float, group: int = 1, *, added: bool = False) -> Loss:
    """Loss of a Gaussian sum over a Poisson sample that holds Binomial(k, q) rows of one unit.

    The dominating pair is Σⱼ wⱼ N(j, σ²) against N(0, σ²) (Zhu et al. 2022 for k=1, Ganesh 2024
    for k>1).

    Args:
        sigma: Noise over the sensitivity of one row.
        q: Sampling probability of a row.
        group: Rows k of one unit.
        added: Whether the unit is in the second table instead of the first.
    """
    weights = binom.pmf(np.arange(group + 1), group, q)
    rows = np.flatnonzero(weights > 1e-25)
    rows, logs = rows[rows > 0], np.log(weights[rows[rows > 0]])
    none, top = float(weights[0]), int(rows[-1])
    floor = group * math.log1p(-q)
    x = np.linspace(-_DEVIATIONS * sigma, top + _DEVIATIONS * sigma, _points(sigma, top))
    # log of what the rows add to the ratio: nearly straight, so that it is what is inverted.
    rise = _log_sum(logs, rows, x, sigma)
    loss = np.logaddexp(floor, rise)

    def outcome(t: np.ndarray) -> np.ndarray:
        """The x at which the loss of the unit's removal is t; −inf below what is possible."""
        above = t > floor
        safe = np.where(above, t, floor + 1.0)
        wanted = safe + np.log(-np.expm1(floor - safe))
        slope_low, slope_high = rows[0] / sigma**2, top / sigma**2
        found = np.interp(wanted, rise, x)
        found = np.where(wanted < rise[0], x[0] + (wanted - rise[0]) / slope_low, found)
        found = np.where(wanted > rise[-1], x[-1] + (wanted - rise[-1]) / slope_high, found)
        return np.where(above, found, -np.inf)

    def removed_cdf(t: np.ndarray) -> np.ndarray:
        at = outcome(t)
        total = none * ndtr(at / sigma)
        for row, log in zip(rows, logs, strict=True):
            total = total + math.exp(log) * ndtr((at - row) / sigma)
        return total

    density = np.exp(-((x / sigma) ** 2) / 2)
    density = density if added else density * np.exp(loss)
    density = density / density.sum()
    losses = -loss if added else loss
    mean = float(losses @ density)
    variance = float((losses - mean) ** 2 @ density)
    low, high = float(losses.min()), float(losses.max())
    if added:
        return Loss(lambda t: ndtr(-outcome(-t) / sigma), mean, variance, low, high)
    return Loss(removed_cdf, mean, variance, low, high)


def _points(sigma: float, top: int) -> int:
    """Points of the table of outcomes: ten a standard deviation and a smooth inverse."""
    return int(min(2**20, max(4000, 40 * (top / sigma + 2 * _DEVIATIONS))))


def _log_sum(logs: np.ndarray, rows: np.ndarray, x: np.ndarray, sigma: float) -> np.ndarray:
    """log Σⱼ wⱼ exp((2jx − j²)/2σ²) at every x, one row count at a time."""
    total = np.full(x.shape, -np.inf)
    for row, log in zip(rows, logs, strict=True):
        total = np.logaddexp(total, log + row * (2 * x - row) / (2 * sigma**2))
    return total


@dataclass(frozen=True)
class Composed:
    """Losses of a whole composition on a grid.

    Attributes:
        losses: Grid of total losses, ascending.
        mass: Probability of each.
        slack: Probability that the grid says nothing about.
        error: What a loss is off by at most, but for `slack`.
    """

    losses: np.ndarray
    mass: np.ndarray
    slack: float
    error: float

    def delta(self, epsilon: float) -> float:
        """δ(ε) of the distribution on the grid itself."""
        above = self.losses > epsilon
        return float(-np.expm1(epsilon - self.losses[above]) @ self.mass[above])

    def epsilon(self, delta: float) -> float:
        """ε(δ) of the distribution on the grid itself; inf where it has none."""
        at = self.losses >= 0
        t, mass = self.losses[at], self.mass[at]
        if not len(t):
            return 0.0
        upper = np.cumsum(mass[::-1])[::-1]
        lower = np.cumsum((mass * np.exp(-t))[::-1])[::-1]
        deltas = upper - np.exp(np.minimum(t, 700.0)) * lower
        if deltas[0] <= delta:
            # Between 0 and the first grid point the sums are the same.
            return max(0.0, math.log(max(upper[0] - delta, 1e-300) / lower[0]))
        index = min(int(np.searchsorted(-deltas, -delta)), len(t) - 1)
        if not lower[index] > 0 or upper[index] <= delta:
            return math.inf
        return max(0.0, math.log((upper[index] - delta) / lower[index]))


def compose(parts: Sequence[tuple[Loss, int]], step: float, slack: float) -> Composed:
    """Sum of independent losses, each `steps` times, on a grid of width `step`.

    Each loss is rounded to the grid and the grid moved so that its mean is exact (Gopi, Lee &
    Wutschitz 2021, arXiv 2106.02848): the rounding errors are then centred and bounded, and their
    sum is small by Hoeffding's inequality.
    """
    count = sum(steps for _, steps in parts)
    low, high = _window(parts, slack / 6)
    step = max(step, (high - low) / _LARGEST)
    size = next_fast_len(max(64, math.ceil((high - low) / step) + 2), real=True)
    spectrum = np.ones(size // 2 + 1, dtype=complex)
    offset, start = 0.0, 0
    for loss, steps in parts:
        first, mass = _rounded(loss, step)
        grid = (first + np.arange(len(mass))) * step
        mean = float(grid @ mass)
        offset += steps * (loss.mean - mean)
        # Centred first: a phase near zero stays exact when raised to a large power.
        centre = round(mean / step)
        start += steps * centre
        index = (np.arange(len(mass)) + first - centre) % size
        spectrum *= rfft(np.bincount(index, mass, minlength=size)) ** steps
    mass = irfft(spectrum, size)
    # The window starts at `begin` cells from the sum of the centres.
    begin = math.floor((low - offset) / step) - start
    mass = np.roll(mass, -(begin % size))
    losses = (start + begin + np.arange(size)) * step + offset
    error = min(count * step, step * math.sqrt(count / 2 * math.log(6 / slack)))
    return Composed(losses, np.maximum(mass, 0.0), slack, error)


def _rounded(loss: Loss, step: float) -> tuple[int, np.ndarray]:
    """Index of the first cell and the probability of each; what lies outside is in the ends."""
    first, last = math.floor(loss.low / step) - 1, math.ceil(loss.high / step) + 1
    if last - first > 4 * _LARGEST:
        raise UsageError(
            f"accounting: a privacy loss of {loss.high:.3g} beside one of {step:.1g} has no common "
            "grid; raise sigma"
        )
    edges = (np.arange(first, last) + 0.5) * step
    below = np.concatenate([[0.0], loss.cdf(edges), [1.0]])
    return first, np.maximum(np.diff(below), 0.0)


def _window(parts: Sequence[tuple[Loss, int]], tail: float) -> tuple[float, float]:
    """Bounds that the total leaves with probability at most `tail` on each side (Chernoff)."""
    spread = math.sqrt(sum(steps * loss.variance for loss, steps in parts))
    best = math.sqrt(2 * math.log(1 / tail)) / max(spread, 1e-12)
    need = math.log(1 / tail)
    high = sum(steps * loss.high for loss, steps in parts)
    low = sum(steps * loss.low for loss, steps in parts)
    widths = [(loss.high - loss.low) / _CELLS for loss, _ in parts]
    cells = [_rounded(loss, width) for (loss, _), width in zip(parts, widths, strict=True)]
    # Where rare large losses make the tail, the best order is one over their size.
    least = min(best / 32, 1 / max(loss.high for loss, _ in parts))
    for order in np.geomspace(least, 2 * best, 12):
        up = down = 0.0
        for (loss, steps), width, (first, mass) in zip(parts, widths, cells, strict=True):
            grid = (first + np.arange(len(mass))) * width
            # A loss is less than a cell's half-width from its grid point.
            up += steps * _log_moment(order, grid + width / 2, mass, loss.mean)
            down += steps * _log_moment(-order, grid - width / 2, mass, loss.mean)
        high, low = min(high, (up + need) / order), max(low, -(down + need) / order)
    return low, high


def _log_moment(order: float, grid: np.ndarray, mass: np.ndarray, mean: float) -> float:
    """log E[exp(λY)], of cells whose mean is moved to that of the loss."""
    shifted = order * (grid + (mean - float(grid @ mass)))
    largest = float(shifted[mass > 0].max())
    return largest + math.log(float(mass @ np.exp(np.minimum(shifted - largest, 0.0))))


Parts = list[tuple[Loss, int]]


@functools.lru_cache(maxsize=512)
def epsilon(events: tuple[Event, ...], delta: float, group: int = 1) -> float:
    """Upper ε within `ERROR` of all `events` (none of them `none` or `repeat_select`).

    Gaussians, whole or Poisson sampled, go to Opacus' PRV accountant; all else to this file's own.
    """
    rest, smooth = _without_failures(events, delta)
    mechanisms = {event.mechanism for event in smooth}
    theirs = mechanisms <= {"gaussian"} or (group == 1 and mechanisms <= _OPACUS)
    if theirs and smooth and rest > 0:
        return _opacus(smooth, rest, group)
    return upper(smooth, rest, group)


def upper(events: Sequence[Event], delta: float, group: int = 1, *, error: float = ERROR) -> float:
    """Upper ε by this file's own composition, the larger of both directions, on a grid as coarse as
    an interval of ±`error` allows; inf where failures alone exceed δ."""
    rest, smooth = _without_failures(events, delta)
    if rest <= 0:
        return math.inf
    if not smooth:
        return 0.0
    return max(_one_way(smooth, rest, group, error, added=added) for added in (False, True))


def _one_way(
    events: Sequence[Event], delta: float, group: int, error: float, *, added: bool
) -> float:
    parts, slack = parts_of(events, group, added=added), _PART * delta
    count = sum(steps for _, steps in parts)
    step = error / math.sqrt(count / 2 * math.log(6 / slack))
    composed = compose(parts, step, slack)
    return composed.epsilon(delta - composed.slack) + composed.error


def _without_failures(events: Sequence[Event], delta: float) -> tuple[float, tuple[Event, ...]]:
    """What is left of δ, and the events that it is left for."""
    lost = sum(event.delta for event in events if event.mechanism == "failure")
    return delta - lost, tuple(event for event in events if event.mechanism != "failure")


_OPACUS = {"gaussian", "poisson_gaussian"}


def _opacus(events: tuple[Event, ...], delta: float, group: int) -> float:
    rows: dict[tuple[float, float], int] = {}
    mu2 = 0.0
    for event in events:
        if event.q == 1:
            mu2 += event.steps * (group / event.sigma) ** 2
        else:
            key = (event.sigma, event.q)
            rows[key] = rows.get(key, 0) + event.steps
    whole = [(mu2**-0.5, 1.0, 1)] if mu2 else []
    accountant = PRVAccountant()
    accountant.history = whole + [(sigma, q, steps) for (sigma, q), steps in rows.items()]
    with np.errstate(divide="ignore"):  # of its own at q = 1, without consequence
        return float(accountant.get_epsilon(delta, eps_error=ERROR))


def parts_of(events: Sequence[Event], group: int, *, added: bool) -> Parts:
    """One loss for each kind of event; equal ones are counted, full-batch Gaussians folded."""
    mu2 = 0.0
    counted: dict[tuple[str, float, float], int] = {}
    for event in events:
        if event.mechanism in _OPACUS and event.q == 1:
            mu2 += event.steps * (group / event.sigma) ** 2
            continue
        number = event.epsilon if event.mechanism == "pure" else event.sigma
        key = (event.mechanism, number, event.q)
        counted[key] = counted.get(key, 0) + event.steps
    parts: Parts = [(gaussian(math.sqrt(mu2)), 1)] if mu2 else []
    for (mechanism, number, q), steps in counted.items():
        if mechanism == "laplace":
            loss = laplace(number / group)
        elif mechanism == "pure":
            loss = pure(number * group)
        else:
            loss = mixture(number, q, group, added=added)
        parts.append((loss, steps))
    return parts
