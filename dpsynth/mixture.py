"""Mixture of products: one distribution of whole rows that agrees with many noisy tables at once.

p(x) = Σ_k w_k Π_j A_kj(x_j). Where the target has few levels each component belongs to one of them.
All two-way and label × two-way tables of such a mixture are matrix products, so it is fitted to
everything that was measured by gradient descent, without sampling. Sparse noisy tables denoise each
other, and a pull towards independence given the target keeps components from learning the noise
(docs/design/quality-marginals.md has the evidence).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpsynth.coarse import Coarse, Groups
from dpsynth.codec import Layout
from dpsynth.leading import Leading
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.randomness import stream

__all__ = ["Effort", "Mixture", "anchored", "classed", "fit_mixture"]

# Target levels up to which each component belongs to one of them, and up to which a target is a
# class: bins and heaps of a number are more.
_ANCHORS, _CLASSES = 8, 32
# Spread of the components' first logits around those of naive Bayes, and Adam's rate.
_SPREAD, _RATE = 0.5, 0.05
# λ, weight of the pull towards independence given the target, in nats a row.
_PULL = 0.01
# Noise below which a table counts as no more exact: fewer rows than a table is rounded by.
_EXACT = 1.0


@dataclass(frozen=True)
class Effort:
    """How much is spent on a fit.

    Attributes:
        restarts: B mixtures fitted apart and averaged; more of them hold less of the noise.
        components: K of each.
        steps: Gradient steps.
    """

    restarts: int
    components: int
    steps: int

    def within(self, most: int) -> Effort:
        """The same with at most so many components, restarts together."""
        restarts = max(1, min(self.restarts, most // 2))
        return replace(self, restarts=restarts, components=min(self.components, most // restarts))


def anchored(layout: Layout) -> bool:
    """Whether components belong to target levels."""
    return classed(layout) and layout.groups <= _ANCHORS


def classed(layout: Layout) -> bool:
    """Whether there is a target and it is a class, not a number."""
    return layout.target is not None and 1 < layout.groups <= _CLASSES


@dataclass(frozen=True, eq=False)
class Mixture:
    """Weights of components and, for each, one distribution a column.

    Attributes:
        weight: Share of each component (K,).
        levels: Their distributions, side by side (K, W); levels that cannot occur have none.
        leading: What is known besides of a target of many levels.
    """

    weight: Tensor
    levels: Tensor
    leading: Leading | None = None

    def table(self, columns: Sequence[int], layout: Layout) -> np.ndarray:
        """Probability of each cell of a table of at most four columns."""
        blocks = self.levels.split(list(layout.levels), dim=-1)
        letters = "abcd"[: len(columns)]
        terms = ",".join(f"k{letter}" for letter in letters)
        parts = [blocks[column] for column in columns]
        return torch.einsum(f"k,{terms}->{letters}", self.weight, *parts).numpy()

    def merged(self, groups: Groups) -> Mixture:
        """The same of rows whose levels are groups."""
        found = self.levels.new_zeros(len(self.weight), groups.layout.width)
        return Mixture(
            self.weight, found.index_add(1, torch.from_numpy(groups.places), self.levels)
        )

    def marginals(self, measured: Marginals, layout: Layout) -> Marginals:
        """Label × column tables of the mixture in place of the noisy ones: they agree with more."""
        start = layout.offsets[layout.target or 0]
        block = slice(start, start + layout.groups)
        alone = layout.target is None
        member = torch.ones(1, len(self.weight)) if alone else self.levels[:, block].T
        member = member.double() * self.weight
        prior = member.sum(1) / self.weight.sum()
        given = member @ self.levels / member.sum(1, keepdim=True).clamp_min(1e-30)
        if not alone:
            given[:, block] = prior
        # A target level that no component has keeps its tables.
        given = torch.where(prior[:, None] > 0, given, measured.given)
        return replace(measured, prior=prior, given=given)

    def logits(self, tables: Marginals, layout: Layout) -> Tensor:
        """Log of `levels`, smoothed a little towards the columns' own distributions, so that no
        level is impossible that can occur; a component's own target level stays certain (K, W)."""
        smooth = (0.999 * self.levels + 0.001 * tables.one_way()).clamp_min(1e-6).log()
        if not anchored(layout) or layout.target is None:
            return smooth
        start = layout.offsets[layout.target]
        block = self.levels[:, start : start + layout.groups]
        smooth[:, start : start + layout.groups] = torch.where(block > 0.5, 0.0, -1e4).to(smooth)
        return smooth

    @staticmethod
    def naive_bayes(marginals: Marginals, layout: Layout) -> Mixture:
        """One component a target level, with the columns' noisy tables given it."""
        levels = marginals.given.clone()
        if layout.target is not None:
            start = layout.offsets[layout.target]
            levels[:, start : start + layout.groups] = torch.eye(layout.groups)
        return Mixture(marginals.prior.clone(), levels)


def fit_mixture(
    tables: Sequence[NoisyTable],
    marginals: Marginals,
    layout: Layout,
    used: Tensor,
    effort: Effort,
    *,
    coarse: Coarse | None = None,
    device: str = "cpu",
) -> Mixture:
    """The mixture whose expected counts are nearest to `tables`, each cell weighed by its noise.

    Minimises ½ Σ_cells (n·P - count)²/σ² + λ·n·I(component; columns | target) by Adam. The first
    components are drawn from a public stream, so equal tables give equal mixtures. Counts are
    taken as they are, negative ones too: to project them first would bias the fit.

    Args:
        tables: Of one or two columns, or of the target and two columns.
        marginals: Where components start; its tables are only used if they are in `tables`.
        layout: Public shape.
        used: Levels that can occur (W,).
        effort: How long.
        coarse: Tables of groups of levels.
        device: Where it is computed.
    """
    fit = _Fit(tables, marginals, layout, used, effort, torch.device(device))
    if coarse is not None and (coarse.pairs or coarse.triples):
        fit.merge(coarse)
    fit.run()
    return fit.mixture()


class _Fit:
    """The state of a fit; W counts used levels only."""

    def __init__(
        self,
        tables: Sequence[NoisyTable],
        marginals: Marginals,
        layout: Layout,
        used: Tensor,
        effort: Effort,
        device: torch.device,
    ) -> None:
        self.layout, self.effort, self.device = layout, effort, device
        self.rows, self.kept = marginals.rows, used.nonzero().flatten()
        self.sizes = [int(block.sum()) for block in used.split(list(layout.levels))]
        ends = np.cumsum([0, *self.sizes])
        self.blocks = [slice(a, b) for a, b in itertools.pairwise(ends.tolist())]
        self.inside = [b.nonzero().flatten().numpy() for b in used.split(list(layout.levels))]
        self.merging: Tensor | None = None
        self.triples: Tensor | None = None
        self._start(marginals)
        self._targets(tables)

    def merge(self, coarse: Coarse) -> None:
        """Take coarse tables in: a second set of blocks, of groups, that levels add up to."""
        groups = coarse.groups.layout
        merging = torch.zeros(len(self.kept), groups.width)
        merging[torch.arange(len(self.kept)), torch.from_numpy(coarse.groups.places)[self.kept]] = 1
        self.merging = merging.to(self.device)
        if coarse.pairs:
            self._merge_pairs(coarse.pairs, groups)
        if coarse.triples:
            self._merge_triples(coarse.triples, groups)

    def _merge_pairs(self, tables: Sequence[NoisyTable], groups: Layout) -> None:
        """As full tables are taken in, side by side."""
        wanted, exact = torch.zeros(2, len(self.bounds) - 1, groups.width, groups.width)
        for table in tables:
            rows, columns = (
                slice(groups.offsets[c], groups.offsets[c] + groups.levels[c])
                for c in table.columns[-2:]
            )
            wanted[:, rows, columns] = torch.from_numpy(self._occurring(table, 2)).float()
            exact[:, rows, columns] = 1 / max(table.sigma, _EXACT) ** 2
        self.wanted["coarse"], self.exact["coarse"] = wanted.to(self.device), exact.to(self.device)

    def _merge_triples(self, tables: Sequence[NoisyTable], groups: Layout) -> None:
        """One after the other, cells of the first two columns as rows."""
        first = [[groups.offsets[c] for c in table.columns[-3:]] for table in tables]
        counts = np.stack([self._occurring(table, 3) for table in tables], axis=1)
        wanted = torch.from_numpy(counts.reshape(*counts.shape[:2], -1, counts.shape[-1])).float()
        exact = torch.tensor([1 / max(table.sigma, _EXACT) ** 2 for table in tables])
        places = torch.tensor(first).T[..., None] + torch.arange(counts.shape[-1])
        self.triples = places.to(self.device)
        self.wanted["triples"], self.exact["triples"] = (
            wanted.to(self.device),
            exact[:, None, None].to(self.device),
        )

    def _occurring(self, table: NoisyTable, merged: int) -> np.ndarray:
        """Counts for each level of the target that can occur, or for all rows as one."""
        if len(table.columns) == merged:
            return table.counts[None]
        return table.counts[self.inside[table.columns[0]]]

    def _start(self, marginals: Marginals) -> None:
        """Components around naive Bayes: as many a target level as the root of its share asks."""
        prior, given, target = self._around(marginals)
        share = prior.clamp_min(1e-9).sqrt() / prior.clamp_min(1e-9).sqrt().sum()
        counts = (share * self.effort.components).round().long().clamp_min(1)
        counts[counts.argmax()] += self.effort.components - counts.sum()
        self.group = torch.repeat_interleave(torch.arange(len(counts)), counts)
        mixed = 0.99 * given + 0.01 * (prior @ given) + 1e-6
        base = mixed[:, self.kept].log()
        if target is not None:
            base[:, self.blocks[target]] = torch.where(torch.eye(len(prior)) > 0, 0.0, -1e4).to(
                base
            )
        size = (self.effort.restarts, len(self.group), len(self.kept))
        spread = torch.from_numpy(stream(0, "mixture").standard_normal(size)) * _SPREAD
        weight = (prior.clamp_min(1e-9) / counts).log()[self.group].expand(size[:2])
        self.base = base[self.group].float().to(self.device)
        self.theta = spread.float().to(self.device).requires_grad_()
        self.free = weight.clone().float().to(self.device).requires_grad_()
        self.bounds = np.cumsum([0, *counts.tolist()]).tolist()

    def _around(self, marginals: Marginals) -> tuple[Tensor, Tensor, int | None]:
        """Shares and column distributions of the target's levels, and the target; or of all rows
        as one, and no target, where components do not belong to levels."""
        target = self.layout.target
        if not anchored(self.layout) or target is None:
            return torch.ones(1, dtype=torch.float64), marginals.one_way()[None], None
        occurs = torch.from_numpy(self.inside[target])
        return marginals.prior[occurs], marginals.given[occurs], target

    def _targets(self, tables: Sequence[NoisyTable]) -> None:
        """Tables that say the same of a cell as one, by the inverse of their variances."""
        groups, width = len(self.bounds) - 1, len(self.kept)
        shapes = {"alone": (width,), "pair": (width, width), "triple": (groups, width, width)}
        sums = {name: np.zeros(shape) for name, shape in shapes.items()}
        weights = {name: np.zeros(shape) for name, shape in shapes.items()}
        for table in tables:
            columns = table.columns
            name = ("alone", "pair", "triple")[len(columns) - 1]
            place: tuple[slice, ...] = tuple(self.blocks[c] for c in columns)
            if name == "triple":
                place = (slice(None), *place[1:])
            weight = 1 / max(table.sigma, _EXACT) ** 2
            sums[name][place] += weight * table.counts[np.ix_(*(self.inside[c] for c in columns))]
            weights[name][place] += weight
        self.deep = bool(weights["triple"].any())
        self.wanted, self.exact = {}, {}
        for name, weight in weights.items():
            value = np.divide(sums[name], weight, where=weight > 0, out=np.zeros_like(weight))
            self.wanted[name] = torch.from_numpy(value).float().to(self.device)
            self.exact[name] = torch.from_numpy(weight).float().to(self.device)

    def levels(self) -> Tensor:
        """(B, K, W), each column's block a distribution."""
        blocks = (self.base + self.theta).split(self.sizes, dim=-1)
        return torch.cat([block.softmax(-1) for block in blocks], dim=-1)

    def loss(self) -> Tensor:
        """Summed over restarts, which do not touch each other."""
        levels, weight = self.levels(), self.free.softmax(-1)
        total = levels.new_zeros(())
        whole = levels.new_zeros(())
        for g, (a, b) in enumerate(itertools.pairwise(self.bounds)):
            part, share = levels[:, a:b], weight[:, a:b, None]
            joint = (part * share).mT @ part
            whole = whole + joint
            total = total + _PULL * self.rows * self._information(part, share)
            if self.deep:
                gap = self.rows * joint - self.wanted["triple"][g]
                total = total + 0.5 * (self.exact["triple"][g] * gap.square()).sum()
            if self.merging is not None:
                total = total + self._merged_loss(part @ self.merging, share, g)
        for name, share in {"alone": (levels * weight[..., None]).sum(1), "pair": whole}.items():
            gap = self.rows * share - self.wanted[name]
            total = total + 0.5 * (self.exact[name] * gap.square()).sum()
        return total

    def _merged_loss(self, part: Tensor, share: Tensor, g: int) -> Tensor:
        """Of coarse tables, of components (B, K, groups) of one target level."""
        total = part.new_zeros(())
        if "coarse" in self.wanted:
            gap = self.rows * (part * share).mT @ part - self.wanted["coarse"][g]
            total = total + 0.5 * (self.exact["coarse"][g] * gap.square()).sum()
        if self.triples is not None:
            levels = part.mT.index_select(1, self.triples.flatten())
            first, second, third = levels.unflatten(1, self.triples.shape).unbind(1)
            pairs = (first[:, :, :, None] * second[:, :, None]).flatten(2, 3)
            joint = pairs @ (third * share.mT[:, None]).mT
            gap = self.rows * joint - self.wanted["triples"][g]
            total = total + 0.5 * (self.exact["triples"] * gap.square()).sum()
        return total

    def _information(self, levels: Tensor, weight: Tensor) -> Tensor:
        """Σ_k w_k Σ_j KL(A_kj ‖ mean of A_j over these components)."""
        mean = (weight * levels).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        kl = weight * levels * ((levels + 1e-9).log() - (mean + 1e-9).log())
        return kl.sum()

    def run(self) -> None:
        optimizer = torch.optim.Adam([self.theta, self.free], lr=_RATE)
        for step in range(self.effort.steps):
            # Constant for one half, then linearly down.
            optimizer.param_groups[0]["lr"] = _RATE * min(
                1, 2 * (1 - step / self.effort.steps) + 0.02
            )
            optimizer.zero_grad()
            self.loss().backward()
            optimizer.step()

    @torch.no_grad()
    def mixture(self) -> Mixture:
        """All restarts as one mixture, at full width."""
        levels = self.levels().flatten(0, 1).double().cpu()
        weight = self.free.softmax(-1).flatten().double().cpu() / self.effort.restarts
        full = torch.zeros(len(levels), self.layout.width, dtype=torch.float64)
        full[:, self.kept] = levels
        return Mixture(weight, full)
