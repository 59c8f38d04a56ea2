"""The report of an audit: what fails it, what contradicts a claim, and that both are told apart."""

import json
import math

import numpy as np
import pytest

from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import conclude
from dpsynth.suite.controls import Control
from dpsynth.suite.figure import bounds_figure
from dpsynth.suite.report import Bound, SuiteReport

FACTS = {
    "name": "run",
    "epsilon": 1.0,
    "delta": 1e-5,
    "unit": "record",
    "relation": "add_remove",
    "noise": "aes256-ctr:seed",
    "accountant": "PLD",
    "accountant_version": "1",
    "metadata": "declared",
    "tuning": "none",
}
GOOD = Control("copy", "nn", 1.0, 0.999, 1.0, 1.0)
BAD = Control("fresh", "nn", 0.6, 0.45, 0.55, 0.5)
SOUND = {"sound": False, "sigma/2": True}


def _audit(shift=0.0, ceiling=None):
    rng = np.random.default_rng(0)
    pair = (rng.normal(shift, 1, 400), rng.normal(0, 1, 400))
    return conclude({"nn": pair}, (), 0.5, ceiling or Ceiling.none(), rng)


def _report(**changes):
    given = {
        "suite": "quick",
        "facts": FACTS,
        "membership": _audit(),
        "shadow": None,
        "controls": (GOOD,),
        "defects": SOUND,
        "bounds": (Bound("steps", "guesses", 0.8, 0.9, 1.0, 0.7),),
        "attributes": (
            {"name": "age", "members": 0.5, "control": 0.5, "advantage": 0.0, "low": -1, "high": 1},
        ),
        "seconds": {"attacks": 1.0},
    }
    return SuiteReport(**{**given, **changes})


def test_a_sound_run_and_a_sound_audit():
    report = _report()
    assert not report.failed
    assert not report.violations
    assert report.verdict.startswith("no contradiction: strongest attack nn AUC 0.")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"controls": (GOOD, BAD)}, "control 'fresh': AUC 0.600 is outside 0.450..0.550"),
        ({"defects": {"sound": False, "sigma/2": False}}, "planted defect 'sigma/2'"),
        ({"defects": {"sound": True, "sigma/2": True}}, "the sound engine was taken for"),
    ],
)
def test_a_wrong_answer_fails_the_audit(changes, said):
    report = _report(**changes)
    assert len(report.failed) == 1
    assert report.verdict.startswith(f"not to be believed: {said}")
    assert "FAILED" in report.page()
    assert "FAILED" not in _report().page()


@pytest.mark.parametrize(
    "changes",
    [
        {"bounds": (Bound("steps", "guesses", 1.2, 0.9, 1.0, 1.1),)},
        {"membership": _audit(2.0, Ceiling.from_gdp(0.3))},
        {"shadow": _audit(2.0, Ceiling.from_gdp(0.3))},
    ],
)
def test_evidence_above_the_claim_contradicts_it(changes):
    report = _report(**changes)
    assert not report.failed
    assert len(report.violations) == 1
    assert report.verdict.startswith("the claim is contradicted: ")


def test_a_bound_above_the_claim_by_chance_is_no_contradiction():
    assert not _report(bounds=(Bound("steps", "guesses", 1.05, 0.9, 1.0, 0.95),)).violations


def test_a_failed_audit_contradicts_nothing():
    report = _report(controls=(BAD,), bounds=(Bound("steps", "guesses", 1.2, 0.9, 1.0, 1.1),))
    assert report.verdict.startswith("not to be believed")


def test_json_holds_everything_and_no_infinity():
    facts = {**FACTS, "epsilon": math.inf}
    body = json.loads(_report(facts=facts, bounds=()).to_json())
    assert body["facts"]["epsilon"] == "inf"
    assert body["controls"][0]["passed"] is True
    assert body["membership"]["strongest"]["name"] == "nn"
    assert body["failed"] == []
    assert set(body) >= {"suite", "verdict", "bounds", "defects", "attributes", "seconds", "notes"}


def test_the_page_shows_every_part():
    page = _report(shadow=_audit()).page()
    for said in (
        "# Audit of run",
        "covered by no ε",
        "### Without shadow models",
        "### With shadow models",
        "| steps | guesses | 0.800 | 0.700 | 0.900 | 1.000 |",
        "| copy | 1.000 | 1.0000 | 0.999..1.000 | passed |",
        "| sigma/2 | flagged | passed |",
        "| age | 0.500 | 0.500 |",
        "time: attacks 1 s",
    ):
        assert said in page
    open_run = _report(facts={**FACTS, "epsilon": math.inf}, bounds=()).page()
    assert "claims no protection" in open_run
    assert "There is no ε to bound from below." in open_run
    assert "No lower bound was asked for." in _report(bounds=()).page()


def test_bounds_are_drawn():
    bounds = [
        Bound("steps", "guesses", 0.8, 0.9, 1.0, 0.7),
        Bound("canaries", "f-DP", 0.0, 0.3, 0.7, 0.0),
    ]
    files = bounds_figure(bounds)
    assert files["bounds.png"].startswith(b"\x89PNG")
    assert files["bounds.pdf"].startswith(b"%PDF")
    assert len(files["bounds.png"]) > 5000
