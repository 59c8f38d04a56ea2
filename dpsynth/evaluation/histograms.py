"""Counts of the cells of many subsets of columns, in as few passes over the rows as will do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.devices import resolve

__all__ = ["DENSE_CELLS", "counted", "histograms"]

DENSE_CELLS = 1 << 22  # contingency tables up to here are counted densely, larger ones by sorting
# Cells of a joint counted for the sake of several subsets: few enough to stay near the core.
SHARED_CELLS = 1 << 15
# Cell numbers held at once, unless one joint alone has more, and cells counted at once.
ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 27}
LARGEST = 2**63 - 1


def histograms(
    tables: Sequence[np.ndarray],
    levels: Sequence[int] | np.ndarray,
    subsets: Iterable[tuple[int, ...]],
    *,
    device: str = "cpu",
) -> list[np.ndarray]:
    """Count the cells of the joint of each subset of columns, in each table.

    Subsets are counted together: a joint of few cells serves all subsets of its columns, which
    are sums of it. The result does not depend on that, nor on the device.

    Args:
        tables: Integer codes (rows, columns), column j in `0..levels[j]-1`; as many as wanted.
        levels: Number of codes a column.
        subsets: Distinct columns each; in a cell's number the first counts most.
        device: Where to count: `cpu`, `cuda`, or `auto` (a GPU if there is one).

    Returns:
        A subset: int64 (tables, cells). All cells in order, empty ones too, up to `DENSE_CELLS`
        of them; beyond, only the cells that occur in any of the tables, in order.

    Raises:
        UsageError: On codes outside their levels, tables of other widths, a subset that is empty
            or names a column twice or one that is not there, or a device that is not there.
    """
    wanted = list(subsets)
    found = dict(counted(tables, levels, wanted, device=device))
    return [found[number] for number in range(len(wanted))]


def counted(
    tables: Sequence[np.ndarray],
    levels: Sequence[int] | np.ndarray,
    subsets: Sequence[tuple[int, ...]],
    *,
    device: str = "cpu",
) -> Iterator[tuple[int, np.ndarray]]:
    """`histograms` one by one, as (position in `subsets`, counts) in the order that suits counting.

    Whoever keeps a figure of each needs no room for all of them.
    """
    sizes, place = [int(size) for size in levels], resolve(device)
    _check(tables, sizes, subsets)
    return _counted(tables, sizes, subsets, place)


def _counted(
    tables: Sequence[np.ndarray],
    sizes: list[int],
    wanted: Sequence[tuple[int, ...]],
    place: torch.device,
) -> Iterator[tuple[int, np.ndarray]]:
    on_device = [torch.from_numpy(np.ascontiguousarray(codes.T)).to(place) for codes in tables]
    left = set(range(len(wanted)))
    if joints := _joints(wanted, sizes):
        narrow = [codes.int() for codes in on_device]
        for joint, counts in zip(joints, _dense(narrow, joints, sizes), strict=True):
            left -= set(joint.subsets)
            for number in joint.subsets:
                yield number, _margin(counts, joint.columns, wanted[number], sizes)
    for number in sorted(left):
        yield number, _sparse(on_device, wanted[number], sizes)


def _check(
    tables: Sequence[np.ndarray], sizes: list[int], subsets: Sequence[tuple[int, ...]]
) -> None:
    width = len(sizes)
    for number, codes in enumerate(tables):
        if codes.ndim != 2 or codes.shape[1] != width or codes.dtype.kind not in "iu":
            raise UsageError(
                f"table {number} is {codes.dtype} of shape {codes.shape}; give whole codes "
                f"(rows, {width})"
            )
        low, high = codes.min(axis=0, initial=0), codes.max(axis=0, initial=0)
        for j in np.flatnonzero((low < 0) | (high >= np.array(sizes))):
            raise UsageError(
                f"table {number}, column {j}: codes {low[j]}..{high[j]} are not all in "
                f"0..{sizes[j] - 1}"
            )
    for subset in subsets:
        if not subset or len(set(subset)) < len(subset) or not set(subset) <= set(range(width)):
            raise UsageError(f"subset {subset}: give distinct columns of 0..{width - 1}")


@dataclass(frozen=True)
class _Joint:
    """Columns that are counted together, and the numbers of the subsets that they serve."""

    columns: tuple[int, ...]
    subsets: tuple[int, ...]


def _joints(wanted: Sequence[tuple[int, ...]], sizes: list[int]) -> list[_Joint]:
    """Joints that serve every subset of at most `DENSE_CELLS` cells, the widest subsets first.

    Greedy: what a joint does not cost, because it stays within `SHARED_CELLS`, it takes on: the
    column that serves most subsets that are still to be counted.
    """
    open_sets = {
        number: frozenset(subset)
        for number, subset in enumerate(wanted)
        if prod(sizes[j] for j in subset) <= DENSE_CELLS
    }
    joints = []
    for number in sorted(open_sets, key=lambda n: -len(wanted[n])):
        if number not in open_sets:
            continue
        columns = wanted[number]
        while (more := _widen(set(columns), open_sets.values(), sizes)) is not None:
            columns = (*columns, more)
        served = tuple(n for n, subset in open_sets.items() if subset <= set(columns))
        for n in served:
            del open_sets[n]
        joints.append(_Joint(columns, served))
    return joints


def _widen(columns: set[int], subsets: Iterable[frozenset[int]], sizes: list[int]) -> int | None:
    """The column that, added, makes most further subsets part of `columns`; None without any."""
    cells, gains = prod(sizes[j] for j in columns), dict[int, int]()
    for subset in subsets:
        missing = subset - columns
        if len(missing) == 1:
            (one,) = missing
            if cells * sizes[one] <= SHARED_CELLS:
                gains[one] = gains.get(one, 0) + 1
    return max(gains, key=lambda j: (gains[j], -j), default=None)


def _dense(tables: list[Tensor], joints: list[_Joint], sizes: list[int]) -> Iterator[np.ndarray]:
    """Counts (tables, cells) of each joint; `tables` are int32 (columns, rows).

    As many joints as fit go into one count, each table of each with cell numbers of its own.
    """
    rows = sum(table.shape[1] for table in tables)
    most = ENTRIES[tables[0].device.type]
    # One buffer for all counts: fresh pages cost more than the counting.
    room = torch.empty(
        max(rows, min(most, rows * len(joints))), dtype=torch.int32, device=tables[0].device
    )
    batch, numbers, cells = [], 0, 0
    for joint in joints:
        size = len(tables) * prod(sizes[j] for j in joint.columns)
        if batch and (numbers + rows > most or cells + size > most):
            yield from _count(tables, batch, sizes, room)
            batch, numbers, cells = [], 0, 0
        batch, numbers, cells = [*batch, joint], numbers + rows, cells + size
    yield from _count(tables, batch, sizes, room)


def _count(
    tables: list[Tensor], joints: list[_Joint], sizes: list[int], room: Tensor
) -> list[np.ndarray]:
    """Counts (tables, cells) of each joint, by one count of all of them; `room` is written."""
    cells = [prod(sizes[j] for j in joint.columns) for joint in joints]
    total, lengths = len(tables) * sum(cells), [table.shape[1] for table in tables]
    numbers = room[: len(joints) * sum(lengths)]
    if total > torch.iinfo(numbers.dtype).max:
        numbers = numbers.long()
    parts, offset = iter(numbers.split(lengths * len(joints))), 0
    for joint, size in zip(joints, cells, strict=True):
        for table, part in zip(tables, parts, strict=False):
            _number(table, joint.columns, sizes, part)
            if offset:
                part.add_(offset)
            offset += size
    counts = torch.bincount(numbers, minlength=total).cpu().numpy()
    sides = np.split(counts, len(tables) * np.cumsum(cells)[:-1])
    return [side.reshape(len(tables), -1) for side in sides]


def _number(table: Tensor, columns: tuple[int, ...], sizes: list[int], cells: Tensor) -> None:
    """Write mixed-radix cell numbers into `cells` (rows,)."""
    cells.copy_(table[columns[0]])
    for j in columns[1:]:
        torch.add(table[j], cells, alpha=sizes[j], out=cells)


def _margin(
    counts: np.ndarray, columns: tuple[int, ...], subset: tuple[int, ...], sizes: list[int]
) -> np.ndarray:
    """Counts (tables, cells) of a subset, from those of a joint that holds it."""
    if columns == subset:
        return counts
    cube = counts.reshape(len(counts), *(sizes[j] for j in columns))
    kept = [j for j in columns if j in subset]
    cube = cube.sum(axis=tuple(1 + i for i, j in enumerate(columns) if j not in subset))
    order = [1 + kept.index(j) for j in subset]
    return cube.transpose(0, *order).reshape(len(counts), -1)


def _sparse(tables: list[Tensor], subset: tuple[int, ...], sizes: list[int]) -> np.ndarray:
    """Counts (tables, cells) of the cells that occur.

    Before a cell number would leave 64 bits, the numbers in use are renumbered in order; there
    are at most as many as rows, so any number of columns goes in.
    """
    together = torch.cat([table[list(subset)] for table in tables], dim=1).long()
    cells, size = together[0], sizes[subset[0]]
    for codes, j in zip(together[1:], subset[1:], strict=True):
        if size > LARGEST // sizes[j]:
            seen, cells = torch.unique(cells, return_inverse=True)
            size = len(seen)
        cells, size = cells * sizes[j] + codes, size * sizes[j]
    seen, cells = torch.unique(cells, return_inverse=True)
    parts = cells.split([table.shape[1] for table in tables])
    counts = [torch.bincount(part, minlength=len(seen)) for part in parts]
    return torch.stack(counts).cpu().numpy()
