"""Linear autoregressive generator: its order, kernels and scale, its likelihood, its correction."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fleets import make_fleet, random_codes, random_marginals
from oracles import record_gradients, total_variation
from tiny import seat
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.models import Autoregressive, autoregressive
from dpsynth.models.additive import additive_logits
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng
from dpsynth.training.recipe import Recipe, plan_of

LAYOUT = Layout((3, 4, 2, 5), target=2)
NO_TARGET = Layout((3, 4, 2, 5), target=None)
WIDE = Layout((6, 2, 9, 3, 12), target=1)
KEYS = [31, 32, 33]


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fleet(layout: Layout, keys: Sequence[int] = KEYS, **settings: Any) -> Autoregressive:
    made = make_fleet("autoregressive", layout, keys, **settings)
    assert isinstance(made, Autoregressive)
    return made


def every_row(layout: Layout) -> Tensor:
    return torch.tensor(list(itertools.product(*(range(n) for n in layout.levels))))[None]


# What follows from the tables


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET, Layout((4,), 0), Layout((4,), None)])
def test_columns_stand_by_what_they_say_about_the_target_or_by_entropy(layout: Layout) -> None:
    model = fleet(layout)
    for run, key in enumerate(KEYS):
        tables = random_marginals(layout, key)
        prior, due = tables.prior.numpy(), {}
        for j, block in enumerate(np.split(tables.given.numpy(), layout.offsets[1:], axis=1)):
            alone = prior @ block
            entropy = -sum(p * math.log(p) for p in alone)
            given = -sum(
                prior[g] * p * math.log(p) for g in range(len(prior)) for p in block[g] if p
            )
            due[j] = entropy if layout.target is None else entropy - given
        if layout.target is not None:
            due[layout.target] = math.inf
        order = model._linear.rank[run].argsort().tolist()
        assert order == sorted(due, key=lambda j: -due[j])


def test_a_kernel_is_smooth_along_the_mass_of_placed_levels_alone() -> None:
    values = doubles([5.0, 1.0, math.nan, 3.0, 2.0])
    share, used = doubles([0.1, 0.3, 0.2, 0.4, 0.0]), torch.tensor([1, 1, 1, 1, 0]).bool()
    root = autoregressive._root(values, share, used)
    torch.testing.assert_close(root, root.T)
    middle = {1: 0.15 / 0.8, 3: 0.5 / 0.8, 0: 0.75 / 0.8}
    expected = np.eye(5)
    for a, b in itertools.permutations(middle, 2):
        expected[a, b] = 0.8 * math.exp(-((middle[a] - middle[b]) ** 2) / (2 * 0.08**2))
    np.testing.assert_allclose((root @ root).numpy(), expected, atol=1e-12)
    one = autoregressive._root(doubles([math.nan] * 3), share[:3], used[:3])
    assert torch.equal(one, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET])
def test_features_have_mean_zero_under_the_tables(layout: Layout) -> None:
    model = fleet(layout)
    for run, key in enumerate(KEYS):
        given = random_marginals(layout, key).given
        for group in range(layout.groups):
            mean = torch.zeros(layout.width, dtype=torch.float64)
            for j, block in enumerate(given[group].split(list(layout.levels))):
                rows = random_codes(layout, 3, layout.levels[j])
                rows[..., j] = torch.arange(layout.levels[j])
                if layout.target is not None:
                    rows[..., layout.target] = group
                place = model._block(j)
                mean[place] = block @ model.features(rows)[run][:, place]
            if layout.target is not None:
                mean[model._block(layout.target)] = 0
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET])
def test_three_rows_of_the_tables_in_ten_have_a_gradient_within_one(layout: Layout) -> None:
    """Whatever the table, so that a bound of 1 always cuts the same share; by autograd."""
    model = fleet(layout, jitter=0.0)
    rng = FleetRng([k + 7 for k in KEYS], dtype=torch.float64)
    codes = model.sample(400, rng)
    with torch.enable_grad():
        found = record_gradients(
            lambda: model.record_loss(codes, rng), list(model.network.parameters())
        )
    for rows in found:
        norms = np.array([float(row[0].norm()) for row in rows])
        assert 0.2 < (norms <= 1.0).mean() < 0.4


# Likelihood


@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET])
def test_likelihoods_of_all_rows_add_up_to_one(layout: Layout) -> None:
    model, rows = fleet(layout, jitter=1.0), every_row(layout)
    loss = model.record_loss(rows.expand(3, -1, -1), FleetRng(KEYS)).detach()
    torch.testing.assert_close((-loss).exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_a_column_sees_the_columns_before_it_and_the_target_alone() -> None:
    model, rows = fleet(WIDE, jitter=1.0), random_codes(WIDE, 3, 20)
    with torch.no_grad():
        before = model.logits(rows)
        for j, run in itertools.product(range(WIDE.columns), range(3)):
            moved = rows.clone()
            moved[..., j] = (moved[..., j] + 1) % WIDE.levels[j]
            change = (model.logits(moved) - before)[run].abs().amax(0)
            for k in range(WIDE.columns):
                later = model._linear.rank[run, k] > model._linear.rank[run, j]
                seen = float(change[model._block(k)].max())
                assert (seen > 1e-6) == bool(later) or k == WIDE.target, (j, k)


def test_an_untrained_model_is_naive_bayes() -> None:
    made = [make_fleet(f, LAYOUT, KEYS, jitter=0.0) for f in ("autoregressive", "naive_bayes")]
    rows = random_codes(LAYOUT, 3, 30)
    losses = [model.record_loss(rows, FleetRng(KEYS)).detach() for model in made]
    torch.testing.assert_close(*losses)


# Rates


@pytest.mark.parametrize("epsilon", [0.2, 1.0, math.inf])
def test_noise_on_a_weight_is_bounded_whatever_the_budget(epsilon: float) -> None:
    """By a rate below the one that was asked for, where the noise is large; none without noise."""
    model = fleet(LAYOUT, lr=[1e2, 1e-3, 1e3])
    plan = PrivacyPlan(epsilon, 1e-5, rows=400, batch=32, steps=5, clip=0.7).calibrate()
    model._plans = [plan] * 3
    (optimizer,) = model.configure_optimizers()
    rates = optimizer.param_groups[0]["lr"] / model.scale**2
    if math.isinf(epsilon):
        torch.testing.assert_close(rates, doubles([1e2, 1e-3, 1e3]))
        return
    each = rates * model.scale * plan.noise * plan.clip / 32
    noise = math.sqrt(5) * each
    torch.testing.assert_close(noise[[0, 2]], doubles([0.4, 0.4]), rtol=1e-6, atol=0)
    assert noise[1] < 0.4
    assert float(rates[1]) == pytest.approx(1e-3)


def test_the_familys_plan_gives_way_to_what_is_named() -> None:
    def plan(model: str = "autoregressive", **privacy: Any) -> PrivacyPlan:
        return plan_of(Recipe(model, {}, privacy), seat(1.0), 400)

    family = plan()
    assert (family.batch, family.steps, family.clip) == (2048, 200, 1.0)
    named = plan(batch=64, steps=7, clip=0.5, shares={"marginals": 0.5})
    assert (named.batch, named.steps, named.clip) == (64, 7, 0.5)
    assert named.shares == {**family.shares, "marginals": 0.5}
    assert plan(batch=None, steps=None, clip=None) == family
    assert plan("vae", batch=None).batch == PrivacyPlan.batch


def test_a_larger_budget_is_spent_on_more_steps_of_larger_batches() -> None:
    """On 13 columns: rate 3 adds up to a noise of 0.4 at C of 0.45 a pair, between the limits."""
    made = [
        PrivacyPlan(epsilon, 1e-6, rows=rows, shares={"codec": 0.1, "marginals": 0.3})
        for epsilon, rows in ((0.3, 34_000), (1.0, 60_000), (1.0, 120_000), (8.0, 400_000))
    ]
    plans = [replace(plan, **Autoregressive.planned(plan, 14)).calibrate() for plan in made]
    steps = [plan.steps for plan in plans]
    assert steps[0] == 200 < steps[1] < steps[2] < steps[3] == 1000
    for plan in plans[1:3]:
        noise = 3 * plan.noise * math.sqrt(plan.steps) / (plan.q * plan.rows)
        assert noise * 0.45 * math.sqrt(91) == pytest.approx(0.4, rel=0.1)
    assert all(plan.noise > 1.5 for plan in plans)
    assert [plan.batch for plan in plans[:3]] == [2048] * 3 and plans[3].batch > 10_000
    free = PrivacyPlan(math.inf, 1e-6, rows=34_000)
    assert Autoregressive.planned(free, 14) == {"steps": 1000, "batch": 2048}


# Correction


def by_group(codes: Tensor, layout: Layout, group: int) -> list[np.ndarray]:
    rows = codes[layout.group_of(codes) == group]
    return [np.bincount(rows[:, j], minlength=n) for j, n in enumerate(layout.levels)]


@pytest.mark.parametrize("given", [None, 0, 1])
def test_samples_meet_the_tables_whatever_the_weights(
    given: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column given the target; without the correction they are far off."""
    model = fleet(WIDE, [4], jitter=1.5)
    tables = random_marginals(WIDE, 4)

    def furthest() -> float:
        fixed = {} if given is None else {1: given}
        codes = model.sample(20_000, FleetRng([5], dtype=torch.float64), fixed)[0]
        distances = [
            total_variation(counts, law.numpy())
            for group in ([0, 1] if given is None else [given])
            for counts, law in zip(
                by_group(codes, WIDE, group),
                tables.given[group].split(list(WIDE.levels)),
                strict=True,
            )
            if len(counts) > 2
        ]
        return max(distances)

    # Drawn anew, the target fits an additive model to rows that are not additive.
    assert furthest() < (0.04 if given is None else 0.02)
    monkeypatch.setattr(autoregressive, "_CORRECTIONS", 0)
    assert furthest() > 0.08


def test_shifts_make_the_means_those_asked_for() -> None:
    made = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(500, 4, generator=made, dtype=torch.float64)
    group = torch.arange(500) % 3
    wanted = doubles([[0.1, 0.2, 0.3, 0.4], [0.97, 0.01, 0.01, 0.01], [0.5, 0.5, 0.0, 0.0]])
    found = autoregressive._corrected(logits, group, wanted)
    for g in range(3):
        mean = found[group == g].softmax(-1).mean(0)
        torch.testing.assert_close(mean, wanted[g], rtol=0, atol=2e-3)
        moved = (found - logits)[group == g]
        torch.testing.assert_close(moved, moved[:1].expand_as(moved))
    empty = autoregressive._corrected(logits[:2], torch.zeros(2, dtype=torch.long), wanted)
    assert empty.isfinite().all()


def test_few_rows_are_some_of_many() -> None:
    """Else a handful would be bent to the tables one by one."""
    model = fleet(WIDE, double=False)
    few = model.sample(5, FleetRng(KEYS))
    assert torch.equal(few, model.sample(8192, FleetRng(KEYS))[:, :5])


def test_the_targets_levels_are_as_many_as_they_are_due() -> None:
    share = doubles([0.0, 0.301, 0.0, 0.699, 0.0])
    for offset in (0.0, 0.5, 1 - 1e-12):
        found = autoregressive._evenly(share, doubles([offset]), 1000)
        counts = torch.bincount(found, minlength=5)
        assert (counts - 1000 * share).abs().max() < 1
        assert counts[[0, 2, 4]].sum() == 0


# The target drawn anew


@pytest.mark.parametrize("groups", [2, 3, 7])
def test_without_noise_the_additive_model_is_bayes_rule(groups: int) -> None:
    """Columns that are independent given the target make its log-odds additive."""
    made = np.random.default_rng(groups)
    prior = 0.7 * made.dirichlet(np.ones(groups)) + 0.3 / groups
    laws = [0.6 * made.dirichlet(np.ones(n), groups) + 0.4 / n for n in (3, 5, 2)]
    group = made.choice(groups, 30_000, p=prior)
    codes = [
        torch.from_numpy((made.random((len(group), 1)) > law[group].cumsum(1)).sum(1))
        for law in laws
    ]
    tables = [torch.from_numpy(prior[:, None] * law) for law in laws]
    logits = additive_logits(codes, tables, torch.from_numpy(prior).log(), 0.0)
    joint = np.log(prior) + sum(
        np.log(law.T[code.numpy()]) for law, code in zip(laws, codes, strict=True)
    )
    bayes = np.exp(joint) / np.exp(joint).sum(1, keepdims=True)
    assert np.abs(logits.softmax(-1).numpy() - bayes).mean() < 0.02
    spreads = [
        float(additive_logits(codes, tables, torch.from_numpy(prior).log(), noise).std(0).mean())
        for noise in (0.0, 0.1, 0.4)
    ]
    assert spreads[0] > 1.05 * spreads[1] > 1.1 * spreads[2] > 0
    flat = additive_logits(codes, tables, torch.from_numpy(prior).log(), 1e3)
    expected = torch.from_numpy(prior).expand(len(group), -1)
    torch.testing.assert_close(flat.softmax(-1), expected, rtol=0, atol=1e-3)


def test_a_target_level_that_cannot_occur_stays_out() -> None:
    prior = doubles([math.log(0.4), -1e4, math.log(0.6)])
    codes = [torch.arange(300) % 3]
    table = doubles([[0.3, 0.05, 0.05], [0.0, 0.0, 0.0], [0.0, 0.3, 0.3]])
    logits = additive_logits(codes, [table], prior, 0.001)
    assert (logits[:, 1] < -9e3).all()
    assert logits.isfinite().all()


def test_a_given_target_is_not_drawn_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(Autoregressive, "_target", refuse)
    model = fleet(LAYOUT)
    assert (model.sample(9, FleetRng(KEYS, dtype=torch.float64), {2: 1})[..., 2] == 1).all()
    fleet(NO_TARGET).sample(9, FleetRng(KEYS, dtype=torch.float64))
    with pytest.raises(AssertionError):
        model.sample(9, FleetRng(KEYS, dtype=torch.float64))


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(UsageError, match=r"lr=-1\.0"):
        Autoregressive(LAYOUT, 2, lr=[1.0, -1.0])
