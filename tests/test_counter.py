"""Draws by counter: the published vectors of Threefry, and the laws of all draws."""

import numpy as np
import pytest
import torch
from scipy import stats

from dpsynth.counter import CounterRng, threefry

KEYS = [1, 2**127 + 5, 2**200]
ONES = (1 << 64) - 1


def signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ((0, 0), (0, 0), (0xC2B6E3A8C2C69865, 0x6F81ED42F350084D)),
        ((ONES, ONES), (ONES, ONES), (0xE02CB7C4D95D277A, 0xD06633D0893B8B68)),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344),
            (0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x263C7D30BB0F0AF1, 0x56BE8361D3311526),
        ),
    ],
)
def test_the_published_blocks(
    counter: tuple[int, int], key: tuple[int, int], block: tuple[int, int]
) -> None:
    """Known answers of the Random123 library, beside another key and other counters."""
    keys = torch.tensor([[3, 4], [signed(word) for word in key]])
    low = torch.tensor([signed(counter[0]), 1, signed(counter[0])])
    made = threefry(keys, low, signed(counter[1]))
    for words, expected in zip(made, block, strict=True):
        assert words[1, 0] == words[1, 2] == signed(expected)
        assert len(words[:, :2].unique()) == 4


def test_step_and_piece_may_be_tensors() -> None:
    rng = CounterRng(KEYS)
    for step, piece in ((0, 0), (7, 1), (2**31 - 1, 3)):
        number = rng.at("noise", step, piece).uniform(9)
        tensor = rng.at("noise", torch.tensor(step), torch.tensor(piece)).uniform(9)
        assert torch.equal(number, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("law", "cdf"), [("normal", "norm"), ("uniform", "uniform")])
def test_draws_follow_their_law(law: str, cdf: str, dtype: torch.dtype) -> None:
    for purpose in ("noise", "draws"):
        drawn = getattr(CounterRng([7, 8]).at(purpose, 3), law)(50_001, 2, dtype=dtype)
        assert drawn.shape == (2, 50_001, 2)
        assert drawn.dtype == dtype
        values = drawn.double().flatten().numpy()
        assert stats.kstest(values, cdf).pvalue > 1e-4
        assert stats.kstest(values * 1.05, cdf).pvalue < 1e-6
        if law == "uniform":
            assert values.min() >= 0 and values.max() < 1


def test_tails_are_as_long_as_they_should_be() -> None:
    drawn = CounterRng([1]).at("noise").normal(4_000_000, dtype=torch.float64).abs()
    for bar in (3.0, 4.0, 4.75):
        count = int((drawn > bar).sum())
        assert stats.binomtest(count, drawn.numel(), 2 * stats.norm.sf(bar)).pvalue > 1e-4


def test_every_argument_gives_draws_of_its_own() -> None:
    def flat(keys: list[int], purpose: str, step: int, piece: int, calls: int) -> np.ndarray:
        rng = CounterRng(keys).at(purpose, step, piece)
        return [rng.normal(4096, dtype=torch.float64) for _ in range(calls)][-1][0].numpy()

    base = ([5], "noise", 2, 0, 1)
    others = [([6], *base[1:]), ([5], "noises", 2, 0, 1), ([5], "noise", 3, 0, 1)]
    others += [([5], "noise", 2, 1, 1), ([5], "noise", 2, 0, 2)]
    first = flat(*base)
    np.testing.assert_array_equal(first, flat(*base))
    for other in others:
        assert abs(np.corrcoef(first, flat(*other))[0, 1]) < 5 / 64
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / 64


def test_more_rows_and_more_runs_change_no_draw() -> None:
    for law in ("normal", "uniform"):
        for dtype in (torch.float32, torch.float64):
            many = getattr(CounterRng(KEYS).at("draws", 1), law)(40, 3, dtype=dtype)
            for run, key in enumerate(KEYS):
                few = getattr(CounterRng([key]).at("draws", 1), law)(7, 3, dtype=dtype)
                assert torch.equal(many[run, :7], few[0])
