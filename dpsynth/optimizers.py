"""Optimizers of a fleet: one learning rate a run, nothing in a step that looks at a value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from dpsynth.shapes import expand

__all__ = ["FALL", "FleetAdam", "FleetSgd", "RunwiseOptimizer"]

# Last part of a training, in which learning rates fall linearly to 0.
FALL = 0.3


class RunwiseOptimizer(torch.optim.Optimizer, ABC):
    """Moves parameters with a leading `runs` axis, each run at a rate of its own, held in
    `param_groups[…]["lr"]` (runs,); a run at rate 0 keeps its weights. A schedule replaces that
    tensor by a multiple of `param_groups[…]["base_lr"]`.

    Attributes:
        static: Whether the step is being captured: then no decision may look at a value.
    """

    static = False

    @abstractmethod
    def prepare(self) -> None:
        """Make the state that a first step would make."""


class FleetSgd(RunwiseOptimizer):
    """Plain gradient descent: w - lr · gradient, without momentum or state.

    Args:
        params: Parameters (runs, ...).
        lr: Learning rates (runs,), not negative.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: Tensor) -> None:
        super().__init__(params, {"lr": lr, "base_lr": lr})

    def prepare(self) -> None:
        """There is none."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; `closure` is not evaluated."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * expand(group["lr"], parameter))


class FleetAdam(RunwiseOptimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1) over parameters with a leading `runs` axis.

    torch's own takes one learning rate for a whole parameter. Weight decay is decoupled
    (Loshchilov & Hutter 2019), so 0 gives plain Adam.

    Args:
        params: Parameters (runs, ...).
        lr: Learning rates (runs,), not negative.
        betas: Decay of the first and the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Share of a weight that a step of rate 1 would take off.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: Tensor,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {
            "lr": lr,
            "base_lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient; `closure` is not evaluated."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            if self.static or held[0].is_cuda:
                for parameter in held:
                    self._move(parameter, group)
            else:
                self._move_at_once(held, group)

    def prepare(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state(parameter)

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        return state

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        """In tensor operations that look at no value."""
        state, gradient = self._state(parameter), parameter.grad
        assert gradient is not None
        first, second = group["betas"]
        state["step"] += 1
        # Powers in float64: 1 - 0.999 in float32 has lost five of its digits.
        taken = state["step"].double()
        rate = (group["lr"].double() / (1 - first**taken)).to(parameter.dtype)
        scale = (1 - second**taken).rsqrt().to(parameter.dtype)
        state["exp_avg"].lerp_(gradient, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        change = state["exp_avg"] / (state["exp_avg_sq"].sqrt() * scale + group["eps"])
        if group["weight_decay"]:
            parameter.mul_(1 - expand(group["lr"] * group["weight_decay"], parameter))
        parameter.sub_(change * expand(rate, parameter))

    def _move_at_once(self, held: list[nn.Parameter], group: dict[str, Any]) -> None:
        """By torch's fused kernel, one pass over everything; for each run where rates differ."""
        states = [self._state(parameter) for parameter in held]
        tensors: list[list[Tensor]] = [
            [parameter.detach() for parameter in held],
            [parameter.grad for parameter in held if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
        ]
        rates = group["lr"].tolist()
        if len(set(rates)) == 1:
            self._fused(tensors, [state["step"] for state in states], rates[0], group)
            return
        taken = [state["step"].clone() for state in states]
        for run, rate in enumerate(rates):
            steps = [step.clone() for step in taken]
            self._fused([[t[run] for t in part] for part in tensors], steps, rate, group)
        for state in states:
            state["step"] += 1

    def _fused(
        self,
        tensors: Sequence[list[Tensor]],
        steps: list[Tensor],
        rate: float,
        group: dict[str, Any],
    ) -> None:
        first, second = group["betas"]
        weights, gradients, means, squares = tensors
        adam(
            weights,
            gradients,
            means,
            squares,
            max_exp_avg_sqs=[],
            state_steps=steps,
            fused=True,
            amsgrad=False,
            beta1=first,
            beta2=second,
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            decoupled_weight_decay=True,
        )
