"""Leaky and honest "generators" whose audit result is known beforehand.

A control hands out real rows, so it is never saved as a run. Its `population` rows must be
strangers to the whole audit: an attacker who holds some of them as reference would see them at
distance zero, and the known answers no longer hold. `halve` cuts a split's reference part into the
attacker's half and such a population.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table

__all__ = ["copy", "fresh", "halve", "p_leak"]


def halve(reference: Table, rng: np.random.Generator) -> tuple[Table, Table]:
    """Cut `reference` at random into (the attacker's rows, the controls' population)."""
    if len(reference) < 4:
        raise UsageError(f"reference has {len(reference)} rows; halving it needs at least 4")
    order = rng.permutation(len(reference))
    middle = len(reference) // 2
    return reference.take(order[:middle]), reference.take(order[middle:])


def fresh(population: Table, n: int, rng: np.random.Generator) -> Table:
    """`n` rows of `population` without replacement: tells nothing about members, AUC = 1/2."""
    check_count("n", n)
    if n > len(population):
        raise UsageError(
            f"n={n}: the population has only {len(population)} rows; ask for at most that many"
        )
    return population.take(rng.permutation(len(population))[:n])


def p_leak(
    members: Table, population: Table, fraction: float, n: int, rng: np.random.Generator
) -> Table:
    """`n` rows of which round(fraction · members) are different members, the rest population rows.

    Each member is handed out with probability p = `fraction`, and one that is not looks just like
    a holdout row, so AUC = p + (1 − p)/2 = (1 + p)/2 and TPR at FPR a is p + (1 − p)·a. The
    population is drawn without replacement as long as it lasts, else with replacement: repeated
    strangers move no nearest-neighbour distance, they only thin out the rest.

    Raises:
        UsageError: If `fraction` is outside 0..1 or `n` has no room for the leaked members.
    """
    check_count("n", n)
    if not 0 <= fraction <= 1:
        raise UsageError(f"fraction={fraction}: must lie in 0..1")
    leaked = round(fraction * len(members))
    if leaked > n:
        raise UsageError(f"n={n}: must be at least the {leaked} leaked rows; raise n")
    kept = rng.permutation(len(members))[:leaked]
    strangers = n - leaked
    drawn = rng.choice(len(population), strangers, replace=strangers > len(population))
    # One pool of positions, members first, so that both kinds keep their column types.
    rows = rng.permutation(np.concatenate([kept, len(members) + drawn]))
    return _stack(members, population).take(rows)


def copy(members: Table) -> Table:
    """Every member once: with no row in common between the parts, AUC ≥ .999.

    A bootstrap sample would hold only a fraction 1 − 1/e of them, AUC = (2 − 1/e)/2.
    """
    return members.take(np.arange(len(members)))


def _stack(first: Table, second: Table) -> Table:
    if first.schema.columns != second.schema.columns:
        raise UsageError("members and population have different schemas; use one split's parts")
    return Table(first.schema, pd.concat([first.frame, second.frame], ignore_index=True))
