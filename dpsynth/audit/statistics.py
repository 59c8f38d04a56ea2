"""Statistics of attack scores: AUC and true-positive rates, each with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from dpsynth.checks import UsageError, check_count, check_fraction

__all__ = [
    "ENOUGH",
    "Scores",
    "TprPoint",
    "auc",
    "auc_interval",
    "auc_intervals",
    "aucs",
    "clopper_pearson",
    "null_band",
    "stack",
    "tail_rate",
    "tpr_at",
    "tprs",
]

# Scores of members (n₁,) and of holdout rows (n₀,), higher = more likely a member.
Scores = tuple[np.ndarray, np.ndarray]

Z95 = float(special.ndtri(0.975))
# From this many non-members on, TPR at 1 % FPR rests on enough rows.
ENOUGH = 10_000


def auc(members: np.ndarray, holdout: np.ndarray) -> float:
    """P(member score > holdout score) + P(equal)/2 over all pairs of (n₁,) and (n₀,) scores."""
    return float(aucs(*_one_row(members, holdout))[0])


def aucs(members: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    """`auc` of each row of (scores, n₁) and (scores, n₀): float64 (scores,)."""
    _check_matrices(members, holdout)
    count, others = members.shape[1], holdout.shape[1]
    together = stats.rankdata(np.concatenate([members, holdout], axis=1), axis=1)
    below = together[:, :count].sum(axis=1) - count * (count + 1) / 2
    return below / (count * others)


def auc_interval(members: np.ndarray, holdout: np.ndarray) -> tuple[float, float, float]:
    """AUC with its 95 % interval: DeLong et al. 1988 variance on the logit scale.

    Where the scores separate all pairs the variance is 0 and tells nothing; the inner end is then
    Clopper–Pearson's for min(n₁, n₀) successes out of as many.

    Returns:
        (auc, low, high), low ≤ auc ≤ high within [0, 1].

    Raises:
        UsageError: On fewer than two scores a side, or a score that is not finite.
    """
    area, low, high = auc_intervals(*_one_row(members, holdout))[0].tolist()
    return area, low, high


def auc_intervals(members: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    """`auc_interval` of each row of (scores, n₁) and (scores, n₀): float64 (scores, 3)."""
    wins, losses = _placements(members, holdout)
    ones, zeros = wins.shape[1], losses.shape[1]
    least = min(ones, zeros)
    if least < 2:
        raise UsageError(f"{least} scores on one side: an interval needs at least 2 of each")
    area = wins.mean(axis=1)
    parted = (area == 0) | (area == 1)
    error = np.sqrt(wins.var(axis=1, ddof=1) / ones + losses.var(axis=1, ddof=1) / zeros)
    reach = Z95 * error / np.where(parted, 1.0, area * (1 - area))
    centre = special.logit(np.where(parted, 0.5, area))
    # Where all scores are equal the error is 0, and rounding must not push an end past the area.
    low = np.minimum(special.expit(centre - reach), area)
    high = np.maximum(special.expit(centre + reach), area)
    for row in np.flatnonzero(parted):
        low[row], high[row] = clopper_pearson(round(area[row] * least), least)
    return np.stack([area, low, high], axis=1)


def _one_row(members: np.ndarray, holdout: np.ndarray) -> Scores:
    for name, scores in (("member", members), ("holdout", holdout)):
        if scores.ndim != 1:
            raise UsageError(f"{name} scores have shape {scores.shape}; give one number a row")
    return members[None], holdout[None]


def _check_matrices(members: np.ndarray, holdout: np.ndarray) -> None:
    for name, scores in (("member", members), ("holdout", holdout)):
        if scores.ndim != 2 or not scores.shape[1] or len(scores) != len(members):
            raise UsageError(
                f"{name} scores have shape {scores.shape}; give one number a row, and as many "
                f"sets of them as of members, {len(members)}"
            )
        if not np.isfinite(scores).all():
            raise UsageError(f"{name} scores: {(~np.isfinite(scores)).sum()} are not finite")


def _placements(members: np.ndarray, holdout: np.ndarray) -> Scores:
    """Of each row of scores: the share of holdout scores below each member (scores, n₁), and of
    members above each holdout (scores, n₀)."""
    _check_matrices(members, holdout)
    count, others = members.shape[1], holdout.shape[1]
    together = stats.rankdata(np.concatenate([members, holdout], axis=1), axis=1)
    wins = (together[:, :count] - stats.rankdata(members, axis=1)) / others
    losses = 1 - (together[:, count:] - stats.rankdata(holdout, axis=1)) / count
    return wins, losses


def stack(pairs: list[Scores]) -> Scores:
    """Matrices (attacks, n₁) and (attacks, n₀) of the scores of several attacks on the same rows.

    Raises:
        UsageError: Where an attack scored another number of rows than the first, or there is none.
    """
    if not pairs:
        raise UsageError("no attack scores; give those of at least one attack")
    shapes = {(members.shape, holdout.shape) for members, holdout in pairs}
    if len(shapes) > 1:
        raise UsageError("attacks scored different numbers of rows; let all score the same rows")
    return np.stack([pair[0] for pair in pairs]), np.stack([pair[1] for pair in pairs])


def clopper_pearson(successes: int, trials: int) -> tuple[float, float]:
    """Exact 95 % interval of a share (Clopper & Pearson 1934)."""
    check_count("trials", trials)
    check_count("successes", successes, least=0)
    if successes > trials:
        raise UsageError(f"successes={successes}: more than the {trials} trials")
    low = special.betaincinv(successes, trials - successes + 1, 0.025) if successes else 0.0
    rest = trials - successes
    high = special.betaincinv(successes + 1, rest, 0.975) if rest else 1.0
    return float(low), float(high)


@dataclass(frozen=True)
class TprPoint:
    """True-positive rate at a threshold, with 95 % Clopper–Pearson ends.

    Attributes:
        tpr: Share of members above the threshold.
        low: Lower end for `tpr`.
        high: Upper end for `tpr`.
        fpr: Share above it among the non-members that did not set it.
        fpr_high: Upper end for the FPR of the threshold.
    """

    tpr: float
    low: float
    high: float
    fpr: float
    fpr_high: float


def tpr_at(
    members: np.ndarray, holdout: np.ndarray, fpr: float, rng: np.random.Generator
) -> TprPoint:
    """TPR at the threshold that a random half of the non-members puts at FPR ≤ `fpr`.

    Members play no part in the threshold, so their interval is exact; the other half of the
    non-members shows the FPR that came out.
    """
    check_fraction("fpr", fpr)
    if len(holdout) < 2 or not len(members):
        raise UsageError(
            f"{len(members)} member and {len(holdout)} holdout scores: TPR at an FPR needs at "
            "least 1 and 2"
        )
    order = rng.permutation(len(holdout))
    setting, checking = np.array_split(holdout[order], 2)
    threshold = np.sort(setting)[::-1][math.floor(fpr * len(setting))]
    hits, alarms = int((members > threshold).sum()), int((checking > threshold).sum())
    low, high = clopper_pearson(hits, len(members))
    fpr_high = clopper_pearson(alarms, len(checking))[1]
    return TprPoint(hits / len(members), low, high, alarms / len(checking), fpr_high)


def tprs(members: np.ndarray, holdout: np.ndarray, fpr: float) -> np.ndarray:
    """TPR of each row of (scores, n₁) and (scores, n₀) at the threshold that ALL its non-members
    put at FPR ≤ `fpr`: float64 (scores,).

    The point of the empirical ROC curve, for averages over many models; for one model `tpr_at`
    has an interval.
    """
    check_fraction("fpr", fpr)
    _check_matrices(members, holdout)
    place = holdout.shape[1] - 1 - math.floor(fpr * holdout.shape[1])
    threshold = np.partition(holdout, place, axis=1)[:, place]
    return (members > threshold[:, None]).mean(axis=1)


def tail_rate(non_members: int) -> float:
    """The FPR at which to read a TPR: 1 % from `ENOUGH` non-members on, else 10 %.

    Below that, 1 % of the half that sets the threshold is fewer than fifty rows.
    """
    check_count("non_members", non_members)
    return 0.01 if non_members >= ENOUGH else 0.1


def null_band(members: int, holdout: int) -> tuple[float, float]:
    """95 % band of the AUC of a score that knows nothing: 1/2 ± 1.96 √((n₁+n₀+1)/(12 n₁ n₀))."""
    check_count("members", members)
    check_count("holdout", holdout)
    reach = Z95 * math.sqrt((members + holdout + 1) / (12 * members * holdout))
    return max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)
