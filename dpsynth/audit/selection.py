"""Selection: the strongest of several attacks, without counting luck in the choosing as leakage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dpsynth.audit.statistics import Scores, aucs, stack, tprs
from dpsynth.checks import UsageError, check_count, check_fraction

__all__ = ["Choice", "MaxT", "choose", "max_t", "two_level"]

# Entries of one block of permuted labels or resampled scores.
BLOCK = 1 << 22
# Statistics nearer than this are equal; sums of ranks are rounded far less.
TIE = 1e-9


@dataclass(frozen=True, eq=False)
class MaxT:
    """Several attacks held together against the chance that the best of them is only lucky.

    Attributes:
        names: The attacks.
        aucs: (attacks,) what each reached.
        band: (attacks,) AUC that each must exceed. If no attack knows anything, none of them
            exceeds its own with probability 1 − α.
        p_values: (attacks,) adjusted: if no attack out of a set knows anything, the least of its
            p-values is ≤ p with probability p at most.
    """

    names: tuple[str, ...]
    aucs: np.ndarray
    band: np.ndarray
    p_values: np.ndarray


def max_t(
    scores: Mapping[str, Scores],
    rng: np.random.Generator,
    *,
    permutations: int = 1999,
    alpha: float = 0.05,
) -> MaxT:
    """Permutation band for the maximum over correlated attacks (Westfall & Young 1993, §2.6).

    Each permutation deals the labels "member" anew, to the same rows for all attacks, which keeps
    the attacks' correlation. An attack's statistic is (AUC − 1/2)/SD with the exact SD over all
    permutations, ties included, so attacks of few distinct scores take part on equal terms. The
    band comes from the maximum over all attacks, p-values step down: once an attack is found to
    leak, the next competes with the rest only. One-sided, because the sign of scores is fixed.
    `AUC > band` for some attack if and only if some p ≤ α.

    Args:
        scores: Scores of members (n₁,) and holdout rows (n₀,) by attack, of the same rows.
        rng: Deals the labels.
        permutations: How many; the least p-value is 1/(permutations + 1).
        alpha: Chance that an attack exceeds its band when none knows anything.

    Raises:
        UsageError: On too few permutations for `alpha`, no attack, attacks on different rows, or a
            score that is not finite.
    """
    check_fraction("alpha", alpha)
    check_count("permutations", permutations)
    rank = int(alpha * (permutations + 1) + TIE)
    if not rank:
        raise UsageError(
            f"permutations={permutations}: alpha={alpha:g} needs at least {round(1 / alpha) - 1}"
        )
    members, holdout = stack(list(scores.values()))
    found = aucs(members, holdout)
    ones, zeros = members.shape[1], holdout.shape[1]
    ranks = stats.rankdata(np.concatenate([members, holdout], axis=1), axis=1)
    ranks -= (ones + zeros + 1) / 2
    squares = (ranks**2).sum(axis=1) / (ones + zeros - 1)
    # SD of Σ ranks over the members; AUC − 1/2 = Σ/(n₁ n₀). Equal scores: all 0, never beyond.
    spread = np.sqrt(ones * zeros / (ones + zeros) * squares)
    standard = ranks / np.where(spread > 0, spread, 1.0)[:, None]
    reached = standard[:, :ones].sum(axis=1)
    dealt = _dealt(standard, ones, permutations, rng)
    order = np.argsort(-reached, kind="stable")
    # Column i: the largest among the i-th best attack and all worse ones.
    rivals = np.maximum.accumulate(dealt[:, order[::-1]], axis=1)[:, ::-1]
    passed = (rivals >= reached[order] - TIE).sum(axis=0)
    p_values = np.empty(len(order))
    p_values[order] = np.maximum.accumulate((1 + passed) / (1 + permutations))
    critical = np.sort(rivals[:, 0])[-rank] + TIE
    band = np.minimum(0.5 + critical * spread / (ones * zeros), 1.0)
    return MaxT(tuple(scores), found, band, p_values)


def _dealt(
    standard: np.ndarray, ones: int, permutations: int, rng: np.random.Generator
) -> np.ndarray:
    """Σ of each attack's standardised ranks over `ones` rows at random: (permutations, attacks)."""
    labels = np.zeros(standard.shape[1], dtype=np.int8)
    labels[:ones] = 1
    step = max(1, BLOCK // len(labels))
    sums = []
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        block = rng.permuted(np.tile(labels, (rows, 1)), axis=1)
        sums.append(block.astype(np.float64) @ standard.T)
    return np.concatenate(sums)


@dataclass(frozen=True, eq=False)
class Choice:
    """The attack to report, and the candidates that had no part in choosing it.

    Attributes:
        name: The attack.
        members: Rows of the members to report on.
        holdout: Rows of the holdout to report on.
        on_models: Whether it was chosen on other models; else on the other half of the candidates.
    """

    name: str
    members: np.ndarray
    holdout: np.ndarray
    on_models: bool

    def pick(self, pair: Scores) -> Scores:
        """Scores of the rows to report on."""
        return pair[0][self.members], pair[1][self.holdout]


def choose(
    scores: Mapping[str, Scores],
    pseudo: Sequence[Mapping[str, Scores]],
    rng: np.random.Generator,
) -> Choice:
    """Choose the strongest attack where it is not measured.

    Args:
        scores: Scores of the audited model's candidates by attack.
        pseudo: The same attacks' scores on selection models that play the target, whose members
            and non-members are their own. The largest mean AUC over them decides, and all
            candidates are left to report on. Without any, a random half of the candidates decides.
        rng: Cuts the halves.

    Raises:
        UsageError: On no attack, on candidates too few to halve, or when a selection model lacks
            an attack.
    """
    members, holdout = stack(list(scores.values()))
    names, sizes = list(scores), (members.shape[1], holdout.shape[1])
    if pseudo:
        areas = np.mean([_areas(model, names, i) for i, model in enumerate(pseudo)], axis=0)
        return Choice(names[int(areas.argmax())], *map(np.arange, sizes), on_models=True)
    if min(sizes) < 2:
        raise UsageError(f"{min(sizes)} scores on one side: halves need at least 2 of each")
    inner, outer = (rng.permutation(size) for size in sizes)
    middle = [size // 2 for size in sizes]
    areas = aucs(members[:, inner[: middle[0]]], holdout[:, outer[: middle[1]]])
    best = names[int(areas.argmax())]
    return Choice(best, inner[middle[0] :], outer[middle[1] :], on_models=False)


def _areas(model: Mapping[str, Scores], names: list[str], number: int) -> np.ndarray:
    lacking = [name for name in names if name not in model]
    if lacking:
        raise UsageError(
            f"selection model {number} has no scores of {', '.join(lacking)}; attack every "
            "selection model the same way"
        )
    # One by one: a classifier that is cross-fitted may have scored some of the rows only.
    return np.concatenate([aucs(*stack([model[name]])) for name in names])


def two_level(
    models: Sequence[Scores],
    rng: np.random.Generator,
    *,
    fpr: float | None = None,
    draws: int = 1000,
) -> tuple[float, float, float]:
    """Mean AUC over audited models, with a 95 % bootstrap interval for further models.

    Models are drawn with replacement first, then the records of each: records of one model share
    its luck, and pooling them would promise too much. Percentile interval; with fewer than about
    ten models it is somewhat too short.

    Args:
        models: Scores of members and of holdout rows of each model.
        rng: Draws models and records.
        fpr: If given, not the AUC but the TPR at this FPR, each resample at its own threshold
            (see `tprs`).
        draws: How many resamples.

    Returns:
        (mean, low, high).

    Raises:
        UsageError: On fewer than two models, or a score that is not finite.
    """
    check_count("draws", draws, least=40)
    if len(models) < 2:
        raise UsageError(f"{len(models)} audited models: an interval over models needs at least 2")
    single = [(members[None], holdout[None]) for members, holdout in models]
    mean = float(np.mean([aucs(*pair) if fpr is None else tprs(*pair, fpr) for pair in single]))
    picked = rng.integers(len(models), size=(draws, len(models)))
    totals = np.zeros(draws)
    for number, pair in enumerate(models):
        owners = np.nonzero(picked == number)[0]
        np.add.at(totals, owners, _resampled(pair, len(owners), fpr, rng))
    low, high = np.quantile(totals / len(models), [0.025, 0.975])
    return mean, float(low), float(high)


def _resampled(pair: Scores, times: int, fpr: float | None, rng: np.random.Generator) -> np.ndarray:
    """AUC or TPR (times,) of resampled records, from how often each distinct score was drawn."""
    values, codes = np.unique(np.concatenate(pair), return_inverse=True)
    sides = (codes[: len(pair[0])], codes[len(pair[0]) :])
    step = max(1, BLOCK // len(codes))
    found = [np.empty(0)]
    for start in range(0, times, step):
        rows = min(step, times - start)
        members, holdout = (_counts(side, rows, len(values), rng) for side in sides)
        found.append(
            _auc_of_counts(members, holdout)
            if fpr is None
            else _tpr_of_counts(members, holdout, fpr)
        )
    return np.concatenate(found)


def _counts(codes: np.ndarray, rows: int, values: int, rng: np.random.Generator) -> np.ndarray:
    """How often each value comes up among as many draws as there are codes: (rows, values)."""
    drawn = codes[rng.integers(len(codes), size=(rows, len(codes)))]
    drawn += values * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * values).reshape(rows, values)


def _auc_of_counts(members: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    beaten = holdout.cumsum(axis=1) - holdout / 2
    return (members * beaten).sum(axis=1) / (members[0].sum() * holdout[0].sum())


def _tpr_of_counts(members: np.ndarray, holdout: np.ndarray, fpr: float) -> np.ndarray:
    """The threshold is the largest value that more than ⌊fpr·n₀⌋ non-members reach."""
    allowed = math.floor(fpr * holdout[0].sum())
    reach = holdout[:, ::-1].cumsum(axis=1)[:, ::-1]
    threshold = (reach > allowed).sum(axis=1) - 1
    upto = np.take_along_axis(members.cumsum(axis=1), threshold[:, None], axis=1)[:, 0]
    return 1 - upto / members[0].sum()
