"""Audits whole pipelines by 1000 + 1000 trainings each; writes pipeline-audit.json."""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from dpsynth.suite.defects import ExactShares, HalfNoise, NoClip
from dpsynth.suite.pipeline import PipelineAudit, audit_pipeline

FAMILIES = ("vae", "gan", "diffusion")
EPSILONS = (1.0, 4.0, 10.0)
DELTA, FITS, SEED = 1e-5, 1000, 2405_10994
PLANTED = {"sigma/2": HalfNoise, "clipping skipped": NoClip, "exact count": ExactShares}
PLANTED_FITS, PLANTED_EPSILON = 250, 4.0


def show(name: str, audit: PipelineAudit) -> None:
    print(f"{name}: ε={audit.epsilon:.3f}, {audit.seconds:.0f} s, above: {audit.violations}")
    for stage, part in audit.stages.items():
        print(f"  {stage}: μ={part.mu:.3f}, separation {part.separation:.3f}")
    for threat, evidence in audit.threats.items():
        bounds = ", ".join(
            f"{form} {shown.epsilon:.2f} (attainable {shown.attainable:.2f})"
            for form, shown in evidence.bounds.items()
        )
        print(f"  {threat}: separation {evidence.separation:.3f} of {audit.mu:.3f}; {bounds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("pipeline-audit.json"))
    parser.add_argument("--state", type=Path, required=True, help="folder for finished fleets")
    parser.add_argument("--fits", type=int, default=FITS)
    given = parser.parse_args()
    console, rows, planted = Console(stderr=True), [], []
    settings: dict[str, Any] = {"seed": SEED, "console": console, "device": "cpu"}
    for family in FAMILIES:
        for epsilon in EPSILONS:
            state = given.state / f"{family}-{epsilon:g}-{given.fits}"
            audit = audit_pipeline(family, epsilon, DELTA, fits=given.fits, state=state, **settings)
            show(f"{family} ε={epsilon:g}", audit)
            rows.append(audit.to_dict())
    for name, plant in PLANTED.items():
        audit = audit_pipeline(
            "vae",
            PLANTED_EPSILON,
            DELTA,
            fits=min(PLANTED_FITS, given.fits),
            plant=lambda plant=plant: [plant()],
            **settings,
        )
        show(name, audit)
        planted.append({"defect": name, **audit.to_dict()})
    packages = ("dpsynth", "torch", "opacus", "dp-accounting", "numpy", "scipy", "lightning")
    body = {
        "command": "python experiments/pipeline-audit/pipeline_audit.py --state STATE",
        "seed": SEED,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
        "audits": rows,
        "planted": planted,
    }
    given.out.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
