"""The model card: what was made, from what, at which budget, how good, how leaky, and for what."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from dpsynth.checks import UsageError, check_positive
from dpsynth.frontier.results import higher_is_better, markdown_text

if TYPE_CHECKING:
    from dpsynth.audit.membership import Audit

__all__ = [
    "FACTS",
    "card",
    "check_facts",
    "ledger_rows",
    "noise_origin",
    "not_covered",
    "stated",
    "sweep_cost",
]

FACTS: Mapping[str, str] = {
    # Always needed.
    "name": "what the run is called",
    "family": "the generator: autoregressive, vae, gan, diffusion, or a baseline",
    "epsilon": "ε of everything that read the rows; inf without privacy",
    "delta": "δ of the same statement",
    "data": "name of the table",
    "seed": "the fixed seed, or None where noise came from OS entropy",
    # Needed where ε is finite.
    "unit": "what one neighbour differs by, e.g. record",
    "relation": "how neighbours differ, e.g. add_remove",
    "accountant": "what composed the ledger",
    # Said if known, else said to be unknown.
    "purpose": "why the run was made",
    "suits": "when the family is the one to choose",
    "source": "where the table came from and under which terms",
    "data_sha256": "digest of the table",
    "expected_rows": "the declared, public number of rows; the true one is private",
    "columns": "number of columns",
    "target": "column of the downstream task",
    "noise": "source of the noise, as the ledger says it",
    "metadata": "where levels and bounds came from",
    "sampler": "how batches were drawn, e.g. Poisson",
    "sample_rate": "q",
    "steps": "T",
    "noise_multiplier": "σ",
    "clip": "C",
    "accountant_version": "its version",
    "tuning": "what choosing settings cost, or that it was not counted",
    "sweep_runs": "number of runs of the sweep that this one is part of",
    "sweep_epsilon": "ε of all of these published together",
    "ledger": "rows of `what`, `mechanism` and `params` (a mapping or a text)",
    "metrics": "figures of the evaluation",
    "floors": "the same figures for real rows",
    "thresholds": "figures asked for, by metric",
    "audit": "the run's Audit",
    "version": "version of dpsynth",
    "commit": "commit of the code",
    "created": "date",
    "license": "licence of the weights; `other` if not given",
    "tags": "further tags",
    "intended_use": "further lines",
    "forbidden_use": "further lines",
    "limits": "further lines",
    "not_covered": "further lines",
    "reviewers": "who signs",
}
NEEDED = ("name", "family", "epsilon", "delta", "data", "seed")
NEEDED_PRIVATE = ("unit", "relation", "accountant")
LISTS = ("tags", "intended_use", "forbidden_use", "limits", "not_covered", "reviewers")
PARAMETERS = (
    ("sampler", "sampler"),
    ("sample_rate", "sampling rate q"),
    ("steps", "steps T"),
    ("noise_multiplier", "noise multiplier σ"),
    ("clip", "clipping norm C"),
)
NOT_RECORDED = "not recorded"

INTENDED = (
    "Developing and testing software and analyses before access to the real table.",
    "Teaching, and methods research on the cost of privacy.",
    "Exploration whose findings are confirmed on the real rows.",
)
FORBIDDEN = (
    "Decisions about a person, and any attempt to find or single out a person.",
    "Publishing a finding as one about the population without confirming it on real rows.",
    "Presenting the rows as free of personal-data duties: that is a legal judgement which neither "
    "a small ε nor a failed attack settles.",
)
LIMITS = (
    "Rare levels, tails and small groups are the first to be lost or distorted.",
    "Errors of the real table are learned with everything else: a biased table stays biased.",
    "An attack that failed shows that this attack failed. The ceiling, not the measurement, bounds "
    "attacks yet to be found.",
)
COVERED_NOT = (
    "The schema: levels, bounds and the expected number of rows count as public and are taken as "
    "declared.",
    "Metrics and audits: they were computed on private rows without noise, so they are not "
    "differentially private, and neither is a decision made by looking at them.",
    "Choosing among runs, settings or values of ε on the same rows, unless the ledger lists it.",
    "What can be inferred about a person from the population, had their rows never been used.",
    "Side channels: timing, memory, and the finite precision of the noise.",
)


def check_facts(facts: Mapping[str, Any]) -> None:
    """Refuse facts that are unknown, missing, or of the wrong shape.

    Raises:
        UsageError: On an unknown key, a needed key that is absent, ε or δ out of range, a text
            where a list is meant, floors of other keys than metrics, or a ledger row with other
            keys than `what`, `mechanism`, `params`.
    """
    for name in facts:
        if name not in FACTS:
            raise UsageError(f"fact {name!r}: unknown; known are {', '.join(FACTS)}")
    _need(facts, NEEDED)
    check_positive("epsilon", facts["epsilon"], allow_inf=True)
    if not 0 <= facts["delta"] <= 1:
        raise UsageError(f"delta={facts['delta']}: must lie between 0 and 1")
    if math.isfinite(facts["epsilon"]):
        _need(facts, NEEDED_PRIVATE)
    if (facts.get("sweep_epsilon") is None) != (facts.get("sweep_runs") is None):
        raise UsageError("facts: sweep_runs and sweep_epsilon go together; give both or neither")
    for name in LISTS:
        if isinstance(facts.get(name), str):
            raise UsageError(f"fact {name!r}: must be a list of texts, not one text")
    if set(facts.get("metrics") or ()) != set(facts.get("floors") or ()):
        raise UsageError("facts: metrics and floors must have the same keys")
    for entry in facts.get("ledger") or ():
        if set(entry) != {"what", "mechanism", "params"}:
            raise UsageError(f"ledger row {dict(entry)}: give what, mechanism and params")


def _need(facts: Mapping[str, Any], names: Sequence[str]) -> None:
    for name in names:
        if name not in facts or (facts[name] is None and name != "seed"):
            raise UsageError(f"fact {name!r} is missing ({FACTS[name]}); a card cannot do without")


def card(facts: Mapping[str, Any]) -> str:
    """Markdown model card with the front matter that model hubs read.

    Args:
        facts: Keys of `FACTS`. `name family epsilon delta data seed` are needed, with a finite ε
            also `unit relation accountant`; of all others the card says that they are not recorded
            or leaves the section's own text. Before an evaluation leave out `metrics` and `audit`.

    Raises:
        UsageError: See `check_facts`.
    """
    check_facts(facts)
    sections = (
        ("Purpose", [_said(facts, "purpose")]),
        ("Method", _method(facts)),
        ("Data", _data(facts)),
        ("Privacy", _privacy(facts)),
        ("What the guarantee does not cover", _bullets(not_covered(facts))),
        ("Noise and seeds", [noise_origin(facts)]),
        ("Quality", _quality(facts)),
        ("Attacks", _attacks(facts.get("audit"))),
        ("Intended use", _bullets((*INTENDED, *_more(facts, "intended_use")))),
        ("Forbidden use", _bullets((*FORBIDDEN, *_more(facts, "forbidden_use")))),
        ("Known limits", _bullets((*LIMITS, *_more(facts, "limits")))),
        ("Sign-off", _signatures(facts)),
    )
    lines = [*_front_matter(facts), "", f"# {markdown_text(facts['name'])}"]
    for heading, body in sections:
        lines += ["", f"## {heading}", "", *body]
    return "\n".join(lines) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> list[str]:
    """YAML; every text goes in as a JSON string, which YAML reads as it stands."""
    licence = facts.get("license") or "other"
    tags = ["synthetic-data", "tabular", facts["family"]]
    if math.isfinite(facts["epsilon"]):
        tags.append("differential-privacy")
    tags += [tag for tag in _more(facts, "tags") if tag not in tags]
    lines = ["---", f"license: {json.dumps(licence)}", "library_name: dpsynth", "tags:"]
    lines += [f"- {json.dumps(str(tag), ensure_ascii=False)}" for tag in tags]
    # In full digits, for whoever checks the card against the ledger. YAML reads 1e-05 as a text.
    claim = {"privacy": {name: float(facts[name]) for name in ("epsilon", "delta")}}
    return [*lines, *yaml.safe_dump(claim, sort_keys=False).splitlines(), "---"]


def _more(facts: Mapping[str, Any], name: str) -> Sequence[str]:
    return [str(text) for text in facts.get(name) or ()]


def _bullets(texts: Iterable[str]) -> list[str]:
    return [f"- {markdown_text(text)}" for text in texts]


def _said(facts: Mapping[str, Any], name: str) -> str:
    value = facts.get(name)
    if value is None:
        return NOT_RECORDED
    return markdown_text(f"{value:.6g}" if isinstance(value, float) else value)


def _method(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"A generator of the family **{markdown_text(facts['family'])}**, fitted to a discretised "
        "form of the table; rows are sampled from it and brought back under the schema.",
        "",
        f"- when to choose it: {_said(facts, 'suits')}",
        f"- code: dpsynth {_said(facts, 'version')}, commit {_said(facts, 'commit')}",
        f"- made: {_said(facts, 'created')}",
    ]


def _data(facts: Mapping[str, Any]) -> list[str]:
    return [
        f"- table: {markdown_text(facts['data'])}",
        f"- source and terms: {_said(facts, 'source')}",
        f"- sha256 of schema and rows: {_said(facts, 'data_sha256')}",
        f"- rows: {_said(facts, 'expected_rows')} declared as public; the true number is private "
        "and not stated",
        f"- columns: {_said(facts, 'columns')}; target: {_said(facts, 'target')}",
        f"- levels and bounds: {_said(facts, 'metadata')}",
    ]


def _privacy(facts: Mapping[str, Any]) -> list[str]:
    if math.isinf(facts["epsilon"]):
        return [
            "**No differential privacy (ε = ∞).** Nothing bounds what this model or its rows tell "
            "about a person in the table. Not for release; it serves as the end point of a "
            "comparison."
        ]
    version = facts.get("accountant_version")
    accountant = markdown_text(facts["accountant"]) + (
        f" {markdown_text(version)}" if version else f" (version {NOT_RECORDED})"
    )
    lines = [
        f"**ε = {facts['epsilon']:g} at δ = {facts['delta']:g}**",
        "",
        "| | |",
        "|---|---|",
        f"| unit | {_said(facts, 'unit')} |",
        f"| relation | {_said(facts, 'relation')} |",
        *(f"| {label} | {_said(facts, name)} |" for name, label in PARAMETERS),
        f"| accountant | {accountant} |",
        f"| cost of tuning | {_said(facts, 'tuning')} |",
    ]
    if (whole := sweep_cost(facts)) is not None:
        lines.append(f"| the whole sweep | {markdown_text(whole)} |")
    rows = ledger_rows(facts)
    if rows:
        lines += ["", "| paid for | mechanism | parameters |", "|---|---|---|"]
        lines += [f"| {' | '.join(map(markdown_text, row))} |" for row in rows]
    return lines


def sweep_cost(facts: Mapping[str, Any]) -> str | None:
    """What publishing this run's whole sweep spends, in one sentence, if it is known."""
    if facts.get("sweep_epsilon") is None:
        return None
    total, runs = facts["sweep_epsilon"], facts["sweep_runs"]
    budget = "∞" if math.isinf(total) else f"{total:.4g}"
    return (
        f"this run alone: ε = {facts['epsilon']:.4g}; all {runs} runs of its sweep published "
        f"together: ε = {budget}"
    )


def stated(text: str) -> dict[str, Any]:
    """What a card's text claims about privacy, for comparing it with a ledger.

    Returns:
        `epsilon` and `delta` of the front matter, `headline` if an ε is announced, the facts of the
        privacy table by their keys in `FACTS` (numbers as floats), and `ledger` as pairs of what
        was paid for and by which mechanism.

    Raises:
        UsageError: When the front matter cannot be read, or something is stated twice.
    """
    try:
        head = yaml.safe_load(text.split("---\n")[1])
        claims: dict[str, Any] = {name: head["privacy"][name] for name in ("epsilon", "delta")}
    except (IndexError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UsageError("card: its front matter states no privacy; write the card anew") from error
    labels = {label: name for name, label in (("unit", "unit"), ("relation", "relation"))}
    labels |= {label: name for name, label in PARAMETERS}
    ledger: list[tuple[str, ...]] = []
    lines = text.splitlines()
    for place, line in enumerate(lines):
        cells = _cells(line)
        if line.startswith("**ε = "):
            _claim(claims, "headline", line.strip("*"))
        elif len(cells) == 2 and cells[0] in labels:
            _claim(claims, labels[cells[0]], _number(cells[1]))
        elif cells == ["paid for", "mechanism", "parameters"]:
            rows = itertools.takewhile(lambda row: len(row) == 3, map(_cells, lines[place + 2 :]))
            ledger += [(row[0], row[1]) for row in rows]
    return {**claims, "ledger": ledger}


def _claim(claims: dict[str, Any], name: str, value: object) -> None:
    if name in claims:
        raise UsageError(f"card: states {name} twice, {claims[name]} and {value}")
    claims[name] = value


def _cells(line: str) -> list[str]:
    """Cells of a table's line, as they were before `markdown_text`; none elsewhere."""
    if not line.startswith("|"):
        return []
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    plain = (cell.strip().replace("\\|", "|").replace("&lt;", "<") for cell in cells)
    return [cell.replace("&amp;", "&") for cell in plain]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def ledger_rows(facts: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The ledger as texts: what was paid for, by which mechanism, with which parameters."""
    rows = []
    for entry in facts.get("ledger") or ():
        params = entry["params"]
        if isinstance(params, Mapping):
            params = ", ".join(f"{name} = {_short(value)}" for name, value in params.items())
        rows.append((str(entry["what"]), str(entry["mechanism"]), str(params)))
    return rows


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def not_covered(facts: Mapping[str, Any]) -> list[str]:
    """What ε says nothing about, in plain sentences."""
    if math.isinf(facts["epsilon"]):
        return ["Everything: there is no guarantee.", *_more(facts, "not_covered")]
    unit = (
        "A person with more than one record: the guarantee is for one, and weakens with every "
        "further one."
        if facts["unit"] == "record"
        else f"A person under more than one {facts['unit']}: the guarantee is for one of them."
    )
    return [unit, *COVERED_NOT, *_more(facts, "not_covered")]


def noise_origin(facts: Mapping[str, Any]) -> str:
    """One paragraph on where the randomness came from, and whether that allows a release."""
    seed = facts["seed"]
    if math.isinf(facts["epsilon"]):
        start = "OS entropy" if seed is None else f"the fixed seed {seed}"
        return f"No privacy noise was drawn. The run's other randomness started from {start}."
    if seed is None:
        source = f" ({facts['noise']})" if facts.get("noise") else ""
        return f"Unseeded: the noise{source} was started from OS entropy; no one can draw it again."
    return (
        f"**Reproducible noise: not for release.** The noise started from the fixed seed {seed}; "
        "whoever knows or guesses it can subtract the noise, and ε means nothing to them."
    )


def _quality(facts: Mapping[str, Any]) -> list[str]:
    metrics, floors = facts.get("metrics"), facts.get("floors") or {}
    thresholds = facts.get("thresholds") or {}
    if not metrics:
        return ["Not evaluated yet."]
    lines = [
        "Computed on private rows without noise: these figures are not differentially private. "
        "The floor is what real rows reach by the same measure; ↓ smaller is better.",
        "",
        "| metric | value | floor | asked for | met |",
        "|---|---|---|---|---|",
    ]
    for name, value in metrics.items():
        higher = higher_is_better(name)
        asked, met = "", ""
        if name in thresholds:
            limit = thresholds[name]
            asked = f"{'≥' if higher else '≤'} {limit:g}"
            met = "yes" if (value >= limit if higher else value <= limit) else "**no**"
        label = f"{markdown_text(name)} {'↑' if higher else '↓'}"
        lines.append(f"| {label} | {value:.4f} | {floors[name]:.4f} | {asked} | {met} |")
    unmet = [name for name in thresholds if name not in metrics]
    lines += [f"\nAsked for but not measured: {markdown_text(name)}." for name in unmet]
    return lines


def _attacks(audit: Audit | None) -> list[str]:
    if audit is None:
        return ["Not audited yet."]
    best = audit.strongest
    lines = [
        f"Could an attacker tell who was in the table? Strongest attack, {audit.chosen}: "
        f"**{markdown_text(best.name)}**. A know-nothing AUC lies "
        f"within {audit.null_low:.3f} to {audit.null_high:.3f}; a blind attacker who "
        f"never sees the output reached {audit.blind_auc:.3f}. Computed on private rows: not "
        "differentially private.",
        "",
        "| figure | measured | 95 % interval | ceiling of this run's ledger |",
        "|---|---|---|---|",
    ]
    for name, label in (("auc", "AUC"), ("tpr10", "TPR at 10 % FPR"), ("tpr1", "TPR at 1 % FPR")):
        value, low, high = (getattr(best, name + end) for end in ("", "_low", "_high"))
        ceiling = getattr(audit, f"ceiling_{name}")
        lines.append(f"| {label} | {value:.4f} | {low:.4f} to {high:.4f} | {ceiling:.4f} |")
    if audit.violation:
        lines += [
            "",
            "**An attack did better than the ledger allows. Do not use this run before the cause "
            "is found.**",
        ]
    lines += [
        "",
        "| attack, all candidates | AUC | TPR at 10 % | TPR at 1 % |",
        "|---|---|---|---|",
    ]
    for attack in audit.attacks:
        name = attack.name + (" (diagnostic, no privacy score)" if attack.diagnostic else "")
        figures = f"{attack.auc:.4f} | {attack.tpr10:.4f} | {attack.tpr1:.4f}"
        lines.append(f"| {markdown_text(name)} | {figures} |")
    return [*lines, "", *_bullets(audit.notes)]


def _signatures(facts: Mapping[str, Any]) -> list[str]:
    names = _more(facts, "reviewers") or ("data owner", "privacy reviewer", "domain reviewer")
    lines = ["| reviewer | decision | date | signature |", "|---|---|---|---|"]
    return [*lines, *(f"| {markdown_text(name)} | | | |" for name in names)]
