"""How well do shadow models tell members of a diffusion model on Adult, and how long does it take?

`python shadow_audit.py NAME [--state FOLDER]` runs one of `CASES` and adds it to shadow-audit.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from dpsynth import datasets
from dpsynth.audit.attacks import ATTACKS
from dpsynth.audit.membership import auc_interval, null_band, tpr_at
from dpsynth.data import Split, Table
from dpsynth.randomness import stream
from dpsynth.suite.shadows import pseudo_targets, shadow_attacks, targeted_attack, train_shadows
from dpsynth.suite.signals import Settings
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat
from dpsynth.training.run import Run

HERE = Path(__file__).parent
SHADOWS, SEED = 32, 7


@dataclass(frozen=True)
class Case:
    """Rows, steps and ε of one audit."""

    members: int | None  # None: as many as the split has
    candidates: int  # a side
    batch: int
    steps: int
    epsilon: float


CASES = {
    "plain": Case(None, 2000, 256, 300, math.inf),
    "overfitted": Case(1200, 1000, 128, 600, math.inf),
    "plain-eps4": Case(None, 2000, 256, 300, 4.0),
    "overfitted-eps4": Case(1200, 1000, 128, 600, 4.0),
}


def parts(case: Case) -> tuple[Table, Table, Table, Table]:
    """Members of the run, attacked members, as many others, and the attacker's rows."""
    split = Split.random(datasets.load("adult"), stream(SEED, "split"), holdout=0.1, reference=0.6)
    size = case.members or len(split.members)
    members = split.members.take(np.arange(size))
    members = replace(members, schema=replace(members.schema, expected_rows=size))
    inside = members.take(stream(SEED, "inside").permutation(size)[: case.candidates])
    outside = split.holdout.take(np.arange(case.candidates))
    return members, inside, outside, split.reference


def recipe(case: Case) -> Recipe:
    options = {"hidden": [64, 64], "draws": 2}
    privacy = {"batch": case.batch, "steps": case.steps, "delta": 1e-5}
    return Recipe("diffusion", options, privacy, device="cpu")


def measured(pair: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    area, low, high = auc_interval(*pair)
    rng = stream(SEED, "tpr")
    ten, one = tpr_at(*pair, 0.1, rng), tpr_at(*pair, 0.01, rng)
    return {"auc": area, "low": low, "high": high, "tpr10": ten.tpr, "tpr1": one.tpr}


def quick(run: Run, synthetic: Table, inside: Table, outside: Table, known: Table) -> dict:
    """The attacks that need no shadow, on the same candidates."""
    both = Table(inside.schema, pd.concat([inside.frame, outside.frame], ignore_index=True))
    found = {}
    for name, attack in ATTACKS.items():
        scores = attack(both, synthetic, known, stream(SEED, "quick"))
        found[name] = measured((scores[: len(inside)], scores[len(inside) :]))
    return found


def audit(name: str, state: Path, console: Console) -> dict:
    case = CASES[name]
    members, inside, outside, population = parts(case)
    folder = state / name
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / "minutes.json"  # of all starts together
    minutes = json.loads(clock.read_text()) if clock.is_file() else {}
    begun = time.process_time()

    def lap(what: str) -> None:
        nonlocal begun
        minutes[what] = round(minutes.get(what, 0) + (time.process_time() - begun) / 60, 2)
        clock.write_text(json.dumps(minutes))
        begun = time.process_time()
        console.print(f"{name}: {what} {minutes[what]} CPU minutes")

    if not (folder / "run").is_dir():
        trained = train_fleet(recipe(case), [Seat(members, case.epsilon, SEED + 1)])
        Run.of(trained[0], data="adult").save(folder / "run")
    run = Run.load(folder / "run")
    synthetic = run.sample_table(len(members), rng=SEED)
    lap("audited run")
    candidates = Table(run.schema, pd.concat([inside.frame, outside.frame], ignore_index=True))
    shadows = train_shadows(
        run,
        candidates,
        population,
        count=SHADOWS,
        seed=SEED,
        folder=folder / "shadows",
        console=console,
        device="cpu",
    )
    lap("shadows")
    common = {"console": console, "synthetic": synthetic, "settings": Settings(draws=8)}
    scores = shadow_attacks(run, shadows, inside, outside, rng=stream(SEED, "a"), **common)
    lap("signals, tables and attacks")
    aimed, _ = targeted_attack(run, shadows, inside, outside, **common)
    chosen = pseudo_targets(run, shadows, inside, outside, rng=stream(SEED, "p"), **common)
    lap("targeted queries and two pseudo-targets")
    mean = {n: float(np.mean([measured(p[n])["auc"] for p in chosen])) for n in scores}
    best = max(mean, key=mean.__getitem__)
    return {
        "case": {**case.__dict__, "members": len(members), "epsilon": str(case.epsilon)},
        "rows of shadows": [min(shadows.rows), max(shadows.rows)],
        "null band": null_band(len(inside), len(outside)),
        "chosen on pseudo-targets": best,
        "pseudo-target auc": mean,
        "attacks": {n: measured(pair) for n, pair in scores.items()},
        "targeted": measured(aimed),
        "targeted null band": null_band(*map(len, aimed)),
        "quick": quick(run, synthetic, inside, outside, shadows.known),
        "CPU minutes": minutes,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--state", type=Path, default=Path("shadow-audit-state"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    path = HERE / "shadow-audit.json"
    for name in given.cases:
        result = audit(name, given.state, Console())
        held = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**held, name: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
