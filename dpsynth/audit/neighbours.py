"""Exact nearest-neighbour distances between tables, by blocks, in two feature maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dpsynth.checks import UsageError, check_choice, check_count
from dpsynth.data import Table
from dpsynth.devices import resolve
from dpsynth.schema import Schema

__all__ = ["Features", "distances", "quantile_map", "range_map"]

# Stands for a missing number: farther than 1 from all of [0, 1], and differences are cut at 1.
MISSING = 2.0
# Entries of one block of scores on a CPU: small enough to stay near the core's cache.
BLOCK = 1 << 18
# Most entries of one on a GPU: below 2³¹, so that kernels count in 32 bits.
MOST = 1 << 30
# Queries of a block at least, where there are as many: fewer waste the matrix product.
ROWS = 128
# Keys of which one minimum is kept.
GROUP = 32
# Float32 numbers of a vector register, at most.
VECTOR = 16
# Half the distance between 1 and the next number in float32.
UNIT = 2.0**-24
# More than what numbers too small for float32 can add up to.
UNDERFLOW = 1e-30
# Score of what is no key.
FAR = 1e30


@dataclass(frozen=True, eq=False)
class Features:
    """A table as an attacker measures it.

    Attributes:
        numbers: (rows, numeric columns) float64 in [0, 1]; `MISSING` where the value is missing.
        codes: (rows, categorical columns) int64 level codes; 0 is missing, level i is i + 1.
        levels: Number of codes of each categorical column.
    """

    numbers: np.ndarray
    codes: np.ndarray
    levels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)


def range_map(schema: Schema) -> Callable[[Table], Features]:
    """Map numbers linearly from their declared bounds to [0, 1]; nothing is read off rows."""

    def scale(name: str, values: np.ndarray) -> np.ndarray:
        column = schema[name]
        assert column.lower is not None and column.upper is not None
        return (values - column.lower) / (column.upper - column.lower)

    return lambda table: _features(table, schema, scale)


def quantile_map(reference: Table) -> Callable[[Table], Features]:
    """Map numbers to the mid-rank empirical distribution function of `reference`.

    Between two reference values the function is interpolated, down to 0 and up to 1 at the
    declared bounds, so that different values stay different. Fit it on rows that are neither
    members nor holdout, or the map itself would favour one side.
    """
    schema = reference.schema
    knots = {c.name: _mid_ranks(reference, c.name) for c in schema.columns if c.numeric}

    def scale(name: str, values: np.ndarray) -> np.ndarray:
        return np.interp(values, *knots[name])

    return lambda table: _features(table, schema, scale)


def _mid_ranks(reference: Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    column = reference.schema[name]
    assert column.lower is not None and column.upper is not None
    values = reference.frame[name].to_numpy(dtype=float, na_value=np.nan)
    points, counts = np.unique(values[~np.isnan(values)], return_counts=True)
    ranks = (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1)
    if not len(points) or points[0] > column.lower:
        points, ranks = np.append(column.lower, points), np.append(0.0, ranks)
    if points[-1] < column.upper:
        points, ranks = np.append(points, column.upper), np.append(ranks, 1.0)
    return points, ranks


def _features(
    table: Table, schema: Schema, scale: Callable[[str, np.ndarray], np.ndarray]
) -> Features:
    if table.schema.columns != schema.columns:
        raise UsageError("tables under different schemas cannot be compared; use one schema")
    rows = len(table)
    numbers: list[np.ndarray] = [np.empty((rows, 0))]
    codes: list[np.ndarray] = [np.empty((rows, 0), dtype=np.int64)]
    levels: list[int] = []
    for column in schema.columns:
        values = table.frame[column.name]
        if column.numeric:
            array = values.to_numpy(dtype=float, na_value=np.nan)
            scaled = np.clip(scale(column.name, array), 0.0, 1.0)
            numbers.append(np.where(np.isnan(array), MISSING, scaled)[:, None])
        else:
            codes.append(values.cat.codes.to_numpy(dtype=np.int64)[:, None] + 1)
            levels.append(len(column.levels) + 1)
    return Features(np.hstack(numbers), np.hstack(codes), tuple(levels))


def distances(
    queries: Features,
    keys: Features,
    *,
    k: int = 1,
    power: int = 1,
    exclude_self: bool = False,
    device: str = "cpu",
) -> np.ndarray:
    """Distances from each query to its `k` nearest keys, exact to float64.

    d = (Σ_numeric |x − y|^p + number of categories that differ)^{1/p}; a missing value counts 1
    against a value and 0 against another missing one.

    A search in single precision leaves every key that its error, bounded for each query, allows
    to be among the nearest; their distances are then taken in double precision. The bound knows
    the precision that torch is told to multiply in, so TF32 is as exact and only leaves more keys.

    Args:
        queries: (rows, ...) features.
        keys: (others, ...) features under the same map.
        k: How many neighbours.
        power: p, 1 or 2.
        exclude_self: Leave out key i for query i (both are the same table).
        device: Where to search: `cpu`, `cuda`, or `auto` (a GPU if there is one).

    Returns:
        (rows, k), increasing along each row.

    Raises:
        UsageError: On too few keys, another power, tables that do not fit each other, numbers
            that no map gives, or a device that is not there.
    """
    check_count("k", k)
    check_choice("power", power, (1, 2))
    _check_features(queries, keys)
    if exclude_self and len(queries) != len(keys):
        raise UsageError(
            f"exclude_self: {len(queries)} queries and {len(keys)} keys are not one table"
        )
    if len(keys) - exclude_self < k:
        raise UsageError(f"k={k}: there are only {len(keys) - exclude_self} rows to choose from")
    place = resolve(device)
    asked, known = _Rows.of(queries, place), _Rows.of(keys, place)
    own = None
    kept = _without_copies(known, k + exclude_self)
    if len(kept) < len(keys):
        known = _Rows(known.numbers[kept], known.codes[kept])
    if exclude_self:
        own = torch.full((len(keys),), -1, device=place)
        own[kept] = torch.arange(len(kept), device=place)
    return _Search(asked, known, own, queries.levels, k, power).run()


def _check_features(queries: Features, keys: Features) -> None:
    if queries.levels != keys.levels or queries.numbers.shape[1] != keys.numbers.shape[1]:
        raise UsageError("queries and keys have different columns; map both under one schema")
    for name, numbers in (("queries", queries.numbers), ("keys", keys.numbers)):
        known = ((numbers >= 0) & (numbers <= 1)) | (numbers == MISSING)
        if not known.all():
            raise UsageError(
                f"{name}: {(~known).sum()} numbers are neither in 0..1 nor {MISSING} for missing; "
                "map the table first"
            )


@dataclass(frozen=True, eq=False)
class _Rows:
    """Features on a device: `numbers` float64 and `codes` int64, (rows, columns) each."""

    numbers: Tensor
    codes: Tensor

    @classmethod
    def of(cls, features: Features, place: torch.device) -> _Rows:
        parts = (np.ascontiguousarray(part) for part in (features.numbers, features.codes))
        return cls(*(torch.from_numpy(part).to(place) for part in parts))

    def __len__(self) -> int:
        return len(self.numbers)


def _without_copies(rows: _Rows, most: int) -> Tensor:
    """Indices of the rows that stay if no row stays more than `most` times, in order.

    Further copies cannot change the `most` smallest distances, but all tie with each other. Equal
    hashes only bring rows side by side: copies are told by their values.
    """
    draws = np.random.default_rng(0).integers(1 << 62, size=rows.numbers.shape[1] + 1) * 2 + 1
    factors = torch.from_numpy(draws).to(rows.numbers.device)
    hashes = (rows.numbers.view(torch.int64) * factors[1:]).sum(1)
    for column in rows.codes.T:
        hashes = (hashes + column) * factors[0]
    hashes, order = hashes.sort(stable=True)
    place = torch.arange(len(rows), device=order.device)
    (alike,) = (hashes[1:] == hashes[:-1]).nonzero(as_tuple=True)
    first, second = order[alike], order[alike + 1]
    same = (rows.numbers[first] == rows.numbers[second]).all(1)
    same &= (rows.codes[first] == rows.codes[second]).all(1)
    start = place.clone()
    start[alike[same] + 1] = 0
    copy = place - start.cummax(0).values
    return order[copy < most].sort().values


class _Search:
    """Nearest keys by blocks: a score of all keys in float32, then distances of those in reach.

    With x centred at the middle of its range and a missing number at 0, d^p is, up to a constant
    of the query,

        p = 2:  Σ y² − 2 Σ x y + rest        p = 1:  Σ max(2x, 2y) − Σ y + rest
        rest = Σ (1 − |x|^p) [y missing] + Σ [x missing] (1 − |y|^p) − number of equal categories

    where 1 − |x|^p counts as 0 for a missing x: all but the maxima is one matrix product.
    """

    def __init__(
        self,
        asked: _Rows,
        known: _Rows,
        own: Tensor | None,
        levels: tuple[int, ...],
        k: int,
        power: int,
    ) -> None:
        self.asked, self.known, self.own, self.k, self.power = asked, known, own, k, power
        self.tiling = _Tiling.of(len(asked), len(known), k, asked.numbers.device)
        left, right = _factors(asked, known, levels, power)
        extra = self.tiling.padded - len(known)
        columns = asked.numbers.shape[1] if power == 1 else 0
        terms = left.shape[1] - sum(levels) + len(levels) + columns
        self.error = _error(left, right, columns, terms)
        self.left, self.right = left, pad(right, (0, 0, 0, extra))
        # No key: farther than any, and not infinite, since 0 times infinity is none.
        self.right[len(known) :, -1] = FAR
        self.mine = _doubled(asked).T.contiguous()[:columns]
        self.theirs = pad(_doubled(known), (0, 0, 0, extra)).T.contiguous()[:columns]
        size = (self.tiling.rows, self.tiling.columns)
        self.block = torch.empty(size, device=left.device)
        self.gap = torch.empty_like(self.block) if power == 1 else self.block  # for maxima only

    def run(self) -> np.ndarray:
        """Distances (rows, k)."""
        starts = range(0, len(self.asked), self.tiling.rows)
        parts = [
            self._nearest(slice(s, min(s + self.tiling.rows, len(self.asked)))) for s in starts
        ]
        found = torch.cat(parts) if parts else torch.empty(0, self.k, dtype=torch.float64)
        return (found.sqrt() if self.power == 2 else found).cpu().numpy()

    def _nearest(self, part: slice) -> Tensor:
        """d^p (rows of `part`, k): of the groups of keys that the error leaves in reach."""
        lowest = self._lowest(part)
        nearest = lowest.topk(self.k, largest=False).values[:, -1] if self.k > 1 else lowest.amin(1)
        # k keys are known to score no more than `nearest`, so are at most one error above it; a
        # nearer one scores at most another error more. Rounding must not lower the bar.
        bar = (nearest.double() + 2 * self.error[part]).float()
        bar = bar.nextafter(torch.full_like(bar, torch.inf))
        # The one place where the host waits for the device.
        owner, group = (lowest <= bar[:, None]).nonzero(as_tuple=True)
        best = torch.full((len(bar), self.k), torch.inf, dtype=torch.float64, device=bar.device)
        wide = max(1, self.asked.numbers.shape[1] + self.asked.codes.shape[1])
        pieces = max(1, self.tiling.entries // (self.tiling.group * wide))
        for mine, theirs in zip(owner.split(pieces), group.split(pieces), strict=True):
            far = self._exact(mine + part.start, self.tiling.members(theirs))
            far = far.topk(min(self.k, far.shape[1]), largest=False).values
            best = _smallest(best, mine, far)
        return best

    def _lowest(self, part: slice) -> Tensor:
        """Lowest score in each group of keys: float32 (rows of `part`, groups)."""
        rows, tiling = part.stop - part.start, self.tiling
        lowest = torch.empty(rows, tiling.groups, device=self.left.device)
        block, gap = self.block[:rows], self.gap[:rows]
        for number, low in enumerate(range(0, tiling.padded, tiling.columns)):
            keys = slice(low, low + tiling.columns)
            torch.mm(self.left[part], self.right[keys].T, out=block)
            for mine, theirs in zip(self.mine[:, part], self.theirs[:, keys], strict=True):
                block.add_(torch.maximum(mine[:, None], theirs, out=gap))
            if self.own is not None:
                _hide(block, self.own[part] - low)
            span = tiling.columns // tiling.group
            parts = block.view(rows, tiling.group, span)
            lowest[:, number * span : (number + 1) * span] = parts.amin(1)
        return lowest

    def _exact(self, asked: Tensor, members: Tensor) -> Tensor:
        """d^p in float64: rows `asked` (pairs,) to the keys `members` (pairs, group)."""
        inside = members < len(self.known)
        if self.own is not None:
            inside &= members != self.own[asked, None]
        members = members.clamp(max=len(self.known) - 1)
        gaps = self.asked.numbers[asked, None] - self.known.numbers[members]
        gaps = gaps.abs_().clamp_(max=1.0)
        whole = (gaps.square_() if self.power == 2 else gaps).sum(2)
        whole += (self.asked.codes[asked, None] != self.known.codes[members]).sum(2)
        return whole.where(inside, torch.inf)


@dataclass(frozen=True)
class _Tiling:
    """How the matrix of scores is cut: tiles, and groups of keys a span apart within a tile."""

    rows: int
    columns: int
    padded: int
    group: int
    entries: int

    @classmethod
    def of(cls, queries: int, keys: int, k: int, place: torch.device) -> _Tiling:
        entries = BLOCK
        if place.type == "cuda":
            # Two blocks and what the exact step makes of as many entries, with room to spare.
            entries = min(MOST, torch.cuda.mem_get_info(place)[0] // 64)
        # At least k groups, for k of their minima are k keys.
        group = min(GROUP, max(1, keys // (8 * k)))
        tiles = -(-keys // max(group, entries // ROWS))
        # Spans of whole vectors: anything else is several times slower on a CPU.
        span = -(-keys // (tiles * group))
        columns = group * (span if span < VECTOR else VECTOR * -(-span // VECTOR))
        rows = max(1, min(queries, entries // columns))
        return cls(rows, columns, tiles * columns, group, entries)

    @property
    def groups(self) -> int:
        return self.padded // self.group

    def members(self, group: Tensor) -> Tensor:
        """Keys of each group: (groups, size of a group); numbers above all keys are padding."""
        span = self.columns // self.group
        first = group // span * self.columns + group % span
        return first[:, None] + span * torch.arange(self.group, device=group.device)


def _factors(
    asked: _Rows, known: _Rows, levels: tuple[int, ...], power: int
) -> tuple[Tensor, Tensor]:
    """Float32 (rows, n) and (keys, n): their product is the score without maxima."""
    x, y = _centred(asked), _centred(known)
    lack_x, lack_y = asked.numbers == MISSING, known.numbers == MISSING
    some_x, some_y = lack_x.any(0), lack_y.any(0)
    rest_x = (1 - x.abs() ** power).where(~lack_x, 0.0)[:, some_y]
    rest_y = (1 - y.abs() ** power).where(~lack_y, 0.0)[:, some_x]
    own = (y**2).sum(1) if power == 2 else -y.sum(1)
    left, right = ([x], [-2 * y]) if power == 2 else ([], [])
    left += [rest_x, lack_x[:, some_x], _one_hot(asked, levels), x.new_ones(len(x), 1)]
    right += [lack_y[:, some_y], rest_y, -_one_hot(known, levels), own[:, None]]
    first, second = (torch.cat([part.float() for part in side], 1) for side in (left, right))
    return first, second


def _centred(rows: _Rows) -> Tensor:
    """Numbers in ±1/2, 0 where missing."""
    return (rows.numbers - 0.5).where(rows.numbers != MISSING, 0.0)


def _doubled(rows: _Rows) -> Tensor:
    return (2 * _centred(rows)).float()


def _one_hot(rows: _Rows, levels: tuple[int, ...]) -> Tensor:
    """(rows, Σ levels) float32."""
    starts = np.concatenate([[0], np.cumsum(levels)[:-1]]).astype(np.int64)[: len(levels)]
    places = rows.codes + torch.from_numpy(starts).to(rows.codes.device)
    hot = torch.zeros(len(rows), sum(levels), device=rows.codes.device)
    return hot.scatter_(1, places, 1.0)


def _error(left: Tensor, right: Tensor, columns: int, terms: int) -> Tensor:
    """Most that a score of each query can be off by: float64 (rows,).

    A sum of n products of numbers rounded by u is off by (n + 2) u Σ |a b| or less in any order
    (Higham 2002, section 3.1); products with 0, all but one of a category's, add nothing. What a
    coarser format of the products adds is told by `_roundoff`. The units are doubled, which covers
    the second order and the rounding of this very sum.
    """
    weight = (left.abs() * right.abs().amax(0)).sum(1, dtype=torch.float64) + columns
    coarse = _roundoff(left.device)
    # Tensor cores cut sums off instead of rounding them, after a few products at a time.
    unit = UNIT if coarse == UNIT else 4 * UNIT
    return (2 * (terms + 4) * unit + 3 * coarse) * weight + UNDERFLOW


def _roundoff(place: torch.device) -> float:
    """What float32 numbers may be rounded by before they are multiplied, as torch is set."""
    backend: Any = torch.backends.cuda if place.type == "cuda" else torch.backends.mkldnn
    precision = str(backend.matmul.fp32_precision)
    if precision in ("none", "ieee"):
        return UNIT
    # TF32 and bfloat16 keep 10 and 7 bits, and may be cut off instead of rounded.
    return 2.0**-10 if precision == "tf32" else 2.0**-7


def _hide(block: Tensor, column: Tensor) -> None:
    """Set one column of each row to infinity in place, where it lies inside; no host sync."""
    inside = (column >= 0) & (column < block.shape[1])
    column = column.where(inside, 0)[:, None]
    block.scatter_(1, column, block.gather(1, column).masked_fill_(inside[:, None], torch.inf))


def _smallest(best: Tensor, owner: Tensor, found: Tensor) -> Tensor:
    """The k smallest values of each row, out of `best` (rows, k) and `found` (pairs, few)."""
    rows = torch.arange(len(best), device=best.device)
    who = torch.cat(
        [rows[:, None].expand_as(best).ravel(), owner[:, None].expand_as(found).ravel()]
    )
    value, order = torch.cat([best.ravel(), found.ravel()]).sort()
    who, order = who[order].sort(stable=True)
    first = torch.searchsorted(who, rows)
    return value[order[first[:, None] + torch.arange(best.shape[1], device=best.device)]]
