"""Canaries of a training: their law, their place in the private step, what survives a kill, and
what they show of sound and of broken engines."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inline import Inline
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from scipy import stats
from tiny import SCHEMA, recipe, seat, table

from dpsynth import cli
from dpsynth.audit.bounds import Family
from dpsynth.audit.one_run import (
    OneRunAudit,
    attainable_right,
    audit_one_run,
    guess,
    guess_p_value,
    refutes,
)
from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.configuration import configure, judging_of
from dpsynth.data import Split
from dpsynth.frontier import sweep
from dpsynth.frontier.sweep import Judging, Point, run_sweep
from dpsynth.networks import Mlp
from dpsynth.privacy.accounting import compose_epsilon, profile
from dpsynth.privacy.calibration import training
from dpsynth.privacy.clipping import ENGINES
from dpsynth.privacy.events import Event
from dpsynth.randomness import FleetRng, stream
from dpsynth.release.verify import verify
from dpsynth.training import canaries as module
from dpsynth.training.callbacks import LastCheckpoint
from dpsynth.training.canaries import (
    CanaryGrid,
    CanaryScores,
    CanarySettings,
    canary_key,
    coins_of,
    kept_scores,
    record_canaries,
    scaled,
    scaled_epsilon,
    scaled_profile,
    with_records,
)
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.grid import Member
from dpsynth.training.recipe import build, codec_settings

SHARES = {"codec": 0.01, "marginals": 0.01}
LONG = {"batch": 20, "steps": 100, "shares": SHARES}


# Coins and rows


def test_coins_are_fair_and_of_the_key() -> None:
    coins = coins_of(1, 20_000)
    assert stats.binomtest(int(coins.sum()), coins.size).pvalue > 1e-3
    assert (coins == coins_of(1, 20_000)).all()
    assert 0.45 < (coins == coins_of(2, 20_000)).mean() < 0.55


def test_keys_are_those_of_the_seed_or_kept_where_nobody_else_looks(tmp_path: Path) -> None:
    assert canary_key(tmp_path / "no", "a", 3) == canary_key(tmp_path, "a", 3)
    assert canary_key(tmp_path, "a", 3) != canary_key(tmp_path, "b", 3)
    assert not list(tmp_path.iterdir())
    key = canary_key(tmp_path / "kept", "a", None)
    assert canary_key(tmp_path / "kept", "a", None) == key
    assert canary_key(tmp_path / "kept", "b", None) != key
    assert (tmp_path / "kept" / "a.key").stat().st_mode & 0o777 == 0o600


def test_record_canaries_are_even_over_the_public_schema() -> None:
    rows = record_canaries(SCHEMA, 6000, key=5).frame
    for name, levels in (("job", 3), ("rich", 2)):
        assert stats.chisquare(rows[name].value_counts()).pvalue > 1e-3
        assert rows[name].nunique() == levels
    assert stats.chisquare(rows["age"].value_counts().reindex(range(17, 91))).pvalue > 1e-3
    assert stats.kstest(rows["pay"].astype(float) / 100, "uniform").pvalue > 1e-3


def test_the_table_has_those_of_its_canaries_that_are_in() -> None:
    rows, settings = table(), CanarySettings(50, "record")
    both = with_records(rows, settings, key=8)
    inside = record_canaries(rows.schema, 50, key=8).take(np.flatnonzero(coins_of(8, 50)))
    assert both.take(np.arange(len(rows))).digest() == rows.digest()
    assert both.take(np.arange(len(rows), len(both))).digest() == inside.digest()
    assert both.schema == rows.schema


# Gradients


def test_directions_have_norm_one_and_hardly_overlap() -> None:
    network = Mlp(2, [40, 30, 5])
    found = module._directions(network, 120, FleetRng([1, 2]))
    assert sum(d.a.shape[1] for d in found) == 120
    assert [d.first for d in found] == [0, found[0].a.shape[1]]
    for run in range(2):
        u = torch.stack([flat(found, run, number) for number in range(120)])
        overlap = u @ u.T
        np.testing.assert_allclose(overlap.diagonal(), 1, atol=1e-5)
        overlap.fill_diagonal_(0)
        assert overlap[: found[1].first, found[1].first :].abs().max() == 0
        assert overlap.square().mean().sqrt() < 0.06


class _Twin(Callback):
    """Writes down what every step releases beyond the real records, by hand."""

    def __init__(self, canaries: CanaryScores) -> None:
        self.canaries, self.rest = canaries, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine, network, plans = pl_module._engine, pl_module.network, pl_module.plans
        add, twin = engine._add, self

        def added(index: torch.Tensor, present: torch.Tensor) -> None:
            before = [p.summed_grad.clone() for p in network.parameters()]
            add(index, present)
            after = [p.summed_grad for p in network.parameters()]
            change = torch.cat([(a - b).flatten(1) for a, b in zip(after, before, strict=True)], 1)
            twin.rest.append((index, present, change, plans))

        engine._add = added


@pytest.mark.parametrize("engine", list(ENGINES))
def test_a_canary_adds_its_direction_clipped_by_the_engine(engine: str) -> None:
    """In every engine: the sum grows by C·u of each canary that is drawn and in, no other."""
    canaries = CanaryScores(40, [3, 4])
    twin = _Twin(canaries)
    made = recipe("vae", privacy=LONG | {"steps": 6}, engine=engine)
    train_fleet(made, [seat(4.0, 0), seat(8.0, 1)], callbacks=[canaries, twin])
    coins = np.stack([coins_of(key, 40) for key in (3, 4)])
    directions = module._directions(fresh_network(made), 40, FleetRng([3, 4]))
    assert len(twin.rest) >= 4
    for index, present, change, plans in twin.rest:
        assert not present.numpy()[~np.take_along_axis(coins, index.numpy(), 1)].any()
        for run, plan in enumerate(plans):
            chosen = index[run][present[run]]
            expected = sum((flat(directions, run, int(i)) for i in chosen), torch.zeros(1))
            np.testing.assert_allclose(
                change[run], (expected * plan.clip).expand_as(change[run]), atol=2e-3
            )


def fresh_network(made: Any) -> Any:
    return build(made, Layout.of(SCHEMA, **codec_settings(made)), 2).network


def flat(directions: Any, run: int, number: int) -> torch.Tensor:
    """u of one canary over all parameters, in their order."""
    parts = []
    for d in directions:
        place = number - d.first
        own = 0 <= place < d.a.shape[1]
        a = d.a[run, place] if own else torch.zeros(d.a.shape[2])
        b = d.b[run, place] if own else torch.zeros(d.b.shape[2])
        parts += [torch.outer(a, b).flatten(), b]
    return torch.cat(parts)


@pytest.mark.parametrize(("q", "sigma"), [(0.02, 0.7), (1.0, 2.0)])
def test_the_score_of_a_step_is_the_log_likelihood_ratio(q: float, sigma: float) -> None:
    class Plan:
        private, steps, noise = True, 5, sigma

    Plan.q = q  # type: ignore[attr-defined]
    x = torch.linspace(-3, 4, 31, dtype=torch.float64)[None]
    found = module._Ratio([Plan()])(x)[0].numpy()  # type: ignore[list-item]
    density = stats.norm(0, sigma).pdf
    inside = (1 - q) * density(x[0]) + q * density(x[0] - 1)
    np.testing.assert_allclose(found, np.log(inside / density(x[0])), atol=1e-9)


def test_a_run_at_infinity_has_no_canaries_and_is_what_it_was() -> None:
    canaries = CanaryScores(30, [1, 2])
    made = recipe("vae")
    with_, without = (
        train_fleet(made, [seat(math.inf, 0), seat(4.0, 1)], callbacks=callbacks)
        for callbacks in ([canaries], [])
    )
    scores, coins = canaries.observed()
    assert not scores[0].any() and not coins[0].any()
    assert scores[1].any() and coins[1].any()
    same = [equal(a, b) for a, b in zip(with_, without, strict=True)]
    assert same == [True, False]
    for a, b in zip(with_, without, strict=True):  # nothing else pays for canaries
        strip = [(e.what, e.sigma, e.q, e.steps) for e in a.ledger.events]
        assert strip == [(e.what, e.sigma, e.q, e.steps) for e in b.ledger.events]


def equal(first: Trained, second: Trained) -> bool:
    pairs = zip(
        first.generator.state_dict().values(), second.generator.state_dict().values(), strict=True
    )
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("model", ["vae", "gan", "diffusion"])
def test_scores_of_a_run_do_not_depend_on_who_trains_beside_it(model: str) -> None:
    made = recipe(model)
    alone, fleet = CanaryScores(30, [2]), CanaryScores(30, [1, 2])
    train_fleet(made, [seat(4.0, 1)], callbacks=[alone])
    train_fleet(made, [seat(2.0, 0), seat(4.0, 1)], callbacks=[fleet])
    np.testing.assert_allclose(alone.observed()[0][0], fleet.observed()[0][1], rtol=1e-3, atol=1e-3)


# Killed and resumed


class _Kill(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if int(pl_module.completed) == 4:
            raise KeyboardInterrupt


def test_a_killed_training_goes_on_with_the_same_canaries_and_scores(tmp_path: Path) -> None:
    made, seats = recipe("vae"), [seat(4.0, 0)]
    whole = CanaryScores(30, [7])
    (expected,) = train_fleet(made, seats, callbacks=[whole])
    keep = LastCheckpoint(tmp_path, seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_fleet(made, seats, state=tmp_path, callbacks=[CanaryScores(30, [7]), keep, _Kill()])
    again = CanaryScores(30, [7])
    (found,) = train_fleet(made, seats, state=tmp_path, callbacks=[again, keep])
    np.testing.assert_array_equal(again.observed()[0], whole.observed()[0])
    assert equal(found, expected)


@pytest.mark.parametrize("before", [[], [CanaryScores(30, [8])], [CanaryScores(31, [7])]])
def test_a_checkpoint_without_these_scores_is_refused(tmp_path: Path, before: list[Any]) -> None:
    made, seats = recipe("vae"), [seat(4.0, 0)]
    keep = LastCheckpoint(tmp_path, seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_fleet(made, seats, state=tmp_path, callbacks=[*before, keep, _Kill()])
    with pytest.raises(UsageError, match="checkpoint at step 4 has no scores"):
        train_fleet(made, seats, state=tmp_path, callbacks=[CanaryScores(30, [7]), keep])


def test_an_audit_of_some_steps_is_void() -> None:
    with pytest.raises(UsageError, match="saw 0 of 0 steps; the audit is void"):
        CanaryScores(5, [1]).observed()
    canaries = CanaryScores(5, [1])
    with pytest.raises(KeyboardInterrupt):
        train_fleet(recipe("vae"), [seat(4.0, 0)], callbacks=[canaries, _Kill()])
    with pytest.raises(UsageError, match="saw 4 of 5 steps; the audit is void"):
        canaries.observed()


# What they show


class _Plant(Callback):
    """Breaks the engine before canaries are put in."""

    def __init__(self, defect: str) -> None:
        self.defect = defect

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        engine = pl_module._engine
        if self.defect == "half":
            engine.optimizer.scale = engine.optimizer.scale / 2
        if self.defect == "unclipped":
            engine.clipper.bound = engine.clipper.bound * math.inf


def shown(
    defect: str, runs: int, number: int, hidden: int, steps: int
) -> tuple[np.ndarray, np.ndarray, Family, Any]:
    """Scores and coins of trainings at ε = 4, and the claim."""
    canaries = CanaryScores(number, [1000 + run for run in range(runs)])
    made = recipe("vae", options={"hidden": [hidden] * 2}, privacy=LONG | {"steps": steps})
    seats = [seat(4.0, s) for s in range(runs)]
    plan = train_fleet(made, seats, callbacks=[_Plant(defect), canaries])[0].plan
    events = [plan.training_event("dpsgd")]
    family = Family.of_profiles(
        lambda s: scaled_profile(events, s), lambda s: scaled_epsilon(events, s, plan.delta), 32
    )
    return *canaries.observed(), family, plan


def right_of(scores: np.ndarray, coins: np.ndarray, guesses: int) -> int:
    said = guess(scores, guesses)
    return int(((said > 0) & coins).sum() + ((said < 0) & ~coins).sum())


def test_a_sound_engine_is_below_its_claim_and_shows_what_can_be_had() -> None:
    """20 seeds at 95 %: up to 4 above are within the slack of α; one-run bounds leave far more."""
    scores, coins, family, plan = shown("sound", 20, 100, hidden=16, steps=40)
    claim, claimed = family.curve(1.0), family.epsilon(1.0)
    right = [right_of(s, c, 20) for s, c in zip(scores, coins, strict=True)]
    assert sum(refutes(claim, 100, 20, v) for v in right) <= 4
    assert sum(guess_p_value(100, 20, v, claimed, plan.delta) <= 0.05 for v in right) <= 4
    best = attainable_right(claim, 100, 20, np.random.default_rng(0))
    assert 0.8 * best < np.mean(right) < 1.1 * best


@pytest.mark.parametrize("defect", ["half", "unclipped"])
def test_a_planted_defect_shows_more_than_is_claimed(defect: str) -> None:
    scores, coins, family, plan = shown(defect, 1, 1000, hidden=64, steps=100)
    found = audit_one_run(
        scores[0], coins[0], family, delta=plan.delta, kind="x", rng=np.random.default_rng(0)
    )
    assert found.violated and found.fdp.epsilon > found.claimed > 3.9


# Claims


def test_scaled_events_are_accounted_with_that_noise() -> None:
    events = [training(0.9, 0.05, 50), Event("a", "gaussian", sigma=2.0)]
    events.append(Event("b", "pure", epsilon=0.3))
    noisy = scaled(events, 2.0)
    assert [e.sigma for e in noisy] == [1.8, 4.0, 0.0]
    assert noisy[2].epsilon == 0.15
    assert scaled_epsilon(events, 2.0, 1e-5) == compose_epsilon(noisy, 1e-5)
    epsilons, deltas = scaled_profile(events, 2.0)
    np.testing.assert_allclose(deltas, profile(noisy, list(epsilons)), atol=1e-15)
    assert epsilons[0] == 0 and deltas[-1] < 1e-9 < deltas[0]
    kept = scaled([Event("c", "failure", delta=1e-6)], 0.5)
    assert kept[0].delta == 1e-6


# The flag


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", Inline)


def swept(folder: Path, points: list[Point], **judging: Any) -> str:
    chosen = Judging(max_rows=60, max_candidates=40, draws=1, **judging)
    said = StringIO()
    run_sweep(
        points, Split.random(table(), stream(0, "split")), folder, data="tiny", judging=chosen,
        console=Console(file=said, width=200), workers=1, with_controls=False,
    )  # fmt: skip
    return said.getvalue()


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("kind", ["gradient", "record"])
def test_the_flag_leaves_a_result_beside_the_audit_and_nothing_of_the_auditors(
    kind: str, tmp_path: Path
) -> None:
    points = [Point(recipe("vae"), epsilon, None) for epsilon in (4.0, math.inf)]
    said = swept(tmp_path, points, canaries=40, canary=kind, reference_model=kind == "record")
    run, free = (tmp_path / "runs" / point.name for point in points)
    found = OneRunAudit.from_json((run / "canaries.json").read_text())
    assert (found.canaries, found.kind) == (40, kind)
    assert found.line in said
    steps = verify(run).epsilon if kind == "record" else 0.0
    assert found.claimed == pytest.approx(steps, rel=1e-6) if steps else found.claimed < 4.0
    assert f"40 {kind} canaries" in (run / "README.md").read_text()
    assert not (free / "canaries.json").exists()
    assert "canaries" not in (free / "README.md").read_text()
    auditors = {path.name for path in (tmp_path / "private" / "canaries").iterdir()}
    assert f"{points[0].name}.key" in auditors
    key = (tmp_path / "private" / "canaries" / f"{points[0].name}.key").read_text()
    for path in run.iterdir():
        assert key.encode() not in path.read_bytes()
        assert path.suffix != ".npz"
    with pytest.raises(UsageError, match="other rows or canaries"):
        swept(tmp_path, points)


@pytest.mark.usefixtures("inline")
def test_figures_kept_apart_take_the_result_with_them(tmp_path: Path) -> None:
    point = Point(recipe("vae"), 4.0, 0)
    swept(tmp_path, [point], canaries=20, apart=True, reference_model=False)
    assert (tmp_path / "private" / point.name / "canaries.json").is_file()
    assert not (tmp_path / "runs" / point.name / "canaries.json").exists()
    assert "20 gradient canaries" in (tmp_path / "runs" / point.name / "README.md").read_text()


def grid_of(folder: Path, made: Any, number: int = 20) -> CanaryGrid:
    seats = {"a": seat(4.0, 0), "free": seat(math.inf, 0)}
    members = {name: Member(name, made, held) for name, held in seats.items()}
    return CanaryGrid(members, folder, None, number)


def trained_by(grid: CanaryGrid, fleet: tuple[str, ...]) -> str:
    said = StringIO()
    grid.train(
        fleet, fleet, data="tiny", console=Console(file=said, width=200), loggers=lambda _: False
    )
    return said.getvalue()


def test_captured_steps_are_switched_off_with_a_remark(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, recipe("vae", capture=True))
    assert "vae: steps with canaries are not captured" in trained_by(grid, ("a",))
    config = (grid.trained("a") / "config.yaml").read_text()
    assert "capture: false" in config
    scores, coins = kept_scores(grid.kept, "a")
    assert scores.shape == coins.shape == (20,)
    with pytest.raises(UsageError, match="capture=true"):
        train_fleet(recipe("vae", capture=True), [seat(4.0, 0)], callbacks=[CanaryScores(5, [1])])


def test_a_run_without_its_scores_is_not_trained(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, recipe("vae"))
    trained_by(grid, ("a", "free"))
    assert grid.is_trained("a") and grid.is_trained("free")
    assert trained_by(grid, ("a", "free")) == ""
    (grid.kept / "a.npz").unlink()
    assert not grid.is_trained("a") and grid.is_trained("free")
    with pytest.raises(UsageError, match="train the run anew"):
        kept_scores(grid.kept, "a")


def test_no_memory_for_canaries_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "train_fleet", full)
    with pytest.raises(UsageError, match="are out of memory; lower"):
        trained_by(grid_of(tmp_path, recipe("vae")), ("a",))


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: CanarySettings(-1), "audit.canaries=-1"),
        (lambda: CanarySettings(1.5), "audit.canaries=1.5"),  # type: ignore[arg-type]
        (lambda: CanarySettings(5, "row"), "audit.canary=row"),
        (lambda: Judging(canaries=5, canary="row"), "audit.canary=row"),
        (lambda: CanarySettings(5).check("naive_bayes", "record"), "naive_bayes takes no"),
        (lambda: CanarySettings(5, "record").check("vae", "person"), "privacy.unit=person"),
        (lambda: CanaryScores(0, [1]), "audit.canaries=0"),
        (lambda: fit(CanaryScores(5, [])), "keys=0"),
        (lambda: fit(CanaryScores(5, [1], scale=0.0)), "scale=0.0"),
        (lambda: module._directions(torch.nn.Module(), 5, FleetRng([1])), "no FleetLinear"),
        (lambda: scaled([], 0.0), "scale=0.0"),
    ],
)
def test_what_cannot_be_is_refused(call: Any, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        call()


def fit(canaries: CanaryScores) -> list[Trained]:
    return train_fleet(recipe("vae"), [seat(4.0)], callbacks=[canaries])


def test_settings_without_canaries_check_nothing() -> None:
    CanarySettings().check("naive_bayes", "person")


def test_the_flag_reaches_judging_and_select_refuses_it() -> None:
    judging = judging_of(configure(["audit.canaries=7", "audit.canary=record"]))
    assert judging.planted == CanarySettings(7, "record")
    with pytest.raises(UsageError, match="select judges nothing"):
        cli._select(["audit.canaries=7"])
