"""Trained weights less the noise of DP-SGD, which is known: post-processing, free."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dpsynth.networks import FleetMaskedLinear

__all__ = ["denoised"]


def denoised(layer: FleetMaskedLinear) -> Float[Tensor, "runs inputs outputs"]:
    """The weights of a layer with each block drawn towards 0 by the share of it that is noise.

    Plain SGD brings the same noise to every weight, and those that the mask hides are nothing else:
    their mean square is its variance s². A block w of d weights is multiplied by
    1 - d s²/‖w‖², or 0 where that is negative (James & Stein 1961, positive part), so that what
    was not learned leaves no noise behind. Hidden weights become 0, and a second call changes
    nothing.
    """
    mask = layer.mask()
    square, hidden = layer.weight.double().square(), ~mask
    noise = (square * hidden).sum((1, 2)) / hidden.sum((1, 2)).clamp_min(1)
    rows, columns = (
        torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(square.device)
        for counts in (layer.levels, layer.outputs)
    )
    energy = square.new_zeros(len(square), len(layer.levels), len(layer.outputs))
    within = square.new_zeros(len(square), len(layer.levels), square.shape[2])
    energy.index_add_(2, columns, within.index_add_(1, rows, square))
    size = torch.outer(torch.tensor(layer.levels), torch.tensor(layer.outputs)).to(energy)
    share = 1 - noise[:, None, None] * size / energy.clamp_min(torch.finfo(energy.dtype).tiny)
    kept = share.clamp_min(0)[:, rows][:, :, columns]
    return torch.where(mask, layer.weight * kept.to(layer.weight), 0)
