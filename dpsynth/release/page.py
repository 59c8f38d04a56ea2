"""The report page of one run: one HTML file that loads nothing, synthetic beside real."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.image import imsave

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation.fidelity import associations
from dpsynth.frontier.results import higher_is_better
from dpsynth.release.card import check_facts, ledger_rows, noise_origin, not_covered, sweep_cost
from dpsynth.schema import Column

if TYPE_CHECKING:
    from dpsynth.audit.membership import Audit
    from dpsynth.evaluation.report import Report

__all__ = ["Overlay", "Overlays", "overlays", "page"]

BINS = 24
SHOWN_LEVELS = 16
TAIL = 0.005
SYNTHETIC, REAL = "#0072B2", "#222222"
# The page may not ask for anything: a browser that keeps to this line refuses any request.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Overlay:
    """Shares of one column's bins or levels, missing values last if the column may have any.

    `real` is `None` where real rows are not shown.
    """

    name: str
    numeric: bool
    nullable: bool
    labels: tuple[str, ...]
    synthetic: tuple[float, ...]
    real: tuple[float, ...] | None = None


@dataclass(frozen=True, eq=False)
class Overlays:
    """What the page draws of the tables: one overlay a column, and association matrices."""

    columns: tuple[Overlay, ...]
    synthetic: np.ndarray
    real: np.ndarray | None = None

    def public(self) -> Overlays:
        """The same without anything computed from real rows."""
        columns = tuple(replace(column, real=None) for column in self.columns)
        return Overlays(columns, self.synthetic)


def overlays(train: Table | None, synthetic: Table) -> Overlays:
    """Histograms and associations of `synthetic` beside `train`; without `train`, alone.

    Bins and the choice of levels come from the schema and the synthetic rows only, so the
    synthetic side looks the same whether or not real rows are at hand.

    Raises:
        UsageError: When the tables have different columns.
    """
    if train is not None and train.schema.names != synthetic.schema.names:
        raise UsageError("overlays: the tables have different columns; bring both under one schema")
    shown = []
    for column in synthetic.schema.columns:
        labels, places = _bins(column, synthetic)
        shares = _shares(places(synthetic), len(labels))
        real = None if train is None else _shares(places(train), len(labels))
        shown.append(Overlay(column.name, column.numeric, column.nullable, labels, shares, real))
    real = None if train is None else associations(train)
    return Overlays(tuple(shown), associations(synthetic), real)


def _shares(places: np.ndarray, count: int) -> tuple[float, ...]:
    return tuple((np.bincount(places, minlength=count) / max(len(places), 1)).tolist())


def _bins(column: Column, synthetic: Table) -> tuple[tuple[str, ...], Any]:
    """Bin labels of a column, and a function from a table to each row's bin."""
    if not column.numeric:
        return _level_bins(column, synthetic)
    values = _numbers(synthetic, column.name)
    edges = _edges(column, values[~np.isnan(values)])
    if column.kind == "integer" and edges[1] - edges[0] == 1:
        labels = [f"{low:g}" for low in edges[:-1]]
    else:
        labels = [f"{low:g} to below {high:g}" for low, high in pairwise(edges)]
    labels[0], labels[-1] = f"below {edges[1]:g}", f"from {edges[-2]:g}"
    if column.nullable:
        labels.append("missing")

    def places(table: Table) -> np.ndarray:
        given = _numbers(table, column.name)
        inner = np.searchsorted(edges[1:-1], given, side="right")
        return np.where(np.isnan(given), len(edges) - 1, inner)

    return tuple(labels), places


def _numbers(table: Table, name: str) -> np.ndarray:
    return table.frame[name].to_numpy(dtype=float, na_value=np.nan)


def _edges(column: Column, present: np.ndarray) -> np.ndarray:
    """Equal bins over all but the outermost synthetic values; the end bins are open."""
    assert column.lower is not None and column.upper is not None
    low, high = column.lower, column.upper
    if len(present):
        inner = np.quantile(present, [TAIL, 1 - TAIL])
        if inner[0] < inner[1]:
            low, high = (float(end) for end in inner)
    if column.kind == "integer":
        low, high = math.floor(low), math.ceil(high)
        width = max(1, math.ceil((high - low + 1) / BINS))
        return np.arange(low, high + width + 1, width) - 0.0
    return np.linspace(low, high, BINS + 1)


def _level_bins(column: Column, synthetic: Table) -> tuple[tuple[str, ...], Any]:
    counts = np.bincount(_codes(synthetic, column) + 1, minlength=len(column.levels) + 1)[1:]
    kept = np.sort(np.argsort(-counts, kind="stable")[:SHOWN_LEVELS])
    labels = [column.levels[j] for j in kept]
    rest = len(column.levels) - len(kept)
    home = np.full(len(column.levels) + 1, len(kept))  # the rest; missing comes after it
    home[kept] = np.arange(len(kept))
    if rest:
        labels.append(f"{rest} further levels")
    home[-1] = len(labels)  # where the code -1 of a missing value lands
    if column.nullable:
        labels.append("missing")
    return tuple(labels), lambda table: home[_codes(table, column)]


def _codes(table: Table, column: Column) -> np.ndarray:
    return table.frame[column.name].cat.codes.to_numpy().astype(np.int64)


def page(
    facts: Mapping[str, Any],
    report: Report | None,
    audit: Audit | None,
    overlays: Overlays | None,
    *,
    private: bool = True,
) -> str:
    """The whole page.

    Args:
        facts: See `dpsynth.release.card.FACTS`; `metrics`, `floors` and `audit` in it are not used.
        report: The evaluation, if there is one.
        audit: The audit, if there is one.
        overlays: See `overlays`, if tables are at hand.
        private: Whether the page may show what was computed column by column from real rows. When
            false the real side of every plot, PSI and the figures by class are left out, also
            where `overlays` holds them.

    Raises:
        UsageError: On facts that a card refuses.
    """
    check_facts(facts)
    if overlays is not None and not private:
        overlays = overlays.public()
    title = html.escape(str(facts["name"]))
    body = [
        f"<h1>{title}</h1>",
        _banner(facts, private),
        _headline(facts, report, audit),
        _privacy(facts),
        _quality(report, private),
        _attacks(audit),
    ]
    if overlays is not None:
        psi = {} if report is None or not private else report.columns
        body += [_columns(overlays, psi), _associations(overlays)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body></html>\n"
    )


STYLE = """
body{font:15px/1.5 system-ui,"DejaVu Sans",sans-serif;color:#222;max-width:1100px;
margin:1.5rem auto;padding:0 1rem}
h2{margin-top:2.2rem;border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.2rem .8rem;text-align:left;
border-bottom:1px solid #e4e4e4;overflow-wrap:anywhere}td.n{text-align:right;
font-variant-numeric:tabular-nums}
.banner{border-left:5px solid #D55E00;background:#fdf1e8;padding:.6rem 1rem;margin:1rem 0}
.cards{display:flex;flex-wrap:wrap;gap:.8rem}.card{border:1px solid #ddd;border-radius:6px;
padding:.5rem .9rem;min-width:8.5rem}.card b{display:block;font-size:1.45rem}
.card small{color:#555}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600;overflow-wrap:anywhere}
figcaption small{font-weight:400;color:#555}
svg text{font:10px system-ui,"DejaVu Sans",sans-serif;fill:#333}
.maps{display:flex;flex-wrap:wrap;gap:1rem}.key{color:#555}
@media print{figure{break-inside:avoid}}
""".strip()


def _banner(facts: Mapping[str, Any], private: bool) -> str:
    if private:
        first = (
            "<strong>Internal.</strong> This page shows figures and plots computed from private "
            "rows without noise. They are not covered by the run's guarantee: whoever may not see "
            "the real table may not see this page."
        )
    else:
        first = (
            "Real rows are not drawn here. The figures of quality and attacks were computed on "
            "private rows without noise and are not differentially private."
        )
    lines = [first]
    if math.isinf(facts["epsilon"]):
        lines.append("<strong>No differential privacy (ε = ∞): not for release.</strong>")
    elif facts["seed"] is not None:
        lines.append("<strong>Reproducible noise: not for release.</strong>")
    return f'<div class="banner">{"<br>".join(lines)}</div>'


def _headline(facts: Mapping[str, Any], report: Report | None, audit: Audit | None) -> str:
    budget = "∞" if math.isinf(facts["epsilon"]) else f"{facts['epsilon']:g}"
    cards = [("ε", budget, f"δ = {facts['delta']:g}"), ("family", facts["family"], facts["data"])]
    if report is not None:
        wanted = (
            ("tvd2", "two-way error"),
            ("c2st_auc", "detection AUC"),
            ("tstr_gbt_auc", "utility AUC"),
            ("tstr_gbt_r2", "utility R²"),
        )
        for name, label in wanted:
            if name in report.metrics:
                floor = f"real rows {report.floors[name]:.3f}"
                cards.append((label, f"{report.metrics[name]:.3f}", floor))
    if audit is not None:
        best, ceiling = audit.strongest, audit.ceiling_auc
        cards.append(("strongest attack, AUC", f"{best.auc:.3f}", f"ceiling {ceiling:.3f}"))
        cards.append(("TPR at 1 % FPR", f"{best.tpr1:.3f}", f"ceiling {audit.ceiling_tpr1:.3f}"))
    shown = "".join(
        f'<div class="card"><small>{_text(label)}</small><b>{_text(value)}</b>'
        f"<small>{_text(note)}</small></div>"
        for label, value, note in cards
    )
    return f'<div class="cards">{shown}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a table; floats are right-aligned with four digits, all else is escaped text."""
    body = "".join("<tr>" + "".join(map(_table_cell, row)) + "</tr>" for row in rows)
    names = "".join(f"<th>{_text(name)}</th>" for name in head)
    return f"<table><tr>{names}</tr>{body}</table>"


def _table_cell(value: object) -> str:
    if isinstance(value, float):
        return f'<td class="n">{value:.4f}</td>'
    return f"<td>{_text(value)}</td>"


def _privacy(facts: Mapping[str, Any]) -> str:
    parts = ["<h2>Privacy</h2>"]
    if math.isfinite(facts["epsilon"]):
        version = facts.get("accountant_version") or "(version not recorded)"
        parts.append(
            f"<p>ε = {facts['epsilon']:g} at δ = {facts['delta']:g} for one "
            f"{_text(facts['unit'])} ({_text(facts['relation'])}), composed by "
            f"{_text(facts['accountant'])} {_text(version)}.</p>"
        )
        if (whole := sweep_cost(facts)) is not None:
            parts.append(f"<p>{_text(whole[0].upper() + whole[1:])}.</p>")
    parts.append(f"<p>{_text(noise_origin(facts).replace('**', ''))}</p>")
    rows = ledger_rows(facts)
    if rows:
        parts.append(_table(("paid for", "mechanism", "parameters"), rows))
    missing = "".join(f"<li>{_text(line)}</li>" for line in not_covered(facts))
    return "".join(parts) + f"<p>Not covered:</p><ul>{missing}</ul>"


def _quality(report: Report | None, private: bool) -> str:
    if report is None:
        return "<h2>Quality</h2><p>Not evaluated yet.</p>"
    rows = [
        (
            f"{name} {'↑' if higher_is_better(name) else '↓'}",
            float(value),
            float(report.floors[name]),
        )
        for name, value in report.metrics.items()
    ]
    notes = "".join(f"<li>{_text(note)}</li>" for note in report.notes)
    classes = _per_class(report.per_class) if private else ""
    return (
        "<h2>Quality</h2><p>The floor is what real rows reach by the same measure; ↓ smaller is "
        f"better.</p>{_table(('metric', 'value', 'floor'), rows)}{classes}<ul>{notes}</ul>"
    )


def _per_class(detail: Mapping[str, Any]) -> str:
    """Figures by class of each downstream model, and calibration where there are two classes."""
    parts = []
    for model, found in detail.items():
        levels = found["levels"]
        heads = list(next(iter(levels.values())))
        rows = [(level, *(figures[head] for head in heads)) for level, figures in levels.items()]
        parts.append(f"<h3>By class: {_text(model)}</h3>{_table(('class', *heads), rows)}")
        if found["calibration"]:
            parts.append(_calibration(found["calibration"]))
    return "".join(parts)


def _calibration(points: Sequence[Mapping[str, float]]) -> str:
    """Predicted against observed share of the positive class; the diagonal is perfect."""
    side = 150
    places = [(20 + side * p["predicted"], 5 + side * (1 - p["observed"])) for p in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{SYNTHETIC}"><title>'
        f"predicted {p['predicted']:.3f}, observed {p['observed']:.3f}, {p['rows']} rows"
        "</title></circle>"
        for (x, y), p in zip(places, points, strict=True)
    )
    parts = [
        f'<rect x="20" y="5" width="{side}" height="{side}" fill="none" stroke="#999"/>',
        f'<line x1="20" y1="{side + 5}" x2="{side + 20}" y2="5" stroke="#bbb"/>',
        f'<polyline points="{path}" fill="none" stroke="{SYNTHETIC}"/>{dots}',
        f'<text x="20" y="{side + 18}">predicted 0</text>',
        f'<text x="{side + 20}" y="{side + 18}" text-anchor="end">1</text>',
        f'<text transform="translate(14 {side + 5}) rotate(-90)">observed 0</text>',
    ]
    return f"<p>Calibration on real rows:</p>{_svg(side + 30, side + 25, parts, 'calibration')}"


def _attacks(audit: Audit | None) -> str:
    if audit is None:
        return "<h2>Attacks</h2><p>Not audited yet.</p>"
    best = audit.strongest
    figures = [
        (label, *(float(getattr(best, name + end)) for end in ("", "_low", "_high")),
         float(getattr(audit, f"ceiling_{name}")))
        for name, label in (("auc", "AUC"), ("tpr10", "TPR at 10 %"), ("tpr1", "TPR at 1 %"))
    ]  # fmt: skip
    every = [
        (a.name + (" (diagnostic)" if a.diagnostic else ""), a.auc, a.auc_low, a.auc_high,
         a.tpr10, a.tpr1)
        for a in audit.attacks
    ]  # fmt: skip
    notes = "".join(f"<li>{_text(note)}</li>" for note in audit.notes)
    alarm = (
        '<div class="banner"><strong>An attack did better than the ledger allows.</strong> Do not '
        "use this run before the cause is found.</div>"
    )
    return (
        f"<h2>Attacks</h2>{alarm if audit.violation else ''}<p>Strongest, {audit.chosen}: "
        f"<strong>{_text(best.name)}</strong>. A know-nothing AUC lies "
        f"within {audit.null_low:.3f} to {audit.null_high:.3f}; a blind "
        f"attacker reached {audit.blind_auc:.3f}.</p>"
        + _table(("strongest", "measured", "low", "high", "ceiling"), figures)
        + "<p>Every attack, on all candidates:</p>"
        + _table(("attack", "AUC", "low", "high", "TPR at 10 %", "TPR at 1 %"), every)
        + f"<ul>{notes}</ul>"
    )


# --- plots ----------------------------------------------------------------------------------------


def _columns(shown: Overlays, psi: Mapping[str, Mapping[str, float]]) -> str:
    figures = "".join(_column(column, psi.get(column.name, {})) for column in shown.columns)
    legend = f'<span style="color:{SYNTHETIC}">■</span> synthetic'
    if shown.real is not None:
        legend += f' &nbsp; <span style="color:{REAL}">□</span> real'
    scale = ""
    if psi:
        scale = (
            " PSI is the population stability index: below .1 a column is commonly taken as stable,"
            " above .25 as shifted."
        )
    return (
        f'<h2>Columns</h2><p class="key">{legend}. Bars are shares of rows; end bins are open.'
        f'{scale}</p><div class="grid">{figures}</div>'
    )


def _column(column: Overlay, detail: Mapping[str, float]) -> str:
    psi = f" <small>PSI {detail['psi']:.3f}</small>" if "psi" in detail else ""
    draw = _histogram if column.numeric else _level_bars
    return f"<figure><figcaption>{_text(column.name)}{psi}</figcaption>{draw(column)}</figure>"


def _title(column: Overlay, j: int) -> str:
    said = f"{column.labels[j]}: synthetic {column.synthetic[j]:.2%}"
    if column.real is not None:
        said += f", real {column.real[j]:.2%}"
    return f"<title>{_text(said)}</title>"


def _peak(column: Overlay) -> float:
    return max((*column.synthetic, *(column.real or ()), 1e-9))


def _histogram(column: Overlay) -> str:
    """Upright bars, the missing ones set apart at the right."""
    width, height, base = 310, 130, 110
    count, peak = len(column.labels), _peak(column)
    apart = 10 if column.nullable else 0
    step = (width - 4 - apart) / count
    parts = []
    for j in range(count):
        x = 2 + j * step + (apart if j == count - 1 else 0)
        tall = base * column.synthetic[j] / peak * 0.95
        bar = f'x="{x:.1f}" width="{step * 0.86:.1f}"'
        parts.append(f'<g>{_title(column, j)}<rect {bar} y="{base - tall:.1f}" '
                     f'height="{tall:.1f}" fill="{SYNTHETIC}" fill-opacity=".75"/>')  # fmt: skip
        if column.real is not None:
            tall = base * column.real[j] / peak * 0.95
            parts.append(f'<rect {bar} y="{base - tall:.1f}" height="{tall:.1f}" fill="none" '
                         f'stroke="{REAL}"/>')  # fmt: skip
        parts.append("</g>")
    ends = [(2, "start", column.labels[0]), (width - 2, "end", column.labels[-1])]
    if column.nullable:
        ends = [ends[0], (width - 12 - step, "end", column.labels[-2]), (width, "end", "NA")]
    parts += [
        f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{_text(label)}</text>'
        for x, anchor, label in ends
    ]
    parts.append(f'<line x1="0" x2="{width}" y1="{base}" y2="{base}" stroke="#999"/>')
    return _svg(width, height, parts, column.name)


def _level_bars(column: Overlay) -> str:
    """Lying bars, so that names of levels can be read."""
    width, left, step = 310, 118, 15
    peak = _peak(column)
    parts = []
    for j, label in enumerate(column.labels):
        y = 2 + j * step
        name = label if len(label) <= 19 else label[:18] + "…"
        parts.append(f'<g>{_title(column, j)}<text x="{left - 5}" y="{y + 10}" '
                     f'text-anchor="end">{_text(name)}</text>')  # fmt: skip
        bar = f'x="{left}" y="{y}" height="{step - 4}"'
        wide = (width - left - 3) * column.synthetic[j] / peak
        parts.append(f'<rect {bar} width="{wide:.1f}" fill="{SYNTHETIC}" fill-opacity=".75"/>')
        if column.real is not None:
            wide = (width - left - 3) * column.real[j] / peak
            parts.append(f'<rect {bar} width="{wide:.1f}" fill="none" stroke="{REAL}"/>')
        parts.append("</g>")
    return _svg(width, 4 + step * len(column.labels), parts, column.name)


def _svg(width: float, height: float, parts: Iterable[str], name: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{_text(name)}">{"".join(parts)}</svg>'
    )


def _associations(shown: Overlays) -> str:
    names = [column.name for column in shown.columns]
    maps = [_heat_map("synthetic", shown.synthetic, names, 1.0)]
    if shown.real is not None:
        maps.insert(0, _heat_map("real", shown.real, names, 1.0))
        maps.append(_heat_map("synthetic − real", shown.synthetic - shown.real, names, 0.3))
    return (
        '<h2>Associations</h2><p class="key">Two numbers: correlation; number and category: '
        "correlation ratio; two categories: Cramér's V, corrected for size. Blue is below 0, red "
        f'above; the scale ends at the number given.</p><div class="maps">{"".join(maps)}</div>'
    )


def _heat_map(title: str, matrix: np.ndarray, names: Sequence[str], limit: float) -> str:
    """A matrix as a tiny picture, enlarged without smoothing, with names where they fit."""
    colours = mpl.colormaps["RdBu_r"](np.clip(matrix / limit, -1, 1) / 2 + 0.5)
    picture = BytesIO()
    imsave(picture, colours, format="png", metadata={"Software": ""})
    data = base64.b64encode(picture.getvalue()).decode()
    count = len(names)
    size = 230
    step, margin = size / count, 96 if count <= 30 else 4
    parts = [
        f'<image x="{margin}" y="2" width="{size}" height="{size}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    ]
    if count <= 30:
        for j, name in enumerate(names):
            short = _text(name if len(name) <= 15 else name[:14] + "…")
            middle = 2 + (j + 0.5) * step
            parts.append(
                f'<text x="{margin - 4}" y="{middle + 3:.1f}" text-anchor="end">{short}</text>'
            )
            across = margin - 2 + middle
            parts.append(f'<text transform="translate({across + 3:.1f} {size + 6}) rotate(-90)" '
                         f'text-anchor="end">{short}</text>')  # fmt: skip
    drawn = _svg(margin + size + 4, size + margin + 4, parts, title)
    return (
        f"<figure><figcaption>{_text(title)} <small>±{limit:g}</small></figcaption>{drawn}</figure>"
    )
