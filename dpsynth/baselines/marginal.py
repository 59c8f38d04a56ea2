"""Independent columns and DP naive Bayes: generators that are measured, not trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dpsynth.models.base import Generator
from dpsynth.networks import column_log_likelihood, sample_columns
from dpsynth.randomness import FleetRng

__all__ = ["Independent", "NaiveBayes"]


class _Measured(Generator):
    """Samples columns from the noisy tables alone."""

    trained = False

    def __init__(self, *args, **common) -> None:
        super().__init__(*args, **common)
        self.network = nn.Module()

    def reset(self, rng: FleetRng) -> None:
        """Nothing to draw: there are no weights."""

    @abstractmethod
    def tables(self, group: Tensor) -> Tensor:
        """Logits (runs, rows, W) of rows with target levels `group` (runs, rows)."""

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−log-likelihood of a record under the tables."""
        logits = self.tables(self.layout.group_of(codes))
        return -column_log_likelihood(logits, codes, self.layout.levels).sum(-1)

    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        parts = []
        for number, size in enumerate(self.chunks(rows)):
            draws = rng.at("sample", number)
            group = self.draw_groups(size, draws, given)
            codes = sample_columns(self.tables(group), self.layout.levels, draws)
            parts.append(self.with_target(codes, group))
        return torch.cat(parts, dim=1)


class NaiveBayes(_Measured):
    """Every column depends on the target alone."""

    family = "naive_bayes"

    def tables(self, group: Tensor) -> Tensor:
        return self.offset(group)


class Independent(_Measured):
    """Every column for itself; the floor that any model must be above."""

    family = "independent"

    def tables(self, group: Tensor) -> Tensor:
        alone = (self.prior_logits.softmax(-1)[:, None] @ self.given_logits.exp()).squeeze(1)
        rows = alone.clamp_min(1e-30).log()[:, None]
        return rows.expand(-1, group.shape[1], -1)
