"""Products of two columns as features: what a model that is linear in them can say of three columns
at once, or of three and the target."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.mixture import anchored

__all__ = ["Products", "leading"]

# Most products, so that a layer of them stays small beside a batch.
_MOST = 4096
# Least variance of a direction, as a share of all, that it is scaled up from.
_LEAST = 0.01


@dataclass(frozen=True)
class Products:
    """Which products there are: of a direction of one column and a direction of another, for each
    pair of columns, apart for each level of a target of few levels.

    Attributes:
        directions: How many directions each column has, by its position.
        groups: G; 1 where the target has many levels, and is a column like any other, or is none.
    """

    directions: Mapping[int, int]
    groups: int

    @classmethod
    def of(cls, layout: Layout, most: int) -> Products | None:
        """As many directions a column, up to `most`, as keep products within a few thousand; none
        where even one is too many, or no two columns are left."""
        apart = anchored(layout)
        columns = [j for j in range(layout.columns) if not (apart and j == layout.target)]
        groups = layout.groups if apart else 1
        for count in range(most, 0, -1):
            made = cls({j: min(count, max(1, layout.levels[j] - 1)) for j in columns}, groups)
            if 0 < groups * len(made.left) <= _MOST:
                return made
        return None

    @cached_property
    def parts(self) -> dict[int, slice]:
        """Where the directions of each column lie, side by side."""
        ends = [0, *itertools.accumulate(self.directions.values())]
        places = itertools.starmap(slice, itertools.pairwise(ends))
        return dict(zip(self.directions, places, strict=True))

    @property
    def width(self) -> int:
        """V, directions of all columns."""
        return sum(self.directions.values())

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return list(itertools.combinations(self.directions, 2))

    @property
    def blocks(self) -> list[int]:
        """Products of each pair of columns, group after group."""
        return [self.directions[i] * self.directions[j] for i, j in self.pairs] * self.groups

    @cached_property
    def _factors(self) -> list[tuple[int, int]]:
        ranges = {j: range(part.start, part.stop) for j, part in self.parts.items()}
        return [both for i, j in self.pairs for both in itertools.product(ranges[i], ranges[j])]

    @property
    def left(self) -> Int[Tensor, " products"]:
        """Place of each product's first factor, of one group."""
        return torch.tensor([i for i, _ in self._factors], dtype=torch.long)

    @property
    def right(self) -> Int[Tensor, " products"]:
        """Place of its second factor."""
        return torch.tensor([j for _, j in self._factors], dtype=torch.long)

    def places(self, rank: Int[Tensor, " columns"]) -> Int[Tensor, " blocks"]:
        """Place of each block in an order of the columns: that of its later column."""
        later = [max(int(rank[i]), int(rank[j])) for i, j in self.pairs]
        return torch.tensor(later * self.groups, device=rank.device)


def leading(
    root: Float[Tensor, "levels levels"], share: Float[Tensor, " levels"], count: int
) -> Float[Tensor, "levels count"]:
    """The first principal directions of a column's features, scaled to the same variance each, 1
    together.

    Args:
        root: Features of each level.
        share: How frequent each level is.
        count: How many.
    """
    share = share / share.sum()
    centred = root - share @ root
    scales, vectors = torch.linalg.eigh(centred.T @ (share[:, None] * centred))
    scales, vectors = scales.flip(-1)[:count].clamp_min(0), vectors.flip(-1)[:, :count]
    scales = scales + _LEAST * scales.sum() + 1e-12
    return root @ vectors / (count * scales).sqrt()
