"""Controls: attacks on tables whose answer is known; an audit that gets one wrong says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special

from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import Audit, audit
from dpsynth.baselines import controls
from dpsynth.data import Table
from dpsynth.randomness import stream
from dpsynth.suite.parts import Parts

__all__ = ["LEAK", "Control", "judge_controls"]

LEAK = 0.2
# How far the leaking control may lie from theory, beyond chance.
TOLERANCE = 0.02
# An exact copy is told from strangers without fail.
COPIED = 0.999
# Chance that a sound audit fails one of its controls.
ALPHA = 1e-3


@dataclass(frozen=True)
class Control:
    """What an attack on one control had to show, and showed.

    Attributes:
        name: Of the control.
        attack: The strongest attack.
        auc: What it reached.
        low: Least AUC that passes.
        high: Greatest that does.
        expected: What theory says.
    """

    name: str
    attack: str
    auc: float
    low: float
    high: float
    expected: float

    @property
    def passed(self) -> bool:
        return self.low <= self.auc <= self.high

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def judge_controls(parts: Parts, *, seed: int, device: str = "cpu") -> list[Control]:
    """Attack a fresh sample, a generator that leaks a fifth of its rows, an exact copy, and the
    split itself (blind: without any synthetic row).

    Args:
        parts: Real rows.
        seed: Of every random choice.
        device: Where neighbours are searched.
    """
    rng = stream(seed, "controls")
    members, population = parts.members, parts.population
    tables: dict[str, Callable[[], Table]] = {
        "fresh": lambda: controls.fresh(population, len(population), rng),
        "p-leak": lambda: controls.p_leak(members, population, LEAK, len(members), rng),
        "copy": lambda: controls.copy(members),
    }
    found = {name: _attacked(make(), parts, rng, device) for name, make in tables.items()}
    return [_judged(name, result) for name, result in found.items()] + [_blind(found["fresh"])]


def _attacked(table: Table, parts: Parts, rng: np.random.Generator, device: str) -> Audit:
    result, _ = audit(
        table,
        members=parts.inside,
        holdout=parts.outside,
        reference=parts.attacker,
        white_box=None,
        ceiling=Ceiling.none(),
        max_candidates=len(parts.inside) + len(parts.outside),
        rng=rng,
        device=device,
    )
    return result


def _judged(name: str, result: Audit) -> Control:
    best = result.strongest
    if name == "copy":
        return Control(name, best.name, best.auc, COPIED, 1.0, 1.0)
    expected = 0.5 if name == "fresh" else (1 + LEAK) / 2
    # `strongest` is measured on one half of the candidates.
    reach = _reach(result.members - result.members // 2) + TOLERANCE * (name == "p-leak")
    return Control(name, best.name, best.auc, expected - reach, expected + reach, expected)


def _blind(result: Audit) -> Control:
    """The split itself: members and holdout must look alike."""
    reach = _reach(result.members)
    return Control("blind", "blind", result.blind_auc, 0.5 - reach, 0.5 + reach, 0.5)


def _reach(size: int) -> float:
    """Half the width of the band of a know-nothing AUC with `size` rows a side; another score
    varies less."""
    return float(special.ndtri(1 - ALPHA / 2)) * float(np.sqrt((2 * size + 1) / (12 * size**2)))
