"""Calibration: how long σ takes, cold and from the cache, and how far above the least it lies."""

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import replace

import numpy as np

from dpsynth.privacy import cache
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.plan import PrivacyPlan

ROWS, BATCH = 65_218, 1024  # q = .0157
SHARES = {"codec": 0.1, "marginals": 0.3}


def plan(epsilon: float) -> PrivacyPlan:
    """The default recipe's plan of one ε."""
    return PrivacyPlan(epsilon, 1e-5, ROWS, batch=BATCH, steps=500, shares=SHARES)


def calibrated(epsilons: list[float]) -> tuple[list[float], float]:
    """σ of every ε, and the processor seconds that took (of one core, whoever else works)."""
    start = time.process_time()
    sigmas = [plan(epsilon).calibrate().noise for epsilon in epsilons]
    return sigmas, time.process_time() - start


def least(epsilon: float, sigma: float) -> float:
    """σ by bisection of the same accountant alone, to 1e-6 of it."""
    low, high = math.log(sigma) - 0.01, math.log(sigma) + 0.01
    while high - low > 1e-6:
        middle = (low + high) / 2
        tried = replace(plan(epsilon), sigma=math.exp(middle))
        if compose_epsilon(tried.events(), tried.delta) > epsilon:
            low = middle
        else:
            high = middle
    return math.exp(high)


def main() -> None:
    """Print a table, or JSON with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--points", type=int, default=32, help="number of ε from .05 to 16")
    options = parser.parse_args()
    epsilons = [float(e) for e in np.geomspace(0.05, 16, options.points)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ[cache.FOLDER] = folder
        sigmas, cold = calibrated(epsilons)
        again, warm = calibrated(epsilons)
    if again != sigmas:
        raise SystemExit("the cache gave another sigma")
    over = [s / least(e, s) - 1 for e, s in zip(epsilons, sigmas, strict=True)]
    found = {"points": len(epsilons), "cold_s": cold, "warm_s": warm, "overshoot": max(over)}
    if options.json:
        rows = [
            {"epsilon": e, "sigma": s, "overshoot": o}
            for e, s, o in zip(epsilons, sigmas, over, strict=True)
        ]
        print(json.dumps({**found, "rows": rows}))
        return
    print("epsilon    sigma  overshoot")
    for epsilon, sigma, extra in zip(epsilons, sigmas, over, strict=True):
        print(f"{epsilon:7.3f} {sigma:8.4f}   {extra:.1e}")
    print(f"{len(epsilons)} sigmas: cold {cold:.2f} s, warm {1e3 * warm:.1f} ms")


if __name__ == "__main__":
    main()
