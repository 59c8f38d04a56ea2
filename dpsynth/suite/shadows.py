"""Shadows: models of the audited run's own recipe that saw each candidate by a fair coin, and the
attacks that are calibrated on them (LiRA, RMIA, classifiers, targeted queries)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from dpsynth.audit.lira import lira, lira_offline, out_means, rmia
from dpsynth.audit.meta import MetaClassifier
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.devices import resolve
from dpsynth.randomness import stream
from dpsynth.suite.parts import auditors_recipe
from dpsynth.suite.signals import Evidence, Settings, gather
from dpsynth.suite.stages import minutes
from dpsynth.suite.targeted import targeted_scores
from dpsynth.suite.timesteps import timestep_scores
from dpsynth.training.fleet import train_fleet
from dpsynth.training.grid import Grid, Member
from dpsynth.training.packing import OVERHEAD
from dpsynth.training.recipe import FAMILIES, Seat, plan_of
from dpsynth.training.run import Run

__all__ = [
    "ShadowSet",
    "pseudo_targets",
    "shadow_attacks",
    "targeted_attack",
    "train_shadows",
    "training_seconds",
]

Scores = dict[str, tuple[np.ndarray, np.ndarray]]

# Fewest shadows that saw a candidate, and that did not: one may play the audited model and one
# more be left out of its own reference.
LEAST = 3
# Most (shadow, row) pairs that the meta-classifier is fitted on.
META_ROWS = 60_000
# Shadows and steps of the training that the time is estimated from.
PROBED, PROBE_STEPS = 4, 6


@dataclass(frozen=True, eq=False)
class ShadowSet:
    """Trained shadows, and which rows they saw.

    Attributes:
        runs: The shadows.
        inside: Which of them saw which candidate (models, candidates) bool.
        candidates: The rows that coins were tossed for.
        known: Rows of the population that no shadow saw.
        rows: Number of rows of each shadow.
        seed: Of every random choice.
        folder: Private; holds the runs and what is measured on them.
        notes: What an auditor must know, one line each.
    """

    runs: tuple[Run, ...]
    inside: np.ndarray
    candidates: Table
    known: Table
    rows: tuple[int, ...]
    seed: int
    folder: Path
    notes: tuple[str, ...] = field(default=())


def train_shadows(
    run: Run,
    candidates: Table,
    population: Table,
    *,
    count: int,
    seed: int,
    folder: Path,
    console: Console,
    device: str = "auto",
    memory: float | None = None,
) -> ShadowSet:
    """Train shadows at the recipe and ε of `run`, as one fleet where memory holds it.

    Each shadow sees every candidate by an independent fair coin, and population rows at random up
    to the number of rows that `run` saw. A coin that leaves a candidate with fewer than three
    shadows of either kind is tossed again in all of them, which favours neither kind. Half of the
    population at least is kept out of all shadows.

    The noise of shadows follows from `seed`, also where the run's own came from the operating
    system: they are the auditor's, on rows that the auditor has, and are never published.

    Args:
        run: The audited run.
        candidates: Rows that will be attacked, members of `run` and others.
        population: More rows of the population, none of them a candidate.
        count: Number of shadows, 16 to 64 for figures that are worth something; 8 at least.
        seed: Of coins, rows and noise; one that the audited run does not have.
        folder: Private. The same call goes on after a kill; finished shadows are kept.
        console: Where the estimate and progress are shown.
        device: Where to train.
        memory: GiB that fleets may fill; by default most of what is free.

    Raises:
        UsageError: On other columns than the run's, candidates within the population, a run that
            protects more than single rows, too few shadows, the run's own seed, or a folder that
            belongs to another audit.
    """
    _check(run, candidates, population, count, seed)
    identity = _identity(run, candidates, population, count, seed)
    _mark(folder, identity)
    inside = _coins(count, len(candidates), seed)
    filler, known = _halves(population, run.plan.rows - inside.sum(axis=1), seed)
    tables = [_rows_of(run, candidates, filler, inside[j], seed, j) for j in range(count)]
    members = {
        (name := f"shadow-{j:02d}"): Member(
            name, auditors_recipe(run, device), Seat(table, run.plan.epsilon, seed, f"shadow {j}")
        )
        for j, table in enumerate(tables)
    }
    grid = Grid(members, folder, memory)
    _train(grid, run, console)
    rows = tuple(map(len, tables))
    runs = tuple(Run.load(grid.trained(name)) for name in members)
    notes = _notes(run, rows)
    for note in notes:
        console.print(note, soft_wrap=True)
    return ShadowSet(runs, inside, candidates, known, rows, seed, folder, notes)


def shadow_attacks(
    run: Run,
    shadows: ShadowSet,
    members: Table,
    holdout: Table,
    *,
    rng: np.random.Generator,
    console: Console,
    device: str = "cpu",
    synthetic: Table | None = None,
    settings: Settings | None = None,
) -> Scores:
    """Attack the audited run by all that its shadows teach.

    Args:
        run: The audited run.
        shadows: Of this run.
        members: Candidates that it saw; with `holdout` the candidates of the shadows, in order.
        holdout: Candidates that it did not see.
        rng: Of classifiers.
        console: Where progress is shown.
        device: Where signals and neighbours are computed.
        synthetic: The table it published; by default as many rows as it saw, drawn anew.
        settings: How much is measured.

    Returns:
        Scores of members and holdout by attack, higher = more likely a member: `lira`,
        `lira_offline` and `rmia` on each white-box signal, `meta` (boosted trees over neighbour
        features and signals), and `timestep_mlp` where the run is a diffusion.

    Raises:
        UsageError: On candidates that are not those of the shadows.
    """
    found = _evidence(run, shadows, members, holdout, synthetic, settings, device, console)
    scores = _attack(found, shadows.inside, 0, rng)
    mean, _ = out_means(found.signals[1:].astype(float), shadows.inside)
    classifier, _ = _meta(found, shadows.inside, rng)
    scores["meta"] = classifier.score(_meta_features(found, 0, mean))
    size = len(members)
    return {name: (values[:size], values[size:]) for name, values in scores.items()}


def targeted_attack(
    run: Run,
    shadows: ShadowSet,
    members: Table,
    holdout: Table,
    *,
    console: Console,
    device: str = "cpu",
    synthetic: Table | None = None,
    settings: Settings | None = None,
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Targeted queries on Achilles records, which are few: arguments as `shadow_attacks`.

    Returns:
        Scores of the attacked members and holdout rows, and their positions within each.
    """
    found = _evidence(run, shadows, members, holdout, synthetic, settings, device, console)
    scores = _targeted(found, shadows.inside, 0)
    inner = found.targets < len(members)
    return (
        (scores[inner], scores[~inner]),
        (found.targets[inner], found.targets[~inner] - len(members)),
    )


def pseudo_targets(
    run: Run,
    shadows: ShadowSet,
    members: Table,
    holdout: Table,
    *,
    count: int = 2,
    rng: np.random.Generator,
    console: Console,
    device: str = "cpu",
    synthetic: Table | None = None,
    settings: Settings | None = None,
) -> list[Scores]:
    """The same attacks on shadows that play the audited run, calibrated by all other shadows: what
    the strongest attack is chosen on, before it is reported on the run. Arguments as
    `shadow_attacks`.

    Args:
        count: How many of the shadows.

    Returns:
        For each of them the scores of the candidates that it saw and of those that it did not, by
        attack; `targeted` those of Achilles records, `meta` of those rows that it is fitted on in
        other shadows.
    """
    check_count("count of pseudo-targets", count)
    if count > len(shadows.runs):
        raise UsageError(
            f"count of pseudo-targets={count}: there are only {len(shadows.runs)} shadows"
        )
    found = _evidence(run, shadows, members, holdout, synthetic, settings, device, console)
    classifier, rows = _meta(found, shadows.inside, rng)
    results = []
    for target in range(1, count + 1):
        coins = shadows.inside[target - 1]
        scores = _attack(found, shadows.inside, target, rng)
        result = {name: (values[coins], values[~coins]) for name, values in scores.items()}
        # By trees that saw no row of this shadow.
        crossed, kept = classifier.cross_fitted[target - 1], coins[rows[target - 1]]
        result["meta"] = (crossed[kept], crossed[~kept])
        few, aimed = _targeted(found, shadows.inside, target), coins[found.targets]
        results.append({**result, "targeted": (few[aimed], few[~aimed])})
    return results


# -- which rows --------------------------------------------------------------------------------


def _check(run: Run, candidates: Table, population: Table, count: int, seed: int) -> None:
    check_count("count of shadows", count, least=8)
    check_count("seed of shadows", seed, least=0)
    if seed == run.seed:
        raise UsageError(f"seed of shadows={seed}: is the run's own; choose another")
    if run.plan.unit != "record":
        raise UsageError(f"unit={run.plan.unit!r}: shadows tell single records apart only")
    for name, table in (("candidates", candidates), ("population", population)):
        if table.schema.columns != run.schema.columns:
            raise UsageError(f"{name} and the run have different schemas; use the run's schema")
    own, others = (
        pd.util.hash_pandas_object(table.frame, index=False, categorize=False).to_numpy()
        for table in (candidates, population)
    )
    shared = int(np.isin(own, others).sum())
    if shared:
        raise UsageError(
            f"candidates and population have {shared} rows in common; cut the parts by Split"
        )


def _coins(count: int, rows: int, seed: int) -> np.ndarray:
    """Fair coins (count, rows) bool; a row's are tossed again until both sides are there."""
    rng = stream(seed, "coins")
    inside = rng.random((count, rows)) < 0.5
    while True:
        seen = inside.sum(axis=0)
        few = np.flatnonzero(np.minimum(seen, count - seen) < LEAST)
        if not len(few):
            return inside
        inside[:, few] = rng.random((count, len(few))) < 0.5


def _halves(population: Table, missing: np.ndarray, seed: int) -> tuple[Table | None, Table]:
    """Rows that fill shadows up, half of all wherever some are missing, and the rest.

    As many as can be: shadows that share them are more alike than the audited run is to them.
    """
    order = stream(seed, "population").permutation(len(population))
    size = len(population) // 2 if missing.max() > 0 else 0
    filler = population.take(order[:size]) if size else None
    return filler, population.take(order[size:])


def _rows_of(
    run: Run, candidates: Table, filler: Table | None, coins: np.ndarray, seed: int, number: int
) -> Table:
    """Rows of one shadow, shuffled."""
    rng = stream(seed, "rows", number)
    frames = [candidates.frame[coins]]
    if filler is not None:
        size = min(max(0, run.plan.rows - int(coins.sum())), len(filler))
        frames.append(filler.frame.iloc[rng.permutation(len(filler))[:size]])
    frame = pd.concat(frames, ignore_index=True)
    frame = frame.iloc[rng.permutation(len(frame))].reset_index(drop=True)
    # A shadow declares or counts its rows as the run did, so that both spend alike.
    expected = None if run.schema.expected_rows is None else len(frame)
    return Table(replace(run.schema, expected_rows=expected), frame)


def _notes(run: Run, rows: Sequence[int]) -> tuple[str, ...]:
    planned = run.plan.rows
    if max(rows) < planned:
        return (
            f"shadows saw {min(rows)} to {max(rows)} rows where the run saw {planned}: the "
            "population has no more; attacks may be weaker or stronger for it",
        )
    if len({*rows, planned}) > 1:
        return (f"shadows saw {min(rows)} to {max(rows)} rows, the run {planned}",)
    return ()


# -- training ----------------------------------------------------------------------------------


def _identity(run: Run, candidates: Table, population: Table, count: int, seed: int) -> str:
    weights = hashlib.sha256()
    for value in run.generator.state_dict().values():
        weights.update(value.cpu().numpy().tobytes())
    parts = (run.recipe.digest(), repr(run.plan.epsilon), weights.hexdigest())
    parts += (candidates.digest(), population.digest(), str(count), str(seed))
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _mark(folder: Path, identity: str) -> None:
    mark = folder / "shadows"
    if mark.is_file() and mark.read_text() != identity:
        raise UsageError(
            f"shadows {str(folder)!r}: were begun for another run, other rows or settings; remove "
            "the folder or choose another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(identity)


def _train(grid: Grid, run: Run, console: Console) -> None:
    """Train what is not there, after saying how long it may take."""
    missing = [name for name in grid.members if not grid.is_trained(name)]
    if not missing:
        console.print(f"all {len(grid.members)} shadows are there")
        return
    fleets, notes = grid.fleets(missing)
    grid.keep(fleets)
    for note in notes:
        console.print(note, soft_wrap=True)
    if FAMILIES[run.recipe.model].trained and not (grid.folder / "fleets").exists():
        seconds = training_seconds([grid.members[name] for name in missing])
        console.print(
            f"{len(missing)} shadows of {run.plan.steps} steps: about {minutes(seconds)}",
            soft_wrap=True,
        )
    for fleet in fleets:
        grid.train(fleet, missing, data="shadow", console=console, loggers=lambda _: False)


def training_seconds(members: Sequence[Member]) -> float:
    """Seconds that training takes, by what a step of a few shadows costs."""
    few = members[:PROBED]
    recipe, seat = few[0].recipe, few[0].seat
    plan = plan_of(recipe, seat, seat.table.schema.expected_rows or 1)
    steps, batch = plan.steps, plan.batch
    short = replace(
        recipe,
        privacy={**recipe.privacy, "steps": PROBE_STEPS},
        options={**recipe.options, "block": 1},
    )
    seats = [replace(m.seat, table=_some(m.seat.table, 4 * batch), epsilon=math.inf) for m in few]
    watch = _Watch()
    train_fleet(short, seats, callbacks=[watch])
    overhead = OVERHEAD[resolve(recipe.device).type]
    # The first step prepares what later ones use.
    each = float(np.median(np.diff(watch.times)[1:]))
    return each * steps * (overhead + len(members)) / (overhead + len(few))


class _Watch(Callback):
    """When each block of steps was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.times.append(time.perf_counter())


def _some(table: Table, rows: int) -> Table:
    """A step costs what its batch does, so that few rows tell."""
    part = table.take(np.arange(min(rows, len(table))))
    return replace(part, schema=replace(part.schema, expected_rows=len(part)))


# -- attacks -----------------------------------------------------------------------------------


def _evidence(
    run: Run,
    shadows: ShadowSet,
    members: Table,
    holdout: Table,
    synthetic: Table | None,
    settings: Settings | None,
    device: str,
    console: Console,
) -> Evidence:
    settings = settings or Settings()
    both = pd.concat([members.frame, holdout.frame], ignore_index=True)
    if replace(shadows.candidates, frame=both).digest() != shadows.candidates.digest():
        raise UsageError("members and holdout are not the candidates of the shadows, in order")
    if synthetic is None:
        synthetic = run.sample_table(run.plan.rows, rng=shadows.seed)
    name = hashlib.sha256(f"{synthetic.digest()}/{settings}".encode()).hexdigest()[:8]
    return gather(
        [run, *shadows.runs],
        synthetic,
        members,
        holdout,
        shadows.known,
        shadows.folder / f"evidence-{name}",
        key=shadows.seed,
        settings=settings,
        device=device,
        console=console,
    )


def _attack(
    found: Evidence, inside: np.ndarray, target: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scores of all candidates under model `target`, calibrated by all shadows but that one."""
    pool = [j for j in range(1, len(inside) + 1) if j != target]
    coins = inside[[j - 1 for j in pool]]
    scores: dict[str, np.ndarray] = {}
    for place, name in enumerate(found.names):
        values = -found.signals[..., place].astype(float)
        strangers = -found.population[..., place].astype(float)
        own, others = values[target], values[pool]
        scores[f"lira {name}"] = lira(own, others, coins)
        scores[f"lira_offline {name}"] = lira_offline(own, others, coins)
        scores[f"rmia {name}"] = rmia(own, others, coins, strangers[target], strangers[pool])
    if found.losses is not None:
        losses = found.losses
        scores["timestep_mlp"] = timestep_scores(losses[target], losses[pool], coins, rng)
    return scores


def _meta(
    found: Evidence, inside: np.ndarray, rng: np.random.Generator
) -> tuple[MetaClassifier, list[np.ndarray]]:
    """Boosted trees over neighbour features, signals, and signals less those of OUT models, fitted
    on some rows of every shadow (their positions)."""
    _, means = out_means(found.signals[1:].astype(float), inside)
    size = min(inside.shape[1], max(1, META_ROWS // len(inside)))
    rows = [rng.permutation(inside.shape[1])[:size] for _ in inside]
    shown = [
        _meta_features(found, j + 1, means[j]).iloc[chosen].reset_index(drop=True)
        for j, chosen in enumerate(rows)
    ]
    coins = [inside[j, chosen] for j, chosen in enumerate(rows)]
    return MetaClassifier.fit(shown, coins, rng), rows


def _meta_features(found: Evidence, model: int, reference: np.ndarray) -> pd.DataFrame:
    own = found.signals[model].astype(float)
    parts = {"signal": own, "relative": own - reference}
    frames = [
        pd.DataFrame(values, columns=[f"{kind} {name}" for name in found.names])
        for kind, values in parts.items()
    ]
    return pd.concat([found.features[model], *frames], axis=1)


def _targeted(found: Evidence, inside: np.ndarray, target: int) -> np.ndarray:
    pool = [j for j in range(1, len(inside) + 1) if j != target]
    coins = inside[[j - 1 for j in pool]][:, found.targets]
    return targeted_scores(found.counts[target], found.counts[pool], coins)
