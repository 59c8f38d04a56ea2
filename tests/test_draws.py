"""Draws of a piece of a batch: a run's follow from its own records, whoever trains beside it."""

import pytest
import torch
from scipy import stats

from dpsynth.draws import RecordRng
from dpsynth.randomness import FleetRng

KEYS = [5, 6, 7]


def opened(records: list[int], width: int, keys: list[int] = KEYS, step: int = 0) -> RecordRng:
    return RecordRng(FleetRng(keys, dtype=torch.float64), "draws", step, records, width)


@pytest.mark.parametrize("law", ["normal", "uniform"])
def test_a_wider_piece_changes_no_draw(law: str) -> None:
    records = [4, 0, 2]
    for width in (4, 9):
        rng = opened(records, width)
        first, second = getattr(rng, law)(width, 3), getattr(rng, law)(2 * width, 5)
        for run, count in enumerate(records):
            alone = opened([count], max(count, 1), [KEYS[run]])
            for drawn, each, inner in ((first, 1, 3), (second, 2, 5)):
                wanted = getattr(alone, law)(max(count, 1) * each, inner)[0, : count * each]
                assert torch.equal(drawn[run, : count * each], wanted)
                assert (drawn[run, count * each :] == 0).all()


def test_draws_follow_their_laws_and_differ_between_steps_runs_and_calls() -> None:
    rng = opened([2000] * 3, 2000)
    normals, uniforms = rng.normal(2000, 4), rng.uniform(2000, 4)
    assert stats.kstest(normals.flatten().numpy(), "norm").pvalue > 1e-4
    assert stats.kstest(uniforms.flatten().numpy(), "uniform").pvalue > 1e-4
    others = [
        normals[1],
        rng.normal(2000, 4)[0],
        opened([2000] * 3, 2000, step=1).normal(2000, 4)[0],
    ]
    for other in others:
        assert abs(float((normals[0] * other).mean())) < 5 / 8000**0.5
    assert opened([2], 2, [1]).uniform(2, dtype=torch.float32).dtype == torch.float32
