"""Additive: the target given all other columns, from the noisy tables alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpsynth.worth import contingency

__all__ = ["additive_logits"]

# Variance of a level's contribution, in squared logits, before the tables are seen: the most, and
# the least part of that; and of the leading column's, whose table is where scores start.
_PRIOR, _LEAST, _LEAD = 8.0, 1e-3, 0.25
_SWEEPS, _DAMPING = 15, 0.8
# How far, as a part of it, a count of a model's rows may be off that would be right of real ones.
_OFF = 0.1


def additive_logits(
    codes: Sequence[Int[Tensor, " rows"]],
    tables: Sequence[Float[Tensor, "groups levels"]],
    prior_logits: Float[Tensor, " groups"],
    noise: float,
    *,
    start: Float[Tensor, "rows groups"] | None = None,
    led: Sequence[int] = (),
) -> Float[Tensor, "rows groups"]:
    """Scores of each target level for synthetic rows: an intercept and one contribution a level.

    Label × column tables are the sufficient statistics of that model, so nothing is learned from
    rows. Its fit is the maximum a posteriori: on these rows, each level of a column should have
    the target's shares that its table gives it, as far as the table's noise lets that be known.
    Contributions are N(0, 8). Where the target has three levels and more, which bring more noise,
    they are N(0, 8φ²) with the column's mean square contingency φ², at most 1, of which what noise
    alone would show is taken off: a column that tells nothing then adds nothing. Diagonal Newton
    steps, column by column.

    Where a column or two all but decide the target, their table is nearly all there is to know, and
    contributions of moderate size cannot say it: scores then start there, and φ² of the others is
    what theirs show beyond these scores. What goes together with such columns does so less in a
    model's rows than in real ones, so that counts need be met to a tenth only.

    Args:
        codes: Levels of each column but the target, of which there is at least one.
        tables: Shares of all rows by target level and level, one table a column.
        prior_logits: Log of the target's shares; a level at -1e4 stays impossible.
        noise: Standard deviation of the noise in a cell, as a share of all rows.
        start: Scores to start at, by default the target's shares.
        led: Positions of the columns that these are of.

    Returns:
        Unnormalised logits.
    """
    groups, prior = len(prior_logits), prior_logits.softmax(-1)
    logits = prior_logits.expand(len(codes[0]), groups).clone()
    parts = [_Column(code, table, prior, noise) for code, table in zip(codes, tables, strict=True)]
    if start is not None:
        logits = torch.where(prior > 0, start.to(logits), prior_logits)
        share = logits.softmax(-1)
        for place, part in enumerate(parts):
            part.variance = part.variance + (_OFF * part.wanted).square()
            part.prior = _LEAD if place in led else _held_back(part.beyond(share))
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
        known = table.T * rows + prior
        self.wanted = self.count * known / (mass + 1)
        # A count is rounded by drawing, if by nothing else.
        self.variance = (noise * rows * self.count / (mass + 1)).square() + 1
        self.held = table.new_zeros(levels, groups)
        expected = prior[:, None] * table.sum(0)
        self.contingency = contingency(table, expected, noise)
        self.prior = _held_back(self.contingency) if groups > 2 else _PRIOR
        # Two scores that move together by half of Newton's step each.
        self.together = groups / max(groups - 1, 1)

    def _sum(self, values: Tensor) -> Tensor:
        return torch.zeros_like(self.held).index_add_(0, self.code, values)

    def beyond(self, share: Tensor) -> float:
        """Contingency that is left where rows have these shares."""
        rows, noise = len(self.code), self.variance.sqrt()
        return contingency(self.wanted / rows, self._sum(share) / rows, noise / rows)

    def step(self, share: Tensor) -> Tensor:
        """Change of the contributions (levels, groups) where rows have these shares."""
        slope = self._sum(share * (1 - share)) * self.together
        pull = slope / self.variance * (self.wanted - self._sum(share)) - self.held / self.prior
        change = pull / (slope.square() / self.variance + 1 / self.prior)
        change = _DAMPING * change.clamp(-1, 1)
        self.held += change
        return change


def _held_back(contingency: float) -> float:
    """Variance of a column's contributions."""
    return _PRIOR * min(max(contingency, _LEAST), 1.0)
