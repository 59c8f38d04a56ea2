"""Small fleets of every family, with tables and weights that are nowhere zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.models import Generator
from dpsynth.randomness import FleetRng
from dpsynth.training.recipe import FAMILIES

__all__ = ["TRAINED", "make_fleet", "random_codes", "random_marginals"]

TRAINED = [name for name, family in FAMILIES.items() if family.trained]
SMALL: Mapping[str, Mapping[str, Any]] = {
    "vae": {"hidden": [8, 8], "latent": 3, "draws": 2},
    "gan": {"hidden": [8, 8], "latent": 3, "fakes": 2},
    "diffusion": {"hidden": [8, 8], "draws": 3},
}


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
    """One run a key, with tables and weights that follow from its key.

    Args:
        jitter: Scale of what is added to every initial weight; 0 leaves the fleet untrained.
        double: Weights, tables and draws in float64.
    """
    model = FAMILIES[family](layout, len(keys), **{**SMALL.get(family, {}), **options})
    dtype = torch.float64 if double else torch.float32
    model = model.to(dtype)
    rng = FleetRng(keys, dtype=dtype)
    model.reset(rng)
    mask = torch.ones(layout.width, dtype=torch.bool) if used is None else used
    tables = [random_marginals(layout, key, used) for key in keys]
    model.prepare(tables, [mask] * len(keys), rng)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += jitter * rng.at("jitter", number).normal(*parameter.shape[1:])
    return model
