"""Adam for a fleet: one learning rate a run, nothing in a step that looks at a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FleetAdam"]

# Elements that are worked on at a time on a CPU: all of their tensors stay in its cache.
_PIECE = 1 << 15


class FleetAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015, Algorithm 1) over parameters with a leading `runs` axis.

    torch's own takes one learning rate for a whole parameter. Here each run has its own, held in
    `param_groups[…]["lr"]`; a run at rate 0 keeps its weights. A schedule replaces that tensor by
    a multiple of `param_groups[…]["base_lr"]`. Weight decay is decoupled
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        first, second = group["betas"]
        state["step"] += 1
        # Powers in float64: 1 - 0.999 in float32 has lost five of its digits.
        taken = state["step"].double()
        rate = group["lr"].double() / (1 - first**taken)
        scale = (1 - second**taken).rsqrt()
        kept = 1 - group["lr"] * group["weight_decay"] if group["weight_decay"] else None
        assert parameter.grad is not None
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        flat = [t.flatten(1) for t in tensors]
        runs, width = flat[0].shape
        if not parameter.is_cuda:
            width = max(_PIECE // runs, _PIECE // 8)
        rate, scale = rate.to(parameter.dtype)[:, None], scale.to(parameter.dtype)
        for weight, gradient, mean, square in zip(*(t.split(width, 1) for t in flat), strict=True):
            mean.lerp_(gradient, 1 - first)
            square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            change = square.sqrt().mul_(scale).add_(group["eps"])
            torch.div(mean, change, out=change)
            if kept is not None:
                weight.mul_(kept[:, None])
            weight.addcmul_(change, rate, value=-1)
