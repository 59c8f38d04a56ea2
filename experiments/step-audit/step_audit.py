"""Audits the private steps of tiny fleets with gradient canaries; writes step-audit.json."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

from dpsynth.audit.step import SamplerAudit, StepAudit, audit_sampler, audit_steps
from dpsynth.data import Table
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.schema import Column, Schema
from dpsynth.training.canary import StepCanary
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import Recipe, Seat

ROWS, BATCH, STEPS, RUNS = 400, 4, 2000, 8
EPSILONS = (1.0, 4.0, 10.0)
DELTA = 1e-5
OPTIONS = {
    "vae": {"hidden": [8], "latent": 2},
    "gan": {"hidden": [8], "latent": 2, "public_batch": 8, "ladder": 10},
    "diffusion": {"hidden": [8], "draws": 2},
}
# Every family under the default engine, and the other two engines once.
FLEETS = [(family, "taps", epsilon) for family in OPTIONS for epsilon in EPSILONS]
FLEETS += [("vae", engine, 4.0) for engine in ("opacus_hooks", "opacus_ghost")]
AUDITOR = 2302_07956


def table() -> Table:
    """Three independent columns: the audit looks at steps, not at what is learnt."""
    rng = np.random.default_rng(0)
    columns = {
        "sex": ["f", "m"],
        "job": ["clerk", "cook", "nurse"],
        "rich": ["no", "yes"],
    }
    schema = Schema(
        tuple(Column(name, "categorical", tuple(levels)) for name, levels in columns.items()),
        target="rich",
        expected_rows=ROWS,
    )
    frame = pd.DataFrame({name: rng.choice(levels, ROWS) for name, levels in columns.items()})
    return Table.from_frame(frame, schema)


def audit(family: str, engine: str, epsilon: float) -> tuple[Trained, StepAudit, SamplerAudit]:
    # A thousandth of μ² is measured, so that nearly all of ε is spent on steps; only that part is
    # audited, and only that part counts as claimed.
    privacy = {
        "batch": BATCH,
        "steps": STEPS,
        "clip": 1.0,
        "delta": DELTA,
        "shares": {"rows": 0.0, "codec": 0.0, "marginals": 0.001},
    }
    recipe = Recipe(family, OPTIONS[family], privacy, engine=engine, device="cpu")
    rows = table()
    canary = StepCanary(key=AUDITOR)
    trained = train_fleet(
        recipe, [Seat(rows, epsilon, seed) for seed in range(RUNS)], callbacks=[canary]
    )
    plan, seen = trained[0].plan, canary.observed()
    event = plan.training_event("dpsgd")
    steps = audit_steps(
        seen.scores,
        seen.present,
        seen.noise,
        sigma=plan.noise,
        epsilon_of=lambda sigma: compose_epsilon([replace(event, sigma=sigma)], DELTA),
    )
    return trained[0], steps, audit_sampler(seen.batches, q=plan.q)


def row(family: str, engine: str, epsilon: float) -> dict[str, object]:
    trained, steps, sampler = audit(family, engine, epsilon)
    return {
        "family": family,
        "engine": engine,
        "epsilon": epsilon,
        "epsilon_paid": trained.ledger.epsilon,
        "epsilon_of_steps": steps.claimed,
        "sigma": steps.sigma,
        "q": trained.plan.q,
        "steps": STEPS,
        "runs": RUNS,
        "clip": trained.plan.clip,
        "delta": DELTA,
        "guesses": steps.guesses,
        "right": steps.right,
        "epsilon_lower": steps.bound.epsilon,
        "sigma_upper": steps.bound.sigma,
        "epsilon_lower_by_rates": steps.by_rates.epsilon,
        "epsilon_attainable": steps.attainable.epsilon,
        "above_claim": steps.bound.epsilon > steps.claimed,
        "p_step": {name: float(p) for name, p in steps.p_values.items()},
        "p_sampler": {name: float(p) for name, p in sampler.p_values.items()},
        "flags": [*steps.flags, *sampler.flags],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("step-audit.json"))
    out = parser.parse_args().out
    rows = []
    for fleet in FLEETS:
        rows.append(row(*fleet))
        r = rows[-1]
        print(
            f"{r['family']:10} {r['engine']:13} ε={r['epsilon_of_steps']:.4f} "
            f"ε_LB={r['epsilon_lower']:.4f} by rates {r['epsilon_lower_by_rates']:.4f} "
            f"attainable {r['epsilon_attainable']:.4f} flags {r['flags']}",
            flush=True,
        )
    packages = ("dpsynth", "torch", "opacus", "dp-accounting", "numpy", "scipy", "lightning")
    body = {
        "command": "python experiments/step-audit/step_audit.py",
        "confidence": 0.95,
        "alpha": 1e-3,
        "seeds": list(range(RUNS)),
        "auditor_key": AUDITOR,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "fleets": rows,
    }
    out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
