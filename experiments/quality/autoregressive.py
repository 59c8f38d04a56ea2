"""The family `autoregressive` on Adult, end to end private, judged on the real holdout.

See README.md beside this file for the question, the command and the result.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from dpsynth.data import Table
from dpsynth.datasets import load
from dpsynth.evaluation import evaluate
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat

FIGURES = {
    "TVD1": "tvd1",
    "TVD2": "tvd2",
    "TVD3": "tvd3",
    "C2ST": "c2st_auc",
    "AUC": "tstr_gbt_auc",
    "accuracy": "tstr_gbt_accuracy",
    "log-loss": "tstr_gbt_log_loss",
}


def parts(folder: Path) -> tuple[Table, Table]:
    """Training rows and holdout; the number of training rows is declared."""
    whole = load("adult")
    schema = whole.schema.select([n for n in whole.schema.names if n != "education-num"])
    rows, held = (
        Table.from_frame(pd.read_parquet(folder / f"adult_{part}.parquet")[schema.names], schema)
        for part in ("train", "test")
    )
    return Table(replace(schema, expected_rows=len(rows)), rows.frame), held


def judged(made: Table, rows: Table, held: Table, floors: Mapping[str, float]) -> dict[str, float]:
    """The figures of one synthetic table."""
    found = evaluate(made, train=rows, holdout=held, rng=np.random.default_rng(0), floors=floors)
    return {name: round(found.metrics[metric], 4) for name, metric in FIGURES.items()}


def trained(rows: Table, epsilon: float, seeds: range) -> list[tuple[dict[str, object], Table]]:
    """One fleet: facts of each run, and as many rows as it was trained on."""
    began = time.process_time()
    fleet = train_fleet(
        Recipe("autoregressive", device="cpu"), [Seat(rows, epsilon, seed) for seed in seeds]
    )
    each = (time.process_time() - began) / len(fleet)
    found = []
    for run in fleet:
        key = derive(int(run.seat.seed or 0), "sample")
        began = time.process_time()
        codes = run.generator.sample(len(rows), FleetRng([key]))[0]
        facts = {
            "model": "autoregressive",
            "epsilon": epsilon,
            "seed": run.seat.seed,
            "spent": round(run.ledger.epsilon, 6) if math.isfinite(epsilon) else epsilon,
            "steps": run.plan.steps,
            "batch": run.plan.batch,
            "sigma": round(run.plan.noise, 3),
            "train_seconds": round(each, 1),
            "sample_seconds": round(time.process_time() - began, 1),
        }
        found.append((facts, run.codec.decode(codes, stream(key, "decode"))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", type=Path, help="folder with the split and others' tables")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    settings = parser.parse_args()
    torch.set_num_threads(1)
    rows, held = parts(settings.reference)
    floors = evaluate(held, train=rows, holdout=held, rng=np.random.default_rng(0)).floors
    lines: list[dict[str, object]] = [
        {"model": "floor", **{n: round(floors[m], 4) for n, m in FIGURES.items() if m in floors}}
    ]

    def keep(facts: dict[str, object], made: Table) -> None:
        lines.append({**facts, **judged(made, rows, held, floors)})
        settings.out.write_text(json.dumps(lines, indent=1) + "\n")

    for name in ("aimgdp_same_codec", "swift_same_codec", "mst_same_codec"):
        file = settings.reference / f"adult_{name}_e1.parquet"
        made = Table.from_frame(pd.read_parquet(file)[rows.schema.names], rows.schema, strict=False)
        keep({"model": name, "epsilon": 1.0, "seed": 0}, made)
    for epsilon, seeds in ((1.0, 3), (4.0, 1), (0.5, 1), (10.0, 1)):
        for facts, made in trained(rows, epsilon, range(seeds)):
            keep(facts, made)


if __name__ == "__main__":
    main()
