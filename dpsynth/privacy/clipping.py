"""Clipping: each run's sum of per-record gradients, none longer than that run's bound.

Three ways to the same sum, all over parameters with a leading `runs` axis:

* `taps`: one forward, one backward to the layer outputs only; a record's norm in closed form from
  what went into a layer and what came back, then one re-weighted matrix product a layer.
* `opacus_hooks`: Opacus materialises every record's gradient.
* `opacus_ghost`: Opacus computes norms layer by layer, then a second, re-weighted backward.

In floating point, one record alone: what `taps` and `opacus_hooks` add is no longer than C for any
magnitudes, because each squared norm carries a bound on its own rounding (`squared_norms`).
`opacus_ghost` computes the gradient a second time, so there it holds up to the rounding of that
backward pass.
Not protected: the rounding inside the sum over a batch, which depends on all of its records. In
float32 one of 1024 records all alike moves the sum by less than C(1 + 1e-4); no bound so close is
known for the worst order. Float64 weights leave nothing to speak of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpsynth.checks import UsageError
from dpsynth.networks import FleetLinear

__all__ = ["ENGINES", "Clipper", "LossOf", "Records", "check_precision", "expand", "squared_norms"]

LossOf = Callable[[], Tensor]
_Pair = tuple[FleetLinear, Tensor, Tensor]
Records = Float[Tensor, "runs batch"]


class Clipper(ABC):
    """Adds each run's sum of clipped per-record gradients to `p.summed_grad`.

    Attributes:
        static: Whether the step is being captured: then no decision may look at a value.
    """

    static = False

    def __init__(self, network: nn.Module, bound: Tensor) -> None:
        self.network = network
        self.bound = bound
        for name, module in network.named_modules():
            _check_layer(f"layer {name!r} ({type(module).__name__})", module)

    @abstractmethod
    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        """Args:
            losses: Evaluates the unreduced loss (runs, batch).
            counts: 1 where a record is in the batch, 0 for padding (runs, batch).

        Returns:
            The losses, detached.
        """

    def factors(self, loss: Tensor, squared: Records, counts: Records) -> Records:
        """Clip factor of each record from its loss and squared norm (runs, batch).

        A loss or a squared norm that is not finite gives 0: the record contributes nothing (fails
        closed), also where the norm itself would be finite but its square overflows. Which records
        these are, and how many, is private: no log, counter or message holds anything of it.
        """
        counts = torch.where(loss.detach().isfinite(), counts, 0.0)
        norms = squared.clamp_min(0).sqrt()
        factor = (self.bound[:, None] / (norms + 1e-6)).clamp(max=1.0)
        return torch.where(norms.isfinite(), factor, 0.0) * counts

    def reduce(self, pairs: Sequence[_Pair], factor: Records, *, broken: bool) -> None:
        """Add Σ_i factor_i · a_i b_iᵀ to every layer, from what `_Taps` saw; with `broken` some of
        it may not be finite."""
        factor = factor[..., None, None]
        for layer, a, b in pairs:
            weighted = b * factor
            if broken:  # 0 · inf is NaN, so such records are taken out rather than weighted
                weighted = torch.where(factor > 0, weighted, 0.0)
                a = torch.where(factor > 0, a, 0.0)
            flat = weighted.flatten(1, 2)
            _add(layer.weight, a.flatten(1, 2).mT @ flat)
            _add(layer.bias, flat.sum(1))


# Normalisers without weights whose groups may span the batch axis: FleetLinear's comes second.
_MIXING = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def _check_layer(what: str, module: nn.Module) -> None:
    """Refuse a layer of unknown norm, and one through which a record reaches another's gradient."""
    if list(module.parameters(recurse=False)) and not isinstance(module, FleetLinear):
        raise UsageError(f"{what}: no per-record norm is known for it; use FleetLinear")
    running = any(n.startswith("running_") for n, _ in module.named_buffers(recurse=False))
    wide = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1
    if running or wide or isinstance(module, _MIXING):
        raise UsageError(
            f"{what}: mixes records, so the share of one has no bound; normalise the features of "
            "each record by themselves"
        )


def check_precision(like: Tensor) -> None:
    """Refuse arithmetic in which the norms are not those of what is summed."""
    backend: Any = torch.backends.cuda if like.is_cuda else torch.backends.mkldnn
    every: Any = torch.backends
    chosen = backend.matmul.fp32_precision
    chosen = every.fp32_precision if chosen == "none" else chosen
    if like.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"weights in {like.dtype}: clipping needs float32 or float64")
    if like.dtype == torch.float32 and chosen not in ("none", "ieee"):
        raise UsageError(
            f"matrix products in {chosen}: a clipped record could exceed its bound; call "
            "torch.set_float32_matmul_precision('highest')"
        )


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    held = getattr(parameter, "summed_grad", None)
    parameter.summed_grad = gradient if held is None else held + gradient  # type: ignore[attr-defined]


def _draws(x: Tensor) -> Tensor:
    """(runs, batch, [draws...,] features) -> (runs, batch, draws, features)."""
    return x.unsqueeze(2) if x.dim() == 3 else x.flatten(2, -2)


def _beside(uses: list[Tensor]) -> Tensor:
    """All uses of a layer as draws, side by side (runs, batch, draws, features)."""
    shaped = [_draws(x) for x in uses]
    return shaped[0] if len(shaped) == 1 else torch.cat(shaped, dim=2)


def squared_norms(
    a: Float[Tensor, "runs batch draws inputs"], b: Float[Tensor, "runs batch draws outputs"]
) -> Float[Tensor, "runs batch"]:
    """Squared norm of each record's weight and bias gradient, never formed, and never too small.

    With K draws inside one record, ‖Σ_k a_k b_kᵀ‖² + ‖Σ_k b_k‖² = Σ_kl (⟨a_k,a_l⟩+1)⟨b_k,b_l⟩.
    Where draws cancel, that sum loses all its digits, and so does the gradient that the matrix
    product forms. Both errors are bounded by multiples of S = Σ_k √(‖a_k‖²+1) ‖b_k‖: with unit
    roundoff u, the first by γ(in+out+2K) S² in the square, the second by γ(K) S in the norm (Higham
    2002, §3.1 and §3.5, in any order of summation). What is returned has 2u (in+out+5K+32) S²
    added, enough for both and for the few operations that follow: factor · ‖computed gradient‖ ≤ C.
    In float32 that lengthens a norm by about 1e-4 of S²/norm.

    Args:
        a: Layer inputs (runs, batch, draws, in).
        b: Gradients at the layer's output (runs, batch, draws, out).
    """
    kind = torch.finfo(a.dtype)
    (draws, inputs), outputs = a.shape[2:], b.shape[-1]
    slack = kind.eps * (inputs + outputs + 5 * draws + 32)
    # What squares below the smallest normal number may have lost; ‖a‖² matters beside 1 only.
    lost = outputs * kind.tiny
    if draws == 1:
        squared = (a.square().sum(-1) + 1).mul(b.square().sum(-1) + lost).squeeze(-1)
        return squared * (1 + slack)
    left, right = a @ a.mT + 1, b @ b.mT
    lengths = left.diagonal(dim1=-2, dim2=-1) * (right.diagonal(dim1=-2, dim2=-1) + lost)
    most = lengths.sqrt().sum(-1).square()
    return (left * right).sum(-1).sum(-1).clamp_min(0) + slack * most


class _Taps:
    """While it is entered: what goes into every layer and what comes out, in order."""

    def __init__(self, network: nn.Module) -> None:
        self._layers = [m for m in network.modules() if isinstance(m, FleetLinear)]
        self._inputs: dict[FleetLinear, list[Tensor]] = {layer: [] for layer in self._layers}
        # Edges rather than outputs: these are then freed as in any backward pass.
        self._outputs: dict[FleetLinear, list[GradientEdge]] = {layer: [] for layer in self._layers}

    def __enter__(self) -> _Taps:
        self._handles = [layer.register_forward_hook(self._tap) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tap(self, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(layer, FleetLinear)
        self._inputs[layer].append(args[0].detach())
        self._outputs[layer].append(get_gradient_edge(out))

    def pairs(self, loss: Tensor) -> list[_Pair]:
        """(layer, inputs, gradients at its outputs) of every layer that was used, each
        (runs, batch, draws, features); the uses of one layer stand side by side as draws."""
        used = [layer for layer in self._layers if self._outputs[layer]]
        flat = [out for layer in used for out in self._outputs[layer]]
        gradients = iter(torch.autograd.grad(loss.sum(), flat))
        pairs = []
        for layer in used:
            b = _beside([next(gradients) for _ in self._outputs[layer]])
            pairs.append((layer, _beside(self._inputs[layer]), b))
        return pairs


class TapClipper(Clipper):
    """Closed-form norms from taps at the layers' inputs and outputs; no per-record gradient."""

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        with _Taps(self.network) as taps:
            loss = losses()
        pairs = taps.pairs(loss)
        squared = torch.stack([squared_norms(a, b) for _, a, b in pairs]).sum(0)
        # On a CPU to look is free and to take records out unasked a tenth of a step; on a GPU the
        # look would wait for the device at every step.
        broken = self.static or squared.is_cuda or not bool(squared.isfinite().all())
        self.reduce(pairs, self.factors(loss, squared, counts), broken=broken)
        return loss.detach()


class HooksClipper(Clipper):
    """Opacus' per-record gradients, clipped a run at a time."""

    def __init__(self, network: nn.Module, bound: Tensor) -> None:
        super().__init__(network, bound)
        # Axis 0 is runs and axis 1 is the batch, which Opacus calls batch_first=False.
        self._hooked = GradSampleModule(network, batch_first=False, loss_reduction="sum")
        self._hooked.disable_hooks()

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        self._hooked.enable_hooks()
        loss = losses()
        loss.sum().backward()
        self._hooked.disable_hooks()
        parameters = list(self.network.parameters())
        samples = [p.grad_sample for p in parameters]  # type: ignore[attr-defined]
        squared = torch.stack([_squared_lengths(g) for g in samples]).sum(0)
        factor = self.factors(loss, squared.mT, counts)
        for parameter, sample in zip(parameters, samples, strict=True):
            sample = torch.where(expand(factor.mT > 0, sample), sample, 0.0)
            _add(parameter, torch.einsum("rb,br...->r...", factor, sample))
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return loss.detach()


class GhostClipper(Clipper):
    """Opacus' ghost norms, then a second backward of the re-weighted loss."""

    def __init__(self, network: nn.Module, bound: Tensor) -> None:
        super().__init__(network, bound)
        self._hooked = GradSampleModuleFastGradientClipping(
            network, batch_first=False, loss_reduction="sum"
        )
        self._hooked.disable_hooks()

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        self._hooked.enable_hooks()
        with _Taps(self.network) as taps:
            loss = losses()
        loss.sum().backward(retain_graph=True)
        self._hooked.disable_hooks()
        self.network.zero_grad()
        squared = self._hooked.get_norm_sample().square().mT
        factor = self.factors(loss, squared, counts)
        if not bool(squared.isfinite().all()):  # a second backward would spread 0 · inf = NaN
            self.reduce(taps.pairs(loss), factor, broken=True)
            return loss.detach()
        kept = torch.where(factor > 0, loss * factor, 0.0)
        kept.sum().backward()
        for parameter in self.network.parameters():
            _add(
                parameter, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            parameter.grad = None
        return loss.detach()


def _squared_lengths(samples: Tensor) -> Tensor:
    """(batch, runs, ...) -> squared norms (batch, runs), not smaller than they are: torch sums in
    a tree, whose error is a few roundings for each of its levels."""
    squared = samples.flatten(2).square().sum(-1)
    return squared * (1 + 256 * torch.finfo(samples.dtype).eps)


def expand(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` with as many axes as `like`, the new ones of length 1."""
    return mask.reshape(*mask.shape, *(1,) * (like.dim() - mask.dim()))


def _opacus_view(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Opacus hands over (batch, runs, ...); give back (runs, batch, draws, features)."""
    return _draws(a.transpose(0, 1)), _draws(b.transpose(0, 1))


def _grad_sampler(
    layer: FleetLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    a, b = _opacus_view(activations[0], backprops)
    return {
        layer.weight: torch.einsum("rbki,rbko->brio", a, b),
        layer.bias: torch.einsum("rbko->bro", b),
    }


def _norm_sampler(
    layer: FleetLinear, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    a, b = _opacus_view(activations[0], backprops)
    bias = b.sum(2).square().sum(-1)
    weight = (squared_norms(a, b) - bias).clamp_min(0)
    return {layer.weight: weight.sqrt().mT, layer.bias: bias.sqrt().mT}


# The extension point behind opacus.grad_sample.register_grad_sampler / register_norm_sampler.
GradSampleModule.GRAD_SAMPLERS[FleetLinear] = _grad_sampler
GradSampleModuleFastGradientClipping.NORM_SAMPLERS[FleetLinear] = _norm_sampler

ENGINES: dict[str, type[Clipper]] = {
    "taps": TapClipper,
    "opacus_hooks": HooksClipper,
    "opacus_ghost": GhostClipper,
}
