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
from dpsynth.audit.attacks import DIAGNOSTICS, QUICK, Attack, Evidence
from dpsynth.audit.membership import (
    auc,
    auc_interval,
    auc_intervals,
    aucs,
    clopper_pearson,
    conclude,
    null_band,
    tpr_at,
)
from dpsynth.audit.statistics import stack, tail_rate, tprs
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


def test_tpr_of_the_empirical_curve() -> None:
    rng = np.random.default_rng(12)
    members, holdout = rng.integers(0, 9, (5, 40)) * 1.0, rng.integers(0, 8, (5, 30)) * 1.0
    for fpr in (0.01, 0.1, 0.5):
        best = [
            max((m > t).mean() for t in [*h, math.inf] if (h > t).mean() <= fpr)
            for m, h in zip(members, holdout, strict=True)
        ]
        np.testing.assert_allclose(tprs(members, holdout, fpr), best)


def test_few_non_members_are_read_at_ten_percent() -> None:
    assert (tail_rate(9_999), tail_rate(10_000)) == (0.1, 0.01)


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


def test_a_leak_is_named_although_the_ceiling_allows_it() -> None:
    parts = split(400, 11)
    population = simulated(400, np.random.default_rng(9))
    leaky = controls.p_leak(parts["members"], population, 0.2, 400, np.random.default_rng(0))
    result, _ = run(leaky, parts, attacks=QUICK, ceiling=Ceiling.from_epsilon_delta(8.0, 1e-5))
    assert not result.violation
    assert {"nn_ratio_quantile", "identical_calibrated"} <= set(result.leaks)
    areas = {attack.name: attack.auc for attack in result.attacks}
    assert [attack.name for attack in result.attacks] == list(QUICK)
    # The band of single AUCs is the narrower one, save for ties, which narrow both.
    assert result.bands["nn_ratio_range"] > 0.5 + 1.645 * math.sqrt(801 / (12 * 400 * 400))
    assert result.bands["identical_calibrated"] < result.bands["nn_ratio_range"]
    for name in set(QUICK) - DIAGNOSTICS:
        assert result.p_values[name] <= 0.05 or areas[name] <= result.bands[name]
    assert any(note.startswith("leaks: nn_ratio_quantile") for note in result.notes)


def test_nothing_is_called_a_leak_without_one() -> None:
    """8 fair audits at 5 %: more than 2 alarms once in 170 suites; the seeds are fixed."""
    attacks = {name: QUICK[name] for name in QUICK if name != "discriminator"}
    alarms = 0
    for seed in range(8):
        parts = split(100, 300 + seed)
        synthetic = simulated(100, np.random.default_rng(600 + seed))
        result, _ = run(synthetic, parts, attacks=attacks)
        alarms += bool(result.leaks)
        assert any("no leak was found" in note for note in result.notes) != bool(result.leaks)
    assert alarms <= 2


def test_selection_models_choose_and_leave_all_candidates() -> None:
    parts, rng = split(200, 12), np.random.default_rng(3)
    synthetic = simulated(200, rng)
    white_box = {name: (rng.normal(size=200), rng.normal(size=200)) for name in ("a", "b")}

    def played() -> dict[str, Any]:
        names = ["nn_ratio_range", "nn_ratio_quantile", "discriminator", "a", "b"]
        return {n: (rng.normal(2.0 * (n == "b"), 1, 50), rng.normal(size=70)) for n in names}

    pseudo = [played() for _ in range(3)]
    result, _ = run(synthetic, parts, white_box=white_box, pseudo=pseudo)
    assert (result.strongest.name, result.selection) == ("b", "models")
    assert result.strongest.auc == auc(*white_box["b"])
    assert (result.null_low, result.null_high) == null_band(200, 200)
    assert "selection models, reported on all candidates (200 members" in result.notes[0]
    del pseudo[1]["a"]
    with pytest.raises(UsageError, match="selection model 1 has no scores of a;"):
        run(synthetic, parts, white_box=white_box, pseudo=pseudo)


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


def test_a_diagnostic_is_never_the_strongest() -> None:
    parts = split(100, 4)
    oracle = {tuple(row): 1.0 for row in parts["members"].frame[["x0", "x1"]].to_numpy()}

    def knows(evidence: Evidence) -> np.ndarray:
        rows = evidence.candidates.frame[["x0", "x1"]].to_numpy()
        return np.array([oracle.get(tuple(row), 0.0) for row in rows])

    attacks = {**ATTACKS, "dcr": Attack(knows)}
    result, _ = run(simulated(100, np.random.default_rng(5)), parts, attacks=attacks)
    shown = {attack.name: attack for attack in result.attacks}
    assert shown["dcr"].auc == 1
    assert shown["dcr"].diagnostic
    assert result.strongest.name != "dcr"
    assert set(result.p_values) == set(result.bands) == set(ATTACKS) - {"dcr"}


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
    selection="halves",
    bands={"nn": 0.55},
    p_values={"nn": 0.03},
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
        ({"selection": "luck"}, "selection=luck: unknown"),
        ({"bands": {}}, "bands must name each attack proper once"),
        ({"bands": [0.5]}, "bands must name"),
        ({"p_values": {"nn": 0.5, "dcr": 0.5}}, "p_values must name"),
        ({"p_values": {"nn": 1.5}}, "p_values of 'nn' is 1.5"),
        ({"p_values": {"nn": "0"}}, "p_values of 'nn' is '0'"),
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
    del body["bands"]
    with pytest.raises(UsageError, match="'bands' is missing; audit the run again"):
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
    with pytest.raises(UsageError, match="fpr=1"):
        tprs(some[None], some[None], 1)
    with pytest.raises(UsageError, match="1 are not finite"):
        tprs(some[None], np.array([[1.0, math.inf]]), 0.1)
    with pytest.raises(UsageError, match="non_members=0"):
        tail_rate(0)
    with pytest.raises(UsageError, match="no attack scores"):
        stack([])
    with pytest.raises(UsageError, match="different numbers of rows"):
        stack([(some, some), (some[:2], some)])


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
    for name in ("dcr", "member", "identical"):
        with pytest.raises(UsageError, match="name is taken"):
            run(synthetic, parts, white_box={name: (good, good)})
    with pytest.raises(UsageError, match="members scores have shape"):
        run(synthetic, parts, white_box={"loss": (good[:3], good)})
    with pytest.raises(UsageError, match="holdout scores have shape"):
        run(synthetic, parts, white_box={"loss": (good, good[:, None])})
    with pytest.raises(UsageError, match="holdout is not finite"):
        run(synthetic, parts, white_box={"loss": (good, good + math.nan)})
    with pytest.raises(UsageError, match="no attack but diagnostics"):
        run(synthetic, parts, attacks={"dcr": ATTACKS["dcr"]})


def test_conclusions_from_scores_alone() -> None:
    rng = np.random.default_rng(13)
    scores = {
        name: (rng.normal(shift, 1, 60), rng.normal(size=90))
        for name, shift in (("loss", 1.5), ("noise", 0.0), ("dcr", 3.0))
    }
    result = conclude(scores, (), 0.5, Ceiling.from_epsilon_delta(0.1, 1e-5), rng)
    assert (result.members, result.holdout, result.strongest.name) == (60, 90, "loss")
    assert (result.null_low, result.null_high) == null_band(30, 45)
    assert result.leaks == ("loss",)
    assert result.violation
    with pytest.raises(UsageError, match="no attack scores"):
        conclude({}, (), 0.5, Ceiling.none(), rng)
    with pytest.raises(UsageError, match="no attack scores"):
        conclude({"dcr": scores["dcr"]}, (), 0.5, Ceiling.none(), rng)
    short = {"loss": scores["loss"], "noise": (np.ones(3), np.ones(4))}
    with pytest.raises(UsageError, match="different numbers of rows"):
        conclude(short, (), 0.5, Ceiling.none(), rng)


def test_white_box_scores_alone_are_an_audit() -> None:
    white_box = {"loss": (np.ones(20), np.zeros(20))}
    synthetic = simulated(20, np.random.default_rng(5))
    result, _ = run(synthetic, split(20, 8), white_box=white_box, attacks={})
    assert [attack.name for attack in result.attacks] == ["loss"]
    assert result.leaks == ("loss",)
