"""Worst-case pipeline audit: the statistic is the best there is, sound families pass, and whatever
is planted anywhere in the pipeline is seen."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from oracles import record_gradients
from rich.console import Console
from scipy import stats
from tiny import HERE
from torch import Tensor

from dpsynth.audit.bounds import Errors, attainable, gaussian_curve
from dpsynth.checks import UsageError
from dpsynth.codec import Codec
from dpsynth.marginals import Marginals
from dpsynth.privacy.clipping import TapClipper
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import HistogramNoise
from dpsynth.privacy.plan import gaussian_mu
from dpsynth.suite import pipeline
from dpsynth.suite.defects import ExactShares, HalfNoise, NoClip, NoNoise
from dpsynth.suite.pipeline import (
    FORMS,
    THREATS,
    PipelineAudit,
    _cuts,
    _evidence,
    _learned,
    _Listening,
    _replay,
    _Target,
    audit_pipeline,
    forms_of,
    worst_recipe,
    worst_table,
)
from dpsynth.training.fleet import train_fleet
from dpsynth.training.measure import measure
from dpsynth.training.recipe import FAMILIES, Seat

DELTA = 1e-5
TRAINED = [name for name, family in FAMILIES.items() if family.trained]


def small(family: str = "vae", epsilon: float = 4.0, **settings: Any) -> PipelineAudit:
    return audit_pipeline(family, epsilon, DELTA, **{"fits": 12, "device": "cpu", **settings})


def observed(family: str, epsilon: float, fits: int, *plants: Callback) -> dict[str, Any]:
    recipe = worst_recipe(family, DELTA, "cpu")
    seeds = (list(range(fits)), list(range(1000, 1000 + fits)))
    return pipeline._fleet(recipe, epsilon, seeds, lambda: plants)


# The worst case


@pytest.mark.parametrize("family", HERE)
def test_the_target_takes_the_whole_budget_in_every_family(family: str) -> None:
    """μ of all releases together is that of the claim: the plan has no slack to hide behind."""
    # A mixture is fitted three times a training.
    audit = small(family, fits=8 if family == "mixture" else 12)
    assert audit.mu == pytest.approx(gaussian_mu(4.0, DELTA))
    assert audit.design == pytest.approx(audit.mu, rel=1e-3)
    for stage in audit.stages.values():
        assert stage.design == pytest.approx(stage.mu, rel=1e-3)
        assert 0 < stage.epsilon < audit.epsilon
    together = math.sqrt(sum(stage.mu**2 for stage in audit.stages.values()))
    assert together == pytest.approx(audit.mu, rel=1e-6)
    assert ("training" in audit.stages) == FAMILIES[family].trained
    assert {"rows", "codec", "marginals"} <= set(audit.stages)
    assert audit.epsilon == pytest.approx(4.0, rel=1e-4)
    assert audit.sound


def test_the_target_repeats_rows_and_comes_last() -> None:
    whole, others = worst_table()
    assert len(whole) == len(others) + 1
    assert (whole.frame.iloc[:-1].to_numpy() == others.frame.to_numpy()).all()
    same = (others.frame == whole.frame.iloc[-1]).all(axis=1)
    assert same.sum() == 2


def test_log_likelihood_ratios_follow_their_law() -> None:
    """N(±μ²/2, μ²), in all stages together and in each; both tables have as many runs."""
    found = observed("vae", 10.0, 40)
    inside, outside = (half.sum(1) for half in found["scores"])
    mu = gaussian_mu(10.0, DELTA)
    both = np.concatenate([(inside - mu**2 / 2) / mu, (outside + mu**2 / 2) / mu])
    assert stats.kstest(both, stats.norm.cdf).pvalue > 1e-3
    signals = np.concatenate(found["signals"])
    centred = np.concatenate(found["scores"]) - np.repeat([[1], [-1]], 40, 0) * signals / 2
    for stage in np.flatnonzero(signals.mean(0)):
        each = centred[:, stage] / np.sqrt(signals[:, stage])
        assert stats.kstest(each, stats.norm.cdf).pvalue > 1e-3


# What the tables release


def listened(table: int, family: str = "vae") -> tuple[Any, Seat, list[np.ndarray], Ledger]:
    recipe, heard = worst_recipe(family, DELTA, "cpu"), []
    seat = Seat(worst_table()[table], 4.0, 7)
    measured = measure(recipe, seat, 11, lambda event: event, measurer=partial(_Listening, heard))
    ((ledger, answers),) = heard
    assert ledger is measured.ledger
    return recipe, seat, answers, ledger


@pytest.mark.parametrize(("family", "more"), [("vae", []), ("mixture", ["tables"])])
@pytest.mark.parametrize("mine", [0, 1])
def test_a_replay_asks_both_tables_what_the_run_asked_its_own(
    mine: int, family: str, more: list[str]
) -> None:
    """By counting: every query differs in the one cell of the target, and is charged as paid."""
    recipe, seat, answers, ledger = listened(mine, family)
    whole, code = _replay(recipe, seat, worst_table()[0], answers)
    others, _ = _replay(recipe, seat, worst_table()[1], answers)
    asked = ["rows", "cells", "marginal", "marginal", *more]
    assert [event.what.split(":")[0] for event in ledger.events] == asked
    assert len(whole) == len(others) == len(answers) == len(ledger.events)
    for one, other, event in zip(whole, others, ledger.events, strict=True):
        gap = one.counts - other.counts
        assert gap.sum() == 1
        assert np.count_nonzero(gap) == 1
        assert one.counts.sum() == 257
        assert one.sigma == pytest.approx(event.sigma)
        np.testing.assert_array_equal(one.noisy, other.noisy)
    marks = pd_counts("mark")
    np.testing.assert_array_equal(whole[3].counts, marks)
    assert code.tolist()[1:] == [1, 1]


def pd_counts(name: str) -> np.ndarray:
    frame = worst_table()[0].frame
    return frame.groupby(["label", name], observed=False).size().to_numpy(float)


def test_answers_that_do_not_fit_are_refused() -> None:
    recipe, seat, answers, _ = listened(0)
    table = worst_table()[1]
    with pytest.raises(UsageError, match="follows from the rows"):
        _replay(recipe, seat, table, answers[:-1])
    with pytest.raises(UsageError, match="follows from the rows"):
        _replay(recipe, seat, table, [*answers[:-1], answers[-1][:-1]])
    with pytest.raises(UsageError, match="more were released"):
        _replay(recipe, seat, table, [*answers, answers[-1]])


def test_queries_that_follow_from_the_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is counted only where the rows are many enough."""
    sound = Marginals.measure.__func__  # type: ignore[attr-defined]

    def eager(cls: Any, codes: Any, layout: Any, used: Any, measurer: Any, *rest: Any) -> Any:
        if sum(map(len, codes)) > 256:
            measurer._left += 1
            measurer.histograms("marginal:again", 1)(np.zeros(3))
        return sound(cls, codes, layout, used, measurer, *rest)

    monkeypatch.setattr(Marginals, "measure", classmethod(eager))
    with pytest.raises(UsageError, match=r"follows from the rows|more were released"):
        observed("naive_bayes", 4.0, 2)


# What the steps release


@pytest.mark.parametrize("family", TRAINED)
def test_without_noise_a_step_releases_the_others_and_the_target(family: str) -> None:
    """So that the ratio is plus or minus half the signal: nothing else is in what is released."""
    found = observed(family, 4.0, 3, NoNoise())
    for half, sign in zip((0, 1), (1, -1), strict=True):
        scores, signals = (found[name][half][:, -1] for name in ("scores", "signals"))
        np.testing.assert_allclose(scores, sign * signals / 2, rtol=1e-2)
        assert signals == pytest.approx(np.full(3, 0.6 * gaussian_mu(4.0, DELTA) ** 2), rel=0.02)


def test_the_share_of_the_target_is_its_own_clipped_gradient() -> None:
    """Against autograd, one record at a time."""
    wanted: list[Tensor] = []
    sound = TapClipper.accumulate

    def beside(self: TapClipper, losses: Callable[[], Tensor], counts: Tensor) -> Tensor:
        if counts.shape[1] == 1 and not wanted:
            parameters = list(self.network.parameters())
            rows = record_gradients(losses, parameters)
            for run, (row,) in enumerate(rows):
                flat = torch.cat([g.flatten() for g in row])
                wanted.append(flat * min(1.0, float(self.bound[run]) / (float(flat.norm()) + 1e-6)))
        return sound(self, losses, counts)

    tables = worst_table()
    recipe = worst_recipe("vae", DELTA, "cpu")
    whole, others = Seat(tables[0], 4.0, 1), Seat(tables[1], 4.0, 2)
    heard: list[Any] = []

    def codes() -> list[Tensor]:
        pairs = zip((whole, others), heard, strict=True)
        return [_replay(recipe, seat, tables[0], answers)[1] for seat, (_, answers) in pairs]

    watch = _Target(np.array([True, False]), 256, codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TapClipper, "accumulate", beside)
        patch.setattr(pipeline, "_STEPS", 1)
        # The draws of a second evaluation are others, so the loss is made to need none.
        patch.setattr("dpsynth.models.vae.Vae.record_loss", _plain_loss)
        listening = partial(_Listening, heard)
        train_fleet(recipe, [whole, others], callbacks=[watch], measurer=listening)
    for run in range(2):
        flat = torch.cat([part[run].flatten() for part in watch.first.values()])
        torch.testing.assert_close(flat, wanted[run], rtol=1e-3, atol=1e-6)
        assert float(flat.norm()) == pytest.approx(pipeline._CLIP, rel=1e-3)


def _plain_loss(self: Any, codes: Tensor, rng: Any) -> Tensor:
    shown = self.layout.one_hot(codes, self.prior_logits.dtype)
    mean = self._part("encoder")(shown)[..., : self.latent]
    group = self.layout.group_of(codes)
    logits = self.decode(mean, group, group)
    return (logits - shown).square().sum(-1) + mean.square().sum(-1)


# Bounds


def test_bounds_of_the_reference_page_are_attainable() -> None:
    """Medians simulated before this code was written, 1000 runs a side."""
    for mu, rates, gdp in ((0.2680, 0.12, 0.47), (0.9249, 1.1, 3.2), (2.0004, 3.0, 8.8)):
        forms, rng = forms_of(DELTA), np.random.default_rng(0)
        claim = gaussian_curve(mu)
        assert attainable(forms["rates"], claim, 1000, 1000, rng) == pytest.approx(
            rates, rel=0.2, abs=0.05
        )
        found = attainable(forms["gdp"], claim, 1000, 1000, rng)
        assert found == pytest.approx(gdp, rel=0.05, abs=0.15)
        assert attainable(forms["guesses"], claim, 1000, 1000, rng) > found


@pytest.mark.parametrize("cut", [-1.0, 0.0, 0.46, 1.5])
@pytest.mark.parametrize("form", FORMS)
def test_a_bound_holds_as_often_as_it_says(form: str, cut: float) -> None:
    """Exactly, over all errors of a perfect adversary at any threshold: also where the two rates
    are far apart, and guesses are no longer those of one coin."""
    mu, runs, alpha = 0.9249, 60, 0.05
    epsilon = 4.0 * (1 + 1e-3)
    rates = stats.norm.cdf([cut - mu, -cut])
    missed, false = (stats.binom.pmf(np.arange(runs + 1), runs, rate) for rate in rates)
    above = 0.0
    shown = forms_of(DELTA)[form]
    for m in range(runs + 1):
        for f in range(runs + 1):
            chance = missed[m] * false[f]
            if chance > 1e-9 and shown(Errors(m, runs, f, runs), alpha) > epsilon:
                above += chance
    assert above <= alpha


def test_learned_scores_are_of_runs_that_taught_nothing() -> None:
    """Noise of many features is told apart perfectly by those who learnt it, and by nobody else."""
    rng = np.random.default_rng(3)
    above = dict.fromkeys(FORMS, 0)
    for _ in range(60):
        noise = (rng.normal(size=(40, 15)), rng.normal(size=(40, 15)))
        scores, cuts = _learned(noise, DELTA, 0.95)
        assert len(scores[0]) == len(scores[1]) == 20
        for name, form in forms_of(DELTA).items():
            above[name] += form(Errors.at(cuts[name], *scores), 0.05) > 0
    # A bound above 0 where nothing is to be shown: 5 % of the time at most.
    assert max(above.values()) <= stats.binom.isf(1e-3, 60, 0.05)


def test_learned_scores_show_what_is_there() -> None:
    rng = np.random.default_rng(3)
    features = tuple(rng.normal(size=(400, 3)) + np.array([0, 0, shift]) for shift in (2, 0))
    scores, cuts = _learned((features[0], features[1]), DELTA, 0.95)
    evidence = _evidence(scores, cuts, 2.0, DELTA, 0.95)
    assert evidence.separation == pytest.approx(2.0, abs=0.25)
    for shown in evidence.bounds.values():
        assert 0.5 * shown.attainable < shown.epsilon < 1.5 * shown.attainable
        assert shown.joint < shown.epsilon


def test_a_threshold_looks_at_no_score() -> None:
    cuts = _cuts(2.0, 1000, DELTA, 0.95)
    assert cuts["gdp"] == cuts["guesses"] == 1.0
    assert 2.0 < cuts["rates"] < 4.0


# Defects


def halved(self: HistogramNoise, counts: np.ndarray) -> np.ndarray:
    noise = np.round(self.sigma / 2 * self._rng.standard_normal(counts.shape) * 1024) / 1024
    return counts + noise


def test_half_the_noise_everywhere_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HistogramNoise, "__call__", halved)
    audit = small(fits=120, plant=lambda: [HalfNoise()])
    assert "releases/guesses" in audit.violations
    assert not audit.sound
    assert audit.threats["releases"].separation == pytest.approx(2 * audit.mu, abs=0.5)


@pytest.mark.parametrize(
    ("plant", "violations"),
    [
        (NoClip, {"training", "releases/guesses"}),
        (NoNoise, {"training"}),
        (ExactShares, {"weights/guesses"}),
    ],
)
def test_a_planted_defect_is_a_violation(plant: type[Callback], violations: set[str]) -> None:
    audit = small(fits=24, plant=lambda: [plant()])
    assert violations <= set(audit.violations)
    assert audit.to_dict()["violations"] == list(audit.violations)


def test_noise_that_is_paid_for_and_not_added_is_a_violation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a family that takes no step: codec and tables are audited by themselves."""
    monkeypatch.setattr(HistogramNoise, "__call__", lambda self, counts: counts.copy())
    audit = small("naive_bayes", fits=24)
    wanted = {"releases/guesses", "weights/guesses", "rows", "codec", "marginals"}
    assert wanted <= set(audit.violations)


def test_a_codec_that_sees_the_target_twice_is_a_violation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each row counts ten times, charged as once."""
    sound = Codec.fit.__func__  # type: ignore[attr-defined]

    def tenfold(cls: Any, table: Any, measurer: Any, **settings: Any) -> Any:
        rows = np.repeat(np.arange(len(table)), 10)
        return sound(cls, table.take(rows), measurer, **settings)

    monkeypatch.setattr(Codec, "fit", classmethod(tenfold))
    audit = small("naive_bayes", fits=30)
    assert "codec" in audit.violations
    assert "marginals" not in audit.violations


# The audit


def test_finished_fleets_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    console = Console(quiet=True)
    monkeypatch.setattr(console, "print", lambda text, **_: told.append(text))
    settings = {"state": tmp_path, "fleet": 8, "fits": 12, "console": console}
    first = small("independent", **settings)
    assert len(told) == 3
    assert "24 of 24 runs, about 0 s left" in told[-1]

    def unwanted(*_: Any, **__: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(pipeline, "train_fleet", unwanted)
    (tmp_path / "fleet-1.npz").rename(tmp_path / "kept")
    with pytest.raises(AssertionError, match="trained again"):
        small("independent", **settings)
    (tmp_path / "kept").rename(tmp_path / "fleet-1.npz")
    assert small("independent", **settings) == first
    with pytest.raises(UsageError, match="begun for another"):
        small("independent", seed=1, **settings)


def test_runs_share_no_seed_and_the_seed_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Seat] = []
    sound = train_fleet

    def noted(recipe: Any, seats: Any, **settings: Any) -> Any:
        seen.extend(seats)
        return sound(recipe, seats, **settings)

    monkeypatch.setattr(pipeline, "train_fleet", noted)
    first = small("independent", fits=8, fleet=6)
    assert len({seat.seed for seat in seen}) == len(seen) == 16
    again = small("independent", fits=8, fleet=6)
    other = small("independent", fits=8, fleet=6, seed=1)
    assert again.threats == first.threats
    assert other.threats != first.threats


def test_a_report_is_json() -> None:
    body = json.loads(json.dumps(small("independent").to_dict()))
    assert set(body["threats"]) == set(THREATS)
    assert set(body["threats"]["table"]["bounds"]) == set(FORMS)
    assert body["violations"] == []
    assert body["sound"] is True
    shown = body["threats"]["releases"]["bounds"]["gdp"]
    assert shown["errors"]["members"] == 12


def test_the_measured_ledger_is_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that charges less than it was asked to claims less."""
    sound = Ledger.pay

    def cheap(self: Ledger, event: Event) -> None:
        if not event.what.startswith("marginal"):
            sound(self, event)

    monkeypatch.setattr(Ledger, "pay", cheap)
    monkeypatch.setattr(
        _Listening,
        "answering",
        lambda self, what, mu, queries: HistogramNoise(1.0, self._rng, queries),
    )
    monkeypatch.setattr(pipeline, "_replay", lambda *_: ([], torch.zeros(3)))
    assert small("independent").epsilon < 3.9


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"family": "flow"}, "family=flow"),
        ({"epsilon": math.inf}, "epsilon=inf"),
        ({"fits": 7}, "fits=7"),
        ({"fleet": 1}, "fleet=1"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_an_audit_that_cannot_be_is_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        small(**settings)
