"""Clipping: each run's sum of per-record gradients, none longer than that run's bound.

Three ways to the same sum, all over parameters with a leading `runs` axis:

* `taps`: one forward, one backward to the layer outputs only; a record's norm in closed form from
  what went into a layer and what came back (`layers`), then one re-weighted matrix product a layer.
* `opacus_hooks`: Opacus materialises every record's gradient.
* `opacus_ghost`: Opacus computes norms layer by layer, then a second, re-weighted backward.

A layer of a type without a rule in `layers` is clipped all the same, by gradients formed one record
at a time (`fallback`), and said to be so; what mixes records is refused.

In floating point, one record alone: what `taps` and `opacus_hooks` add is no longer than C for any
magnitudes, because each squared norm carries a bound on its own rounding (`squared_norms`), in
shorter formats too (`precision`). `opacus_ghost` computes the gradient a second time, so there it
holds up to the rounding of that backward pass.
Not protected: the rounding inside the sum over a batch, which depends on all of its records. In
float32 one of 1024 records all alike moves the sum by less than C(1 + 1e-4); no bound so close is
known for the worst order. Float64 weights leave nothing to speak of.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dpsynth.checks import UsageError
from dpsynth.privacy.fallback import (
    check_alone,
    check_use,
    describe,
    rule_of,
    trained_layers,
    warn_of_cost,
)
from dpsynth.privacy.layers import RULES, Records, Rule, Samples, squared_lengths
from dpsynth.privacy.precision import FULL, Precision, check_precision, choose_precision
from dpsynth.shapes import expand

__all__ = ["ENGINES", "Clipper", "LossOf", "Records", "check_precision"]

LossOf = Callable[[], Tensor]
_Pair = tuple[nn.Module, *tuple[Tensor, ...]]


class Clipper(ABC):
    """Adds each run's sum of clipped per-record gradients to `p.summed_grad`.

    Args:
        network: Every parameter of it has a leading axis of runs.
        bound: Clipping bound C of each run (R,).
        precision: Format of the weight-gradient products, one of `PRECISIONS`; only `taps` has
            others than "32". The global setting of `torch.set_float32_matmul_precision` must fit,
            see `check_precision`.

    Attributes:
        static: Whether the step is being captured: then no decision may look at a value.

    Raises:
        UsageError: On a layer that cannot be clipped, or a precision that cannot be had.
    """

    static = False

    def __init__(self, network: nn.Module, bound: Tensor, *, precision: str = "32") -> None:
        self.network = network
        self.bound = bound
        for name, module in network.named_modules():
            _check_apart(describe(name, module), module)
        self._layers = [(describe(*pair), pair[1]) for pair in trained_layers(network)]
        owners: dict[nn.Parameter, str] = {}
        for what, layer in self._layers:
            _check_trained(what, layer, len(bound), owners)
        self.precision = choose_precision(precision, next(network.parameters()))
        # Layers without a rule that were not yet seen to keep records apart.
        self._untried: set[nn.Module] = set()
        for what, layer in self._layers:
            if type(layer) not in RULES:
                warn_of_cost(what, layer)
                self._untried.add(layer)

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

    def _taps(self, counts: Records, *, several: bool = True) -> _Taps:
        untried = set() if self.static else self._untried
        return _Taps(self._layers, counts.shape, several=several, untried=untried)

    def reduce(self, pairs: Sequence[_Pair], factor: Records, *, broken: bool) -> None:
        """Add Σ_i factor_i · gradient_i to every layer, from what `_Taps` saw; with `broken` some
        of it may not be finite."""
        for layer, *seen in pairs:
            rule = rule_of(layer)
            kept = rule.without(seen, factor > 0) if broken else seen
            for parameter, total in rule.sums(layer, kept, factor, self.precision).items():
                _add(parameter, total)


# Normalisers without weights whose groups may span the batch axis: FleetLinear's comes second.
_MIXING = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def _check_apart(what: str, module: nn.Module) -> None:
    """Refuse a layer through which a record reaches another's gradient."""
    running = any(n.startswith("running_") for n, _ in module.named_buffers(recurse=False))
    wide = isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1
    if running or wide or isinstance(module, _MIXING):
        raise UsageError(
            f"{what}: mixes records, so the share of one has no bound; normalise the features of "
            "each record by themselves"
        )


def _check_trained(what: str, layer: nn.Module, runs: int, owners: dict[nn.Parameter, str]) -> None:
    """Refuse parameters of which no part belongs to one run, or which belong to two layers."""
    if isinstance(layer, nn.ParameterList | nn.ParameterDict):
        raise UsageError(f"{what}: belongs to no layer; keep a parameter in the layer that uses it")
    for part in layer.modules():
        # Their leading axis may be as long as there are runs, and still means something else.
        if list(part.parameters(recurse=False)) and _is_stock(part):
            raise UsageError(
                f"{what}: {type(part).__name__} is torch's own and has no axis of runs; "
                "use the layers of dpsynth.networks"
            )
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 0 or len(parameter) != runs:
            raise UsageError(
                f"{what}: parameter {name!r} of shape {tuple(parameter.shape)} needs a leading "
                f"axis of {runs} runs"
            )
        if owners.setdefault(parameter, what) != what:
            raise UsageError(
                f"{what}: shares parameter {name!r} with {owners[parameter]}, so their norms do "
                "not add up; use one layer twice instead"
            )


def _is_stock(module: nn.Module) -> bool:
    """Whether torch wrote it: a layer, not a container."""
    homes = {kind.__module__ for kind in type(module).__mro__}
    return any(
        home.startswith("torch.nn.modules.")
        and home not in ("torch.nn.modules.module", "torch.nn.modules.container")
        for home in homes
    )


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    held = getattr(parameter, "summed_grad", None)
    parameter.summed_grad = gradient if held is None else held + gradient  # type: ignore[attr-defined]


class _Taps:
    """While it is entered: what goes into every layer and what comes out, in order.

    Args:
        layers: With their names.
        records: (runs, batch), with which everything must start.
        several: Whether a layer may have several inputs.
        untried: Layers to be tried on one record alone; those that were are taken out.
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, nn.Module]],
        records: torch.Size,
        *,
        several: bool,
        untried: set[nn.Module],
    ) -> None:
        self._layers, self._records, self._several = layers, records, several
        self._untried = untried
        # Edges rather than outputs: these are then freed as in any backward pass.
        self._uses: dict[nn.Module, list[tuple[tuple[Tensor, ...], GradientEdge]]] = {
            layer: [] for _, layer in layers
        }

    def __enter__(self) -> _Taps:
        self._handles = [
            layer.register_forward_hook(partial(self._tap, what), with_kwargs=True, prepend=True)
            for what, layer in self._layers
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _tap(self, what: str, layer: nn.Module, args: Any, settings: Any, out: Any) -> None:
        check_use(what, args, settings, out, records=self._records, several=self._several)
        if layer in self._untried and self._records[1] > 1:
            check_alone(what, layer, args, out)
            self._untried.discard(layer)
        if out.requires_grad:  # else it was used under `no_grad`, and adds nothing
            self._uses[layer].append((tuple(a.detach() for a in args), get_gradient_edge(out)))

    def pairs(self, loss: Tensor, precision: Precision) -> list[_Pair]:
        """(layer, what its rule gathers…) of every layer that was used. Lets go of what it held."""
        used = [(layer, uses) for layer, uses in self._uses.items() if uses]
        flat = [edge for _, uses in used for _, edge in uses]
        gradients = list(torch.autograd.grad(loss.sum(), flat, allow_unused=True))
        pairs: list[_Pair] = []
        for layer, uses in used:
            found = [(inputs, gradients.pop(0)) for inputs, _ in uses]
            uses.clear()
            reached = [(inputs, b) for inputs, b in found if b is not None]
            if reached:
                pairs.append((layer, *rule_of(layer).gather(layer, reached, precision)))
        return pairs


class TapClipper(Clipper):
    """Closed-form norms from taps at the layers' inputs and outputs; no per-record gradient but of
    layers without a rule."""

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        with self._taps(counts) as taps:
            loss = losses()
        with torch.autocast(counts.device.type, enabled=False):
            pairs = taps.pairs(loss, self.precision)
            squared = self._squared(pairs)
            # On a CPU to look is free and to take records out unasked a tenth of a step; on a GPU
            # the look would wait for the device at every step.
            broken = self.static or squared.is_cuda or not bool(squared.isfinite().all())
            self.reduce(pairs, self.factors(loss, squared, counts), broken=broken)
        return loss.detach()

    def _squared(self, pairs: Sequence[_Pair]) -> Records:
        parts = [rule_of(layer).squared_norms(seen, self.precision) for layer, *seen in pairs]
        # Adding them up rounds once a layer at most.
        return torch.stack(parts).sum(0) * (1 + len(parts) * torch.finfo(parts[0].dtype).eps)


class OpacusClipper(Clipper):
    """What the two engines of Opacus share: what they cannot do is refused.

    Opacus itself refuses buffers, which its own rules know nothing of; those in `layers` do.
    """

    def __init__(self, network: nn.Module, bound: Tensor, *, precision: str = "32") -> None:
        super().__init__(network, bound, precision=precision)
        if self.precision.short:
            raise UsageError(f"precision={precision}: Opacus clips in '32' only; use engine=taps")
        for what, layer in self._layers:
            if list(layer.buffers()) and type(layer) not in RULES:
                raise UsageError(f"{what}: Opacus takes no layer with buffers; use engine=taps")

    def _taps(self, counts: Records, *, several: bool = False) -> _Taps:
        if torch.is_autocast_enabled(counts.device.type):
            raise UsageError("autocast: Opacus' norms would be rounded by it; use engine=taps")
        # Opacus waits for the gradient of every use, also of one that never reached a loss.
        for _, layer in self._layers:
            vars(layer).pop("activations", None)
            for parameter in layer.parameters():
                parameter._forward_counter = 0  # type: ignore[attr-defined]
                vars(parameter).pop("_current_grad_sample", None)
        return super()._taps(counts, several=several)


class HooksClipper(OpacusClipper):
    """Opacus' per-record gradients, clipped a run at a time."""

    def __init__(self, network: nn.Module, bound: Tensor, *, precision: str = "32") -> None:
        super().__init__(network, bound, precision=precision)
        # Axis 0 is runs and axis 1 is the batch, which Opacus calls batch_first=False.
        self._hooked = GradSampleModule(
            network, batch_first=False, loss_reduction="sum", strict=False
        )
        self._hooked.disable_hooks()

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        self._hooked.enable_hooks()
        with self._taps(counts):
            loss = losses()
        loss.sum().backward()
        self._hooked.disable_hooks()
        used = [(p, p.grad_sample) for p in self.network.parameters() if p.grad_sample is not None]  # type: ignore[attr-defined]
        squared = torch.stack([squared_lengths(sample) for _, sample in used]).sum(0)
        factor = self.factors(loss, squared.mT, counts)
        for parameter, sample in used:
            sample = torch.where(expand(factor.mT > 0, sample), sample, 0.0)
            _add(parameter, torch.einsum("rb,br...->r...", factor, sample))
            parameter.grad_sample = None  # type: ignore[attr-defined]
            parameter.grad = None
        return loss.detach()


class GhostClipper(OpacusClipper):
    """Opacus' ghost norms, then a second backward of the re-weighted loss."""

    def __init__(self, network: nn.Module, bound: Tensor, *, precision: str = "32") -> None:
        super().__init__(network, bound, precision=precision)
        self._hooked = GradSampleModuleFastGradientClipping(
            network, batch_first=False, loss_reduction="sum", strict=False
        )
        # Opacus' own norm of a layer without a rule is one over all runs.
        rules = {type(layer): rule_of(layer) for _, layer in self._layers}
        self._hooked.NORM_SAMPLERS = {
            kind: partial(_norm_sampler, rule) for kind, rule in rules.items()
        }
        self._hooked.disable_hooks()

    def accumulate(self, losses: LossOf, counts: Records) -> Records:
        nothing = torch.zeros_like(counts.mT)
        for parameter in self.network.parameters():  # a layer that is not used has no share
            parameter._norm_sample = nothing  # type: ignore[attr-defined]
        self._hooked.enable_hooks()
        with self._taps(counts) as taps:
            loss = losses()
        loss.sum().backward(retain_graph=True)
        self._hooked.disable_hooks()
        self.network.zero_grad()
        squared = self._hooked.get_norm_sample().square().mT
        factor = self.factors(loss, squared, counts)
        if not bool(squared.isfinite().all()):  # a second backward would spread 0 · inf = NaN
            self.reduce(taps.pairs(loss, self.precision), factor, broken=True)
            return loss.detach()
        kept = torch.where(factor > 0, loss * factor, 0.0)
        kept.sum().backward()
        for parameter in self.network.parameters():
            _add(
                parameter, torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            )
            parameter.grad = None
        return loss.detach()


def _opacus_view(inputs: Sequence[Tensor], backprops: Tensor) -> tuple[list[Tensor], Tensor]:
    """Opacus hands over (batch, runs, …); give back (runs, batch, …)."""
    return [t.transpose(0, 1) for t in inputs], backprops.transpose(0, 1)


def _grad_sampler(
    rule: Rule, layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> Samples:
    samples = rule.samples(layer, *_opacus_view(activations, backprops))
    return {parameter: sample.transpose(0, 1) for parameter, sample in samples.items()}


def _norm_sampler(
    rule: Rule, layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> Samples:
    """Opacus adds up the squares over parameters, so all of a layer is booked on its first."""
    seen = rule.gather(layer, [_opacus_view(activations, backprops)], FULL)
    norms = rule.squared_norms(seen, FULL).sqrt().mT
    first, *others = layer.parameters()
    return {first: norms, **dict.fromkeys(others, torch.zeros_like(norms))}


# The extension point behind opacus.grad_sample.register_grad_sampler / register_norm_sampler.
for _kind, _rule in RULES.items():
    GradSampleModule.GRAD_SAMPLERS[_kind] = partial(_grad_sampler, _rule)
    GradSampleModuleFastGradientClipping.NORM_SAMPLERS[_kind] = partial(_norm_sampler, _rule)

ENGINES: dict[str, type[Clipper]] = {
    "taps": TapClipper,
    "opacus_hooks": HooksClipper,
    "opacus_ghost": GhostClipper,
}
