"""Every benchmark runs at tiny sizes, measures what it says, and writes the promised keys."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
NAMES = ("step", "fleet", "sampler", "scaling", "neighbours", "histograms")
RECORDING = ("step", "fleet", "sampler", "scaling")


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """Scripts find each other as if started from their folder; threads are put back."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, []) for name in NAMES), *((name, ["--captured"]) for name in RECORDING)],
)
def test_each_script_writes_its_results(name, options, tmp_path, capsys):
    path = tmp_path / "out" / f"{name}.json"
    returned = load(f"bench_{name}").main(["--quick", "--json", str(path), *options])
    found = json.loads(path.read_text())
    assert found == json.loads(json.dumps(returned))
    assert found["benchmark"] == name and found["quick"] is True
    assert found["captured"] is bool(options)
    assert {"date", "machine", "versions", "sizes", "results", "targets"} <= set(found)
    assert {"cpu", "cores", "threads", "device", "gpu"} == set(found["machine"])
    assert {"python", "torch", "opacus", "dpsynth"} <= set(found["versions"])
    for row in found["results"]:
        assert row["name"]
        for figure in (row["ms"], row["ratio"]):
            assert 0 < figure["q1"] <= figure["median"] <= figure["q3"]
    assert all({"what", "value", "most", "least", "met"} == set(row) for row in found["targets"])
    printed = capsys.readouterr().out
    assert all(row["what"] in printed for row in found["targets"])
    if name == "step":
        _has_parts_and_memory(found)


def _has_parts_and_memory(found: dict) -> None:
    assert found["captured"] or found["split"]
    for part in found["split"]:
        whole = {"batch", "whole", "forward", "backward", "clipping", "noise", "adam"}
        assert whole == set(part)
    for row in found["results"]:
        assert row["memory"]["resting"] > 0 and row["memory_ratio"] > 0
        assert row["name"] != "non-private" or row["memory_ratio"] == 1


def test_a_profile_names_the_operators_of_a_step():
    text = load("bench_step").profiled(4, "cpu", True)
    assert "aten::baddbmm" in text and "aten::bmm" in text


# -- measuring ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["non-private", "taps"])
@pytest.mark.parametrize("name", ["mlp", "diffusion", "gan"])
def test_a_recorded_step_is_the_step(name, mode):
    bench = load("bench_step")
    moved = []
    for recorded in (False, True):
        work = bench.workload_of(name, 4, "cpu", True, captured=True)  # the same draws
        before = [p.detach().clone() for p in work.network.parameters()]
        step = work.step(mode, captured=recorded)
        for _ in range(3):
            step()
        moved.append(
            [p.detach() - b for p, b in zip(work.network.parameters(), before, strict=True)]
        )
    assert any(change.abs().max() > 0 for change in moved[0])
    for plain, replayed in zip(*moved, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-6)


def test_a_recorded_step_reads_its_rows_anew():
    """What follows from the rows is computed at every step, as in a training."""
    bench = load("bench_step")
    changes = []
    for shift in (0.0, 1.0):
        work = bench.workload_of("mlp", 4, "cpu", True, captured=True)
        step = work.step("non-private", captured=True)
        work.data[1].add_(shift)
        step()
        changes.append(next(work.network.parameters()).detach().clone())
    assert not torch.equal(*changes)


@pytest.mark.parametrize("precision", ["32", "tf32", "bf16"])
def test_products_are_put_back(precision):
    bench = load("benchmarking")
    before, seen = torch.get_float32_matmul_precision(), []
    step = bench.within(
        precision, lambda: lambda: seen.append(torch.get_float32_matmul_precision())
    )
    step()
    assert seen == ["highest" if precision == "32" else "high"]
    assert torch.get_float32_matmul_precision() == before


def test_all_scripts_run_though_one_fails(tmp_path):
    """With an interpreter that notes what it is asked for, and fails at one of them."""
    python, noted = tmp_path / "python", tmp_path / "noted"
    python.write_text(f'#!/bin/sh\necho "$@" >> {noted}\ncase $1 in *fleet*) exit 3;; esac\n')
    python.chmod(0o755)
    command = ["sh", str(SCRIPTS / "bench_all.sh"), str(tmp_path / "out"), "--quick"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True
    )
    asked = noted.read_text().splitlines()
    wanted = {path.name for path in SCRIPTS.glob("bench_*.py")}
    assert {Path(line.split()[0]).name for line in asked} == wanted
    assert done.returncode == 1 and "failed: fleet" in done.stderr
    python.write_text("#!/bin/sh\nexit 0\n")
    assert subprocess.run(command, env={**os.environ, "PYTHON": str(python)}).returncode == 0


def test_steps_take_turns():
    seen: list[str] = []
    steps = {name: lambda n=name: seen.append(n) for name in "abc"}
    times = load("benchmarking").interleave(steps, device="cpu", rounds=3, least_ms=0.0)
    assert seen == [*"aabbcc", *"abc" * 3]  # each warmed up and tried once, then rounds
    assert all(len(samples) == 3 for samples in times.values())


def test_quick_steps_are_repeated_until_they_can_be_timed():
    bench = load("benchmarking")
    seen: list[int] = []
    bench.interleave({"a": lambda: seen.append(0)}, device="cpu", rounds=1, least_ms=1e9)
    assert len(seen) == 2 + 1000


def test_ratios_are_taken_within_a_round():
    bench = load("benchmarking")
    times = {"a": [1.0, 10.0, 100.0], "b": [2.0, 50.0, 300.0], "c": [0.5, 1.0, 2.0]}
    assert bench.ratios(times, "b", "a")["median"] == 3.0
    assert bench.difference(times, "b", "a", "c") == {"median": 39.0, "q1": 19.75, "q3": 118.5}
    (row, *_) = bench.compare(times, "a", size=7)
    assert row["size"] == 7 and row["name"] == "a" and row["ratio"]["median"] == 1.0
    assert bench.spread([4.0]) == {"median": 4.0, "q1": 4.0, "q3": 4.0}


@pytest.mark.parametrize(
    ("limits", "met"),
    [({"most": 1.5}, True), ({"most": 1.4}, False), ({"least": 2}, False), ({"least": 1}, True)],
)
def test_a_target_is_met_or_missed(limits, met):
    assert load("benchmarking").target("x", 1.5, **limits)["met"] is met


def holding(rest: int, most: int) -> Callable[[], object]:
    """A step that keeps `rest` MB in tensors, and needs `most` MB more of NumPy or torch."""
    kept = torch.ones(rest * 10**6 // 4)

    def step() -> None:
        first = torch.ones(most * 10**6 // 8)
        second = np.ones(most * 10**6 // 16)
        assert len(first) + len(second) + len(kept) > 0

    return step


def test_memory_is_what_a_step_needs_beyond_what_stays():
    cases = [{"rest": 40, "most": 20}, {"rest": 8, "most": 80}]
    for case, found in zip(
        cases, load("benchmarking").memories(holding, cases, "cpu"), strict=True
    ):
        if found is None:
            pytest.skip("this system has no /proc/self/clear_refs")
        assert found["resting"] == case["rest"]
        assert found["step"] == pytest.approx(case["most"], abs=1.0)


@pytest.mark.parametrize("option", [["--threads", "0"], ["--rounds", "0"], ["--device", "cuda"]])
def test_senseless_options_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench = load("benchmarking")
    with pytest.raises(SystemExit) as stopped:
        bench.arguments(bench.parser("any"), option)
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err


# -- what is compared does the same work -------------------------------------------------------


def test_plain_networks_of_the_baseline_compute_what_the_fleet_computes():
    bench = load("bench_fleet")
    problem = bench.Problem(bench.Sizes(3, 5, (4, 8, 8, 4)), "cpu")
    fleet = problem.network(range(3))
    for layer in fleet.layers:
        torch.nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(0))
    made = fleet(problem.rows)
    for run in range(3):
        alone = bench.PlainMlp(fleet, run)(problem.rows[run])
        torch.testing.assert_close(alone, made[run])


def test_opacus_baselines_move_by_clipped_means(monkeypatch):
    """Without noise and with SGD, hooks and ghost both move by the mean of clipped gradients."""
    bench = load("bench_fleet")
    problem = bench.Problem(bench.Sizes(1, 6, (4, 8, 8, 4)), "cpu")
    problem.wanted *= 50  # gradients far longer than the bound
    quiet = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 6}
    monkeypatch.setattr(problem, "_terms", lambda: quiet, raising=False)
    monkeypatch.setattr(torch.optim, "Adam", lambda p: torch.optim.SGD(p, lr=1.0))
    made: list[torch.nn.Module] = []
    plain = bench.PlainMlp

    def remember(*args):
        made.append(plain(*args))
        return made[-1]

    monkeypatch.setattr(bench, "PlainMlp", remember)
    wanted = _clipped_means(bench, problem)
    for variant in (problem.hooks, problem.ghost):
        step = variant(0)
        before = [p.detach().clone() for p in made[-1].parameters()]
        step()
        for old, new, mean in zip(before, made[-1].parameters(), wanted, strict=True):
            torch.testing.assert_close(old - new.detach(), mean, rtol=1e-3, atol=1e-5)


def _clipped_means(bench: ModuleType, problem) -> list[torch.Tensor]:
    """One record at a time by autograd."""
    network = bench.PlainMlp(problem.network([0]), 0)
    parameters = list(network.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row, wanted in zip(problem.rows[0], problem.wanted[0], strict=True):
        gradients = torch.autograd.grad((network(row) - wanted).square().mean(), parameters)
        length = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert length > 1
        total = [t + g / length for t, g in zip(total, gradients, strict=True)]
    return [t / problem.sizes.batch for t in total]


def test_samplers_draw_the_same_number_of_rows():
    bench = load("bench_sampler")
    expected, runs, times = 20, 2, 50
    for name, make in bench.VARIANTS.items():
        step = make(400, runs, expected, "cpu")
        drawn = 0
        for _ in range(times):
            parts = step()
            drawn += sum(int(p[1].sum()) if isinstance(p, tuple) else len(p) for p in parts)
        # Standard deviation of the total: √(100 · 400 · .05 · .95) = 44.
        assert abs(drawn - times * runs * expected) < 5 * 44, name


@pytest.mark.parametrize("number", range(3))
def test_all_searches_find_the_same_distances(number):
    bench = load("bench_neighbours")
    case = bench.QUICK[number]
    queries, keys = (bench.features(case, n, s) for n, s in ((20, "queries"), (50, "keys")))
    truth = bench.exact(queries, keys, case.power)
    steps = bench.variants(case, "cpu")
    np.testing.assert_allclose(steps[bench.OWN]()[:, 0], truth, atol=1e-12)
    for name in (bench.SCIKIT, bench.AUTO):
        np.testing.assert_allclose(steps[name]()[0][:, 0], truth, rtol=1e-6)
    np.testing.assert_allclose(steps[bench.BLOCKED](), truth, atol=1e-3)


@pytest.mark.parametrize("number", range(2))
def test_all_counts_are_equal(number):
    bench = load("bench_histograms")
    case = bench.QUICK[number]
    assert bench.differing(case, "cpu") == 0
    own, *others = (step() for step in bench.variants(case, "cpu").values())
    for other in others:
        np.testing.assert_array_equal([counts[0] for counts in own], other)
