"""How long the parts of an audit may take, from small pieces of the very same work."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from dpsynth.audit.attacks import QUICK, score_all
from dpsynth.audit.attribute import infer_attributes
from dpsynth.data import Table
from dpsynth.suite.parts import Parts

__all__ = ["MOST_LEARNT", "quick_seconds"]

# Synthetic rows that attribute inference learns from.
MOST_LEARNT = 4000

# Candidates of the two probes; the difference is what a candidate costs.
PROBES = (50, 250)


def quick_seconds(parts: Parts, synthetic: Table, *, device: str) -> dict[str, float]:
    """Seconds that `attacks`, `controls` and `attributes` may take on this machine.

    Attacks are timed with few candidates against all rows and carried on linearly; a tree model is
    fitted once whatever the number of candidates.

    Args:
        parts: Real rows.
        synthetic: The table that is audited.
        device: Where neighbours are searched.
    """
    sizes = [min(size, len(parts.candidates)) for size in PROBES]
    times = [_timed(lambda n=size: _attack(parts, synthetic, n, device)) for size in sizes]
    each = max(0.0, times[1] - times[0]) / max(1, sizes[1] - sizes[0])
    attack = times[0] + each * (len(parts.candidates) - sizes[0])
    name = parts.members.schema.names[0]
    secret = _timed(lambda: _infer(parts, synthetic, name, device))
    # Controls hold as many rows, or as many members, as the table.
    larger = max(1.0, len(parts.members) / len(synthetic))
    return {
        "attacks": attack,
        "controls": 3 * attack * larger,
        "attributes": secret * len(parts.members.schema.names),
    }


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


def _timed(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
