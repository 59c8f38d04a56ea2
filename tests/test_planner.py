"""The planner: pure, monotone, and never more than there is, over a wide grid of public facts."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import SCHEMA, seat, table

import dpsynth
from dpsynth.checks import UsageError
from dpsynth.chosen import Choice
from dpsynth.codec import Layout, NumericCoder
from dpsynth.configuration import configure, expand, point_of
from dpsynth.data import Table
from dpsynth.datasets.simulated import SIMULATED, simulated_schema
from dpsynth.privacy.calibration import whole_mu
from dpsynth.schema import Column, Schema
from dpsynth.training import planner
from dpsynth.training.fleet import train_fleet
from dpsynth.training.planner import (
    CODEC,
    SHARES,
    Values,
    bins_for,
    family_of,
    shares_of,
    signal,
    slots,
    values,
)
from dpsynth.training.recipe import FAMILIES, Recipe, Seat, bins_of, codec_settings, plan_of

EPSILONS = (0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 100.0)
ROWS = (100, 1_000, 30_000, 1_000_000)
LAYOUTS = {
    "two columns": Layout((2, 2), 1),
    "label alone": Layout((3,), 0),
    "no target": Layout((4, 37, 36, 9), None),
    "bits": Layout((2,) * 16, 0),
    "mixed": Layout((36, 9, 16, 36, 7, 2), 5),
    "many classes": Layout((36, 9, 16, 40, 7), 3),
    "wide": Layout((36,) * 60 + (2,), 60),
}
GRID = list(itertools.product(LAYOUTS.values(), EPSILONS, ROWS))


def mu_of(epsilon: float) -> float:
    return whole_mu(epsilon, 1e-7, (), 1)


# Shares


def test_shares_leave_dp_sgd_enough_everywhere() -> None:
    for layout, epsilon, rows in GRID:
        shares = shares_of(layout, mu_of(epsilon), rows)
        assert list(shares) == list(SHARES)
        assert all(share > 0 for share in shares.values())
        assert sum(shares.values()) <= 0.97, "a share that no σ up to 1e6 could calibrate"
        assert shares == shares_of(layout, mu_of(epsilon), rows)


def test_shares_follow_the_signal_alone_and_the_knots_exactly() -> None:
    fitted = values()
    for number, knot in enumerate(fitted.knots):
        shares = fitted.shares(knot)
        assert shares["codec"] == pytest.approx(fitted.codec[number], abs=1e-4)
        assert shares["marginals"] == pytest.approx(fitted.marginals[number], abs=1e-4)
    for layout, epsilon, rows in GRID:
        found = signal(layout, mu_of(epsilon), rows, apart=True)
        assert shares_of(layout, mu_of(epsilon), rows) == fitted.shares(found)


def trained(shares: dict[str, float]) -> float:
    """What is left for DP-SGD where the number of rows is declared."""
    return 1 - sum(share for name, share in shares.items() if name != "rows")


def test_dp_sgd_has_the_same_share_at_every_signal() -> None:
    fitted = replace(values(), trained=0.07)
    for at in (0.0, 1e-3, 0.7, 40.0, math.inf):
        assert trained(fitted.shares(at)) == pytest.approx(0.07)


def test_interpolation_is_a_straight_line_in_the_logarithm() -> None:
    fitted = Values(
        knots=(1.0, 100.0), codec=(0.1, 0.3), marginals=(0.1, 0.1), bins=(9, 20),
        trained=0.3, faint=0.1, wide=9, widest=99,
    )  # fmt: skip
    shares = {"rows": 0.01, "codec": 0.2, "marginals": 0.1, "tables": 0.4}
    assert fitted.shares(10.0) == shares
    assert fitted.shares(1e-9) == fitted.shares(1.0)
    assert fitted.shares(math.inf)["codec"] == 0.3
    steps = [fitted.shares(at)["codec"] for at in np.geomspace(0.1, 1e4, 50)]
    assert steps == sorted(steps)


def test_shares_move_one_way_with_the_budget() -> None:
    """Of codec and label tables; what the chosen tables get is the difference."""
    for layout, rows in itertools.product(LAYOUTS.values(), ROWS):
        found = [shares_of(layout, mu_of(epsilon), rows) for epsilon in EPSILONS]
        for each in ([s["codec"] for s in found], [s["marginals"] for s in found]):
            steps = np.diff(each)
            assert (steps <= 2e-4).all() or (steps >= -2e-4).all()
    usual = values()
    assert usual.marginals[0] > usual.marginals[-1], "no law of a constant"


def test_signal_is_the_mean_cell_over_its_noise() -> None:
    """Against a loop over all label × two-way tables."""
    layout = Layout((3, 5, 2, 7), 2)
    cells = [2 * a * b for a, b in itertools.combinations((3, 5, 7), 2)]
    sigma = math.sqrt(len(cells)) / 0.4
    assert signal(layout, 0.4, 900) == pytest.approx(900 / np.mean(cells) / sigma)
    assert signal(layout, 0.4, 900, apart=True) == signal(layout, 0.4, 900)
    assert signal(LAYOUTS["label alone"], 0.4, 900) == math.inf
    # Of a target of many levels two-way tables are asked, and shares go by label × two-way ones.
    many = Layout((3, 5, 12, 7), 2)
    pairs = [a * b for a, b in itertools.combinations(many.levels, 2)]
    assert signal(many, 0.4, 900) == pytest.approx(900 / np.mean(pairs) * 0.4 / math.sqrt(6))
    assert signal(many, 0.4, 900, apart=True) == pytest.approx(signal(many, 0.4, 900) / 12)
    number = Layout((3, 5, 33, 7), 2)
    assert signal(number, 0.4, 900, apart=True) == signal(number, 0.4, 900)
    untold = Layout((3, 5, 7), None)
    assert signal(untold, 0.4, 900, apart=True) == signal(untold, 0.4, 900)
    for other in LAYOUTS.values():
        assert signal(other, 0.2, 100) <= signal(other, 0.2, 101)
        assert signal(other, 0.2, 100) <= signal(other, 0.21, 100)


def test_more_tables_are_chosen_where_the_signal_is_larger() -> None:
    for layout, rows in itertools.product(LAYOUTS.values(), ROWS):
        chosen = [
            Choice.planned(
                layout, mu_of(e) * shares_of(layout, mu_of(e), rows)["tables"] ** 0.5, rows
            )
            for e in EPSILONS
        ]
        numbers = [choice.tables for choice in chosen]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    "changes",
    [
        {"knots": (1.0, 1.0)},
        {"knots": (0.0, 1.0)},
        {"codec": (0.1,)},
        {"marginals": (0.1, 1.0)},
        {"trained": 0.85},
        {"trained": 1.0},
        {"trained": 0.0},
        {"bins": (20,)},
        {"bins": (1, 20)},
        {"bins": (20, CODEC["bins"] + 1)},
    ],
    ids=str,
)
def test_values_that_no_plan_could_take_are_refused(changes: dict[str, Any]) -> None:
    usual = {"knots": (1.0, 2.0), "codec": (0.1, 0.1), "marginals": (0.05, 0.05)}
    usual |= {"bins": (8, 20), "trained": 0.3}
    usual |= {"faint": 0.1, "wide": 10, "widest": 20}
    Values(**usual)
    with pytest.raises(UsageError, match="planner"):
        Values(**{**usual, **changes})


def test_bins_are_fewer_where_the_signal_is_small_and_never_more_than_slots() -> None:
    for layout in LAYOUTS.values():
        for rows in ROWS:
            numbers = [bins_for(layout, mu_of(epsilon), rows) for epsilon in EPSILONS]
            assert numbers == sorted(numbers)
            assert numbers[0] >= 2 and numbers[-1] <= CODEC["bins"]
    few, many = (bins_for(LAYOUTS["wide"], mu, 1_000) for mu in (mu_of(0.1), math.inf))
    assert few == min(values().bins) < many == CODEC["bins"]
    at = {s: values().at(s, values().bins) for s in (values().knots[0] / 9, *values().knots)}
    assert list(at.values()) == [values().bins[0], *values().bins]
    between = math.sqrt(values().knots[0] * values().knots[1])
    assert values().at(between, values().bins) == pytest.approx(sum(values().bins[:2]) / 2)


def test_a_recipe_that_names_bins_has_as_many() -> None:
    """Otherwise the planner says; empty slots keep the shapes of all budgets the same."""
    usual, named = Recipe("naive_bayes"), Recipe("naive_bayes", {}, {}, {"bins": 9, "heaps": 3})
    found = {}
    for recipe, epsilon in itertools.product((usual, named), (0.5, 64.0)):
        place = seat(epsilon)
        plan = plan_of(recipe, place, 400).calibrate()
        (run,) = train_fleet(recipe, [place])
        coder = next(c for c in run.codec.coders if isinstance(c, NumericCoder) and c.slots)
        layout = Layout.of(SCHEMA, **slots(recipe.codec))
        mu = whole_mu(plan.epsilon, plan.delta, plan.spent, 1)
        due = 9 if recipe is named else bins_for(layout, mu, 400)
        assert bins_of(recipe, place, plan) == due
        assert len(set(coder.leaf_bin.tolist())) <= due
        assert coder.bins == (9 if recipe is named else CODEC["bins"])
        assert run.codec.layout == layout
        found[recipe is named, epsilon] = due
    assert found[False, 0.5] < found[False, 64.0] and found[True, 0.5] == found[True, 64.0]
    none = Recipe("naive_bayes", {}, {}, {"bins": None, "heaps": None})
    assert codec_settings(none) == codec_settings(usual) == dict(CODEC)


def test_the_file_says_how_it_was_fitted() -> None:
    held = json.loads(Path(planner.__file__).with_name("planner.json").read_text())
    fit = held["fit"]
    assert set(fit) == {"command", "tables", "seeds", "versions", "runs", "regret"}
    protocol = {"adult", "bank_marketing_full", "credit_default", "online_shoppers"}
    protocol |= {"magic_gamma", "acs_income_2018", "census_income_kdd", "nist_national2019"}
    assert fit["tables"] and not protocol & set(fit["tables"])
    assert fit["runs"] > 0


# Plans


@pytest.mark.parametrize("model", [name for name, f in FAMILIES.items() if f.trained])
@pytest.mark.parametrize("epsilon", [0.05, 1.0, 30.0])
def test_a_planned_training_calibrates_under_its_target(model: str, epsilon: float) -> None:
    plan = plan_of(Recipe(model), seat(epsilon), 400).calibrate()
    assert plan.steps > 0 and 0 < plan.noise < 1e6
    assert sum(plan.shares.values()) < 0.97
    again = plan_of(Recipe(model), seat(epsilon, 3), 400)
    assert again.to_dict() == {**plan.to_dict(), "sigma": None}, "no seed, no rows"


def test_what_the_user_names_wins() -> None:
    for epsilon in (0.5, 8.0):
        usual = plan_of(Recipe("autoregressive"), seat(epsilon), 400)
        privacy = {"shares": {"codec": 0.11, "tables": None}, "steps": 7, "batch": 50}
        named = plan_of(Recipe("autoregressive", {}, privacy), seat(epsilon), 400)
        assert named.shares == {**usual.shares, "codec": 0.11}
        assert (named.steps, named.batch) == (7, 50)
    layout = Layout.of(SCHEMA, **CODEC)
    fewer = plan_of(Recipe("vae", {}, {}, {"bins": 5, "heaps": 2}), seat(1.0), 400)
    mu = whole_mu(1.0, 1e-5, (), 1)
    assert fewer.shares["codec"] == shares_of(Layout.of(SCHEMA, bins=5, heaps=2), mu, 400)["codec"]
    assert signal(layout, mu, 400) < signal(Layout.of(SCHEMA, bins=5, heaps=2), mu, 400)


def test_the_first_plan_pays_the_row_count_that_the_second_is_charged() -> None:
    """Without a declared number the first plan knows none; its `rows` must cost the same."""
    unknown = Table(replace(SCHEMA, expected_rows=None), table().frame)
    first, second = (plan_of(Recipe("vae"), Seat(unknown, 1.0), rows) for rows in (1, 50_000))
    assert first.mu("rows") == second.mu("rows") > 0
    assert first.shares != second.shares


def test_without_privacy_all_families_have_a_plan() -> None:
    for model in FAMILIES:
        plan = plan_of(Recipe(model), seat(math.inf), 400)
        assert sum(plan.shares.values()) <= 1 + 1e-9


# The family


def wide(columns: int, levels: int) -> Schema:
    names = tuple(str(level) for level in range(levels))
    parts = tuple(Column(f"c{i}", "categorical", names) for i in range(columns))
    return Schema((*parts, Column("y", "categorical", ("0", "1"))), "y", expected_rows=10_000_000)


def test_families_by_width_and_signal() -> None:
    fitted = values()
    assert family_of(SCHEMA, 1.0, {}, {}) == ("autoregressive", {})
    for width, wanted in (
        (fitted.wide, ("autoregressive", {})),
        (fitted.widest, ("diffusion", {})),
    ):
        levels = (width - 2) // 4
        assert family_of(wide(4, levels), 16.0, {}, {}) == wanted
    over = family_of(wide(fitted.widest // 900 + 1, 900), 1.0, {}, {})
    assert over == ("diffusion", {"components": 0})
    faint = replace(wide(4, 100), expected_rows=100)
    assert family_of(faint, 0.01, {}, {}) == ("mixture", {})
    assert family_of(replace(faint, expected_rows=None), 0.01, {}, {}) == ("autoregressive", {})
    assert family_of(faint, math.inf, {}, {}) == ("autoregressive", {})


def test_families_change_once_with_the_budget() -> None:
    schemas = [replace(wide(5, 90), expected_rows=rows) for rows in ROWS]
    schemas += [simulated_schema(name) for name in SIMULATED]
    for schema in schemas:
        names = [family_of(schema, epsilon, {"delta": 1e-7}, {})[0] for epsilon in EPSILONS]
        assert names == sorted(names, key=["mixture", "autoregressive"].index)


@pytest.mark.parametrize(
    ("epsilon", "privacy", "words"),
    [
        (0.0, {}, "epsilon=0"),
        ("one", {}, "epsilon=one"),
        (1.0, {"delta": 2.0}, "delta=2"),
        (1.0, {"contributions": 0}, "contributions=0"),
    ],
)
def test_family_of_refuses(epsilon: Any, privacy: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        family_of(SCHEMA, epsilon, privacy, {})


def test_auto_is_the_recipe_of_its_family() -> None:
    """So that both can train in one fleet, and a folder says what was trained."""
    asked, named = (
        point_of(configure([f"model={model}", "seed=0"]), table())
        for model in ("auto", "autoregressive")
    )
    assert asked.recipe.digest() == named.recipe.digest() and asked.name == named.name
    given = configure(["model=auto", "+model.options.lr=0.5", "privacy.shares.codec=.2"])
    recipe = point_of(given, table()).recipe
    assert recipe.options["lr"] == 0.5 and recipe.privacy["shares"]["codec"] == 0.2
    with pytest.raises(UsageError, match="model=auto: needs the table"):
        point_of(configure(["model=auto"]))
    with pytest.raises(UsageError, match="model=auto"):
        Recipe("auto")


def test_auto_follows_the_budget_of_each_point_of_a_grid() -> None:
    rows = Table(replace(SCHEMA, expected_rows=100), table(100).frame)
    grid = expand(["model=auto", "privacy.epsilon=0.001,8", "seed=0"])
    points = [point_of(cfg, rows, variant) for cfg, variant in grid]
    assert [point.recipe.model for point in points] == ["mixture", "autoregressive"]
    assert [point.epsilon for point in points] == [0.001, 8.0]


def test_auto_under_a_target_in_other_terms() -> None:
    cfg = configure(["model=auto", "privacy.target.mu=.5", "seed=0"])
    named = configure(["model=autoregressive", "privacy.target.mu=.5", "seed=0"])
    assert point_of(cfg, table()).epsilon == point_of(named, table()).epsilon
    assert point_of(cfg, table()).recipe == point_of(named, table()).recipe


def test_fit_takes_the_planners_family() -> None:
    fitted = dpsynth.fit(table(), epsilon=1.0, steps=2, batch=32, seed=0, progress=False)
    assert fitted.recipe.model == "autoregressive"
    (named,) = train_fleet(
        Recipe("autoregressive", {}, {"delta": 1e-5, "steps": 2, "batch": 32}), [seat(1.0)]
    )
    assert fitted.plan == named.plan
    few = Table(replace(SCHEMA, expected_rows=100), table(100).frame)
    assert dpsynth.fit(few, epsilon=0.001, seed=0, progress=False).recipe.model == "mixture"
    assert isinstance(fitted.sample(5, rng=0), pd.DataFrame)
