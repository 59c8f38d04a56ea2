"""Additive: the target given all other columns, from the noisy tables alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["additive_logits"]

# Variance of a level's contribution, in squared logits, before the tables are seen.
_PRIOR = 8.0
_SWEEPS, _DAMPING = 15, 0.8


def additive_logits(
    codes: Sequence[Int[Tensor, " rows"]],
    tables: Sequence[Float[Tensor, "groups levels"]],
    prior_logits: Float[Tensor, " groups"],
    noise: float,
) -> Float[Tensor, "rows groups"]:
    """Scores of each target level for synthetic rows: an intercept and one contribution a level.

    Label × column tables are the sufficient statistics of that model, so nothing is learned from
    rows. Its fit is the maximum a posteriori: on these rows, each level of a column should have
    the target's shares that its table gives it, as far as the table's noise lets that be known;
    contributions are N(0, 8). Diagonal Newton steps, column by column.

    Args:
        codes: Levels of each column but the target, of which there is at least one.
        tables: Shares of all rows by target level and level, one table a column.
        prior_logits: Log of the target's shares; a level at -1e4 stays impossible.
        noise: Standard deviation of the noise in a cell, as a share of all rows.

    Returns:
        Unnormalised logits.
    """
    groups, prior = len(prior_logits), prior_logits.softmax(-1)
    logits = prior_logits.expand(len(codes[0]), groups).clone()
    parts = [_Column(code, table, prior, noise) for code, table in zip(codes, tables, strict=True)]
    for _ in range(_SWEEPS):
        for part in parts:
            logits += part.step(logits.softmax(-1))[part.code]
        share = logits.softmax(-1).mean(0)
        logits += torch.where(prior > 0, (prior / share.clamp_min(1e-12)).log(), 0.0)
    return logits


class _Column:
    """What one column contributes, and what its table asks for on these rows."""

    def __init__(self, code: Tensor, table: Tensor, prior: Tensor, noise: float) -> None:
        groups, levels = table.shape
        self.code, rows = code, len(code)
        self.count = torch.bincount(code, minlength=levels).to(table)[:, None]
        mass = table.sum(0)[:, None] * rows
        # A level that the tables know nothing of has the shares of the whole.
        self.wanted = self.count * (table.T * rows + prior) / (mass + 1)
        # A count is rounded by drawing, if by nothing else.
        self.variance = (noise * rows * self.count / (mass + 1)).square() + 1
        self.held = table.new_zeros(levels, groups)
        # Two scores that move together by half of Newton's step each.
        self.together = groups / max(groups - 1, 1)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.held).index_add_(0, self.code, values)

    def step(self, share: Tensor) -> Tensor:
        """Change of the contributions (levels, groups) where rows have these shares."""
        slope = self._sum(share * (1 - share)) * self.together
        pull = slope / self.variance * (self.wanted - self._sum(share)) - self.held / _PRIOR
        change = pull / (slope.square() / self.variance + 1 / _PRIOR)
        change = _DAMPING * change.clamp(-1, 1)
        self.held += change
        return change
