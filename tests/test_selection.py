"""Private selection: the law of the number of trials, what a trial may cost, and what is chosen."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny import ROWS, SCHEMA, frame, recipe, table

from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.events import Event
from dpsynth.privacy.selection import Selection, allowance
from dpsynth.randomness import stream
from dpsynth.release.verify import verify
from dpsynth.training import select as module
from dpsynth.training.run import Run
from dpsynth.training.select import (
    Choice,
    noisy_error,
    pair_error,
    select,
    selected_events,
    trial_epsilon,
)

SHAPES = (0.0, 0.3, 1.0, 2.5)
DELTA = 1e-5
BAYES = recipe("naive_bayes")


# The number of trials


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.0, 1.5, 4.0, 20.0])
def test_the_law_adds_up_and_has_its_mean(shape: float, mean: float) -> None:
    k = np.arange(1, 200_000)
    chance = Selection(mean, shape).pmf(k)
    assert chance.sum() == pytest.approx(1, abs=1e-9)
    assert (k * chance).sum() == pytest.approx(mean, rel=1e-6)


def test_the_law_is_the_one_of_the_paper() -> None:
    """Definition 1: (1−γ)^k/(γ^−η − 1) · Π_{l<k} (l+η)/(l+1), multiplied out."""
    law = Selection(3.0, 1.7)
    for k in range(1, 12):
        rise = math.prod((j + 1.7) / (j + 1) for j in range(k))
        value = (1 - law.gamma) ** k / (law.gamma**-1.7 - 1) * rise
        assert law.pmf(np.array([k]))[0] == pytest.approx(value, rel=1e-9)
    one, none = Selection(4.0, 1.0), Selection(4.0, 0.0)
    assert one.gamma == pytest.approx(1 / 4)
    k = np.arange(1, 9)
    assert one.pmf(k) == pytest.approx(stats.geom(1 / 4).pmf(k), rel=1e-9)
    assert none.pmf(k) == pytest.approx(stats.logser(1 - none.gamma).pmf(k), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_draws_follow_the_law(shape: float) -> None:
    law, rng = Selection(3.0, shape), stream(7, f"trials:{shape}")
    drawn = np.array([law.trials(rng) for _ in range(6000)])
    assert drawn.min() == 1
    last = 12
    expected = law.pmf(np.arange(1, last))
    expected = np.append(expected, 1 - expected.sum()) * len(drawn)
    found = np.bincount(np.minimum(drawn, last), minlength=last + 1)[1:]
    assert stats.chisquare(found, expected).pvalue > 1e-4


@pytest.mark.parametrize("shape", [*SHAPES, 60.0])
def test_the_last_draw_ends(shape: float) -> None:
    """The terms of the law add up to 1 but for rounding, and a draw may fall beyond them."""

    class Last:
        def random(self) -> float:
            return 1.0

    law = Selection(200.0, shape)
    last = law.trials(Last())  # pyright: ignore[reportArgumentType]
    assert 200 < last < 1_000_000
    assert law.pmf(np.array([last]))[0] < 1e-12


def test_one_trial_is_one_trial() -> None:
    rng = stream(0, "trials")
    assert {Selection(1.0, shape).trials(rng) for shape in SHAPES for _ in range(20)} == {1}


@pytest.mark.parametrize(
    "wrong",
    [{"mean": 0.5}, {"mean": math.inf}, {"shape": -0.1}, {"shape": math.inf}, {"share": 0},
     {"share": 1}],
)  # fmt: skip
def test_no_such_law(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"selection.{next(iter(wrong))}="):
        Selection(**wrong)


# What the chosen trial pays on top

EVENTS = st.lists(
    st.one_of(
        st.builds(lambda s: Event("a", "gaussian", sigma=s), st.sampled_from([1.0, 2.0, 5.0, 7.0])),
        st.builds(
            lambda s, q, n: Event("b", "poisson_gaussian", sigma=s, q=q, steps=n),
            st.sampled_from([1.0, 2.0]),
            st.sampled_from([0.1, 0.2]),
            st.integers(1, 5),
        ),
        st.builds(lambda e: Event("c", "pure", epsilon=e), st.sampled_from([0.1, 0.2])),
    ),
    max_size=6,
)


def totals(events: list[Event]) -> dict[Any, float]:
    """μ² of whole Gaussians, and steps of each other mechanism."""
    found: dict[Any, float] = {}
    for e in events:
        whole = e.mechanism == "gaussian"
        key = "whole" if whole else (e.mechanism, e.sigma, e.q, e.epsilon)
        found[key] = found.get(key, 0.0) + (e.steps / e.sigma**2 if whole else e.steps)
    return found


@settings(max_examples=150, deadline=None)
@given(EVENTS, st.lists(EVENTS, max_size=3))
def test_with_the_allowance_no_candidate_costs_more(
    own: list[Event], others: list[list[Event]]
) -> None:
    more = allowance(own, others)
    lifted = totals([*own, *more])
    for other in others:
        for key, value in totals(other).items():
            assert lifted.get(key, 0.0) >= value - 1e-12
    needed = {k: max(totals(o).get(k, 0.0) for o in [own, *others]) for k in lifted}
    assert lifted == pytest.approx(needed), "and nothing is paid in vain"


def test_candidates_that_cost_alike_need_no_allowance() -> None:
    events = [Event("a", "gaussian", sigma=3.0), Event("dpsgd:vae", "poisson_gaussian", sigma=1.0,
              q=0.1, steps=9)]  # fmt: skip
    named = [replace(e, what="other", when="2030-01-01") for e in reversed(events)]
    assert allowance(events, [events, named]) == []


# The ε of a trial


def own_bound(mu2: float, mean: float, delta: float) -> float:
    """ε of the best of a geometric number of μ-GDP trials, by hand: theorem 2 of Papernot & Steinke
    at η=1 with R(α) = αμ²/2, on a grid of its own, and the conversion of Canonne et al. 2020."""
    orders = 1 + np.geomspace(1e-3, 3e3, 40_000)
    curve = orders * mu2 / 2
    hat = ((1 - 1 / orders) * curve + math.log(mean) / orders).min()
    total = curve + 2 * hat + math.log(mean) / (orders - 1)
    found = total + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    return float(found.min())


@pytest.mark.parametrize(("epsilon", "mean"), [(0.5, 2.0), (2.0, 10.0), (8.0, 50.0)])
def test_a_measured_candidate_is_charged_what_the_theorem_says(epsilon: float, mean: float) -> None:
    choice = Choice((BAYES,), Selection(mean, 1.0, share=0.2), epsilon)
    trial = trial_epsilon(choice, SCHEMA)
    plan = module._trial_plan(BAYES, SCHEMA, trial)
    events = selected_events(choice, BAYES, SCHEMA, plan)
    whole = compose_epsilon(events, DELTA)
    mu2 = sum(1 / e.sigma**2 for e in events if e.mechanism == "gaussian")
    assert own_bound(mu2, mean, DELTA) <= whole <= own_bound(mu2, mean, DELTA) * 1.02
    assert 0.98 * epsilon <= whole <= epsilon
    assert trial < epsilon
    assert [e.what for e in events][-2:] == ["score", "select"]
    score, whole_trial = events[-2].sigma ** -2, sum(1 / e.sigma**2 for e in events[:-2])
    assert score == pytest.approx(0.2 * whole_trial, rel=1e-3)


def test_fewer_trials_leave_more_for_each() -> None:
    found = [trial_epsilon(Choice((BAYES,), Selection(m), 2.0), SCHEMA) for m in (1.0, 5.0, 40.0)]
    assert found == sorted(found, reverse=True) and found[0] < 2.0


def test_unequal_candidates_are_charged_as_the_costliest() -> None:
    trained = recipe("vae", privacy={"steps": 2})
    longer = recipe("vae", privacy={"steps": 2, "batch": 64})
    choice = Choice((trained, longer, BAYES), Selection(3.0), 0.5)
    trial = trial_epsilon(choice, SCHEMA)
    every = [
        selected_events(choice, r, SCHEMA, module._trial_plan(r, SCHEMA, trial))
        for r in choice.candidates
    ]
    sums = [totals([e for e in events if e.what != "select"]) for events in every]
    assert sums[0] == pytest.approx(sums[1]) and sums[1] == pytest.approx(sums[2])
    costs = [compose_epsilon(events, DELTA) for events in every]
    assert 0.49 <= max(costs) <= 0.5 and max(costs) - min(costs) < 1e-6


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(UsageError, match="candidates=0"):
        Choice((), Selection(), 1.0)
    with pytest.raises(UsageError, match="epsilon=inf"):
        Choice((BAYES,), Selection(), math.inf)
    with pytest.raises(UsageError, match=r"differ in privacy\.delta"):
        Choice((BAYES, recipe("vae", privacy={"delta": 1e-6})), Selection(), 1.0)
    with pytest.raises(UsageError, match="too small for a choice"):
        trial_epsilon(Choice((BAYES,), Selection(1e6, 1.0), 1e-3), SCHEMA)
    choice = Choice((BAYES,), Selection(2.0), 1.0)
    with pytest.raises(RefusedError, match="expected_rows"):
        trial_epsilon(choice, replace(SCHEMA, expected_rows=None))
    drafted = replace(SCHEMA.columns[0], provenance="data")
    with pytest.raises(RefusedError, match="read off the data"):
        trial_epsilon(choice, replace(SCHEMA, columns=(drafted, *SCHEMA.columns[1:])))
    other = recipe("vae")
    with pytest.raises(RefusedError, match="none of its candidates"):
        selected_events(choice, other, SCHEMA, module._trial_plan(other, SCHEMA, 0.5))
    for facts in (None, {}, {**choice.to_dict(), "more": 1}):
        with pytest.raises(UsageError, match="must give exactly"):
            Choice.from_dict(facts)
    assert Choice.from_dict(choice.to_dict()) == choice


# The score


def oracle(members: Table, synthetic: Table, rows: int) -> float:
    """By pandas, cell by cell."""

    def binned(one: Table) -> pd.DataFrame:
        found = {}
        for c in one.schema.columns:
            values = one.frame[c.name]
            if c.numeric:
                edges = np.linspace(c.lower, c.upper, 21)
                numbers = values.astype(float).to_numpy(na_value=np.nan)
                cells = np.digitize(numbers, edges[1:-1])
                found[c.name] = np.where(np.isnan(numbers), "none", cells.astype(str))
            else:
                found[c.name] = values.astype("string").fillna("none").to_numpy()
        return pd.DataFrame(found)

    real, made = binned(members), binned(synthetic)
    errors = []
    for a, b in itertools.combinations(real.columns, 2):
        first = real.groupby([a, b]).size() / rows
        second = made.groupby([a, b]).size() / len(made)
        errors.append(first.sub(second, fill_value=0).abs().sum() / 2)
    return float(np.mean(errors))


def test_the_score_is_the_mean_distance_of_two_way_tables() -> None:
    members, synthetic = table(300), table(250, seed=1)
    for rows in (300, 400):
        found = pair_error(members, synthetic, rows)
        assert found == pytest.approx(oracle(members, synthetic, rows), abs=1e-12)
    assert pair_error(members, members, 300) == 0


def test_one_row_moves_the_score_by_half_over_the_public_rows() -> None:
    """The sensitivity that the noise is scaled by, and it is reached."""
    rows = table(200)
    made = table(50, seed=3)
    moves = []
    for left_out in range(60):
        less = rows.take(np.delete(np.arange(200), left_out))
        moves.append(abs(pair_error(rows, made, ROWS) - pair_error(less, made, ROWS)))
    assert max(moves) <= 1 / (2 * ROWS) + 1e-12
    assert max(moves) == pytest.approx(1 / (2 * ROWS))


def test_the_score_has_the_noise_that_is_paid_for() -> None:
    rng = stream(5, "noise")
    drawn = [noisy_error(0.01, 400, 3.0, rng) for _ in range(3000)]
    assert stats.kstest(drawn, stats.norm(0.01 * 2 * 400, 3.0).cdf).pvalue > 1e-4


def test_a_table_of_one_column_has_a_score() -> None:
    rows = table(50).select(["age"])
    assert pair_error(rows, rows, 50) == 0
    assert 0 < pair_error(rows, table(50, seed=1).select(["age"]), 50) <= 1


# The whole


@pytest.fixture(scope="module")
def choice() -> Choice:
    return Choice((recipe("vae"), recipe("vae", options={"lr": 0.01})), Selection(3.0), 2.0)


def test_the_chosen_run_pays_for_all_trials_and_verifies(choice: Choice, tmp_path: Path) -> None:
    chosen = select(table(), choice, seed=3)
    assert chosen.recipe in choice.candidates
    assert 1.9 <= chosen.ledger.epsilon <= 2.0
    assert chosen.plan.epsilon == trial_epsilon(choice, SCHEMA) < 2.0
    run = Run.of(chosen, selection=choice.to_dict())
    run.save(tmp_path / "run")
    verdict = verify(tmp_path / "run")
    assert (verdict.target, verdict.epsilon) == (2.0, chosen.ledger.epsilon)
    for change in ({"epsilon": 1.9}, {"mean": 2.0}, {"shape": 0.5}, {"share": 0.2},
                   {"candidates": [BAYES.to_dict()]}):  # fmt: skip
        forged = {**choice.to_dict(), **change}
        replace(run, lineage={**run.lineage, "selection": forged}).save(tmp_path / "run")
        with pytest.raises(RefusedError):
            verify(tmp_path / "run")
    replace(run, lineage={}).save(tmp_path / "run")
    with pytest.raises(RefusedError, match="'score' is paid, not implied"):
        verify(tmp_path / "run")


def test_a_seed_gives_the_same_choice_and_every_trial_its_own_noise(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = module.train_fleet

    def spy(recipe: Any, seats: Any) -> Any:
        trained = real(recipe, seats)
        seen.extend(trained)
        return trained

    monkeypatch.setattr(module, "train_fleet", spy)
    monkeypatch.setattr(Selection, "trials", lambda *_: 4)
    first, again = select(table(), choice, seed=1), select(table(), choice, seed=1)
    assert first.seat.seed == again.seat.seed
    a, b = first.generator.state_dict(), again.generator.state_dict()
    assert all((a[name] == b[name]).all() for name in a)
    assert len(seen) == 8 and len({t.seat.seed for t in seen}) == 4
    tables = [t.generator.given_logits.numpy().tobytes() for t in seen[:4]]
    assert len(set(tables)) == 4
    entropy = select(table(), choice)
    assert entropy.seat.seed is None and entropy.ledger.noise == "aes256-ctr:system"


def test_a_secure_selection_has_no_seed(tmp_path: Path) -> None:
    secure = Choice((recipe("naive_bayes", privacy={"secure": True}),), Selection(2.0), 1.0)
    with pytest.raises(UsageError, match="secure noise has no seed"):
        select(table(), secure, seed=1)
    Run.of(select(table(), secure), selection=secure.to_dict()).save(tmp_path / "run")
    assert verify(tmp_path / "run").noise == "aes256-ctr:system"


def test_the_best_by_a_noisy_score_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the noise is small next to the differences, the trial with the least error wins."""
    errors: list[float] = []

    def score(members: Table, synthetic: Table, rows: int) -> float:
        errors.append(pair_error(members, synthetic, rows))
        return errors[-1]

    trained: list[Any] = []
    real = module.train_fleet
    monkeypatch.setattr(module, "pair_error", score)
    monkeypatch.setattr(
        module, "train_fleet", lambda r, s: [trained.append(t) or t for t in real(r, s)]
    )
    monkeypatch.setattr(Selection, "trials", lambda *_: 6)
    thin = recipe("independent", privacy={"delta": 1e-5})
    choice = Choice((thin, BAYES), Selection(6.0, share=0.5), 400.0)
    chosen = select(table(), choice, seed=2)
    best = trained[int(np.argmin(errors))]
    assert len(errors) == 6 and max(errors) > min(errors) + 0.02
    assert chosen.generator is best.generator and chosen.recipe == BAYES


def test_the_score_is_noisy_and_paid_before_it_is_taken(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen from the score: the event stands in the ledger, and the noise has its σ."""
    paid: list[tuple[str, ...]] = []
    ledgers: list[Any] = []
    real = module.train_fleet
    monkeypatch.setattr(
        module, "train_fleet", lambda r, s: [ledgers.append(t.ledger) or t for t in real(r, s)]
    )

    def score(*_: Any) -> float:
        paid.append(tuple(e.what for e in ledgers[-1].events))
        return 0.0

    monkeypatch.setattr(module, "pair_error", score)
    monkeypatch.setattr(Selection, "trials", lambda *_: 1)
    select(Table.from_frame(frame(), SCHEMA), choice, seed=0)
    assert paid[0][-1] == "score" and paid[0].count("score") == 1
