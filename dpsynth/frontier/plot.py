"""The frontier drawn: a figure for print, the same to hover over, and the folder of both."""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from matplotlib.transforms import Bbox
from plotly.subplots import make_subplots

from dpsynth.checks import UsageError
from dpsynth.frontier.results import (
    TOGETHER_HEAD,
    aggregate,
    check,
    falls,
    higher_is_better,
    metric_names,
    non_dominated,
    summary,
    together_rows,
    violations,
    write,
)
from dpsynth.privacy.together import Together

__all__ = ["figure", "interactive", "utility_metric", "write_frontier"]

MILLIMETRE = 1 / 25.4
_HALO = withStroke(linewidth=1.4, foreground="white")
SIZE = (180 * MILLIMETRE, 138 * MILLIMETRE)
# Okabe and Ito's colours, told apart by colour-blind readers; markers and dashes carry the same
# distinction into a grey print.
FAMILIES = (
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", (0, (4, 1.5))),
    ("#009E73", "^", (0, (4, 1.2, 1, 1.2))),
    ("#CC79A7", "D", (0, (1, 1))),
    ("#E69F00", "v", (0, (6, 1))),
    ("#56B4E9", "p", (0, (2, 1))),
)
BASELINES = ("o", "s", "D", "^", "v", "p", "h")
CONTROLS = (("#000000", "x"), ("#777777", "P"), ("#000000", "*"), ("#777777", "X"))
KNOWN = ("vae", "gan", "diffusion", "fresh", "p-leak", "copy")
RC: Any = {
    "font.size": 7,
    "font.family": "DejaVu Sans",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.labelsize": 7,
    "axes.titlesize": 7.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "dpsynth",
}
NAMES = {
    "tvd1": "one-way marginals, total variation distance",
    "tvd2": "two-way marginals, total variation distance",
    "tvd3": "three-way marginals, total variation distance",
    "tstr_gbt_auc": "AUC on real rows (boosted trees)",
    "tstr_gbt_r2": "R² on real rows (boosted trees)",
    "c2st_auc": "real-versus-synthetic AUC",
}
PLOTLY_MARKERS = {
    **{"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down"},
    **{"p": "pentagon", "h": "hexagon", "x": "x-thin", "P": "cross", "*": "star", "X": "x"},
}
PLOTLY_DASHES = ("solid", "dash", "dashdot", "dot", "longdash", "longdashdot")


@dataclass(frozen=True)
class _Style:
    """How one family is drawn."""

    label: str
    role: str
    colour: str
    marker: str
    line: Any
    dash: str

    @property
    def face(self) -> str:
        return "white" if self.role == "baseline" else self.colour

    def handle(self) -> Line2D:
        """Legend entry."""
        line = self.line if self.role == "model" else "none"
        return Line2D([], [], linestyle=line, linewidth=1, label=_plain(self.label), **self.point())

    def point(self, size: float = 4.0) -> dict[str, Any]:
        """Marker settings; stars and crosses look smaller than discs of the same size."""
        grown = size * (1.5 if self.marker in "*xPX" else 1)
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": grown,
            "markerfacecolor": self.face,
            "markeredgecolor": "white" if self.role == "model" else self.colour,
            "markeredgewidth": {"model": 0.4, "baseline": 0.9, "control": 1.1}[self.role]
            if self.marker not in "*P"
            else 0.4,
        }


def _styles(points: pd.DataFrame) -> dict[tuple[str, str], _Style]:
    found = {}
    for role in ("model", "baseline", "control"):
        names = sorted(set(points.loc[points["role"] == role, "family"]), key=_known_first)
        for i, name in enumerate(names):
            if role == "model":
                colour, marker, line = FAMILIES[i % len(FAMILIES)]
            elif role == "baseline":
                colour, marker, line = "#444444", BASELINES[i % len(BASELINES)], "none"
            else:
                (colour, marker), line = CONTROLS[i % len(CONTROLS)], "none"
            label = name if role == "model" else f"{name} ({role})"
            dash = PLOTLY_DASHES[i % len(PLOTLY_DASHES)]
            found[role, name] = _Style(label, role, colour, marker, line, dash)
    return found


def _known_first(name: str) -> tuple[int, str]:
    for i, known in enumerate(KNOWN):
        if name.replace("_", "-").startswith(known):
            return i, name
    return len(KNOWN), name


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics, nor a legend for hidden."""
    return text.replace("$", r"\$").lstrip("_")


def _epsilon(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:g}"


def utility_metric(results: pd.DataFrame) -> str:
    """What stands for utility: a downstream task's score, or detection where there is no target."""
    for name in ("tstr_gbt_auc", "tstr_gbt_r2"):
        if name in metric_names(results):
            return name
    return "c2st_auc"


def _subtitle(results: pd.DataFrame) -> str:
    private = results[np.isfinite(results["epsilon"]) & (results["role"] == "model")]
    deltas = sorted(set((private if len(private) else results)["delta"]))
    counts = aggregate(results)
    seeds = counts.loc[counts["role"] == "model", "seeds"]
    said = "δ = " + ", ".join(f"{delta:g}" for delta in deltas)
    if seeds.empty:
        return said
    span = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    if seeds.max() == 1:
        return f"{said}; one seed, bars are the attack's own 95 % intervals"
    return f"{said}; {span} seeds, bars are 95 % t-intervals over seeds"


# --- the printed figure ---------------------------------------------------------------------------


def figure(results: pd.DataFrame, *, x: str = "tvd2", title: str = "") -> Figure:
    """Draw the frontier at 180 mm width.

    Panel a: `x` against the strongest attack's AUC on held-out candidates, in two stacked parts
    where a control lies far above the models. Panel b: its TPR at 1 % FPR. Panel c: utility.

    Args:
        results: Checked rows (see `dpsynth.frontier.results`).
        x: An error, smaller is better.
        title: Table name, unit and relation; δ and the number of seeds are added.

    Raises:
        UsageError: When `x` is a score instead of an error, or the results are incomplete.
    """
    points, styles = _prepare(results, x)
    with mpl.rc_context(RC):
        drawn = Figure(figsize=SIZE)
        FigureCanvasAgg(drawn)
        lower, upper = _limits(points)
        handles = _legend_handles(results, styles)
        bottom = 0.1 + 0.0245 * math.ceil(len(handles) / 4)
        outer = drawn.add_gridspec(
            *(1, 2), width_ratios=[1.42, 1], wspace=0.24,
            left=0.075, right=0.985, top=0.885, bottom=bottom,
        )  # fmt: skip
        _panel_frontier(drawn, outer[0], points, styles, x, lower, upper)
        right = outer[1].subgridspec(2, 1, hspace=0.22)
        top, under = drawn.add_subplot(right[0]), drawn.add_subplot(right[1])
        _panel_tpr(top, points, styles)
        _panel_utility(under, results, styles)
        drawn.legend(
            handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.005), ncols=4,
            frameon=False, handlelength=2.6, columnspacing=1.6, borderpad=0,
        )  # fmt: skip
        drawn.text(0.012, 0.985, _plain(title), fontsize=9, fontweight="bold", va="top")
        drawn.text(
            0.012,
            0.948,
            f"{_subtitle(results)}; numbers in a are ε",
            fontsize=7,
            va="top",
            color="#444444",
        )
        return drawn


def _prepare(results: pd.DataFrame, x: str) -> tuple[pd.DataFrame, dict[tuple[str, str], _Style]]:
    if higher_is_better(x):
        raise UsageError(f"x={x}: larger is better; the frontier needs an error such as tvd2")
    points = aggregate(check(results), x)
    return points, _styles(points)


def _limits(points: pd.DataFrame) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """AUC range of the main part, and of an upper strip if a gap above the models is wide.

    The break goes into the first gap that is at least as wide as all that lies below it, so that
    a control near 1 does not squeeze the models into a line.
    """
    # Two seeds give intervals twelve standard errors wide: bars may leave the frame, means may not.
    arm = points["null_high"].max() - points["null_low"].min()
    lows = points["attack_auc_low"].clip(lower=points["attack_auc"] - arm)
    highs = points["attack_auc_high"].clip(upper=points["attack_auc"] + arm)
    low = min(lows.min(), points["null_low"].min(), 0.49)
    spans = sorted(zip(lows, highs, strict=True))
    reached = max(float(points["null_high"].max()), 0.52)
    for start, end in spans:
        if start - reached > max(0.06, reached - low):
            pad = 0.12 * (reached - low)
            top = min(float(highs.max()), 1.0)
            edge = max(0.02, 0.12 * (top - start))
            return (low - pad / 2, reached + pad), (start - edge, top + edge / 2)
        reached = max(reached, min(end, 1.0))
    pad = 0.08 * (reached - low)
    return (low - pad / 2, reached + pad), None


def _panel_frontier(
    drawn: Figure,
    place: Any,
    points: pd.DataFrame,
    styles: dict[tuple[str, str], _Style],
    x: str,
    lower: tuple[float, float],
    upper: tuple[float, float] | None,
) -> None:
    above = points["attack_auc"] >= upper[0] if upper else points["attack_auc"] > 1
    ratios = [0.16 if points.loc[above, "attack_auc"].nunique() < 2 else 0.3, 1]
    cells = place.subgridspec(2, 1, height_ratios=ratios, hspace=0.05)
    main = drawn.add_subplot(cells[1] if upper else place)
    parts = [main]
    main.set_ylim(*lower)
    main.set_xlim(*_x_limits(points))
    if upper:
        strip = drawn.add_subplot(cells[0], sharex=main)
        strip.set_ylim(*upper)
        _break_marks(main, strip)
        parts.append(strip)
    parts[-1].set_title("a   Frontier: lower left is better", loc="left", fontweight="bold")
    for ax in parts:
        _reference_lines(ax, points)
        _draw_points(ax, points, styles)
        _draw_ceilings(ax, points, styles)
        _label_points(ax, points, styles, _draw_steps(ax, points, styles))
    main.set_xlabel(f"error: {NAMES.get(x, x)}")
    main.set_ylabel("strongest attack, AUC on held-out candidates")


def _x_limits(points: pd.DataFrame) -> tuple[float, float]:
    arm = 0.15 * (points["x"].max() - points["x"].min())
    lows = points["x_low"].clip(lower=(points["x"] - arm).clip(lower=0))
    highs = points["x_high"].clip(upper=points["x"] + arm)
    low, high = min(lows.min(), points["floor_x"].min()), highs.max()
    pad = 0.06 * (high - low) or 0.01
    return low - pad, high + pad


def _break_marks(main: Axes, strip: Axes) -> None:
    strip.spines["bottom"].set_visible(False)
    strip.tick_params(axis="x", bottom=False, labelbottom=False)
    strip.yaxis.set_major_locator(FixedLocator([0.6, 0.7, 0.8, 0.9, 1.0]))
    slant: dict[str, Any] = {
        **{"marker": [(-1, -0.5), (1, 0.5)], "markersize": 5, "linestyle": "none"},
        **{"color": "black", "mew": 0.6, "clip_on": False},
    }
    main.plot([0], [1], transform=main.transAxes, **slant)
    strip.plot([0], [0], transform=strip.transAxes, **slant)


def _reference_lines(ax: Axes, points: pd.DataFrame) -> None:
    null = (points["null_low"].min(), points["null_high"].max())
    ax.axhspan(*null, color="#DDDDDD", linewidth=0, zorder=0)
    ax.axhline(0.5, color="#777777", linewidth=0.6, zorder=0.5)
    ax.axvline(points["floor_x"].mean(), color="#777777", linewidth=0.8, linestyle=":", zorder=0.5)


def _bars(point: Any, name: str) -> list[list[float]]:
    """Arm lengths of an error bar, kept inside [0, 1] and, whatever the rounding, at least 0."""
    mean = getattr(point, name)
    low, high = max(getattr(point, f"{name}_low"), 0.0), getattr(point, f"{name}_high")
    return [[max(mean - low, 0.0)], [max(min(high, 1.0) - mean, 0.0)]]


def _rows(points: pd.DataFrame) -> Iterable[Any]:
    return cast(Iterable[Any], points.itertuples())


def _draw_points(ax: Axes, points: pd.DataFrame, styles: dict[tuple[str, str], _Style]) -> None:
    for point in _rows(points):
        style = styles[point.role, point.family]
        ax.errorbar(
            [point.x], [point.attack_auc], xerr=_bars(point, "x"), yerr=_bars(point, "attack_auc"),
            elinewidth=0.6, ecolor=_faint(style.colour), capsize=0, zorder=3, linestyle="none",
        )  # fmt: skip
        ax.plot([point.x], [point.attack_auc], linestyle="none", zorder=4, **style.point())


def _faint(colour: str) -> tuple[float, float, float]:
    """The colour mixed with white: unlike transparency it prints the same everywhere."""
    red, green, blue = to_rgb(colour)
    return (0.45 + 0.55 * red, 0.45 + 0.55 * green, 0.45 + 0.55 * blue)


def _shown_ceilings(ax: Axes, points: pd.DataFrame) -> pd.DataFrame:
    bottom, top = ax.get_ylim()
    return points[points["ceiling_auc"].between(bottom, min(top, 0.9))]


def _draw_ceilings(ax: Axes, points: pd.DataFrame, styles: dict[tuple[str, str], _Style]) -> None:
    shown = _shown_ceilings(ax, points)
    for point in _rows(shown):
        colour = styles[point.role, point.family].colour
        at = ([point.x], [point.ceiling_auc])
        ax.plot(*at, marker="_", markersize=8, color=colour, mew=1.3, zorder=2)
    right = ax.get_xlim()[1]
    for epsilon, group in shown.groupby("epsilon"):
        last = group.iloc[int(group["x"].argmax())]
        # Beside the worst point there is room, but not where it stands at the very edge.
        room = (right - last["x"]) > 0.22 * (right - ax.get_xlim()[0])
        ax.annotate(
            f"ceiling, ε = {_epsilon(float(cast(float, epsilon)))}",
            (last["x"], last["ceiling_auc"]), (6, 0) if room else (4, 2.5),
            textcoords="offset points", fontsize=5.5, ha="left" if room else "right",
            va="center_baseline" if room else "bottom", color="#555555", zorder=5,
            path_effects=[_HALO],
        )  # fmt: skip


def _draw_steps(
    ax: Axes, points: pd.DataFrame, styles: dict[tuple[str, str], _Style]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draw the staircase of all models and of each family; return their corners."""
    models = points[points["role"] == "model"]
    overall = _staircase(models[non_dominated(models)])
    ax.plot(*overall, color="#C4C4C4", linewidth=2.8, zorder=1, solid_joinstyle="miter")
    drawn = []
    for family, group in models.groupby("family"):
        style = styles["model", str(family)]
        drawn.append(_staircase(group[non_dominated(group)]))
        ax.plot(*drawn[-1], color=style.colour, linestyle=style.line, linewidth=0.9, zorder=2)
    return drawn


def _staircase(best: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Corners of a non-dominated set: right at the same risk, then down."""
    best = best.sort_values("x")
    return np.repeat(best["x"].to_numpy(), 2)[1:], np.repeat(best["attack_auc"].to_numpy(), 2)[:-1]


def _label_points(
    ax: Axes,
    points: pd.DataFrame,
    styles: dict[tuple[str, str], _Style],
    lines: list[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write ε beside models and baselines, each where it hides least."""
    canvas = cast(FigureCanvasAgg, cast(Figure, ax.figure).canvas)
    pixel = canvas.figure.dpi / 72
    bottom, top = ax.get_ylim()
    shown = points[(points["role"] != "control") & points["attack_auc"].between(bottom, top)]
    taken, faint = _obstacles(ax, points, lines, canvas, pixel)
    inside = ax.get_window_extent()
    for point in _rows(shown):
        text = _epsilon(point.epsilon)
        width, height = (3.9 * len(text) + 0.5) * pixel, 5.6 * pixel
        x, y = ax.transData.transform((point.x, point.attack_auc))
        scored = []
        for dx, dy in _offsets():
            box = _box(x + dx * pixel, y + dy * pixel, width, height)
            cost = 0.9 * math.hypot(dx, dy) + _hidden(box, taken) + 0.3 * _hidden(box, faint)
            corners = inside.x0 <= box.x0 and box.x1 <= inside.x1
            within = corners and inside.y0 <= box.y0 and box.y1 <= inside.y1
            scored.append((cost + (0 if within else 1e3), dx, dy, box))
        _, dx, dy, box = min(scored, key=lambda each: each[0])
        taken.append(box)
        leader = {"arrowstyle": "-", "linewidth": 0.35, "shrinkB": 2, "shrinkA": 0, "color": "#888"}
        ax.annotate(
            text, (point.x, point.attack_auc), (dx, dy), textcoords="offset points", fontsize=6,
            ha="center", va="center_baseline", zorder=6, path_effects=[_HALO],
            color=_dark(styles[point.role, point.family].colour),
            arrowprops=leader if math.hypot(dx, dy) > 9 else None,
        )  # fmt: skip


def _obstacles(
    ax: Axes,
    points: pd.DataFrame,
    lines: list[tuple[np.ndarray, np.ndarray]],
    canvas: FigureCanvasAgg,
    pixel: float,
) -> tuple[list[Bbox], list[Bbox]]:
    """What a label must not cover (markers, ceilings, text) and what it had better not (lines)."""
    middles = ax.transData.transform(points[["x", "attack_auc"]].to_numpy())
    taken = [_box(x, y, 6 * pixel, 6 * pixel) for x, y in middles]
    ceilings = _shown_ceilings(ax, points)[["x", "ceiling_auc"]].to_numpy()
    taken += [_box(x, y, 9 * pixel, 2 * pixel) for x, y in map(ax.transData.transform, ceilings)]
    taken += [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
    faint = [bar for point in _rows(points) for bar in _bar_boxes(ax, point, pixel)]
    for xs, ys in lines:
        corners = ax.transData.transform(np.column_stack([xs, ys]))
        for (x0, y0), (x1, y1) in pairwise(corners):
            low, high = (min(x0, x1), min(y0, y1)), (max(x0, x1), max(y0, y1))
            faint.append(Bbox.from_extents(*low, *high).padded(pixel))
    return taken, faint


def _dark(colour: str) -> tuple[float, float, float]:
    red, green, blue = to_rgb(colour)
    return (0.7 * red, 0.7 * green, 0.7 * blue)


def _offsets() -> list[tuple[float, float]]:
    """Where a label may stand around its point, in points of type, nearest first."""
    turns = np.deg2rad(np.arange(0, 360, 22.5) + 45)
    return [(r * math.cos(t), r * math.sin(t)) for r in (6.5, 8.5, 11.5, 15, 19) for t in turns]


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def _hidden(box: Bbox, others: Sequence[Bbox]) -> float:
    """How much of `box` the others cover, as a share of its area summed over them, times 100."""
    area = 0.0
    for other in others:
        wide = min(box.x1, other.x1) - max(box.x0, other.x0)
        high = min(box.y1, other.y1) - max(box.y0, other.y0)
        area += max(wide, 0.0) * max(high, 0.0)
    return 100 * area / (box.width * box.height)


def _bar_boxes(ax: Axes, point: Any, pixel: float) -> list[Bbox]:
    ends = [(point.x_low, point.attack_auc), (point.x_high, point.attack_auc)]
    ends += [(point.x, point.attack_auc_low), (point.x, point.attack_auc_high)]
    west, east, south, north = ax.transData.transform(ends)
    thin = 0.6 * pixel
    flat = Bbox.from_extents(west[0], west[1] - thin, east[0], east[1] + thin)
    return [flat, Bbox.from_extents(south[0] - thin, south[1], north[0] + thin, north[1])]


def _categories(points: pd.DataFrame) -> tuple[list[float], bool]:
    """ε in order for models and baselines, and whether controls need a place of their own."""
    spent = points.loc[points["role"] != "control", "epsilon"]
    return sorted(set(spent)), bool((points["role"] == "control").any())


def _positions(points: pd.DataFrame, styles: dict[tuple[str, str], _Style]) -> np.ndarray:
    """A place on the ε axis for each point, shifted a little so that families stand apart."""
    epsilons, _ = _categories(points)
    shared = [key for key in styles if key[0] != "control"]
    apart = [key for key in styles if key[0] == "control"]
    places = []
    for point in _rows(points):
        key = (point.role, point.family)
        group = apart if point.role == "control" else shared
        shift = (group.index(key) - (len(group) - 1) / 2) * min(0.16, 0.72 / max(len(group), 1))
        base = len(epsilons) if point.role == "control" else epsilons.index(point.epsilon)
        places.append(base + shift)
    return np.array(places)


def _epsilon_axis(ax: Axes, points: pd.DataFrame, *, labelled: bool) -> None:
    epsilons, controls = _categories(points)
    names = [_epsilon(value) for value in epsilons] + (["controls"] if controls else [])
    ax.set_xticks(range(len(names)), names if labelled else [""] * len(names))
    ax.set_xlim(-0.6, len(names) - 0.4)
    if controls:
        ax.axvline(len(epsilons) - 0.5, color="#BBBBBB", linewidth=0.6)
    if labelled:
        ax.set_xlabel("privacy budget ε")


def _panel_tpr(ax: Axes, points: pd.DataFrame, styles: dict[tuple[str, str], _Style]) -> None:
    ax.set_title("b   Members found at 1 % false alarms", loc="left", fontweight="bold")
    least = float(points.loc[points["attack_tpr1"] > 0, "attack_tpr1"].min())
    floor = min(0.004, least / 1.6) if math.isfinite(least) else 0.004
    ax.set_yscale("log")
    ax.set_ylim(floor, 1.4)
    ax.axhline(0.01, color="#777777", linewidth=0.6, zorder=0.5)
    for place, point in zip(_positions(points, styles), _rows(points), strict=True):
        style = styles[point.role, point.family]
        value = max(point.attack_tpr1, floor)
        low, high = (max(point.attack_tpr1_low, floor), min(point.attack_tpr1_high, 1.0))
        ax.plot([place] * 2, [low, max(high, floor)], color=_faint(style.colour), lw=0.8, zorder=2)
        ax.plot([place], [value], linestyle="none", zorder=4, **style.point(3.4))
        if point.ceiling_tpr1 < 0.9:
            ax.plot(
                [place], [point.ceiling_tpr1], "_", ms=3.4, mew=1.2, color=style.colour, zorder=3
            )
    ax.yaxis.set_major_locator(FixedLocator([0.001, 0.01, 0.1, 1]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel("TPR at 1 % FPR (log)")
    _epsilon_axis(ax, points, labelled=False)


def _panel_utility(ax: Axes, results: pd.DataFrame, styles: dict[tuple[str, str], _Style]) -> None:
    metric = utility_metric(results)
    points = aggregate(results, metric)
    task = metric.startswith("tstr")
    said = "Utility: trained on synthetic rows" if task else "Detection: .5 is best"
    ax.set_title(f"c   {said}", loc="left", fontweight="bold")
    points = points.assign(place=_positions(points, styles))
    for (role, family), group in points.groupby(["role", "family"]):
        style = styles[str(role), str(family)]
        group = group.sort_values("place")
        if role == "model":
            ax.plot(group["place"], group["x"], color=style.colour, ls=style.line, lw=0.9, zorder=2)
        for point in _rows(group):
            ends = [point.x_low, point.x_high]
            ax.plot([point.place] * 2, ends, color=_faint(style.colour), lw=0.8, zorder=1)
            ax.plot([point.place], [point.x], linestyle="none", zorder=4, **style.point(3.4))
    real = points["floor_x"].mean()
    ax.axhline(real, color="#777777", linewidth=0.8, linestyle=":", zorder=0.5)
    ax.set_ylabel(NAMES[metric])
    _epsilon_axis(ax, points, labelled=True)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.08 * (high - low))
    _leave_out_far(ax, points, real, styles)
    ax.text(
        -0.55, real, "trained on real rows" if task else "real against real", fontsize=5.5,
        va="bottom", color="#555555",
    )  # fmt: skip


def _leave_out_far(
    ax: Axes, points: pd.DataFrame, real: float, styles: dict[tuple[str, str], _Style]
) -> None:
    """Cut the axis below what is worth comparing, with an arrow and the value of what is left out.

    A family counts as far if all its points lie below the others by twice their spread.
    """
    best = points.groupby(["role", "family"])["x"].max().sort_values()
    for count in range(1, len(best)):
        far, near = best.iloc[:count], points.set_index(["role", "family"]).loc[best.index[count:]]
        least, most = float(near["x_low"].min()), max(real, float(near["x_high"].max()))
        if far.max() < least - 2 * (most - least):
            break
    else:
        return
    pad = 0.12 * max(most - least, 0.01)
    ax.set_ylim(least - 3 * pad, most + 2 * pad)
    for key in far.index:
        style = styles[key]
        for point in _rows(points.set_index(["role", "family"], drop=False).loc[[key]]):
            ax.annotate(
                f"{point.x:.2f}", (point.place, least - 3 * pad), xytext=(0, 9),
                textcoords="offset points", fontsize=5, ha="center", va="bottom",
                color=style.colour, arrowprops={"arrowstyle": "->", "lw": 0.7,
                                                "color": style.colour, "shrinkB": 0},
            )  # fmt: skip


def _legend_handles(
    results: pd.DataFrame, styles: dict[tuple[str, str], _Style]
) -> list[Line2D | Patch]:
    handles: list[Line2D | Patch] = [style.handle() for style in styles.values()]
    handles += [
        Line2D([], [], color="#C4C4C4", linewidth=2.8, label="best of all families (a)"),
        Line2D([], [], color="#444444", marker="_", ms=7, mew=1.3, ls="none",
               label="ceiling from the run's ledger"),
        Line2D([], [], color="#777777", lw=0.8, ls=":", label="floor: real rows (a, c)"),
        Patch(color="#DDDDDD", label="null band of the AUC (a)"),
    ]  # fmt: skip
    return handles


# --- the same to hover over -----------------------------------------------------------------------


def interactive(
    results: pd.DataFrame, *, x: str = "tvd2", title: str = "", together: Together | None = None
) -> str:
    """The same three panels as one self-contained page: hover a point for its runs.

    Single runs are drawn faintly under their means. Tables follow the plots: where more budget did
    worse, which runs an attack beat their own ceiling on, and, given `together`, what publishing
    all runs or choosing among them costs.
    """
    points, styles = _prepare(results, x)
    drawn = make_subplots(
        rows=2, cols=2, specs=[[{"rowspan": 2}, {}], [None, {}]], column_widths=[0.6, 0.4],
        horizontal_spacing=0.09, vertical_spacing=0.13,
        subplot_titles=["Frontier", "TPR at 1 % FPR", "Utility"],
    )  # fmt: skip
    _trace_runs(drawn, results, styles, x)
    _trace_points(drawn, points, styles, "attack_auc", (1, 1), horizontal="x")
    _trace_ceilings(drawn, points, styles)
    places = points.assign(place=_positions(points, styles))
    _trace_points(drawn, places, styles, "attack_tpr1", (1, 2), horizontal="place")
    metric = utility_metric(results)
    useful = aggregate(results, metric)
    useful = useful.assign(place=_positions(useful, styles))
    _trace_points(drawn, useful, styles, "x", (2, 2), horizontal="place")
    _dress(drawn, points, useful, x, metric)
    body = drawn.to_html(
        full_html=False, include_plotlyjs=True, div_id="frontier", config={"displaylogo": False}
    )
    heading = html.escape(title) or "Frontier"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        "<style>body{font:15px/1.5 system-ui,sans-serif;max-width:1200px;margin:1.5rem auto;"
        "padding:0 1rem;color:#222}table{border-collapse:collapse}td,th{padding:.2rem .8rem;"
        "border-bottom:1px solid #ddd;text-align:left}</style></head><body>"
        f"<h1>{heading}</h1><p>{html.escape(_subtitle(results))}. Small dots are single runs. "
        f"Double-click a panel to see points above the opening view.</p>{body}"
        f"{_falls_table(results, x, metric)}{_violations_table(results)}"
        f"{'' if together is None else _together_table(together)}</body></html>\n"
    )


def _hover(point: Any) -> str:
    ceiling = f"{point.ceiling_auc:.3f} / {point.ceiling_tpr1:.3f}"
    return (
        f"<b>{html.escape(point.family)}</b> ({point.role}) ε={_epsilon(point.epsilon)}, "
        f"{point.seeds} seed(s)<br>AUC {point.attack_auc:.3f} "
        f"[{point.attack_auc_low:.3f}, {point.attack_auc_high:.3f}]<br>TPR at 1 % "
        f"{point.attack_tpr1:.4f} [{point.attack_tpr1_low:.4f}, {point.attack_tpr1_high:.4f}]<br>"
        f"ceilings AUC / TPR {ceiling}<br>value {point.x:.4f} [{point.x_low:.4f}, "
        f"{point.x_high:.4f}], floor {point.floor_x:.4f}"
    )


def _trace_points(
    drawn: go.Figure,
    points: pd.DataFrame,
    styles: dict[tuple[str, str], _Style],
    name: str,
    cell: tuple[int, int],
    *,
    horizontal: str,
) -> None:
    for (role, family), style in styles.items():
        group = points[(points["role"] == role) & (points["family"] == family)]
        group = group.sort_values(horizontal if horizontal == "place" else "epsilon")
        arms = {"color": style.colour, "thickness": 0.8, "width": 0}
        across: dict[str, Any] = {}
        if horizontal == "x":
            across = {"error_x": _plotly_bars(group, "x") | arms}
        drawn.add_scatter(
            x=group[horizontal], y=group[name], error_y=_plotly_bars(group, name) | arms,
            mode="lines+markers" if role == "model" and horizontal == "place" else "markers",
            line={"color": style.colour, "dash": style.dash, "width": 1.2},
            marker=_plotly_marker(style), name=html.escape(style.label),
            legendgroup=html.escape(f"{role}/{family}"), showlegend=cell == (1, 1),
            hovertext=[_hover(point) for point in _rows(group)], hoverinfo="text",
            row=cell[0], col=cell[1], **across,
        )  # fmt: skip


def _plotly_bars(group: pd.DataFrame, name: str) -> dict[str, Any]:
    low, high = group[f"{name}_low"].clip(lower=0), group[f"{name}_high"]
    plus, minus = (high - group[name]).clip(lower=0), (group[name] - low).clip(lower=0)
    return {"type": "data", "symmetric": False, "array": plus, "arrayminus": minus}


def _plotly_marker(style: _Style) -> dict[str, Any]:
    symbol = PLOTLY_MARKERS[style.marker] + ("-open" if style.role == "baseline" else "")
    edge = {"width": 1.5, "color": style.colour}
    return {"symbol": symbol, "size": 9, "color": style.colour, "line": edge}


def _trace_runs(
    drawn: go.Figure, results: pd.DataFrame, styles: dict[tuple[str, str], _Style], x: str
) -> None:
    for (role, family), group in results.groupby(["role", "family"]):
        style = styles[str(role), str(family)]
        facts = [
            f"run {html.escape(str(run.run))}<br>{html.escape(str(family))} "
            f"ε={_epsilon(run.epsilon)} δ={run.delta:g} seed {_seed(run.seed)}<br>strongest attack "
            f"{html.escape(str(run.attack))}: AUC {run.attack_auc:.3f} [{run.attack_auc_low:.3f}, "
            f"{run.attack_auc_high:.3f}]"
            for run in _rows(group)
        ]
        drawn.add_scatter(
            x=group[x], y=group["attack_auc"], mode="markers", opacity=0.35, hovertext=facts,
            hoverinfo="text", marker={"size": 5, "color": style.colour}, showlegend=False,
            legendgroup=html.escape(f"{role}/{family}"), row=1, col=1,
        )  # fmt: skip


def _seed(seed: Any) -> str:
    return "from OS entropy" if pd.isna(seed) else str(seed)


def _trace_ceilings(
    drawn: go.Figure, points: pd.DataFrame, styles: dict[tuple[str, str], _Style]
) -> None:
    shown = points[points["ceiling_auc"] < 1]
    colours = [styles[p.role, p.family].colour for p in _rows(shown)]
    words = [
        f"ceiling of {html.escape(p.family)} at ε={_epsilon(p.epsilon)}: AUC {p.ceiling_auc:.3f}"
        for p in _rows(shown)
    ]
    drawn.add_scatter(
        x=shown["x"], y=shown["ceiling_auc"], mode="markers", name="ceiling of the run's ledger",
        marker={"symbol": "line-ew-open", "size": 12, "color": colours, "line": {"width": 2}},
        hovertext=words, hoverinfo="text", row=1, col=1,
    )  # fmt: skip


def _dress(
    drawn: go.Figure, points: pd.DataFrame, useful: pd.DataFrame, x: str, metric: str
) -> None:
    """Axes, reference lines and the overall staircase."""
    lower, _ = _limits(points)
    models = points[points["role"] == "model"]
    best = models[non_dominated(models)].sort_values("x")
    drawn.add_scatter(
        x=best["x"], y=best["attack_auc"], mode="lines", line={"shape": "hv", "color": "#999"},
        name="best of all families", hoverinfo="skip", row=1, col=1,
    )  # fmt: skip
    null = (points["null_low"].min(), points["null_high"].max())
    main: dict[str, Any] = {"row": 1, "col": 1}
    drawn.add_hrect(*null, fillcolor="#ddd", opacity=0.5, line_width=0, layer="below", **main)
    dotted: dict[str, Any] = {"line_dash": "dot", "line_color": "#777"}
    drawn.add_vline(float(points["floor_x"].mean()), **dotted, **main)
    chance: dict[str, Any] = {"line_color": "#777", "line_width": 1, "row": 1, "col": 2}
    drawn.add_hline(0.01, **chance)
    utility: dict[str, Any] = {"row": 2, "col": 2}
    drawn.add_hline(float(useful["floor_x"].mean()), **dotted, **utility)
    drawn.update_xaxes(title_text=f"error: {NAMES.get(x, x)}", row=1, col=1)
    drawn.update_yaxes(title_text="strongest attack, AUC", range=list(lower), row=1, col=1)
    drawn.update_yaxes(type="log", range=[-3, 0.1], row=1, col=2)
    drawn.update_yaxes(title_text=NAMES[metric], row=2, col=2)
    epsilons, controls = _categories(points)
    ticks = [_epsilon(value) for value in epsilons] + (["controls"] if controls else [])
    for cell in (1, 2):
        drawn.update_xaxes(tickvals=list(range(len(ticks))), ticktext=ticks, row=cell, col=2)
    drawn.update_xaxes(title_text="privacy budget ε", row=2, col=2)
    drawn.update_layout(
        height=680, template="plotly_white", legend={"orientation": "h", "y": -0.12},
        margin={"t": 64, "r": 20},
    )  # fmt: skip


def _falls_table(results: pd.DataFrame, *metrics: str) -> str:
    rows = []
    for metric in metrics:
        for fall in falls(results, metric):
            cells = [fall.family, metric, _epsilon(fall.lower), f"{fall.before:.4f}"]
            cells += [_epsilon(fall.upper), f"{fall.after:.4f}", str(fall.seeds)]
            rows.append("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells) + "</tr>")
    if not rows:
        return "<h2>Where more budget did worse</h2><p>Nowhere, beyond the intervals.</p>"
    names = ("family", "metric", "ε", "value", "larger ε", "value", "seeds")
    head = "".join(f"<th>{name}</th>" for name in names)
    return (
        "<h2>Where more budget did worse</h2><p>Intervals over seeds do not meet; with one seed "
        f"there are none.</p><table><tr>{head}</tr>{''.join(rows)}</table>"
    )


def _violations_table(results: pd.DataFrame) -> str:
    over = violations(results)
    if over.empty:
        said = "None: no attack's interval lies above its run's ceiling."
        return f"<h2>Ceilings broken</h2><p>{said}</p>"
    items = "".join(
        f"<li>{html.escape(str(run.run))}: AUC at least {run.attack_auc_low:.3f}, ceiling "
        f"{run.ceiling_auc:.3f}</li>"
        for run in _rows(over)
    )
    return f"<h2>Ceilings broken</h2><ul>{items}</ul>"


def _together_table(together: Together) -> str:
    """What publishing all runs, or choosing one of them, costs."""

    def row(tag: str, cells: Iterable[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(row("td", cells) for cells in together_rows(together))
    return (
        f"<h2>Publishing and choosing</h2><p>{html.escape(together.line)}.</p>"
        f"<table>{row('th', TOGETHER_HEAD)}{body}</table>"
    )


# --- the folder -----------------------------------------------------------------------------------


def write_frontier(
    results: pd.DataFrame,
    folder: str | Path,
    *,
    title: str,
    x: str = "tvd2",
    together: Together | None = None,
) -> Path:
    """Write `frontier.{pdf,svg,png,html,parquet,csv}` and `README.md` into `folder`; given what the
    runs cost `together`, also `privacy.json` and `privacy.csv`.

    All files are made in a sibling folder first and then moved in one by one, so a failure leaves
    what was there, and other files in `folder` stay. Equal results give equal bytes.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.parent))
    try:
        drawn = figure(results, x=x, title=title)
        with mpl.rc_context(RC):
            drawn.savefig(partial / "frontier.pdf", metadata={"CreationDate": None})
            drawn.savefig(partial / "frontier.svg", metadata={"Date": None})
            drawn.savefig(partial / "frontier.png", dpi=300)
        page = interactive(results, x=x, title=title, together=together)
        (partial / "frontier.html").write_text(page, encoding="utf-8")
        write(results, partial / "frontier.parquet")
        write(results, partial / "frontier.csv")
        card = summary(results, title=title, together=together)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if together is not None:
            text = json.dumps(together.to_dict(), indent=1, ensure_ascii=False) + "\n"
            (partial / "privacy.json").write_text(text, encoding="utf-8")
            rows = pd.DataFrame(together_rows(together), columns=list(TOGETHER_HEAD))
            rows.to_csv(partial / "privacy.csv", index=False)
        folder.mkdir(exist_ok=True)
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial)
    return folder
