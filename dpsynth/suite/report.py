"""Report of an audit: what it found, whether it may be believed, and the page that says so."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpsynth.audit.membership import AttackResult, Audit
from dpsynth.suite.controls import Control

__all__ = ["Bound", "SuiteReport"]


@dataclass(frozen=True)
class Bound:
    """A lower bound on ε.

    Attributes:
        audit: What was watched.
        form: How errors became a bound.
        epsilon: With 95 % confidence ε is no less than this.
        attainable: What a perfect attack on a mechanism with exactly the claim shows at this size
            (median); far below the claim, a small bound is no evidence of slack.
        claimed: ε that the bound is held against.
        sure: As `epsilon`, so low that it lies above the truth about once in a thousand audits. A
            tight bound exceeds a true claim once in twenty; this one contradicts it.
        detail: Sizes, in plain words.
    """

    audit: str
    form: str
    epsilon: float
    attainable: float
    claimed: float
    sure: float
    detail: str = ""

    @property
    def violated(self) -> bool:
        return self.sure > self.claimed


@dataclass(frozen=True)
class SuiteReport:
    """Everything that one audit found.

    Attributes:
        suite: `quick` or `full`.
        facts: What the run claims and how it was made.
        membership: Attacks without shadow models.
        shadow: Attacks with them, in the full suite.
        controls: Known answers.
        defects: Whether each planted defect was noticed, and the sound engine was not.
        bounds: Lower bounds on ε.
        attributes: Attribute inference and singling out, each as advantage over the control rows.
        seconds: What each stage took.
        notes: Remarks in plain words.
    """

    suite: str
    facts: Mapping[str, Any]
    membership: Audit
    shadow: Audit | None
    controls: tuple[Control, ...]
    defects: Mapping[str, bool]
    bounds: tuple[Bound, ...]
    attributes: tuple[Mapping[str, Any], ...]
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def audits(self) -> tuple[Audit, ...]:
        return (self.membership,) if self.shadow is None else (self.membership, self.shadow)

    @property
    def failed(self) -> tuple[str, ...]:
        """Controls with a wrong answer: such an audit says nothing on the run."""
        wrong = [
            f"control {c.name!r}: AUC {c.auc:.3f} is outside {c.low:.3f}..{c.high:.3f}"
            for c in self.controls
            if not c.passed
        ]
        missed = [
            f"planted defect {name!r}: was not noticed"
            if name != "sound"
            else "the sound engine was taken for a defective one"
            for name, noticed in self.defects.items()
            if noticed == (name == "sound")
        ]
        return (*wrong, *missed)

    @property
    def violations(self) -> tuple[str, ...]:
        """Claims that the evidence contradicts."""
        found = [
            f"attack {a.strongest.name!r}: AUC {a.strongest.auc_low:.3f} or more is above the "
            f"ceiling {a.ceiling_auc:.3f}, or a rate is above its own"
            for a in self.audits
            if a.violation
        ]
        found += [
            f"{b.audit}: ε ≥ {b.sure:.3f} (99.9 %) is above the claimed {b.claimed:.3f}"
            for b in self.bounds
            if b.violated
        ]
        return tuple(found)

    @property
    def verdict(self) -> str:
        """One line: whether the audit may be believed, and what it says."""
        if self.failed:
            return f"not to be believed: {self.failed[0]}"
        if self.violations:
            return f"the claim is contradicted: {self.violations[0]}"
        best = max((a.strongest for a in self.audits), key=lambda found: found.auc)
        return (
            f"no contradiction: strongest attack {best.name} AUC {best.auc:.3f} "
            f"({best.auc_low:.3f}..{best.auc_high:.3f}), ceiling {self.membership.ceiling_auc:.3f}"
        )

    def to_json(self) -> str:
        """Text of `audit.json`."""
        body = {
            "suite": self.suite,
            "verdict": self.verdict,
            "failed": self.failed,
            "violations": self.violations,
            "facts": dict(self.facts),
            "membership": asdict(self.membership),
            "shadow": None if self.shadow is None else asdict(self.shadow),
            "controls": [c.to_dict() for c in self.controls],
            "defects": dict(self.defects),
            "bounds": [asdict(b) for b in self.bounds],
            "attributes": [dict(a) for a in self.attributes],
            "seconds": dict(self.seconds),
            "notes": self.notes,
        }
        return json.dumps(_plain(body), indent=1, allow_nan=False) + "\n"

    def page(self) -> str:
        """`README.md` of the audit's folder."""
        parts = [
            f"# Audit of {self.facts['name']}",
            f"**{self.verdict}**",
            "Figures of private rows, attacked one by one: this folder is covered by no ε. Keep it "
            "with the rows.",
            _claim(self.facts),
            "## Who was in",
            "![ROC](roc.png)",
            *(_attack_table(title, a) for title, a in self._titled()),
            "## Is ε true",
            "![Lower bounds](bounds.png)" if self.bounds else _nothing(self.facts),
            _bound_table(self.bounds) if self.bounds else "",
            "## May this audit be believed",
            _control_table(self.controls),
            _defect_table(self.defects) if self.defects else "",
            "## Attributes and singling out",
            _attribute_table(self.attributes),
            "## Notes",
            "\n".join(f"- {note}" for note in self._remarks()),
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _titled(self) -> list[tuple[str, Audit]]:
        named = [("Without shadow models", self.membership)]
        return named if self.shadow is None else [*named, ("With shadow models", self.shadow)]

    def _remarks(self) -> list[str]:
        own = [note for a in self.audits for note in a.notes]
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        return [*dict.fromkeys([*self.notes, *own]), f"time: {spent}"]


def _claim(facts: Mapping[str, Any]) -> str:
    if not math.isfinite(facts["epsilon"]):
        return "The run claims no protection (ε = ∞): attacks are held against nothing."
    shown = {
        "ε": f"{facts['epsilon']:.4g}",
        "δ": f"{facts['delta']:g}",
        "unit": facts["unit"],
        "relation": facts["relation"],
        "noise": facts["noise"],
        "accountant": f"{facts['accountant']} {facts['accountant_version']}",
        "metadata": facts["metadata"],
        "tuning": facts["tuning"],
        **{
            key: f"{facts[key]:.6g}" if isinstance(facts[key], float) else facts[key]
            for key in ("sampler", "sample_rate", "steps", "noise_multiplier", "clip", "mu")
            if key in facts
        },
        "δ at ε": facts.get("profile", ""),
    }
    return _table(("claim", ""), [(k, str(v)) for k, v in shown.items() if v != ""])


def _attack_table(title: str, found: Audit) -> str:
    rows = [
        (f"{a.name} (diagnostic)" if a.diagnostic else a.name, *_figures(a)) for a in found.attacks
    ]
    rows.append((f"**strongest: {found.strongest.name}**", *_figures(found.strongest)))
    top = (f"{found.ceiling_auc:.3f}", f"{found.ceiling_tpr10:.3f}", f"{found.ceiling_tpr1:.3f}")
    rows.append(("*ceiling of this run*", *top))
    rows.append(("*knows nothing (95 %)*", f"{found.null_low:.3f}..{found.null_high:.3f}", "", ""))
    head = ("attack", "AUC (95 %)", "TPR at 10 % FPR", "TPR at 1 % FPR")
    size = f"{found.members} members, {found.holdout} others; blind AUC {found.blind_auc:.3f}"
    return f"### {title}\n\n{size}.\n\n{_table(head, rows)}"


def _figures(found: AttackResult) -> tuple[str, str, str]:
    return (
        f"{found.auc:.3f} ({found.auc_low:.3f}..{found.auc_high:.3f})",
        f"{found.tpr10:.3f} ({found.tpr10_low:.3f}..{found.tpr10_high:.3f})",
        f"{found.tpr1:.3f} ({found.tpr1_low:.3f}..{found.tpr1_high:.3f})",
    )


def _nothing(facts: Mapping[str, Any]) -> str:
    if math.isfinite(facts["epsilon"]):
        return "No lower bound was asked for."
    return "There is no ε to bound from below."


def _bound_table(bounds: Sequence[Bound]) -> str:
    head = ("audit", "form", "ε at least (95 %)", "(99.9 %)", "attainable (95 %)", "claimed", "")
    rows = [
        (
            b.audit,
            b.form,
            *(f"{value:.3f}" for value in (b.epsilon, b.sure, b.attainable, b.claimed)),
            b.detail,
        )
        for b in bounds
    ]
    return _table(head, rows)


def _control_table(controls: Sequence[Control]) -> str:
    rows = [
        (c.name, f"{c.expected:.3f}", f"{c.auc:.4f}", f"{c.low:.3f}..{c.high:.3f}", _mark(c.passed))
        for c in controls
    ]
    return _table(("control", "theory", "AUC", "passes within", ""), rows)


def _defect_table(defects: Mapping[str, bool]) -> str:
    rows = [
        (name, "flagged" if noticed else "not flagged", _mark(noticed != (name == "sound")))
        for name, noticed in defects.items()
    ]
    return _table(("planted defect", "step audit", ""), rows)


def _attribute_table(attributes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            str(a["name"]),
            f"{a['members']:.3f}",
            f"{a['control']:.3f}",
            f"{a['advantage']:.3f} ({a['low']:.3f}..{a['high']:.3f})",
        )
        for a in attributes
    ]
    return _table(("secret", "right on members", "right on others", "advantage (95 %)"), rows)


def _mark(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _plain(value: Any) -> Any:
    """JSON knows no infinity: it is written as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
