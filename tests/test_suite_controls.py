"""Controls pass where attacks work and fail where they do not."""

import numpy as np
import pandas as pd
import pytest

from dpsynth import datasets
from dpsynth.checks import UsageError
from dpsynth.data import Split
from dpsynth.randomness import stream
from dpsynth.suite import controls as module
from dpsynth.suite.controls import judge_controls
from dpsynth.suite.parts import Parts


@pytest.fixture(scope="module")
def split():
    table = datasets.load("adult").take(np.arange(9000))
    return Split.random(table, stream(0, "split"), holdout=0.3, reference=0.3)


def test_parts_are_disjoint_and_a_side_has_as_many_as_the_other(split):
    parts = Parts.of(split, max_candidates=1000, seed=0)
    assert len(parts.inside) == len(parts.outside) == 500
    assert len(parts.candidates) == 1000
    assert parts.candidates.frame.iloc[:500].equals(parts.inside.frame)
    held = [parts.members, parts.outside, parts.attacker, parts.population]
    frame = pd.concat([part.frame for part in held], ignore_index=True)
    assert not frame.duplicated().any()
    assert len(parts.attacker) + len(parts.population) == len(split.reference)


@pytest.mark.parametrize("side", ["members", "holdout"])
def test_too_few_rows_are_refused(split, side):
    rows = {"members": split.members, "holdout": split.holdout, "reference": split.reference}
    rows[side] = rows[side].take(np.arange(5))
    with pytest.raises(UsageError, match=f"{side} part has 5 rows"):
        Parts.of(Split(**rows), max_candidates=1000, seed=0)


def test_a_sound_audit_passes_its_controls(split):
    parts = Parts.of(split, max_candidates=4000, seed=0)
    found = {control.name: control for control in judge_controls(parts, seed=0)}
    assert set(found) == {"fresh", "p-leak", "copy", "blind"}
    assert all(control.passed for control in found.values())
    assert found["p-leak"].expected == 0.6
    assert found["copy"].auc >= 0.999


def test_blind_attacks_fail_the_leaking_controls(split, monkeypatch):
    parts = Parts.of(split, max_candidates=4000, seed=0)
    honest = module.audit

    def blinded(synthetic, **rest):  # looks at other rows than the generator's
        return honest(parts.population.take(np.arange(600)), **rest)

    monkeypatch.setattr(module, "audit", blinded)
    found = {control.name: control.passed for control in judge_controls(parts, seed=0)}
    assert found == {"fresh": True, "p-leak": False, "copy": False, "blind": True}


def test_a_split_that_leaks_by_itself_fails_blind(split):
    old = split.members.frame["age"].astype(float) > 35
    members = split.members.take(np.flatnonzero(old))
    skewed = Split(members, split.holdout, split.reference)
    parts = Parts.of(skewed, max_candidates=4000, seed=0)
    found = {control.name: control for control in judge_controls(parts, seed=0)}
    assert not found["blind"].passed
