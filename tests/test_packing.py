"""Packing: a partition of the grid, within memory, and never dearer than any other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import HERE, OPTIONS, SCHEMA, recipe, seat

from dpsynth.checks import UsageError
from dpsynth.devices import free_memory
from dpsynth.training import packing
from dpsynth.training.packing import FEW, GIB, OVERHEAD, Need, capacity, cost, pack, upper_bound
from dpsynth.training.recipe import Recipe, Seat

SEAT = seat()
EACH = Need(0.0, float(GIB))


def fixed(need: Need) -> Any:
    return lambda recipes, seats, limit: need


def packed(steps: Sequence[int], most: int, model: str = "vae") -> list[list[int]]:
    """Runs of these T, where so many fit; by their T."""
    recipes = [recipe(model, privacy={"steps": t}) for t in steps]
    found = pack(recipes, [SEAT] * len(steps), memory=most, needs=fixed(EACH))
    assert sorted(i for fleet in found.fleets for i in fleet) == list(range(len(steps)))
    return [[steps[i] for i in fleet] for fleet in found.fleets]


# Against every other way


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for parts in partitions(rest):
        yield [[first], *parts]
        for place in range(len(parts)):
            yield [*parts[:place], [first, *parts[place]], *parts[place + 1 :]]


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([0, 1, 5, 20, 60, 400, 5000]), min_size=1, max_size=6),
    st.integers(1, 6),
)
@example([5000, 1, 5000, 1, 5000, 1], 2)
def test_no_partition_within_memory_is_cheaper(steps: list[int], most: int) -> None:
    overhead = OVERHEAD["cpu"]
    fleets = packed(steps, most)
    assert max(map(len, fleets)) <= most
    cheapest = min(
        sum(cost(part, overhead) for part in parts)
        for parts in partitions(steps)
        if max(map(len, parts)) <= most
    )
    assert sum(cost(fleet, overhead) for fleet in fleets) == cheapest


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0, 1, 500]))
def test_runs_of_equal_length_form_as_few_fleets_as_fit(runs: int, most: int, steps: int) -> None:
    assert len(packed([steps] * runs, most)) == math.ceil(runs / most)


def test_short_runs_leave_long_ones_where_that_saves_more_than_it_costs() -> None:
    overhead = OVERHEAD["cpu"]
    assert packed([5, 6, 5, 6], 4) == [[5, 6, 5, 6]]
    assert packed([10, 1000, 10, 1000], 4) == [[10, 10], [1000, 1000]]
    together, apart = cost([10, 1000], overhead), cost([10], overhead) + cost([1000], overhead)
    assert apart < together, "the rule, in figures"


def test_a_family_that_is_not_trained_is_never_cut_by_steps() -> None:
    assert packed([1, 10_000], 2, "naive_bayes") == [[1, 10_000]]


# What may join


def test_only_runs_of_one_program_and_schema_join() -> None:
    other = Seat(replace(SEAT.table, schema=replace(SCHEMA, target=None)), math.inf, 0)
    grid = [
        (recipe("vae"), SEAT),
        (recipe("gan"), SEAT),
        (recipe("vae", options={"lr": 0.1}, privacy={"clip": 2.0, "batch": 16}), seat(1.0, 7)),
        (recipe("vae", options={"hidden": [9]}), SEAT),
        (recipe("vae"), other),
        (recipe("vae", piece=7), SEAT),
        (recipe("gan", privacy={"delta": 1e-6}), seat(2.0)),
    ]
    recipes, seats = zip(*grid, strict=True)
    found = pack(recipes, seats, memory=100, needs=fixed(EACH))
    assert found.fleets == ((0, 2), (1, 6), (3,), (4,), (5,))
    assert [note.split(":")[0] for note in found.notes] == ["vae", "gan", "vae", "vae", "vae"]
    assert pack(recipes, seats, memory=100, needs=fixed(EACH)) == found
    assert pack([], [], memory=100) == packing.Packing((), ())


def test_it_says_why_there_are_so_many() -> None:
    def note(steps: Sequence[int], memory: float) -> str:
        recipes = [recipe(privacy={"steps": t}) for t in steps]
        return pack(recipes, [SEAT] * len(steps), memory, needs=fixed(EACH)).notes[0]

    assert note([5] * 3, 3) == "vae: 3 runs in 1 fleet (3 GiB hold 3 of 1 GiB)"
    for epsilon, room in ((1.0, "as memory holds"), (math.inf, "3 GiB hold 3 of 1 GiB")):
        uncounted = [seat(epsilon, run, expected_rows=None) for run in range(3)]
        (found,) = pack([recipe()] * 3, uncounted, 3, needs=fixed(EACH)).notes
        assert found == f"vae: 3 runs in 1 fleet ({room})"
    assert note([5] * 3, 2) == "vae: 3 runs in 2 fleets (2 GiB hold 2 of 1 GiB)"
    assert "steps differ" in note([10, 1000], 3)
    both = note([10, 1000, 10, 1000], 1.5)
    assert "4 fleets" in both and "hold 1" in both


@pytest.mark.parametrize("memory", [0.5, 0.999])
def test_a_run_that_does_not_fit_alone_is_refused(memory: float) -> None:
    with pytest.raises(UsageError, match=r"training\.memory=.*vae needs 1 GiB; raise it"):
        pack([recipe()], [SEAT], memory, needs=fixed(EACH))


@given(st.floats(0, 1e12), st.floats(1, 1e12), st.floats(0, 1e13))
def test_the_most_runs_are_the_most_that_fit(fixed: float, each: float, limit: float) -> None:
    need = Need(fixed, each)
    most = need.most(limit)
    assert most == 0 or need.of(most) <= limit * (1 + 1e-12) + 1e-6 * each
    assert need.of(most + 2) > limit


# What is free


def test_capacity_is_a_part_of_what_is_free() -> None:
    free = free_memory("cpu")
    assert capacity("cpu") == pytest.approx(0.8 * free, rel=0.3)
    assert capacity("cpu", 2) == 2 * GIB


@pytest.mark.parametrize("memory", [0, -1, math.inf, math.nan, "much"])
def test_a_memory_that_is_no_number_is_refused(memory: Any) -> None:
    with pytest.raises(UsageError, match=r"training\.memory="):
        capacity("cpu", memory)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_says_what_is_free_and_what_runs_need() -> None:
    free, total = torch.cuda.mem_get_info()
    assert 0 < capacity("cuda") <= total
    assert capacity("cuda") == pytest.approx(0.8 * free, rel=0.2)
    wide = replace(WIDE, device="cuda")
    need = packing.probe(wide, SCHEMA, (1.0,))
    assert LEAST < need.each < upper_bound(wide, SCHEMA).each


# What runs need

WIDE = recipe(
    "diffusion",
    options={"hidden": [512, 512], "draws": 4},
    privacy={"batch": 400, "steps": 2},
)
# Two moments, weights, average and gradient, and the outputs of two layers for four masks of 400.
LEAST = 4 * (5 * 512 * 512 + 2 * 4 * 400 * 512)


def test_a_probe_finds_what_can_be_counted() -> None:
    """In a process of its own, between what must be held and what no run exceeds."""
    need = packing.probe(WIDE, SCHEMA, (1.0,))
    assert LEAST < need.each < upper_bound(WIDE, SCHEMA).each
    assert need.of(FEW) < upper_bound(WIDE, SCHEMA).of(FEW)


@pytest.mark.parametrize("engine", ["taps", "opacus_hooks"])
@pytest.mark.parametrize("model", HERE)
def test_no_run_exceeds_the_upper_bound(model: str, engine: str) -> None:
    """Of every family, with layers wide enough to be seen; 2 MiB are for libraries here."""
    options = {"hidden": [128, 128]} if "hidden" in OPTIONS[model] else {}
    one = recipe(model, options=options, privacy={"batch": 200}, engine=engine)
    asked, schema = packing._widest([one], [SEAT])
    _, few = packing._on_host(asked, schema, (1.0,), 1)
    assert few < 2 * 2**20 + FEW * upper_bound(asked, schema).each
    if options:  # weights, two moments, average and gradient
        assert few > FEW * 5 * 4 * 128 * 128


def test_what_is_measured_is_the_widest_of_a_group() -> None:
    recipes = [
        recipe(privacy={"batch": 16, "steps": 500, "clip": 3.0}),
        recipe(privacy={"batch": 100, "steps": 7}),
        recipe(privacy={"secure": True}),
    ]
    seats = [seat(1.0), seat(4.0, expected_rows=4000), seat(math.inf, expected_rows=None)]
    asked, schema = packing._widest(recipes, seats)
    assert schema.expected_rows == 4000
    assert asked.privacy == {"batch": 160, "steps": 2, "delta": 1e-5}
    assert asked.program() == recipes[0].program()
    assert packing._budgets(seats) == (1.0, math.inf)
    assert packing._budgets(seats[:2]) == (1.0,)
    assert packing._budgets(seats[2:]) == (math.inf,)
    asked, schema = packing._widest(recipes[2:], seats[2:])
    assert asked.privacy["secure"] is True
    assert schema.expected_rows == 512, "400 rows, coarsely"
    asked, _ = packing._widest([recipe("independent")], [SEAT])
    assert asked.privacy["steps"] == 0


def test_the_schema_of_made_up_rows_holds_no_fact_that_is_not_public() -> None:
    measured = replace(SCHEMA.columns[0], provenance="data")
    drafted = replace(SEAT.table, schema=replace(SCHEMA, columns=(measured, *SCHEMA.columns[1:])))
    _, schema = packing._widest([recipe()], [Seat(drafted, math.inf, 0)])
    schema.check_public()
    table = packing._made_up(schema)
    assert len(table) == schema.expected_rows
    assert table.frame["job"].nunique() == 3


def test_a_probe_is_spared_where_a_bound_is_enough_and_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[Recipe] = []

    def probe(asked: Recipe, *_: Any) -> Need:
        made.append(asked)
        return EACH

    monkeypatch.setattr(packing, "probe", probe)
    monkeypatch.setattr(packing, "_known", {})
    bound = upper_bound(*packing._widest([recipe()] * 3, [SEAT] * 3))
    assert packing.measured([recipe()] * 3, [SEAT] * 3, 2 * bound.of(3)) == bound
    assert made == []
    for _ in range(2):
        assert packing.measured([recipe()] * 3, [SEAT] * 3, 1.9 * bound.of(3)) == EACH
    assert len(made) == 1
    packing.measured([recipe("gan")], [SEAT], 1.0)
    assert len(made) == 2


def test_runs_that_kill_the_probe_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Killed:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr(packing, "ProcessPoolExecutor", Killed)
    with pytest.raises(UsageError, match=r"4 runs of vae did not fit .*training\.memory in GiB"):
        packing.probe(recipe(), SCHEMA, (1.0,))


class FakeGpu:
    """torch's allocator, with runs of 10 bytes beside 5 and 7 that others hold."""

    def __init__(self, patch: pytest.MonkeyPatch, most: int) -> None:
        self.most, self.peak = most, 7
        for name, value in (("synchronize", None), ("empty_cache", None), ("memory_allocated", 7)):
            patch.setattr(torch.cuda, name, lambda v=value: v)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        patch.setattr(packing, "_train", self.train)
        patch.setattr(packing, "resolve", lambda _: torch.device("cuda"))

    def reset(self) -> None:
        self.peak = 7

    def train(self, asked: Recipe, schema: Any, budgets: Any, runs: int) -> None:
        self.peak = 7 + 5 + 10 * min(runs, self.most)
        if runs > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_gpu_is_asked_for_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, most=99)
    assert packing.probe(recipe(), SCHEMA, (1.0,)) == Need(5, 10)


def test_on_a_gpu_that_holds_one_run_a_further_one_counts_as_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    FakeGpu(monkeypatch, most=1)
    assert packing.probe(recipe(), SCHEMA, (1.0,)) == Need(0, 15)


def test_a_gpu_that_holds_no_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, most=0)
    with pytest.raises(UsageError, match="one run of vae does not fit on the GPU; lower"):
        packing.probe(recipe(), SCHEMA, (1.0,))
