"""DP Gaussian copula: noisy one-way tables, tied by a matrix of correlations of hidden normals.

Each column's levels are cells of a standard normal: numbers in their order, categories by what they
say about the target. The correlation of two columns is that of the bivariate normal whose cells fit
their noisy table best (polychoric correlation: Pearson 1900; Olsson 1979).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import optimize, stats
from torch import Tensor

from dpsynth.baselines.marginal import Independent
from dpsynth.baselines.tree import (
    combined,
    one_way_counts,
    refuse_components,
    shares_by_size,
)
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.networks import draw_level
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng
from dpsynth.survey import Survey

__all__ = ["Copula", "Correlated", "nearest_correlation", "polychoric"]

# Correlations that are looked at, and terms of their series: .95^60 is .05, and the coefficients
# of cells fall off too.
_GRID = np.linspace(-0.95, 0.95, 39)
_TERMS = 60
# Least eigenvalue of a correlation matrix.
_LEAST = 1e-3
# Alternating projections.
_PROJECTIONS = 100


@dataclass(frozen=True, eq=False)
class Correlated:
    """A Gaussian copula over levels.

    Attributes:
        order: Level numbers of each column from the least hidden value to the greatest.
        shares: Distribution of each column, by level number.
        correlation: Of the hidden normals (D, D), positive definite.
    """

    order: tuple[np.ndarray, ...]
    shares: tuple[np.ndarray, ...]
    correlation: np.ndarray


class Copula(Independent):
    """Columns with their own tables and hidden normals that are correlated.

    Without a survey the correlations are 0, which leaves independent columns.
    """

    family = "copula"
    suits = "For comparison: dependence of two columns at a time, of one shape."
    surveys = True

    order: Tensor
    share_logits: Tensor
    factor: Tensor

    def __init__(self, layout: Layout, runs: int, **common: Any) -> None:
        refuse_components(self.family, common)
        super().__init__(layout, runs, **common)
        order = torch.cat([torch.arange(levels) for levels in layout.levels])
        self.register_buffer("order", order.repeat(runs, 1))
        self.register_buffer("share_logits", torch.zeros(runs, layout.width))
        self.register_buffer("factor", torch.eye(layout.columns).repeat(runs, 1, 1))

    @classmethod
    def survey(
        cls, survey: Survey, plan: PrivacyPlan, options: Mapping[str, Any], device: str
    ) -> Correlated:
        """Measure all pairs and fit a copula to them."""
        del plan, options, device
        return _fit(survey)

    def prepare(
        self,
        marginals: Sequence[Marginals],
        used: Sequence[Tensor],
        rng: FleetRng,
        surveyed: Sequence[Any] | None = None,
    ) -> None:
        """Take each run's copula; without one, columns are independent."""
        super().prepare(marginals, used, rng, surveyed)
        for run, found in enumerate(surveyed or [None] * self.runs):
            copula = found if isinstance(found, Correlated) else self._uncorrelated(run)
            self._take_copula(run, copula, used[run])

    def _uncorrelated(self, run: int) -> Correlated:
        """Every column by itself, levels as they are numbered."""
        zero = torch.zeros(self.runs, 1, dtype=torch.long, device=self.order.device)
        alone = self.tables(zero)[run, 0].double().cpu().softmax(-1)
        shares = [block / block.sum() for block in alone.split(list(self.layout.levels))]
        order = tuple(np.arange(levels) for levels in self.layout.levels)
        correlation = np.eye(self.layout.columns)
        return Correlated(order, tuple(share.numpy() for share in shares), correlation)

    def _take_copula(self, run: int, copula: Correlated, used: Tensor) -> None:
        """Columns keep their places; the target's normal is the first that is drawn."""
        shares = torch.from_numpy(np.concatenate(copula.shares))
        logits = shares.clamp_min(1e-6).log().where(used, -1e4)
        target = self.layout.target
        if target is not None:
            start = self.layout.offsets[target]
            logits[start : start + self.layout.groups] = self.prior_logits[run]
        blocks = [block.log_softmax(-1) for block in logits.split(list(self.layout.levels))]
        self.share_logits[run] = torch.cat(blocks)
        self.order[run] = torch.from_numpy(np.concatenate(copula.order))
        first = [] if target is None else [target]
        places = first + [j for j in range(self.layout.columns) if j not in first]
        factor = np.zeros_like(copula.correlation)
        factor[places] = np.linalg.cholesky(copula.correlation[np.ix_(places, places)])
        self.factor[run] = torch.from_numpy(factor)

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−log of the columns' own probabilities and of the copula's density in the middle of the
        row's cells; the row's own probability is an integral over them."""
        lower, mass = self._cells(codes)
        z = torch.special.ndtri((lower + mass / 2).clamp(1e-9, 1 - 1e-9))
        factor = self.factor.double()
        white = torch.linalg.solve(factor, z.mT).mT
        density = 0.5 * (z.square() - white.square()).sum(-1)
        density = density - torch.linalg.slogdet(factor).logabsdet[:, None]
        loss = -(mass.clamp_min(1e-30).log().sum(-1) + density)
        return loss.to(self.share_logits.dtype)

    def _cells(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Where the cell of each level begins in its column's order, and its mass
        (runs, rows, D)."""
        lower, mass = [], []
        run = torch.arange(self.runs, device=codes.device)[:, None]
        for column in range(self.layout.columns):
            shares, order = self._column(column)
            place = order.argsort(-1)[run, codes[..., column]]
            own = shares.gather(1, order)
            ends = own.cumsum(-1)
            lower.append((ends - own).gather(1, place))
            mass.append(own.gather(1, place))
        return torch.stack(lower, -1), torch.stack(mass, -1)

    def _column(self, column: int) -> tuple[Tensor, Tensor]:
        """Distribution of a column by level, and its order of levels (runs, levels) both."""
        start, levels = self.layout.offsets[column], self.layout.levels[column]
        block = slice(start, start + levels)
        return self.share_logits[:, block].double().softmax(-1), self.order[:, block]

    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        parts = []
        for number, size in enumerate(self.chunks(rows)):
            draws = rng.at("sample", number)
            _, group = self.draw_components(size, draws, given)
            codes = self._levels(self._normals(group, draws))
            parts.append(self.with_target(codes, group))
        return torch.cat(parts, dim=1)

    def _normals(self, group: Tensor, draws: FleetRng) -> Tensor:
        """Correlated normals of rows (runs, rows, D), the target's inside of its level's cell."""
        rows, target = group.shape[1], self.layout.target
        white = draws.normal(rows, self.layout.columns, dtype=torch.float64)
        if target is not None:
            codes = torch.zeros(*group.shape, self.layout.columns, dtype=torch.long)
            codes = self.with_target(codes.to(group.device), group)
            lower, mass = (part[..., target] for part in self._cells(codes))
            inside = lower + mass * draws.uniform(rows, dtype=torch.float64)
            white[..., 0] = torch.special.ndtri(inside.clamp(1e-9, 1 - 1e-9))
        return white @ self.factor.double().mT

    def _levels(self, normals: Tensor) -> Tensor:
        """The level whose cell each normal lies in."""
        columns = []
        for column in range(self.layout.columns):
            shares, order = self._column(column)
            logits = shares.gather(1, order).clamp_min(1e-300).log()[:, None]
            logits = logits.expand(-1, normals.shape[1], -1)
            place = draw_level(logits, torch.special.ndtr(normals[..., column]))
            columns.append(order.gather(1, place))
        return torch.stack(columns, -1)


def _fit(survey: Survey) -> Correlated:
    """Ask for all pairs; with one column there is nothing to ask."""
    layout, marginals = survey.layout, survey.marginals
    masks = [mask.numpy() for mask in survey.used.split(list(layout.levels))]
    first = [] if layout.target is None else [layout.target]
    columns = first + [j for j in range(layout.columns) if j not in first]
    pairs = list(itertools.combinations(columns, 2))
    tables = list(marginals.tables)
    if pairs:
        alone = one_way_counts(tables, layout, masks, marginals.rows)
        expected = [np.outer(alone[i], alone[j]) / marginals.rows for i, j in pairs]
        tables += survey.tables(pairs, shares_by_size(expected, survey, 1.0))
    counts = one_way_counts(tables, layout, masks, marginals.rows)
    shares = tuple(column / marginals.rows for column in counts)
    order = tuple(_order(column, marginals, layout) for column in range(layout.columns))
    correlation = np.eye(layout.columns)
    for i, j in pairs:
        table, sigma = combined(tables, (i, j))
        sorted_table = table[np.ix_(order[i], order[j])]
        found = polychoric(sorted_table, shares[i][order[i]], shares[j][order[j]], sigma)
        correlation[i, j] = correlation[j, i] = found
    return Correlated(order, shares, nearest_correlation(correlation))


def _order(column: int, marginals: Marginals, layout: Layout) -> np.ndarray:
    """Levels of a column in the order of their hidden values.

    Numbers lie in their own order, levels without a place after them. Categories lie by their
    weight in the strongest association with the target (for two target levels, by its odds), or
    without a target by size.
    """
    start, levels = layout.offsets[column], layout.levels[column]
    block = slice(start, start + levels)
    values = marginals.values[block].numpy()
    if np.isfinite(values).any():
        return np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")
    if column == layout.target:
        return np.arange(levels)
    share = marginals.one_way()[block].numpy()
    if layout.target is None:
        return np.argsort(-share, kind="stable")
    prior = marginals.prior.numpy()
    joint = marginals.given[:, block].numpy() * prior[:, None]
    even = np.outer(prior, share)
    gap = np.divide(joint - even, np.sqrt(even), out=np.zeros_like(even), where=even > 0)
    weight = np.linalg.svd(gap, full_matrices=False)[2][0]
    # A singular vector has no sign of its own.
    weight = weight * (np.sign(weight[np.abs(weight).argmax()]) or 1.0)
    score = np.divide(weight, np.sqrt(share), out=np.zeros_like(weight), where=share > 0)
    return np.argsort(score, kind="stable")


def polychoric(counts: np.ndarray, first: np.ndarray, second: np.ndarray, sigma: float) -> float:
    """Correlation of the bivariate normal whose cells lie nearest to a noisy table, each weighed by
    the variance of noise and of a Poisson count under independence.

    The probability of a cell is Σ_k ρ^k·a_k·b_k (Mehler's expansion), with a_k the integrals of the
    normalised Hermite polynomials over the intervals of a column.

    Args:
        counts: Noisy counts in the order of both columns (levels, levels).
        first: Distribution of the first column in its order (levels,).
        second: Of the second.
        sigma: Noise of a count.
    """
    left, right = _hermite(first), _hermite(second)
    rows = max(float(counts.sum()), 1.0)
    weight = 1 / (sigma**2 + rows * np.outer(first, second) + 1e-3)
    power = np.arange(_TERMS)

    def loss(rho: float) -> float:
        gap = counts - rows * (left * rho**power) @ right.T
        return float((weight * gap**2).sum())

    best = _GRID[int(np.argmin([loss(rho) for rho in _GRID]))]
    step = _GRID[1] - _GRID[0]
    bounds = (max(best - step, _GRID[0]), min(best + step, _GRID[-1]))
    return float(optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)


def _hermite(shares: np.ndarray) -> np.ndarray:
    """∫ h_k·φ over the interval of each level (levels, terms), h_k = He_k/√k!.

    Its antiderivative is −h_(k-1)·φ/√k, by the recurrence of Hermite polynomials.
    """
    ends = np.concatenate([[0.0], np.cumsum(shares) / shares.sum()]).clip(0, 1)
    cuts = stats.norm.ppf(ends)
    inner = np.where(np.isfinite(cuts), cuts, 0.0)
    density = np.where(np.isfinite(cuts), stats.norm.pdf(inner), 0.0)
    before, here = np.zeros_like(inner), density
    columns = [np.diff(ends)]
    for k in range(1, _TERMS):
        columns.append(-np.diff(here) / np.sqrt(k))
        before, here = here, (inner * here - np.sqrt(k - 1) * before) / np.sqrt(k)
    return np.stack(columns, axis=1)


def nearest_correlation(matrix: np.ndarray) -> np.ndarray:
    """The nearest correlation matrix (Frobenius norm) with no eigenvalue below 10⁻³: alternating
    projections with Dykstra's correction (Higham 2002)."""
    found, correction = matrix.copy(), np.zeros_like(matrix)
    kept = found
    for _ in range(_PROJECTIONS):
        raw = found - correction
        values, vectors = np.linalg.eigh(raw)
        kept = (vectors * values.clip(_LEAST)) @ vectors.T
        correction = kept - raw
        found = kept.copy()
        np.fill_diagonal(found, 1.0)
    # The diagonal was last: what is left to the least eigenvalue is scaled in.
    scale = np.sqrt(np.diag(kept))
    return kept / np.outer(scale, scale)
