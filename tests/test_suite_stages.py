"""Stages: done once, kept whole, never taken for those of another audit."""

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from dpsynth.checks import UsageError
from dpsynth.suite.stages import Stages


def _stages(folder, identity=None, **rest):
    return Stages(folder, identity or {"run": "a"}, Console(file=StringIO()), **rest)


def test_what_is_done_is_not_done_again(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"a": [1, 2.5, "x"]}

    assert _stages(tmp_path).json("one", work) == {"a": [1, 2.5, "x"]}
    again = _stages(tmp_path)
    assert again.json("one", work) == {"a": [1, 2.5, "x"]}
    assert calls == [1]
    assert again.seconds["one"] >= 0


def test_scores_come_back_bit_for_bit_and_in_order(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"attack:in:{i}" for i in range(12)]  # a name may hold the mark between parts
    scores = {name: (rng.normal(size=5), rng.normal(size=3)) for name in names}
    _stages(tmp_path).scores("s", lambda: scores)

    def never():
        raise AssertionError

    found = _stages(tmp_path).scores("s", never)
    assert list(found) == names
    for name in names:
        for kept, given in zip(found[name], scores[name], strict=True):
            np.testing.assert_array_equal(kept, given)


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    def fail():
        raise UsageError("no")

    stages = _stages(tmp_path)
    for form in (stages.json, stages.scores):
        with pytest.raises(UsageError, match="no"):
            form("one", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]
    assert stages.json("one", lambda: 3) == 3


def test_another_audit_is_refused(tmp_path):
    _stages(tmp_path, {"run": "a", "seed": 0})
    _stages(tmp_path, {"seed": 0, "run": "a"})
    with pytest.raises(UsageError, match="was begun for another run"):
        _stages(tmp_path, {"run": "a", "seed": 1})


def test_estimates_are_of_what_is_left(tmp_path):
    text = StringIO()
    stages = Stages(tmp_path, {}, Console(file=text), {"one": 30.0, "two": 200.0})
    stages.announce(["one", "two"])
    assert "about 3.8 min for one, two" in text.getvalue()
    stages.json("one", lambda: json.loads("1"))
    stages.announce(["one", "two"])
    assert "about 3.3 min for two; 1 stages done" in text.getvalue()
    stages.json("two", lambda: 1)
    stages.announce(["one", "two"])
    assert "every stage is there" in text.getvalue()
