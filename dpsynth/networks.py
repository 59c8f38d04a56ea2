"""Networks with a leading `runs` axis: R independent copies computed as batched matrix products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpsynth.checks import check_count
from dpsynth.randomness import FleetRng

__all__ = ["FleetLinear", "Mlp", "column_log_likelihood", "sample_columns"]


class FleetLinear(nn.Module):
    """y = x W + b for R runs: weight (runs, in, out), bias (runs, out).

    Inputs are (runs, batch, [draws,] in). Initialised by `reset`, since randomness is an argument.
    """

    def __init__(self, runs: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(runs, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(runs, outputs))

    def reset(self, rng: FleetRng, *, fan: int | None = None) -> None:
        """Weights N(0, 1/fan) with `fan` the number of inputs that are on at a time (all, if not
        given); bias 0."""
        _, inputs, outputs = self.weight.shape
        draws = rng.normal(inputs, outputs).to(self.weight)
        with torch.no_grad():
            self.weight.copy_(draws / math.sqrt(fan or inputs))
            self.bias.zero_()

    def forward(self, x: Float[Tensor, "runs *rows inputs"]) -> Float[Tensor, "runs *rows outputs"]:
        flat = x.flatten(1, -2)
        out = torch.baddbmm(self.bias[:, None, :], flat, self.weight)
        return out.unflatten(1, x.shape[1:-1])


class Mlp(nn.Module):
    """Linear layers with SiLU between them and a skip wherever two widths agree.

    Args:
        runs: R.
        widths: Input, hidden and output widths.
    """

    def __init__(self, runs: int, widths: Sequence[int]) -> None:
        super().__init__()
        for width in widths:
            check_count("width of a layer", width)
        self.layers = nn.ModuleList(FleetLinear(runs, a, b) for a, b in pairwise(widths))

    def reset(self, rng: FleetRng, name: str, *, fan: int | None = None, zero: bool = True) -> None:
        """Draw weights; with `zero` the last layer starts at 0, so the output starts at 0."""
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, FleetLinear)
            layer.reset(rng.at(f"init:{name}:{number}"), fan=fan if number == 0 else None)
        if zero:
            nn.init.zeros_(self.layers[-1].get_parameter("weight"))

    def forward(self, x: Float[Tensor, "runs *rows inputs"]) -> Float[Tensor, "runs *rows outputs"]:
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            out = layer(x)
            if number == last:
                return out
            out = F.silu(out)
            x = out + x if out.shape == x.shape else out
        return x


def column_log_likelihood(
    logits: Float[Tensor, "*rows width"], codes: Int[Tensor, "... columns"], levels: Sequence[int]
) -> Float[Tensor, "*rows columns"]:
    """Log-probability of each column's level.

    Args:
        logits: Unnormalised scores (..., W), blocks of `levels` side by side.
        codes: Level numbers (..., D), broadcast against the leading axes of `logits`.
        levels: Number of levels of each column.

    Returns:
        (..., D).
    """
    blocks = logits.split(list(levels), dim=-1)
    norms = torch.stack([block.logsumexp(-1) for block in blocks], dim=-1)
    starts = torch.tensor([0, *levels[:-1]], device=logits.device).cumsum(0)
    places = (codes + starts).expand(*logits.shape[:-1], len(levels))
    return logits.gather(-1, places) - norms


def sample_columns(
    logits: Float[Tensor, "runs *rows width"], levels: Sequence[int], rng: FleetRng
) -> Int[Tensor, "runs *rows columns"]:
    """One level a column by inverting its distribution: (runs, ..., W) -> codes (runs, ..., D).

    A level of probability 0 is never drawn.
    """
    # Below 1 by more than rounding, so that the inverse stays on a level that has mass.
    draws = rng.uniform(*logits.shape[1:-1], len(levels)).clamp(max=1 - 1e-6)
    codes = []
    for j, block in enumerate(logits.split(list(levels), dim=-1)):
        mass = (block - block.amax(-1, keepdim=True)).exp().cumsum(-1)
        codes.append((mass <= draws[..., j : j + 1] * mass[..., -1:]).sum(-1))
    return torch.stack(codes, dim=-1)
