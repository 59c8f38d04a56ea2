"""Small fleets of every family, with tables and weights that are nowhere zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.mixture import Mixture, anchored
from dpsynth.models import Generator
from dpsynth.randomness import FleetRng
from dpsynth.training.recipe import FAMILIES

__all__ = [
    "TRAINED",
    "VARIANTS",
    "Start",
    "make_fleet",
    "random_codes",
    "random_marginals",
    "random_mixture",
]

TRAINED = [name for name, family in FAMILIES.items() if family.trained]
SMALL: Mapping[str, Mapping[str, Any]] = {
    "vae": {"hidden": [8, 8], "latent": 3, "draws": 2},
    "gan": {"hidden": [8, 8], "latent": 3, "fakes": 2},
    "diffusion": {"hidden": [8, 8], "draws": 3},
    "mst": {"pool": 24_000},
    "aim": {"pool": 24_000},
}
# Families whose rows start from components of a mixture.
_MIXED = (*TRAINED, "naive_bayes", "mixture")
# Every family without components and with them, "family+number"; a mixture has some.
VARIANTS = [
    f"{name}+{k}"
    for name in FAMILIES
    for k in (0, 6)
    if (k == 0 and name != "mixture") or (k and name in _MIXED)
]


def random_marginals(layout: Layout, seed: int, used: Tensor | None = None) -> Marginals:
    """Tables as they could have been measured; unused levels have no mass in any of them."""
    rng = np.random.default_rng(seed)
    mask = np.ones(layout.width, bool) if used is None else used.numpy()
    masks = np.split(mask, np.cumsum(layout.levels)[:-1])

    def block(levels: np.ndarray) -> np.ndarray:
        shares = np.zeros(len(levels))
        # Mixed with the even distribution: no level is too rare to be tested.
        shares[levels] = 0.8 * rng.dirichlet(np.ones(levels.sum())) + 0.2 / levels.sum()
        return shares

    prior = np.ones(1) if layout.target is None else block(masks[layout.target])
    rows = [
        np.concatenate([prior if j == layout.target else block(m) for j, m in enumerate(masks)])
        for _ in range(layout.groups)
    ]
    # Numbers, but for every third column and the last level of each, which is a missing one.
    lines = [np.arange(n) * (1.0 if j % 3 else math.nan) for j, n in enumerate(layout.levels)]
    values = np.concatenate([np.append(line[:-1], math.nan) for line in lines])
    given = torch.from_numpy(np.stack(rows))
    return Marginals(torch.from_numpy(prior), given, torch.from_numpy(values), 0.0)


def random_mixture(layout: Layout, seed: int, used: Tensor | None = None) -> Mixture:
    """A mixture as it could have been fitted: two components for each of two target levels, or
    four of all."""
    parts = [random_marginals(layout, 10 * seed + number, used) for number in range(4)]
    rows = []
    for number, part in enumerate(parts):
        row = part.one_way()
        if anchored(layout) and layout.target is not None:
            start = layout.offsets[layout.target]
            block = row[start : start + layout.groups]
            level = block.argsort(descending=True)[number % 2]
            block.copy_(torch.eye(layout.groups)[level])
        rows.append(row)
    return Mixture(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), torch.stack(rows))


def random_codes(layout: Layout, runs: int, rows: int, seed: int = 0) -> Tensor:
    """Even draws of all levels (runs, rows, D)."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, layout.levels, (runs, rows, layout.columns)))


def make_fleet(
    family: str,
    layout: Layout,
    keys: Sequence[int],
    *,
    used: Tensor | None = None,
    jitter: float = 0.3,
    double: bool = True,
    **options: Any,
) -> Generator:
    """One run a key, with tables and weights that follow from its key. Samples are not reconciled
    with the tables but where `reconcile` is asked for.

    Args:
        family: Its name, or one of `VARIANTS`.
        jitter: Scale of what is added to every initial weight; 0 leaves the fleet untrained.
        double: Weights, tables and draws in float64.
    """
    family, _, number = family.partition("+")
    components = int(number) if number else 6 * (family in _MIXED)
    asked = {"components": components, "reconcile": False, **SMALL.get(family, {}), **options}
    model = FAMILIES[family](layout, len(keys), **asked)
    dtype = torch.float64 if double else torch.float32
    model = model.to(dtype)
    rng = FleetRng(keys, dtype=dtype)
    model.reset(rng)
    mask = torch.ones(layout.width, dtype=torch.bool) if used is None else used
    tables = [random_marginals(layout, key, used) for key in keys]
    found = [random_mixture(layout, key, used) for key in keys] if model.components else None
    model.prepare(tables, [mask] * len(keys), rng, found)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += jitter * rng.at("jitter", number).normal(*parameter.shape[1:])
    return model


@dataclass(frozen=True)
class Start:
    """What a run of a fleet starts from, in plain NumPy: a mixture of products.

    Attributes:
        weight: Share of each component (K,).
        blocks: Of each column, its distribution in each component (K, L).
        layout: Shape of rows.
    """

    weight: np.ndarray
    blocks: list[np.ndarray]
    layout: Layout

    @classmethod
    def of(cls, variant: str, layout: Layout, key: int, used: Tensor | None = None) -> Start:
        """The start of the run of `make_fleet(variant, layout, [key], used=used)`."""
        family, _, components = variant.partition("+")
        if int(components):
            found = random_mixture(layout, key, used)
            weight, levels = found.weight.numpy(), found.levels.numpy()
        else:
            tables = random_marginals(layout, key, used)
            weight, levels = tables.prior.numpy(), tables.given.numpy()
        alone = weight @ levels
        # Rare levels of a component are drawn towards the column's own distribution.
        smooth = 0.999 * levels + 0.001 * alone
        if family in ("independent", "copula"):
            weight, smooth = np.ones(1), alone[None]
        blocks = np.split(smooth, layout.offsets[1:], axis=1)
        target = layout.target
        if target is not None and family not in ("independent", "copula"):
            own = np.split(levels, layout.offsets[1:], axis=1)[target]
            if not int(components):
                blocks[target] = np.eye(layout.groups)
            elif layout.groups <= 8:
                blocks[target] = own
        return cls(weight, blocks, layout)

    def posterior(self, seen: Mapping[int, int]) -> np.ndarray:
        """P(component | levels of some columns) (K,)."""
        share = self.weight.copy()
        for column, level in seen.items():
            share = share * self.blocks[column][:, level]
        return share / share.sum()

    def table(self, columns: Sequence[int], seen: Mapping[int, int] | None = None) -> np.ndarray:
        """P(levels of `columns` | levels of others), one axis a column."""
        total = np.zeros([self.layout.levels[j] for j in columns])
        for k, share in enumerate(self.posterior(seen or {})):
            part = np.ones(())
            for j in columns:
                part = np.multiply.outer(part, self.blocks[j][k])
            total += share * part
        return total

    def loss(self, row: Sequence[int], component: int) -> float:
        """-log P(row | component)."""
        return -sum(
            math.log(block[component, level]) for block, level in zip(self.blocks, row, strict=True)
        )
