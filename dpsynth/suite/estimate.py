"""How long the parts of an audit may take, from small pieces of the very same work."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dpsynth.audit.attacks import QUICK, score_all
from dpsynth.audit.attribute import infer_attributes
from dpsynth.data import Table
from dpsynth.suite.parts import Parts
from dpsynth.suite.shadows import training_seconds
from dpsynth.suite.signals import signals_of
from dpsynth.suite.whitebox import reference_member
from dpsynth.training.recipe import FAMILIES
from dpsynth.training.run import Run

__all__ = ["MOST_LEARNT", "quick_seconds"]

# Synthetic rows that attribute inference learns from.
MOST_LEARNT = 4000

# Candidates of the probes; the first warms up, the others tell what a candidate costs.
PROBES = (20, 200, 1000)


def quick_seconds(
    run: Run, parts: Parts, synthetic: Table, *, draws: int, device: str
) -> dict[str, float]:
    """Seconds that the attacks, controls and attribute inference may take on this machine.

    Attacks are timed with few candidates against all rows and carried on linearly; a tree model is
    fitted once whatever the number of candidates.

    Args:
        run: The audited run.
        parts: Real rows.
        synthetic: The table that is audited.
        draws: Fixed noises a white-box loss.
        device: Where neighbours are searched.
    """
    sizes = [min(size, len(parts.candidates)) for size in PROBES]
    times = [_timed(lambda n=size: _attack(parts, synthetic, n, device)) for size in sizes]
    each = max(0.0, times[2] - times[1]) / max(1, sizes[2] - sizes[1])
    attack = times[1] + each * (len(parts.candidates) - sizes[1])
    name = parts.members.schema.names[0]
    secret = _timed(lambda: _infer(parts, synthetic, name, device))
    # Controls hold as many rows, or as many members, as the table.
    larger = max(1.0, len(parts.members) / len(synthetic))
    return {
        "attacks": attack,
        "white box": _white_box_seconds(run, parts, draws, device),
        "controls": 3 * attack * larger,
        "attributes": secret * len(parts.members.schema.names),
    }


def _white_box_seconds(run: Run, parts: Parts, draws: int, device: str) -> float:
    """One more training, and the losses of all candidates under two models."""
    some = parts.candidates.take(np.arange(min(PROBES[1], len(parts.candidates))))
    asked = _timed(lambda: signals_of([run], some, key=0, draws=draws, device=device))
    trained = 0.0
    if FAMILIES[run.recipe.model].trained:
        trained = training_seconds([reference_member(run, parts.attacker, 0)])
    return trained + 2 * asked * len(parts.candidates) / len(some)


def _attack(parts: Parts, synthetic: Table, size: int, device: str) -> None:
    some = parts.candidates.take(np.arange(size))
    score_all(QUICK, some, synthetic, parts.attacker, np.random.default_rng(0), device=device)


def _infer(parts: Parts, synthetic: Table, name: str, device: str) -> None:
    infer_attributes(
        synthetic,
        members=parts.inside,
        holdout=parts.outside,
        reference=parts.attacker,
        rng=np.random.default_rng(0),
        secrets=[name],
        max_train=MOST_LEARNT,
        device=device,
    )


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
