"""Networks with a leading `runs` axis: R independent copies computed as batched matrix products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dpsynth.checks import UsageError, check_count
from dpsynth.randomness import FleetRng

__all__ = [
    "FleetEmbedding",
    "FleetGroupNorm",
    "FleetLayerNorm",
    "FleetLinear",
    "FleetMaskedLinear",
    "FleetRMSNorm",
    "Mlp",
    "column_log_likelihood",
    "columns_at",
    "draw_level",
    "evenly",
    "sample_columns",
]


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


class FleetMaskedLinear(nn.Module):
    """y = x (W ∘ M) for R runs, no bias: a block of outputs sees those blocks of inputs whose place
    is before its own (MADE, Germain et al. 2015).

    Inputs and outputs are (runs, batch, [draws,] width), blocks side by side. A weight that the
    mask hides has gradient 0 and no effect; under DP-SGD it gets noise like all others, and is
    nothing but noise.

    Args:
        runs: R.
        levels: Length of each block.

    Attributes:
        rank: Place of each block in the order of a run (runs, blocks); as they stand at first.
    """

    rank: Tensor

    def __init__(self, runs: int, levels: Sequence[int]) -> None:
        super().__init__()
        for count in levels:
            check_count("levels", count)
        self.levels = list(levels)
        self.weight = nn.Parameter(torch.zeros(runs, sum(levels), sum(levels)))
        self.register_buffer("rank", torch.arange(len(levels)).repeat(runs, 1))

    def reset(self, rng: FleetRng) -> None:
        """Weights 0; nothing is drawn."""
        nn.init.zeros_(self.weight)

    def before(self) -> Bool[Tensor, "runs blocks blocks"]:
        """Which blocks of inputs are seen by which of outputs."""
        return self.rank[:, :, None] < self.rank[:, None, :]

    def mask(self) -> Bool[Tensor, "runs inputs outputs"]:
        """Which weights are used."""
        each = [j for j, count in enumerate(self.levels) for _ in range(count)]
        block = torch.tensor(each, device=self.rank.device)
        return self.before()[:, block][:, :, block]

    def masked(self) -> Float[Tensor, "runs inputs outputs"]:
        """The weights that are used, 0 elsewhere."""
        return torch.where(self.mask(), self.weight, 0)

    def forward(self, x: Float[Tensor, "runs *rows inputs"]) -> Float[Tensor, "runs *rows outputs"]:
        return (x.flatten(1, -2) @ self.masked()).unflatten(1, x.shape[1:-1])


class FleetEmbedding(nn.Module):
    """Row `code` of a table, for R runs: weight (runs, levels, width).

    Codes are (runs, batch, [draws,]) integers in [0, levels); several columns can share one table
    when their codes are shifted apart. Initialised by `reset`.
    """

    def __init__(self, runs: int, levels: int, width: int) -> None:
        super().__init__()
        check_count("levels", levels)
        check_count("width", width)
        self.weight = nn.Parameter(torch.zeros(runs, levels, width))

    def reset(self, rng: FleetRng) -> None:
        """Entries N(0, 1)."""
        with torch.no_grad():
            self.weight.copy_(rng.normal(*self.weight.shape[1:]).to(self.weight))

    def forward(
        self, codes: Int[Tensor, "runs batch *draws"]
    ) -> Float[Tensor, "runs batch *draws width"]:
        # Not `F.embedding` on all tables end to end: a code that is too large would be another
        # run's, where `gather` raises.
        rows = codes.flatten(1)[..., None].expand(-1, -1, self.weight.shape[2])
        return self.weight.gather(1, rows).unflatten(1, codes.shape[1:])


class _FleetNorm(nn.Module, ABC):
    """y = normalize(x) · weight [+ bias]: weight and bias (runs, features), 1 and 0 at first.

    Every record's every draw is normalised over its own features only. Inputs are
    (runs, batch, [draws,] features).
    """

    bias: nn.Parameter | None

    def __init__(self, runs: int, features: int, *, bias: bool, eps: float) -> None:
        super().__init__()
        check_count("features", features)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(runs, features))
        self.bias = nn.Parameter(torch.zeros(runs, features)) if bias else None

    def reset(self, rng: FleetRng) -> None:
        """Weights 1, bias 0; nothing is drawn."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @abstractmethod
    def normalize(
        self, x: Float[Tensor, "runs *rows features"]
    ) -> Float[Tensor, "runs *rows features"]:
        """What weight and bias are applied to."""

    def forward(
        self, x: Float[Tensor, "runs *rows features"]
    ) -> Float[Tensor, "runs *rows features"]:
        shape = (len(self.weight), *(1,) * (x.dim() - 2), -1)
        scaled = self.normalize(x) * self.weight.reshape(shape)
        return scaled if self.bias is None else scaled + self.bias.reshape(shape)


class FleetLayerNorm(_FleetNorm):
    """Mean 0 and variance 1 over the features, then weight and bias (Ba et al. 2016)."""

    def __init__(self, runs: int, features: int, *, eps: float = 1e-5) -> None:
        super().__init__(runs, features, bias=True, eps=eps)

    def normalize(
        self, x: Float[Tensor, "runs *rows features"]
    ) -> Float[Tensor, "runs *rows features"]:
        """(x - mean) / √(variance + eps)."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class FleetRMSNorm(_FleetNorm):
    """Mean square 1 over the features, then a weight and no bias (Zhang & Sennrich 2019)."""

    def __init__(self, runs: int, features: int, *, eps: float = 1e-5) -> None:
        super().__init__(runs, features, bias=False, eps=eps)

    def normalize(
        self, x: Float[Tensor, "runs *rows features"]
    ) -> Float[Tensor, "runs *rows features"]:
        """x / √(mean square + eps)."""
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class FleetGroupNorm(_FleetNorm):
    """As `FleetLayerNorm`, over each of `groups` blocks of neighbouring features by itself
    (Wu & He 2018)."""

    def __init__(self, runs: int, features: int, groups: int, *, eps: float = 1e-5) -> None:
        super().__init__(runs, features, bias=True, eps=eps)
        check_count("groups", groups)
        if features % groups:
            raise UsageError(f"groups={groups}: must divide features={features}")
        self.groups = groups

    def normalize(
        self, x: Float[Tensor, "runs *rows features"]
    ) -> Float[Tensor, "runs *rows features"]:
        """(x - mean) / √(variance + eps) of each group."""
        blocks = x.unflatten(-1, (self.groups, -1))
        return F.layer_norm(blocks, blocks.shape[-1:], eps=self.eps).flatten(-2)


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
    return columns_at(logits, levels, rng.uniform(*logits.shape[1:-1], len(levels)))


def columns_at(
    logits: Float[Tensor, "runs *rows width"],
    levels: Sequence[int],
    draws: Float[Tensor, "runs *rows columns"],
) -> Int[Tensor, "runs *rows columns"]:
    """The same from uniform draws, one a column."""
    blocks = logits.split(list(levels), dim=-1)
    return torch.stack([draw_level(b, draws[..., j]) for j, b in enumerate(blocks)], dim=-1)


def evenly(
    share: Float[Tensor, "runs levels"],
    offset: Float[Tensor, " runs"],
    order: Float[Tensor, "runs rows"],
) -> Int[Tensor, "runs rows"]:
    """Levels in these shares, each as often as it is due but for less than one row.

    Args:
        share: Of each level, adding up to 1.
        offset: One uniform draw a run, which decides the roundings.
        order: Uniform draws, which decide the order of rows.
    """
    rows = order.shape[-1]
    ends = share.double().cumsum(-1)
    points = (torch.arange(rows, device=share.device) + offset.double()[:, None]) / rows
    drawn = torch.searchsorted(ends, points.clamp(max=1 - 1e-9) * ends[:, -1:], right=True)
    return drawn.gather(-1, order.argsort(-1))


def draw_level(
    logits: Float[Tensor, "*rows levels"], draws: Float[Tensor, "*rows"]
) -> Int[Tensor, "*rows"]:
    """The level at which a distribution reaches a uniform draw; never one of probability 0."""
    mass = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    # Below 1 by more than rounding, so that the inverse stays on a level that has mass.
    point = draws.clamp(max=1 - 1e-6)[..., None] * mass[..., -1:]
    return (mass <= point).sum(-1)
