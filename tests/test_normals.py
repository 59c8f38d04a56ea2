"""Normals from words: their law, computed exactly from table and rejection, and seen in draws."""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import special, stats

from dpsynth import normals
from dpsynth.randomness import FleetRng

KEY = 9 << 240
WIDTH, STRIPS, LAST = normals._WIDTH, normals._STRIPS, normals._LAST


# The law, exactly


def looked_up(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the table makes of these words, and which of them it decides."""
    drawn = np.array(words, np.uint64).view(np.float64)
    decided = np.ones(drawn.size, bool)
    for at in range(0, drawn.size, normals._BLOCK):
        decided[at + normals._look_up(drawn[at : at + normals._BLOCK])] = False
    return drawn, decided


def table() -> np.ndarray:
    """Probability with which the table gives each strip, strip 0 being the first right of 0."""
    cells = np.arange(2**16, dtype=np.uint64) << np.uint64(48)
    drawn, decided = looked_up(cells)
    strips = np.round(drawn[decided] / WIDTH).astype(int)
    found = np.zeros(2 * STRIPS)
    np.add.at(found, strips + STRIPS, 2.0**-16)
    return found


def redraw_words(part: np.ndarray, u: np.ndarray, v: np.ndarray, height: np.ndarray) -> np.ndarray:
    """Words with these choices, 53 bits each; the alias tables keep the part."""
    fractions = [np.zeros(part.size), u, v, height]
    words = np.stack([(f * 2.0**53).astype(np.uint64) << np.uint64(11) for f in fractions], axis=1)
    words[:, 0] |= part.astype(np.uint64)
    return words


def acceptance(part: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a redraw in this part falls, and how probably it is accepted: by bisection."""
    low, high, most = np.zeros(u.size), np.full(u.size, 2.0**53), np.full(u.size, 1 - 2.0**-53)
    size = u
    for _ in range(53):
        middle = np.floor((low + high) / 2)
        size, accepted = normals._redrawn(redraw_words(part, u, most, middle * 2.0**-53))
        low, high = np.where(accepted, middle, low), np.where(accepted, high, middle)
    return size, high * 2.0**-53


def chosen() -> np.ndarray:
    """Probability of each part of a redraw: the alias tables, undone."""
    found = normals._KEEP / 512
    np.add.at(found, normals._OTHER, (1 - normals._KEEP) / 512)
    return found


def density_errors() -> np.ndarray:
    """Relative deviation of the density of a draw from the normal one, from 0 to 8.4.

    A rejection gives the law whose density is what is proposed times how often it is accepted; the
    sum of that is known, because what the table gives and what it leaves sum to 1.
    """
    at = np.array([0.0, 0.125, 0.5, 0.75, 0.984375])
    strips = np.arange(STRIPS).repeat(at.size)
    places = np.tile(at, STRIPS)
    size, often = acceptance(strips, places)
    np.testing.assert_array_equal(size, (strips + places) * WIDTH)
    again, same = acceptance(strips + STRIPS, places)
    np.testing.assert_array_equal(size, again)
    np.testing.assert_allclose(often, same, rtol=1e-12)
    parts, left = chosen(), 1 - table().sum()
    proposed = (parts[strips] + parts[strips + STRIPS] * 2 * (1 - places)) / WIDTH
    beyond = np.linspace(0, 8.4 - LAST, 200)
    tail_u = -np.expm1(-LAST * beyond)
    tail_size, tail_often = acceptance(np.full(200, 2 * STRIPS), tail_u)
    np.testing.assert_allclose(tail_size, LAST + beyond, rtol=1e-8)
    tail = parts[-2] * LAST * np.exp(-LAST * (tail_size - LAST)) * tail_often
    x = np.concatenate([size, tail_size])
    # Both sides of 0 share a part. The proposals exceed what is left by `spare`.
    mass = normals._MASS.sum() * 2 / math.sqrt(2 * math.pi)
    kept = np.concatenate([table()[STRIPS:][strips] / WIDTH, np.zeros(200)])
    given = kept + mass * np.concatenate([proposed * often, tail]) / 2
    assert left < mass < 1.01 * left
    return given / stats.norm.pdf(x) - 1


def test_the_density_is_normal() -> None:
    """Table and rejection together, to the precision of float64, from 0 to 8.4 deviations."""
    errors = np.abs(density_errors())
    assert errors[: 5 * STRIPS].max() < 2e-15
    assert errors.max() < 1e-11
    weights = table()
    np.testing.assert_array_equal(weights, weights[::-1])
    # What the proposals leave when they are rejected is all there is: the masses sum to 1.
    inside = np.diff(special.ndtr(np.arange(STRIPS + 1) * WIDTH)) - weights[STRIPS:]
    assert (inside > 0).all()
    left = 2 * (inside.sum() + special.ndtr(-LAST))
    assert left == pytest.approx(1 - weights.sum(), abs=1e-14)


def test_lines_lie_above_the_density_and_no_acceptance_is_above_one() -> None:
    low, drop = normals._lines()
    for at in np.linspace(0, 1, 33):
        gap = low + drop * (1 - at) - normals._shape(normals._LEFT + WIDTH * at)
        assert gap.min() > -1e-16


@pytest.mark.parametrize("place", [0, 1, 40_000, 64_871])
def test_one_wrong_entry_of_the_table_is_seen(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = normals._STARTS.copy()
    wrong[place] += WIDTH
    monkeypatch.setattr(normals, "_STARTS", wrong)
    with pytest.raises(AssertionError):
        test_the_density_is_normal()


@pytest.mark.parametrize("name", ["_KEEP", "_OTHER"])
@pytest.mark.parametrize("place", [10, 300, 510])
def test_one_wrong_entry_of_the_alias_tables_is_seen(
    name: str, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = getattr(normals, name).copy()
    used = place if normals._KEEP[place] < 0.99 else int(np.argmin(normals._KEEP[:500]))
    wrong[used] = wrong[used] / 2
    monkeypatch.setattr(normals, name, wrong)
    with pytest.raises(AssertionError):
        test_the_density_is_normal()


@pytest.mark.parametrize("row", range(4))
@pytest.mark.parametrize("part", [3, 200, 400])
def test_one_wrong_line_or_floor_is_seen(
    row: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = normals._ROWS.copy()
    wrong[row, part] += WIDTH if row == 0 else 1e-6
    monkeypatch.setattr(normals, "_ROWS", wrong)
    with pytest.raises(AssertionError):
        test_the_density_is_normal()


def test_the_fine_part_is_the_lattice_it_says() -> None:
    """Bit by bit: 48 bits of a word are the place in a strip, in rational arithmetic."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, 5000, dtype=np.uint64)
    drawn, decided = looked_up(words)
    for word, value in zip(words[decided].tolist(), drawn[decided].tolist(), strict=True):
        start = Fraction(float(normals._STARTS[word >> 48])) + Fraction(1, 4)
        exact = start + Fraction(word % 2**48, 2**54)
        assert value == float(exact)
    assert 0.98 < decided.mean() < 1


def test_no_words_give_a_draw_that_is_not_finite() -> None:
    ends = np.array([0, 1, 2**63, 2**64 - 1, 2**48 - 1, 2**11 - 1], np.uint64)
    words = np.stack(np.meshgrid(ends, ends, ends, ends), axis=-1).reshape(-1, 4)
    words = np.concatenate([words, words | np.uint64(2 * STRIPS)])
    drawn, accepted = normals._redrawn(words)
    assert np.isfinite(drawn).all()
    assert (np.abs(drawn) < 14).all()
    assert accepted.any()
    longest = redraw_words(np.array([2 * STRIPS]), np.array([1 - 2.0**-53]), *np.zeros((2, 1)))
    drawn, accepted = normals._redrawn(longest)
    assert accepted.all()
    assert drawn[0] == pytest.approx(LAST + 53 * math.log(2) / LAST, rel=1e-12)


def test_what_is_rejected_is_drawn_again_at_the_same_place() -> None:
    """Words that are rejected three times, then accepted; the places of the others stay as is."""
    asked = []
    word = np.uint64(2**64 - 1)

    def words(at: int, block: np.ndarray) -> None:
        block.view(np.uint64)[:] = (np.arange(at, at + block.size) % 2 == 0) * word

    def redraw(places: np.ndarray, attempt: int) -> np.ndarray:
        asked.append((places.copy(), attempt))
        height = np.where(places // 2 % 4 <= attempt, 0.0, 1 - 2.0**-53)
        return redraw_words(np.full(places.size, 130), np.full(places.size, 0.25), height, height)

    out = np.empty(40_001)
    normals.normals(out, words, redraw)
    assert [attempt for _, attempt in asked] == [0, 1, 2, 3]
    np.testing.assert_array_equal(asked[0][0], np.arange(0, 40_001, 2))
    np.testing.assert_array_equal(asked[3][0], np.arange(6, 40_001, 8))
    assert (out[::2] == 130.25 * WIDTH).all()
    assert (out[1::2] == 0).all()


# The law, in draws

COUNT = 2_000_000


def draws(count: int = COUNT, step: int = 0) -> np.ndarray:
    return FleetRng([KEY]).at("laws", step).normal(count, dtype=torch.float64)[0].numpy()


def anderson_darling(drawn: np.ndarray) -> float:
    """A² against the standard normal (Anderson & Darling, 1954); above 9 with probability 3e-5."""
    ordered = np.sort(drawn)
    logs = special.log_ndtr(ordered) + special.log_ndtr(-ordered[::-1])
    weights = 2 * np.arange(1, drawn.size + 1) - 1
    return float(-drawn.size - (weights * logs).mean())


def moment_errors(drawn: np.ndarray) -> list[float]:
    """Deviation of moments 1 to 8 from those of the normal law, in standard errors."""
    even = [math.prod(range(1, 2 * k, 2)) for k in range(9)]  # E X^2k
    found = []
    for order in range(1, 9):
        wanted = 0 if order % 2 else even[order // 2]
        error = math.sqrt((even[order] - wanted**2) / drawn.size)
        found.append(abs(float((drawn**order).mean()) - wanted) / error)
    return found


def tail_pvalues(drawn: np.ndarray) -> list[float]:
    """Of the counts beyond 1 to 5, on each side."""
    bars = (1.0, 2.0, 3.0, 3.5, LAST, 4.5, 5.0)
    return [
        stats.binomtest(int((side > bar).sum()), drawn.size, float(stats.norm.sf(bar))).pvalue
        for side in (drawn, -drawn)
        for bar in bars
    ]


def digit_pvalues(drawn: np.ndarray) -> list[float]:
    """Uniformity of binary digits of Φ(x), eight at a time, down to 2^-40: the law at all scales.

    Left half only: there Φ(x) is a float64 with digits to spare.
    """
    left = special.ndtr(-np.abs(drawn)) * 2
    return [
        stats.chisquare(
            np.bincount((np.ldexp(left, digits).astype(np.int64) & 255), minlength=256)
        ).pvalue
        for digits in (8, 16, 24, 32, 40)
    ]


def cell_pvalues(drawn: np.ndarray) -> list[float]:
    """Uniformity of the low bits of whole cells, as a release rounds them."""
    found = []
    for cells in (2.0**22, 1.37 * 2**22, 2.0**28, 1.37 * 2**28):
        low = np.rint(drawn * cells).astype(np.int64) & 1023
        found.append(stats.chisquare(np.bincount(low, minlength=1024)).pvalue)
    return found


def correlations(drawn: np.ndarray) -> list[float]:
    """Of draws, squares and signs with those up to 40 further on, and far away, in errors."""
    lags = [*range(1, 41), 128, normals._BLOCK, normals._BLOCK // 2]
    found = []
    for law in (drawn, drawn**2 - 1, np.sign(drawn)):
        unit = law / law.std()
        for lag in lags:
            found.append(abs(float((unit[:-lag] * unit[lag:]).mean())) * math.sqrt(law.size - lag))
    return found


LAWS: dict[str, Callable[[np.ndarray], bool]] = {
    "Kolmogorov-Smirnov": lambda x: stats.kstest(x, "norm").pvalue > 1e-4,
    "Anderson-Darling": lambda x: anderson_darling(x) < 9,
    "moments": lambda x: max(moment_errors(x)) < 4.5,
    "tails": lambda x: min(tail_pvalues(x)) > 1e-4,
    "digits": lambda x: min(digit_pvalues(x)) > 1e-4,
    "cells": lambda x: min(cell_pvalues(x)) > 1e-4,
    "repeats": lambda x: len(np.unique(x)) == x.size,
    "correlations": lambda x: max(correlations(x)) < 5,
}


@pytest.mark.parametrize("law", LAWS)
def test_draws_have_the_law(law: str) -> None:
    for step in (0, 1):
        assert LAWS[law](draws(step=step))


def wrong_cell(drawn: np.ndarray) -> np.ndarray:
    """As if one of the 2^16 cells lay at 5 deviations."""
    wrong = drawn.copy()
    wrong[np.random.default_rng(0).random(drawn.size) < 2.0**-16] = 5.001
    return wrong


DEFECTS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], set[str]]] = {
    "two thirds": (lambda x: x * 2 / 3, {"Kolmogorov-Smirnov", "Anderson-Darling", "tails"}),
    "three halves": (lambda x: x * 3 / 2, {"Kolmogorov-Smirnov", "moments", "tails", "digits"}),
    "half a percent": (lambda x: x * 1.005, {"moments"}),
    "float32": (lambda x: x.astype(np.float32).astype(float), {"cells", "repeats"}),
    "a wrong cell": (wrong_cell, {"moments", "tails", "repeats"}),
    "tails cut off": (lambda x: np.clip(x, -LAST, LAST), {"tails", "repeats"}),
    "one draw used twice": (
        lambda x: np.concatenate([x[: x.size // 2].repeat(2)]),
        {"correlations", "repeats"},
    ),
    "neighbours shared": (lambda x: (x + np.roll(x, 3)) / math.sqrt(2), {"correlations"}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_seen(name: str) -> None:
    defect, seen_by = DEFECTS[name]
    drawn = defect(draws())
    for law in seen_by:
        assert not LAWS[law](drawn), law


def test_an_unused_redraw_is_seen() -> None:
    """Words that the table does not decide left as they are: 1 % of zeros and of the wrong law."""
    drawn, decided = looked_up(np.random.default_rng(0).integers(0, 2**64, COUNT, dtype=np.uint64))
    for left in (drawn, drawn[decided]):
        for law in ("Kolmogorov-Smirnov", "moments", "tails", "digits"):
            assert not LAWS[law](left), law


def test_the_tails_of_a_hundred_million_draws() -> None:
    """Beyond 3 to 5.5, on each side; the largest of all is where it should be."""
    opened, size, count = FleetRng([KEY]).at("tails"), 1 << 20, 96
    bars = (3.0, LAST, 4.5, 5.0, 5.5)
    beyond, largest = np.zeros((2, len(bars)), int), 0.0
    for _ in range(count):
        drawn = opened.normal(size, dtype=torch.float64)[0].numpy()
        far = drawn[np.abs(drawn) > bars[0]]
        for side, sign in enumerate((1, -1)):
            beyond[side] += [(sign * far > bar).sum() for bar in bars]
        largest = max(largest, float(np.abs(far).max()))
    for counts in beyond:
        for found, bar in zip(counts.tolist(), bars, strict=True):
            assert stats.binomtest(found, size * count, float(stats.norm.sf(bar))).pvalue > 1e-4
    # The largest of n draws: P(all below x) = (1 - 2 sf(x))^n.
    chance = (1 - 2 * stats.norm.sf(largest)) ** (size * count)
    assert 1e-4 < chance < 1 - 1e-4


def test_pieces_and_streams_are_independent() -> None:
    """Neighbouring steps, keys and pieces, by draws, squares and signs."""
    size = 100_000
    opened = FleetRng([KEY, KEY + 1]).at("noise", 0)
    rows = [opened.normal(size, dtype=torch.float64) for _ in range(2)]
    rows.append(FleetRng([KEY, KEY + 1]).at("noise", 1).normal(size, dtype=torch.float64))
    rows.append(FleetRng([KEY, KEY + 1]).at("rows", 0).normal(size, dtype=torch.float64))
    drawn = torch.cat(rows).numpy()
    for law in (drawn, drawn**2, np.sign(drawn)):
        found = np.corrcoef(law) - np.eye(len(law))
        assert np.abs(found).max() < 4.5 / math.sqrt(size)
