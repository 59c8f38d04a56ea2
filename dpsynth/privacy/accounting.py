"""Accounting: what a list of events costs together, by two accountants that share no code."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld
from opacus.accountants import PRVAccountant

from dpsynth.privacy.events import Event

__all__ = ["compose_epsilon", "profile", "second_opinion"]

_FINE = 1e-4


def compose_epsilon(
    events: Sequence[Event], delta: float, interval: float = _FINE, *, group: int = 1
) -> float:
    """ε(δ) of all `events` together by PLD; 0 for none, inf where one of them adds no noise."""
    if not events:
        return 0.0
    if any(event.mechanism == "none" for event in events):
        return math.inf
    return float(_compose(_merged(tuple(events)), interval).get_epsilon_for_delta(delta))


def second_opinion(events: Sequence[Event], delta: float, *, group: int = 1) -> float:
    """Upper ε of the same events by Opacus' PRV accountant (Gopi et al. 2021)."""
    if not events:
        return 0.0
    if any(event.mechanism == "none" for event in events):
        return math.inf
    return _prv(_merged(tuple(events)), delta)


def profile(events: Sequence[Event], epsilons: Sequence[float], *, group: int = 1) -> np.ndarray:
    """δ(ε) of all `events` together at each of `epsilons`."""
    if any(event.mechanism == "none" for event in events):
        return np.ones(len(epsilons))
    if not events:
        return np.maximum(0.0, 1.0 - np.exp(np.asarray(epsilons, dtype=float)))
    composed = _compose(_merged(tuple(events)), 1e-3)
    # The library rounds pessimistically; beyond 1 a δ says nothing more.
    return np.minimum(1.0, composed.get_delta_for_epsilon(list(epsilons)))


@functools.lru_cache(maxsize=256)
def _prv(rows: tuple[tuple[float, float, int], ...], delta: float) -> float:
    accountant = PRVAccountant()
    accountant.history = list(rows)
    return float(accountant.get_epsilon(delta, eps_error=0.01))


def _merged(events: tuple[Event, ...]) -> tuple[tuple[float, float, int], ...]:
    """(σ, q, steps) rows: all full-batch Gaussians folded into one (Σ 1/σ² adds up exactly)."""
    mu2 = sum(event.steps / event.sigma**2 for event in events if event.q == 1)
    rows = [(mu2**-0.5, 1.0, 1)] if mu2 else []
    sampled: dict[tuple[float, float], int] = {}
    for event in events:
        if event.q < 1:
            key = (event.sigma, event.q)
            sampled[key] = sampled.get(key, 0) + event.steps
    return tuple(rows + [(sigma, q, steps) for (sigma, q), steps in sampled.items()])


@functools.lru_cache(maxsize=256)
def _compose(
    rows: tuple[tuple[float, float, int], ...], interval: float
) -> pld.PrivacyLossDistribution:
    composed = None
    for sigma, q, steps in rows:
        one = pld.from_gaussian_mechanism(
            sigma, sampling_prob=q, value_discretization_interval=interval
        ).self_compose(steps)
        composed = one if composed is None else composed.compose(one)
    assert composed is not None
    return composed
