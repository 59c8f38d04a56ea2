"""Masked (absorbing) discrete diffusion over columns (Austin et al. 2021; any-order likelihood,
Hoogeboom et al. 2022), given the target.

Chosen over mixed Gaussian–multinomial diffusion because under DP-SGD a likelihood over discrete
bins needs no noise schedule to tune, starts exactly at measured marginals, gives every record a
bounded cross-entropy, and draws many masks a record inside one clipped contribution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpsynth.checks import check_count
from dpsynth.codec import Layout
from dpsynth.models.base import Generator
from dpsynth.models.reconcile import corrected
from dpsynth.networks import Mlp, column_log_likelihood, draw_level
from dpsynth.randomness import FleetRng

__all__ = ["RATES", "Diffusion"]

# Shares of columns that an attacker hides: the "timesteps" of this diffusion.
RATES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Diffusion(Generator):
    """Predicts hidden columns from the visible ones; sampling unveils one column at a time in a
    random order, the target first.

    The target is never hidden: it is drawn from its noisy shares, and every other column starts
    from its noisy table given the target. A hidden target would have to be learned from clipped
    gradients, which pull rare levels under.

    Args:
        hidden: Widths of the hidden layers.
        draws: Masks a record, averaged inside its one clipped contribution.
    """

    family = "diffusion"
    suits = (
        "Where rows are completed from any set of known columns, or have too many levels for "
        "weights between all pairs of them. Slower than autoregressive, and a little behind it."
    )
    clip = 4.0

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        hidden: Sequence[int] = (128, 128),
        draws: int = 4,
        lr: float | Sequence[float] = 2e-3,
        **common: Any,
    ) -> None:
        super().__init__(layout, runs, lr=lr, **common)
        check_count("draws", draws)
        self.draws = draws
        # Every column has one more input level: hidden.
        self.inputs = Layout(tuple(levels + 1 for levels in layout.levels), layout.target)
        self.network = Mlp(runs, [self.inputs.width, *hidden, layout.width])

    def reset(self, rng: FleetRng) -> None:
        assert isinstance(self.network, Mlp)
        self.network.reset(rng, "denoiser", fan=self.layout.columns)

    def conditions(self) -> frozenset[int]:
        if self.layout.target is None and not self.components:
            return frozenset(range(self.layout.columns))
        return super().conditions()

    def logits(self, codes: Tensor, hidden: Tensor, component: Tensor) -> Tensor:
        """Scores of every level (..., W) from codes and a mask of hidden columns, both (..., D),
        and components (...)."""
        blank = torch.tensor(self.layout.levels, device=codes.device)
        shown = self.inputs.one_hot(torch.where(hidden, blank, codes), self.prior_logits.dtype)
        start = self.offset(component.flatten(1)).unflatten(1, codes.shape[1:-1])
        return start + self.network(shown)

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """Mean cross-entropy over hidden columns, averaged over K masks whose rate is uniform."""
        shape = (codes.shape[1], self.draws)
        rate = rng.uniform(*shape)
        order = rng.uniform(*shape, self.layout.columns)
        if self.layout.target is not None:
            order[..., self.layout.target] = 2.0
        # At least one column is hidden: the one with the smallest draw.
        hidden = (order < rate[..., None]) | (order == order.amin(-1, keepdim=True))
        many = codes[:, :, None].expand(*hidden.shape)
        component = self.component_of(codes, rng)[..., None].expand(*hidden.shape[:-1])
        logits = self.logits(many, hidden, component)
        fit = column_log_likelihood(logits, many, self.layout.levels)
        return -((fit * hidden).sum(-1) / hidden.sum(-1)).mean(-1)

    @property
    def signal_names(self) -> tuple[str, ...]:
        return ("mean", *(f"rate {rate:g}" for rate in RATES))

    def signal_losses(self, codes: Tensor, rng: FleetRng, draws: int) -> Tensor:
        """The loss at each of `RATES`, averaged over the same masks for all records, and their
        mean first (runs, batch, 1 + rates)."""
        rates = self._mask_losses(codes, self.masks(rng, draws)).mean(-1)
        return torch.cat([rates.mean(-1, keepdim=True), rates], dim=-1)

    def mask_losses(
        self, codes: Tensor, rng: FleetRng, *, draws: int = 16, piece: int = 512
    ) -> Tensor:
        """As `signals`, unaveraged: (runs, rows, rates, draws)."""
        check_count("draws", draws)
        return self.by_pieces(
            codes,
            rng,
            piece,
            lambda part, opened: self._mask_losses(part, self.masks(opened, draws)),
        )

    def masks(self, rng: FleetRng, draws: int) -> Tensor:
        """Which columns are hidden at each rate, by masks that hide each of them as often as any
        other wherever `draws` is a multiple of their number (rates, draws, D); never the target."""
        free = [j for j in range(self.layout.columns) if j != self.layout.target] or [0]
        number = torch.arange(draws)
        turns = rng.uniform(-(-draws // len(free)), len(free))[0].cpu().argsort(-1)
        place = (turns[number // len(free)] + number[:, None]) % len(free)
        counts = (torch.tensor(RATES) * len(free)).round().clamp_min(1)
        hidden = torch.zeros(len(RATES), draws, self.layout.columns, dtype=torch.bool)
        hidden[..., free] = place < counts[:, None, None]
        return hidden.to(self.prior_logits.device)

    def _mask_losses(self, codes: Tensor, masks: Tensor) -> Tensor:
        """Mean cross-entropy over the hidden columns (runs, batch, rates, draws)."""
        losses, component = [], self.component_of(codes, None)
        for hidden in masks.flatten(0, 1):
            logits = self.logits(codes, hidden.expand(codes.shape), component)
            fit = column_log_likelihood(logits, codes, self.layout.levels)
            losses.append(-(fit * hidden).sum(-1) / hidden.sum())
        return torch.stack(losses, dim=-1).unflatten(-1, masks.shape[:2])

    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        """All rows of a run unveil their columns in one random order, whatever is fixed first."""
        codes = torch.zeros_like(draws, dtype=torch.long)
        hidden = torch.ones_like(codes, dtype=torch.bool)
        rank = rng.uniform(self.layout.columns)
        if self.layout.target is not None:
            codes[..., self.layout.target] = group
            given = {**given, self.layout.target: -1}  # known now, and different from row to row
        for column, level in given.items():
            hidden[..., column], rank[..., column] = False, -1.0
            if level >= 0:
                codes[..., column] = level
        order = rank.argsort(-1)
        levels = list(self.layout.levels)
        for place in range(len(given), self.layout.columns):
            logits = self.logits(codes, hidden, component)
            start = self.offset(component)
            for run, column in enumerate(order[:, place].tolist()):
                block = logits[run].split(levels, -1)[column]
                if self.reconcile:
                    tables = start[run].split(levels, -1)[column]
                    block = corrected(block, tables, group[run])
                codes[run, :, column] = draw_level(block, draws[run, :, column])
                hidden[run, :, column] = False
        return codes
