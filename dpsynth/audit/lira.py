"""LiRA and RMIA: scores of one model against those of shadow models that saw each row by a coin.

Scores go in and come out higher for a member. `own` are those of the audited model (rows,),
`shadows` those of the shadow models (models, rows), and `inside` says which of them saw which row.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from dpsynth.checks import UsageError, check_choice, check_fraction, check_positive

__all__ = ["VARIANCES", "lira", "lira_offline", "out_means", "rmia"]

# Whose spread a row's Gaussians have: that of the row's models on each side, of the row's models on
# both sides, or of all rows on each side.
VARIANCES = ("side", "row", "all")
# Models on the thinner side from which a row's own spread on each side, or on both, is known well
# enough.
SIDE, ROW = 32, 4
# Least variance of a row, as a share of the mean variance: no row is taken for certain.
FLOOR = 1e-6


def lira(
    own: np.ndarray, shadows: np.ndarray, inside: np.ndarray, *, variance: str | None = None
) -> np.ndarray:
    """Online likelihood-ratio attack (Carlini et al. 2022, algorithm 1).

    Args:
        own: Scores of the audited model (rows,).
        shadows: Scores of the shadow models (models, rows).
        inside: Which of them saw which row (models, rows) bool; each row needs both kinds.
        variance: One of `VARIANCES`; by default `side` from 32 models a side on, `row` from 4 on,
            else `all`.

    Returns:
        log N(own; μ_in, σ²_in) − log N(own; μ_out, σ²_out), (rows,).

    Raises:
        UsageError: On wrong shapes, scores that are not finite, a row without shadows of one kind,
            an unknown variance, or shadows whose scores never differ.
    """
    _check(own, shadows, inside)
    counts = np.stack([inside.sum(axis=0), (~inside).sum(axis=0)])
    means = np.stack([_mean(shadows, inside), _mean(shadows, ~inside)])
    spread = _variances(shadows, inside, means, counts, variance)
    log_densities = -0.5 * (own - means) ** 2 / spread - 0.5 * np.log(spread)
    return log_densities[0] - log_densities[1]


def lira_offline(own: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Offline form: how far the score is above those of models that did not see the row.

    Args:
        own: Scores of the audited model (rows,).
        shadows: Scores of the shadow models (models, rows); those that saw a row are left out.
        inside: Which of them saw which row (models, rows) bool.

    Returns:
        (own − μ_out)/σ_out, (rows,): 1 − Pr[N(μ_out, σ²_out) > own] of Carlini et al. 2022, eq. 4,
        before Φ, which would make all large scores equal. σ_out is the row's own from 32 OUT models
        on, else that of all rows.

    Raises:
        UsageError: As `lira`.
    """
    _check(own, shadows, inside)
    counts = np.stack([inside.sum(axis=0), (~inside).sum(axis=0)])
    means = np.stack([_mean(shadows, inside), _mean(shadows, ~inside)])
    kind = "side" if counts[1].min() >= SIDE else "all"
    spread = _variances(shadows, inside, means, counts, kind)[1]
    return (own - means[1]) / np.sqrt(spread)


def rmia(
    own: np.ndarray,
    shadows: np.ndarray,
    inside: np.ndarray,
    own_population: np.ndarray,
    shadows_population: np.ndarray,
    *,
    gamma: float = 1.0,
    offline: float | None = None,
) -> np.ndarray:
    """Relative membership inference (Zarifzadeh et al. 2024, eq. 4 and 10).

    Args:
        own: Log-probabilities of the rows under the audited model (rows,).
        shadows: The same under the shadow models (models, rows).
        inside: Which of them saw which row (models, rows) bool.
        own_population: Log-probabilities of population rows z that no model saw (z,).
        shadows_population: The same under the shadow models (models, z).
        gamma: How many times as likely a row must be to win against z.
        offline: a of eq. 10, in (0, 1): use OUT models only and take
            Pr(x) = ½((1 + a) Pr_out(x) + (1 − a)). `None` takes the mean of the IN and of the OUT
            models; for a z all models are OUT.

    Returns:
        The share of z with (p(x|θ)/p(x)) / (p(z|θ)/p(z)) ≥ γ, (rows,).

    Raises:
        UsageError: As `lira`; on a γ that is not above 0, an `offline` outside (0, 1), or with it
            log-probabilities above 0.
    """
    _check(own, shadows, inside)
    nobody = np.zeros(shadows_population.shape, bool)
    _check(own_population, shadows_population, nobody, kinds=1)
    check_positive("gamma", gamma)
    if offline is not None:
        check_fraction("offline", offline)
        if max(shadows.max(), shadows_population.max()) > 0:
            raise UsageError("offline: needs log-probabilities, at most 0; leave it out")
    out = _log_mean(shadows, ~inside)
    out_population = _log_mean(shadows_population, ~nobody)
    if offline is None:
        known = np.logaddexp(_log_mean(shadows, inside), out) - math.log(2)
        known_population = out_population
    else:
        known, known_population = (_whole(part, offline) for part in (out, out_population))
    beaten = np.sort(own_population - known_population)
    places = np.searchsorted(beaten, own - known - math.log(gamma), side="right")
    return places / len(beaten)


def out_means(shadows: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What models that did not see a row say of it: the reference that is subtracted.

    Args:
        shadows: Numbers of the shadow models (models, rows, …).
        inside: Which of them saw which row (models, rows) bool.

    Returns:
        The mean over all OUT models (rows, …), for the audited model; and for each shadow the mean
        over the other OUT models (models, rows, …).

    Raises:
        UsageError: Where a row has fewer than two OUT models.
    """
    if (~inside).sum(axis=0).min() < 2:
        raise UsageError("inside: a row has fewer than 2 OUT models; train more shadows")
    out = (~inside).reshape(*inside.shape, *(1,) * (shadows.ndim - 2)).astype(shadows.dtype)
    total, count = (shadows * out).sum(axis=0), out.sum(axis=0)
    return total / count, (total - shadows * out) / (count - out)


def _whole(log_out: np.ndarray, a: float) -> np.ndarray:
    """log ½((1 + a) Pr_out + (1 − a))."""
    return np.logaddexp(math.log1p(a) + log_out, math.log1p(-a)) - math.log(2)


def _mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen, values, 0.0).sum(axis=0) / chosen.sum(axis=0)


def _log_mean(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """log of the mean of exp(values) over the chosen models (rows,)."""
    return special.logsumexp(values, axis=0, b=chosen) - np.log(chosen.sum(axis=0))


def _variances(
    shadows: np.ndarray,
    inside: np.ndarray,
    means: np.ndarray,
    counts: np.ndarray,
    variance: str | None,
) -> np.ndarray:
    """Variance of each side (2, rows) from means and counts (2, rows)."""
    if variance is None:
        least = counts.min()
        variance = "side" if least >= SIDE else "row" if least >= ROW else "all"
    check_choice("variance", variance, VARIANCES)
    sides = np.stack([inside, ~inside])
    squares = np.where(sides, (shadows - means[:, None]) ** 2, 0.0).sum(axis=1)
    free = counts - 1
    if variance == "row":
        squares, free = (np.broadcast_to(part.sum(axis=0), part.shape) for part in (squares, free))
    elif variance == "all":
        shape = squares.shape
        squares, free = (
            np.broadcast_to(part.sum(axis=1, keepdims=True), shape) for part in (squares, free)
        )
    if free.min() < 1:
        raise UsageError(f"variance={variance}: too few shadows a row; train more shadows")
    spread = squares / free
    mean = spread.mean(axis=1, keepdims=True)
    if not mean.min() > 0:
        raise UsageError("shadows: their scores never differ, so nothing can be told from them")
    return np.maximum(spread, FLOOR * mean)


def _check(own: np.ndarray, shadows: np.ndarray, inside: np.ndarray, *, kinds: int = 2) -> None:
    if own.ndim != 1 or shadows.ndim != 2 or shadows.shape[1:] != own.shape or not own.size:
        raise UsageError(
            f"own of shape {own.shape} and shadows of shape {shadows.shape}: give (rows,) and "
            "(models, rows)"
        )
    if inside.shape != shadows.shape or inside.dtype != bool:
        raise UsageError(
            f"inside of shape {inside.shape} and type {inside.dtype}: give a bool for each of "
            f"{shadows.shape}"
        )
    if not (np.isfinite(own).all() and np.isfinite(shadows).all()):
        raise UsageError("scores: some are not finite")
    seen = inside.sum(axis=0)
    if kinds == 2 and (seen.min() < 1 or seen.max() == len(inside)):
        raise UsageError("inside: a row has no IN or no OUT model; train more shadows")
