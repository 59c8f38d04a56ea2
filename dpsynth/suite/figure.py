"""Lower bounds on ε, drawn beside what was claimed and what could have been shown."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dpsynth.frontier.plot import MILLIMETRE, RC
from dpsynth.suite.report import Bound

__all__ = ["bounds_figure"]

WIDTH, ROW, MARGIN = 180 * MILLIMETRE, 6 * MILLIMETRE, 22 * MILLIMETRE
SHOWN, CLAIM, ATTAINABLE = "#0072B2", "#000000", "#D55E00"


def bounds_figure(bounds: Sequence[Bound]) -> dict[str, bytes]:
    """`bounds.png` and `bounds.pdf`: one line a bound, from nothing shown to the claim."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(WIDTH, MARGIN + ROW * len(bounds)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, bound in enumerate(bounds):
            axes.plot([0, bound.epsilon], [place, place], color=SHOWN, linewidth=2.5)
            axes.plot(bound.epsilon, place, "o", color=SHOWN, markersize=5)
            axes.plot(
                bound.attainable, place, "D", color=ATTAINABLE, markersize=5, fillstyle="none"
            )
            axes.plot([bound.claimed] * 2, [place - 0.35, place + 0.35], color=CLAIM, linewidth=1.4)
        axes.set_yticks(range(len(bounds)), [f"{b.audit}, {b.form}" for b in bounds])
        axes.set_ylim(len(bounds) - 0.4, -0.6)
        axes.set_xlim(0, 1.08 * max(max(b.claimed, b.epsilon, b.attainable) for b in bounds))
        axes.set_xlabel("ε, with 95 % confidence at least")
        figure.legend(handles=_handles(), loc="outside upper left", ncols=3, frameon=False)
        files = {}
        for kind in ("png", "pdf"):
            buffer = BytesIO()
            figure.savefig(buffer, format=kind, dpi=200)
            files[f"bounds.{kind}"] = buffer.getvalue()
        return files


def _handles() -> list[Line2D]:
    return [
        Line2D([], [], color=SHOWN, marker="o", linewidth=2.5, label="shown"),
        Line2D(
            [],
            [],
            color=ATTAINABLE,
            marker="D",
            fillstyle="none",
            linewidth=0,
            label="the most a perfect attack shows at this size (median)",
        ),
        Line2D([], [], color=CLAIM, marker="|", markersize=9, linewidth=0, label="claimed"),
    ]
