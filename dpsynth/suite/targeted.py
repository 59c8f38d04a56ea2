"""Targeted queries (TAPAS, Houssiau et al. 2022): does the table count too many rows like this one?

Attacked are Achilles records, the outliers that a generator finds hardest to hide. A query asks how
many synthetic rows agree with the record on a random subset of columns; what the answers look like
with and without the record is learnt from shadow models, for each record by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dpsynth.audit.neighbours import distances, quantile_map
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.devices import resolve

__all__ = ["Queries", "achilles", "targeted_scores"]

NEIGHBOURS = 5
QUANTILES = 10


def achilles(rows: Table, reference: Table, count: int, *, device: str = "cpu") -> np.ndarray:
    """The `count` rows with the largest mean distance to their 5 nearest reference rows, in L1 over
    reference quantiles.

    Args:
        rows: Where to look.
        reference: What the attacker knows of the population; none of `rows`.
        count: How many.
        device: Where neighbours are searched.

    Returns:
        Their positions, ascending (count,).

    Raises:
        UsageError: On a count that is not in 1..rows, or too few reference rows.
    """
    check_count("count of Achilles records", count)
    if count > len(rows):
        raise UsageError(f"count of Achilles records={count}: there are only {len(rows)} rows")
    measure = quantile_map(reference)
    near = distances(measure(rows), measure(reference), k=NEIGHBOURS, device=device)
    return np.sort(np.argsort(-near.mean(axis=1), kind="stable")[:count])


@dataclass(frozen=True, eq=False)
class Queries:
    """Random subsets of columns, and the bins in which numbers agree.

    Attributes:
        subsets: Which columns a query looks at (queries, D) bool.
        edges: Inner bin edges of each numeric column, by name.
    """

    subsets: np.ndarray
    edges: dict[str, np.ndarray]

    @classmethod
    def draw(cls, count: int, reference: Table, rng: np.random.Generator) -> Queries:
        """`count` subsets, each size from 1 to D as likely as any other; bins are tenths of the
        reference rows."""
        check_count("count of queries", count)
        columns = reference.schema.columns
        sizes = rng.integers(1, len(columns) + 1, count)
        order = rng.random((count, len(columns))).argsort(axis=1)
        shares = np.arange(1, QUANTILES) / QUANTILES
        edges = {
            c.name: np.unique(np.quantile(_numbers(reference, c.name, missing=False), shares))
            for c in columns
            if c.numeric and len(_numbers(reference, c.name, missing=False))
        }
        return cls(order < sizes[:, None], edges)

    def counts(self, records: Table, synthetic: Table, *, device: str = "cpu") -> np.ndarray:
        """How many synthetic rows agree with each record on each subset (records, queries)."""
        place = resolve(device)
        asked, known = (
            torch.from_numpy(self._bins(part)).to(place) for part in (records, synthetic)
        )
        # A row agrees with a subset where it differs in none of its columns.
        subsets = torch.from_numpy(self.subsets.T.astype(np.float32)).to(place)
        found = [((known != one).float() @ subsets == 0).sum(0) for one in asked]
        return torch.stack(found).cpu().numpy()

    def _bins(self, table: Table) -> np.ndarray:
        """Level codes, or the number of the bin (rows, D); a missing value is a bin of its own."""
        columns = []
        for column in table.schema.columns:
            if column.numeric:
                values = _numbers(table, column.name)
                edges = self.edges.get(column.name, np.empty(0))
                bins = np.searchsorted(edges, values, side="right")
                columns.append(np.where(np.isnan(values), -1, bins))
            else:
                columns.append(table.frame[column.name].cat.codes.to_numpy())
        return np.column_stack(columns).astype(np.int16)


def targeted_scores(own: np.ndarray, shadows: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Membership by a ridge regression of the coins on the answers, for each record by itself: with
    fewer shadows than queries a linear rule is all that can be learnt, and it is in closed form.

    Args:
        own: Answers about the audited table (records, queries).
        shadows: Answers about the shadows' tables (models, records, queries).
        inside: Which of them saw which record (models, records) bool.

    Returns:
        What the regression, with penalty `queries` on log(1 + answer) of unit variance over
        shadows, says of the coin less its mean: (records,), higher for a member.

    Raises:
        UsageError: On shapes that do not fit together, or a record without shadows of both kinds.
    """
    if own.ndim != 2 or shadows.shape[1:] != own.shape or inside.shape != shadows.shape[:2]:
        raise UsageError(
            f"answers of shapes {own.shape}, {shadows.shape} and coins {inside.shape}: give "
            "(records, queries), (models, records, queries) and (models, records)"
        )
    if not (inside.any(axis=0) & ~inside.all(axis=0)).all():
        raise UsageError("inside: a record has no IN or no OUT model; train more shadows")
    logs, asked = np.log1p(shadows.swapaxes(0, 1)), np.log1p(own)
    mean = logs.mean(axis=1)
    # An answer that never differs says nothing.
    scale = np.where(np.ptp(logs, axis=1) > 0, logs.std(axis=1), np.inf)
    seen = (logs - mean[:, None]) / scale[:, None]
    coins = inside.T - inside.T.mean(axis=1, keepdims=True)
    # The dual form: as many unknowns as shadows.
    kernel = seen @ seen.mT + own.shape[1] * np.eye(len(shadows))
    weights = np.linalg.solve(kernel, coins[..., None])
    slopes = (seen.mT @ weights)[..., 0]
    return ((asked - mean) / scale * slopes).sum(axis=1)


def _numbers(table: Table, name: str, *, missing: bool = True) -> np.ndarray:
    values = table.frame[name].to_numpy(dtype=float, na_value=np.nan)
    return values if missing else values[~np.isnan(values)]
