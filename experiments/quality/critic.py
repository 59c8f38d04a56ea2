"""What a GAN's critic is worth: steps a generator step, and rows drawn again by its verdict.

One line of JSON a run and way of drawing. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from protocol import asked, judged, parts, whole
from torch import Tensor

from dpsynth.models.gan import Gan
from dpsynth.randomness import FleetRng, derive, stream
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat

# Rows drawn for each that is kept.
MANY = 4


def verdicts(generator: Gan, codes: Tensor) -> np.ndarray:
    """Log-odds that rows (rows, D) are true, by the critic."""
    with torch.no_grad():
        parts = [-generator.attack_loss(part[None], FleetRng([0]))[0] for part in codes.split(8192)]
    return torch.cat(parts).numpy()


def kept(scores: np.ndarray, rows: int, weight: float, rng: np.random.Generator) -> np.ndarray:
    """So many different rows, drawn in proportion to exp(weight · score): discriminator rejection
    sampling (Azadi et al. 2019, eq. 3) of a finite pool, by Gumbel's maximum."""
    return np.argsort(-(weight * scores + rng.gumbel(size=len(scores))))[:rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with catalog.json and the tables")
    parser.add_argument("out", type=Path, help="file of JSON lines; it grows")
    parser.add_argument("--tables", nargs="+", required=True)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0])
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 2), metavar=("FIRST", "END"))
    parser.add_argument("--ladders", nargs="+", type=int, default=[2])
    parser.add_argument("--components", nargs="+", type=int, default=[512, 0])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.5, 1.0])
    settings = parser.parse_args()
    settings.recipe, settings.rows = {}, None
    torch.set_num_threads(1)
    for name, seed in itertools.product(settings.tables, range(*settings.seeds)):
        rows, held = parts(whole(settings.data, name), seed, None)
        floors = None
        for epsilon, ladder, components in itertools.product(
            settings.epsilons, settings.ladders, settings.components
        ):
            settings.recipe = {"options": {"ladder": ladder, "components": components}}
            (run,) = train_fleet(asked(settings, "gan", len(rows)), [Seat(rows, epsilon, seed)])
            assert isinstance(run.generator, Gan)
            key = derive(seed, "sample")
            pool = run.generator.sample(MANY * len(rows), FleetRng([key]))[0]
            scores = verdicts(run.generator, pool)
            for weight in settings.weights:
                order = kept(scores, len(rows), weight, np.random.default_rng(seed))
                made = run.codec.decode(pool[torch.from_numpy(order)], stream(key, "decode"))
                found, floors = judged(made, rows, held, floors)
                line = {"table": name, "epsilon": epsilon, "seed": seed, "ladder": ladder}
                line |= {"components": components, "weight": weight, **found}
                with settings.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    main()
