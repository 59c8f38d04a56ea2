"""Simulated tables whose label hangs on three columns at once: what synthetic rows keep of that.

One line of JSON a run; what is in the file already is not run again. README.md beside this file has
the question, the commands and the results.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier

from dpsynth.data import Table
from dpsynth.datasets.simulated import bayes_accuracy, draw, posterior
from dpsynth.evaluation.fidelity import fidelity
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat

HELD = 8000


def features(table: Table) -> np.ndarray:
    """All columns but the label as numbers (rows, columns)."""
    frame = table.frame.drop(columns="y")
    columns = [
        column.cat.codes if str(column.dtype) == "category" else column.astype(float)
        for _, column in frame.items()
    ]
    return np.stack([np.asarray(column, dtype=float) for column in columns], axis=1)


def labels(table: Table) -> np.ndarray:
    return table.frame["y"].cat.codes.to_numpy()


def accuracy(made: Table, held: Table) -> float:
    """Of trees trained on `made`, mean of three seeds. Splits try half of the columns each: greedy
    ones may never try those of a parity, on real rows too."""
    found = []
    for seed in range(3):
        trees = HistGradientBoostingClassifier(
            max_iter=300, max_features=0.5, early_stopping=False, random_state=seed
        )
        label = labels(made)
        if len(set(label)) > 1:
            trees.fit(features(made), label)
            found.append(trees.score(features(held), labels(held)))
        else:
            found.append(float((labels(held) == label[0]).mean()))
    return float(np.mean(found))


def law(made: Table, name: str) -> float:
    """Share of rows with the likelier of the two labels under the true law."""
    return float(((posterior(made, name) > 0.5) == (labels(made) == 1)).mean())


def judged(made: Table, held: Table, name: str) -> dict[str, float]:
    near = fidelity(held, made, rng=np.random.default_rng(0))
    found = {"accuracy": accuracy(made, held), "law": law(made, name)}
    found |= {figure.upper(): near[figure] for figure in ("tvd1", "tvd2", "tvd3")}
    return {figure: round(value, 4) for figure, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file of JSON lines; it grows")
    parser.add_argument("--tables", nargs="+", default=["parity", "mixture", "scm"])
    parser.add_argument("--models", nargs="+", required=True, help="families; `real`: real rows")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0])
    parser.add_argument("--rows", nargs="+", type=int, default=[21_000])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 3), metavar=("FIRST", "END"))
    parser.add_argument("--recipe", type=json.loads, default={}, help="options, privacy, codec")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    lines = settings.out.read_text().splitlines() if settings.out.is_file() else []
    done = {json.dumps(json.loads(line)["run"]) for line in lines}
    for seed in range(*settings.seeds):
        for name in settings.tables:
            for rows in settings.rows:
                table = draw(name, rows + HELD, np.random.default_rng(seed))
                train = Table(
                    replace(table.schema, expected_rows=rows),
                    table.frame.iloc[:rows].reset_index(drop=True),
                )
                held = Table(table.schema, table.frame.iloc[rows:].reset_index(drop=True))
                for epsilon in settings.epsilons:
                    for model in settings.models:
                        shown = epsilon if math.isfinite(epsilon) else "inf"
                        run = [name, rows, model, settings.recipe, shown, seed]
                        if json.dumps(run) in done:
                            continue
                        began = time.process_time()
                        made = train
                        if model != "real":
                            recipe = Recipe(model, device="cpu", **settings.recipe)
                            (one,) = train_fleet(recipe, [Seat(train, epsilon, seed)])
                            key = derive(seed, "sample")
                            codes = one.generator.sample(rows, FleetRng([key]))[0]
                            made = one.codec.decode(codes, stream(key, "decode"))
                        seconds = round(time.process_time() - began, 1)
                        found = judged(made, held, name)
                        found |= {"bayes": round(bayes_accuracy(held, name), 4)}
                        with settings.out.open("a") as file:
                            file.write(json.dumps({"run": run, "seconds": seconds, **found}) + "\n")
                        print(*run, f"{seconds:.0f} s", found, flush=True)


if __name__ == "__main__":
    main()
