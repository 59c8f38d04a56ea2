"""ROC: attack scores drawn against the run's own ceiling, down to the smallest rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import special

from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.statistics import Scores, aucs, stack
from dpsynth.checks import UsageError

__all__ = ["roc_curve", "roc_figure"]

MILLIMETRE = 1 / 25.4
SIZE = (180 * MILLIMETRE, 100 * MILLIMETRE)
SUFFIXES = (".png", ".pdf", ".svg")
# Okabe and Ito's blue and vermilion, told apart by colour-blind readers; width and dashes carry the
# same distinction into a grey print.
STRONGEST, BAND, LIMIT, FAINT = "#0072B2", "#BFDCEC", "#D55E00", "#999999"
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1.2, 1, 1.2)), (0, (8, 2)))
# Weights that set the faint curves apart once their dashes are used up.
WIDTHS = (0.8, 1.3)
# False-positive rates at which curves are drawn: as fine as print shows.
POINTS = 400
COLUMNS = 3
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


def roc_curve(members: np.ndarray, holdout: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The empirical ROC curve of (n₁,) and (n₀,) scores, one point a distinct threshold.

    Returns:
        FPR (points,) and TPR (points,), from (0, 0) to (1, 1); equal scores are passed together.
    """
    thresholds = np.unique(np.concatenate([members, holdout]))[::-1]
    rates = []
    for scores in (holdout, members):
        above = len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")
        rates.append(np.concatenate([[0.0], above / len(scores)]))
    return rates[0], rates[1]


def roc_figure(
    scores: Mapping[str, Scores],
    ceiling: Ceiling,
    *,
    strongest: str,
    path: str | Path,
    title: str = "",
) -> Figure:
    """Draw all attacks' ROC curves, linear and in both logarithms, and write them to `path`.

    The band about the strongest attack is Clopper–Pearson's, 95 % at each FPR by itself, for the
    chance in the members; a curve that leaves the ceiling while its band does not is no violation.

    Args:
        scores: Scores of members and holdout rows by attack, all on the same rows.
        ceiling: The ceiling of this very run.
        strongest: The attack to emphasise, chosen elsewhere (`Audit.strongest`).
        path: File ending in .png, .pdf or .svg; written in that format.
        title: Of the figure.

    Returns:
        The figure, as written.

    Raises:
        UsageError: On another ending, an unknown strongest attack, attacks on different rows, or
            a score that is not finite.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UsageError(f"path={str(path)!r}: must end in one of {', '.join(SUFFIXES)}")
    if strongest not in scores:
        raise UsageError(f"strongest={strongest!r}: has no scores; choose one of {sorted(scores)}")
    areas = dict(zip(scores, aucs(*stack(list(scores.values()))).tolist(), strict=True))
    with mpl.rc_context(RC):
        drawn = Figure(figsize=SIZE)
        FigureCanvasAgg(drawn)
        linear, log = drawn.subplots(1, 2)
        _dress(linear, log, len(scores[strongest][1]))
        for ax, grid in ((linear, _linear_grid()), (log, _log_grid(log.get_xlim()[0]))):
            _draw(ax, grid, scores, ceiling, strongest, areas)
        rows = _legend(drawn, linear)
        bottom = 0.125 + 0.038 * rows
        drawn.subplots_adjust(left=0.065, right=0.985, top=0.84, bottom=bottom, wspace=0.2)
        drawn.text(
            *(0.012, 0.985), _plain(title), fontsize=9, fontweight="bold", va="top", ha="left"
        )
        drawn.text(
            *(0.012, 0.925), _subtitle(scores[strongest]), fontsize=7, va="top", color="#444444"
        )
        drawn.savefig(path, dpi=300, metadata=_undated(path.suffix))
    return drawn


def _undated(suffix: str) -> dict[str, Any]:
    """Metadata with which equal scores give equal bytes."""
    return {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(suffix, {})


def _plain(text: str) -> str:
    """Text that matplotlib does not take for mathematics, nor a legend for hidden."""
    return text.replace("$", r"\$").lstrip("_")


def _subtitle(pair: Scores) -> str:
    return f"{len(pair[0])} members, {len(pair[1])} non-members; band: 95 % at each FPR by itself"


def _linear_grid() -> np.ndarray:
    return np.linspace(0, 1, POINTS + 1)


def _log_grid(least: float) -> np.ndarray:
    return np.geomspace(least, 1, POINTS + 1)


def _dress(linear: Axes, log: Axes, non_members: int) -> None:
    """Axes, and the diagonal of an attack that knows nothing."""
    # One decade at least, and the smallest rate that the non-members can show.
    least = min(0.1, 1 / non_members)
    log.set_xscale("log")
    log.set_yscale("log")
    for ax, low in ((linear, 0.0), (log, least)):
        ax.set_xlim(low, 1)
        ax.set_ylim(low, 1)
        ax.set_xlabel("false-positive rate")
        grid = np.array([0.0, 1.0]) if low == 0 else np.array([low, 1.0])
        ax.plot(grid, grid, color="black", linewidth=0.7, linestyle=(0, (2, 2)), zorder=1,
                label="knows nothing")  # fmt: skip
    linear.set_ylabel("true-positive rate")
    linear.set_title("a   Linear", loc="left", fontweight="bold")
    log.set_title("b   Logarithmic: small rates", loc="left", fontweight="bold")


def _draw(
    ax: Axes,
    grid: np.ndarray,
    scores: Mapping[str, Scores],
    ceiling: Ceiling,
    strongest: str,
    areas: Mapping[str, float],
) -> None:
    least = ax.get_ylim()[0]
    limit = ceiling.tpr[np.searchsorted(ceiling.fpr, grid)]
    ax.plot(grid, limit, color=LIMIT, linewidth=1.6, linestyle=(0, (6, 1.5)), zorder=3,
            clip_on=False, label=_limit_label(ceiling))  # fmt: skip
    others = sorted((name for name in scores if name != strongest), key=lambda name: -areas[name])
    for number, name in enumerate(others):
        style = DASHES[number % len(DASHES)]
        width = WIDTHS[number // len(DASHES) % len(WIDTHS)]
        shown = _visible(_reached(scores[name], grid), least)
        ax.plot(grid, shown, color=FAINT, linewidth=width, linestyle=style, zorder=2,
                label=f"{_plain(name)}, AUC {areas[name]:.3f}")  # fmt: skip
    reached = _reached(scores[strongest], grid)
    low, high = _band(reached, len(scores[strongest][0]))
    ax.fill_between(grid, low.clip(least), high, color=BAND, linewidth=0, zorder=1.5,
                    label="its 95 % band")  # fmt: skip
    ax.plot(grid, _visible(reached, least), color=STRONGEST, linewidth=1.9, zorder=4,
            label=f"strongest: {_plain(strongest)}, AUC {areas[strongest]:.3f}")  # fmt: skip


def _limit_label(ceiling: Ceiling) -> str:
    if (ceiling.tpr == 1).all():
        return "no ceiling: the run has no guarantee"
    return f"ceiling of this run, AUC {min(1.0, ceiling.auc):.3f}"


def _reached(pair: Scores, grid: np.ndarray) -> np.ndarray:
    """TPR of the curve at each FPR of `grid`; between two points equal scores are cut by lot."""
    fpr, tpr = roc_curve(*pair)
    # Rounding must not move the grid's own k/n₀ below the curve's.
    place = np.searchsorted(fpr, grid * (1 + 1e-12), side="right") - 1
    after = np.minimum(place + 1, len(fpr) - 1)
    width = fpr[after] - fpr[place]
    share = np.where(width > 0, (grid - fpr[place]) / np.where(width > 0, width, 1), 0).clip(0, 1)
    return tpr[place] + share * (tpr[after] - tpr[place])


def _visible(tpr: np.ndarray, least: float) -> np.ndarray:
    """Zeros have no place on a logarithmic axis."""
    return np.where(tpr > 0, tpr, math.nan) if least > 0 else tpr


def _band(tpr: np.ndarray, members: int) -> tuple[np.ndarray, np.ndarray]:
    """Clopper–Pearson ends (points,) for shares of `members`."""
    hits = np.round(tpr * members)
    low = special.betaincinv(np.maximum(hits, 1), members - hits + 1, 0.025)
    high = special.betaincinv(hits + 1, np.maximum(members - hits, 1), 0.975)
    return np.where(hits > 0, low, 0.0), np.where(hits < members, high, 1.0)


def _legend(drawn: Figure, ax: Axes) -> int:
    """Legend under both panels, the strongest attack first; the number of its lines."""
    # In the order drawn.
    chance, limit, *others, band, best = zip(*ax.get_legend_handles_labels(), strict=True)
    handles, labels = zip(best, band, limit, chance, *others, strict=True)
    drawn.legend(
        handles, labels, loc="lower center", bbox_to_anchor=(0.5, 0.005), ncols=COLUMNS,
        frameon=False, handlelength=3.2, columnspacing=1.6, borderpad=0,
    )  # fmt: skip
    return math.ceil(len(labels) / COLUMNS)
