"""The private step: clip every record's contribution, add noise once, let the optimizer move.

Opacus has one σ, one C and one batch axis; `FleetOptimizer` gives each run its own. Sum and noise
are rounded to one grid and added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dpsynth.checks import UsageError, check_choice, check_positive
from dpsynth.counter import CounterRng
from dpsynth.privacy.clipping import ENGINES, LossOf, Records, check_precision
from dpsynth.randomness import FleetRng
from dpsynth.shapes import expand

__all__ = ["FleetOptimizer", "PrivateEngine"]

# Normals of all runs together, on a CPU: drawn at a time, enough to repay the calls; rounded and
# added at a time, few enough for its cache.
_PIECE, _ROOM = 1 << 17, 1 << 16


class FleetOptimizer(DPOptimizer):
    """Opacus' DP optimizer with a noise multiplier, a bound and a batch size for each run.

    The clipped sums are already in `p.summed_grad`; noise is drawn once a step from keyed streams.

    Sum and noise are each rounded to a grid that the data do not choose, then added exactly, in
    float64: the result is the Gaussian mechanism on the rounded sum, rounded (post-processing),
    and no low-order bit of a sum survives but those on the grid. The grid is the power of two g at
    or below C·2^-13/√P; rounding P parameters moves two neighbouring sums apart by g√P at most, so
    the noise is σ·(C + g√P), up by at most 1.3e-4. Exact while 16σ and the batch stay below
    2^38/√P. Not protected: see `randomness.AesStream` for the draws.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, sigma: Tensor, bound: Tensor, batch: Tensor
    ) -> None:
        super().__init__(optimizer, noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1)
        self.batch = batch
        each = sum(parameter[0].numel() for parameter in self.params)
        grids = [_grid(float(c), each) for c in bound]
        self.grid = torch.tensor(grids, dtype=torch.float64, device=sigma.device)
        widest = bound.double() + self.grid * math.sqrt(each)
        # σC with C = ∞ and σ = 0 (no privacy) is no noise, not NaN.
        self.scale = torch.where(sigma > 0, sigma * widest, 0.0)
        self._noisy, self._all_noisy = bool((sigma > 0).any()), bool((sigma > 0).all())

    def release(self, rng: FleetRng, step: int | Tensor) -> None:
        """Turn the clipped sums into noisy means in `p.grad` and move; clears the sums."""
        units = (self.scale / self.grid)[:, None]
        noise = _Noise(
            rng.at("noise", cast(int, step)), units, sum(p[0].numel() for p in self.params)
        )
        for parameter in self.params:
            total = getattr(parameter, "summed_grad", None)
            total = torch.zeros_like(parameter) if total is None else total
            if self._noisy:
                parameter.grad = self._noisy_mean(total, noise)
            else:
                parameter.grad = total / expand(self.batch, total)
            parameter.summed_grad = None  # type: ignore[attr-defined]
        self.original_optimizer.step()
        self.original_optimizer.zero_grad(set_to_none=True)

    def _noisy_mean(self, total: Tensor, noise: _Noise) -> Tensor:
        """Sum plus noise over batch (runs, ...), in as many pieces as the noise comes in."""
        mean = torch.empty_like(total, memory_format=torch.contiguous_format)
        cells, share = 1 / self.grid[:, None].to(total.dtype), (self.grid / self.batch)[:, None]
        parts, means, at = total.flatten(1), mean.flatten(1), 0
        while at < parts.shape[1]:
            drawn, sums = noise.draw(parts.shape[1] - at)
            part, out = (whole[:, at : at + drawn.shape[1]] for whole in (parts, means))
            # The grid is a power of two, so the product is exact in any precision.
            sums.copy_(torch.mul(part, cells, out=out).round_())
            out.copy_(drawn.add_(sums).mul_(share))
            at += drawn.shape[1]
        if self._all_noisy:
            return mean
        noisy = expand(self.scale, total) > 0
        return torch.where(noisy, mean, total / expand(self.batch, total))


class _Noise:
    """The noise of one release in whole cells, on a CPU in pieces that need not end where a
    parameter does.

    Args:
        opened: Streams of the step's noise.
        units: Standard deviation of each run's noise in cells (runs, 1).
        draws: How many the release takes of each run.
    """

    def __init__(self, opened: FleetRng, units: Tensor, draws: int) -> None:
        self._opened, self._units, self._left = opened, units, draws
        # Draws by counter depend on how they are cut, and one draw is compiled sooner than many.
        self._whole = units.is_cuda or isinstance(opened, CounterRng)
        self._ready = self._room = units[:, :0]

    def draw(self, most: int) -> tuple[Tensor, Tensor]:
        """The next noise (runs, at least one and at most `most`), and as much room to work in."""
        runs = self._opened.runs
        if not self._ready.shape[1]:
            piece = self._left if self._whole else max(_PIECE // runs, 1)
            drawn = min(piece, self._left)
            self._left -= drawn
            self._ready = self._opened.normal(drawn, dtype=torch.float64)
            room = drawn if self._whole else min(max(_ROOM // runs, 1), drawn)
            self._room = self._ready.new_empty(runs, room)
        size = min(most, self._ready.shape[1], self._room.shape[1])
        noise, self._ready = self._ready[:, :size], self._ready[:, size:]
        return noise.mul_(self._units).round_(), self._room[:, :size]


def _grid(bound: float, parameters: int) -> float:
    """Largest power of two at or below C·2^-13/√P; 1 where there is no bound."""
    if math.isinf(bound):
        return 1.0
    _, exponent = math.frexp(bound / math.sqrt(parameters))
    return math.ldexp(1.0, exponent - 14)


class PrivateEngine:
    """Drives one network's private steps.

    Args:
        network: Module whose parameters all have a leading runs axis.
        optimizer: Any torch optimizer over its parameters.
        sigma: Noise multiplier of each run (R,), 0 for none.
        bound: Clipping bound C of each run (R,), inf for none.
        batch: Expected batch size of each run (R,): the denominator, never the realised size.
        mode: One of `ENGINES`.
        precision: Format of the weight gradients' products, one of `PRECISIONS`; with `taps`.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        sigma: Sequence[float],
        bound: Sequence[float],
        batch: Sequence[float],
        mode: str = "taps",
        precision: str = "32",
    ) -> None:
        check_choice("engine", mode, ENGINES)
        for s, c, size in zip(sigma, bound, batch, strict=True):
            # NaN fails each of these: no noise by accident.
            if not 0 <= s < math.inf:
                raise UsageError(f"sigma={s}: must be a number of at least 0")
            check_positive("clip", c, allow_inf=True)
            check_positive("batch", size)
            if s > 0 and math.isinf(c):
                raise UsageError(f"sigma={s} with clip={c}: noise needs a finite clipping bound")
            if s == 0 and math.isfinite(c):
                raise UsageError(f"sigma={s} with clip={c}: clipping without noise is not private")
        like = next(network.parameters())
        if not all(map(math.isinf, bound)):
            check_precision(like, precision)
        scales = [torch.tensor(list(v), dtype=like.dtype) for v in (sigma, bound, batch)]
        noise, clip, expected = (scale.to(like.device) for scale in scales)
        self.clipper = ENGINES[mode](network, clip, precision=precision)
        self.optimizer = FleetOptimizer(optimizer, sigma=noise, bound=clip, batch=expected)

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        """Add one piece of the batch; see `Clipper.accumulate`."""
        return self.clipper.accumulate(losses, counts)

    def step(self, rng: FleetRng, step: int | Tensor) -> None:
        """Add noise, divide by the expected batch, move. An empty batch moves by noise alone."""
        self.optimizer.release(rng, step)
