"""Layers of a type without a rule: their records' gradients one by one, by `torch.func`.

It is what Opacus does for such layers (`opacus.grad_sample.functorch`), with several inputs and
with buffers, which Opacus does not carry. Whether a layer keeps records apart is tried on the first
record that it sees, which finds whatever every record feels of the others, not what a few do.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from dpsynth.checks import UsageError
from dpsynth.privacy.layers import RULES, Formed, Rule, Samples

__all__ = [
    "Whole",
    "check_alone",
    "check_use",
    "describe",
    "rule_of",
    "trained_layers",
    "warn_of_cost",
]


class _Forward(nn.Module):
    """A layer without its hooks: taps see it before they do, and `torch.func` takes none."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.layer.forward(*inputs)


class Whole(Formed):
    """A layer with all that is below it, as one function of its inputs, a record at a time."""

    def samples(self, layer: nn.Module, inputs: Sequence[Tensor], gradient: Tensor) -> Samples:
        held = _Forward(layer)
        parameters, buffers = dict(held.named_parameters()), dict(held.named_buffers())

        def pull(weights: dict[str, Tensor], given: tuple[Tensor, ...], back: Tensor) -> Tensor:
            alone = tuple(t.unsqueeze(1) for t in given)
            out = functional_call(held, (weights, buffers), alone)
            return (out * back.unsqueeze(1)).sum()

        each = vmap(grad(pull), in_dims=(None, 1, 1), out_dims=1)
        weights = {name: p.detach() for name, p in parameters.items()}
        kind = next(iter(weights.values())).dtype  # autocast hands over shorter types
        given = tuple(t.to(kind) if t.is_floating_point() else t for t in inputs)
        try:
            found = each(weights, given, gradient.to(kind))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(
                f"layer of type {type(layer).__name__}: torch.func finds no gradient of one record "
                f"({reason}); write it with FleetLinear and its like"
            ) from error
        return {parameters[name]: samples for name, samples in found.items()}


_WHOLE = Whole()


def rule_of(layer: nn.Module) -> Rule:
    """Of exactly its type, since a subclass may compute anything."""
    return RULES.get(type(layer), _WHOLE)


def describe(name: str, layer: nn.Module) -> str:
    """How a layer is called in messages."""
    return f"layer {name!r} ({type(layer).__name__})"


def trained_layers(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Layers with parameters of their own, by name.

    One without a rule stands for all that is below it, as in Opacus.
    """
    seen: set[nn.Module] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        if list(module.parameters(recurse=False)):
            yield name, module
            if type(module) not in RULES:
                return
        for child, below in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, below)

    return list(walk("", network))


def warn_of_cost(what: str, layer: nn.Module) -> None:
    """One line on what it takes to clip a layer without a rule."""
    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    warnings.warn(
        f"{what}: no closed form of its norms is known, so every record's gradient is formed: "
        f"{held} bytes a record, a batch of B records B times its parameters",
        stacklevel=2,
    )


def check_use(
    what: str, args: Sequence[Any], settings: Any, out: Any, *, records: torch.Size, several: bool
) -> None:
    """Refuse a use of a layer that cannot be repeated one record at a time.

    Args:
        what: The layer, in words.
        args: What it was called with.
        settings: What it was called with by name.
        out: What it returned.
        records: (runs, batch).
        several: Whether more inputs than one can be carried.

    Raises:
        UsageError: On anything but tensors that start (runs, batch).
    """
    if settings or not args or not all(isinstance(a, Tensor) for a in args):
        raise UsageError(f"{what}: its inputs must be tensors, none of them given by name")
    if not isinstance(out, Tensor):
        raise UsageError(f"{what}: must return a tensor, not a {type(out).__name__}")
    if len(args) > 1 and not several:
        raise UsageError(f"{what}: Opacus takes layers of one input; use engine=taps")
    for tensor in (*args, out):
        if tensor.shape[:2] != records:
            raise UsageError(
                f"{what}: takes or gives a tensor of shape {tuple(tensor.shape)}; it must start "
                f"with {tuple(records)}, the runs and the batch"
            )


@torch.no_grad()
def check_alone(what: str, layer: nn.Module, inputs: Sequence[Tensor], out: Tensor) -> None:
    """Refuse a layer that gives the first record something else than it gives it alone.

    Args:
        what: The layer, in words.
        layer: It.
        inputs: What it was called with, two records or more.
        out: What it returned.

    Raises:
        UsageError: When more than rounding lies between the two.
    """
    alone, among = layer.forward(*(t[:, :1] for t in inputs)), out[:, :1]
    # Rounding as of half precision, since one record may be computed by another kernel.
    size = torch.where(among.isfinite(), among, 0.0).abs().max()
    if ((alone - among).abs() > 1e-2 * size).any():
        raise UsageError(
            f"{what}: gives a record something else alone than in a batch, so it mixes records or "
            "draws numbers of its own; keep records apart and take draws as an input"
        )
