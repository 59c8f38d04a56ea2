"""Worst-case pipeline audit: thousands of trainings with and without one row, each by the real
path, and what three adversaries can tell of the difference (Nasr et al. 2021, arXiv 2101.04535;
Annamalai et al. 2024, arXiv 2405.10994).

The table, the target and the plan are the worst that the claim has to cover: full batches, so that
the whole training is one Gaussian mechanism; a target that repeats rows of the table, so that no
count it enters is cut at 0; a clipping bound below every gradient. Whoever sees all that is
released can then spend the budget to its last part, and a bound near the claim says that it holds
and is tight.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from scipy import stats
from torch import Tensor

from dpsynth.audit.bounds import (
    Errors,
    Form,
    attainable,
    clopper_pearson,
    epsilon_of_mu,
    gaussian,
    gaussian_curve,
    mu_from_guesses,
)
from dpsynth.checks import UsageError, check_choice, check_count, check_fraction
from dpsynth.codec import Grid, NumericCoder
from dpsynth.data import Table
from dpsynth.models import Generator
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import HistogramNoise, Measurer
from dpsynth.privacy.plan import gaussian_mu
from dpsynth.randomness import FleetRng, Stream, derive
from dpsynth.sampling import sample_table
from dpsynth.schema import Column, Schema
from dpsynth.shapes import expand
from dpsynth.suite.stages import Stages
from dpsynth.training.canary import Release
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.measure import measure
from dpsynth.training.recipe import FAMILIES, Recipe, Seat

__all__ = [
    "FORMS",
    "THREATS",
    "Evidence",
    "PipelineAudit",
    "Shown",
    "Stage",
    "audit_pipeline",
    "forms_of",
]

# What an adversary who knows the table up to the target's row sees.
THREATS = ("releases", "weights", "table")
FORMS = ("rates", "gdp", "guesses")
STAGES = ("rows", "codec", "marginals", "tables", "training")
# Bounds of one audit, which hold together.
_TOGETHER = len(THREATS) * len(FORMS) + len(STAGES)

# Thousands of trainings: samples are not reconciled, which is post-processing, and families that
# can do without a mixture start from label × column tables.
_PLAIN: dict[str, Any] = {"components": 0, "reconcile": False}
_OPTIONS: dict[str, dict[str, Any]] = {
    "vae": {"hidden": [8], "latent": 2, **_PLAIN},
    "gan": {"hidden": [8], "latent": 2, "public_batch": 16, **_PLAIN},
    "diffusion": {"hidden": [8], "draws": 2, **_PLAIN},
    "autoregressive": _PLAIN,
    "mixture": {"components": 8, "reconcile": False},
}
# Below the gradient of a discriminator too that is shown the target as one of its fakes.
_STEPS, _CLIP = 2, 0.005
_COPIES, _VALUES, _MARKS = 2, 16, ("a", "b", "c", "d")
_TARGET = {"value": 5, "mark": "b", "label": "yes"}
_SYNTHETIC = 2048


# -- the worst case ----------------------------------------------------------------------------


@functools.cache
def worst_table() -> tuple[Table, Table]:
    """Tables with the target as their last row and without it.

    Every combination of levels occurs equally often, the target's too. The number has just more
    values than its coder has levels, so that it is measured, by a tree of one level that no noise
    can close before the target is counted.
    """
    columns = (
        Column("value", "integer", lower=0, upper=_VALUES - 1),
        Column("mark", "categorical", _MARKS),
        Column("label", "categorical", ("no", "yes")),
    )
    schema = Schema(columns, target="label", source="made for an audit")
    combined = list(itertools.product(range(_VALUES), _MARKS, ("no", "yes"))) * _COPIES
    others = pd.DataFrame(combined, columns=schema.names)
    target = pd.DataFrame([_TARGET])
    whole = pd.concat([others, target], ignore_index=True)
    return Table.from_frame(whole, schema), Table.from_frame(others, schema)


def worst_recipe(family: str, delta: float, device: str) -> Recipe:
    """The plan that spends everything on the target: default shares, full batches, a bound below
    every gradient."""
    privacy: dict[str, Any] = {"delta": delta}
    if FAMILIES[family].trained:
        privacy |= {"batch": 2**20, "steps": _STEPS, "clip": _CLIP}
    return Recipe(
        family,
        _OPTIONS.get(family, {}),
        privacy,
        codec={"bins": 4, "heaps": 1},
        device=device,
        rows="device",
        capture=False,
    )


def _stage(what: str) -> str:
    """Which share of the budget an event is paid from."""
    names = {
        "rows": "rows",
        "heaps": "codec",
        "bins": "codec",
        "cells": "codec",
        "round": "codec",
        "marginal": "marginals",
        "tables": "tables",
    }
    return names.get(what.split(":")[0], "training")


def _paid(ledger: Ledger) -> np.ndarray:
    """μ² of each stage by what the ledger was charged (stages,)."""
    found = np.zeros(len(STAGES))
    for event in ledger.events:
        found[STAGES.index(_stage(event.what))] += event.steps / event.sigma**2
    return found


# -- what the tables release -------------------------------------------------------------------


class _Overheard(HistogramNoise):
    """A mechanism's noise whose answers are written down."""

    def __init__(self, noise: HistogramNoise, heard: list[np.ndarray]) -> None:
        self.sigma, self._noise, self._heard = noise.sigma, noise, heard

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        noisy = self._noise(counts)
        self._heard.append(noisy.copy())
        return noisy


class _Listening(Measurer):
    """A measurer whose answers are written down, those of each ledger apart."""

    def __init__(
        self,
        heard: list[tuple[Ledger, list[np.ndarray]]],
        ledger: Ledger,
        mu: float,
        parts: int,
        rng: Stream,
    ) -> None:
        super().__init__(ledger, mu, parts, rng)
        if not heard or heard[-1][0] is not ledger:
            heard.append((ledger, []))
        self._heard = heard[-1][1]

    def answering(self, what: str, mu: float, queries: int) -> HistogramNoise:
        return _Overheard(super().answering(what, mu, queries), self._heard)


@dataclass(frozen=True, eq=False)
class _Asked:
    """One query about one of the two tables.

    Attributes:
        stage: Which share of the budget it belongs to.
        counts: Its exact answer.
        sigma: The noise that the ledger was charged for.
        noisy: What was released.
    """

    stage: str
    counts: np.ndarray
    sigma: float
    noisy: np.ndarray


class _Prompted(HistogramNoise):
    """Answers what was released before, whatever the counts."""

    def __init__(
        self, what: str, sigma: float, answers: Iterator[np.ndarray], asked: list[_Asked]
    ) -> None:
        self.sigma = sigma
        self._what, self._answers, self._asked = what, answers, asked

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        noisy = next(self._answers, None)
        if noisy is None or noisy.shape != counts.shape:
            raise UsageError(
                f"{self._what}: what is asked follows from the rows, not from what was released; "
                "ask by noisy answers and public facts alone"
            )
        self._asked.append(_Asked(_stage(self._what), counts, self.sigma, noisy))
        return noisy.copy()


class _Replaying(Measurer):
    """A measurer that gives the answers of another run."""

    def __init__(
        self,
        answers: Iterator[np.ndarray],
        asked: list[_Asked],
        ledger: Ledger,
        mu: float,
        parts: int,
        rng: Stream,
    ) -> None:
        super().__init__(ledger, mu, parts, rng)
        self._answers, self._asked = answers, asked

    def answering(self, what: str, mu: float, queries: int) -> HistogramNoise:
        return _Prompted(what, math.sqrt(queries) / mu, self._answers, self._asked)


def _replay(
    recipe: Recipe, seat: Seat, table: Table, answers: Sequence[np.ndarray]
) -> tuple[list[_Asked], Tensor]:
    """What a run that released `answers` would have asked of `table`, by the run's own code, and
    the last row as it would have been encoded."""
    asked: list[_Asked] = []
    given = iter(answers)
    replaying = partial(_Replaying, given, asked)
    measured = measure(
        recipe, replace(seat, table=table), 0, lambda event: event, measurer=replaying
    )
    if next(given, None) is not None:
        raise UsageError("answers: more were released than are asked for; the queries differ")
    return asked, measured.codes[-1][-1]


# -- what the steps release --------------------------------------------------------------------


class _Target(Callback):
    """Takes down what each step releases, and the target's own share in it.

    The target comes as a piece of its own, after the others: how a batch is cut into pieces changes
    no sum. In a run without it the piece is evaluated too and its sum is taken off again exactly,
    so that the adversary knows the direction to look in.

    Args:
        present: Whether a run has the target, as its last row (runs,).
        place: Position of that row.
        codes: The target as each run encodes it (runs, D); called when training starts.

    Attributes:
        scores: Of each step, the log-likelihood ratio (runs,).
        signals: Of each step, the square of the target's clipped gradient over σC (runs,).
        first: That gradient at the first step, by parameter.
        start: The untrained weights.
    """

    def __init__(
        self, present: np.ndarray, place: int, codes: Callable[[], Sequence[Tensor]]
    ) -> None:
        self._runs = torch.from_numpy(present)
        self._place, self._codes = place, codes
        self.scores: list[Tensor] = []
        self.signals: list[Tensor] = []
        self.first: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        generator: Generator = pl_module
        assert isinstance(generator._codes, Tensor)
        codes = torch.stack(list(self._codes())).to(generator._codes)
        away = ~self._runs.to(codes.device)
        # Padding until now: what is drawn, and what is counted, never reaches it.
        generator._codes[away, self._place] = codes[away]
        named = dict(generator.network.named_parameters())
        self.start = {name: p.detach().cpu().clone() for name, p in named.items()}
        self._parameters = list(named.values())
        plans = generator.plans
        self._release = Release(
            generator.network, generator._optimizers[0], [plan.q * plan.rows for plan in plans]
        )
        scale = [plan.noise * plan.bound for plan in plans]
        self._scale = torch.tensor(scale, dtype=torch.float64, device=codes.device)
        self._engine, self._batches = generator._engine, generator._batches
        pl_module._engine = pl_module._batches = self

    # as a sampler

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The sampler's own pieces, the target in one of its own."""
        drawn = torch.zeros(rng.runs, dtype=torch.bool)
        self._mine: Tensor | None = None
        for index, inside in self._batches.draw(rng, step):
            hit = inside & (index == self._place) & self._runs[:, None]
            drawn |= hit.any(1)
            yield index, inside & ~hit
        self._mine = drawn
        yield torch.full((rng.runs, 1), self._place), torch.ones(rng.runs, 1, dtype=torch.bool)

    # as an engine

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        """The engine's own; the target's sum is kept, and taken off where it was not drawn."""
        if self._mine is None:
            return self._engine.accumulate(losses, counts)
        self._others = self._release.sums()
        loss = self._engine.accumulate(losses, counts)
        both, mine = self._release.sums(), self._mine.to(loss.device)
        self._shares = [total - rest for total, rest in zip(both, self._others, strict=True)]
        for parameter, total, rest in zip(self._parameters, both, self._others, strict=True):
            parameter.summed_grad = torch.where(expand(mine, total), total, rest)  # type: ignore[attr-defined]
        return loss

    def step(self, rng: FleetRng, step: int) -> None:
        """The engine's own. Of what it releases is written down log p(release | with) −
        log p(release | without), two Gaussians of the claimed noise that lie the target's clipped
        gradient apart, and the square of how far that is."""
        rest = self._release.of(lambda: self._engine.step(rng, step), self._others, step)
        noise, share = (
            torch.cat([part.flatten(1).double() for part in parts], dim=1)
            for parts in (rest.values(), self._shares)
        )
        signal = share.square().sum(1) / self._scale.square()
        ratio = (noise * share).sum(1) / self._scale.square() - signal / 2
        self.scores.append(ratio.cpu())
        self.signals.append(signal.cpu())
        if not self.first:
            kept = (part.cpu() for part in self._shares)
            self.first = dict(zip(self.start, kept, strict=True))


# -- one fleet ---------------------------------------------------------------------------------

Half = tuple[np.ndarray, np.ndarray]


def _fleet(
    recipe: Recipe,
    epsilon: float,
    seeds: tuple[Sequence[int], Sequence[int]],
    plant: Callable[[], Sequence[Callback]],
) -> dict[str, Half]:
    """Train runs with the target, then without it, as one fleet; everything that is observed, by
    name, each (runs, …) of the runs with the target and of those without."""
    tables = worst_table()
    seats = [Seat(t, epsilon, s) for t, part in zip(tables, seeds, strict=True) for s in part]
    present = np.arange(len(seats)) < len(seeds[0])
    heard: list[tuple[Ledger, list[np.ndarray]]] = []
    replayed: list[tuple[list[_Asked], list[_Asked], Tensor]] = []

    def codes() -> list[Tensor]:
        for seat, (_, answers) in zip(seats, heard, strict=True):
            asked, code = _replay(recipe, seat, tables[0], answers)
            replayed.append((asked, _replay(recipe, seat, tables[1], answers)[0], code))
        return [code for _, _, code in replayed]

    watch = _Target(present, len(tables[1]), codes)
    listening = partial(_Listening, heard)
    trained = train_fleet(recipe, seats, callbacks=[*plant(), watch], measurer=listening)
    if not replayed:  # a family that is measured, not trained
        codes()
    scores, signals = _ratios(replayed, watch)
    found = {
        "scores": scores,
        "signals": signals,
        "weights": np.stack([_published(run, watch, place) for place, run in enumerate(trained)]),
        "table": np.stack([_synthetic(run) for run in trained]),
        "claimed": np.array([run.ledger.epsilon for run in trained]),
        "paid": np.stack([_paid(run.ledger) for run in trained]),
    }
    return {name: (values[present], values[~present]) for name, values in found.items()}


def _ratios(
    replayed: Sequence[tuple[list[_Asked], list[_Asked], Tensor]], watch: _Target
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood ratios and squared signals of every stage, (runs, stages) both."""
    scores, signals = np.zeros((2, len(replayed), len(STAGES)))
    for run, (inside, outside, _) in enumerate(replayed):
        for one, other in zip(inside, outside, strict=True):
            stage = STAGES.index(one.stage)
            gap, middle = one.counts - other.counts, (one.counts + other.counts) / 2
            scores[run, stage] += (gap * (one.noisy - middle)).sum() / one.sigma**2
            signals[run, stage] += np.square(gap).sum() / one.sigma**2
    if watch.scores:
        scores[:, -1] = torch.stack(watch.scores).sum(0).numpy()
        signals[:, -1] = torch.stack(watch.signals).sum(0).numpy()
    return scores, signals


def _published(trained: Trained, watch: _Target, run: int) -> np.ndarray:
    """What the files of a run say of the target: the shares of its levels in the noisy tables, the
    mass of its leaves, and how far the weights went along its first clipped gradient."""
    generator, codec = trained.generator, trained.codec
    codes = codec.encode(worst_table()[0])[-1]
    group = int(codec.layout.group_of(codes))
    levels = torch.tensor(codec.layout.offsets) + codes
    levels = levels[torch.arange(codec.layout.columns) != codec.layout.target]
    found = [
        float(trained.plan.rows),
        float(generator.prior_logits.exp()[0, group]),
        *generator.given_logits[0, group, levels].exp().tolist(),
    ]
    for coder in codec.coders:
        if isinstance(coder, NumericCoder):
            cell = Grid.of(coder.column).cell(np.array([float(_TARGET[coder.column.name])]))
            found.append(float(coder.mass[np.searchsorted(coder.starts, cell[0], "right") - 1]))
    if watch.first:
        named = dict(generator.network.named_parameters())
        along = sum(
            float(((named[name][0] - watch.start[name][run]) * share[run]).sum())
            for name, share in watch.first.items()
        )
        length = math.sqrt(sum(float(share[run].square().sum()) for share in watch.first.values()))
        found.append(-along / length)
    return np.array(found)


def _synthetic(trained: Trained) -> np.ndarray:
    """What a synthetic table says of the target: how many rows agree with it, in each column, in
    each and the label, and in all."""
    key = derive(trained.seat.seed or 0, "synthetic")
    made = sample_table(trained.generator, trained.codec, _SYNTHETIC, rng=key).frame
    agree = {name: (made[name] == value).to_numpy(bool) for name, value in _TARGET.items()}
    label = agree.pop("label")
    kept = [label, *agree.values(), *(label & one for one in agree.values())]
    kept.append(label & np.logical_and.reduce(list(agree.values())))
    return np.array([one.mean() for one in kept])


# -- bounds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """A lower bound on ε from the errors of one test.

    Attributes:
        errors: Runs with the target that were taken for ones without it, and the other way round.
        epsilon: Lower bound, which holds with the audit's confidence.
        joint: Lower bound so low that all bounds of the audit hold together with that confidence.
        attainable: Median of `epsilon` for a perfect adversary of a sound pipeline.
    """

    errors: Errors
    epsilon: float
    joint: float
    attainable: float


@dataclass(frozen=True)
class Evidence:
    """What one adversary shows.

    Attributes:
        separation: Distance of the mean scores with and without the target, in standard deviations:
            the μ that they seem to show. An estimate, no bound.
        bounds: `rates`: Clopper–Pearson on both rates, for any (ε, δ). `gdp`: the same for a
            Gaussian mechanism. `guesses`: for a Gaussian mechanism from the number of right
            guesses, one interval.
    """

    separation: float
    bounds: Mapping[str, Shown]


@dataclass(frozen=True)
class Stage:
    """What one part of the releases shows by itself, to the adversary who sees all of it.

    Attributes:
        epsilon: What the ledger claims for this part alone.
        mu: μ of that claim.
        design: μ that the target's shares in these releases add up to, mean over runs.
        separation: As of `Evidence`.
        shown: By right guesses, threshold fixed before any run.
    """

    epsilon: float
    mu: float
    design: float
    separation: float
    shown: Shown


@dataclass(frozen=True)
class PipelineAudit:
    """What thousands of trainings with and without one row show of a claimed ε.

    Attributes:
        family: Which generator.
        target: ε that the plan was calibrated for.
        epsilon: Largest ε that a run's ledger claims.
        delta: δ of the claim.
        mu: μ of the Gaussian mechanism with that claim.
        design: μ that the target's shares in all releases add up to, mean over runs: what the
            worst case reaches of `mu`.
        stages: What is paid apart in the ledger, by name: `rows`, `codec`, `marginals`, `training`.
        fits: Runs with the target, and as many without.
        confidence: Of each bound.
        threats: By name of the threat model.
        seconds: Training and scoring.
    """

    family: str
    target: float
    epsilon: float
    delta: float
    mu: float
    design: float
    stages: Mapping[str, Stage]
    fits: int
    confidence: float
    threats: Mapping[str, Evidence]
    seconds: float

    @property
    def violations(self) -> tuple[str, ...]:
        """Bounds above what is claimed, although all of them hold together: `threat/form` against
        the whole ε, and a stage against its own."""
        whole = [
            f"{threat}/{form}"
            for threat, evidence in self.threats.items()
            for form, shown in evidence.bounds.items()
            if shown.joint > self.epsilon
        ]
        parts = [name for name, stage in self.stages.items() if stage.shown.joint > stage.epsilon]
        return (*whole, *parts)

    @property
    def sound(self) -> bool:
        """Whether no bound refutes the claim."""
        return not self.violations

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "violations": list(self.violations), "sound": self.sound}


def _guesses(delta: float) -> Form:
    """Form for a Gaussian mechanism from right guesses, one interval where `gaussian` needs two.

    As many runs with the target as without stand for fair coins: right guesses that are independent
    with mean rate p are spread less than a binomial of that rate (Hoeffding 1956, theorem 4).
    """

    def form(e: Errors, alpha: float) -> float:
        guesses = e.members + e.others
        right = guesses - e.missed - e.false
        return epsilon_of_mu(mu_from_guesses(right, guesses, alpha=alpha), delta)

    return form


def forms_of(delta: float) -> dict[str, Form]:
    """A lower bound on ε from errors, by name."""
    return {"rates": clopper_pearson(delta), "gdp": gaussian(delta), "guesses": _guesses(delta)}


def _best_cut(form: Form, mu: float, runs: int, alpha: float) -> float:
    """Threshold, in standard deviations above the mean without the target, at which a perfect
    adversary of μ-GDP shows most when both errors are what is expected; looks at no score."""

    def shown(cut: float) -> float:
        missed, false = runs * stats.norm.cdf([cut - mu, -cut])
        return form(Errors(round(missed), runs, round(false), runs), alpha)

    return float(max(np.linspace(mu / 2, mu + 3.5, 100), key=shown))


def _cuts(mu: float, runs: int, delta: float, confidence: float) -> dict[str, float]:
    """A threshold for each form: where a Gaussian test errs least, but for `rates`."""
    best = _best_cut(clopper_pearson(delta), mu, runs, 1 - confidence)
    return {"rates": best, "gdp": mu / 2, "guesses": mu / 2}


def _evidence(
    scores: Half, cuts: Mapping[str, float], mu: float, delta: float, confidence: float
) -> Evidence:
    """Bounds from scores whose thresholds were fixed on nothing, or on other runs."""
    inside, outside = scores
    bounds = {
        name: _shown(form, Errors.at(cuts[name], inside, outside), mu, confidence)
        for name, form in forms_of(delta).items()
    }
    return Evidence(_separation(inside, outside), bounds)


def _shown(form: Form, errors: Errors, mu: float, confidence: float) -> Shown:
    miss, rng = 1 - confidence, np.random.default_rng(0)
    runs = errors.members, errors.others
    best = attainable(form, gaussian_curve(mu), *runs, rng, confidence=confidence)
    return Shown(errors, form(errors, miss), form(errors, miss / _TOGETHER), best)


def _separation(inside: np.ndarray, outside: np.ndarray) -> float:
    spread = math.sqrt((inside.var() + outside.var()) / 2)
    gap = float(inside.mean() - outside.mean())
    return gap / spread if spread else 0.0


def _learned(features: Half, delta: float, confidence: float) -> tuple[Half, dict[str, float]]:
    """Fisher's discriminant and its thresholds from every second run; scores of the others."""
    known, counted = [half[::2] for half in features], [half[1::2] for half in features]
    middle = (known[0].mean(0) + known[1].mean(0)) / 2
    scale = np.sqrt((known[0].var(0) + known[1].var(0)) / 2) + 1e-9 * (1 + np.abs(middle))
    inside, outside = ((half - middle) / scale for half in known)
    # A little of the unit matrix, for features that say the same.
    shared = (np.cov(inside.T) + np.cov(outside.T)) / 2 + 1e-3 * np.eye(inside.shape[1])
    weights = np.linalg.solve(shared, inside.mean(0) - outside.mean(0))
    inside, outside = inside @ weights, outside @ weights
    mu, centre = max(_separation(inside, outside), 0.0), outside.mean()
    spread = math.sqrt((inside.var() + outside.var()) / 2) or 1.0
    inside, outside = (((half - middle) / scale @ weights - centre) / spread for half in counted)
    return (inside, outside), _cuts(mu, len(known[1]), delta, confidence)


# -- the audit ---------------------------------------------------------------------------------


def audit_pipeline(
    family: str,
    epsilon: float,
    delta: float = 1e-5,
    *,
    fits: int = 1000,
    seed: int = 0,
    state: Path | None = None,
    console: Console | None = None,
    device: str = "auto",
    confidence: float = 0.95,
    fleet: int = 250,
    plant: Callable[[], Sequence[Callback]] = tuple,
) -> PipelineAudit:
    """Train `fits` runs with the target and as many without, and bound ε from what they release.

    The adversary knows every other row, the untrained weights, and what each row's loss was
    drawn with, which the claim does not protect.

    - `releases` sees every noisy count and every step's noisy sum, as they left the mechanisms: the
      log-likelihood ratio, of which no other score can show more. Both tables are asked again by
      the pipeline's own code with the answers that were released; what is not released the same way
      from either is an error. Thresholds are fixed before any run.
    - `weights` sees a run's files: noisy tables, codec and final weights; `table` a synthetic table
      alone. Both learn their test and its threshold on every second run.

    Args:
        family: Name of a family.
        epsilon: Target ε, finite.
        delta: Target δ.
        fits: Runs with the target, and as many without.
        seed: Of all runs; no two share noise.
        state: Private folder for the scores of finished fleets; a second call goes on there.
        console: Where progress is shown; by default nowhere.
        device: `auto`, `cpu` or `cuda`.
        confidence: Of each bound.
        fleet: Runs that train as one program.
        plant: Callbacks for every fleet that come before the auditor's own; defects to be found.

    Raises:
        UsageError: On an unknown family, ε=∞, too few runs, a `state` of another audit, or queries
            that do not follow from what was released.
    """
    check_choice("family", family, FAMILIES)
    check_count("fits", fits, least=8)
    check_count("fleet", fleet, least=2)
    check_fraction("confidence", confidence)
    if not math.isfinite(epsilon):
        raise UsageError(f"epsilon={epsilon}: a pipeline without noise has nothing to audit")
    recipe = worst_recipe(family, delta, device)
    found, seconds = _observe(
        recipe,
        epsilon,
        fits=fits,
        seed=seed,
        state=state,
        console=console,
        fleet=fleet,
        plant=plant,
    )
    # The plan's, not the ledger's: thresholds follow from what was asked for.
    mu = gaussian_mu(epsilon, delta)
    # The log-likelihood ratio is N(±μ²/2, μ²).
    ratios = [(half.sum(1) + mu**2 / 2) / mu for half in found["scores"]]
    cuts = _cuts(mu, fits, delta, confidence)
    threats = {"releases": _evidence((ratios[0], ratios[1]), cuts, mu, delta, confidence)}
    for threat in THREATS[1:]:
        scores, cuts = _learned(found[threat], delta, confidence)
        threats[threat] = _evidence(scores, cuts, mu, delta, confidence)
    return PipelineAudit(
        family,
        epsilon,
        max(float(half.max()) for half in found["claimed"]),
        delta,
        mu,
        float(np.concatenate(found["signals"]).sum(1).mean() ** 0.5),
        _by_stage(found, delta, confidence),
        fits,
        confidence,
        threats,
        seconds,
    )


def _by_stage(found: Mapping[str, Half], delta: float, confidence: float) -> dict[str, Stage]:
    paid, signals = (np.concatenate(found[name]).mean(0) ** 0.5 for name in ("paid", "signals"))
    stages = {}
    for place in np.flatnonzero(paid):
        mu = float(paid[place])
        inside, outside = (half[:, place] for half in found["scores"])
        stages[STAGES[place]] = Stage(
            epsilon_of_mu(mu, delta),
            mu,
            float(signals[place]),
            _separation(inside, outside),
            _shown(_guesses(delta), Errors.at(0.0, inside, outside), mu, confidence),
        )
    return stages


def _observe(
    recipe: Recipe,
    epsilon: float,
    *,
    fits: int,
    seed: int,
    state: Path | None,
    console: Console | None,
    fleet: int,
    plant: Callable[[], Sequence[Callback]],
) -> tuple[dict[str, Half], float]:
    """Everything observed of all fleets, from `state` where they are done, and its seconds."""
    console = Console(quiet=True) if console is None else console
    sizes = [len(part) for part in np.array_split(np.arange(fits), math.ceil(2 * fits / fleet))]
    parts: list[dict[str, Half]] = []
    with contextlib.ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpsynth-")))
        identity = {"recipe": recipe.digest(), "epsilon": epsilon, "seed": seed, "sizes": sizes}
        stages = Stages(folder, identity, Console(quiet=True))
        for number, size in enumerate(sizes):
            first = sum(sizes[:number])
            sides = [[derive(seed, s, first + r) for r in range(size)] for s in ("with", "without")]
            work = partial(_fleet, recipe, epsilon, (sides[0], sides[1]), plant)
            parts.append(stages.scores(f"fleet-{number}", work))
            left = (len(sizes) - number - 1) * np.mean(list(stages.seconds.values()))
            console.print(
                f"{recipe.model} at ε={epsilon:g}: {2 * (first + size)} of {2 * fits} runs, about "
                f"{left:.0f} s left",
                soft_wrap=True,
            )
    found = {}
    for name in parts[0]:
        sides = [np.concatenate([part[name][side] for part in parts]) for side in (0, 1)]
        found[name] = (sides[0], sides[1])
    return found, sum(stages.seconds.values())
