"""Neighbour features: what rows of a synthetic table around a candidate look like, in numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dpsynth.audit.neighbours import Features, distances, quantile_map, range_map
from dpsynth.checks import UsageError
from dpsynth.data import Table

__all__ = ["neighbour_features"]

# Neighbours searched for, and those whose distances are told.
NEIGHBOURS = 8
TOLD = (1, 2, 3, 5, 8)
# Added to distances before the logarithm: far below any distance between two different rows.
FLOOR = 1e-6


def neighbour_features(
    candidates: Table,
    synthetic: Table,
    reference: Table | None,
    rng: np.random.Generator,
    *,
    device: str = "cpu",
) -> pd.DataFrame:
    """Features of each candidate on one synthetic table, for a classifier to learn from.

    In two metrics (L1 over quantiles, L2 over declared ranges): log distances to the k-th nearest
    synthetic and reference rows, their log-ratios, the ratio of nearest to second nearest, and how
    many of the nearest synthetic rows lie within the reference's distances. Further the log
    numbers of rows of the same categories, and the candidate's own values, which tell the
    classifier where what distance is small.

    Args:
        candidates: (rows,) asked about.
        synthetic: What the generator put out.
        reference: Rows of the population that it did not see; one as large as the synthetic table
            is drawn from more. Without one the columns that need it are absent.
        rng: Of that draw.
        device: Where neighbours are searched; it changes no feature.

    Returns:
        (rows, features) of finite float32, but NaN for a missing value of the candidate.

    Raises:
        UsageError: On an empty table, or tables under different schemas.
    """
    parts = {"synthetic": synthetic}
    if reference is not None:
        size = min(len(synthetic), len(reference))
        parts["reference"] = reference.take(rng.permutation(len(reference))[:size])
    for name, table in parts.items():
        if not len(table):
            raise UsageError(f"{name} table has no rows; there is no neighbour to look at")
    ranked = quantile_map(synthetic if reference is None else reference)
    ranged = range_map(candidates.schema)
    columns: dict[str, np.ndarray] = {}
    for metric, measure, power in (("quantile", ranked, 1), ("range", ranged, 2)):
        asked = measure(candidates)
        far = {
            name: _nearest(asked, measure(table), power, device) for name, table in parts.items()
        }
        columns |= {f"{metric} {name}": values for name, values in _of_metric(far).items()}
    asked = ranked(candidates)
    for name, table in parts.items():
        columns[f"log like {name}"] = np.log1p(_alike(asked.codes, ranked(table).codes))
    return pd.DataFrame({**columns, **_values(candidates, asked)}, dtype=np.float32)


def _nearest(asked: Features, keys: Features, power: int, device: str) -> np.ndarray:
    """Distances (rows, NEIGHBOURS); where there are fewer keys the farthest one counts again."""
    k = min(NEIGHBOURS, len(keys))
    found = distances(asked, keys, k=k, power=power, device=device)
    return np.pad(found, ((0, 0), (0, NEIGHBOURS - k)), mode="edge")


def _of_metric(far: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    logs = {name: np.log(values + FLOOR) for name, values in far.items()}
    made, columns = logs["synthetic"], {}
    for k in TOLD:
        for name, values in logs.items():
            columns[f"log d{k} {name}"] = values[:, k - 1]
    columns["log d1/d2"] = made[:, 0] - made[:, 1]
    if "reference" in logs:
        known = logs["reference"]
        for k in TOLD:
            columns[f"log ratio {k}"] = known[:, k - 1] - made[:, k - 1]
            columns[f"within {k}"] = (far["synthetic"] <= far["reference"][:, [k - 1]]).sum(axis=1)
    return columns


def _alike(asked: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How many keys share all categories of each asked row: (rows,) of codes (rows, columns)."""
    both = np.concatenate([asked, keys])
    if not both.shape[1]:
        return np.full(len(asked), len(keys))
    _, group = np.unique(both, axis=0, return_inverse=True)
    group = group.ravel()
    return np.bincount(group[len(asked) :], minlength=group.max() + 1)[group[: len(asked)]]


def _values(candidates: Table, asked: Features) -> dict[str, np.ndarray]:
    """Ranks of numbers and codes of levels, NaN where missing."""
    numeric = [column.name for column in candidates.schema.columns if column.numeric]
    others = [column.name for column in candidates.schema.columns if not column.numeric]
    columns = {}
    for place, name in enumerate(numeric):
        gone = candidates.frame[name].isna().to_numpy(bool)
        columns[f"value {name}"] = np.where(gone, np.nan, asked.numbers[:, place])
    for place, name in enumerate(others):
        codes = asked.codes[:, place]
        columns[f"value {name}"] = np.where(codes == 0, np.nan, codes)
    return columns
