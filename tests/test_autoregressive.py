"""Linear autoregressive generator: its order, kernels and scale, its likelihood, its correction."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fleets import Start, make_fleet, random_codes, random_marginals
from oracles import record_gradients, total_variation
from scipy import stats
from scipy.special import rel_entr
from tiny import seat
from torch import Tensor

from dpsynth.checks import UsageError
from dpsynth.codec import Layout
from dpsynth.models import Autoregressive, autoregressive
from dpsynth.models.additive import additive_logits
from dpsynth.models.denoise import denoised, remaining
from dpsynth.models.reconcile import corrected, evenly_within
from dpsynth.networks import FleetMaskedLinear
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


both = pytest.mark.parametrize("components", [0, 6])


def start_of(layout: Layout, key: int, components: int) -> Start:
    return Start.of(f"autoregressive+{components}", layout, key)


def opened(keys: Sequence[int], purpose: str = "draws") -> FleetRng:
    return FleetRng(keys, dtype=torch.float64).at(purpose)


def every_row(layout: Layout) -> Tensor:
    return torch.tensor(list(itertools.product(*(range(n) for n in layout.levels))))[None]


# What follows from the tables


@both
@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET, Layout((4,), 0), Layout((4,), None)])
def test_columns_stand_by_what_they_say_about_the_target_or_by_entropy(
    layout: Layout, components: int
) -> None:
    """In the noisy tables, whatever the components are."""
    model = fleet(layout, components=components)
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


@both
@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET])
def test_features_have_mean_zero_in_every_component(layout: Layout, components: int) -> None:
    model = fleet(layout, components=components)
    for run, key in enumerate(KEYS):
        start = start_of(layout, key, components)
        for k in range(len(start.weight)):
            mean = torch.zeros(layout.width, dtype=torch.float64)
            for j in (j for j in range(layout.columns) if j != layout.target):
                rows = random_codes(layout, 3, layout.levels[j])
                rows[..., j] = torch.arange(layout.levels[j])
                found = model.features(rows, torch.full(rows.shape[:2], k))
                place = model._block(j)
                mean[place] = torch.from_numpy(start.blocks[j][k]) @ found[run][:, place]
            torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("layout", [LAYOUT, WIDE, NO_TARGET])
def test_three_rows_of_the_tables_in_ten_have_a_gradient_within_one(
    layout: Layout, components: int
) -> None:
    """Whatever the table, so that a bound of 1 always cuts the same share; by autograd."""
    model = fleet(layout, jitter=0.0, components=components)
    codes = model.sample(300, FleetRng([k + 7 for k in KEYS], dtype=torch.float64))
    with torch.enable_grad():
        found = record_gradients(
            lambda: model.record_loss(codes, opened(KEYS)), list(model.network.parameters())
        )
    for rows in found:
        norms = np.array([math.hypot(*(float(part.norm()) for part in row)) for row in rows])
        assert 0.2 < (norms <= 1.0).mean() < 0.4


# Likelihood


@both
@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET])
def test_likelihoods_of_all_rows_add_up_to_one(layout: Layout, components: int) -> None:
    """Without components those of rows, else those of rows given each component."""
    model = fleet(layout, jitter=1.0, components=components)
    rows = every_row(layout).expand(3, -1, -1)
    if not components:
        losses = [model.record_loss(rows, opened(KEYS))]
    else:
        losses = [model._loss(rows, torch.full(rows.shape[:2], k)) for k in range(4)]
    for loss in losses:
        total = (-loss.detach()).exp().sum(1)
        torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))


def test_the_loss_is_that_of_a_component_drawn_or_of_the_likeliest() -> None:
    model, rows = fleet(LAYOUT, jitter=1.0), random_codes(LAYOUT, 3, 40)
    with torch.no_grad():
        drawn = model.component_of(rows, opened(KEYS))
        torch.testing.assert_close(model.record_loss(rows, opened(KEYS)), model._loss(rows, drawn))
        best = model.component_of(rows, None)
        torch.testing.assert_close(model.attack_loss(rows, opened(KEYS)), model._loss(rows, best))
    assert (drawn != best).any()


@both
def test_a_column_sees_the_columns_before_it_and_the_target_alone(components: int) -> None:
    """The target through the component, its own or the one that belongs to it."""
    model = fleet(WIDE, jitter=1.0, components=components)
    rows = random_codes(WIDE, 3, 20)
    held = torch.arange(20).expand(3, -1) % 4

    def scores(codes: Tensor) -> Tensor:
        return model.logits(codes, held if components else WIDE.group_of(codes))

    with torch.no_grad():
        before = scores(rows)
        for j, run in itertools.product(range(WIDE.columns), range(3)):
            moved = rows.clone()
            moved[..., j] = (moved[..., j] + 1) % WIDE.levels[j]
            change = (scores(moved) - before)[run].abs().amax(0)
            for k in range(WIDE.columns):
                later = bool(model._linear.rank[run, k] > model._linear.rank[run, j])
                seen = float(change[model._block(k)].max()) > 1e-6
                if not components:
                    assert seen == later or k == WIDE.target, (j, k)
                elif k != WIDE.target:
                    assert seen == (later and j != WIDE.target), (j, k)


def test_an_untrained_model_is_naive_bayes() -> None:
    names = ("autoregressive+0", "naive_bayes+0")
    made = [make_fleet(name, LAYOUT, KEYS, jitter=0.0) for name in names]
    rows = random_codes(LAYOUT, 3, 30)
    losses = [model.record_loss(rows, opened(KEYS)).detach() for model in made]
    torch.testing.assert_close(*losses)


@both
@pytest.mark.parametrize("layout", [LAYOUT, NO_TARGET, Layout((2, 3, 9), target=2)])
def test_rows_are_drawn_from_the_likelihood_that_is_trained(
    layout: Layout, components: int
) -> None:
    """Given a component each: the chance of every row, over even draws of all its columns."""
    model = fleet(layout, [5], jitter=1.0, components=components)
    rows = every_row(layout)
    for k in range(2 if components or layout.target is not None else 1):
        held = torch.full(rows.shape[:2], k)
        groups = layout.group_of(rows)
        if layout.target is not None:
            start = layout.offsets[layout.target]
            law = model.offset(held[:, :1])[0, 0, start : start + layout.groups].softmax(-1)
            group = int(law.argmax())
        else:
            group = 0
        inside = groups[0] == group if layout.target is not None else groups[0] == 0
        with torch.no_grad():
            wanted = (-model._loss(rows, held))[0].exp()[inside]
        wanted = (wanted / wanted.sum()).numpy()
        many = 40_000
        draws = opened([5], f"rows{k}").uniform(many, layout.columns)[0]
        whole = torch.full((many,), k), torch.full((many,), group)
        drawn = model._columns(0, *whole, draws)
        place = torch.zeros(many, dtype=torch.long)
        for j, n in enumerate(layout.levels):
            place = place * n + drawn[:, j]
        found = np.bincount(place.numpy(), minlength=rows.shape[1])[inside.numpy()] / many
        assert total_variation(found, wanted) < 2.5 * math.sqrt(len(wanted) / many) / 2


# Noise in weights


def trained(layout: Layout, steps: int = 50) -> Autoregressive:
    """A fleet at the end of its steps, with weights of noise."""
    model = fleet(layout, lr=[1.0, 3.0, 1e-3], jitter=0.1)
    plans = [
        PrivacyPlan(1.0, 1e-5, rows=4000, batch=2000, steps=steps, clip=clip).calibrate()
        for clip in (1.0, 0.3, 5.0)
    ]
    model._plans, model.total = plans, steps
    return model


def test_a_pull_is_the_expected_curvature_of_the_clipped_loss_times_all_rates() -> None:
    """By products of inputs and output gradients, weight by weight, which are a record's own."""
    model, n = trained(WIDE), 6
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(autoregressive, "_DRAWN", n)
        found = model._pull()
    a, b, norms = (x.numpy() for x in model._gradients(n, FleetRng([0] * 3).at("curvature", 0)))
    mask = model._linear.mask().numpy()
    for run, plan in enumerate(model.plans):
        due = np.zeros((WIDE.width, WIDE.width))
        for row in range(n):
            each = np.outer(a[run, row], b[run, row])
            assert norms[run, row] == pytest.approx(np.linalg.norm(each * mask[run]), rel=1e-5)
            due += min(1, plan.bound / norms[run, row]) * each**2 / n
        rate = float(model._rates()[run])
        due *= sum(rate * min(1, (50 - step) / 15) for step in range(50))
        # 50 steps fall a little later than the integral says.
        np.testing.assert_allclose(found[run].numpy()[mask[run]], due[mask[run]], rtol=0.02)


def test_without_clipping_the_curvature_is_that_of_the_likelihood() -> None:
    """Second differences of the expected loss at weights of 0, of rows of the start."""
    model = trained(LAYOUT)
    model._linear.weight.data.zero_()
    rng = FleetRng([0] * 3).at("curvature", 0)
    a, b, _ = model._gradients(4096, rng)
    fisher = (a.square().mT @ b.square() / 4096).detach()
    component, group = model.draw_components(4096, rng, None)
    start = model.offset(component)
    codes = model.with_target(autoregressive.sample_columns(start, list(LAYOUT.levels), rng), group)
    step = 1e-3 / model.scale.max()
    loss = model._loss(codes, component).mean(1)
    for i, o in [(0, 4), (1, 9), (4, 13)]:
        moved = []
        for sign in (1, -1):
            model._linear.weight.data[:, i, o] = sign * step
            moved.append(model._loss(codes, component).mean(1))
            model._linear.weight.data[:, i, o] = 0
        second = (moved[0] - 2 * loss + moved[1]) / step**2
        seen = model._linear.mask()[:, i, o]
        torch.testing.assert_close(second[seen], fisher[seen, i, o], rtol=0.15, atol=1e-3)


def test_noise_remains_as_in_a_descent_that_is_pulled_back() -> None:
    """Against the recursion of a quadratic loss: v becomes (1 - rate · curvature)² v + rate²."""
    steps = 3000
    rates = np.minimum(1, (steps - np.arange(steps)) / (0.3 * steps)) / steps
    pulls = np.array([0.0, 1e-9, 0.01, 0.3, 1.0, 3.0, 30.0, 1e5])
    free, held = 0.0, np.zeros(8)
    for rate in rates:
        free += rate**2
        held = (1 - rate * pulls.clip(max=100) / rates.sum()) ** 2 * held + rate**2
    found = remaining(doubles(pulls)).numpy()
    np.testing.assert_allclose(found[:-1], held[:-1] / free, rtol=0.02)
    assert 0 < found[-1] < found[-2]


def test_what_was_not_learned_leaves_no_noise_behind() -> None:
    """Weight by weight in plain numbers, with s² the mean square of what the mask hides."""
    model = trained(WIDE)
    layer = model._linear
    strong = (torch.arange(layer.weight.shape[1]) < layer.levels[0])[:, None]
    layer.weight.data += 3.0 * (layer.mask() & strong)
    before = layer.weight.detach().clone()
    pull = 2 * torch.rand(before.shape, generator=torch.Generator().manual_seed(0)).double()
    found = denoised(layer, pull).detach()
    ends = np.cumsum([0, *layer.levels])
    for run in range(3):
        noise = float(before[run][~layer.mask()[run]].square().mean())
        for i, o in np.ndindex(len(layer.levels), len(layer.levels)):
            place = (run, *(slice(ends[k], ends[k + 1]) for k in (i, o)))
            block = before[place].numpy()
            learned = (1 - np.exp(-pull[place].numpy())) ** 2
            left = noise * remaining(pull[place]).numpy()
            known = (learned**2 / left**2).sum()
            signal = (learned * (block**2 - left) / left**2).sum() / known
            signal = max(0.0, signal - math.sqrt(2 / known))
            keep = learned * signal / (learned * signal + left)
            seen = bool(layer.rank[run, i] < layer.rank[run, o])
            np.testing.assert_allclose(found[place].numpy(), keep * seen * block, rtol=1e-6)
    assert (found[layer.mask()] == 0).any() and (found.abs() > 2).any()
    layer.weight.data.copy_(found)
    torch.testing.assert_close(denoised(layer, pull), found, rtol=0, atol=0)


def test_noise_alone_is_taken_off_and_a_signal_kept_where_it_is() -> None:
    """In mean squares over blocks of 25 weights, half of them hardly pulled at: better than all
    weights or none where there is a signal, and next to none where there is not."""
    rng = opened([1], "noise")
    layer = FleetMaskedLinear(1, [5] * 30).double()
    pull = torch.where(rng.at("pulled").uniform(150, 150) < 0.5, 0.01, 2.0)
    left, learned = remaining(pull), 1 - (-pull).exp()
    mask = layer.mask()
    noise = left.sqrt() * rng.normal(150, 150)
    noise = torch.where(mask, noise, rng.at("hidden").normal(150, 150))
    layer.weight.data = noise
    assert denoised(layer, pull)[mask].square().mean() < 0.05
    for size in (0.5, 3.0):
        signal = learned * size * rng.at("signal").normal(150, 150)
        layer.weight.data = torch.where(mask, noise + signal, noise)
        apart = (denoised(layer, pull) - signal)[mask].square().mean()
        assert apart < 0.9 * min(noise[mask].square().mean(), signal[mask].square().mean())


def test_without_noise_weights_stay() -> None:
    layer = FleetMaskedLinear(2, [3, 2, 4])
    layer.weight.data = torch.where(layer.mask(), torch.randn(2, 9, 9), 0)
    found = denoised(layer, torch.rand(2, 9, 9))
    torch.testing.assert_close(found, layer.weight.data, rtol=0, atol=0)


def test_weights_are_denoised_where_a_training_ends_and_not_again() -> None:
    model = trained(WIDE)
    model._average = torch.nn.Module()
    model._average.load_state_dict({})
    model.averaged = lambda: model._average  # type: ignore[method-assign]
    due = denoised(model._linear, model._pull())
    model.finish()
    torch.testing.assert_close(model._linear.weight.data, due, rtol=0, atol=0)
    again = fleet(WIDE)
    again._linear.weight.data.copy_(due)
    again.finish()
    torch.testing.assert_close(again._linear.weight.data, due, rtol=0, atol=0)


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
    named = plan(batch=64, steps=7, clip=0.5, shares={"marginals": 0.2})
    assert (named.batch, named.steps, named.clip) == (64, 7, 0.5)
    assert named.shares == {**family.shares, "marginals": 0.2}
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


@pytest.fixture
def quick_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer trees for the head that draws labels."""
    monkeypatch.setattr("dpsynth.models.labels._TREES", 20)


def by_group(codes: Tensor, layout: Layout, group: int) -> list[np.ndarray]:
    rows = codes[layout.group_of(codes) == group]
    return [np.bincount(rows[:, j], minlength=n) for j, n in enumerate(layout.levels)]


@pytest.mark.usefixtures("quick_labels")
@both
@pytest.mark.parametrize("given", [None, 0, 1])
def test_samples_meet_the_tables_whatever_the_weights(given: int | None, components: int) -> None:
    """Each column given the target; without the correction they are far off."""
    start = start_of(WIDE, 4, components)

    def furthest(reconcile: bool) -> float:
        settings = {"jitter": 2.0, "components": components, "reconcile": reconcile}
        fixed = {} if given is None else {1: given}
        model = fleet(WIDE, [4], **settings)
        codes = model.sample(20_000, FleetRng([5], dtype=torch.float64), fixed)[0]
        distances = [
            total_variation(by_group(codes, WIDE, group)[j], start.table([j], {1: group}))
            for group in ([0, 1] if given is None else [given])
            for j in (0, 2, 3, 4)
        ]
        return max(distances)

    # Drawn anew, the target fits models that are not the one that drew the rows.
    assert furthest(True) < (0.05 if given is None else 0.02)
    assert furthest(False) > 0.08


@pytest.mark.usefixtures("quick_labels")
@both
@pytest.mark.parametrize("reconcile", [True, False])
def test_the_targets_shares_are_those_of_the_tables(components: int, reconcile: bool) -> None:
    model = fleet(WIDE, [4], jitter=1.5, components=components, reconcile=reconcile)
    codes = model.sample(20_000, FleetRng([5], dtype=torch.float64))[0]
    law = start_of(WIDE, 4, components).table([1])
    # Components are drawn evenly, and each has one target level.
    room = 0.01 if reconcile else 4 / 20_000
    assert total_variation(torch.bincount(codes[:, 1], minlength=2).numpy(), law) < room


def test_shifts_make_the_means_those_asked_for() -> None:
    made = torch.Generator().manual_seed(0)
    logits, start = (
        scale * torch.randn(500, 4, generator=made, dtype=torch.float64) for scale in (2, 1)
    )
    group = torch.tensor([0, 1, 3])[torch.arange(500) % 3]  # nothing in 2
    start[group == 1, 2:] = -1e4
    found = corrected(logits, start, group)
    for g in (0, 1, 3):
        rows = (group == g).nonzero().flatten().tolist()
        wanted = sum(start[row].exp() / start[row].exp().sum() for row in rows) / len(rows)
        mean = found[rows].softmax(-1).mean(0)
        torch.testing.assert_close(mean, wanted, rtol=0, atol=2e-3)
        moved = (found - logits)[rows]
        torch.testing.assert_close(moved, moved[:1].expand_as(moved))
    torch.testing.assert_close(corrected(start, start, group), start)


def test_draws_of_a_part_have_one_place_each() -> None:
    """One in each of as many slots as the part has rows, each uniform in its own."""
    rng = opened([1])
    part = torch.tensor([0, 2, 2, 0, 2, 3])[(rng.uniform(3000)[0] * 6).long()]
    draws = rng.uniform(3000, 3)[0]
    found = evenly_within(part, draws)
    for number in (0, 2, 3):
        inside = (part == number).nonzero().flatten()
        for column in range(3):
            own = found[inside, column] * len(inside)
            assert own.floor().sort().values.tolist() == list(range(len(inside)))
            # In the order of the draws, and uniform within a slot.
            assert torch.equal(own.argsort(), draws[inside, column].argsort())
            assert stats.kstest((own % 1).numpy(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(found.T.numpy())[0, 1]) < 0.1


# The target drawn anew


led = pytest.mark.parametrize("led", [False, True])


def started(codes: Sequence[Tensor], tables: Sequence[Tensor], led: bool) -> dict[str, Any]:
    """Settings of scores that start at the first column's table."""
    if not led:
        return {}
    given = (tables[0] / tables[0].sum(0)).clamp_min(1e-9).log()
    return {"start": given.T[codes[0]], "led": [0]}


@pytest.mark.parametrize(
    ("groups", "led"), [(2, False), (3, False), (7, False), (7, True), (12, True)]
)
def test_without_noise_the_additive_model_is_bayes_rule(groups: int, led: bool) -> None:
    """Columns that are independent given the target make its log-odds additive; from a start, which
    targets of many levels have, counts are met to a tenth only."""
    made = np.random.default_rng(groups)
    prior = 0.7 * made.dirichlet(np.ones(groups)) + 0.3 / groups
    laws = [0.6 * made.dirichlet(np.ones(n), groups) + 0.4 / n for n in (3, 5, 2)]
    group = made.choice(groups, 30_000, p=prior)
    codes = [
        torch.from_numpy((made.random((len(group), 1)) > law[group].cumsum(1)).sum(1))
        for law in laws
    ]
    tables = [torch.from_numpy(prior[:, None] * law) for law in laws]
    known = codes, tables, torch.from_numpy(prior).log()
    logits = additive_logits(*known, 0.0, **started(codes, tables, led))
    joint = np.log(prior) + sum(
        np.log(law.T[code.numpy()]) for law, code in zip(laws, codes, strict=True)
    )
    bayes = np.exp(joint) / np.exp(joint).sum(1, keepdims=True)
    assert np.abs(logits.softmax(-1).numpy() - bayes).mean() < 0.02
    if led:
        return
    spreads = [float(additive_logits(*known, noise).std(0).mean()) for noise in (0.0, 0.1, 0.4)]
    assert spreads[0] > 1.05 * spreads[1] > 1.1 * spreads[2] > 0
    flat = additive_logits(*known, 1e3)
    expected = torch.from_numpy(prior).expand(len(group), -1)
    torch.testing.assert_close(flat.softmax(-1), expected, rtol=0, atol=1e-3)


def divergence(law: np.ndarray, columns: int, *, led: bool = False, copied: float = 0.0) -> float:
    """Of additive scores from P(target | first column) = `law`, in nats; other columns copy the
    first with this chance and tell nothing beyond it. Tables are noisy."""
    made, (levels, groups) = np.random.default_rng(len(law)), law.shape
    first = made.integers(0, levels, 20_000)
    codes, tables, noise = [first], [law.T / levels], 0.02 / groups
    copy = copied * np.eye(levels) + (1 - copied) / levels
    for _ in range(columns - 1):
        same = made.random(len(first)) < copied
        codes.append(np.where(same, first, made.integers(0, levels, len(first))))
        tables.append(tables[0] @ copy)
    noisy = [
        torch.from_numpy(t + noise * made.standard_normal(t.shape)).clamp_min(0) for t in tables
    ]
    prior = torch.full((groups,), 1 / groups, dtype=torch.float64).log()
    known = [torch.from_numpy(column) for column in codes], noisy, prior, noise
    start = started(known[0], noisy, led)
    found, truth = additive_logits(*known, **start).softmax(-1), law[first]
    return float(rel_entr(truth, found.numpy()).sum(1).mean())


@pytest.mark.parametrize("groups", [3, 9])
def test_columns_that_tell_nothing_add_little_noise(groups: int) -> None:
    """One column decides most of the target, twenty tell nothing: with their noisy tables, too, the
    scores are about as good as with the first alone."""
    law = 0.9 * np.eye(groups) + 0.1 / groups
    assert divergence(law, 21) < divergence(law, 1) + 0.01


def test_a_column_that_decides_the_target_leads() -> None:
    """Each of its levels leaves two of twelve to choose from; what else tells of the target tells
    of this column alone, and by its own contingency would add much."""
    steps = np.arange(24)
    law = np.zeros((24, 12))
    law[steps, steps // 2], law[steps, (steps // 2 + 1) % 12] = 0.8, 0.2
    alone, among = (divergence(law, columns, led=True, copied=0.7) for columns in (1, 9))
    assert among < 1.5 * alone
    assert among < 0.5 * divergence(law, 9, copied=0.7)


@led
def test_a_target_level_that_cannot_occur_stays_out(led: bool) -> None:
    prior = doubles([math.log(0.4), -1e4, math.log(0.6)])
    codes = [torch.arange(300) % 3]
    table = doubles([[0.3, 0.05, 0.05], [0.0, 0.0, 0.0], [0.0, 0.3, 0.3]])
    logits = additive_logits(codes, [table], prior, 0.001, **started(codes, [table], led))
    assert (logits[:, 1] < -9e3).all()
    assert logits.isfinite().all()


@pytest.mark.usefixtures("quick_labels")
@both
def test_a_given_target_is_not_drawn_anew(components: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("dpsynth.models.base.LabelHead", refuse)
    rng = FleetRng(KEYS, dtype=torch.float64)
    settings: dict[str, Any] = {"components": components}
    model = fleet(LAYOUT, reconcile=True, **settings)
    assert (model.sample(9, rng, {2: 1})[..., 2] == 1).all()
    fleet(NO_TARGET, reconcile=True, **settings).sample(9, rng)
    fleet(LAYOUT, reconcile=False, **settings).sample(9, rng)
    with pytest.raises(AssertionError):
        model.sample(9, rng)


def test_a_rate_must_be_positive() -> None:
    with pytest.raises(UsageError, match=r"lr=-1\.0"):
        Autoregressive(LAYOUT, 2, lr=[1.0, -1.0])
