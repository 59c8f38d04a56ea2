"""Membership audit: attack scores to AUC and TPR at low FPR, each with its interval and ceiling."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd

from dpsynth.audit.attacks import ATTACKS, DIAGNOSTICS, Attack, blind, row_hashes, score_all
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.selection import Choice, choose, max_t
from dpsynth.audit.statistics import (
    ENOUGH,
    Scores,
    TprPoint,
    auc,
    auc_interval,
    auc_intervals,
    aucs,
    clopper_pearson,
    null_band,
    stack,
    tail_rate,
    tpr_at,
)
from dpsynth.checks import UsageError, check_choice, check_count
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
    "conclude",
    "null_band",
    "tpr_at",
]

WhiteBox = Mapping[str, Scores]

# Fewest candidates a side: each half needs a few, and the blind control needs one a fold.
LEAST = 8
SELECTIONS = ("halves", "models")
# Chance that know-nothing attacks are called a leak.
ALPHA = 0.05


@dataclass(frozen=True)
class AttackResult:
    """What one attack achieved; every rate is in [0, 1] and has the ends of its 95 % interval.

    Attributes:
        name: Of the attack, or of the white-box scores.
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
        strongest: The attack with the largest AUC where it was chosen, measured elsewhere (see
            `selection`); diagnostics do not take part. The figure to report.
        selection: `halves`: chosen on one half of the candidates, measured on the other;
            `models`: chosen on selection models, measured on all candidates.
        bands: AUC over all candidates that each attack proper must exceed to count as a leak: the
            max-T band of all of them together (see `max_t`).
        p_values: Of each attack proper, adjusted for all of them.
        blind_auc: AUC of the blind control over all candidates, near 1/2 in an honest split.
        null_low: Lower end of the 95 % band of a know-nothing AUC, for `strongest`'s rows.
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
    selection: str
    bands: Mapping[str, float]
    p_values: Mapping[str, float]
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
        check_choice("audit: selection", self.selection, SELECTIONS)
        for name in ("bands", "p_values"):
            _check_shares(name, getattr(self, name), eligible)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "float" and not 0 <= value <= 1:
                raise UsageError(f"audit: {field.name}={value}: must lie in 0..1")

    @property
    def leaks(self) -> tuple[str, ...]:
        """Attacks that tell members from others beyond luck, whatever the ceiling allows."""
        return tuple(name for name, p in self.p_values.items() if p <= ALPHA)

    @property
    def chosen(self) -> str:
        """How the strongest attack was chosen, in plain words."""
        if self.selection == "models":
            return "chosen on selection models and measured on all candidates"
        return "chosen on one half of the candidates and measured on the other"

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
            raise UsageError(f"{where}: key {name!r} is missing; audit the run again")
    return body


def _check_shares(name: str, values: Any, attacks: set[str]) -> None:
    """Refuse anything but one number in 0..1 for each of `attacks`."""
    if not isinstance(values, dict) or set(values) != attacks:
        raise UsageError(f"audit: {name} must name each attack proper once: {sorted(attacks)}")
    for attack, value in values.items():
        if not isinstance(value, float) or not 0 <= value <= 1:
            raise UsageError(f"audit: {name} of {attack!r} is {value!r}: must lie in 0..1")


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
    attacks: Mapping[str, Attack] = ATTACKS,
    pseudo: Sequence[WhiteBox] = (),
) -> tuple[Audit, pd.DataFrame]:
    """Attack one synthetic table by `attacks` and by `white_box` scores.

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
        attacks: By name; `QUICK` holds more.
        pseudo: Scores of every attack and white-box score, diagnostics aside, on models of the
            same kind that play the target: they choose the strongest attack. Without any, one
            half of the candidates does.

    Returns:
        The audit, and a frame with one row a candidate: `member` (bool) and one column an attack.

    Raises:
        UsageError: On tables under different schemas, parts that share a row, too few rows,
            white-box scores of the wrong length, an attack's name, or not finite, no attack but
            diagnostics, a selection model that lacks an attack, or a device that is not there.
    """
    resolve(device)
    _check_parts(synthetic, members, holdout, reference)
    white_box = white_box or {}
    _check_white_box(white_box, attacks, len(members), len(holdout))
    check_count("max_candidates", max_candidates, least=2 * LEAST)
    size = min(max_candidates // 2, len(members), len(holdout))
    if size < LEAST:
        raise UsageError(
            f"{len(members)} members and {len(holdout)} holdout rows: an audit needs at least "
            f"{LEAST} of each"
        )
    ins, outs = (rng.permutation(len(part))[:size] for part in (members, holdout))
    inside, outside = members.take(ins), holdout.take(outs)
    both = pd.concat([inside.frame, outside.frame], ignore_index=True)
    candidates = Table(inside.schema, both)
    found = score_all(attacks, candidates, synthetic, reference, rng, device=device)
    scores = {name: (values[:size], values[size:]) for name, values in found.items()}
    scores |= {name: (pair[0][ins], pair[1][outs]) for name, pair in white_box.items()}
    blind_auc = auc(*blind(inside, outside, rng))
    result = conclude(scores, pseudo, blind_auc, ceiling, rng)
    frame = pd.DataFrame({name: np.concatenate(pair) for name, pair in scores.items()})
    frame.insert(0, "member", np.repeat([True, False], size))
    return result, frame


def conclude(
    scores: Mapping[str, Scores],
    pseudo: Sequence[WhiteBox],
    blind_auc: float,
    ceiling: Ceiling,
    rng: np.random.Generator,
) -> Audit:
    """Measure all attacks on all candidates; report the strongest where it was not chosen.

    Args:
        scores: Scores of members (n₁,) and of others (n₀,) by attack, on the same rows.
        pseudo: As of `audit`.
        blind_auc: AUC of the blind control.
        ceiling: The ceiling of this very run.
        rng: Of halves and permutations.

    Raises:
        UsageError: On no attack but diagnostics, attacks on different rows, a score that is not
            finite, or a selection model that lacks an attack.
    """
    members, holdout = (side.shape[1] for side in stack(list(scores.values())))
    attacks = _measure(scores, rng)
    proper = {name: pair for name, pair in scores.items() if name not in DIAGNOSTICS}
    choice = choose(proper, pseudo, rng)
    ((strongest, points),) = _measure({choice.name: choice.pick(proper[choice.name])}, rng)
    low, high = null_band(len(choice.members), len(choice.holdout))
    luck = max_t(proper, rng, alpha=ALPHA)
    result = Audit(
        attacks=tuple(result for result, _ in attacks),
        strongest=strongest,
        selection=SELECTIONS[choice.on_models],
        bands=dict(zip(luck.names, luck.band.tolist(), strict=True)),
        p_values=dict(zip(luck.names, luck.p_values.tolist(), strict=True)),
        blind_auc=blind_auc,
        null_low=low,
        null_high=high,
        ceiling_auc=min(1.0, ceiling.auc),
        ceiling_tpr10=ceiling.tpr_at(0.1),
        ceiling_tpr1=ceiling.tpr_at(0.01),
        violation=_violates(strongest, points, ceiling),
        members=members,
        holdout=holdout,
        notes=(),
    )
    return replace(result, notes=_notes(result, choice, points))


def _measure(
    scores: Mapping[str, Scores], rng: np.random.Generator
) -> list[tuple[AttackResult, tuple[TprPoint, TprPoint]]]:
    """Result and TPR at 10 % and 1 % FPR of each attack."""
    found = []
    intervals = auc_intervals(*stack(list(scores.values()))).tolist()
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


def _notes(result: Audit, choice: Choice, points: tuple[TprPoint, TprPoint]) -> tuple[str, ...]:
    ten, one = points
    rows = f"{len(choice.members)} members, {len(choice.holdout)} non-members"
    chosen = (
        f"the largest mean AUC on selection models, reported on all candidates ({rows})"
        if choice.on_models
        else f"the largest AUC on one random half of the candidates, reported on the other half "
        f"({rows}); the rows of attacks are over all candidates"
    )
    diagnostics = [attack.name for attack in result.attacks if attack.diagnostic]
    notes = [
        f"strongest: {chosen}",
        f"{choice.name}: FPR came out at {ten.fpr:.4f} for 10 % and {one.fpr:.4f} for 1 % on "
        "the non-members that did not set the threshold",
        _verdict(result),
        *(f"{name} is a diagnostic and no privacy score" for name in diagnostics),
    ]
    if tail_rate(len(choice.holdout)) > 0.01:
        notes.append(
            f"TPR at 1 % FPR rests on {len(choice.holdout)} non-members, fewer than {ENOUGH}: its "
            "interval is wide and its FPR uncertain; read TPR at 10 % FPR"
        )
    low, high = null_band(result.members, result.holdout)
    if not low <= result.blind_auc <= high:
        notes.append(
            f"blind control: AUC {result.blind_auc:.3f} lies outside {low:.3f}..{high:.3f}, so "
            "members and holdout may differ without any synthetic row; do not read the attacks as "
            "leakage"
        )
    return tuple(notes)


def _verdict(result: Audit) -> str:
    """Whether any attack is beyond luck, in plain words."""
    count = f"{len(result.p_values)} attacks held together"
    if not result.leaks:
        return f"no attack exceeds its 95 % max-T band ({count}): no leak was found"
    areas = {attack.name: attack.auc for attack in result.attacks}
    best = min(result.leaks, key=lambda name: (result.p_values[name], -areas[name]))
    return (
        f"leaks: {', '.join(result.leaks)} beyond the 95 % max-T band ({count}); {best}: AUC "
        f"{areas[best]:.4f} beyond {result.bands[best]:.4f}, adjusted p = "
        f"{result.p_values[best]:.4f}"
    )


def _check_parts(synthetic: Table, members: Table, holdout: Table, reference: Table) -> None:
    parts = {"members": members, "holdout": holdout, "reference": reference}
    for name, part in parts.items():
        if part.schema.columns != synthetic.schema.columns:
            raise UsageError(f"synthetic and {name} have different schemas; use the run's schema")
    if len(synthetic) < 2:
        raise UsageError(f"synthetic has {len(synthetic)} rows; an audit needs at least 2")
    hashes = {name: row_hashes(part) for name, part in parts.items()}
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


def _check_white_box(
    white_box: WhiteBox, attacks: Mapping[str, Attack], members: int, holdout: int
) -> None:
    if not {*attacks, *white_box} - DIAGNOSTICS:
        raise UsageError("no attack but diagnostics; give at least one attack or white-box score")
    for name, pair in white_box.items():
        if name in {*attacks, *DIAGNOSTICS, "member"}:
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
