"""Results of a sweep: one strict row a run, intervals over seeds, and what is not dominated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from dpsynth.artifacts import read_folder
from dpsynth.checks import UsageError, check_choice, check_positive
from dpsynth.data import read_frame, write_frame
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.together import Group, Release, Together

if TYPE_CHECKING:
    from dpsynth.audit.membership import Audit
    from dpsynth.evaluation.report import Report

__all__ = [
    "AUDIT",
    "IDENTITY",
    "ROLES",
    "TOGETHER_HEAD",
    "Fall",
    "aggregate",
    "check",
    "collect",
    "falls",
    "higher_is_better",
    "interval",
    "markdown_text",
    "metric_names",
    "non_dominated",
    "read",
    "releases",
    "row",
    "summary",
    "together_rows",
    "violations",
    "write",
]

ROLES = ("model", "baseline", "control")
IDENTITY = ("family", "role", "epsilon", "delta", "seed", "run")
STRONGEST = ("auc", "auc_low", "auc_high", "tpr10", "tpr1", "tpr1_low", "tpr1_high")
BOUNDS = ("null_low", "null_high", "ceiling_auc", "ceiling_tpr10", "ceiling_tpr1")
AUDIT = ("attack", *(f"attack_{name}" for name in STRONGEST), *BOUNDS)
FLOOR = "floor_"
# Everything that measures an error or a distance; scores (AUC of TSTR, accuracy, …) are the rest.
DISTANCES = ("tvd1", "tvd2", "tvd3", "ks", "wasserstein", "correlation_difference", "c2st_auc")
ERROR_ENDINGS = ("_log_loss", "_rmse", "_brier", "_ece")


def row(report: Report, audit: Audit, facts: Mapping[str, Any]) -> dict[str, Any]:
    """One run as one flat row.

    Args:
        report: Its metrics and their floors (the same keys).
        audit: Its audit.
        facts: `family role epsilon delta seed run`; other keys are not looked at. `seed` is `None`
            for a run whose noise came from OS entropy, `epsilon` is `inf` without privacy.

    Raises:
        UsageError: When a fact, a metric or a floor is missing or is not a finite number.
    """
    for name in IDENTITY:
        if name not in facts:
            raise UsageError(f"facts of a result: {name!r} is missing; give {', '.join(IDENTITY)}")
    _check_identity(facts)
    metrics, floors = dict(report.metrics), dict(report.floors)
    for name in DISTANCES:
        if name not in metrics:
            raise UsageError(f"run {facts['run']}: metric {name!r} is missing; evaluate it again")
    for name in metrics:
        if name not in floors:
            raise UsageError(f"run {facts['run']}: metric {name!r} has no floor; evaluate it again")
    measured = {name: float(value) for name, value in metrics.items()}
    measured |= {FLOOR + name: float(floors[name]) for name in metrics}
    strongest = audit.strongest
    measured |= {f"attack_{name}": float(getattr(strongest, name)) for name in STRONGEST}
    measured |= {name: float(getattr(audit, name)) for name in BOUNDS}
    for name, value in measured.items():
        if not math.isfinite(value):
            raise UsageError(f"run {facts['run']}: {name}={value}: must be a finite number")
    identity = {name: facts[name] for name in IDENTITY}
    return {**identity, **measured, "attack": str(strongest.name)}


def _check_identity(facts: Mapping[str, Any]) -> None:
    for name in ("family", "run"):
        if not isinstance(facts[name], str) or not facts[name]:
            raise UsageError(f"{name}={facts[name]!r}: must be a name")
    check_choice("role", facts["role"], ROLES)
    check_positive("epsilon", facts["epsilon"], allow_inf=True)
    if not 0 <= facts["delta"] <= 1:
        raise UsageError(f"delta={facts['delta']}: must lie between 0 and 1")
    if facts["role"] == "control" and math.isfinite(facts["epsilon"]):
        raise UsageError(
            f"epsilon={facts['epsilon']}: a control holds real rows and has no guarantee; give inf"
        )


def metric_names(results: pd.DataFrame) -> list[str]:
    """The metrics of a results frame, in its order."""
    return [name for name in results.columns if FLOOR + name in results.columns]


def collect(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a checked frame: identity first, then metrics, floors and the audit."""
    frame = pd.DataFrame([dict(each) for each in rows])
    for name in (*IDENTITY, *AUDIT):
        if name not in frame:
            raise UsageError(f"results: column {name!r} is missing; build rows with `row`")
    middle = [name for name in frame.columns if name not in (*IDENTITY, *AUDIT)]
    frame = frame[[*IDENTITY, *middle, *AUDIT]]
    frame = frame.assign(seed=frame["seed"].astype("Int64"), epsilon=frame["epsilon"].astype(float))
    return check(frame)


def check(results: pd.DataFrame) -> pd.DataFrame:
    """The same frame, once it has every column, no gap but an unset seed, and no run twice."""
    for name in (*IDENTITY, *DISTANCES, *AUDIT):
        if name not in results.columns:
            raise UsageError(f"results: column {name!r} is missing; build rows with `row`")
    if results.empty:
        raise UsageError("results: no rows; finish at least one run")
    for name in results.columns:
        gaps = results[name].isna()
        if name != "seed" and gaps.any():
            run = results.loc[gaps, "run"].iloc[0]
            raise UsageError(f"run {run}: {name!r} is missing; evaluate all runs the same way")
    repeated = results["run"].duplicated()
    if repeated.any():
        raise UsageError(f"run {results.loc[repeated, 'run'].iloc[0]}: listed twice; keep one")
    return results


def read(path: str | Path) -> pd.DataFrame:
    """Read results: a Parquet file, or a folder whose Parquet files are all results."""
    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UsageError(f"results {str(path)!r}: no Parquet file in this folder")
    parts = []
    for file in files:
        part = read_frame(file)
        if not {*IDENTITY, *AUDIT} <= set(part.columns):
            raise UsageError(f"results {str(file)!r}: not a file of results; move it elsewhere")
        parts.append(part.assign(seed=part["seed"].astype("Int64")))
    return check(pd.concat(parts, ignore_index=True))


def write(frame: pd.DataFrame, path: str | Path) -> None:
    """Write checked results as Parquet or CSV, whole or not at all."""
    write_frame(check(frame), path)


def interval(values: Sequence[float] | np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % t-interval `(mean, low, high)`; one value is its own interval."""
    array = np.asarray(values, dtype=float)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean, mean - half, mean + half


def aggregate(results: pd.DataFrame, x: str = "tvd2") -> pd.DataFrame:
    """One point a (role, family, epsilon): means over seeds with 95 % t-intervals.

    Columns: `role family epsilon seeds`, then `x attack_auc attack_tpr10 attack_tpr1` each with
    `_low` and `_high`, `floor_x`, `null_low null_high` (the widest band) and
    `ceiling_auc ceiling_tpr10 ceiling_tpr1` (the largest). With one seed nothing is known about
    the spread: `x` gets no width, AUC and TPR@1 % get the attack's own interval. Intervals are as
    computed and may leave [0, 1].

    Raises:
        UsageError: When `x` is not a metric of these results.
    """
    check_choice("metric", x, metric_names(results))
    points = []
    for (role, family, epsilon), group in results.groupby(["role", "family", "epsilon"]):
        point: dict[str, Any] = {"role": role, "family": family, "epsilon": epsilon}
        point["seeds"] = len(group)
        for name, source in {"x": x, **{a: a for a in AUDIT if a in _Y}}.items():
            mean, low, high = interval(group[source].to_numpy())
            if len(group) == 1 and f"{source}_low" in group:
                low, high = (float(group[f"{source}_{end}"].iloc[0]) for end in ("low", "high"))
            point |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        point["floor_x"] = group[FLOOR + x].mean()
        point |= {"null_low": group["null_low"].min(), "null_high": group["null_high"].max()}
        point |= {name: group[name].max() for name in BOUNDS if name.startswith("ceiling")}
        points.append(point)
    frame = pd.DataFrame(points)
    order = frame["role"].map(ROLES.index)
    return frame.iloc[np.lexsort((frame["epsilon"], frame["family"], order))].reset_index(drop=True)


_Y = ("attack_auc", "attack_tpr10", "attack_tpr1")


def non_dominated(points: pd.DataFrame) -> pd.Series:
    """Which aggregated points no other beats; only `model` rows compete, others are `False`.

    A point is beaten when another has `x` and `attack_auc` both at most as large and one of them
    smaller. Pass one family's points for its own staircase. Means are compared: two points whose
    intervals overlap may well change places with other seeds.
    """
    kept = pd.Series(False, index=points.index)
    models = points[points["role"] == "model"].sort_values(["x", "attack_auc"], kind="stable")
    best, at = math.inf, math.nan
    for label, error, risk in zip(models.index, models["x"], models["attack_auc"], strict=True):
        # Sorted by error: a point survives if it lowers the risk, or repeats the last survivor.
        if risk < best or (risk == best and error == at):
            kept[label], best, at = True, risk, error
    return kept


def higher_is_better(metric: str) -> bool:
    """Whether a larger value of `metric` is the better one."""
    return not (metric in DISTANCES or metric.endswith(ERROR_ENDINGS))


@dataclass(frozen=True)
class Fall:
    """A family that did worse with more budget, by more than its intervals explain.

    Attributes:
        family: Whose points these are.
        lower: The smaller ε and `before`, the mean there.
        upper: The larger ε and `after`, the worse mean there.
        seeds: The smaller number of seeds of the two; at 1 there is no interval to go by.
    """

    family: str
    lower: float
    upper: float
    before: float
    after: float
    seeds: int


def falls(results: pd.DataFrame, metric: str) -> list[Fall]:
    """Pairs of ε at which a model family's `metric` worsens although ε rises.

    A pair counts when the two 95 % intervals over seeds do not meet. More budget should not hurt:
    a fall points at tuning that was done at one ε only, or at training that overfits.
    """
    sign = 1 if higher_is_better(metric) else -1
    points = aggregate(results, metric)
    found = []
    for family, group in points[points["role"] == "model"].groupby("family"):
        rows = list(cast(Iterable[Any], group.sort_values("epsilon").itertuples()))
        for i, before in enumerate(rows):
            for after in rows[i + 1 :]:
                worst = before.x_low if sign > 0 else before.x_high
                best = after.x_high if sign > 0 else after.x_low
                if sign * (worst - best) > 0:
                    seeds = min(before.seeds, after.seeds)
                    ends = (before.epsilon, after.epsilon, before.x, after.x)
                    found.append(Fall(str(family), *ends, seeds))
    return found


def violations(results: pd.DataFrame) -> pd.DataFrame:
    """Runs whose AUC interval lies wholly above the ceiling their own ledger implies.

    TPR is left to the audit itself: the FPR of its threshold is an estimate too, so holding it
    against the ceiling at exactly 1 % would raise false alarms.
    """
    return results[results["attack_auc_low"] > results["ceiling_auc"]]


def releases(folders: Iterable[Path]) -> list[Release]:
    """What each run folder would publish, for composing them (`dpsynth.privacy.together`).

    Raises:
        UsageError: On a folder that is damaged or no run.
    """
    found = []
    for folder in folders:
        files, _ = read_folder(folder)
        if "ledger.json" not in files or "config.yaml" not in files:
            raise UsageError(f"run {str(folder)!r}: has no ledger; give run folders")
        ledger = Ledger.from_json(files["ledger.json"].decode())
        plan = yaml.safe_load(files["config.yaml"])["plan"]
        found.append(
            Release(
                name=folder.name,
                target=plan["epsilon"],
                delta=ledger.delta,
                events=ledger.events,
                spent=len(plan.get("spent") or ()),
                unit=ledger.unit,
                contributions=ledger.contributions,
                content=json.dumps(dict(ledger.seal), sort_keys=True),
            )
        )
    return found


def summary(results: pd.DataFrame, *, title: str, together: Together | None = None) -> str:
    """Markdown card of a sweep: every metric with its interval, ceilings, and what looks odd.

    Args:
        results: See `collect`.
        title: Heading.
        together: What all of these runs cost together, if it is to be said.
    """
    metrics = metric_names(check(results))
    points = aggregate(results)
    band = f"{points['null_low'].min():.3f} to {points['null_high'].max():.3f}"
    lines = [f"# {markdown_text(title)}", "", *_SUMMARY_HEAD.splitlines(), ""]
    lines += ["## Audit", "", f"Null band of the AUC (nobody is told apart): {band}.", ""]
    lines += _audit_table(points)
    lines += ["", "## Metrics", "", *_metrics_table(results, metrics)]
    lines += ["", "## Where more budget did worse", "", *_falls_lines(results, metrics)]
    lines += ["", "## Ceilings broken", "", *_violation_lines(results)]
    if together is not None:
        lines += ["", "## Publishing and choosing", "", *_together_lines(together)]
    return "\n".join(lines) + "\n"


_SUMMARY_HEAD = """\
Each line is a mean over seeds, with its 95 % t-interval in brackets. With one seed a metric has no
interval, and the audit shows the attack's own. `frontier.parquet` and `frontier.csv` hold one row a
run. Attack figures are those of the strongest attack, chosen on one half of the candidates and
measured on the other. A ceiling is the most that any attack could reach if the run's ledger holds.

Metrics and audits were computed on private rows and carry no guarantee of their own. Choosing a
run by them spends budget that ε does not count. Points on the frontier are told apart by means:
where intervals overlap, other seeds may order them differently."""


TOGETHER_HEAD = (
    "target ε",
    "runs",
    "one alone",
    "all together",
    "all and a choice",
    "the best alone",
)


def together_rows(together: Together) -> list[tuple[str, ...]]:
    """What publishing and choosing cost: rows under `TOGETHER_HEAD`, one a target ε and a total."""
    rows = [(f"{group.target:g}", group) for group in together.groups]
    alone, whole = together.alone, together.epsilon
    everything = Group(math.inf, together.runs, alone, whole, together.chosen, together.selected)
    return [
        (name, str(g.runs), *(f"{v:.4g}" for v in (g.alone, g.together, g.chosen, g.selected)))
        for name, g in [*rows, ("all", everything)]
    ]


def _together_lines(together: Together) -> list[str]:
    lines = [
        f"ε at δ={together.delta:g} of runs on the same members. *All together*: every run of the "
        "line is published. *All and a choice*: each is also scored with noise. *The best alone*: "
        "a random number of trials, as many expected, of which only the best is ever seen "
        "(repeat and select).",
        "",
        "| " + " | ".join(TOGETHER_HEAD) + " |",
        "|" + "---|" * len(TOGETHER_HEAD),
        *("| " + " | ".join(row) + " |" for row in together_rows(together)),
        "",
        f"All together: μ = {together.mu:.4g}, largest membership advantage "
        f"{together.advantage:.4f}, second accountant ε = {together.second:.4g}.",
    ]
    if together.unprotected:
        lines += ["", f"{together.unprotected} runs at ε=∞ beside them are protected by nothing."]
    return lines


def markdown_text(text: object) -> str:
    """Text that cannot open a table cell, a line or an HTML element of its own."""
    plain = " ".join(str(text).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _name(point: Any) -> str:
    budget = "∞" if math.isinf(point.epsilon) else f"{point.epsilon:g}"
    return f"| {markdown_text(point.family)} | {point.role} | {budget} | {point.seeds} "


def _span(point: Any, name: str, digits: int) -> str:
    mean, low, high = (getattr(point, name + end) for end in ("", "_low", "_high"))
    if low == high:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _audit_table(points: pd.DataFrame) -> list[str]:
    lines = [
        "| family | role | ε | seeds | AUC | ceiling | TPR at 1 % | ceiling | TPR at 10 % "
        "| ceiling | on the frontier |",
        "|" + "---|" * 11,
    ]
    best = non_dominated(points)
    for point, kept in zip(cast(Iterable[Any], points.itertuples()), best, strict=True):
        lines.append(
            f"{_name(point)}| {_span(point, 'attack_auc', 3)} | {point.ceiling_auc:.3f} "
            f"| {_span(point, 'attack_tpr1', 4)} | {point.ceiling_tpr1:.4f} "
            f"| {_span(point, 'attack_tpr10', 3)} | {point.ceiling_tpr10:.3f} "
            f"| {'yes' if kept else ''} |"
        )
    return lines


def _metrics_table(results: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    tables = {name: aggregate(results, name) for name in metrics}
    heads = [f"{name} {'↑' if higher_is_better(name) else '↓'}" for name in metrics]
    lines = [
        f"| family | role | ε | seeds | {' | '.join(map(markdown_text, heads))} |",
        "|" + "---|" * (4 + len(metrics)),
    ]
    floors = " | ".join(f"{results[FLOOR + name].mean():.4f}" for name in metrics)
    lines.append(f"| *real rows (floor)* | | | | {floors} |")
    spans = {
        name: [_span(point, "x", 4) for point in cast(Iterable[Any], table.itertuples())]
        for name, table in tables.items()
    }
    for i, point in enumerate(cast(Iterable[Any], tables[metrics[0]].itertuples())):
        lines.append(f"{_name(point)}| {' | '.join(spans[name][i] for name in metrics)} |")
    return lines


def _falls_lines(results: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    lines = [
        f"- {markdown_text(fall.family)}, {markdown_text(name)}: {fall.before:.4f} at "
        f"ε={fall.lower:g}, {fall.after:.4f} at ε={fall.upper:g} ({fall.seeds} seeds)"
        for name in metrics
        for fall in falls(results, name)
    ]
    return lines or ["Nowhere, beyond the intervals over seeds."]


def _violation_lines(results: pd.DataFrame) -> list[str]:
    lines = [
        f"- {markdown_text(run.run)}: AUC at least {run.attack_auc_low:.3f}, "
        f"ceiling {run.ceiling_auc:.3f}"
        for run in cast(Iterable[Any], violations(results).itertuples())
    ]
    return lines or ["None: no attack's interval lies above its run's own ceiling."]
