"""Membership audit: attack scores to AUC and TPR at low FPR, each with its interval and ceiling."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd
from scipy import special, stats

from dpsynth.audit.attacks import ATTACKS, DIAGNOSTICS, blind
from dpsynth.audit.ceiling import Ceiling
from dpsynth.checks import UsageError, check_count, check_fraction
from dpsynth.data import Table
from dpsynth.devices import resolve

__all__ = [
    "AttackResult",
    "Audit",
    "TprPoint",
    "WhiteBox",
    "auc",
    "auc_interval",
    "auc_intervals",
    "aucs",
    "audit",
    "clopper_pearson",
    "null_band",
    "tpr_at",
]

WhiteBox = Mapping[str, tuple[np.ndarray, np.ndarray]]

Z95 = float(special.ndtri(0.975))
# Fewest candidates a side: each half needs a few, and the blind control needs one a fold.
LEAST = 8
# From this many non-members on, TPR at 1 % FPR rests on enough rows.
ENOUGH = 10_000


def auc(members: np.ndarray, holdout: np.ndarray) -> float:
    """P(member score > holdout score) + P(equal)/2 over all pairs of (n₁,) and (n₀,) scores."""
    return float(aucs(*_one_row(members, holdout))[0])


def aucs(members: np.ndarray, holdout: np.ndarray) -> np.ndarray:
    """`auc` of each row of (scores, n₁) and (scores, n₀): float64 (scores,)."""
    wins, _ = _placements(members, holdout)
    return wins.mean(axis=1)


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


def _one_row(members: np.ndarray, holdout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    for name, scores in (("member", members), ("holdout", holdout)):
        if scores.ndim != 1:
            raise UsageError(f"{name} scores have shape {scores.shape}; give one number a row")
    return members[None], holdout[None]


def _placements(members: np.ndarray, holdout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of scores: the share of holdout scores below each member (scores, n₁), and of
    members above each holdout (scores, n₀)."""
    for name, scores in (("member", members), ("holdout", holdout)):
        if scores.ndim != 2 or not scores.shape[1] or len(scores) != len(members):
            raise UsageError(
                f"{name} scores have shape {scores.shape}; give one number a row, and as many "
                f"sets of them as of members, {len(members)}"
            )
        if not np.isfinite(scores).all():
            raise UsageError(f"{name} scores: {(~np.isfinite(scores)).sum()} are not finite")
    count, others = members.shape[1], holdout.shape[1]
    together = stats.rankdata(np.concatenate([members, holdout], axis=1), axis=1)
    wins = (together[:, :count] - stats.rankdata(members, axis=1)) / others
    losses = 1 - (together[:, count:] - stats.rankdata(holdout, axis=1)) / count
    return wins, losses


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
        fpr_high: Upper end for `fpr`.
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


def null_band(members: int, holdout: int) -> tuple[float, float]:
    """95 % band of the AUC of a score that knows nothing: 1/2 ± 1.96 √((n₁+n₀+1)/(12 n₁ n₀))."""
    check_count("members", members)
    check_count("holdout", holdout)
    reach = Z95 * math.sqrt((members + holdout + 1) / (12 * members * holdout))
    return max(0.0, 0.5 - reach), min(1.0, 0.5 + reach)


@dataclass(frozen=True)
class AttackResult:
    """What one attack achieved; every rate is in [0, 1] and has the ends of its 95 % interval.

    Attributes:
        name: Key in `ATTACKS`, or of the white-box scores.
        diagnostic: Whether it is shown only, never the strongest attack and no privacy score.
        auc: Area under the ROC curve; `tpr10`, `tpr1` are the TPR at 10 % and 1 % FPR.
    """

    name: str
    diagnostic: bool
    auc: float
    auc_low: float
    auc_high: float
    tpr10: float
    tpr10_low: float
    tpr10_high: float
    tpr1: float
    tpr1_low: float
    tpr1_high: float

    def __post_init__(self) -> None:
        _check_types(self, f"attack {self.name!r}")
        for key in ("auc", "tpr10", "tpr1"):
            low, value, high = (getattr(self, key + end) for end in ("_low", "", "_high"))
            if not 0 <= low <= value <= high <= 1:
                raise UsageError(
                    f"attack {self.name!r}: {key}={value} with interval {low}..{high} must lie "
                    "in 0..1, the value inside"
                )


@dataclass(frozen=True)
class Audit:
    """Result of all attacks on one synthetic table, beside the run's own ceiling.

    Attributes:
        attacks: One row an attack, over all candidates.
        strongest: The attack with the largest AUC on one half of the candidates, measured on the
            other half; diagnostics do not take part. The figure to report.
        blind_auc: AUC of the blind control over all candidates, near 1/2 in an honest split.
        null_low: Lower end of the 95 % band of a know-nothing AUC, for `strongest`'s half.
        null_high: Upper end of it.
        ceiling_auc: Largest AUC that the run's guarantee allows; 1 without one.
        ceiling_tpr10: Largest TPR at 10 % FPR; `ceiling_tpr1` at 1 %.
        violation: Whether an interval of `strongest` lies wholly above the ceiling.
        members: Member candidates scored.
        holdout: Non-member candidates scored.
        notes: Remarks in plain words.
    """

    attacks: tuple[AttackResult, ...]
    strongest: AttackResult
    blind_auc: float
    null_low: float
    null_high: float
    ceiling_auc: float
    ceiling_tpr10: float
    ceiling_tpr1: float
    violation: bool
    members: int
    holdout: int
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_types(self, "audit")
        eligible = {attack.name for attack in self.attacks if not attack.diagnostic}
        if len({attack.name for attack in self.attacks}) < len(self.attacks):
            raise UsageError("audit: an attack is listed twice; list each once")
        if self.strongest.diagnostic or self.strongest.name not in eligible:
            raise UsageError(
                f"audit: strongest={self.strongest.name!r} is not among the attacks proper"
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not 0 <= value <= 1:
                raise UsageError(f"audit: {field.name}={value}: must lie in 0..1")

    def to_json(self) -> str:
        """Text of an audit file; `from_json` gives an equal audit back."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Audit:
        """Inverse of `to_json`; missing, unknown or non-finite entries are refused."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"audit is not JSON: {error}") from error
        _check_keys(cls, body, "audit")
        if not isinstance(body["attacks"], list) or not isinstance(body["notes"], list):
            raise UsageError("audit: 'attacks' and 'notes' must be lists")
        body["attacks"] = tuple(_result(entry) for entry in body["attacks"])
        body["strongest"] = _result(body["strongest"])
        body["notes"] = tuple(map(str, body["notes"]))
        return cls(**body)


def _result(entry: object) -> AttackResult:
    return AttackResult(**_check_keys(AttackResult, entry, "audit attack"))


def _check_keys(kind: type, body: Any, where: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise UsageError(f"{where}: expected an object with named entries")
    known = [field.name for field in fields(kind)]
    for name in sorted(set(body) - set(known)):
        raise UsageError(f"{where}: unknown key {name!r}")
    for name in known:
        if name not in body:
            raise UsageError(f"{where}: key {name!r} is missing")
    return body


def _check_types(record: Any, where: str) -> None:
    """Refuse a field of a record whose plain value is of another type or not finite."""
    plain = {"str": str, "bool": bool, "int": int, "float": (int, float)}
    for field in fields(record):
        kind, value = plain.get(str(field.type)), getattr(record, field.name)
        if kind is None:
            continue
        # In Python a bool is an int; here it is not a number.
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UsageError(f"{where}: {field.name}={value!r} must be of type {field.type}")
        if field.type == "float" and not math.isfinite(value):
            raise UsageError(f"{where}: {field.name}={value} must be finite")


def audit(
    synthetic: Table,
    *,
    members: Table,
    holdout: Table,
    reference: Table,
    white_box: WhiteBox | None,
    ceiling: Ceiling,
    max_candidates: int,
    rng: np.random.Generator,
    device: str = "cpu",
) -> tuple[Audit, pd.DataFrame]:
    """Attack one synthetic table by everything in `ATTACKS` and by `white_box` scores.

    Candidates are a random subset of the members and one of the holdout, of equal size.

    Args:
        synthetic: What the generator put out.
        members: Rows that the generator saw.
        holdout: Rows that it did not see, from the same population.
        reference: Rows of that population that the attacker knows; no row in common with the
            other two parts.
        white_box: Scores of ALL `members` rows and ALL `holdout` rows by attack name, higher =
            more likely a member; `None` if only synthetic rows are seen.
        ceiling: The ceiling of this very run.
        max_candidates: Most candidates, members and holdout together.
        rng: Randomness of the subsets, halves and attacks.
        device: Where neighbours are searched: `cpu`, `cuda`, or `auto`; same scores.

    Returns:
        The audit, and a frame with one row a candidate: `member` (bool) and one column an attack.

    Raises:
        UsageError: On tables under different schemas, parts that share a row, too few rows,
            white-box scores of the wrong length, an attack's name, or not finite, or a device
            that is not there.
    """
    resolve(device)
    _check_parts(synthetic, members, holdout, reference)
    white_box = white_box or {}
    _check_white_box(white_box, len(members), len(holdout))
    check_count("max_candidates", max_candidates, least=2 * LEAST)
    size = min(max_candidates // 2, len(members), len(holdout))
    if size < LEAST:
        raise UsageError(
            f"{len(members)} members and {len(holdout)} holdout rows: an audit needs at least "
            f"{LEAST} of each"
        )
    ins, outs = (rng.permutation(len(part))[:size] for part in (members, holdout))
    inside, outside = members.take(ins), holdout.take(outs)
    scores = _scores(inside, outside, synthetic, reference, rng, device)
    scores |= {name: (pair[0][ins], pair[1][outs]) for name, pair in white_box.items()}
    blind_auc = auc(*blind(inside, outside, rng))
    result = _conclude(scores, blind_auc, ceiling, rng)
    frame = pd.DataFrame({name: np.concatenate(pair) for name, pair in scores.items()})
    frame.insert(0, "member", np.repeat([True, False], size))
    return result, frame


Scores = dict[str, tuple[np.ndarray, np.ndarray]]


def _scores(
    inside: Table,
    outside: Table,
    synthetic: Table,
    reference: Table,
    rng: np.random.Generator,
    device: str,
) -> Scores:
    both = pd.concat([inside.frame, outside.frame], ignore_index=True)
    candidates = Table(inside.schema, both)
    scores: Scores = {}
    for name, attack in ATTACKS.items():
        values = attack(candidates, synthetic, reference, rng, device=device)
        scores[name] = (values[: len(inside)], values[len(inside) :])
    return scores


def _conclude(
    scores: Scores, blind_auc: float, ceiling: Ceiling, rng: np.random.Generator
) -> Audit:
    """Measure all attacks on all candidates; choose on one half, report on the other."""
    size = len(next(iter(scores.values()))[0])
    attacks = _measure(scores, rng)
    inner, outer = rng.permutation(size), rng.permutation(size)
    choosing = (inner[: size // 2], outer[: size // 2])
    reporting = (inner[size // 2 :], outer[size // 2 :])
    eligible = [name for name in scores if name not in DIAGNOSTICS]
    halves = [_pick(scores[name], choosing) for name in eligible]
    best = eligible[int(aucs(*_stack(halves)).argmax())]
    ((strongest, points),) = _measure({best: _pick(scores[best], reporting)}, rng)
    low, high = null_band(size - size // 2, size - size // 2)
    return Audit(
        attacks=tuple(result for result, _ in attacks),
        strongest=strongest,
        blind_auc=blind_auc,
        null_low=low,
        null_high=high,
        ceiling_auc=min(1.0, ceiling.auc),
        ceiling_tpr10=ceiling.tpr_at(0.1),
        ceiling_tpr1=ceiling.tpr_at(0.01),
        violation=_violates(strongest, points, ceiling),
        members=size,
        holdout=size,
        notes=_notes(strongest, points, size, blind_auc),
    )


def _pick(
    pair: tuple[np.ndarray, np.ndarray], rows: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    return pair[0][rows[0]], pair[1][rows[1]]


def _stack(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (attacks, members) and (attacks, holdout)."""
    members, holdout = zip(*pairs, strict=True)
    return np.stack(members), np.stack(holdout)


def _measure(
    scores: Scores, rng: np.random.Generator
) -> list[tuple[AttackResult, tuple[TprPoint, TprPoint]]]:
    """Result and TPR at 10 % and 1 % FPR of each attack."""
    found = []
    intervals = auc_intervals(*_stack(scores.values())).tolist()
    for (name, pair), (area, low, high) in zip(scores.items(), intervals, strict=True):
        ten, one = tpr_at(*pair, 0.1, rng), tpr_at(*pair, 0.01, rng)
        result = AttackResult(
            name=name,
            diagnostic=name in DIAGNOSTICS,
            auc=area,
            auc_low=low,
            auc_high=high,
            tpr10=ten.tpr,
            tpr10_low=ten.low,
            tpr10_high=ten.high,
            tpr1=one.tpr,
            tpr1_low=one.low,
            tpr1_high=one.high,
        )
        found.append((result, (ten, one)))
    return found


def _violates(strongest: AttackResult, points: tuple[TprPoint, TprPoint], ceiling: Ceiling) -> bool:
    """Whether a lower end exceeds the ceiling; a TPR is held against the FPR it may have had."""
    above = [point.low > ceiling.tpr_at(point.fpr_high) for point in points]
    return strongest.auc_low > ceiling.auc or any(above)


def _notes(
    strongest: AttackResult, points: tuple[TprPoint, TprPoint], size: int, blind_auc: float
) -> tuple[str, ...]:
    half = size - size // 2
    ten, one = points
    notes = [
        f"strongest: the largest AUC on one random half of the candidates, reported on the other "
        f"half ({half} members, {half} non-members); the rows of attacks are over all candidates",
        f"{strongest.name}: FPR came out at {ten.fpr:.4f} for 10 % and {one.fpr:.4f} for 1 % on "
        "the non-members that did not set the threshold",
        "dcr is a diagnostic and no privacy score",
    ]
    if half < ENOUGH:
        notes.append(
            f"TPR at 1 % FPR rests on {half} non-members, fewer than {ENOUGH}: its interval is "
            "wide and its FPR uncertain; read TPR at 10 % FPR"
        )
    low, high = null_band(size, size)
    if not low <= blind_auc <= high:
        notes.append(
            f"blind control: AUC {blind_auc:.3f} lies outside {low:.3f}..{high:.3f}, so members "
            "and holdout may differ without any synthetic row; do not read the attacks as leakage"
        )
    return tuple(notes)


def _check_parts(synthetic: Table, members: Table, holdout: Table, reference: Table) -> None:
    parts = {"members": members, "holdout": holdout, "reference": reference}
    for name, part in parts.items():
        if part.schema.columns != synthetic.schema.columns:
            raise UsageError(f"synthetic and {name} have different schemas; use the run's schema")
    if len(synthetic) < 2:
        raise UsageError(f"synthetic has {len(synthetic)} rows; an audit needs at least 2")
    hashes = {name: _row_hashes(part) for name, part in parts.items()}
    for first, second in (
        ("members", "holdout"),
        ("members", "reference"),
        ("holdout", "reference"),
    ):
        shared = int(np.isin(hashes[first], hashes[second]).sum())
        if shared:
            raise UsageError(
                f"{first} and {second} have {shared} rows in common; cut the parts by Split"
            )


def _row_hashes(table: Table) -> np.ndarray:
    """(rows,) 64-bit hashes: equal rows have equal ones, and a chance meeting is negligible."""
    return pd.util.hash_pandas_object(table.frame, index=False, categorize=False).to_numpy()


def _check_white_box(white_box: WhiteBox, members: int, holdout: int) -> None:
    for name, pair in white_box.items():
        if name in ATTACKS or name == "member":
            raise UsageError(f"white-box attack {name!r}: the name is taken; choose another")
        sides = zip(("members", "holdout"), pair, (members, holdout), strict=True)
        for part, scores, rows in sides:
            if scores.shape != (rows,):
                raise UsageError(
                    f"white-box attack {name!r}: {part} scores have shape {scores.shape}; give "
                    f"one for each of the {rows} rows"
                )
            if not np.isfinite(scores).all():
                raise UsageError(f"white-box attack {name!r}: a score of {part} is not finite")
