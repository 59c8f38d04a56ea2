"""DP Bayesian network of degree 1: a spanning tree of pairs, each column drawn given its parent.

The pairs that lie furthest from independence make a spanning tree (Chow & Liu 1968, with noisy
distances in place of mutual information, whose order they share on tables of one shape). Its tables
are measured, made consistent with one another, and read as conditional distributions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from dpsynth.baselines.marginal import NaiveBayes
from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng
from dpsynth.simplex import onto_simplex
from dpsynth.survey import Survey

__all__ = [
    "Branches",
    "Tree",
    "combined",
    "consistent",
    "one_way_counts",
    "refuse_components",
    "shares_by_size",
]

# Part of the purse that finds the tree.
_SCORES = 0.1
# E|N(0, σ²)| / σ.
_MEAN = math.sqrt(2 / math.pi)
# Noise below which a table counts as no more exact.
_EXACT = 1e-3
# Rounds of proportional fitting.
_RAKES = 25


@dataclass(frozen=True, eq=False)
class Branches:
    """A tree of columns and what each is given its parent.

    Attributes:
        parents: Parent of each column; the root is its own.
        given: Distributions of each column (levels of the parent, levels); of the root (1, levels).
    """

    parents: tuple[int, ...]
    given: tuple[np.ndarray, ...]


class Tree(NaiveBayes):
    """Every column depends on one other; the target, if there is one, on none.

    Without a survey the parent of every column is the target, which is a DP naive Bayes.
    """

    family = "tree"
    suits = (
        "For comparison, or where distances of two columns matter and the target does not: what it "
        "says of the target is weak."
    )
    surveys = True

    parent: Tensor
    branch_logits: Tensor

    def __init__(self, layout: Layout, runs: int, **common: Any) -> None:
        refuse_components(self.family, common)
        super().__init__(layout, runs, **common)
        alone = torch.arange(layout.columns).repeat(runs, 1)
        self.register_buffer("parent", alone)
        # Log-probability of each level (W) given each level of its column's parent.
        size = (runs, layout.width, max(layout.levels))
        self.register_buffer("branch_logits", torch.zeros(size))

    @classmethod
    def survey(
        cls, survey: Survey, plan: PrivacyPlan, options: Mapping[str, Any], device: str
    ) -> Branches | None:
        """A tenth of the budget finds the tree, the rest measures its pairs."""
        del plan, options, device
        return _grow(survey)

    def prepare(
        self,
        marginals: Sequence[Marginals],
        used: Sequence[Tensor],
        rng: FleetRng,
        surveyed: Sequence[Any] | None = None,
    ) -> None:
        """Take each run's tree; without one, the star around the target."""
        super().prepare(marginals, used, rng, surveyed)
        for run, found in enumerate(surveyed or [None] * self.runs):
            branches = found if isinstance(found, Branches) else self._star(run)
            self._take_tree(run, branches, used[run])

    def _star(self, run: int) -> Branches:
        """The target as the parent of all columns, or no column with a parent."""
        root, levels = self.layout.target, list(self.layout.levels)
        parents = tuple(j if root is None else root for j in range(self.layout.columns))
        blocks = self.given_logits[run].double().cpu().split(levels, -1)
        given = [block.softmax(-1).numpy() for block in blocks]
        if root is not None:
            given[root] = self.prior_logits[run].double().cpu().softmax(-1).numpy()[None]
        return Branches(parents, tuple(given))

    def _take_tree(self, run: int, branches: Branches, used: Tensor) -> None:
        self.branch_logits[run] = 0.0
        masks = used.split(list(self.layout.levels))
        places = zip(self.layout.offsets, self.layout.levels, branches.given, strict=True)
        for column, (start, levels, given) in enumerate(places):
            self.parent[run, column] = branches.parents[column]
            logits = torch.from_numpy(given).clamp_min(1e-6).log()
            logits = logits.where(masks[column], -1e4).log_softmax(-1)
            self.branch_logits[run, start : start + levels, : len(given)] = logits.mT.to(
                self.branch_logits
            )

    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """−log p(x)."""
        parent = self.parent[:, None, :].expand(codes.shape)
        above = self._above(codes, parent)
        place = codes + torch.tensor(self.layout.offsets, device=codes.device)
        run = torch.arange(self.runs, device=codes.device)[:, None, None]
        return -self.branch_logits[run, place, above].sum(-1)

    def _above(self, codes: Tensor, parent: Tensor) -> Tensor:
        """Level of each column's parent (runs, rows, D), 0 for a root."""
        own = torch.arange(self.layout.columns, device=codes.device)
        return codes.gather(-1, parent).where(parent != own, 0)

    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        pieces = [
            self._piece(size, rng.at("sample", number), given or {})
            for number, size in enumerate(self.chunks(rows))
        ]
        return torch.cat(pieces, dim=1)

    def _piece(self, rows: int, draws: FleetRng, given: Mapping[int, int]) -> Tensor:
        """Rows drawn column by column, parents first."""
        device, target = self.parent.device, self.layout.target
        codes = torch.zeros(self.runs, rows, self.layout.columns, dtype=torch.long, device=device)
        if target is not None and target in given:
            codes[..., target] = given[target]
        for column in self._order().unbind(1):
            place = column[:, None, None].expand(-1, rows, 1)
            parent = self.parent.gather(1, column[:, None])
            above = codes.gather(2, parent[..., None].expand(-1, rows, 1))[..., 0]
            above = above.where(parent != column[:, None], 0)
            drawn = self._draw(column, above, draws)[..., None]
            # With a target it is the only root, and the first of every run.
            fixed = (column == (-1 if target is None else target)) & (target in given)
            codes.scatter_(
                2, place, torch.where(fixed[:, None, None], codes.gather(2, place), drawn)
            )
        return codes

    def _order(self) -> Tensor:
        """Columns of each run, every one after its parent (runs, D)."""
        own = torch.arange(self.layout.columns, device=self.parent.device)
        depth = torch.zeros_like(self.parent)
        for _ in range(self.layout.columns):
            depth = torch.where(self.parent == own, 0, depth.gather(1, self.parent) + 1)
        return depth.argsort(dim=1, stable=True)

    def _draw(self, column: Tensor, above: Tensor, draws: FleetRng) -> Tensor:
        """Levels of one column a run, given its parent's (runs, rows) -> (runs, rows).

        Among the rows that share a parent's level each level is drawn as often as it is due but
        for less than one row, in random order.
        """
        mass = self._block(column).exp().double().cumsum(-1)
        rows, wide = above.shape[1], mass.shape[1]
        order = (above + draws.uniform(rows, dtype=torch.float64) * (1 - 1e-9)).argsort(-1)
        sorted_above = above.gather(1, order)
        counts = torch.zeros_like(mass[..., 0]).scatter_add_(
            1, above, torch.ones_like(above).double()
        )
        first = (counts.cumsum(-1) - counts).gather(1, sorted_above)
        rank = torch.arange(rows, device=above.device) - first
        offset = draws.uniform(wide, dtype=torch.float64).gather(1, sorted_above)
        point = (rank + offset) / counts.gather(1, sorted_above)
        run = torch.arange(self.runs, device=above.device)[:, None]
        ends = mass[run, sorted_above]
        level = (ends <= point.clamp(max=1 - 1e-6)[..., None] * ends[..., -1:]).sum(-1)
        return torch.zeros_like(level).scatter_(1, order, level)

    def _block(self, column: Tensor) -> Tensor:
        """Log-probabilities of a column's levels given its parent's (runs, L, L), impossible
        beyond the number of its levels."""
        layout, device = self.layout, column.device
        levels = torch.tensor(layout.levels, device=device)[column]
        start = torch.tensor(layout.offsets, device=device)[column]
        step = torch.arange(max(layout.levels), device=device)
        place = (start[:, None] + step).clamp(max=layout.width - 1)
        run = torch.arange(self.runs, device=device)[:, None]
        block = self.branch_logits[run, place].masked_fill(
            (step >= levels[:, None])[..., None], -1e4
        )
        return block.mT


def refuse_components(family: str, options: Mapping[str, Any]) -> None:
    """Refuse components, which this family has no use for.

    Raises:
        UsageError: On `components` above 0.
    """
    if options.get("components"):
        raise UsageError(
            f"components={options['components']}: model={family} has none; use model=mixture"
        )


def _grow(survey: Survey) -> Branches | None:
    """Find the tree and measure it; with one column there is nothing to ask."""
    layout, marginals = survey.layout, survey.marginals
    pairs = list(itertools.combinations(range(layout.columns), 2))
    if not pairs:
        return None
    masks = [mask.numpy() for mask in survey.used.split(list(layout.levels))]
    alone = one_way_counts(marginals.tables, layout, masks, marginals.rows)
    expected = {(i, j): np.outer(alone[i], alone[j]) / marginals.rows for i, j in pairs}
    edges, share = pairs, 1.0
    if len(pairs) > 1:
        share -= _SCORES
        sigma = survey.purse.sigma(share / (layout.columns - 1))
        found = survey.distances(expected, _SCORES)
        worth = [
            distance - _by_chance(expected[pair], sigma)
            for pair, distance in zip(pairs, found, strict=True)
        ]
        edges = _spanning(pairs, worth, layout.columns)
    parents = _rooted(edges, layout)
    asked = [(parent, j) for j, parent in enumerate(parents) if parent != j]
    sizes = [expected[min(edge), max(edge)] for edge in asked]
    tables = survey.tables(asked, shares_by_size(sizes, survey, share))
    return _branches(parents, [*marginals.tables, *tables], marginals.rows, layout, masks)


def _by_chance(expected: np.ndarray, sigma: float) -> float:
    """Σ|count - expected| of independent columns, and what noise would add to it: no cell is off
    by more rows than it has."""
    return float(np.minimum(_MEAN * np.sqrt(expected + sigma**2), expected).sum())


def _spanning(
    pairs: Sequence[tuple[int, int]], worth: Sequence[float], columns: int
) -> list[tuple[int, int]]:
    """Edges of the spanning tree with the greatest total."""
    # A stored 0 would be no edge, so all costs are positive.
    cost = max(worth) + 1 - np.array(worth)
    first, second = np.array(pairs).T
    tree = minimum_spanning_tree(csr_array((cost, (first, second)), shape=(columns, columns)))
    return [(int(i), int(j)) for i, j in zip(*tree.nonzero(), strict=True)]


def _rooted(edges: Sequence[tuple[int, int]], layout: Layout) -> tuple[int, ...]:
    """Parent of each column once the tree hangs from the target, or else the first column."""
    first, second = np.array(edges).T
    size = (layout.columns, layout.columns)
    graph = csr_array((np.ones(len(edges)), (first, second)), shape=size)
    root = layout.target or 0
    _, parents = breadth_first_order(graph, root, directed=False)
    parents[root] = root
    return tuple(int(parent) for parent in parents)


def _branches(
    parents: tuple[int, ...],
    tables: Sequence[NoisyTable],
    rows: float,
    layout: Layout,
    masks: Sequence[np.ndarray],
) -> Branches:
    """Conditional distributions: each pair fitted to what all tables say of its columns."""
    alone = one_way_counts(tables, layout, masks, rows)
    given = []
    for column, parent in enumerate(parents):
        own = alone[column] / rows
        if parent == column:
            given.append(own[None])
            continue
        counts, _ = combined(tables, (parent, column))
        fitted = consistent(counts, alone[parent], alone[column], masks[parent], masks[column])
        whole = fitted.sum(1, keepdims=True)
        shares = np.divide(fitted, whole, where=whole > 0, out=np.tile(own, (len(whole), 1)))
        # A thin row leans a thousandth towards the column's own distribution, as everywhere.
        given.append(0.999 * shares + 0.001 * own)
    return Branches(parents, tuple(given))


def one_way_counts(
    tables: Sequence[NoisyTable], layout: Layout, masks: Sequence[np.ndarray], rows: float
) -> list[np.ndarray]:
    """Rows with each level of each column: sums over all tables that hold it, weighed by the
    inverse of their variances, with no negative one and `rows` in all.

    Args:
        tables: Noisy counts; every column is in one at least.
        layout: Public shape.
        masks: Levels that can occur, by column.
        rows: Number of rows.

    Returns:
        (levels,) of each column, 0 where a level cannot occur.
    """
    found = []
    for column, levels in enumerate(layout.levels):
        total, weights = np.zeros(levels), 0.0
        for table in tables:
            if column not in table.columns:
                continue
            inside = np.ix_(
                *(
                    np.arange(levels) if c == column else np.flatnonzero(masks[c])
                    for c in table.columns
                )
            )
            cut = table.counts[inside]
            others = tuple(a for a, c in enumerate(table.columns) if c != column)
            weight = levels / (max(table.sigma, _EXACT) ** 2 * cut.size)
            total += weight * cut.sum(axis=others)
            weights += weight
        counts, mask = np.zeros(levels), masks[column]
        counts[mask] = onto_simplex(total[mask] / weights, rows)
        found.append(counts)
    return found


def combined(tables: Sequence[NoisyTable], pair: tuple[int, int]) -> tuple[np.ndarray, float]:
    """Counts of a pair from all tables of it, by the inverse of their variances, and the σ left."""
    total, weights = 0.0, 0.0
    for table in tables:
        if set(table.columns) == set(pair):
            weight = max(table.sigma, _EXACT) ** -2
            total = total + weight * (table.counts if table.columns == pair else table.counts.T)
            weights += weight
    return np.asarray(total) / weights, weights**-0.5


def consistent(
    counts: np.ndarray, first: np.ndarray, second: np.ndarray, *masks: np.ndarray
) -> np.ndarray:
    """Counts of a pair with these margins and no negative entry, near the noisy ones.

    The nearest table with the margins (least squares, equal variances) is cut at 0 row by row, each
    row keeping its total, and raked to the margins again.

    Args:
        counts: Noisy (levels, levels).
        first: Rows with each level of the first column (levels,).
        second: Of the second.
        masks: Levels of each that can occur.
    """
    inside = np.ix_(*masks)
    cut, down, right = counts[inside], first[masks[0]], second[masks[1]]
    high, wide, rows = len(down), len(right), down.sum()
    cut = cut + (down - cut.sum(1))[:, None] / wide + (right - cut.sum(0)) / high
    cut = cut - (rows - counts[inside].sum()) / (high * wide)
    fitted = onto_simplex(cut, np.maximum(down, 0))
    fitted += 1e-9 * np.outer(down, right) / max(rows, 1.0)
    for _ in range(_RAKES):
        fitted *= right / np.maximum(fitted.sum(0), 1e-30)
        fitted *= (down / np.maximum(fitted.sum(1), 1e-30))[:, None]
    out = np.zeros_like(counts, dtype=float)
    out[inside] = fitted
    return out


def shares_by_size(expected: Sequence[np.ndarray], survey: Survey, share: float) -> list[float]:
    """Parts of the purse for each table, adding up to `share`: an error of N_t·σ_t in each adds up
    to least where 1/σ_t² ∝ N_t^(2/3), with N_t the rows that noise can move."""
    sigma = survey.purse.sigma(share / len(expected))
    size = np.array([max(np.minimum(_MEAN * sigma, table).sum(), 1.0) for table in expected])
    size = size ** (2 / 3)
    # Together a little less, so that rounding never asks for more than is there.
    return (size / size.sum() * share * (1 - 1e-9)).tolist()
