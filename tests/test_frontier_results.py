"""Rows are strict, intervals are Student's, and nothing that brute force finds beaten is kept."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.frontier.results import (
    AUDIT,
    IDENTITY,
    ROLES,
    Fall,
    aggregate,
    check,
    collect,
    falls,
    higher_is_better,
    interval,
    metric_names,
    non_dominated,
    read,
    row,
    summary,
    violations,
    write,
)

FACTS = {"family": "vae", "role": "model", "epsilon": 1.0, "delta": 1e-5, "seed": 0, "run": "a"}
METRICS = {"tvd1": 0.02, "tvd2": 0.05, "tvd3": 0.08, "c2st_auc": 0.7, "tstr_gbt_auc": 0.88}
METRICS |= {"ks": 0.03, "wasserstein": 0.01, "correlation_difference": 0.02}


def report(metrics: dict[str, float] | None = None, floors: dict[str, float] | None = None) -> Any:
    metrics = METRICS if metrics is None else metrics
    base = {name: 0.91 if higher_is_better(name) else 0.01 for name in metrics}
    return SimpleNamespace(metrics=metrics, floors=base if floors is None else floors)


def audit(auc: float = 0.52, tpr1: float = 0.015, ceiling: float = 1.0, **change: Any) -> Any:
    facts: dict[str, Any] = {
        "strongest": SimpleNamespace(
            name="log_ratio", auc=auc, auc_low=max(auc - 0.012, 0), auc_high=min(auc + 0.012, 1),
            tpr10=min(tpr1 * 7, 1.0), tpr1=tpr1, tpr1_low=tpr1 * 0.6, tpr1_high=min(tpr1 * 1.6, 1),
        ),
        "null_low": 0.489, "null_high": 0.511, "ceiling_auc": ceiling,
        "ceiling_tpr10": min(1.0, 0.1 * (ceiling / 0.5) ** 6),
        "ceiling_tpr1": min(1.0, 0.01 * (ceiling / 0.5) ** 8.5) if ceiling < 1 else 1.0,
    }  # fmt: skip
    return SimpleNamespace(**(facts | change))


CEILINGS = {0.5: 0.536, 1: 0.574, 2: 0.632, 4: 0.715, 8: 0.81, math.inf: 1.0}
QUALITY = {"vae": (0.055, 0.11), "gan": (0.08, 0.16), "diffusion": (0.04, 0.13)}


def simulated(seeds: int = 3, *, task: bool = True, root: int = 0) -> pd.DataFrame:
    """A plausible sweep: three families over six ε, two baselines and three controls."""
    rng = np.random.default_rng(root)
    rows = []

    def add(family: str, role: str, epsilon: float, seed: int, tvd2: float, risk: Any) -> None:
        noise = float(rng.normal(1, 0.03))
        metrics = {"tvd1": tvd2 * 0.5, "tvd2": tvd2 * noise, "tvd3": tvd2 * 1.5, "ks": tvd2 * 0.6}
        metrics |= {"wasserstein": tvd2 * 0.2, "correlation_difference": tvd2 * 0.7}
        metrics |= {"c2st_auc": float(min(0.5 + 2 * tvd2, 0.99))}
        if task:
            metrics["tstr_gbt_auc"] = 0.925 - 0.9 * tvd2 * float(rng.normal(1, 0.04))
        floors = {n: 0.5 if n == "c2st_auc" else 0.022 for n in metrics} | {"tstr_gbt_auc": 0.925}
        facts = {"family": family, "role": role, "epsilon": epsilon, "seed": seed}
        facts |= {"delta": 1e-5, "run": f"{family}-{epsilon:g}-{seed}"}
        rows.append(row(report(metrics, floors), risk, facts))

    for seed in range(seeds):
        for family, (best, spread) in QUALITY.items():
            for epsilon, ceiling in CEILINGS.items():
                steps = 0 if math.isinf(epsilon) else 1 / (1 + epsilon) ** 0.9
                leak = 0.5 + 0.45 * min(ceiling - 0.5, 0.11) * (1.2 - best * 5)
                auc = leak + float(rng.normal(0, 0.0035))
                tpr = 0.01 * (auc / 0.5) ** 6 * float(np.exp(rng.normal(0, 0.2)))
                tvd2 = best + spread * steps
                add(family, "model", epsilon, seed, tvd2, audit(auc, tpr, ceiling))
        for name, tvd2 in (("independent", 0.21), ("bayes net", 0.075)):
            for epsilon in (1, 4, math.inf) if name == "bayes net" else (math.inf,):
                auc = 0.505 + float(rng.normal(0, 0.003))
                shift = 0 if math.isinf(epsilon) else 0.05 / epsilon
                risk = audit(auc, 0.011, CEILINGS[epsilon])
                add(name, "baseline", epsilon, seed, tvd2 + shift, risk)
        for name, tvd2, auc, tpr in (
            ("fresh", 0.022, 0.5, 0.01),
            ("p-leak 0.2", 0.021, 0.6, 0.2),
            ("copy", 0.0, 0.999, 0.998),
        ):
            auc = min(auc + float(rng.normal(0, 0.002)), 1.0)
            add(name, "control", math.inf, seed, tvd2, audit(auc, tpr))
    return collect(rows)


def test_row_is_the_listed_schema():
    got = row(report(), audit(), FACTS | {"unit": "row"})
    assert set(got) == {*IDENTITY, *METRICS, *(f"floor_{m}" for m in METRICS), *AUDIT}
    assert got["attack"] == "log_ratio"
    assert got["attack_auc"] == 0.52
    assert got["floor_tstr_gbt_auc"] == 0.91
    assert got["ceiling_auc"] == 1.0


@pytest.mark.parametrize("name", IDENTITY)
def test_row_needs_every_fact(name):
    with pytest.raises(UsageError, match=f"'{name}' is missing"):
        row(report(), audit(), {k: v for k, v in FACTS.items() if k != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": ""}, "family=''"),
        ({"run": 3}, "run=3"),
        ({"role": "oracle"}, "role=oracle"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"epsilon": math.nan}, "epsilon=nan"),
        ({"delta": -1e-5}, "delta=-1e-05"),
        ({"delta": math.nan}, "delta=nan"),
        ({"role": "control"}, "has no guarantee"),
    ],
)
def test_row_refuses_bad_facts(change, message):
    with pytest.raises(UsageError, match=message):
        row(report(), audit(), FACTS | change)


@pytest.mark.parametrize("name", ["tvd1", "tvd2", "ks", "c2st_auc"])
def test_row_refuses_a_missing_metric(name):
    with pytest.raises(UsageError, match=f"metric '{name}' is missing"):
        row(report({k: v for k, v in METRICS.items() if k != name}), audit(), FACTS)


def test_row_refuses_a_metric_without_floor():
    with pytest.raises(UsageError, match="'ks' has no floor"):
        row(report(floors={k: 0.1 for k in METRICS if k != "ks"}), audit(), FACTS)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_row_refuses_what_is_not_finite(value):
    with pytest.raises(UsageError, match="run a: tvd3="):
        row(report(METRICS | {"tvd3": value}), audit(), FACTS)
    with pytest.raises(UsageError, match="run a: floor_tvd3="):
        row(report(floors=METRICS | {"tvd3": value}), audit(), FACTS)
    with pytest.raises(UsageError, match="run a: null_high="):
        row(report(), audit(null_high=value), FACTS)
    with pytest.raises(UsageError, match="run a: attack_auc="):
        row(report(), audit(auc=value), FACTS)


def test_collect_and_check_refuse_gaps_and_repeats():
    good = [row(report(), audit(), FACTS | {"run": name}) for name in "ab"]
    assert len(collect(good)) == 2
    with pytest.raises(UsageError, match="run a: listed twice"):
        collect([good[0], good[0]])
    with pytest.raises(UsageError, match="run b: 'ks' is missing"):
        collect([good[0], {k: v for k, v in good[1].items() if k != "ks"}])
    with pytest.raises(UsageError, match="'null_low' is missing"):
        collect([{k: v for k, v in good[0].items() if k != "null_low"}])
    with pytest.raises(UsageError, match="'tvd2' is missing"):
        check(collect(good).drop(columns="tvd2"))
    with pytest.raises(UsageError, match="no rows"):
        check(collect(good).iloc[:0])


def test_seed_may_be_unset():
    unset = row(report(), audit(), FACTS | {"seed": None})
    frame = collect([unset, row(report(), audit(), FACTS | {"run": "b"})])
    assert frame["seed"].isna().tolist() == [True, False]
    assert frame["seed"].dtype == "Int64"


def test_write_and_read_a_file_and_a_folder(tmp_path):
    results = simulated()
    write(results, tmp_path / "one" / "results.parquet")
    pd.testing.assert_frame_equal(read(tmp_path / "one" / "results.parquet"), results)
    write(results.iloc[:5], tmp_path / "two" / "a.parquet")
    write(results.iloc[5:], tmp_path / "two" / "b.parquet")
    pd.testing.assert_frame_equal(read(tmp_path / "two"), results)


def test_read_refuses_what_is_not_results(tmp_path):
    with pytest.raises(UsageError, match="no Parquet file"):
        read(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        read(tmp_path / "absent.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="not a file of results"):
        read(tmp_path)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_interval_is_students(values):
    mean, low, high = interval(values)
    spread = stats.sem(values)
    assert mean == pytest.approx(np.mean(values))
    if spread > 1e-9:
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread)
        assert (low, high) == pytest.approx(expected)


def test_aggregate_matches_brute_force():
    results = simulated(seeds=4)
    points = aggregate(results, "ks")
    assert len(points) == 6 * 3 + 4 + 3
    sources = {"x": "ks", "attack_auc": "attack_auc", "attack_tpr1": "attack_tpr1"}
    for point in points.itertuples():
        mask = (results["family"] == point.family) & (results["epsilon"] == point.epsilon)
        for name, source in sources.items():
            values = results.loc[mask, source]
            assert getattr(point, name) == pytest.approx(values.mean())
            if values.std() > 1e-12:
                low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
                assert getattr(point, f"{name}_low") == pytest.approx(low)
                assert getattr(point, f"{name}_high") == pytest.approx(high)
        assert point.ceiling_auc == results.loc[mask, "ceiling_auc"].max()
        assert point.seeds == 4
    assert not points.isna().any().any()
    roles = points["role"].tolist()
    assert roles == sorted(roles, key=ROLES.index)


def test_one_seed_takes_the_attacks_own_interval_and_none_for_x():
    results = simulated(seeds=1)
    points = aggregate(results)
    assert (points["seeds"] == 1).all()
    assert (points["x_low"] == points["x"]).all() and (points["x_high"] == points["x"]).all()
    first = points.iloc[0]
    same = (results["family"] == first["family"]) & (results["epsilon"] == first["epsilon"])
    alone = results[same]
    assert first["attack_auc_low"] == alone["attack_auc_low"].iloc[0]
    assert first["attack_tpr1_high"] == alone["attack_tpr1_high"].iloc[0]
    assert not points.isna().any().any()


def test_aggregate_refuses_an_unknown_metric():
    with pytest.raises(UsageError, match="metric=fid"):
        aggregate(simulated(seeds=1), "fid")


grid = st.integers(0, 5).map(float)
roles = st.sampled_from(["model", "model", "baseline"])
several = st.lists(st.tuples(grid, grid, roles), max_size=12)


@given(several)
def test_non_dominated_is_what_brute_force_finds(rows):
    points = pd.DataFrame(rows, columns=["x", "attack_auc", "role"])
    models = [(x, y) for x, y, role in rows if role == "model"]
    expected = [
        role == "model" and not any(a <= x and b <= y and (a < x or b < y) for a, b in models)
        for x, y, role in rows
    ]
    assert non_dominated(points).tolist() == expected


@pytest.mark.parametrize(
    ("metric", "higher"),
    [("tvd2", False), ("c2st_auc", False), ("tstr_gbt_auc", True), ("tstr_gbt_log_loss", False),
     ("tstr_gbt_rmse", False), ("tstr_gbt_r2", True), ("correlation_difference", False)],
)  # fmt: skip
def test_direction_of_metrics(metric, higher):
    assert higher_is_better(metric) is higher


def sweep(values: dict[float, list[float]], metric: str) -> pd.DataFrame:
    return collect(
        row(report(METRICS | {metric: v}), audit(),
            FACTS | {"epsilon": epsilon, "seed": i, "run": f"{epsilon}-{i}"})
        for epsilon, group in values.items() for i, v in enumerate(group)
    )  # fmt: skip


def test_falls_names_the_pair_and_only_beyond_the_intervals():
    values = {1: [0.85, 0.86, 0.85], 2: [0.90, 0.91, 0.90], 4: [0.80, 0.81, 0.80]}
    worse = sweep(values, "tstr_gbt_auc")
    found = falls(worse, "tstr_gbt_auc")
    assert [(f.lower, f.upper) for f in found] == [(1, 4), (2, 4)]
    assert isinstance(found[0], Fall) and found[0].seeds == 3
    assert found[0].before == pytest.approx(np.mean([0.85, 0.86, 0.85]))
    noisy = sweep({1: [0.85, 0.95, 0.9], 2: [0.84, 0.93, 0.89]}, "tstr_gbt_auc")
    assert falls(noisy, "tstr_gbt_auc") == []


def test_falls_knows_that_a_smaller_error_is_better():
    values = {1: [0.05, 0.051, 0.049], 4: [0.1, 0.101, 0.102]}
    assert len(falls(sweep(values, "tvd2"), "tvd2")) == 1
    assert falls(sweep({1: values[4], 4: values[1]}, "tvd2"), "tvd2") == []


def test_violations_need_the_whole_interval_above_the_ceiling():
    rows = [
        row(report(), audit(0.60, ceiling=0.574), FACTS | {"run": "over"}),
        row(report(), audit(0.58, ceiling=0.574), FACTS | {"run": "touching"}),
    ]
    assert violations(collect(rows))["run"].tolist() == ["over"]


def test_summary_lists_every_point_and_escapes():
    results = simulated()
    text = summary(results, title="Adult <b> | x\ny")
    assert text.startswith("# Adult &lt;b> \\| x y\n")
    lines = text.splitlines()
    assert sum(line.startswith("| diffusion | model") for line in lines) == 2 * 6
    widths = {line.replace("\\|", "").count("|") for line in lines if line.startswith("| copy")}
    assert widths == {12, 5 + len(metric_names(results))}
    assert "carry no guarantee" in text
    single = summary(simulated(seeds=1), title="t")
    assert "nan" not in single
