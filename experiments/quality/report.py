"""Tables, paired tests and figures of what `protocol.py` wrote.

`report.py table FILE …` prints a table a data set and ε; `report.py test FILE … --model M` compares
a model with each other one by paired t-tests over seeds, Holm-corrected over all comparisons;
`report.py figure FILE … --over epsilon|rows --out PNG` draws means over seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import stats

mpl.use("Agg")
import matplotlib.pyplot as plt

FIGURES = ("TVD1", "TVD2", "TVD3", "C2ST", "AUC", "accuracy", "log-loss")
HIGHER = {"AUC", "accuracy"}
TESTED = ("TVD2", "TVD3", "C2ST", "AUC")
Runs = list[dict[str, Any]]


def read(files: Iterable[Path]) -> Runs:
    """Runs of all files; a line may be in several."""
    lines = {line: json.loads(line) for file in files for line in file.read_text().splitlines()}
    return list(lines.values())


def place(run: dict[str, Any]) -> tuple[str, float, str, str]:
    """What a line of a table is about."""
    epsilon = float(run["epsilon"])
    return run["table"], epsilon, run["model"], json.dumps(run["recipe"]) if run["recipe"] else ""


def number(values: Sequence[float], digits: int) -> str:
    """Mean ± half of a 95 % t-interval, without leading zeros."""
    found = f"{np.mean(values):.{digits}f}".lstrip("0")
    if len(values) < 2:
        return found
    error = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{found} ± " + f"{error:.{digits}f}".lstrip("0")


def tables(runs: Runs) -> Iterable[str]:
    """Markdown, one table a data set, its number of rows, and ε."""
    grouped: dict[tuple[str, float], dict[tuple[str, str], Runs]] = defaultdict(dict)
    for run in runs:
        table, epsilon, model, recipe = place(run)
        grouped[table, epsilon].setdefault((model, recipe), []).append(run)
    for (table, epsilon), models in sorted(grouped.items()):
        yield f"\n**{table}, ε = {epsilon:g}**\n"
        yield "| | seeds | " + " | ".join(FIGURES) + " | s |"
        yield "|---" * (len(FIGURES) + 3) + "|"
        for (model, recipe), own in models.items():
            name = "held-out rows; trained on real ones" if model == "floor" else f"`{model}`"
            cells = [
                number([run[f] for run in own if f in run], 3 if f == "C2ST" else 4)
                for f in FIGURES
            ]
            spent = "" if model == "floor" else f"{np.mean([run['seconds'] for run in own]):.0f}"
            label = f"{name} {recipe}".strip()
            yield f"| {label} | {len(own)} | " + " | ".join(cells) + f" | {spent} |"


def tests(runs: Runs, model: str) -> Iterable[str]:
    """Paired t-tests of `model` against every other, with Holm's correction (1979)."""
    held = {(*place(run), run["seed"]): run for run in runs if not run["recipe"]}
    found = []
    for table, epsilon, other, _ in sorted({key[:4] for key in held}):
        if other in (model, "floor"):
            continue
        seeds = [
            seed
            for t, e, m, _, seed in held
            if (t, e, m) == (table, epsilon, other) and (t, e, model, "", seed) in held
        ]
        for figure in TESTED if len(seeds) > 1 else ():
            gaps = [
                (
                    held[table, epsilon, model, "", s][figure]
                    - held[table, epsilon, other, "", s][figure]
                )
                * (1 if figure in HIGHER else -1)
                for s in seeds
            ]
            p = float(stats.ttest_1samp(gaps, 0.0).pvalue)
            found.append((p, table, epsilon, other, figure, len(seeds), float(np.mean(gaps))))
    found.sort()
    yield "| table | ε | against | figure | seeds | better by | p | p (Holm) |"
    yield "|---" * 8 + "|"
    most = 0.0
    for rank, (p, table, epsilon, other, figure, seeds, gap) in enumerate(found):
        most = max(most, min(1.0, p * (len(found) - rank)))
        yield (
            f"| {table} | {epsilon:g} | `{other}` | {figure} | {seeds} | {gap:+.4f} | {p:.1e} "
            f"| {most:.1e} |"
        )


def figure(runs: Runs, over: str, out: Path) -> None:
    """Means over seeds of four figures, a line a model; `over` ε or the number of rows."""
    lines: dict[str, dict[float, Runs]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if math.isfinite(float(run[over])):
            options = run["recipe"].get("options", {}).items()
            name = " ".join([run["model"], *(f"{option}={value}" for option, value in options)])
            lines[name][float(run[over])].append(run)
    drawn, axes = plt.subplots(1, len(TESTED), figsize=(4 * len(TESTED), 3.4))
    for axis, name in zip(axes, TESTED, strict=True):
        axis.set_prop_cycle(color=mpl.colormaps["tab20"](range(20)))
        for model, points in sorted(lines.items()):
            x = sorted(points)
            y = [float(np.mean([run[name] for run in points[at]])) for at in x]
            floor = model == "floor"
            if floor and over == "epsilon":
                axis.axhline(np.mean(y), color="0.6", linestyle="--", label="real rows")
            else:
                label = "real rows" if floor else model
                axis.plot(
                    x, y, "--" if floor else "o-", color="0.6" if floor else None, label=label
                )
        axis.set(xscale="log", title=name, xlabel="ε" if over == "epsilon" else "rows")
        if name.startswith("TVD"):
            axis.set_yscale("log")
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.02))
    drawn.tight_layout()
    drawn.savefig(out, dpi=130, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("table", "test", "figure"))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tables", nargs="+", help="of these data sets alone")
    parser.add_argument("--model", default="autoregressive")
    parser.add_argument("--over", choices=("epsilon", "rows"), default="epsilon")
    parser.add_argument("--out", type=Path)
    settings = parser.parse_args()
    runs = read(settings.files)
    if settings.tables:
        runs = [run for run in runs if run["table"] in settings.tables]
    if settings.what == "figure":
        if settings.out is None:
            parser.error("figure: give --out")
        figure(runs, settings.over, settings.out)
        return
    print("\n".join(tables(runs) if settings.what == "table" else tests(runs, settings.model)))


if __name__ == "__main__":
    main()
