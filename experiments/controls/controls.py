"""Attacks on controls whose answers are known, on the embedded Adult table; writes controls.json.

Run as `python experiments/controls/controls.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from dpsynth.audit.attacks import DIAGNOSTICS, QUICK
from dpsynth.audit.attribute import infer_attributes, single_out
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import Audit, audit
from dpsynth.baselines import controls
from dpsynth.data import Split, Table
from dpsynth.datasets import load
from dpsynth.randomness import stream

ROWS = 5000
LEAKS = (0.05, 0.2, 0.5)
SEEDS, FRESH_SEEDS = 5, 20
SECRETS = ("age", "marital-status", "occupation", "income")
Parts = dict[str, Table]


def cut(seed: int) -> tuple[Parts, Table]:
    """Members, holdout and the attacker's rows, 5000 each, and the population beyond them."""
    split = Split.random(load("adult"), stream(seed, "split"), holdout=0.2, reference=0.6)
    known, population = controls.halve(split.reference, stream(seed, "halves"))
    sizes = {"members": split.members, "holdout": split.holdout, "reference": known}
    rng = stream(seed, "rows")
    cut_to = {name: part.take(rng.permutation(len(part))[:ROWS]) for name, part in sizes.items()}
    return cut_to, population


def makers(parts: Parts, population: Table, seed: int) -> dict[str, tuple[float, Any]]:
    """AUC by theory, and how the synthetic table is made, of each leaking control."""
    members, rng = parts["members"], stream(seed, "controls")
    found: dict[str, tuple[float, Callable[[], Table]]] = {
        f"p-leak {p:g}": (
            (1 + p) / 2,
            lambda p=p: controls.p_leak(members, population, p, ROWS, rng),
        )
        for p in LEAKS
    }
    found["copy"] = (1.0, lambda: controls.copy(members))
    bootstrap = lambda: members.take(rng.integers(ROWS, size=ROWS))  # noqa: E731
    found["bootstrap copy"] = ((2 - np.exp(-1)) / 2, bootstrap)
    return found


def attacked(synthetic: Table, parts: Parts, seed: int) -> Audit:
    result, _ = audit(
        synthetic, **parts, white_box=None, ceiling=Ceiling.none(), max_candidates=2 * ROWS,
        rng=stream(seed, "audit"), attacks=QUICK,
    )  # fmt: skip
    return result


def facts(name: str, seed: int, theory: float, result: Audit) -> dict[str, Any]:
    best = result.strongest
    return {
        "control": name,
        "seed": seed,
        "theory_auc": float(theory),
        "strongest": best.name,
        "auc": best.auc,
        "auc_low": best.auc_low,
        "auc_high": best.auc_high,
        "tpr1": best.tpr1,
        "null": [result.null_low, result.null_high],
        "blind_auc": result.blind_auc,
        "aucs": {attack.name: attack.auc for attack in result.attacks},
        "bands": dict(result.bands),
        "p_values": dict(result.p_values),
        "leaks": list(result.leaks),
    }


def inferred(name: str, synthetic: Table, parts: Parts, seed: int) -> list[dict[str, Any]]:
    rng = stream(seed, "inference")
    sides = {key: parts[key] for key in ("members", "holdout")}
    found = infer_attributes(
        synthetic, **parts, rng=rng, secrets=SECRETS, max_candidates=4000, max_train=5000
    )
    return [
        {
            "control": name, "seed": seed, "target": each.target, "attacker": each.attacker,
            "members": each.members, "holdout": each.control, "advantage": each.advantage,
        }
        for each in (*found, *single_out(synthetic, **sides, rng=rng))
    ]  # fmt: skip


def measured() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    runs, attributes = [], []
    for seed in range(FRESH_SEEDS):
        parts, population = cut(seed)
        fresh = controls.fresh(population, ROWS, stream(seed, "fresh"))
        runs.append(facts("fresh", seed, 0.5, attacked(fresh, parts, seed)))
        if seed >= SEEDS:
            continue
        attributes += inferred("fresh", fresh, parts, seed)
        attributes += inferred("copy", controls.copy(parts["members"]), parts, seed)
        for name, (theory, make) in makers(parts, population, seed).items():
            runs.append(facts(name, seed, theory, attacked(make(), parts, seed)))
            print(name, seed, f"{runs[-1]['auc']:.4f}", flush=True)
    return runs, attributes


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name in dict.fromkeys(run["control"] for run in runs):
        own = [run for run in runs if run["control"] == name]
        areas = np.array([run["auc"] for run in own])
        proper = [a for a in own[0]["aucs"] if a not in DIAGNOSTICS]
        ratio = np.array([run["aucs"]["nn_ratio_quantile"] for run in own])
        lines.append(
            {
                "control": name,
                "seeds": len(own),
                "theory_auc": own[0]["theory_auc"],
                "strongest_auc": [areas.min(), areas.mean(), areas.max()],
                "nn_ratio_quantile_auc": [ratio.min(), ratio.mean(), ratio.max()],
                "tpr1_mean": float(np.mean([run["tpr1"] for run in own])),
                "called_a_leak": sum(bool(run["leaks"]) for run in own),
                "strongest_inside_null": sum(
                    run["null"][0] < run["auc"] < run["null"][1] for run in own
                ),
                "mean_auc": {a: float(np.mean([r["aucs"][a] for r in own])) for a in proper},
            }
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("controls.json"))
    path = parser.parse_args().out
    runs, attributes = measured()
    versions = {name: version(name) for name in ("dpsynth", "numpy", "scipy", "scikit-learn")}
    body = {
        "command": "python experiments/controls/controls.py",
        "rows": ROWS,
        "python": platform.python_version(),
        "versions": versions,
        "summary": summary(runs),
        "runs": runs,
        "inference": attributes,
    }
    path.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
