"""Private selection of a run: trials of candidate recipes, of which one is seen and all are paid
for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq

from dpsynth.checks import RefusedError, UsageError, check_positive
from dpsynth.data import Table
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.privacy.selection import Selection
from dpsynth.randomness import Stream, derive, fresh_key, keyed_stream, secure_stream
from dpsynth.sampling import sample_table
from dpsynth.schema import Column, Schema
from dpsynth.training.expected import expected_events
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.recipe import Recipe, Seat, plan_of

__all__ = ["Choice", "noisy_error", "pair_error", "select", "selected_events", "trial_epsilon"]

_BINS = 20
# How close a trial's ε is brought to what the target allows, from below.
_CLOSE = 0.005


@dataclass(frozen=True)
class Choice:
    """A public list of recipes, and how one trial of them is chosen.

    Attributes:
        candidates: Recipes; each trial draws one of them, all with the same chance.
        selection: Law of the number of trials, and the score's share of a trial's budget.
        epsilon: Target ε of the whole: all trials, their scores and the choice.
    """

    candidates: tuple[Recipe, ...]
    selection: Selection
    epsilon: float

    def __post_init__(self) -> None:
        check_positive("epsilon", self.epsilon)
        if not self.candidates:
            raise UsageError("candidates=0: a selection needs at least one recipe")
        kept = ("delta", "unit", "contributions", "secure")
        for recipe in self.candidates:
            for name in kept:
                first = self.candidates[0].privacy.get(name)
                if recipe.privacy.get(name) != first:
                    raise UsageError(
                        f"candidates differ in privacy.{name}: {first} and "
                        f"{recipe.privacy.get(name)}; give all the same"
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a run's lineage; `from_dict` is the inverse."""
        return {
            "epsilon": self.epsilon,
            **self.selection.to_dict(),
            "candidates": [recipe.to_dict() for recipe in self.candidates],
        }

    @classmethod
    def from_dict(cls, facts: Any) -> Choice:
        """Inverse of `to_dict`; what is unknown or missing is refused."""
        wanted = ("epsilon", "mean", "shape", "share", "candidates")
        if not isinstance(facts, dict) or set(facts) != set(wanted):
            raise UsageError(f"selection: must give exactly {', '.join(wanted)}")
        law = Selection(**{name: facts[name] for name in ("mean", "shape", "share")})
        return cls(tuple(Recipe(**r) for r in facts["candidates"]), law, facts["epsilon"])


def select(table: Table, choice: Choice, *, seed: int | None = None) -> Trained:
    """Train a random number of trials, score each with noise, and give back the best one.

    A trial is the whole pipeline with noise of its own: codec, marginals, training, a sample and
    its score, the mean over column pairs of the total variation distance between the members' and
    the sample's two-way tables. How many there were and how the others did is told to nobody; how
    long it took is not hidden. The ledger ends with `score`, where candidates cost unequally
    `allowance`, and `select`, which multiplies all before it.

    Args:
        table: Members, under a public schema that declares `expected_rows`.
        choice: Candidates, law and target.
        seed: Fixed seed, or `None` for entropy.

    Returns:
        The chosen trial. Its plan is that of one trial; its ledger's ε is at most the target.

    Raises:
        UsageError: On what `train_fleet` refuses, or a target too small to be met.
        RefusedError: On facts of the schema that are not public.
    """
    rows = _public_rows(table.schema)
    epsilon = trial_epsilon(choice, table.schema)
    secure = bool(choice.candidates[0].privacy.get("secure"))
    if secure and seed is not None:
        raise UsageError(
            f"seed={seed} with privacy.secure=true: secure noise has no seed; leave it out"
        )
    key = fresh_key() if seed is None else derive(seed, "select")
    rng = secure_stream(key, "trials") if secure else keyed_stream(key, "trials")
    count = choice.selection.trials(rng)
    drawn = (rng.random(count) * len(choice.candidates)).astype(int)
    best: tuple[float, float] | None = None
    chosen: Trained | None = None
    for trial in _trials(table, choice, drawn, epsilon, seed):
        noise = choice.selection.score_event(epsilon, trial.plan.delta)
        trial.ledger.pay(noise)
        error = pair_error(table, _sample(trial, rng), rows)
        # A tie is broken by chance, as the order of trials must not matter.
        score = (noisy_error(error, rows, noise.sigma, rng), float(rng.random(1)[0]))
        if best is None or score < best:
            best, chosen = score, trial
    assert chosen is not None
    for event in selected_events(choice, chosen.recipe, table.schema, chosen.plan)[
        len(chosen.ledger.events) :
    ]:
        chosen.ledger.pay(event)
    chosen.ledger.cross_check()
    return chosen


def _trials(
    table: Table, choice: Choice, drawn: np.ndarray, epsilon: float, seed: int | None
) -> Iterator[Trained]:
    """The trials, those of one recipe trained as one fleet."""
    for number, recipe in enumerate(choice.candidates):
        places = np.flatnonzero(drawn == number)
        if not len(places):
            continue
        # Below 2^62, as tables of results hold a seed.
        seeds = [None if seed is None else derive(seed, "trial", int(p)) >> 66 for p in places]
        seats = [Seat(table, epsilon, trial) for trial in seeds]
        for trained in train_fleet(recipe, seats):
            yield replace(trained, ledger=replace(trained.ledger, sink=None))


def _sample(trial: Trained, rng: Stream) -> Table:
    key = int(float(rng.random(1)[0]) * 2**53)
    return sample_table(trial.generator, trial.codec, trial.plan.rows, rng=key)


# -- cost ----------------------------------------------------------------------------------------


def selected_events(
    choice: Choice, recipe: Recipe, schema: Schema, plan: PrivacyPlan
) -> list[Event]:
    """The whole ledger of a chosen trial.

    Args:
        choice: What it was chosen among.
        recipe: What was chosen.
        schema: Public facts of the table.
        plan: The plan of the trial.

    Raises:
        RefusedError: When the recipe is none of the candidates.
    """
    if recipe not in choice.candidates:
        raise RefusedError("selection: the recipe of this run is none of its candidates")
    own = expected_events(recipe, schema, plan)
    others = [_trial_events(other, schema, plan.epsilon) for other in choice.candidates]
    return [*own, *choice.selection.events(own, others, plan)]


def _trial_events(recipe: Recipe, schema: Schema, epsilon: float) -> list[Event]:
    return expected_events(recipe, schema, _trial_plan(recipe, schema, epsilon))


def _trial_plan(recipe: Recipe, schema: Schema, epsilon: float) -> PrivacyPlan:
    seat = Seat(Table(schema, pd.DataFrame(columns=schema.names)), epsilon)
    return plan_of(recipe, seat, _public_rows(schema)).calibrate()


def _public_rows(schema: Schema) -> int:
    schema.check_public()
    if schema.expected_rows is None:
        raise RefusedError(
            "selection: scores are scaled by the row count; declare expected_rows or measure it"
        )
    return schema.expected_rows


def trial_epsilon(choice: Choice, schema: Schema) -> float:
    """The largest ε of a trial, to half a percent, at which the whole keeps to the target whichever
    candidate is chosen; reads no rows.

    Raises:
        UsageError: Where even a trial of a thousandth of the target costs too much.
    """

    def excess(log: float) -> float:
        return math.log(_whole(choice, schema, math.exp(log)) / choice.epsilon)

    high = math.log(choice.epsilon)
    if excess(high) <= 0:
        return choice.epsilon
    low = high - math.log(2)
    while excess(low) > 0:
        low, high = low - math.log(2), low
        if low < math.log(choice.epsilon / 1000):
            raise UsageError(
                f"epsilon={choice.epsilon:g}: too small for a choice among "
                f"mean={choice.selection.mean:g} trials; raise it or expect fewer"
            )
    root = float(brentq(excess, low, high, xtol=_CLOSE / 2))
    while excess(root) > 0:
        root -= _CLOSE / 2
    return math.exp(root)


def _whole(choice: Choice, schema: Schema, epsilon: float) -> float:
    """ε of the whole selection, with the costliest candidate chosen."""
    plans = [_trial_plan(recipe, schema, epsilon) for recipe in choice.candidates]
    ledgers = [
        expected_events(recipe, schema, plan)
        for recipe, plan in zip(choice.candidates, plans, strict=True)
    ]
    costs = []
    for events, plan in zip(ledgers, plans, strict=True):
        paid = [*events, *choice.selection.events(events, ledgers, plan)]
        costs.append(compose_epsilon(paid, plan.delta, group=plan.contributions))
    return max(costs)


# -- score ---------------------------------------------------------------------------------------


def pair_error(members: Table, synthetic: Table, rows: int) -> float:
    """Mean over column pairs of the total variation distance between two-way tables.

    Numbers fall into bins of equal width between their declared bounds, so no bin depends on rows.
    Members are counted over the public number of `rows`: one member more or less moves one cell of
    each table by 1/rows, hence the mean by at most 1/(2·rows).

    Args:
        members: Private rows.
        synthetic: What is judged.
        rows: Public row count.
    """
    columns = members.schema.columns
    codes = [(_codes(members, c), _codes(synthetic, c), _levels(c)) for c in columns]
    pairs = list(itertools.combinations(codes, 2)) or [(codes[0], codes[0])]
    total = 0.0
    for (real_a, made_a, levels_a), (real_b, made_b, levels_b) in pairs:
        size = levels_a * levels_b
        real = np.bincount(real_a * levels_b + real_b, minlength=size) / rows
        made = np.bincount(made_a * levels_b + made_b, minlength=size) / len(synthetic)
        total += float(np.abs(real - made).sum()) / 2
    return total / len(pairs)


def noisy_error(error: float, rows: int, sigma: float, rng: Stream) -> float:
    """An error in units of what one row changes it by, 1/(2·rows), with N(0, σ²) noise."""
    return 2 * rows * error + sigma * float(rng.standard_normal(1)[0])


def _levels(column: Column) -> int:
    """Bins or levels of a column, the last one for missing values."""
    return (_BINS if column.numeric else len(column.levels)) + 1


def _codes(table: Table, column: Column) -> np.ndarray:
    values, missing = table.frame[column.name], _levels(column) - 1
    if not column.numeric:
        codes = values.cat.codes.to_numpy().astype(np.int64)
        return np.where(codes < 0, missing, codes)
    assert column.lower is not None and column.upper is not None
    numbers = values.to_numpy(dtype=float, na_value=np.nan)
    share = (numbers - column.lower) / (column.upper - column.lower)
    place = np.clip(np.floor(np.nan_to_num(share) * _BINS), 0, _BINS - 1).astype(np.int64)
    return np.where(np.isnan(numbers), missing, place)
