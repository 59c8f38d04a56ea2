"""Trained weights less the noise of DP-SGD, which is known: post-processing, free."""

from __future__ import annotations

import functools

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dpsynth.networks import FleetMaskedLinear
from dpsynth.optimizers import FALL

__all__ = ["denoised", "remaining"]

# Pulls at which the noise that is left is tabled, and moments of training that it is summed over.
_PULLS, _MOMENTS = np.geomspace(1e-6, 1e4, 201), 4000


def denoised(
    layer: FleetMaskedLinear, pull: Float[Tensor, "runs inputs outputs"]
) -> Float[Tensor, "runs inputs outputs"]:
    """The weights of a layer drawn towards 0 as far as they are noise.

    Plain SGD brings the same noise to every weight, and those that the mask hides are nothing else:
    their mean square is its variance s². A weight w that the loss pulls at forgets some of it: by
    the end it has the part a = 1 - exp(-pull) of what there is to learn, and noise of variance
    n = s² `remaining(pull)`, as a quadratic loss has it. What there is to learn is N(0, τ²) in
    each block, with τ² by the method of moments less its standard error without a signal; then w
    is multiplied by a²τ² / (a²τ² + n). What was not learned leaves no noise behind. Hidden weights
    become 0, and a second call changes nothing.

    Args:
        layer: Trained.
        pull: Curvature of the loss at each weight, times the learning rate, summed over steps.
    """
    levels = torch.tensor(layer.levels)
    block = torch.arange(len(levels)).repeat_interleave(levels).to(layer.weight.device)
    # Run by run: each needs several times its weights in double precision.
    runs = zip(layer.weight.detach(), layer.mask(), pull, strict=True)
    return torch.stack([_of_run(*run, block) for run in runs])


def _of_run(weight: Tensor, mask: Tensor, pull: Tensor, block: Tensor) -> Tensor:
    """Weights of one run (inputs, outputs); which of them are used, how far they are pulled, and
    the block of each row or column (inputs,)."""
    square, number = weight.double().square(), int(block[-1]) + 1
    noise = float((square * ~mask).sum() / (~mask).sum())
    if noise == 0:
        return torch.where(mask, weight, 0)

    def by_block(x: Tensor) -> Tensor:
        rows = x.new_zeros(number, x.shape[1]).index_add_(0, block, x)
        return x.new_zeros(number, number).index_add_(1, block, rows)

    # In units of the noise of a weight that nothing pulls at.
    pull = pull.double()
    left, learned = remaining(pull), (1 - (-pull).exp()).square() * mask
    known = by_block((learned / left).square())
    beyond = by_block(learned / left.square() * (square / noise - left))
    signal = (beyond - (2 * known).sqrt()).clamp_min(0) / known.clamp_min(1e-300)
    part = learned * signal[block][:, block]
    return torch.where(mask, weight * (part / (part + left)).to(weight), 0)


def remaining(pull: Tensor) -> Tensor:
    """Variance of the noise that a training leaves on a weight, over that without a pull.

    Rates s(u), u from 0 to 1, are 1 and fall to 0 in the end: ∫ s² exp(-2 pull ∫_u s / ∫ s) du /
    ∫ s² du.
    """
    logs, found = (torch.from_numpy(x).to(pull.device) for x in _table())
    place = pull.double().clamp(min=_PULLS[0], max=_PULLS[-1]).log()
    place = (place - logs[0]) / (logs[1] - logs[0])
    first = place.long().clamp(max=len(logs) - 2)
    return torch.lerp(found[first], found[first + 1], place - first)


@functools.lru_cache(maxsize=1)
def _table() -> tuple[np.ndarray, np.ndarray]:
    moments = (np.arange(_MOMENTS) + 0.5) / _MOMENTS
    rate = np.minimum(1, (1 - moments) / FALL)
    after = (rate[::-1].cumsum()[::-1] - rate / 2) / rate.sum()
    left = [(rate**2 * np.exp(-2 * pull * after)).sum() for pull in _PULLS]
    return np.log(_PULLS), np.array(left) / (rate**2).sum()
