"""The audit of one run, from the run's folder to the evidence, and through the command."""

import json
from dataclasses import replace
from io import StringIO

import numpy as np
import pandas as pd
import pytest
import tiny
from rich.console import Console

from dpsynth.artifacts import read_folder
from dpsynth.checks import UsageError
from dpsynth.data import Split
from dpsynth.randomness import stream
from dpsynth.suite import run as module
from dpsynth.suite.run import Setting, audit_run
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat
from dpsynth.training.run import Run

SMALL = Setting(max_candidates=200, draws=2, shadows=8, fits=8, canaries=40)


# What is looked for is there however good the model is.
pytestmark = pytest.mark.usefixtures("hasty")


@pytest.fixture(scope="module")
def split():
    return Split.random(tiny.table(900, seed=3), stream(0, "split"), holdout=0.3, reference=0.3)


def _trained(split, folder, model, epsilon):
    recipe = tiny.recipe(model)
    (trained,) = train_fleet(recipe, [Seat(split.members, epsilon, 5)])
    Run.of(trained, data="tiny").save(folder)
    return folder


@pytest.fixture(scope="module")
def diffusion(split, tmp_path_factory):
    return _trained(split, tmp_path_factory.mktemp("runs") / "diffusion", "diffusion", 4.0)


def _audited(folder, split, out, setting=SMALL, text=None):
    console = Console(file=text or StringIO())
    return audit_run(folder, split, setting, out=out, data="tiny", console=console)


@pytest.fixture(scope="module")
def quick(diffusion, split, tmp_path_factory):
    """The quick audit: its report, its folder and what it said."""
    out, text = tmp_path_factory.mktemp("quick") / "audit", StringIO()
    return _audited(diffusion, split, out, text=text), out, text.getvalue()


def test_quick_audit_of_a_private_run(quick):
    report, out, said = quick
    files, lineage = read_folder(out)
    assert set(files) == {
        *("audit.json", "README.md", "scores.parquet"),
        *("roc.png", "roc.pdf", "bounds.png", "bounds.pdf"),
    }
    assert lineage == {"suite": "quick", "run": "diffusion"}
    body = json.loads(files["audit.json"])
    assert body["verdict"] == report.verdict
    assert {c["name"] for c in body["controls"]} == {"fresh", "p-leak", "copy", "blind"}
    assert body["defects"]["sound"] is False
    assert [b["audit"] for b in body["bounds"]] == ["steps", "steps"]
    assert "about" in said.splitlines()[0]
    assert not out.with_name(".audit.work").exists()


def test_scores_stand_beside_their_records(quick, split):
    report, out, _ = quick
    frame = pd.read_parquet(out / "scores.parquet")
    half = len(frame) // 2
    assert frame["member"].tolist() == [True] * half + [False] * half
    assert report.membership.members == half
    members = split.members.frame
    known, given = _lines(members), _lines(frame[list(members.columns)])
    assert [line in known for line in given] == frame["member"].tolist()
    names = {attack.name for attack in report.membership.attacks}
    assert names < set(frame.columns)
    assert any(name.startswith("diffusion:") and name.endswith("ratio") for name in names)


def _lines(frame):
    return frame.astype("string").fillna("?").agg("|".join, axis=1).tolist()


@pytest.mark.parametrize(("model", "epsilon"), [("vae", np.inf), ("naive_bayes", 1.0)])
def test_without_private_steps_nothing_is_bounded(split, tmp_path, model, epsilon):
    folder = _trained(split, tmp_path / "run", model, epsilon)
    report = _audited(folder, split, tmp_path / "audit")
    assert report.bounds == ()
    assert set(report.defects) > {"sound", "sigma/2"}
    assert report.membership.ceiling_auc == 1.0 if np.isinf(epsilon) else True
    assert "bounds.png" not in read_folder(tmp_path / "audit")[0]


def test_full_audit(diffusion, split, tmp_path):
    report = _audited(diffusion, split, tmp_path / "audit", replace(SMALL, suite="full"))
    assert report.shadow is not None
    assert report.shadow.selection == "models"
    names = {attack.name for attack in report.shadow.attacks}
    assert {"meta", "timestep_mlp"} < names
    assert any(name.startswith("lira ") for name in names)
    kinds = {bound.audit for bound in report.bounds}
    assert kinds >= {"steps", "whole pipeline, releases seen", "canaries in DP-SGD"}
    assert any("targeted queries" in note for note in report.notes)
    frame = pd.read_parquet(tmp_path / "audit" / "scores.parquet")
    assert "meta" in frame


def test_full_audit_where_no_gradient_canary_fits(split, tmp_path):
    folder = _trained(split, tmp_path / "run", "autoregressive", 4.0)
    report = _audited(folder, split, tmp_path / "audit", replace(SMALL, suite="full"))
    kinds = {bound.audit for bound in report.bounds}
    assert kinds >= {"steps", "whole pipeline, releases seen"}
    assert "canaries in DP-SGD" not in kinds
    assert any("no bound from one run" in note for note in report.notes)


def test_a_run_with_secure_noise_is_audited_by_models_that_have_a_seed(split, tmp_path):
    recipe = tiny.recipe("vae", privacy={"secure": True})
    (trained,) = train_fleet(recipe, [Seat(split.members, 4.0, None)])
    Run.of(trained, data="tiny").save(tmp_path / "run")
    report = _audited(tmp_path / "run", split, tmp_path / "audit")
    assert any(a.name.endswith("ratio") for a in report.membership.attacks)


def test_a_killed_audit_goes_on(diffusion, quick, split, tmp_path, monkeypatch):
    whole, *_ = quick

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "infer_attributes", killed)
        with pytest.raises(KeyboardInterrupt):
            _audited(diffusion, split, tmp_path / "audit")
    assert not (tmp_path / "audit").exists()

    with monkeypatch.context() as patch:  # what was done is not done again
        patch.setattr(module, "score_all", killed)
        patch.setattr(module, "judge_controls", killed)
        again = _audited(diffusion, split, tmp_path / "audit")
    assert again.membership == whole.membership
    assert again.controls == whole.controls
    assert again.attributes == whole.attributes


def test_another_audit_does_not_go_on_there(diffusion, split, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_all", killed)
        with pytest.raises(KeyboardInterrupt):
            _audited(diffusion, split, tmp_path / "audit")
    with pytest.raises(UsageError, match="was begun for another run, other rows or settings"):
        _audited(diffusion, split, tmp_path / "audit", replace(SMALL, seed=1))


def test_what_cannot_be_audited_is_refused(diffusion, split, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        _audited(diffusion, split, tmp_path / "there")
    parts = (split.members, split.holdout, split.reference)
    fewer = Split(*(part.select(["age", "job", "rich"]) for part in parts))
    with pytest.raises(UsageError, match="has another schema than the rows"):
        _audited(diffusion, fewer, tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"suite": "deep"}, "suite=deep: unknown; choose one of full, quick"),
        ({"shadows": 0}, "shadows=0"),
        ({"seed": -1}, "seed=-1"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_settings_are_checked(change, said):
    with pytest.raises(UsageError, match=said):
        replace(SMALL, **change)
