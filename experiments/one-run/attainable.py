"""Simulates perfect attacks on exactly the claimed ε, by every form; writes attainable.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dpsynth.audit.bounds import (
    Curve,
    Errors,
    Family,
    attainable,
    clopper_pearson,
    gaussian,
    gaussian_curve,
    gaussian_family,
    mu_from_rates,
    noise,
)
from dpsynth.audit.one_run import best_guesses, epsilon_from_guesses, epsilon_from_guesses_fdp
from dpsynth.privacy.calibration import gaussian_mu, noise_multiplier, training
from dpsynth.training.canaries import scaled_epsilon, scaled_profile

DELTA, Q, STEPS, RUNS, CANARIES = 1e-5, 0.01, 2000, 1000, 1000


def sgd(epsilon: float) -> tuple[float, Family]:
    """Noise of DP-SGD at ε, and its family."""
    sigma = noise_multiplier(epsilon, DELTA, Q, STEPS, ())[0]
    events = [training(sigma, Q, STEPS)]
    return sigma, Family.of_profiles(
        lambda s: scaled_profile(events, s), lambda s: scaled_epsilon(events, s, DELTA), steps=16
    )


def steps(epsilon: float, sigma: float, rng: np.random.Generator) -> float:
    """Step audit of 8 runs: two rates of half of all steps each, recomposed."""

    def form(errors: Errors, alpha: float) -> float:
        mu = mu_from_rates(errors.missed, errors.members, errors.false, errors.others, alpha=alpha)
        return scaled_epsilon([training(1 / mu, Q, STEPS)], 1.0, DELTA) if mu > 0 else 0.0

    return attainable(form, gaussian_curve(1 / sigma), 4 * STEPS, 4 * STEPS, rng, times=60)


def one_run(claim: Curve, family: Family, rng: np.random.Generator) -> dict[str, object]:
    def either(m: int, r: int, v: int, alpha: float) -> float:
        return epsilon_from_guesses(m, r, v, delta=DELTA, alpha=alpha)

    def fdp(m: int, r: int, v: int, alpha: float) -> float:
        return epsilon_from_guesses_fdp(m, r, v, family, alpha=alpha)

    def best(form: Callable[[int, int, int, float], float]) -> dict[str, float]:
        guesses, shown = best_guesses(form, claim, CANARIES, rng)
        return {"guesses": guesses, "epsilon": shown}

    return {"one_run": best(either), "one_run_fdp": best(fdp)}


def main() -> None:
    rows = []
    for epsilon in (1.0, 4.0, 10.0):
        rng = np.random.default_rng(0)
        sigma, family = sgd(epsilon)
        whole = gaussian_family(DELTA)
        claims = {
            "gaussian": (gaussian_curve(gaussian_mu(epsilon, DELTA)), whole, gaussian(DELTA)),
            "dpsgd": (family.curve(1.0), family, noise(family)),
        }
        for name, (claim, known, form) in claims.items():
            row: dict[str, object] = {"mechanism": name, "epsilon": epsilon}
            pairs = attainable(clopper_pearson(DELTA), claim, RUNS, RUNS, rng)
            row |= {"clopper_pearson": pairs, "noise": attainable(form, claim, RUNS, RUNS, rng)}
            row |= one_run(claim, known, rng)
            if name == "dpsgd":
                row["steps"] = steps(epsilon, sigma, rng)
            rows.append(row)
            print(json.dumps(row), flush=True)
    body = {"q": Q, "steps": STEPS, "delta": DELTA, "runs a side": RUNS, "canaries": CANARIES}
    out = Path(__file__).with_name("attainable.json")
    out.write_text(json.dumps({**body, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
