"""Trains each family once an ε with 1000 canaries and bounds ε from that; writes one-run.json."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from dpsynth import datasets
from dpsynth.audit.bounds import Family
from dpsynth.audit.one_run import OneRunAudit, audit_one_run
from dpsynth.data import Split, Table
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng, stream
from dpsynth.training.canaries import (
    CanaryScores,
    CanarySettings,
    coins_of,
    record_canaries,
    scaled_epsilon,
    scaled_profile,
    with_records,
)
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import Recipe, Seat

FAMILIES = ("vae", "gan", "diffusion")
EPSILONS = (1.0, 4.0, 10.0)
CANARIES, ROWS, BATCH, STEPS, DELTA = 1000, 5000, 64, 1000, 1e-5
AUDITOR = 2305_08846


def rows() -> Split:
    """A tenth of Adult: members, and as many reference rows."""
    table = datasets.load("adult").take(np.arange(2 * ROWS))
    return Split.random(table, stream(0, "split"), holdout=0.1, reference=0.4)


def recipe(family: str) -> Recipe:
    privacy = {"batch": BATCH, "steps": STEPS, "delta": DELTA}
    return Recipe(family, {}, privacy, device="cpu", capture=False)


def family_of(events: Sequence[Event], plan: PrivacyPlan) -> Family:
    return Family.of_profiles(
        lambda scale: scaled_profile(events, scale),
        lambda scale: scaled_epsilon(events, scale, plan.delta),
        steps=16,
    )


def judged(
    one: Trained, scores: np.ndarray, coins: np.ndarray, events: Sequence[Event], kind: str
) -> OneRunAudit:
    rng = stream(0, f"{one.recipe.model}/{one.plan.epsilon}/{kind}")
    claim = family_of(events, one.plan)
    return audit_one_run(scores, coins, claim, delta=DELTA, kind=kind, rng=rng)


def gradients(family: str, split: Split) -> list[tuple[Trained, OneRunAudit]]:
    canaries = CanaryScores(CANARIES, [AUDITOR + i for i in range(len(EPSILONS))])
    seats = [Seat(split.members, epsilon, 0) for epsilon in EPSILONS]
    trained = train_fleet(recipe(family), seats, callbacks=[canaries])
    scores, coins = canaries.observed()
    return [
        (one, judged(one, s, c, [one.plan.training_event("dpsgd")], "gradient"))
        for one, s, c in zip(trained, scores, coins, strict=True)
    ]


def records(family: str, split: Split) -> list[tuple[Trained, OneRunAudit]]:
    settings = CanarySettings(CANARIES, "record")
    keys = [AUDITOR + i for i in range(len(EPSILONS))]
    tables = [with_records(split.members, settings, key) for key in keys]
    seats = [Seat(table, e, 0) for table, e in zip(tables, EPSILONS, strict=True)]
    other = Seat(split.reference, float("inf"), 0, "reference")
    *trained, reference = train_fleet(recipe(family), [*seats, other])

    def scored(one: Trained, table: Table) -> np.ndarray:
        codes = one.codec.encode(table)[None]
        return one.generator.scores(codes, FleetRng([0]), draws=8)[0].numpy()

    found = []
    for key, one in zip(keys, trained, strict=True):
        planted = record_canaries(split.members.schema, CANARIES, key)
        scores = scored(one, planted) - scored(reference, planted)
        events = one.ledger.events
        found.append((one, judged(one, scores, coins_of(key, CANARIES), events, "record")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("one-run.json"))
    out = parser.parse_args().out
    split, runs = rows(), []
    for family in FAMILIES:
        for work in (gradients, records):
            began = time.perf_counter()
            for one, audit in work(family, split):
                print(f"{family:10} ε={one.plan.epsilon:g} {audit.line}", flush=True)
                facts = {"family": family, "epsilon": one.plan.epsilon, "sigma": one.plan.noise}
                runs.append({**facts, "q": one.plan.q, **json.loads(audit.to_json())})
            runs[-1]["minutes_of_three"] = round((time.perf_counter() - began) / 60, 1)
    packages = ("dpsynth", "torch", "opacus", "dp-accounting", "numpy", "scipy", "lightning")
    body = {
        "command": "python experiments/one-run/one_run.py",
        "rows": len(split.members),
        "batch": BATCH,
        "steps": STEPS,
        "auditor_key": AUDITOR,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "runs": runs,
    }
    out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
