"""The private step: clip every record's contribution, add noise once, let the optimizer move.

Opacus has one σ, one C and one batch axis; `FleetOptimizer` gives each run its own. Sum and noise
are rounded to one grid and added exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from dpsynth.checks import UsageError, check_choice, check_positive
from dpsynth.privacy.clipping import ENGINES, LossOf, Records, check_precision, expand
from dpsynth.randomness import FleetRng

__all__ = ["FleetOptimizer", "PrivateEngine"]

# Elements that are worked on at a time where noise is added on a CPU.
_PIECE = 1 << 15


class FleetOptimizer(DPOptimizer):
    """Opacus' DP optimizer with a noise multiplier, a bound and a batch size for each run.

    The clipped sums are already in `p.summed_grad`; noise is drawn once a step from keyed streams.

    Sum and noise are each rounded to a grid that the data do not choose, then added exactly, in
    float64: the result is the Gaussian mechanism on the rounded sum, rounded (post-processing),
    and no low-order bit of a sum survives but those on the grid. The grid is the power of two g at
    or below C·2^-13/√P; rounding P parameters moves two neighbouring sums apart by g√P at most, so
    the noise is σ·(C + g√P), up by at most 1.3e-4. Exact while 16σ and the batch stay below
    2^38/√P. Not protected: see `randomness.SecureStream` for the draws.
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

    def release(self, rng: FleetRng, step: int) -> None:
        """Turn the clipped sums into noisy means in `p.grad` and move; clears the sums."""
        opened = rng.at("noise", step)
        for parameter in self.params:
            total = getattr(parameter, "summed_grad", None)
            total = torch.zeros_like(parameter) if total is None else total
            if self._noisy:
                parameter.grad = self._noisy_mean(total, opened)
            else:
                parameter.grad = total / expand(self.batch, total)
            parameter.summed_grad = None  # type: ignore[attr-defined]
        self.original_optimizer.step()
        self.original_optimizer.zero_grad(set_to_none=True)

    def _noisy_mean(self, total: Tensor, opened: FleetRng) -> Tensor:
        """Sum plus noise over batch (runs, ...), on a CPU in pieces that stay in its cache."""
        mean = torch.empty_like(total)
        width = total[0].numel() if total.is_cuda else max(_PIECE // len(total), _PIECE // 4)
        grid = self.grid[:, None]
        units, cells, share = self.scale[:, None] / grid, 1 / grid, grid / self.batch[:, None]
        pieces = zip(total.flatten(1).split(width, 1), mean.flatten(1).split(width, 1), strict=True)
        for part, out in pieces:
            noise = opened.normal(part.shape[1], dtype=torch.float64)
            noise.mul_(units).round_().add_((part * cells.to(part.dtype)).round_())
            torch.mul(noise, share, out=out)
        if self._all_noisy:
            return mean
        noisy = expand(self.scale, total) > 0
        return torch.where(noisy, mean, total / expand(self.batch, total))


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
            check_precision(like)
        scales = [torch.tensor(list(v), dtype=like.dtype) for v in (sigma, bound, batch)]
        noise, clip, expected = (scale.to(like.device) for scale in scales)
        self.clipper = ENGINES[mode](network, clip)
        self.optimizer = FleetOptimizer(optimizer, sigma=noise, bound=clip, batch=expected)

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        """Add one piece of the batch; see `Clipper.accumulate`."""
        return self.clipper.accumulate(losses, counts)

    def step(self, rng: FleetRng, step: int) -> None:
        """Add noise, divide by the expected batch, move. An empty batch moves by noise alone."""
        self.optimizer.release(rng, step)
