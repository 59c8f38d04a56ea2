"""Histograms against NumPy's counts one subset at a time, and against dictionaries of rows."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from dpsynth.checks import UsageError
from dpsynth.evaluation import histograms as module
from dpsynth.evaluation.histograms import counted, histograms

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]
LEVELS = (3, 1, 7, 2, 5, 4)


def codes(rows: int, seed: int, levels: tuple[int, ...] = LEVELS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.integers(0, count, rows) for count in levels])


def dense(table: np.ndarray, subset: tuple[int, ...], levels: tuple[int, ...]) -> np.ndarray:
    shape = [levels[j] for j in subset]
    cells = np.ravel_multi_index([table[:, j] for j in subset], shape)
    return np.bincount(cells, minlength=int(np.prod(shape)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shared", [1, 30, 1 << 15])
@pytest.mark.parametrize("entries", [1, 700, 1 << 20])
def test_equals_numpy_for_all_subsets_in_any_order_and_batching(
    shared: int, entries: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARED_CELLS", shared)
    monkeypatch.setattr(module, "ENTRIES", {"cpu": entries, "cuda": entries})
    tables = [codes(90, 0), codes(40, 1), codes(0, 2)]
    subsets = [s for order in (1, 2, 3, 6) for s in combinations(range(6), order)]
    subsets = [*subsets, *permutations((4, 0, 2)), (3, 1), (3, 1)]
    found = histograms(tables, LEVELS, subsets, device=device)
    assert len(found) == len(subsets)
    for subset, counts in zip(subsets, found, strict=True):
        assert counts.dtype == np.int64
        np.testing.assert_array_equal(counts, [dense(t, subset, LEVELS) for t in tables])


@pytest.mark.parametrize("device", DEVICES)
def test_joints_of_many_cells_hold_those_that_occur_in_order(device: str) -> None:
    """Beyond dense tables, and beyond 64 bits: 30 columns of 900 levels are 900^30 cells."""
    levels = (900,) * 30
    first, second = codes(300, 3, levels), codes(200, 4, levels)
    second[:50] = first[:50]
    subsets = [(0, 1, 2), (2, 0), tuple(range(30)), (5, 4, 3, 2, 1, 0, 9)]
    found = histograms([first, second], np.array(levels), subsets, device=device)
    for subset, counts in zip(subsets, found, strict=True):
        if subset == (2, 0):
            np.testing.assert_array_equal(counts[0], dense(first, subset, levels))
            continue
        rows = [Counter(map(tuple, part[:, subset].tolist())) for part in (first, second)]
        cells = sorted(set(rows[0]) | set(rows[1]))
        np.testing.assert_array_equal(counts, [[side[cell] for cell in cells] for side in rows])


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.int64])
def test_codes_of_any_whole_type_and_layout(dtype: type) -> None:
    table = codes(50, 5).astype(dtype)
    for layout in (table, np.asfortranarray(table), table[::-1]):
        (found,) = histograms([layout], LEVELS, [(0, 2, 4)])
        np.testing.assert_array_equal(found[0], dense(table.astype(int), (0, 2, 4), LEVELS))


def test_cell_numbers_of_a_batch_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joints side by side number their cells on: past 2³¹ they need 64 bits."""
    monkeypatch.setattr(torch, "iinfo", lambda _: type("narrow", (), {"max": 50}))
    table = codes(60, 6)
    subsets = list(combinations(range(6), 3))
    for subset, counts in zip(subsets, histograms([table], LEVELS, subsets), strict=True):
        np.testing.assert_array_equal(counts[0], dense(table, subset, LEVELS))


def test_pairs_are_counted_in_a_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 435 pairs of 30 columns of 20 levels: three of them at a time come out of a triple."""
    levels = (20,) * 30
    pairs = list(combinations(range(30), 2))
    joints = module._joints(pairs, list(levels))
    assert len(joints) <= 160
    assert sorted(n for joint in joints for n in joint.subsets) == list(range(len(pairs)))
    monkeypatch.setattr(module, "SHARED_CELLS", 1)
    assert len(module._joints(pairs, list(levels))) == len(pairs)


def test_counted_gives_each_subset_once_as_histograms_do() -> None:
    table, subsets = codes(50, 7), [(0, 1), (2,), (4, 2), (0, 1)]
    found = list(counted([table], LEVELS, subsets))
    assert sorted(number for number, _ in found) == list(range(len(subsets)))
    whole = histograms([table], LEVELS, subsets)
    for number, counts in found:
        np.testing.assert_array_equal(counts, whole[number])
    assert histograms([table], LEVELS, []) == []


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU is visible"):
        histograms([codes(3, 0)], LEVELS, [(0,)], device="cuda")
    with pytest.raises(UsageError, match="device=gpu: unknown"):
        histograms([codes(3, 0)], LEVELS, [(0,)], device="gpu")


def test_refuses_what_cannot_be_counted() -> None:
    good = codes(5, 0)
    for subset in ((), (0, 0), (6,), (-1, 2)):
        with pytest.raises(UsageError, match="give distinct columns of"):
            histograms([good], LEVELS, [(0,), subset])
    for bad in (good[:, 0], good[:, :3], good.astype(float)):
        with pytest.raises(UsageError, match="table 1 is"):
            histograms([good, bad], LEVELS, [(0,)])
    for value in (-1, 7):
        bad = good.copy()
        bad[2, 2] = value
        with pytest.raises(UsageError, match=r"column 2: codes .* are not all in 0..6"):
            histograms([bad], LEVELS, [(0,)])
