"""Audit statistics against brute force, simulation and SciPy; the audit as a whole."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from dpsynth.audit import ATTACKS, AttackResult, Audit, Ceiling, audit
from dpsynth.audit.membership import (
    auc,
    auc_interval,
    auc_intervals,
    aucs,
    clopper_pearson,
    null_band,
    tpr_at,
)
from dpsynth.baselines import controls
from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.schema import Column, Schema

SCHEMA = Schema(
    (
        *(Column(f"x{i}", "decimal", lower=-9.0, upper=9.0) for i in range(3)),
        Column("job", "categorical", levels=("a", "b"), nullable=True),
    )
)


def simulated(rows: int, rng: np.random.Generator) -> Table:
    frame = pd.DataFrame(rng.normal(size=(rows, 3)).clip(-9, 9), columns=["x0", "x1", "x2"])
    frame["job"] = rng.choice(np.array(["a", "b", None]), rows)
    return Table.from_frame(frame, SCHEMA)


def split(rows: int, seed: int) -> dict[str, Table]:
    rng = np.random.default_rng(seed)
    return {name: simulated(rows, rng) for name in ("members", "holdout", "reference")}


def run(synthetic: Table, parts: dict[str, Table], **options: Any) -> tuple[Audit, pd.DataFrame]:
    settings = {
        "white_box": None,
        "ceiling": Ceiling.none(),
        "max_candidates": 10_000,
        "rng": np.random.default_rng(0),
    }
    return audit(synthetic, **{**parts, **settings, **options})


def test_auc_counts_pairs_with_ties() -> None:
    rng = np.random.default_rng(0)
    members, holdout = rng.integers(0, 6, 40) + 0.5, rng.integers(0, 6, 30) + 0.5
    wins = (members[:, None] > holdout) + (members[:, None] == holdout) / 2
    assert auc(members, holdout) == pytest.approx(wins.mean())
    assert auc(-members, -holdout) == pytest.approx(1 - wins.mean())


def test_delong_variance_is_that_of_the_placements() -> None:
    rng = np.random.default_rng(1)
    members, holdout = rng.normal(0.5, 1, 50).round(1), rng.normal(size=70).round(1)
    wins = (members[:, None] > holdout) + (members[:, None] == holdout) / 2
    variance = wins.mean(1).var(ddof=1) / 50 + wins.mean(0).var(ddof=1) / 70
    area, low, high = auc_interval(members, holdout)
    reach = 1.959964 * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    assert low == pytest.approx(1 / (1 + math.exp(reach - logit)))
    assert high == pytest.approx(1 / (1 + math.exp(-reach - logit)))


@pytest.mark.parametrize("shift", [0.0, 1.0, 2.5])
def test_interval_covers_as_often_as_it_says(shift: float) -> None:
    rng = np.random.default_rng(2)
    truth, covered = stats.norm.cdf(shift / math.sqrt(2)), 0
    for _ in range(600):
        _, low, high = auc_interval(rng.normal(shift, 1, 90), rng.normal(size=60))
        covered += low <= truth <= high
    assert 0.925 <= covered / 600 <= 0.98


def test_interval_where_delong_says_nothing() -> None:
    ones, zeros = np.ones(100), np.zeros(200)
    assert auc_interval(ones, zeros) == (1.0, pytest.approx(0.025 ** (1 / 100)), 1.0)
    assert auc_interval(zeros, ones) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    assert auc_interval(zeros, zeros) == pytest.approx((0.5, 0.5, 0.5))


def test_a_matrix_of_scores_is_measured_as_its_rows() -> None:
    """Ties, rows that part all pairs either way, and equal scores, all in one matrix."""
    rng = np.random.default_rng(6)
    members, holdout = rng.integers(0, 9, (7, 40)) * 1.0, rng.integers(0, 8, (7, 30)) * 1.0
    members[1] += 20
    members[2] -= 20
    members[3] = holdout[3, 0]
    holdout[3] = holdout[3, 0]
    rows = list(zip(members, holdout, strict=True))
    pairs = members[:, :, None] - holdout[:, None]
    wins = (pairs > 0) + (pairs == 0) / 2
    np.testing.assert_allclose(aucs(members, holdout), wins.mean(axis=(1, 2)), atol=1e-15)
    np.testing.assert_array_equal(aucs(members, holdout), [auc(*row) for row in rows])
    found = auc_intervals(members, holdout)
    np.testing.assert_array_equal(found, [auc_interval(*row) for row in rows])
    assert found[1].tolist() == [1, pytest.approx(0.025 ** (1 / 30)), 1]
    assert found[2].tolist() == [0, 0, pytest.approx(1 - 0.025 ** (1 / 30))]


@pytest.mark.parametrize(("successes", "trials"), [(0, 9), (9, 9), (3, 10), (70, 700)])
def test_clopper_pearson_equals_scipy(successes: int, trials: int) -> None:
    known = stats.binomtest(successes, trials).proportion_ci(0.95, "exact")
    assert clopper_pearson(successes, trials) == pytest.approx((known.low, known.high))


def test_null_band_holds_nineteen_in_twenty() -> None:
    rng = np.random.default_rng(3)
    low, high = null_band(80, 50)
    areas = [auc(rng.normal(size=80), rng.normal(size=50)) for _ in range(600)]
    assert 0.925 <= np.mean([low < area < high for area in areas]) <= 0.975


def test_tpr_and_its_fpr_come_out_right() -> None:
    rng = np.random.default_rng(4)
    members, holdout = rng.normal(1, 1, 40_000), rng.normal(size=40_000)
    for fpr in (0.1, 0.01):
        point = tpr_at(members, holdout, fpr, rng)
        truth = stats.norm.cdf(stats.norm.ppf(fpr) + 1)
        assert point.low <= point.tpr <= point.high
        assert point.tpr == pytest.approx(truth, rel=0.12)
        assert point.fpr == pytest.approx(fpr, rel=0.15)
        assert point.fpr <= point.fpr_high


def test_ties_never_raise_the_fpr() -> None:
    rng = np.random.default_rng(5)
    members, holdout = rng.integers(0, 3, 500) * 1.0, rng.integers(0, 3, 500) * 1.0
    point = tpr_at(members, holdout, 0.1, rng)
    assert (point.tpr, point.fpr) == (0.0, 0.0)


def test_copy_is_the_strongest_evidence_and_breaks_a_ceiling() -> None:
    parts = split(400, 0)
    ceiling = Ceiling.from_epsilon_delta(1.0, 1e-5)
    result, scores = run(controls.copy(parts["members"]), parts, ceiling=ceiling)
    assert result.strongest.auc >= 0.999
    assert result.strongest.name.startswith("nn_ratio")
    assert result.violation
    assert result.ceiling_auc == pytest.approx(0.731, abs=1e-3)
    assert result.ceiling_tpr10 == ceiling.tpr_at(0.1)
    assert result.ceiling_tpr1 == ceiling.tpr_at(0.01)
    assert list(scores.columns) == ["member", *ATTACKS]
    assert scores["member"].sum() == result.members == result.holdout == 400
    assert not run(controls.copy(parts["members"]), parts)[0].violation


def test_strangers_stay_in_the_band_under_a_tight_ceiling() -> None:
    inside = []
    for seed in range(4):
        parts = split(300, 20 + seed)
        synthetic = simulated(300, np.random.default_rng(90 + seed))
        result, _ = run(synthetic, parts, ceiling=Ceiling.from_epsilon_delta(0.3, 1e-5))
        assert not result.violation
        inside.append(result.null_low < result.strongest.auc < result.null_high)
    assert sum(inside) >= 3


def test_a_tail_alone_breaks_a_ceiling() -> None:
    parts = split(800, 1)
    leaky = controls.p_leak(
        parts["members"], simulated(800, np.random.default_rng(9)), 0.2, 800,
        np.random.default_rng(0),
    )  # fmt: skip
    result, _ = run(leaky, parts, ceiling=Ceiling.from_epsilon_delta(1.0, 1e-5))
    assert result.strongest.auc_high < result.ceiling_auc
    assert result.violation


def test_white_box_scores_follow_their_rows() -> None:
    parts = split(300, 2)
    synthetic = simulated(300, np.random.default_rng(5))
    sides = [
        ATTACKS["dcr"](parts[name], synthetic, parts["reference"], np.random.default_rng(0))
        for name in ("members", "holdout")
    ]
    white_box = {"same": (sides[0], sides[1])}
    result, scores = run(synthetic, parts, white_box=white_box, max_candidates=101)
    np.testing.assert_array_equal(scores["same"], scores["dcr"])
    assert result.members == result.holdout == 50
    assert [attack.name for attack in result.attacks] == [*ATTACKS, "same"]


def test_a_perfect_white_box_score_is_the_strongest() -> None:
    parts = split(200, 3)
    synthetic = simulated(200, np.random.default_rng(5))
    white_box = {"loss": (np.ones(200), np.zeros(200))}
    result, _ = run(synthetic, parts, white_box=white_box)
    assert result.strongest.name == "loss"
    assert result.strongest.auc == 1
    low, high = null_band(100, 100)
    assert (result.null_low, result.null_high) == (low, high)


def test_luck_in_choosing_is_not_reported() -> None:
    """The best of 300 know-nothing scores looks good only where it was chosen."""
    parts, rng = split(200, 9), np.random.default_rng(2)
    white_box = {f"noise{i}": (rng.normal(size=200), rng.normal(size=200)) for i in range(300)}
    result, _ = run(simulated(200, rng), parts, white_box=white_box)
    assert max(attack.auc for attack in result.attacks) > null_band(200, 200)[1]
    assert result.null_low < result.strongest.auc < result.null_high


def test_a_point_above_the_ceiling_is_no_violation_while_its_interval_reaches_below() -> None:
    parts, rng = split(200, 10), np.random.default_rng(1)
    white_box = {"weak": (rng.normal(0.4, 1, 200), rng.normal(size=200))}
    result, _ = run(
        simulated(200, rng), parts, white_box=white_box, ceiling=Ceiling.from_epsilon_delta(0.2, 0)
    )
    assert result.strongest.auc_low < result.ceiling_auc < result.strongest.auc
    assert not result.violation


def test_a_diagnostic_is_never_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = split(100, 4)
    oracle = {tuple(row): 1.0 for row in parts["members"].frame[["x0", "x1"]].to_numpy()}

    def knows(candidates: Table, *_: object, **__: object) -> np.ndarray:
        rows = candidates.frame[["x0", "x1"]].to_numpy()
        return np.array([oracle.get(tuple(row), 0.0) for row in rows])

    monkeypatch.setattr("dpsynth.audit.membership.ATTACKS", {**ATTACKS, "dcr": knows})
    result, _ = run(simulated(100, np.random.default_rng(5)), parts)
    shown = {attack.name: attack for attack in result.attacks}
    assert shown["dcr"].auc == 1
    assert shown["dcr"].diagnostic
    assert result.strongest.name != "dcr"


def test_unequal_parts_give_equal_sides_and_notes_say_how_few() -> None:
    parts = split(120, 5)
    parts["holdout"] = parts["holdout"].take(np.arange(90))
    result, scores = run(simulated(120, np.random.default_rng(5)), parts)
    assert (result.members, result.holdout, len(scores)) == (90, 90, 180)
    assert any("fewer than 10000" in note for note in result.notes)


def test_a_split_that_leaks_is_noted() -> None:
    parts = split(300, 6)
    shifted = parts["holdout"].frame.assign(x0=parts["holdout"].frame["x0"].clip(0, 9))
    parts["holdout"] = Table.from_frame(shifted, SCHEMA)
    result, _ = run(simulated(300, np.random.default_rng(5)), parts)
    assert result.blind_auc > 0.6
    assert any("blind control" in note for note in result.notes)


def test_same_rng_same_audit_and_inputs_untouched() -> None:
    parts = split(60, 7)
    before = {name: part.digest() for name, part in parts.items()}
    synthetic = simulated(60, np.random.default_rng(5))
    first, scores = run(synthetic, parts)
    again, others = run(synthetic, parts)
    assert first == again
    pd.testing.assert_frame_equal(scores, others)
    assert before == {name: part.digest() for name, part in parts.items()}


RESULT = AttackResult("nn", False, 0.6, 0.5, 0.7, 0.2, 0.1, 0.3, 0.05, 0.0, 0.1)
AUDIT = Audit(
    attacks=(RESULT, replace(RESULT, name="dcr", diagnostic=True)),
    strongest=RESULT,
    blind_auc=0.5,
    null_low=0.4,
    null_high=0.6,
    ceiling_auc=1.0,
    ceiling_tpr10=1.0,
    ceiling_tpr1=1.0,
    violation=False,
    members=10,
    holdout=10,
    notes=("a note",),
)


def test_json_round_trip() -> None:
    assert Audit.from_json(AUDIT.to_json()) == AUDIT
    result, _ = run(simulated(60, np.random.default_rng(5)), split(60, 7))
    assert Audit.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"auc": math.nan}, "finite"),
        ({"auc": None}, "type float"),
        ({"auc": True}, "type float"),
        ({"name": 3}, "type str"),
        ({"diagnostic": 1}, "type bool"),
        ({"auc_low": 0.65}, "auc=0.6"),
        ({"tpr10_high": 0.15}, "tpr10=0.2"),
        ({"tpr1_high": 1.2}, "tpr1=0.05"),
    ],
)
def test_refuses_a_result(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        replace(RESULT, **change)
    body = asdict(AUDIT)
    body["strongest"].update(change)
    with pytest.raises(UsageError, match=part):
        Audit.from_json(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"blind_auc": math.inf}, "finite"),
        ({"blind_auc": 1.5}, "blind_auc=1.5"),
        ({"violation": 0}, "type bool"),
        ({"members": 1.5}, "type int"),
        ({"members": True}, "type int"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"strongest": None}, "named entries"),
        ({"strongest": {"name": "nn"}}, "'diagnostic' is missing"),
        ({"notes": "text"}, "must be lists"),
        ({"attacks": {}}, "must be lists"),
        ({"attacks": []}, "not among"),
        ({"attacks": [asdict(RESULT)] * 2}, "listed twice"),
        ({"strongest": asdict(AUDIT.attacks[1])}, "not among"),
    ],
)
def test_refuses_an_audit_file(change: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Audit.from_json(json.dumps({**asdict(AUDIT), **change}))


def test_refuses_other_text() -> None:
    with pytest.raises(UsageError, match="not JSON"):
        Audit.from_json("{")
    with pytest.raises(UsageError, match="named entries"):
        Audit.from_json("[]")
    body = asdict(AUDIT)
    del body["members"]
    with pytest.raises(UsageError, match="'members' is missing"):
        Audit.from_json(json.dumps(body))


def test_refuses_scores() -> None:
    some, rng = np.arange(3.0), np.random.default_rng(0)
    with pytest.raises(UsageError, match="one number a row"):
        auc(some[:0], some)
    with pytest.raises(UsageError, match="one number a row"):
        auc(some, some[:, None])
    with pytest.raises(UsageError, match="as many sets of them as of members, 2"):
        aucs(np.ones((2, 3)), np.ones((3, 3)))
    with pytest.raises(UsageError, match="holdout scores have shape"):
        auc_intervals(np.ones((2, 3)), np.ones(3))
    with pytest.raises(UsageError, match="1 are not finite"):
        auc(some, np.array([1.0, math.inf]))
    with pytest.raises(UsageError, match="at least 2"):
        auc_interval(some[:1], some)
    with pytest.raises(UsageError, match="fpr=0"):
        tpr_at(some, some, 0, rng)
    with pytest.raises(UsageError, match="1 and 2"):
        tpr_at(some, some[:1], 0.1, rng)
    with pytest.raises(UsageError, match="1 and 2"):
        tpr_at(some[:0], some, 0.1, rng)
    with pytest.raises(UsageError, match="trials=0"):
        clopper_pearson(0, 0)
    with pytest.raises(UsageError, match="successes=-1"):
        clopper_pearson(-1, 3)
    with pytest.raises(UsageError, match="more than"):
        clopper_pearson(4, 3)
    with pytest.raises(UsageError, match="members=0"):
        null_band(0, 3)
    with pytest.raises(UsageError, match="holdout=0"):
        null_band(3, 0)


def test_refuses_parts_that_do_not_fit() -> None:
    parts = split(20, 8)
    synthetic = simulated(20, np.random.default_rng(5))
    with pytest.raises(UsageError, match="synthetic and members"):
        run(synthetic.select(["x0"]), parts)
    with pytest.raises(UsageError, match="synthetic and reference"):
        run(synthetic, {**parts, "reference": parts["reference"].select(["x0"])})
    with pytest.raises(UsageError, match="synthetic has 1 rows"):
        run(synthetic.take(np.arange(1)), parts)
    for first, second in (("members", "holdout"), ("members", "reference")):
        with pytest.raises(UsageError, match=f"{first} and {second} have 20 rows"):
            run(synthetic, {**parts, second: parts[first]})
    with pytest.raises(UsageError, match="holdout and reference have 20 rows"):
        run(synthetic, {**parts, "reference": parts["holdout"]})
    with pytest.raises(UsageError, match="at least 8 of each"):
        run(synthetic, {**parts, "holdout": parts["holdout"].take(np.arange(7))})
    with pytest.raises(UsageError, match="max_candidates=15"):
        run(synthetic, parts, max_candidates=15)


def test_device_changes_no_score_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, synthetic = split(60, 7), simulated(60, np.random.default_rng(5))
    first, scores = run(synthetic, parts)
    again, others = run(synthetic, parts, device="auto")
    pd.testing.assert_frame_equal(scores, others)
    assert first.strongest == again.strongest
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match="device=cuda: no GPU"):
        run(synthetic, parts, device="cuda")
    with pytest.raises(UsageError, match="device=tpu: unknown"):
        run(synthetic, parts, device="tpu")


def test_refuses_white_box_scores() -> None:
    parts = split(20, 8)
    synthetic, good = simulated(20, np.random.default_rng(5)), np.zeros(20)
    for name in ("dcr", "member"):
        with pytest.raises(UsageError, match="name is taken"):
            run(synthetic, parts, white_box={name: (good, good)})
    with pytest.raises(UsageError, match="members scores have shape"):
        run(synthetic, parts, white_box={"loss": (good[:3], good)})
    with pytest.raises(UsageError, match="holdout scores have shape"):
        run(synthetic, parts, white_box={"loss": (good, good[:, None])})
    with pytest.raises(UsageError, match="holdout is not finite"):
        run(synthetic, parts, white_box={"loss": (good, good + math.nan)})
