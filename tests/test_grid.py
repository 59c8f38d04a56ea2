"""A grid on disk: packed once, whatever is free later, and no noise drawn twice for one charge."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import recipe, seat

from dpsynth.checks import UsageError
from dpsynth.training import grid, packing
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.grid import Grid, Member
from dpsynth.training.packing import GIB, Need
from dpsynth.training.recipe import Recipe, Seat
from dpsynth.training.run import Run

NAMES = ("a", "b", "c", "d")


def members(seed: int | None = 0, names: Sequence[str] = NAMES) -> dict[str, Member]:
    """Runs of four batches; `seed` is that of the first, the others have one."""
    return {
        name: Member(
            name,
            recipe(privacy={"batch": 30 + place, "steps": 2}),
            seat(math.inf, place if place else seed),
        )
        for place, name in enumerate(names)
    }


@pytest.fixture(autouse=True)
def a_gib_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "measured", lambda *_: Need(0.0, float(GIB)))


def train(whole: Grid, needed: Sequence[str] = NAMES) -> str:
    said = StringIO()
    console = Console(file=said, width=300)
    fleets, _ = whole.fleets(needed)
    whole.keep(fleets)
    for fleet in fleets:
        whole.train(fleet, needed, data="tiny", console=console, loggers=lambda *_: False)
    return said.getvalue()


class Gpu:
    """A `train_fleet` that is out of memory beyond `most` runs, once it has drawn its keys."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[tuple[int, list[str]]] = []

    def __call__(
        self, recipes: Sequence[Recipe], seats: Sequence[Seat], *, state: Path, **others: Any
    ) -> list[Trained]:
        if len(seats) > self.most:
            state.mkdir(parents=True)
            (state / "keys").write_text("drawn")
            self.asked.append((len(seats), []))
            raise torch.OutOfMemoryError("CUDA out of memory")
        done = train_fleet(recipes, seats, state=state, **others)
        self.asked.append((len(seats), (state / "keys").read_text().split()[1:]))
        return done


# Packed once


def test_a_resumed_grid_packs_as_before_whatever_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Grid(members(), tmp_path)
    monkeypatch.setattr(packing, "capacity", lambda *_: 2.0 * GIB)
    fleets, _ = first.fleets(NAMES)
    assert fleets == [("a", "b"), ("c", "d")]
    first.keep(fleets)
    monkeypatch.setattr(packing, "capacity", lambda *_: 9.0 * GIB)
    again, notes = Grid(members(), tmp_path).fleets(NAMES)
    assert again == fleets and notes == ["2 as before"]
    more = Grid(members(names=(*NAMES, "e")), tmp_path)
    assert more.fleets([*NAMES, "e"])[0] == [*fleets, ("e",)]
    fewer = Grid({n: m for n, m in members().items() if n != "d"}, tmp_path)
    assert fewer.fleets(["a", "b", "c"])[0] == [("a", "b"), ("c",)]
    first.forget()
    assert first.fleets(NAMES)[0] == [NAMES]
    assert not list(tmp_path.iterdir())


def test_another_memory_packs_anew_but_for_what_has_its_key_in_a_fleet(tmp_path: Path) -> None:
    before = Grid(members(seed=None), tmp_path, memory=2.0)
    before.keep(before.fleets(NAMES)[0])
    after = Grid(members(seed=None), tmp_path, memory=1.0)
    assert after.fleets(NAMES)[0] == [("a", "b"), ("c",), ("d",)]


def test_what_is_trained_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Grid(members(), tmp_path, memory=2.0)
    monkeypatch.setattr(grid, "train_fleet", gpu := Gpu(most=9))
    train(whole, ["a", "b", "c"])
    assert [runs for runs, _ in gpu.asked] == [2, 1]
    train(whole, NAMES)
    assert [runs for runs, _ in gpu.asked] == [2, 1, 1]
    assert all(whole.is_trained(name) for name in NAMES)


@pytest.mark.parametrize("text", ["{", "[]", '{"memory": null}', '{"memory": 1, "fleets": [1]}'])
def test_a_damaged_packing_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "packing.json").write_text(text)
    with pytest.raises(UsageError, match=r"packing\.json.* is damaged; remove it"):
        Grid(members(), tmp_path).fleets(NAMES)


# Out of memory after all


def test_a_fleet_that_is_out_of_memory_trains_in_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the keys it would have had, so that nothing is drawn twice with other noise."""
    whole = Grid(members(), tmp_path / "halves", memory=9.0)
    monkeypatch.setattr(grid, "train_fleet", gpu := Gpu(most=1))
    said = train(whole)
    assert [runs for runs, _ in gpu.asked] == [4, 2, 1, 1, 2, 1, 1]
    assert said.count("out of memory, once more in halves") == 3
    kept = json.loads((whole.folder / "packing.json").read_text())["fleets"]
    assert sorted(kept) == [["a"], ["b"], ["c"], ["d"]], "a resumed grid begins with the parts"
    states = list((whole.folder / "fleets").iterdir())
    assert len(states) == 4, "what was drawn for a fleet that failed is gone"
    at_once = Grid(members(), tmp_path / "once", memory=9.0)
    monkeypatch.setattr(grid, "train_fleet", big := Gpu(most=4))
    train(at_once)
    drawn = [key for _, keys in gpu.asked for key in keys]
    assert drawn == big.asked[0][1]
    for name in NAMES:
        left, right = (Run.load(g.trained(name)).generator for g in (whole, at_once))
        for key, value in left.state_dict().items():
            torch.testing.assert_close(right.state_dict()[key], value, rtol=1e-4, atol=1e-6)


def test_unseeded_runs_are_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their keys are nowhere but in the fleet that failed: it stays, and somebody must decide."""
    whole = Grid(members(seed=None), tmp_path, memory=9.0)
    monkeypatch.setattr(grid, "train_fleet", Gpu(most=2))
    with pytest.raises(UsageError, match=r"4 runs without a seed .*then give training\.memory="):
        train(whole)
    (state,) = (tmp_path / "fleets").iterdir()
    assert (state / "keys").is_file()
    assert whole.fleets(NAMES)[0] == [NAMES]


def test_one_run_that_is_out_of_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "train_fleet", Gpu(most=0))
    with pytest.raises(UsageError, match=r"a: out of memory alone; lower training\.piece"):
        train(Grid(members(), tmp_path, memory=9.0))
