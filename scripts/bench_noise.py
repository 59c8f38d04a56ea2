"""Time one normal draw: numpy's by Philox, ours by AES-256, and a private release of a sum.

`python scripts/bench_noise.py [--draws N] [--rounds N] [--json FILE]`; one thread, interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dpsynth.privacy.engine import FleetOptimizer
from dpsynth.randomness import FleetRng, fresh_key, secure_stream, stream


def main() -> None:
    """Print a table of ns a draw; write the same as JSON where asked."""
    parser = argparse.ArgumentParser(description="Time normal draws.")
    parser.add_argument("--draws", type=int, default=1 << 20, help="normals a call")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each, interleaved")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = interleaved(cases(options.draws), options.draws, options.rounds)
    print(f"{'case':<24}{'median ns':>12}{'least ns':>12}{'x philox':>10}")
    for name, row in found.items():
        ratio = row["median"] / found["philox float64"]["median"]
        print(f"{name:<24}{row['median']:>12.2f}{row['least']:>12.2f}{ratio:>10.2f}")
    if options.json is not None:
        body = {"draws": options.draws, "rounds": options.rounds, "ns": found}
        options.json.write_text(json.dumps(body, indent=1) + "\n")


def cases(draws: int) -> dict[str, Callable[[], object]]:
    """What is timed, each for `draws` numbers."""
    key = fresh_key()
    philox, secure = stream(key, "bench"), secure_stream(key, "bench")
    fleet = FleetRng([key]).at("bench")
    return {
        "philox float32": lambda: philox.standard_normal(draws, np.float32),
        "philox float64": lambda: philox.standard_normal(draws),
        "aes256 float32": lambda: secure.standard_normal(draws, np.float32),
        "aes256 float64": lambda: secure.standard_normal(draws),
        "aes256 uniform": lambda: secure.random(draws),
        "fleet float64": lambda: fleet.normal(draws, dtype=torch.float64),
        "fleet of 32, float64": fleet_of(32, draws),
        "release": releases(draws, FleetRng([key])),
        "release, secure": releases(draws, FleetRng([key], secure=True)),
    }


def fleet_of(runs: int, draws: int) -> Callable[[], object]:
    """As many draws, of several runs together."""
    fleet = FleetRng(range(runs)).at("bench")
    return lambda: fleet.normal(draws // runs, dtype=torch.float64)


def releases(weights: int, rng: FleetRng) -> Callable[[], object]:
    """A step of plain descent whose gradient is noise on a sum of `weights` float32 numbers."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(1, weights))
    one = torch.ones(1)
    sgd = torch.optim.SGD(layer.parameters(), lr=1.0)
    noisy = FleetOptimizer(sgd, sigma=one, bound=one, batch=one)
    return lambda: noisy.release(rng, 0)


def interleaved(
    timed: dict[str, Callable[[], object]], draws: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Median and least time of each in ns a draw, each round going through all of them."""
    spent: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(rounds + 1):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                spent[name].append((time.perf_counter() - start) / draws * 1e9)
    return {n: {"median": statistics.median(s), "least": min(s)} for n, s in spent.items()}


if __name__ == "__main__":
    main()
