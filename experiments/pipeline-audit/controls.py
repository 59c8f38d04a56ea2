"""Planted defects and the sound engine over 20 seeds, and step audits of given runs; writes
controls.json."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from dpsynth.data import Table
from dpsynth.schema import Column, Schema
from dpsynth.suite.defects import missed, run_defects
from dpsynth.suite.steps import audit_run_steps
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat
from dpsynth.training.run import Run

SEEDS, EPSILONS, ALPHA = range(20), (1.0, 4.0, 10.0), 1e-3
ROWS, BATCH, STEPS, RUNS = 4000, 40, 2000, 8


def defects() -> list[dict[str, Any]]:
    rows = []
    for seed in SEEDS:
        begun = time.monotonic()
        flagged = run_defects(seed=seed, alpha=ALPHA, device="cpu")
        spent = round(time.monotonic() - begun, 1)
        rows.append({"seed": seed, "flagged": dict(flagged), "seconds": spent})
        print(f"seed {seed}: not as expected {missed(flagged)}, {spent} s", flush=True)
    return rows


def run_of(epsilon: float) -> Run:
    """q = .01, T = 2000, default shares; nearly nothing to learn, since steps are looked at."""
    columns = (
        Column("job", "categorical", ("clerk", "cook", "nurse")),
        Column("rich", "categorical", ("no", "yes")),
    )
    schema = Schema(columns, target="rich", expected_rows=ROWS)
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({c.name: rng.choice(c.levels, ROWS) for c in columns})
    privacy = {"batch": BATCH, "steps": STEPS}
    recipe = Recipe("vae", {"hidden": [8], "latent": 2}, privacy, device="cpu")
    (trained,) = train_fleet(recipe, [Seat(Table.from_frame(frame, schema), epsilon, 0)])
    return Run.of(trained, data="made up")


def step_audit(name: str, run: Run, seconds: float) -> dict[str, Any]:
    audit = audit_run_steps(
        run, runs=RUNS, seconds=seconds, seed=2302, device="cpu", console=Console(stderr=True)
    )
    print(
        f"{name}: ε={audit.noise.claimed:.3f} lower {audit.epsilon:.3f} attainable "
        f"{audit.attainable:.3f} {audit.steps} steps {audit.seconds:.0f} s {audit.flags}",
        flush=True,
    )
    return {"name": name, **audit.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("controls.json"))
    parser.add_argument("--run", type=Path, help="folder of a run to audit too, within a minute")
    given = parser.parse_args()
    steps = [step_audit(f"small, ε={e:g}", run_of(e), 600) for e in EPSILONS]
    if given.run is not None:
        steps.append(step_audit("given run", Run.load(given.run), 60))
    body = {
        "command": "python experiments/pipeline-audit/controls.py [--run FOLDER]",
        "alpha": ALPHA,
        "steps": steps,
        "defects": defects(),
    }
    given.out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
