"""What clipping knows of each type of layer: a record's norm, and the re-weighted sum.

One rule a type, in `RULES`. A rule sees what went into a layer and the gradients at its output; it
never forms a record's gradient where that would be as large as the layer's weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dpsynth.networks import (
    FleetEmbedding,
    FleetGroupNorm,
    FleetLayerNorm,
    FleetLinear,
    FleetMaskedLinear,
    FleetRMSNorm,
)
from dpsynth.privacy.precision import FULL, Precision
from dpsynth.shapes import expand

__all__ = [
    "RULES",
    "Formed",
    "Records",
    "Rule",
    "Samples",
    "embedding_squared_norms",
    "masked_squared_norms",
    "squared_lengths",
    "squared_norms",
]

Records = Float[Tensor, "runs batch"]
Samples = dict[nn.Parameter, Tensor]
Uses = Sequence[tuple[Sequence[Tensor], Tensor]]


class Rule(ABC):
    """What clipping must know of one type of layer.

    What it keeps of a piece of a batch (`gather`) is a few tensors that start (runs, batch, …).
    """

    @abstractmethod
    def gather(self, layer: nn.Module, uses: Uses, precision: Precision) -> tuple[Tensor, ...]:
        """What norms and sums are computed from.

        Args:
            layer: Of this rule's type.
            uses: For each use of the layer in one loss, its inputs and the gradient at its output.
            precision: Format of the weight-gradient product.
        """

    @abstractmethod
    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Records:
        """Squared norm of each record's gradient, never below that of what `sums` will add for it
        at factor 1, whatever is rounded on the way (runs, batch)."""

    @abstractmethod
    def sums(
        self, layer: nn.Module, seen: Sequence[Tensor], factor: Records, precision: Precision
    ) -> Samples:
        """Σ_i factor_i · gradient_i of every parameter (runs, …); records of factor 0 hold finite
        numbers."""

    @abstractmethod
    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        """Each record's gradient written out (runs, batch, …), for one use."""

    def without(self, seen: Sequence[Tensor], kept: Tensor) -> tuple[Tensor, ...]:
        """`seen` with zeros for the records that are not `kept` (runs, batch): 0 · inf is NaN, so
        a record that is not finite is taken out rather than weighted."""
        return tuple(torch.where(expand(kept, t), t, 0) for t in seen)


def _draws(x: Tensor) -> Tensor:
    """(runs, batch, [draws...,] features) -> (runs, batch, draws, features)."""
    return x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2)


def _beside(uses: Sequence[Tensor], like: Tensor) -> Tensor:
    """All uses of a layer as draws, side by side (runs, batch, draws, features), in the type of
    its weights (autocast hands over shorter ones)."""
    shaped = [_draws(x).to(like.dtype) for x in uses]
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=2)


# -- linear ------------------------------------------------------------------------------------


def squared_norms(
    a: Float[Tensor, "runs batch draws inputs"],
    b: Float[Tensor, "runs batch draws outputs"],
    precision: Precision = FULL,
) -> Float[Tensor, "runs batch"]:
    """Squared norm of each record's weight and bias gradient, never formed, and never too small.

    With K draws inside one record, ‖Σ_k a_k b_kᵀ‖² + ‖Σ_k b_k‖² = Σ_kl (⟨a_k,a_l⟩+1)⟨b_k,b_l⟩.
    Where draws cancel, that sum loses all its digits, and so does the gradient that the matrix
    product forms. Both errors are bounded by multiples of S = Σ_k √(‖a_k‖²+1) ‖b_k‖: with unit
    roundoff u, the first by γ(in+out+2K) S² in the square, the second by γ(K) S in the norm (Higham
    2002, §3.1 and §3.5, in any order of summation). What is returned has 2u (in+out+5K+32) S²
    added, enough for both and for the few operations that follow: factor · ‖computed gradient‖ ≤ C.
    In float32 that lengthens a norm by about 1e-4 of S²/norm.

    In a shorter format, a and b are already rounded to it, and this is the norm of those: their
    products are exact. What the matrix product then uses is t_k = factor · b_k truncated towards
    zero, so t_kj = factor · b_kj (1 - d) with an own d in [0, h] for each entry; h is `step`. About
    the middle, d = h/2 ± h/2:
        ‖Σ_k [a_k,1] t_kᵀ‖ ≤ factor · ((1 - h/2) ‖Σ_k [a_k,1] b_kᵀ‖ + h/2 · S),
    and the parenthesis is what is returned, squared. For one draw S is the norm itself: truncation
    alone never lengthens it. For several it may turn what is left where they cancel, by up to h·S,
    which rounding to nearest could exceed even for one. Sums on tensor cores are truncated rather
    than rounded, a few terms at a time (Fasi et al. 2021), so γ is four times as large there.

    Args:
        a: Layer inputs (runs, batch, draws, in).
        b: Gradients at the layer's output (runs, batch, draws, out).
        precision: Format of the product; a and b hold numbers of it.
    """
    if precision.short:
        a, b = a.float(), b.float()
    kind = torch.finfo(a.dtype)
    (draws, inputs), outputs = a.shape[2:], b.shape[-1]
    slack = kind.eps * (inputs + outputs + 5 * draws + 32) * (4 if precision.short else 1)
    # What squares below the smallest normal number may have lost; ‖a‖² matters beside 1 only.
    lost = outputs * kind.tiny
    if draws == 1:
        # Unlike square().sum() this needs no room for the squares, which costs more than they do.
        lengths = torch.linalg.vector_norm(a, dim=-1), torch.linalg.vector_norm(b, dim=-1)
        squared = (lengths[0].square() + 1).mul(lengths[1].square() + lost).squeeze(-1)
        return squared * (1 + slack)
    left, right = a @ a.mT + 1, b @ b.mT
    lengths = left.diagonal(dim1=-2, dim2=-1) * (right.diagonal(dim1=-2, dim2=-1) + lost)
    most = lengths.sqrt().sum(-1).square()
    return _at_least((left * right).sum(-1).sum(-1), most, slack, precision)


def _at_least(squared: Tensor, most: Tensor, slack: float, precision: Precision) -> Tensor:
    """The norm that `squared_norms` gives for several draws, from ‖Σ_k …‖² as computed and S²."""
    squared = squared.clamp_min(0) + slack * most
    if not precision.short:
        return squared
    half = precision.step / 2
    return ((1 - half) * squared.sqrt() + half * most.sqrt()).square()


class Linear(Rule):
    """`FleetLinear`: inputs a and output gradients b, each (runs, batch, draws, features)."""

    def gather(self, layer: nn.Module, uses: Uses, precision: Precision) -> tuple[Tensor, Tensor]:
        like = layer.get_parameter("weight")
        a = _beside([inputs[0] for inputs, _ in uses], like)
        b = _beside([gradient for _, gradient in uses], like)
        return precision.round(a), precision.round(b)

    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Records:
        a, b = seen
        return squared_norms(a, b, precision)

    def sums(
        self, layer: nn.Module, seen: Sequence[Tensor], factor: Records, precision: Precision
    ) -> Samples:
        a, b = seen
        flat = precision.truncate(b * factor[..., None, None]).flatten(1, 2)
        weight = precision.product(a.flatten(1, 2).mT, flat)
        return {
            layer.get_parameter("weight"): weight,
            layer.get_parameter("bias"): flat.sum(1, dtype=factor.dtype),
        }

    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        a, b = _draws(inputs[0]), _draws(gradient)
        return {
            layer.get_parameter("weight"): torch.einsum("rbki,rbko->rbio", a, b),
            layer.get_parameter("bias"): b.sum(2),
        }


# -- masked linear -----------------------------------------------------------------------------


def masked_squared_norms(
    a: Float[Tensor, "runs batch draws inputs"],
    b: Float[Tensor, "runs batch draws outputs"],
    layer: FleetMaskedLinear,
    precision: Precision = FULL,
) -> Float[Tensor, "runs batch"]:
    """Squared norm of each record's masked weight gradient, never formed, and never too small.

    The gradient has a block a_i b_jᵀ for every block i of inputs before j, so for one draw it is
    Σ_j ‖b_j‖² Σ_{i before j} ‖a_i‖², and for several
    Σ_j Σ_kl ⟨b_kj, b_lj⟩ Σ_{i before j} ⟨a_ki, a_li⟩. Rounding is bounded as in `squared_norms`,
    with S = Σ_k √(Σ_j ‖b_kj‖² Σ_{i before j} ‖a_ki‖²).

    Args:
        a: Layer inputs (runs, batch, draws, inputs).
        b: Gradients at the layer's output (runs, batch, draws, outputs).
        layer: Its blocks and their order.
        precision: Format of the product; a and b hold numbers of it.
    """
    if precision.short:
        a, b = a.float(), b.float()
    kind, draws, width = torch.finfo(a.dtype), a.shape[2], max(a.shape[3], b.shape[3])
    slack = kind.eps * (2 * width + 5 * draws + 32) * (4 if precision.short else 1)
    # What squares below the smallest normal number may have lost, on either side.
    lost = width * kind.tiny
    if draws == 1:
        ahead, behind = (
            _by_block(x, layer.levels, lambda p: p.square().sum((-1, -2))) for x in (a, b)
        )
        squared = (_before(ahead, layer) + lost) * (behind + lost)
        return squared.sum(-1) * (1 + slack)
    left, right = (_by_block(x, layer.levels, lambda p: p @ p.mT) for x in (a, b))
    left = _before(left, layer)
    lengths = [x.diagonal(dim1=-2, dim2=-1) + lost for x in (left, right)]
    most = (lengths[0] * lengths[1]).sum(2).sqrt().sum(-1).square()
    return _at_least((left * right).sum(-1).sum(-1).sum(-1), most, slack, precision)


def _by_block(
    x: Tensor, counts: Sequence[int], of: Callable[[Tensor], Tensor]
) -> Float[Tensor, "runs batch blocks *rest"]:
    return torch.stack([of(part) for part in x.split(list(counts), dim=-1)], dim=2)


def _before(x: Tensor, layer: FleetMaskedLinear) -> Tensor:
    """Sums over the blocks of inputs that each block of outputs sees (runs, batch, blocks, …).

    Running sums in order of place, not a product with the mask: that would be rounded as products
    are, and an infinite block that is not seen would make a sum undefined.
    """

    def along(places: Tensor) -> Tensor:
        shape = (*places.shape, *(1,) * (x.dim() - 3))
        return places.reshape(shape)[:, None].expand(-1, x.shape[1], -1, *x.shape[3:])

    sums = x.gather(2, along(layer.rank.argsort(-1))).cumsum(2)
    sums = torch.cat([torch.zeros_like(sums[:, :, :1]), sums], dim=2)
    return sums.gather(2, along(layer.before().sum(1)))


class MaskedLinear(Rule):
    """`FleetMaskedLinear`: inputs a, output gradients b, each (runs, batch, draws, width), and the
    squared norms, which need the layer's order."""

    def gather(self, layer: nn.Module, uses: Uses, precision: Precision) -> tuple[Tensor, ...]:
        assert isinstance(layer, FleetMaskedLinear)
        a = precision.round(_beside([inputs[0] for inputs, _ in uses], layer.weight))
        b = precision.round(_beside([gradient for _, gradient in uses], layer.weight))
        return a, b, masked_squared_norms(a, b, layer, precision)

    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Records:
        return seen[2]

    def sums(
        self, layer: nn.Module, seen: Sequence[Tensor], factor: Records, precision: Precision
    ) -> Samples:
        assert isinstance(layer, FleetMaskedLinear)
        flat = precision.truncate(seen[1] * factor[..., None, None]).flatten(1, 2)
        whole = precision.product(seen[0].flatten(1, 2).mT, flat)
        return {layer.weight: torch.where(layer.mask(), whole, 0)}

    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        assert isinstance(layer, FleetMaskedLinear)
        whole = torch.einsum("rbki,rbko->rbio", _draws(inputs[0]), _draws(gradient))
        return {layer.weight: torch.where(layer.mask()[:, None], whole, 0)}


# -- embedding ---------------------------------------------------------------------------------


def embedding_squared_norms(
    codes: Int[Tensor, "runs batch draws"], b: Float[Tensor, "runs batch draws width"]
) -> Float[Tensor, "runs batch"]:
    """Squared norm of each record's table gradient, never formed, and never too small.

    Σ_kl 1[codes_k = codes_l] ⟨b_k, b_l⟩ is the sum over a record's distinct codes of the squared
    length of what its b_k of that code add up to. Codes are sorted within a record, so it takes
    as much memory as b and K log K time. That sum, like the one into the table, is off by γ(K) S at
    most, S = Σ_k ‖b_k‖ (Higham 2002, §3.1); twice that is added to the norm.

    Args:
        codes: Level numbers (runs, batch, draws).
        b: Gradients at the layer's output (runs, batch, draws, width).
    """
    eps = torch.finfo(b.dtype).eps
    draws, width = b.shape[2:]
    slack = eps * (width + draws + 32)
    if draws == 1:
        return b.square().sum((-1, -2)) * (1 + slack)
    ordered, order = codes.sort(dim=-1)
    # Numbers the distinct codes of a record 0, 1, …, then gives every draw its code's number.
    distinct = torch.zeros_like(ordered)
    distinct[..., 1:] = (ordered[..., 1:] != ordered[..., :-1]).cumsum(-1)
    places = torch.empty_like(order).scatter_(-1, order, distinct)
    records = torch.arange(codes.shape[0] * codes.shape[1], device=codes.device) * draws
    rows = (places.flatten(0, 1) + records[:, None]).flatten()
    sums = torch.zeros_like(b).flatten(0, 2).index_add(0, rows, b.flatten(0, 2))
    squared = sums.reshape(b.shape).square().sum(-1).sum(-1) * (1 + slack)
    lengths = b.square().sum(-1).sqrt().sum(-1)
    return (squared.sqrt() + 2 * eps * (draws + 2) * lengths).square()


class Embedding(Rule):
    """`FleetEmbedding`: codes (runs, batch, draws) and b (runs, batch, draws, width).

    Sums and norms are elementwise, so no format of matrix products touches them.
    """

    def gather(self, layer: nn.Module, uses: Uses, precision: Precision) -> tuple[Tensor, Tensor]:
        like = layer.get_parameter("weight")
        codes = [
            inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][..., None]
            for inputs, _ in uses
        ]
        return torch.cat(codes, dim=2).long(), _beside([gradient for _, gradient in uses], like)

    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Records:
        codes, b = seen
        return embedding_squared_norms(codes, b)

    def sums(
        self, layer: nn.Module, seen: Sequence[Tensor], factor: Records, precision: Precision
    ) -> Samples:
        codes, b = seen
        weight = layer.get_parameter("weight")
        weighted = b * factor[..., None, None]
        starts = torch.arange(len(codes), device=codes.device) * weight.shape[1]
        rows = (codes + starts[:, None, None]).flatten()
        table = torch.zeros_like(weight).flatten(0, 1)
        return {weight: table.index_add(0, rows, weighted.flatten(0, 2)).view_as(weight)}

    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        weight, b = layer.get_parameter("weight"), _draws(gradient)
        codes = inputs[0].flatten(2) if inputs[0].dim() > 2 else inputs[0][..., None]
        table = b.new_zeros(*b.shape[:2], *weight.shape[1:])
        rows = codes.long()[..., None].expand_as(b)
        return {weight: table.scatter_add(2, rows, b)}


# -- layers whose records' gradients are written out -------------------------------------------


def squared_lengths(samples: Tensor) -> Tensor:
    """Squared norms (runs, batch) of (runs, batch, …), not smaller than they are: torch sums in
    a tree, whose error is a few roundings for each of its levels."""
    squared = samples.flatten(2).square().sum(-1)
    return squared * (1 + 256 * torch.finfo(samples.dtype).eps)


class Formed(Rule):
    """A layer whose records' gradients are written out; `seen` is one tensor a parameter.

    What is measured is what is added, so no rounding of their computation matters. Weighted and
    added elementwise, since a matrix product may be chosen to keep fewer digits.
    """

    def gather(self, layer: nn.Module, uses: Uses, precision: Precision) -> tuple[Tensor, ...]:
        total: list[Tensor] = []
        for inputs, gradient in uses:
            found = self.samples(layer, inputs, gradient)
            parts = [found[p] for p in layer.parameters()]
            total = [a + b for a, b in zip(total, parts, strict=True)] if total else parts
        return tuple(total)

    def squared_norms(self, seen: Sequence[Tensor], precision: Precision) -> Records:
        return torch.stack([squared_lengths(samples) for samples in seen]).sum(0)

    def sums(
        self, layer: nn.Module, seen: Sequence[Tensor], factor: Records, precision: Precision
    ) -> Samples:
        return {
            parameter: (samples * expand(factor, samples)).sum(1)
            for parameter, samples in zip(layer.parameters(), seen, strict=True)
        }


class Norm(Formed):
    """Affine part of a normaliser: (runs, batch, features) each for weight and bias, which is no
    more than the layer's own output."""

    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        assert isinstance(layer, FleetLayerNorm | FleetRMSNorm | FleetGroupNorm)
        b = _beside([gradient], layer.weight)
        scaled = _beside([layer.normalize(inputs[0])], layer.weight)
        found: Samples = {layer.weight: (scaled * b).sum(2)}
        if layer.bias is not None:
            found[layer.bias] = b.sum(2)
        return found


RULES: Mapping[type[nn.Module], Rule] = MappingProxyType(
    {
        FleetLinear: Linear(),
        FleetMaskedLinear: MaskedLinear(),
        FleetEmbedding: Embedding(),
        FleetLayerNorm: Norm(),
        FleetRMSNorm: Norm(),
        FleetGroupNorm: Norm(),
    }
)
