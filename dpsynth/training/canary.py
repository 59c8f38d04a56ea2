"""Step canary: adds a known record to half of a fleet's private steps and writes down what comes
out of them, for `dpsynth.audit.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import lightning
import numpy as np
import torch
from jaxtyping import Bool, Float
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from dpsynth.checks import UsageError, check_count, check_positive
from dpsynth.models import Generator
from dpsynth.networks import FleetLinear, FleetMaskedLinear
from dpsynth.privacy.layers import RULES
from dpsynth.randomness import FleetRng, derive, fresh_key

__all__ = ["CanaryEngine", "Engine", "Observed", "Release", "StepCanary", "WatchedBatches"]


class Engine(Protocol):
    """What takes private steps: `privacy.engine.PrivateEngine`, or one that is suspected."""

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        """Add one piece of a batch: unreduced losses (runs, batch), counts 0 or 1 (runs, batch)."""
        ...

    def step(self, rng: FleetRng, step: int) -> None:
        """Release the sum and move."""
        ...


class Batches(Protocol):
    """What draws batches: `privacy.batches.PoissonBatches`, or one that is suspected."""

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of one batch: positions and which of them count, (runs, capacity) both."""
        ...


@dataclass(frozen=True, eq=False)
class Observed:
    """What an auditor who knows all other records has seen of the steps of a fleet.

    Attributes:
        scores: ⟨released sum − clipped sum of the others, u⟩/C, u the canary's direction.
        present: Whether the canary was in the step: fair coins of the auditor's own.
        noise: That difference less the canary's due share, over C, in some coordinates of every
            parameter.
        batches: Whether a record was in the batch.
    """

    scores: Float[np.ndarray, "runs steps"]
    present: Bool[np.ndarray, "runs steps"]
    noise: Float[np.ndarray, "runs steps coordinates"]
    batches: Bool[np.ndarray, "runs steps records"]


_Layer = FleetLinear | FleetMaskedLinear


@dataclass(frozen=True, eq=False)
class _Canary:
    """A record that only one layer notices: input a, gradient at its output b.

    Its gradient there is a bᵀ for the weight (where no mask hides it) and b for the bias; a = 0
    leaves the bias alone.
    """

    layer: _Layer
    a: Float[Tensor, "runs inputs"]
    b: Float[Tensor, "runs outputs"]
    norm: Float[Tensor, " runs"]
    present: Bool[Tensor, " runs"]

    def losses(self, layers: Sequence[_Layer]) -> Tensor:
        """Loss (runs, 1) with that gradient. It passes every layer, as the engines expect."""
        total = torch.zeros_like(self.norm)
        for layer in layers:
            a, b = self.a, self.b
            if layer is not self.layer:
                runs, inputs, outputs = layer.weight.shape
                a, b = a.new_zeros(runs, inputs), b.new_zeros(runs, outputs)
            total = total + (layer(a[:, None]).squeeze(1) * b).sum(-1)
        return total[:, None]

    def along(self, gradients: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """⟨g, u⟩ (runs,) of a gradient g, by parameter."""
        parts = [gradients[p].flatten(1) * self.direction(p) for p in self.layer.parameters()]
        return torch.cat(parts, dim=1).sum(-1)

    def direction(self, parameter: nn.Parameter) -> Tensor:
        """u's part in `parameter`, flat (runs, weights)."""
        found = _gradients(self.layer, self.a, self.b).get(parameter)
        if found is None:
            return torch.zeros_like(parameter).flatten(1)
        return found.flatten(1) / self.norm[:, None]


def _gradients(layer: _Layer, a: Tensor, b: Tensor) -> dict[nn.Parameter, Tensor]:
    """Gradient of one record with input a (runs, in) and b at the output (runs, out)."""
    found = RULES[type(layer)].samples(layer, [a[:, None]], b[:, None])
    return {parameter: sample.squeeze(1) for parameter, sample in found.items()}


class Release:
    """What an engine releases, read from the optimizer that moves by it.

    Args:
        network: The network that is moved.
        optimizer: The torch optimizer that the engine moves by.
        batch: Claimed expected batch of each run (R,): what the engine divides a sum by.
    """

    def __init__(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, batch: Sequence[float]
    ) -> None:
        self._parameters, self._optimizer = list(network.parameters()), optimizer
        self._batch = self._parameters[0].new_tensor(list(batch))
        self._released: list[Tensor] = []

    def sums(self) -> list[Tensor]:
        """The clipped sums that the engine holds so far, one a parameter."""
        return [_sum_of(parameter).clone() for parameter in self._parameters]

    def of(
        self, move: Callable[[], None], others: Sequence[Tensor], step: int
    ) -> dict[nn.Parameter, Tensor]:
        """What `move` releases beyond `others`, by parameter.

        Raises:
            UsageError: When the engine moved by nothing.
        """
        self._released = []
        handle = self._optimizer.register_step_pre_hook(self._read)
        try:
            move()
        finally:
            handle.remove()
        if not self._released:
            raise UsageError(f"step={step}: the engine did not move; there is nothing to audit")
        found, self._released = self._released, []
        return {
            parameter: released - other
            for parameter, released, other in zip(self._parameters, found, others, strict=True)
        }

    def _read(self, *_: Any) -> None:
        """What the optimizer is about to move by, as sums again."""
        self._released = [
            _zeros(parameter) if parameter.grad is None else _times(parameter.grad, self._batch)
            for parameter in self._parameters
        ]


class CanaryEngine:
    """Passes everything on to an engine, and adds a canary to about half of its steps.

    The canary is one more piece of the batch with one record, so the engine itself has to clip it
    to C. What the step releases is read from the optimizer that moves by it. The auditor takes
    the sum of all other records off, which no noise protects from one who knows them. The trained
    network has learnt from the canaries and is for the audit alone.

    Args:
        engine: The engine under audit.
        network: Its network, all of whose parameters are in (masked) linear layers.
        optimizer: The torch optimizer that the engine moves by.
        bound: Clipping bound C of each run (R,), finite.
        batch: Claimed expected batch of each run (R,): what the engine divides a sum by.
        key: Of the auditor's coins and directions; nothing else draws from it.
        scale: Norm of the canary's gradient over C, above 1 so that clipping is seen.
        coordinates: How many weights of every parameter are written down.
    """

    def __init__(
        self,
        engine: Engine,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        bound: Sequence[float],
        batch: Sequence[float],
        key: int,
        scale: float = 10.0,
        coordinates: int = 2,
    ) -> None:
        for clip, size in zip(bound, batch, strict=True):
            check_positive("clip", clip)
            check_positive("batch", size)
        check_positive("scale", scale)
        check_count("coordinates", coordinates)
        self._engine, self._release = engine, Release(network, optimizer, batch)
        self._parameters = list(network.parameters())
        self._layers = [m for m in network.modules() if isinstance(m, _Layer)]
        like = self._parameters[0]
        self._bound = like.new_tensor(list(bound))
        keys = [derive(key, "canary", run) for run in range(len(bound))]
        self._coins = FleetRng(keys, device=like.device, dtype=like.dtype)
        self._scale, self._coordinates = scale, coordinates
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def accumulate(self, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        """The engine's own."""
        return self._engine.accumulate(losses, counts)

    def step(self, rng: FleetRng, step: int) -> None:
        """The engine's own, with the canary in it or not.

        Raises:
            UsageError: When the engine moved by nothing.
        """
        canary = self._canary(step)
        others = self._release.sums()
        counts = canary.present.to(self._bound.dtype)[:, None]
        self._engine.accumulate(lambda: canary.losses(self._layers), counts)
        rest = self._release.of(lambda: self._engine.step(rng, step), others, step)
        self._write(canary, rest)

    def _canary(self, step: int) -> _Canary:
        """Every layer in turn, its bias alone every second time."""
        layer = self._layers[step // 2 % len(self._layers)]
        opened = self._coins.at("step", step)
        _, inputs, outputs = layer.weight.shape
        present = opened.uniform(1)[:, 0] < 0.5
        # A layer without a bias has nothing else to show.
        a = opened.normal(inputs) * (step % 2 == 0 or isinstance(layer, FleetMaskedLinear))
        b = opened.normal(outputs)
        parts = [part.flatten(1) for part in _gradients(layer, a, b).values()]
        norm = torch.cat(parts, dim=1).norm(dim=1)
        wanted = self._scale * self._bound
        return _Canary(layer, a, b * (wanted / norm)[:, None], wanted, present)

    def _write(self, canary: _Canary, rest: Mapping[nn.Parameter, Tensor]) -> None:
        score = canary.along(rest) / self._bound
        due = (canary.present * self._bound)[:, None]
        few = slice(0, self._coordinates)
        noise = [
            (rest[p].flatten(1)[:, few] - due * canary.direction(p)[:, few]) / self._bound[:, None]
            for p in self._parameters
        ]
        row = (score, canary.present, torch.cat(noise, dim=1))
        self._seen.append((row[0].cpu(), row[1].cpu(), row[2].cpu()))

    def observed(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`scores`, `present` and `noise` of `Observed`, float64.

        Raises:
            UsageError: Before the first step.
        """
        if not self._seen:
            raise UsageError("steps=0: nothing was observed")
        scores, present, noise = (
            torch.stack(part, dim=1) for part in zip(*self._seen, strict=True)
        )
        return scores.double().numpy(), present.numpy(), noise.double().numpy()


class WatchedBatches:
    """Passes batches on and keeps who was in them.

    Args:
        batches: The sampler under audit.
        rows: Records of the longest run.
    """

    def __init__(self, batches: Batches, rows: int) -> None:
        check_count("rows", rows)
        self._batches, self._rows = batches, rows
        self._seen: list[Tensor] = []

    def draw(self, rng: FleetRng, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The sampler's own pieces."""
        bits: Tensor | None = None
        for index, inside in self._batches.draw(rng, step):
            if bits is None:
                bits = torch.zeros(len(index), self._rows, dtype=torch.bool)
                self._seen.append(bits)
            run = torch.arange(len(index))[:, None].expand_as(index)
            bits[run[inside].cpu(), index[inside].cpu()] = True
            yield index, inside

    def observed(self) -> np.ndarray:
        """(runs, steps, records), bool.

        Raises:
            UsageError: Before the first batch.
        """
        if not self._seen:
            raise UsageError("steps=0: nothing was observed")
        return torch.stack(self._seen, dim=1).numpy()


class StepCanary(Callback):
    """Audits the steps of `train_fleet`: give it in `callbacks`, read `observed` afterwards.

    It wraps whatever engine and sampler the fleet has when training starts.

    Args:
        key: Of the auditor's coins; `None` takes the operating system's entropy.
        scale: As of `CanaryEngine`.
        coordinates: As of `CanaryEngine`.
    """

    def __init__(
        self, *, key: int | None = None, scale: float = 10.0, coordinates: int = 2
    ) -> None:
        self._key = fresh_key() if key is None else key
        self._scale, self._coordinates = scale, coordinates
        self._engine: CanaryEngine | None = None
        self._batches: WatchedBatches | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        generator: Generator = pl_module
        if not all(plan.private for plan in generator.plans):
            raise UsageError("epsilon=inf: a step without noise has nothing to audit")
        self._engine = CanaryEngine(
            generator._engine,
            generator.network,
            generator._optimizers[0],
            bound=[plan.bound for plan in generator.plans],
            batch=[plan.q * plan.rows for plan in generator.plans],
            key=self._key,
            scale=self._scale,
            coordinates=self._coordinates,
        )
        self._batches = WatchedBatches(generator._batches, generator._codes.shape[1])
        pl_module._engine, pl_module._batches = self._engine, self._batches

    def observed(self) -> Observed:
        """What was seen of all steps.

        Raises:
            UsageError: When no fleet was trained.
        """
        if self._engine is None or self._batches is None:
            raise UsageError("steps=0: nothing was observed; train a fleet with this callback")
        scores, present, noise = self._engine.observed()
        return Observed(scores, present, noise, self._batches.observed())


def _sum_of(parameter: nn.Parameter) -> Tensor:
    held = getattr(parameter, "summed_grad", None)
    return _zeros(parameter) if held is None else held


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter.detach())


def _times(gradient: Tensor, batch: Tensor) -> Tensor:
    return gradient.detach() * batch.reshape(-1, *(1,) * (gradient.dim() - 1))
