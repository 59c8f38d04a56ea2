"""Fit the planner's tables: which shares of the budget do best, on tables that are public.

`python scripts/fit_planner.py run --data FOLDER --minutes 30` trains on simulated tables and on the
Parquet files of FOLDER that `PUBLIC` names, one setting after another, and adds a line a run to
experiments/planner/planner-runs.json, or with `--only GROUP` to that group's own file, which the
fit reads; what is there already is not run again.
`python scripts/fit_planner.py fit` compares them and writes dpsynth/training/planner.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from importlib.metadata import version

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from dpsynth.chosen import Choice, candidates
from dpsynth.codec import Layout
from dpsynth.data import Table
from dpsynth.datasets.simulated import draw
from dpsynth.evaluation.detection import c2st
from dpsynth.evaluation.fidelity import fidelity
from dpsynth.evaluation.utility import utility
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.schema import Schema
from dpsynth.training.fleet import train_fleet
from dpsynth.training.planner import CODEC, budget, signal
from dpsynth.training.recipe import Recipe, Seat

HERE = Path(__file__).resolve().parent.parent
FOLDER = HERE / "experiments" / "planner"
RUNS, CODECS = FOLDER / "planner-runs.json", FOLDER / "codec-runs.json"
SMALL, TRAINED = FOLDER / "small-runs.json", FOLDER / "trained-runs.json"
PLANNER = HERE / "dpsynth" / "training" / "planner.json"
# Target, columns that are left out, most rows to train on.
PUBLIC: Mapping[str, tuple[str, tuple[str, ...], int]] = {
    "law_school": ("pass_bar", (), 14_000),
    "cardio": ("cardio", ("id",), 14_000),
    "covertype_20k": ("Cover_Type", ("Soil_Type",), 14_000),
    "airbnb_nyc": ("room_type", ("last_review", "neighbourhood"), 14_000),
    "nltcs": ("traveling", (), 14_000),
}
SIMULATED = {"scm": 6_000, "mixture": 14_000, "parity": 6_000}
HELD = 6_000
DELTA, EPSILONS = 1e-5, (0.5, 2.0, 8.0)
PRESENT = {"codec": 0.05, "marginals": 0.08}


@dataclass(frozen=True)
class Setting:
    """What is compared; the share of DP-SGD is what the others leave.

    Attributes:
        model: `mixture`, which has no DP-SGD, or `autoregressive`.
        codec: Share of the codec.
        marginals: Share of the label × column tables.
        rest: Share of DP-SGD.
        heaps: Heap slots.
        asked: Factor on the number of tables that are chosen.
        rounds: Rounds in which they are chosen; 0 for as many as `Choice.planned` says.
        bins: Bins of a number.
    """

    model: str
    codec: float = PRESENT["codec"]
    marginals: float = PRESENT["marginals"]
    rest: float = 0.0
    heaps: int = 16
    asked: float = 1.0
    rounds: int = 0
    bins: int = CODEC["bins"]

    def recipe(self) -> Recipe:
        tables = 1 - self.codec - self.marginals - self.rest
        shares = {"codec": self.codec, "marginals": self.marginals, "tables": tables}
        privacy = {"delta": DELTA, "shares": shares}
        codec = {"bins": self.bins, "heaps": self.heaps}
        return Recipe(self.model, {}, privacy, codec, device="cpu")


# Shares of the label tables at the knots before the last fit.
LABELS = (0.4, 0.4, 0.08, 0.08, 0.08, 0.08)
# Shares of the codec and of DP-SGD as the fits before left them, where runs decided.
SHIPPED, SPENT = 0.2, 0.15
# Bins that are tried.
TRIED = (CODEC["bins"], 12)
# All but those of `codec`, which have their own file.
_OTHERS = ("rest", "asked", "marginals", "heaps")
# What is varied, what with: the first of each is the present value.
GROUPS: Mapping[str, Sequence[Setting]] = {
    "rest": [Setting("autoregressive", rest=rest) for rest in (0.3, 0.15)],
    "codec": [
        Setting("mixture", codec=codec, bins=bins)
        for bins, codec in itertools.product(TRIED, (SHIPPED, 0.05, 0.1))
    ],
    "asked": [Setting("mixture", asked=asked) for asked in (1.0, 0.6, 1.6)],
    "marginals": [Setting("mixture", marginals=share) for share in (0.08, 0.03, 0.2)],
    "heaps": [Setting("mixture", heaps=heaps) for heaps in (16, 32)],
    "small": [
        Setting("mixture", codec=SHIPPED, marginals=share, bins=TRIED[-1])
        for share in (PRESENT["marginals"], 0.2, 0.4, 0.7)
    ],
    "trained": [
        Setting("autoregressive", codec=SHIPPED, marginals=0.2, rest=rest, bins=TRIED[-1])
        for rest in (SPENT, 0.05, 0.02)
    ],
}
# Groups with a file of their own, and the first rows of each table that `small` is trained on,
# beside all rows.
FILES = {"codec": CODECS, "small": SMALL, "trained": TRAINED}
FIRST = (":500", ":2000", "")


def tables_of(name: str, folder: Path | None) -> tuple[Table, Table]:
    """Rows to train on, with their declared number, and rows to judge by."""
    name, _, first = name.partition(":")
    rng = stream(0, f"planner:{name}")
    if name in SIMULATED:
        rows = SIMULATED[name]
        whole = draw(name, rows + HELD, rng)
    else:
        target, dropped, rows = PUBLIC[name]
        assert folder is not None
        frame = pd.read_parquet(folder / f"{name}.parquet").drop(columns=list(dropped))
        frame = frame.iloc[rng.permutation(len(frame))[: rows + HELD]].reset_index(drop=True)
        drafted = Schema.infer(frame, target)
        schema = replace(
            drafted, columns=tuple(replace(c, provenance="declared") for c in drafted.columns)
        )
        whole = Table.from_frame(frame, schema)
    order = rng.permutation(len(whole))
    train, held = whole.take(order[:rows]), whole.take(order[rows:])
    train = train.take(np.arange(int(first or rows)))
    return Table(replace(whole.schema, expected_rows=len(train)), train.frame), held


def run(
    name: str, parts: tuple[Table, Table], epsilon: float, setting: Setting, seed: int
) -> dict[str, Any]:
    """Train and judge once."""
    rows, held = parts
    started, recipe, usual = time.process_time(), setting.recipe(), Choice.planned

    def planned(layout: Layout, mu: float, number: int, used: Tensor | None = None) -> Choice:
        choice = usual(layout, mu, number, used)
        most = len(candidates(layout))
        tables = min(most, max(1, round(choice.tables * setting.asked)))
        rounds = setting.rounds or (1 if tables in (1, most) else min(choice.rounds, tables))
        return replace(choice, tables=tables, rounds=rounds)

    Choice.planned = planned  # type: ignore[method-assign]
    try:
        (made,) = train_fleet(recipe, [Seat(rows, epsilon, seed)])
    finally:
        Choice.planned = usual  # type: ignore[method-assign]
    spent = time.process_time() - started
    key = derive(seed, "sample")
    codes = made.generator.sample(len(rows), FleetRng([key]))[0]
    table = made.codec.decode(codes, stream(key, "decode"))
    figures = fidelity(held, table, rng=np.random.default_rng(0))
    found = {name: figures[name] for name in ("tvd1", "tvd2", "tvd3")}
    found["c2st"] = c2st(held, table, rng=np.random.default_rng(0), max_rows=HELD)
    target = rows.schema.target
    assert target is not None
    tstr, _ = utility(table, held, target=target, rng=np.random.default_rng(0))
    found["auc"] = tstr["gbt_auc"]
    # Slots decide the signal, however many of them are in use.
    layout = Layout.of(rows.schema, bins=CODEC["bins"], heaps=setting.heaps)
    return {
        "table": name,
        "rows": len(rows),
        "epsilon": epsilon,
        "seed": seed,
        "signal": signal(layout, budget(epsilon, DELTA, (), 1), len(rows)),
        "setting": asdict(setting),
        "figures": {name: round(value, 5) for name, value in found.items()},
        "cpu": round(spent, 1),
    }


def wanted(only: Sequence[str]) -> Iterator[tuple[str, float, Setting, int]]:
    """Runs of these groups in the order of what they tell: any beginning can be compared."""
    first = ("cardio", "law_school", "scm", "nltcs", "airbnb_nyc")
    others = [name for name in (*PUBLIC, *SIMULATED) if name not in first]
    for names in (first, others):
        for group in only:
            parts = [f"{name}{rows}" for name in names for rows in FIRST]
            for name in parts if group == "small" else names:
                for epsilon in EPSILONS[: 2 if group in ("small", "trained") else None]:
                    for setting in GROUPS[group]:
                        for seed in range(3 if group == "trained" else 1):
                            yield name, epsilon, setting, seed


def _same(row: Mapping[str, Any], name: str, epsilon: float, setting: Setting, seed: int) -> bool:
    held = row["table"], row["epsilon"], Setting(**row["setting"]), row.get("seed", 0)
    return held == (name, epsilon, setting, seed)


def run_all(folder: Path, minutes: float, only: Sequence[str]) -> None:
    """As many of `wanted` as fit."""
    torch.set_num_threads(1)
    file = FILES.get(only[0], RUNS) if len(only) == 1 else RUNS
    held = json.loads(file.read_text())["runs"] if file.exists() else []
    until, cache = time.monotonic() + 60 * minutes, {}
    for name, epsilon, setting, seed in wanted(only or _OTHERS):
        if any(_same(row, name, epsilon, setting, seed) for row in held):
            continue
        if time.monotonic() > until:
            return
        if name not in cache:
            cache[name] = tables_of(name, folder)
        held.append(run(name, cache[name], epsilon, setting, seed))
        print(json.dumps(held[-1]), flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in held)
        file.write_text(f'{{"versions": {json.dumps(versions())}, "runs": [\n{lines}\n]}}\n')


def versions() -> dict[str, str]:
    """What the runs depend on."""
    return {
        "dpsynth": version("dpsynth"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


# -- fit -----------------------------------------------------------------------------------------

# Signals of the knots, and the shares that each may have.
KNOTS = (0.015625, 0.0625, 0.25, 1.0, 4.0, 16.0)
GRID: Mapping[str, Sequence[float]] = {
    "codec": (0.05, 0.075, 0.1, 0.15, 0.2),
    "marginals": (0.08, 0.2, 0.3, 0.4, 0.5),
    "bins": (12, 14, 16, 18, 20),
}
# What is not fitted: where other families are taken.
USUAL = {"faint": 0.02, "wide": 2048, "widest": 4096}


def loss_of(figures: Mapping[str, float]) -> float:
    """One number a run: 1 % of a distance weighs as much as .005 of C2ST or .002 of AUC."""
    distances = math.log(figures["tvd2"] * figures["tvd3"]) / 2
    return distances + 2 * figures["c2st"] - 5 * figures["auc"]


Curves = dict[tuple[str, float], tuple[float, dict[float, float]]]


def curves(
    rows: Sequence[Mapping[str, Any]],
    group: str,
    field: str,
) -> Curves:
    """Signal, and loss by share (mean of seeds), of each (table, ε) that has the present value and
    another."""
    usual = GROUPS[group][0]
    each: dict[tuple[str, float], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    at: dict[tuple[str, float], float] = {}
    for row in rows:
        setting = Setting(**row["setting"])
        same = replace(setting, **{field: getattr(usual, field)})
        if same == usual:
            key = row["table"], row["epsilon"]
            each[key][getattr(setting, field)].append(loss_of(row["figures"]))
            at[key] = row["signal"]
    found = {
        key: {share: float(np.mean(some)) for share, some in by.items()} for key, by in each.items()
    }
    kept = {key: (at[key], by) for key, by in found.items() if len(by) > 1}
    return {key: value for key, value in kept.items() if getattr(usual, field) in value[1]}


def regrets(found: Curves, shares: Sequence[float]) -> np.ndarray:
    """Loss beyond that of the best share that was run, of each (table, ε), under knots."""
    out = []
    for at, by in found.values():
        tried = sorted(by)
        place = math.log(min(max(at, KNOTS[0]), KNOTS[-1]))
        share = float(np.interp(place, np.log(KNOTS), shares))
        out.append(float(np.interp(share, tried, [by[x] for x in tried])) - min(by.values()))
    return np.array(out)


def named(table: str) -> str:
    """The table that first rows are of."""
    return table.partition(":")[0]


def by_table(found: Curves, values: np.ndarray) -> np.ndarray:
    """Mean over ε of each table: its runs are not independent."""
    names = np.array([named(name) for name, _ in found])
    return np.array([values[names == name].mean() for name in sorted(set(names))])


Shares = tuple[float, ...]


def monotone(path: Shares) -> bool:
    """Whether shares go one way with the signal."""
    return list(path) in (sorted(path), sorted(path, reverse=True))


def chosen(
    found: Curves, grid: Sequence[float], usual: float | Shares
) -> tuple[Shares, dict[str, float]]:
    """Monotone shares at the knots with the least mean regret over tables. Then, knot by knot, the
    share nearest to the present one that is within a standard error (paired, over the tables that
    the knot matters to) of it: where runs do not decide, the present value stays, one for all knots
    or one each."""
    before = usual if isinstance(usual, tuple) else (usual,) * len(KNOTS)
    paths = [path for path in itertools.product(grid, repeat=len(KNOTS)) if monotone(path)]
    best = min(paths, key=lambda path: by_table(found, regrets(found, path)).mean())
    path = best
    for knot in range(len(KNOTS)):
        for share in sorted(grid, key=lambda x: abs(x - before[knot])):
            moved = (*path[:knot], share, *path[knot + 1 :])
            if monotone(moved) and _within(found, moved, path):
                path = moved
                break
    present = by_table(found, regrets(found, before))
    facts = {"tables": len(present), "comparisons": len(found), "present": present.mean()}
    facts |= {
        name: by_table(found, regrets(found, one)).mean()
        for name, one in (("chosen", path), ("best", best))
    }
    return path, {name: round(float(value), 4) for name, value in facts.items()}


def _within(found: Curves, moved: Shares, path: Shares) -> bool:
    """Whether what a move costs is no more than its standard error."""
    apart = regrets(found, moved) - regrets(found, path)
    touched = np.abs(apart) > 1e-12
    if not touched.any():
        return True
    kept = {
        key: value for key, value, one in zip(found, found.values(), touched, strict=True) if one
    }
    each = by_table(kept, apart[touched])
    error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.inf
    return bool(each.mean() <= error)


def level(found: Curves) -> tuple[float, dict[str, float]]:
    """One share at every knot: of those that were tried the one nearest to the present whose mean
    loss over tables is within two standard errors (paired) of the least."""
    tried = sorted({share for _, by in found.values() for share in by})
    loss = {
        share: by_table(found, np.array([by[share] for _, by in found.values()])) for share in tried
    }
    best = min(tried, key=lambda share: loss[share].mean())
    costs = {share: loss[share] - loss[best] for share in tried}
    errors = {share: each.std(ddof=1) / math.sqrt(len(each)) for share, each in costs.items()}
    within = [share for share in tried if costs[share].mean() <= 2 * errors[share]]
    share = min(within, key=lambda one: abs(one - SPENT))
    facts = {"tables": len(loss[best]), "comparisons": len(found)}
    facts |= {
        name: costs[one].mean()
        for name, one in (("present", SPENT), ("chosen", share), ("best", best))
    }
    return share, {name: round(float(value), 4) for name, value in facts.items()}


def nearest(row: Mapping[str, Any], bins: Shares) -> Mapping[str, Any] | None:
    """The run as if its bins were the usual ones, if of those that were tried they are nearest to
    what the knots say: shares are compared at the bins that they will be used with."""
    place = math.log(min(max(row["signal"], KNOTS[0]), KNOTS[-1]))
    due = float(np.interp(place, np.log(KNOTS), bins))
    if row["setting"]["bins"] != min(TRIED, key=lambda tried: abs(tried - due)):
        return None
    return {**row, "setting": {**row["setting"], "bins": CODEC["bins"]}}


def fit() -> None:
    """Write planner.json from the runs."""
    later = json.loads(TRAINED.read_text())["runs"]
    trained, second = level(curves(later, "trained", "rest"))
    apart = json.loads(CODECS.read_text())["runs"]
    bins, third = chosen(curves(apart, "codec", "bins"), GRID["bins"], CODEC["bins"])
    small = json.loads(SMALL.read_text())["runs"]
    found = curves([*small, *apart], "small", "marginals")
    marginals, fourth = chosen(found, GRID["marginals"], LABELS)
    near = [nearest(row, bins) for row in apart]
    apart_at = [row for row in near if row is not None]
    codec, first = chosen(curves(apart_at, "codec", "codec"), GRID["codec"], SHIPPED)
    values = {
        "knots": KNOTS,
        "codec": codec,
        "marginals": marginals,
        **USUAL,
        "bins": bins,
        "trained": trained,
    }
    facts = {
        "command": "python scripts/fit_planner.py run --data FOLDER; python scripts/fit_planner.py "
        "fit",
        "tables": sorted({named(row["table"]) for row in [*apart, *small, *later]}),
        "seeds": sorted({row.get("seed", 0) for row in later}),
        "versions": versions(),
        "runs": len(apart) + len(small) + len(later),
        "regret": {"codec": first, "trained": second, "bins": third, "marginals": fourth},
    }
    PLANNER.write_text(json.dumps({"values": values, "fit": facts}, indent=1) + "\n")
    print(PLANNER.read_text())


def main() -> None:
    """Run or fit."""
    parser = argparse.ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(required=True)
    runs = actions.add_parser("run", help="train and judge")
    runs.add_argument("--data", type=Path, required=True, help="folder of the public tables")
    runs.add_argument("--minutes", type=float, default=30, help="start no run after these")
    runs.add_argument("--only", nargs="*", default=[], help=f"of {', '.join(GROUPS)}")
    runs.set_defaults(work=lambda o: run_all(o.data, o.minutes, o.only))
    actions.add_parser("fit", help="write planner.json").set_defaults(work=lambda o: fit())
    options = parser.parse_args()
    options.work(options)


if __name__ == "__main__":
    main()
