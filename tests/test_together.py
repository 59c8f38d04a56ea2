"""All runs of a sweep composed: closed forms, what counts once, and where it is told."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from test_frontier_results import simulated
from tiny import recipe, seat

from dpsynth.checks import UsageError
from dpsynth.frontier.plot import write_frontier
from dpsynth.frontier.results import releases, summary, together_rows
from dpsynth.privacy import accounting
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import gaussian_mu
from dpsynth.privacy.together import Release, together
from dpsynth.release.card import card, stated
from dpsynth.release.page import page
from dpsynth.training.fleet import train_fleet
from dpsynth.training.run import Run

DELTA = 1e-5
BOUNDS = Event("bounds:age", "gaussian", sigma=4.0, when="2030-01-01T00:00:00+00:00")


def whole(name: str, sigma: float, target: float = 1.0, **facts: Any) -> Release:
    return Release(name, target, DELTA, (Event("codec", "gaussian", sigma=sigma),), **facts)


def sampled(name: str, sigma: float, q: float = 0.02, steps: int = 50, **facts: Any) -> Release:
    events = (
        Event("codec", "gaussian", sigma=20.0),
        Event("dpsgd:vae", "poisson_gaussian", sigma=sigma, q=q, steps=steps),
    )
    return Release(name, facts.pop("target", 1.0), DELTA, events, **facts)


def total_mu(*sigmas: float) -> float:
    return math.sqrt(sum(sigma**-2 for sigma in sigmas))


# What it costs


def test_gaussians_add_up_as_their_squares() -> None:
    sigmas = (2.0, 3.0, 5.0, 2.0)
    found = together([whole(str(i), s) for i, s in enumerate(sigmas)])
    mu = total_mu(*sigmas)
    assert gaussian_mu(found.epsilon, DELTA) == pytest.approx(mu, rel=2e-3)
    assert found.epsilon <= found.second <= found.epsilon * 1.05
    assert found.mu == pytest.approx(mu, rel=5e-3) and found.mu >= mu * (1 - 1e-9)
    # TPR − FPR of a Gaussian shift is 2Φ(μ/2) − 1.
    assert found.advantage == pytest.approx(math.erf(mu / 2 / math.sqrt(2)), rel=5e-3)
    assert gaussian_mu(found.alone, DELTA) == pytest.approx(1 / 2.0, rel=2e-3)
    assert found.delta_sum == pytest.approx(4 * DELTA)
    assert gaussian_mu(found.epsilon_at_sum, 4 * DELTA) == pytest.approx(mu, rel=2e-3)
    assert found.runs == 4 and found.unprotected == found.repeated == 0


def test_all_events_of_all_runs_are_composed() -> None:
    runs = [sampled(str(i), 1.0 + i / 4, q=0.01 * (1 + i)) for i in range(3)]
    events = [event for run in runs for event in run.events]
    found = together(runs)
    assert found.epsilon == pytest.approx(accounting.compose_epsilon(events, DELTA), rel=1e-9)
    alone = [accounting.compose_epsilon(run.events, DELTA) for run in runs]
    assert found.alone == max(alone) < found.epsilon < sum(alone)
    assert found.epsilon * (1 - 1e-3) <= found.second <= found.epsilon * 1.05


def test_what_a_shared_schema_cost_counts_once() -> None:
    other = replace(BOUNDS, when="2031-01-01T00:00:00+00:00")

    def run(name: str, *spent: Event) -> Release:
        plain = whole(name, 3.0)
        return replace(plain, events=(*spent, *plain.events), spent=len(spent))

    def mu(*runs: Release) -> float:
        return gaussian_mu(together(runs).epsilon, DELTA)

    assert mu(run("a", BOUNDS), run("b", BOUNDS)) == pytest.approx(total_mu(4, 3, 3), rel=2e-3)
    assert mu(run("a", BOUNDS), run("b", other)) == pytest.approx(total_mu(4, 4, 3, 3), rel=2e-3)
    assert mu(run("a", BOUNDS), run("b")) == pytest.approx(total_mu(4, 3, 3), rel=2e-3)


def test_the_same_content_is_one_release() -> None:
    one, again = whole("a", 3.0, content="x"), whole("b", 3.0, content="x")
    found = together([one, again])
    assert (found.runs, found.repeated) == (1, 1)
    assert found.epsilon == together([one]).epsilon
    for other in (replace(again, content="y"), replace(again, content="")):
        assert together([replace(one, content=other.content and "x"), other]).runs == 2


def test_runs_without_privacy_make_all_of_it_infinite() -> None:
    free = Release("free", math.inf, DELTA, (Event("codec", "none"),))
    kept = [whole("a", 3.0), whole("b", 4.0)]
    found = together([*kept, free])
    assert found.published == math.inf and found.unprotected == 1 and found.runs == 2
    assert found.epsilon == together(kept).epsilon == together(kept).published
    assert "ε=∞" in found.line and "ε=∞" not in together(kept).line
    assert "\n" not in found.line
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["published"] == "inf"
    nothing = together([free])
    assert nothing.epsilon == 0 and nothing.published == math.inf and nothing.groups == ()


def test_units_of_several_rows_cost_more() -> None:
    runs = [whole(str(i), 6.0, unit="person", contributions=3) for i in range(2)]
    assert gaussian_mu(together(runs).epsilon, DELTA) == pytest.approx(3 * total_mu(6, 6), rel=2e-3)


def test_groups_are_the_runs_of_one_target() -> None:
    runs = [sampled("a", 2.0), sampled("b", 2.1), whole("c", 1.0, target=3.0)]
    found = together(runs)
    low, high = found.groups
    assert (low.target, low.runs, high.target, high.runs) == (1.0, 2, 3.0, 1)
    exact = together(runs[:2])
    assert exact.epsilon <= low.together <= exact.epsilon * 1.005
    assert low.alone == exact.alone and high.together == high.alone == found.alone
    rows = together_rows(found)
    assert [row[0] for row in rows] == ["1", "3", "all"] and rows[-1][1] == "3"


# Choosing


def test_choosing_by_all_scores_pays_for_all_runs_and_scores() -> None:
    """Naive selection, the best of m runs: every run and every score is looked at."""
    runs = [whole(str(i), 2.0) for i in range(5)]
    found = together(runs, share=0.2)
    expected = math.sqrt(5 * (1 + 0.2)) / 2
    assert gaussian_mu(found.chosen, DELTA) == pytest.approx(expected, rel=5e-3)
    assert found.chosen > found.epsilon > found.alone


def test_repeat_and_select_pays_for_the_costliest_as_a_trial() -> None:
    runs = [whole("a", 10.0), whole("b", 5.0, target=2.0), whole("c", 8.0)]
    found = together(runs, share=0.2)
    alone = together([runs[1]])
    score = 1 / (math.sqrt(0.2) * gaussian_mu(alone.alone, DELTA))
    trial = [
        *runs[1].events,
        Event("score", "gaussian", sigma=score),
        Event("select", "repeat_select", mean=3, shape=1.0),
    ]
    assert found.selected == pytest.approx(accounting.compose_epsilon(trial, DELTA), rel=1e-6)
    many = together([whole(str(i), 5.0) for i in range(200)], share=0.2)
    assert many.selected < many.chosen, "which is what it is for"


def test_a_run_that_was_selected_itself_is_composed_first() -> None:
    chosen = replace(
        whole("a", 6.0),
        events=(Event("codec", "gaussian", sigma=6.0), Event("select", "repeat_select", mean=2)),
    )
    plain = whole("b", 6.0)
    found = together([plain, chosen])
    events = [*chosen.events, *plain.events]
    assert found.epsilon == pytest.approx(accounting.compose_epsilon(events, DELTA))
    assert found.epsilon > together([chosen]).epsilon
    assert found.selected == math.inf
    with pytest.raises(UsageError, match="both selected"):
        together([chosen, replace(chosen, name="c")])


# Refusals


def test_what_cannot_be_composed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="releases=0"):
        together([])
    with pytest.raises(UsageError, match="different units"):
        together([whole("a", 3.0), whole("b", 3.0, unit="person", contributions=2)])
    monkeypatch.setattr("dpsynth.privacy.prv.upper", lambda *_, **__: 0.5)
    with pytest.raises(UsageError, match="second accountant"):
        together([whole("a", 3.0), whole("b", 3.0)])


def test_failures_leave_less_for_the_second_accountant() -> None:
    spent = (BOUNDS, Event("levels:job", "failure", delta=DELTA / 2))
    run = replace(whole("a", 3.0), events=(*spent, *whole("a", 3.0).events), spent=2)
    assert together([run]).epsilon > together([whole("a", 3.0), whole("b", 4.0)]).epsilon
    worse = replace(run, events=(replace(spent[1], delta=0.5), *run.events[2:]), spent=1)
    assert together([worse]).second == together([worse]).epsilon == math.inf


# Where it is told


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    seats = [seat(1.0, 0), seat(1.0, 1), seat(math.inf, 0)]
    for number, trained in enumerate(train_fleet(recipe("vae"), seats)):
        Run.of(trained).save(root / f"run-{number}")
    Run.load(root / "run-0").save(root / "run-0-again")
    return sorted(root.iterdir())


def test_run_folders_are_read_as_releases(folders: list[Path]) -> None:
    read = releases(folders)
    assert [r.name for r in read] == ["run-0", "run-0-again", "run-1", "run-2"]
    assert [r.target for r in read] == [1.0, 1.0, 1.0, math.inf]
    ledger = Run.load(folders[0]).ledger
    assert (read[0].events, read[0].delta) == (ledger.events, ledger.delta)
    found = together(read)
    assert (found.runs, found.repeated, found.unprotected) == (2, 1, 1)
    assert 1.0 < found.epsilon < 2.0


def test_a_folder_without_a_ledger_is_no_run(folders: list[Path], tmp_path: Path) -> None:
    from dpsynth.artifacts import write_folder

    write_folder(tmp_path / "control", {"a": b""}, {})
    with pytest.raises(UsageError, match="has no ledger"):
        releases([*folders, tmp_path / "control"])


def test_the_frontier_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpsynth.frontier.plot.figure", lambda *_, **__: Figure())
    found = together([whole("a", 5.0), whole("b", 6.0), whole("c", 2.0, target=3.0)])
    folder = write_frontier(simulated(1), tmp_path / "f", title="t", together=found)
    held = json.loads((folder / "privacy.json").read_text())
    assert held["epsilon"] == found.epsilon and len(held["groups"]) == 2
    assert (folder / "privacy.csv").read_text().count("\n") == 4
    page = (folder / "frontier.html").read_text()
    assert "<h2>Publishing and choosing</h2>" in page and f"<td>{found.epsilon:.4g}</td>" in page
    without = write_frontier(simulated(1), tmp_path / "g", title="t")
    assert not (without / "privacy.json").exists()


def test_the_summary_tells() -> None:
    found = together([whole("a", 5.0), whole("b", 6.0), whole("c", 2.0, target=3.0)])
    text = summary(simulated(1), title="t", together=found)
    assert f"| all | 3 | {found.alone:.4g} | {found.epsilon:.4g} |" in text
    assert "protected by nothing" not in text
    free = summary(simulated(1), title="t", together=replace(found, unprotected=2))
    assert "2 runs at ε=∞ beside them are protected by nothing" in free
    assert "Publishing and choosing" not in summary(simulated(1), title="t")


FACTS: dict[str, Any] = {
    "name": "n", "family": "vae", "epsilon": 1.0, "delta": DELTA, "data": "d", "seed": None,
    "unit": "record", "relation": "add_remove", "accountant": "PLD",
}  # fmt: skip


@pytest.mark.parametrize(("total", "said"), [(3.25, "ε = 3.25"), (math.inf, "ε = ∞")])
def test_the_card_tells_what_the_sweep_costs(total: float, said: str) -> None:
    facts = {**FACTS, "sweep_runs": 90, "sweep_epsilon": total}
    line = f"this run alone: ε = 1; all 90 runs of its sweep published together: {said}"
    assert line in card(facts)
    assert line[1:] in page(facts, None, None, None)
    assert "whole sweep" not in card(FACTS)
    with pytest.raises(UsageError, match="go together"):
        card({**FACTS, "sweep_runs": 90})


def test_a_card_states_what_can_be_read_back() -> None:
    ledger = [{"what": "a|b<c", "mechanism": "gaussian", "params": "σ=1"}]
    facts = {**FACTS, "ledger": ledger, "steps": 7, "sample_rate": 0.0125, "clip": 1.0}
    said = stated(card(facts))
    assert said["epsilon"] == 1.0 and said["delta"] == DELTA
    assert said["headline"] == "ε = 1 at δ = 1e-05" and said["unit"] == "record"
    assert (said["steps"], said["sample_rate"]) == (7.0, 0.0125)
    assert said["ledger"] == [("a|b<c", "gaussian")]
    free = stated(card({**FACTS, "epsilon": math.inf}))
    assert free["epsilon"] == math.inf and "headline" not in free
    with pytest.raises(UsageError, match="twice"):
        stated(card(facts) + "| steps T | 8 |\n")
    for text in ("", "no front matter", "---\n: [\n---\n", "---\nlicense: other\n---\n"):
        with pytest.raises(UsageError, match="front matter"):
            stated(text)
