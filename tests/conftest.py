"""What every test may use: one thread a worker, a small Adult table, and the further tables."""

from __future__ import annotations

import os

# Two workers on two cores: more threads each only get in one another's way. Before torch loads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from dpsynth import chosen, datasets
from dpsynth.data import Table
from dpsynth.mixture import Effort, fit_mixture
from dpsynth.models import labels

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"

# A slow machine is no failure, and a failure that CI finds must be found again.
settings.register_profile(
    "dpsynth", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dpsynth")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps tests out of the user's cache folder; processes they start inherit it."""
    os.environ["DPSYNTH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def hasty() -> Iterator[None]:
    """Mixtures of few gradient steps and labels of few trees, for laws that ask for no good fit."""

    def fitted(tables: Any, marginals: Any, layout: Any, used: Any, effort: Effort, **how: Any):
        fewer = replace(effort, steps=min(effort.steps, 20))
        return fit_mixture(tables, marginals, layout, used, fewer, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen, "fit_mixture", fitted)
        patch.setattr(labels, "_TREES", 6)
        yield


@pytest.fixture(scope="session")
def adult() -> Table:
    """The first 2000 Adult rows, without `education-num`, the twin of `education`."""
    table = datasets.load("adult")
    names = [name for name in table.schema.names if name != "education-num"]
    return table.take(np.arange(2000)).select(names)


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, new for every test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("bank.parquet")` is a path beside the checkout; without it the test skips."""

    def find(name: str) -> Path:
        path = SHARED_DATA / name
        if not path.is_file():
            pytest.skip(f"{name} is not among the tables beside this checkout")
        return path

    return find
