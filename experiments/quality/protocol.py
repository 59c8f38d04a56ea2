"""Models × budgets × seeds on the tables of the protocol, end to end private, judged on a holdout.

One line of JSON a run; what is in the file already is not run again. See README.md beside this
file for the question, the commands and the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dpsynth.baselines.smote import smote
from dpsynth.data import Split, Table
from dpsynth.evaluation import evaluate
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.schema import Schema
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import Recipe, Seat

# Columns that are left out: a twin, an identifier, a survey weight that is not for modelling.
DROPPED = {"adult": ["education-num"], "cardio": ["id"], "census_income_kdd": ["instance weight"]}
FIGURES = {
    "TVD1": "tvd1",
    "TVD2": "tvd2",
    "TVD3": "tvd3",
    "C2ST": "c2st_auc",
    "AUC": "tstr_gbt_auc",
    "accuracy": "tstr_gbt_accuracy",
    "macro-F1": "tstr_gbt_macro_f1",
    "log-loss": "tstr_gbt_log_loss",
    "logistic AUC": "tstr_logistic_auc",
}
# Beyond it a classifier learns from so many rows only.
MAX_ROWS = 50_000


def whole(folder: Path, name: str) -> Table:
    """A table under a schema whose bounds and levels count as known: what is compared pays for
    everything else, and every model knows the same."""
    facts = json.loads((folder / "catalog.json").read_text())[name]
    frame = pd.read_parquet(folder / facts["file"]).drop(columns=DROPPED.get(name, []))
    for column, kind in facts["column_kinds"].items():
        if column in frame and kind in ("categorical", "ordinal"):
            codes = frame[column]
            frame[column] = codes.astype("string").astype(object).where(codes.notna(), None)
    drafted = Schema.infer(frame, facts["target"])
    columns = tuple(replace(column, provenance="declared") for column in drafted.columns)
    return Table.from_frame(frame, Schema(columns, facts["target"], source=name))


def parts(table: Table, seed: int, rows: int | None) -> tuple[Table, Table]:
    """70 % to train on, 30 % held out; of the first so many where `rows` is given."""
    split = Split.random(table, np.random.default_rng(seed), holdout=0.15, reference=0.15)
    held = pd.concat([split.holdout.frame, split.reference.frame], ignore_index=True)
    members = split.members
    if rows is not None:
        frame = members.frame.iloc[:rows].reset_index(drop=True)
        members = Table(replace(members.schema, expected_rows=len(frame)), frame)
    return members, Table(split.holdout.schema, held)


def judged(
    made: Table, rows: Table, held: Table, floors: Mapping[str, float] | None
) -> tuple[dict[str, float], Mapping[str, float]]:
    """Figures of one synthetic table, and the floors."""
    rng = np.random.default_rng(0)
    found = evaluate(made, train=rows, holdout=held, rng=rng, max_rows=MAX_ROWS, floors=floors)
    known = found.floors if made is held else found.metrics
    return {n: round(known[m], 5) for n, m in FIGURES.items() if m in known}, found.floors


def sampled(run: Trained, rows: int) -> Table:
    """As many rows as it was trained on."""
    key = derive(int(run.seat.seed or 0), "sample")
    codes = run.generator.sample(rows, FleetRng([key]))[0]
    return run.codec.decode(codes, stream(key, "decode"))


def asked(settings: argparse.Namespace, model: str, rows: int) -> Recipe:
    """δ is 1e-5, or 1/(2n) where that is less."""
    least = {"delta": 0.5 / rows} if 0.5 / rows < 1e-5 else {}
    privacy = {**least, **settings.recipe.get("privacy", {})}
    return Recipe(model, device="cpu", **{**settings.recipe, "privacy": privacy})


def wanted(settings: argparse.Namespace, done: set[str]) -> Iterator[tuple[str, int, str, float]]:
    """Runs that are not done yet: seeds outermost, so that what is there is balanced."""
    for seed in range(*settings.seeds):
        for name in settings.tables:
            for epsilon in settings.epsilons:
                for model in settings.models:
                    if key(settings, name, seed, model, epsilon) not in done:
                        yield name, seed, model, epsilon


def key(settings: argparse.Namespace, name: str, seed: int, model: str, epsilon: float) -> str:
    """What makes a run the same."""
    return json.dumps([name, settings.rows, model, settings.recipe, epsilon, seed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with catalog.json and the tables")
    parser.add_argument("out", type=Path, help="file of JSON lines; it grows")
    parser.add_argument("--tables", nargs="+", required=True)
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        help="families; `floor`: held-out rows, and classifiers of real ones; `smote` at inf alone",
    )
    parser.add_argument("--epsilons", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 10), metavar=("FIRST", "END"))
    parser.add_argument("--rows", type=int, help="train on so many rows only")
    parser.add_argument("--recipe", type=json.loads, default={}, help="options, privacy, codec")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    lines = settings.out.read_text().splitlines() if settings.out.is_file() else []
    done = {json.loads(line)["key"] for line in lines}
    tables: dict[str, Table] = {}
    floors: dict[tuple[str, int], Mapping[str, float]] = {}
    for name, seed, model, epsilon in wanted(settings, done):
        if name not in tables:
            tables = {name: whole(settings.data, name)}
        rows, held = parts(tables[name], seed, settings.rows)
        began = time.process_time()
        facts: dict[str, object] = {}
        if model == "floor":
            made = held
        elif model == "smote":
            made = smote(rows, len(rows), np.random.default_rng(seed), epsilon=epsilon)
        else:
            (run,) = train_fleet(asked(settings, model, len(rows)), [Seat(rows, epsilon, seed)])
            made = sampled(run, len(rows))
            spent = run.ledger.epsilon
            facts = {
                "spent": round(spent, 6) if math.isfinite(spent) else "inf",
                "shares": dict(run.plan.shares),
                "steps": run.plan.steps,
                "batch": run.plan.batch,
            }
        seconds = round(time.process_time() - began, 1)
        found, floors[name, seed] = judged(made, rows, held, floors.get((name, seed)))
        line = {
            "key": key(settings, name, seed, model, epsilon),
            "table": name,
            "rows": len(rows),
            "model": model,
            "recipe": settings.recipe,
            "epsilon": epsilon if math.isfinite(epsilon) else "inf",
            "seed": seed,
            **facts,
            "seconds": seconds,
            **found,
        }
        with settings.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
        print(f"{name} {len(rows)} {model} ε={epsilon:g} seed {seed}: {seconds:.0f} s {shown}")


if __name__ == "__main__":
    main()
