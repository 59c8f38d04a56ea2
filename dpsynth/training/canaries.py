"""Canaries: records of the auditor's own that enter a training by fair coins, and their scores, for
`dpsynth.audit.one_run`.

`gradient`: a canary is one more record of DP-SGD whose gradient is a direction of its own; the
score comes from all releases (white box). `record`: it is one more row of the table, scored by
`Generator.scores`. Canaries are only more records, so the run keeps its guarantee for the real
ones. Coins, canaries and scores are the auditor's: they stay in the private folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn

from dpsynth.checks import UsageError, check_choice, check_count, check_positive
from dpsynth.data import Table
from dpsynth.models import Generator
from dpsynth.networks import FleetLinear
from dpsynth.privacy.accounting import compose_epsilon, failure, profile
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng, derive, fresh_key, stream
from dpsynth.schema import Column, Schema
from dpsynth.training.callbacks import default_callbacks
from dpsynth.training.canary import Engine, Release
from dpsynth.training.fleet import train_fleet
from dpsynth.training.grid import Fleet, Grid, Member, RunLoggers
from dpsynth.training.recipe import FAMILIES, captured
from dpsynth.training.run import Run

__all__ = [
    "KINDS",
    "CanaryGrid",
    "CanaryScores",
    "CanarySettings",
    "canary_key",
    "canary_layers",
    "coins_of",
    "kept_scores",
    "record_canaries",
    "scaled",
    "scaled_epsilon",
    "scaled_profile",
    "with_records",
]

KINDS = ("gradient", "record")
# Pairs of a profile, the δ at which it ends, and the ε: each only makes a trade-off curve lower.
_PAIRS, _NEGLIGIBLE, _MOST_EPSILON = 201, 1e-10, 600.0


@dataclass(frozen=True)
class CanarySettings:
    """How many canaries a run is trained with, and what they are.

    Attributes:
        number: m, coins thrown; 0 for none.
        kind: `gradient` or `record`.
    """

    number: int = 0
    kind: str = "gradient"

    def __post_init__(self) -> None:
        check_count("audit.canaries", self.number, least=0)
        check_choice("audit.canary", self.kind, KINDS)

    def check(self, family: str, unit: str) -> None:
        """Refuse canaries that could not enter a run.

        Args:
            family: Name of the family.
            unit: What is protected.

        Raises:
            UsageError: On gradients where no step is taken, or rows where rows have owners.
        """
        if self.number and self.kind == "gradient" and not FAMILIES[family].trained:
            raise UsageError(
                f"audit.canary=gradient: {family} takes no private steps; use audit.canary=record"
            )
        if self.number and self.kind == "record" and unit != "record":
            raise UsageError(
                f"audit.canary=record with privacy.unit={unit}: a canary has no owner; use "
                "audit.canary=gradient"
            )

    @property
    def told(self) -> str:
        """What a card says of a run that was trained with them."""
        return (
            f"Trained with {self.number} {self.kind} canaries, each put in by a fair coin: an "
            "auditor's records among the real ones, so its rows are not those of a run without."
        )


def canary_key(folder: Path, name: str, seed: int | None) -> int:
    """The auditor's key for one run: from its seed, or from entropy kept in a private folder, so
    that a training that goes on has the same canaries and coins."""
    if seed is not None:
        return derive(seed, f"canaries/{name}")
    path = folder / f"{name}.key"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(str(fresh_key()))
        partial.replace(path)
    return int(path.read_text())


def coins_of(key: int, number: int) -> Bool[np.ndarray, " canaries"]:
    """Whether each canary is in: fair coins."""
    return stream(key, "canary coins").random(number) < 0.5


# -- rows --------------------------------------------------------------------------------------


def record_canaries(schema: Schema, number: int, key: int) -> Table:
    """Rows drawn evenly over the public levels and bounds of each column by itself."""
    rng = stream(key, "canary rows")
    columns = {column.name: _uniform(column, number, rng) for column in schema.columns}
    return Table.from_frame(pd.DataFrame(columns), schema, strict=False)


def _uniform(column: Column, number: int, rng: np.random.Generator) -> Any:
    if not column.numeric:
        return np.array(column.levels, dtype=object)[rng.integers(len(column.levels), size=number)]
    assert column.lower is not None and column.upper is not None
    if column.kind == "integer":
        return rng.integers(int(column.lower), int(column.upper) + 1, number)
    return rng.uniform(column.lower, column.upper, number)


def with_records(table: Table, settings: CanarySettings, key: int) -> Table:
    """The table with those of its canaries that are in, before anything is measured on it.

    They count as rows. Where `expected_rows` is declared, the sampling rate and everything else
    that depends on it stay as they are, so batches are longer by q for each canary; else the noisy
    count is one of real rows and canaries together.
    """
    rows = record_canaries(table.schema, settings.number, key)
    inside = rows.take(np.flatnonzero(coins_of(key, settings.number)))
    frames = [table.frame, inside.frame]
    return Table(table.schema, pd.concat(frames, ignore_index=True).astype(table.frame.dtypes))


# -- gradients ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Directions:
    """Canaries of one layer: gradient a bᵀ for its weight and b for its bias.

    Attributes:
        layer: The layer.
        first: Number of the first of its canaries.
        a: Its inputs (runs, canaries, inputs).
        b: Gradients at its outputs (runs, canaries, outputs), so that a whole gradient has norm 1.
    """

    layer: FleetLinear
    first: int
    a: Float[Tensor, "runs canaries inputs"]
    b: Float[Tensor, "runs canaries outputs"]

    def along(self, weight: Tensor, bias: Tensor) -> Tensor:
        """⟨g, u_i⟩ (runs, canaries) of a gradient g (runs, in, out) and (runs, out)."""
        return ((self.a @ weight + bias[:, None]) * self.b).sum(-1)


def canary_layers(network: nn.Module) -> list[FleetLinear]:
    """Layers that gradient canaries can go to; without any a network can have none."""
    return [m for m in network.modules() if isinstance(m, FleetLinear)]


def _directions(network: nn.Module, number: int, rng: FleetRng) -> list[_Directions]:
    """`number` random rank-one directions, spread over the linear layers by their size.

    Two in one layer have an inner product of about 1/√(in · out), two in different ones of 0.
    """
    layers = canary_layers(network)
    if not layers:
        raise UsageError("audit.canary=gradient: the network has no FleetLinear layer")
    ends = np.cumsum([layer.weight[0].numel() for layer in layers])
    ends = np.rint(number * ends / ends[-1]).astype(int)
    found = []
    for place, (layer, end) in enumerate(zip(layers, ends, strict=True)):
        first = int(ends[place - 1]) if place else 0
        if end == first:
            continue
        _, inputs, outputs = layer.weight.shape
        opened = rng.at("directions", place)
        a = opened.normal(int(end) - first, inputs).to(layer.weight)
        b = opened.normal(int(end) - first, outputs).to(layer.weight)
        norm = ((a.square().sum(-1) + 1) * b.square().sum(-1)).sqrt()
        found.append(_Directions(layer, first, a, b / norm[..., None]))
    return found


class _CanariesEngine:
    """Passes everything on to an engine, with canaries as one more piece of every batch.

    A canary that is in enters a step with the plan's q, with a gradient longer than C, which the
    engine itself has to clip. The score of canary i adds, over steps, the log-likelihood ratio
    ln(1 − q + q e^{(2x−1)/2σ²}) of x = ⟨released sum − clipped sum of the real records, u_i⟩/C: the
    best there is where canaries do not overlap. What the real records add is the auditor's to know
    (a canary is protected whoever the others are); what other canaries add is noise.

    Args:
        generator: In the middle of a fit.
        keys: One a run.
        number: m.
        scale: Norm of a canary's gradient over C, above 1 so that clipping is seen.
    """

    def __init__(
        self, generator: Generator, keys: Sequence[int], number: int, *, scale: float
    ) -> None:
        check_positive("scale", scale)
        plans = generator.plans
        self._engine: Engine = generator._engine
        self._rng = FleetRng(keys)
        self._layers = canary_layers(generator.network)
        self._directions = _directions(generator.network, number, self._rng)
        like = self._layers[0].weight
        self._release = Release(
            generator.network, generator._optimizers[0], [p.q * p.rows for p in plans]
        )
        coins = np.stack([coins_of(key, number) for key in keys])
        private = np.array([plan.private for plan in plans])
        self.coins = torch.from_numpy(coins & private[:, None])
        self._steps = torch.tensor([plan.steps if plan.private else 0 for plan in plans])
        self._clip = like.new_tensor([plan.clip for plan in plans])
        self._scale = scale
        self._batches = PoissonBatches([number] * len(plans), [plan.q for plan in plans])
        self._ratio = _Ratio(plans)
        self.scores = torch.zeros(len(plans), number, dtype=torch.float64)
        self.done = 0

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        """The engine's own."""
        return self._engine.accumulate(losses, counts)

    def step(self, rng: FleetRng, step: int) -> None:
        """The engine's own, with the canaries that are in and drawn."""
        others = self._release.sums()
        active = self._steps > step
        for index, inside in self._batches.draw(self._rng, step):
            present = inside & self.coins.gather(1, index) & active[:, None]
            if present.any():
                self._add(index, present)
        rest = self._release.of(lambda: self._engine.step(rng, step), others, step)
        found = [d.along(rest[d.layer.weight], rest[d.layer.bias]) for d in self._directions]
        seen = (torch.cat(found, dim=1) / self._clip[:, None]).double().cpu()
        self.scores += torch.where(active[:, None], self._ratio(seen), 0.0)
        self.done = step + 1

    def _add(self, index: Tensor, present: Tensor) -> None:
        """One piece of a batch: canaries at `index` (runs, width), those that are `present`."""
        index = index.to(self._clip.device)

        def losses() -> Tensor:
            total = torch.zeros(index.shape, device=index.device, dtype=self._clip.dtype)
            for layer in self._layers:  # an engine expects a record to pass all of them
                a, b = self._of(layer, index)
                total = total + (layer(a) * b).sum(-1)
            return total * (self._scale * self._clip[:, None])

        self._engine.accumulate(losses, present.to(self._clip))

    def _of(self, layer: FleetLinear, index: Tensor) -> tuple[Tensor, Tensor]:
        """What canaries put into a layer and take from it: 0 but in their own."""
        runs, inputs, outputs = layer.weight.shape
        for d in self._directions:
            if d.layer is layer:
                place = index - d.first
                own = (place >= 0) & (place < d.a.shape[1])
                run = torch.arange(runs, device=index.device)[:, None]
                place = place.clamp(0, d.a.shape[1] - 1)
                return d.a[run, place] * own[..., None], d.b[run, place] * own[..., None]
        zero = layer.weight.new_zeros(*index.shape, inputs + outputs)
        return zero[..., :inputs], zero[..., inputs:]


class _Ratio:
    """ln(1 − q + q e^{(2x−1)/2σ²}) of x (runs, canaries): N(1, σ²) with probability q, against
    N(0, σ²)."""

    def __init__(self, plans: Sequence[PrivacyPlan]) -> None:
        noisy = [plan.private and plan.steps > 0 for plan in plans]
        sigma = [plan.noise if ok else 1.0 for plan, ok in zip(plans, noisy, strict=True)]
        self._precision = torch.tensor(sigma, dtype=torch.float64)[:, None] ** -2
        q = torch.tensor([plan.q for plan in plans], dtype=torch.float64)[:, None]
        self._in, self._out = q.log(), torch.log1p(-q)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.logaddexp(self._out, self._in + (x - 0.5) * self._precision)


class CanaryScores(Callback):
    """Trains a fleet with gradient canaries: give it in `callbacks` of `train_fleet`, read
    `observed` afterwards. Runs at ε=∞ have none.

    Its scores are part of every checkpoint, so a training that was killed goes on with those of
    all steps before; where they are missing it is refused rather than audited in part.

    Args:
        number: m.
        keys: The auditor's, one a run.
        scale: Norm of a canary's gradient over C.
    """

    def __init__(self, number: int, keys: Sequence[int], *, scale: float = 10.0) -> None:
        check_count("audit.canaries", number)
        self._number, self._keys, self._scale = number, list(keys), scale
        self._engine: _CanariesEngine | None = None
        self._restored: Mapping[str, Any] | None = None
        self._total = 0

    @property
    def _identity(self) -> str:
        text = f"{self._number}/{self._scale}/{self._keys}"
        return hashlib.sha256(text.encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Scores of all steps so far."""
        if self._engine is None:
            return {}
        held = {"scores": self._engine.scores, "steps": self._engine.done}
        return {**held, "canaries": self._identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        generator: Generator = pl_module
        if len(self._keys) != generator.runs:
            raise UsageError(f"keys={len(self._keys)}: give one for each of {generator.runs} runs")
        if generator._captured:
            raise UsageError("training.capture=true: canaries see no captured step; use false")
        self._engine = _CanariesEngine(generator, self._keys, self._number, scale=self._scale)
        self._total = generator.total
        done = int(generator.completed)
        if done:
            self._restore(self._engine, done)
        pl_module._engine = self._engine

    def _restore(self, engine: _CanariesEngine, done: int) -> None:
        held = self._restored or {}
        if held.get("canaries") != self._identity or held.get("steps") != done:
            raise UsageError(
                f"audit.canaries: the checkpoint at step {done} has no scores of these canaries; "
                "remove the folder of its fleet and train anew"
            )
        engine.scores, engine.done = held["scores"].clone(), done

    def observed(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores and coins, (runs, canaries) both.

        Raises:
            UsageError: When not every step was seen.
        """
        if self._engine is None or self._engine.done != self._total:
            done = 0 if self._engine is None else self._engine.done
            raise UsageError(f"canaries: saw {done} of {self._total} steps; the audit is void")
        return self._engine.scores.numpy(), self._engine.coins.numpy()


# -- claims ------------------------------------------------------------------------------------


def scaled(events: Sequence[Event], scale: float) -> list[Event]:
    """The same events with `scale` times their noise; a failure keeps its probability."""
    check_positive("scale", scale)
    return [replace(e, sigma=e.sigma * scale, epsilon=e.epsilon / scale) for e in events]


def scaled_epsilon(events: Sequence[Event], scale: float, delta: float, group: int = 1) -> float:
    """ε of `scaled` events."""
    return compose_epsilon(scaled(events, scale), delta, group=group)


def scaled_profile(
    events: Sequence[Event], scale: float, group: int = 1
) -> tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]]:
    """ε and δ(ε) of `scaled` events, from ε = 0 to where δ is negligible."""
    noisy = scaled(events, scale)
    top = min(compose_epsilon(noisy, failure(noisy) + _NEGLIGIBLE, group=group), _MOST_EPSILON)
    grid = max(top, 1e-6) * np.linspace(0.0, 1.0, _PAIRS) ** 1.5
    return grid, profile(noisy, list(grid), group=group)


def kept_scores(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and coins (canaries,) of a run that a `CanaryGrid` trained.

    Raises:
        UsageError: Where there are none.
    """
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise UsageError(f"canaries {str(path)!r}: no such file; train the run anew")
    with np.load(path) as held:
        return held["scores"], held["coins"]


# -- training ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CanaryGrid(Grid):
    """A grid whose private runs are trained with gradient canaries; reference models have none.

    Attributes:
        number: m.
    """

    number: int = 0

    @property
    def kept(self) -> Path:
        """The auditor's: keys and, by run, scores and coins."""
        return self.folder / "canaries"

    def is_trained(self, name: str) -> bool:
        """Whether the run's folder is whole and its canaries were scored."""
        scored = not self._has(self.members[name]) or (self.kept / f"{name}.npz").is_file()
        return super().is_trained(name) and scored

    def train(
        self,
        fleet: Fleet,
        needed: Collection[str],
        *,
        data: str,
        console: Console,
        loggers: RunLoggers,
    ) -> None:
        """As `Grid.train`, with canaries and without captured steps or halves.

        Raises:
            UsageError: Where memory is not enough.
        """
        if all(name not in needed or self.is_trained(name) for name in fleet):
            return
        members = [self.members[name] for name in fleet]
        if not any(map(self._has, members)):
            return super().train(fleet, needed, data=data, console=console, loggers=loggers)
        seen = CanaryScores(
            self.number, [canary_key(self.kept, m.name, m.seat.seed) for m in members]
        )
        trained = self._attempt(members, seen, console, loggers)
        scores, coins = seen.observed()
        for member, one, score, coin in zip(members, trained, scores, coins, strict=True):
            if self._has(member):
                self._keep(member.name, score, coin)
            Run.of(one, data=data).save(self.trained(member.name))
        return None

    def _attempt(
        self, members: Sequence[Member], seen: CanaryScores, console: Console, loggers: RunLoggers
    ) -> Sequence[Any]:
        recipe = members[0].recipe
        if captured(recipe):
            console.print(f"{recipe.model}: steps with canaries are not captured", soft_wrap=True)
        names = "/".join([str(self.number), *(member.name for member in members)])
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        state = self.folder / "fleets" / f"canaries-{recipe.model}-{digest}"
        runs = [member for member in members if member.seat.role == "model"]
        found = [loggers(m.name) if m.seat.role == "model" else False for m in members]
        own = [() if isinstance(held, bool) else held for held in found]
        title = f"{recipe.model} ({len(runs)} runs, {self.number} canaries each)"
        try:
            return train_fleet(
                [replace(member.recipe, capture=False) for member in members],
                [member.seat for member in members],
                state=state,
                callbacks=[*default_callbacks(title, state, console, own), seen],
            )
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"{recipe.model}: {len(members)} runs with canaries are out of memory; lower "
                "training.memory or audit.canaries"
            ) from error

    def _keep(self, name: str, scores: np.ndarray, coins: np.ndarray) -> None:
        self.kept.mkdir(parents=True, exist_ok=True)
        partial = self.kept / f".{name}.npz"
        np.savez(partial, scores=scores, coins=coins)
        partial.replace(self.kept / f"{name}.npz")

    def _has(self, member: Member) -> bool:
        return (
            self.number > 0 and member.seat.role == "model" and math.isfinite(member.seat.epsilon)
        )
