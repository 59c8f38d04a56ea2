"""A training that a test kills: what it releases is written down just before it is released."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from tiny import recipe, seat

from dpsynth.privacy.engine import FleetOptimizer
from dpsynth.randomness import FleetRng
from dpsynth.training.callbacks import LastCheckpoint
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Recipe, Seat
from dpsynth.training.run import Run

__all__ = ["RECIPE", "SEATS", "train"]

RECIPE: Recipe = recipe("vae", privacy={"steps": 24})
# Two budgets, and noise from the operating system: nothing but the kept keys can repeat a draw.
SEATS: list[Seat] = [seat(0.5, None), seat(2.0, None)]


def train(folder: str) -> None:
    """Train `SEATS` in `folder`, resuming what is there, and save both runs."""
    torch.set_num_threads(1)
    home = Path(folder)
    seen = os.open(home / "released", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    release = FleetOptimizer.release

    def noted(self: FleetOptimizer, rng: FleetRng, step: int) -> None:
        for place, parameter in enumerate(self.params):
            sums = parameter.summed_grad  # type: ignore[attr-defined]
            for run in range(rng.runs):
                digest = hashlib.sha256(sums[run].numpy().tobytes()).hexdigest()[:16]
                os.write(seen, f"{step} {run}/{place} {digest}\n".encode())
        release(self, rng, step)

    FleetOptimizer.release = noted  # type: ignore[method-assign]
    state = home / "state"
    trained = train_fleet(RECIPE, SEATS, state=state, callbacks=[LastCheckpoint(state, 0.0)])
    for number, one in enumerate(trained):
        Run.of(one, data="tiny").save(home / f"run{number}")
