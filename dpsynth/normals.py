"""Standard normals from random words: a table of uniform strips, and what is left by rejection.

The normal density is cut into strips of width 2^-6. The floor of each strip, rounded down to a
whole number of cells of mass 2^-16, is a uniform law: 16 bits of a word choose one of 2^16 cells,
the other 48 a place in its strip. That leaves 1 % of the mass, between floor and density and beyond
the last strip; a word that falls there is drawn again from just that law, by rejection under
straight lines (and, beyond the last strip, under an exponential as Marsaglia, 1964).

Before it is rounded to a lattice, a draw has the normal law within 1e-16 in total variation: floors
and their masses are exact, and only the rejection of that 1 % compares float64 numbers. The lattice
has steps of 2^-54 (2^-59 where a word was drawn again), then the sum is rounded as any float64 is;
so a grid of 2^25 cells a deviation sees 2^26 points a cell up to 4. The tails are right to 1e-8 up
to 8.4 deviations and end at 13.2. Arithmetic is IEEE's but for exp and log in the 1 %.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fill", "Redraw", "normals"]

Reals = NDArray[np.floating[Any]]
Words = NDArray[np.uint64]
Places = NDArray[np.intp]

# Puts 64 random bits into each element of a block that begins at a place.
Fill = Callable[[int, Reals], None]
# Four words for each of some places, the same whenever (place, attempt) is the same.
Redraw = Callable[[Places, int], Words]

_BITS: Final = 16
_FINE: Final = 64 - _BITS
_WIDTH: Final = 2.0**-6
_STRIPS: Final = 255
_LAST: Final = _STRIPS * _WIDTH

# Words that are worked on at a time: they stay in the processor's cache.
_BLOCK: Final = 1 << 14

_SHIFT: Final = np.uint64(_FINE)
_FINE_MASK: Final = np.uint64((1 << _FINE) - 1)
# 48 bits under this exponent read as a float64 in [¼, ¼ + 2^-6).
_EXPONENT: Final = np.uint64((1023 - 2) << 52)
_OFFSET: Final = 0.25


def _shape(x: Reals) -> Reals:
    """The normal density in units of its height at 0: all heights here are in these."""
    return np.exp(-0.5 * x * x)


_EDGES: Final = np.arange(_STRIPS + 1) * _WIDTH
_LEFT: Final = _EDGES[:-1]
# Height at which a strip holds the mass of one cell.
_CELL: Final = math.sqrt(2 * math.pi) / (_WIDTH * 2**_BITS)
# Cells under each strip's floor; the density falls, so its floor is at the right edge.
_CELLS: Final = np.floor(_shape(_EDGES[1:]) / _CELL).astype(np.intp)
_KEPT: Final = 2 * int(_CELLS.sum())


def _starts() -> Reals:
    """Left end of each cell's strip, less the offset of the fine part; 0 where there is none."""
    right = np.repeat(_LEFT, _CELLS)
    starts = np.zeros(2**_BITS)
    starts[:_KEPT] = np.concatenate([right, -right - _WIDTH]) - _OFFSET
    return starts


def _lines() -> tuple[Reals, Reals]:
    """Height at the right end and drop of a line over each strip that the density stays below.

    The tangent at the middle where the density is concave (|x| ≤ 1), the chord where it is convex.
    """
    middle = _LEFT + _WIDTH / 2
    left, right = _shape(_LEFT), _shape(_EDGES[1:])
    concave = _LEFT < 1
    drop = np.where(concave, _WIDTH * middle * _shape(middle), left - right)
    low = np.where(concave, _shape(middle) - drop / 2, right)
    return low, drop


def _alias(mass: Reals) -> tuple[Reals, Places]:
    """Walker's tables by Vose (1991): keep place i with probability `keep[i]`, else `other[i]`."""
    keep, other = mass * (mass.size / mass.sum()), np.arange(mass.size)
    small = [i for i in range(mass.size) if keep[i] < 1]
    large = [i for i in range(mass.size) if keep[i] >= 1]
    while small and large:
        low, high = small.pop(), large[-1]
        other[low] = high
        keep[high] -= 1 - keep[low]
        if keep[high] < 1:
            small.append(large.pop())
    for rest in (*small, *large):
        keep[rest] = 1.0
    return keep, other


def _parts() -> tuple[Reals, Reals]:
    """Mass of each part of the law below the lines, on one side; what a draw needs to know of it.

    Parts: a rectangle for each strip, a triangle for each strip, the tail, and one of no mass, so
    that they are 2^9. Rows: left end, line above the floor there, drop of the line, floor, and what
    keeps the second of two draws from counting (1 in a rectangle, 0 in a triangle).
    """
    low, drop = _lines()
    floor = _CELLS * _CELL
    tail = _shape(np.array([_LAST])) / _LAST
    mass = np.concatenate([(low - floor) * _WIDTH, drop * _WIDTH / 2, tail, [0.0]])
    strips = np.stack([_LEFT, low + drop - floor, drop, floor, np.ones(_STRIPS)])
    triangles = strips * [[1], [1], [1], [1], [0]]
    return mass, np.concatenate([strips, triangles, np.zeros((5, 2))], axis=1)


_STARTS: Final = _starts()
_TAIL: Final = 2 * _STRIPS
_MASS, _ROWS = _parts()
_KEEP, _OTHER = _alias(_MASS)


class _Scratch(threading.local):
    """Buffers of one thread: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self.cells = np.empty(_BLOCK, np.intp)
        self.starts = np.empty(_BLOCK)


_scratch = _Scratch()


def normals(out: Reals, words: Fill, redraw: Redraw) -> None:
    """Put a standard normal into each element of `out`, from one word each.

    Args:
        out: Contiguous, in one dimension.
        words: Called for one block after the other, which make up `out`.
        redraw: Called with the places that are left, for attempts 0, 1, …; the words of a
            (place, attempt) must be independent of all others.
    """
    left = [np.empty(0, np.intp)]
    for at in range(0, out.size, _BLOCK):
        block = out[at : at + _BLOCK]
        words(at, block)
        left.append(_look_up(block) + at)
    places, attempt = np.concatenate(left), 0
    while places.size:
        drawn, accepted = _redrawn(redraw(places, attempt))
        out[places[accepted]] = drawn[accepted]
        places, attempt = places[~accepted], attempt + 1


def _look_up(block: Reals) -> Places:
    """Turn words into the draws that the table gives; returns the places where it gives none."""
    bits = block.view(np.uint64)
    cells, starts = _scratch.cells[: block.size], _scratch.starts[: block.size]
    np.right_shift(bits, _SHIFT, out=cells.view(np.uint64))
    # No cell is out of range; of the modes that do not check first, this one is the fastest.
    _STARTS.take(cells, out=starts, mode="wrap")
    np.bitwise_and(bits, _FINE_MASK, out=bits)
    np.bitwise_or(bits, _EXPONENT, out=bits)
    np.add(block, starts, out=block)
    return (cells >= _KEPT).nonzero()[0]


def _redrawn(words: Words) -> tuple[Reals, NDArray[np.bool_]]:
    """Draws from what the table leaves out, and which of them are accepted.

    A draw falls in one part below the lines, uniformly: in a rectangle at u, in a triangle (which
    falls to the right) at the lesser of u and v. Ten bits of the first word that its uniform draw
    does not use choose part and sign.
    """
    choice, u, v, height = (words.T >> np.uint64(11)) * 2.0**-53
    spare = words[:, 0].astype(np.intp)
    part = spare & 511
    part = np.where(choice < _KEEP.take(part), part, _OTHER.take(part))
    left, line, drop, floor, single = _ROWS.take(part, axis=1)
    at = np.minimum(u, v + single)
    size = left + _WIDTH * at
    accepted = height * (line - drop * at) < _shape(size) - floor
    tail = np.flatnonzero(part == _TAIL)
    if tail.size:
        beyond = -np.log1p(-u[tail]) / _LAST
        size[tail] = _LAST + beyond
        accepted[tail] = height[tail] < _shape(beyond)
    return np.where(spare & 512, -size, size), accepted
