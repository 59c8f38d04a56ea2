"""Simulated wide tables: what DP-SGD adds where most pairs of columns are never asked for.

Forty columns of 2 to 40 levels, half of them noisy functions of six hidden numbers, half of three
columns before them and of a product of two; a label that hangs on the hidden numbers and on six
columns. One line of JSON a run; what is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from protocol import asked, judged, parts, sampled

from dpsynth.data import Table
from dpsynth.schema import Column, Schema
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat

ROWS, COLUMNS, HIDDEN = 60_000, 40, 6
LEVELS, SHARES = (2, 3, 4, 5, 8, 12, 20, 40), (0.25, 0.15, 0.1, 0.1, 0.15, 0.1, 0.1, 0.05)


def codes(rng: np.random.Generator) -> list[np.ndarray]:
    """Level numbers (ROWS,) of every column, the label last."""
    hidden = rng.standard_normal((ROWS, HIDDEN))
    made: list[np.ndarray] = []
    for place in range(COLUMNS):
        levels = int(rng.choice(LEVELS, p=SHARES))
        logits = np.tile(1.5 * rng.standard_normal(levels), (ROWS, 1))
        if place % 2 == 0 or place < 4:
            bent = np.tanh(0.8 * hidden @ rng.standard_normal((HIDDEN, 5)))
            logits += 1.5 * bent @ rng.standard_normal((5, levels))
        else:
            for one in rng.choice(place, 3, replace=False):
                logits += 1.2 * effects(rng, levels, made[one])
            logits += effects(rng, levels, *(made[i] for i in rng.choice(place, 2, replace=False)))
        made.append((logits + rng.gumbel(size=logits.shape)).argmax(1))
    score = 0.8 * hidden @ rng.standard_normal(HIDDEN) - 1.5
    for one in rng.choice(COLUMNS, 6, replace=False):
        score += 0.8 * effects(rng, 1, made[one])[:, 0]
    made.append((rng.random(ROWS) < 1 / (1 + np.exp(-score))).astype(int))
    return made


def effects(rng: np.random.Generator, levels: int, *columns: np.ndarray) -> np.ndarray:
    """A normal effect on each level of each combination of the columns' own (ROWS, levels)."""
    table = rng.standard_normal((*(column.max() + 1 for column in columns), levels))
    return table[columns]


def drawn(seed: int) -> Table:
    """A table of its own law."""
    columns, frame = [], {}
    for place, held in enumerate(codes(np.random.default_rng([seed, 40]))):
        name = "y" if place == COLUMNS else f"c{place}"
        levels = tuple(str(level) for level in range(held.max() + 1))
        columns.append(Column(name, "categorical", levels, source="definition"))
        frame[name] = pd.Series(pd.Categorical.from_codes(held, pd.Index(levels)))
    return Table(Schema(tuple(columns), target="y", expected_rows=ROWS), pd.DataFrame(frame))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file of JSON lines; it grows")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 3), metavar=("FIRST", "END"))
    parser.add_argument("--recipe", type=json.loads, default={}, help="options, privacy, codec")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    lines = settings.out.read_text().splitlines() if settings.out.is_file() else []
    done = {tuple(json.loads(line)["key"]) for line in lines}
    for seed in range(*settings.seeds):
        rows, held = parts(drawn(seed), seed, None)
        floors = None
        for epsilon in settings.epsilons:
            for model in settings.models:
                key = (seed, epsilon, model, json.dumps(settings.recipe))
                if key in done:
                    continue
                began = time.process_time()
                (run,) = train_fleet(asked(settings, model, len(rows)), [Seat(rows, epsilon, seed)])
                made = sampled(run, len(rows))
                seconds = round(time.process_time() - began, 1)
                found, floors = judged(made, rows, held, floors)
                with settings.out.open("a") as file:
                    file.write(json.dumps({"key": key, "seconds": seconds, **found}) + "\n")
                shown = " ".join(f"{name} {value:.4f}" for name, value in found.items())
                print(f"{model} ε={epsilon:g} seed {seed}: {seconds:.0f} s {shown}", flush=True)


if __name__ == "__main__":
    main()
