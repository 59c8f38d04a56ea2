"""Independent columns, DP naive Bayes and DP mixture of products: measured, not trained."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from dpsynth.models.base import COMPONENTS, Generator
from dpsynth.networks import column_log_likelihood, columns_at
from dpsynth.randomness import FleetRng

__all__ = ["Independent", "MixtureOfProducts", "NaiveBayes"]


class _Measured(Generator):
    """Samples columns from the noisy tables alone."""

    trained = False

    def __init__(self, *args, components: int = 0, reconcile: bool = False, **common) -> None:
        super().__init__(*args, components=components, reconcile=reconcile, **common)
        self.network = nn.Module()

    def reset(self, rng: FleetRng) -> None:
        """Nothing to draw: there are no weights."""

    @abstractmethod
    def tables(self, component: Tensor) -> Tensor:
        """Logits (runs, rows, W) of rows of components, or target levels, (runs, rows)."""

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−log-likelihood of a record under the tables."""
        logits = self.tables(self.layout.group_of(codes))
        return -column_log_likelihood(logits, codes, self.layout.levels).sum(-1)

    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        return columns_at(self.tables(component), self.layout.levels, draws)


class NaiveBayes(_Measured):
    """Every column depends on the target alone."""

    family = "naive_bayes"
    suits = (
        "For comparison, or where there are so few rows that nothing but label × column tables "
        "rises above the noise."
    )

    def tables(self, component: Tensor) -> Tensor:
        return self.offset(component)

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−log p(x), over all components."""
        if not self.components:
            return super().record_loss(codes, rng)
        logits = self.weight_logits[:, None, :]
        for column in range(self.layout.columns):
            logits = logits + self.level_logits(column, codes[..., column])
        return -logits.logsumexp(-1)


class MixtureOfProducts(NaiveBayes):
    """Components that agree with the tables that were chosen; see `dpsynth.mixture`."""

    family = "mixture"
    suits = (
        "Where rows are few, or many runs are needed: as near as autoregressive to tables without "
        "structure of high order, and several times faster. Learns nothing but what tables show."
    )
    surveys = True

    def __init__(
        self, *args, components: int = COMPONENTS, reconcile: bool = True, **common
    ) -> None:
        super().__init__(*args, components=components, reconcile=reconcile, **common)


class Independent(_Measured):
    """Every column for itself; the floor that any model must be above."""

    family = "independent"
    suits = "As a floor: columns without any dependence."

    def tables(self, component: Tensor) -> Tensor:
        alone = (self.prior_logits.softmax(-1)[:, None] @ self.given_logits.exp()).squeeze(1)
        rows = alone.clamp_min(1e-30).log()[:, None]
        return rows.expand(-1, component.shape[1], -1)
