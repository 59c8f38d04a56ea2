"""Noisy label × column tables: what baselines sample from and networks start from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.simplex import onto_simplex

__all__ = ["Marginals", "NoisyTable"]


@dataclass(frozen=True, eq=False)
class NoisyTable:
    """Counts of rows by the levels of some columns, as they were published.

    Attributes:
        columns: Positions, in the order of the axes; the target is the first of several.
        counts: One entry a cell, negative ones too.
        sigma: Standard deviation of the noise in each.
    """

    columns: tuple[int, ...]
    counts: np.ndarray
    sigma: float


@dataclass(frozen=True, eq=False)
class Marginals:
    """Distributions of every column given the target, as measured once with noise.

    Attributes:
        prior: Share of each target level (groups,); a single 1 without a target.
        given: For each target level, one distribution a column, side by side (groups, W); the
            target's own block is `prior` in every row.
        values: Where each level lies in its column's order, NaN where it has no place (W,).
        noise: Standard deviation of the noise in a cell of a table, as a share of all rows.
        rows: Noisy number of rows.
        tables: What `prior` and `given` were made of.
    """

    prior: Tensor
    given: Tensor
    values: Tensor
    noise: float
    rows: float = 1.0
    tables: tuple[NoisyTable, ...] = ()

    @staticmethod
    def asked(layout: Layout) -> int:
        """Number of tables measured, the `parts` of the measurer."""
        return layout.columns if layout.target is None else max(1, layout.columns - 1)

    @classmethod
    def measure(
        cls,
        codes: Tensor | Sequence[Tensor],
        layout: Layout,
        used: Tensor,
        measurer: Measurer,
        names: Sequence[str],
        values: Tensor | None = None,
    ) -> Marginals:
        """Count, add noise, and project to distributions (post-processing).

        Args:
            codes: Private encoded rows (rows, columns), or pieces of them.
            layout: Public shape.
            used: Levels that can occur (W,); the others get no mass.
            measurer: Pays for each table (its `parts` are `asked(layout)`).
            names: Columns, for the ledger.
            values: Where each level lies in its column's order (W,); by default nowhere.
        """
        pieces = [codes] if isinstance(codes, Tensor) else codes
        values = torch.full((layout.width,), math.nan) if values is None else values
        counts: dict[int, np.ndarray] = {}
        sigma = 0.0
        for j, levels in enumerate(layout.levels):
            if j == layout.target and layout.columns > 1:
                continue
            noise = measurer.histograms(f"marginal:{names[j]}", 1)
            exact = np.sum([_joint(piece, layout, j) for piece in pieces], axis=0)
            counts[j], sigma = noise(exact).reshape(layout.groups, levels), noise.sigma
        total, prior, given = cls._consistent(counts, layout, used.numpy())
        tables = tuple(_published(layout, j, table, sigma) for j, table in counts.items())
        return cls(prior, given, values, sigma / total, total, tables)

    @classmethod
    def _consistent(
        cls, counts: dict[int, np.ndarray], layout: Layout, used: np.ndarray
    ) -> tuple[float, Tensor, Tensor]:
        """Agree on the target's totals (their mean over tables), then fit every row to them;
        (rows, prior, given)."""
        masks = np.split(used, np.cumsum(layout.levels)[:-1])
        totals = np.mean([c[:, masks[j]].sum(1) for j, c in counts.items()], axis=0)
        if layout.columns == 1 and layout.target is not None:
            totals = np.diag(counts[0])
        occurs = np.ones(1, dtype=bool) if layout.target is None else masks[layout.target]
        prior = np.zeros(layout.groups)
        whole = max(float(totals[occurs].sum()), 1.0)
        prior[occurs] = onto_simplex(totals[occurs], whole) / whole
        blocks = []
        for j, levels in enumerate(layout.levels):
            block = np.zeros((layout.groups, levels))
            if j == layout.target:
                block[:] = prior
            else:
                rows = np.maximum(totals, 1.0)
                block[:, masks[j]] = onto_simplex(counts[j][:, masks[j]], rows) / rows[:, None]
            blocks.append(block)
        return whole, torch.from_numpy(prior), torch.from_numpy(np.concatenate(blocks, axis=1))

    def one_way(self) -> Tensor:
        """Distribution of each column alone, side by side (W,)."""
        return self.prior @ self.given

    def logits(self, layout: Layout, *, floor: float = 1e-6) -> Tensor:
        """Log of `given`, smoothed towards the column's own distribution where a group is thin
        (groups, W). `floor` keeps unseen levels finite."""
        mixed = 0.999 * self.given + 0.001 * self.one_way()
        return mixed.clamp_min(floor).log()


def _published(layout: Layout, column: int, counts: np.ndarray, sigma: float) -> NoisyTable:
    """A table by its columns; without a target, or of the target alone, it has one axis."""
    if layout.target is None or column == layout.target:
        whole = counts.sum(0) if layout.target is None else np.diag(counts)
        return NoisyTable((column,), whole, sigma)
    return NoisyTable((layout.target, column), counts, sigma)


def _joint(codes: Tensor, layout: Layout, column: int) -> np.ndarray:
    """How many rows have each target level and each level of a column, flat."""
    levels = layout.levels[column]
    cell = layout.group_of(codes).long() * levels + codes[:, column].long()
    return np.bincount(cell.numpy(), minlength=layout.groups * levels).astype(float)
