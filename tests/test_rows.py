"""Rows on disk: what was written, at any place, and the same training as from memory."""

import stat
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import recipe, seat

from dpsynth.checks import UsageError
from dpsynth.models import captured
from dpsynth.rows import MappedRows, read_rows, write_rows
from dpsynth.training import fleet, measure
from dpsynth.training.fleet import train_fleet


@settings(max_examples=30)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_rows_are_those_that_were_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], columns: int, places: int, key: int
) -> None:
    made = torch.Generator().manual_seed(key)
    folder, runs = tmp_path_factory.mktemp("rows"), []
    for run in range(2):
        whole = torch.randint(0, 2**15, (sum(sizes), columns), generator=made)
        write_rows(folder / str(run), whole.split(sizes), columns)
        runs.append(whole)
    held = MappedRows([read_rows(folder / str(run)) for run in range(2)])
    assert held.shape == (2, sum(sizes), columns)
    index = torch.randint(0, sum(sizes), (2, 3, places), generator=made)
    expected = torch.stack([whole[index[run]] for run, whole in enumerate(runs)])
    assert torch.equal(held.take(index), expected)
    assert held.read(index).dtype == torch.int16


def test_a_file_of_rows_is_its_owners_and_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows"
    for value in (1, 2):
        write_rows(path, [torch.full((3, 2), value)], 2)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (found,) = read_rows(path)
        assert (found == value).all()


def test_what_holds_no_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no rows")
    for name in ("text", "absent"):
        with pytest.raises(UsageError, match=f"{name}': no encoded rows"):
            read_rows(tmp_path / name)


OWN: list[dict[str, Any]] = [
    {},
    {"capture": True},
    {"capture": True, "piece": 16},
    {"privacy": {"secure": True, "steps": 2}},
]


@pytest.mark.parametrize("settings", OWN, ids=["eager", "captured", "pieces", "secure"])
def test_a_training_from_disk_is_the_training_from_memory(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with many pieces in a file, and batches fetched two at a time."""
    monkeypatch.setattr(measure, "_ROWS", 70)
    monkeypatch.setattr(captured, "_FETCHED", 2 * 2 * 2 * 60 * 4)
    secure = "secure" in settings.get("privacy", {})
    seats = [seat(epsilon, None if secure else 3) for epsilon in (0.5, 2.0)]
    folders = [tmp_path / "device", tmp_path / "mapped"]
    for folder in folders if secure else ():  # the same keys
        folder.mkdir()
    made = [recipe("diffusion", rows=where, **settings) for where in ("device", "mapped")]
    if secure:
        monkeypatch.setattr(fleet, "fresh_key", lambda: (1 << 200) + 7)
    first, second = (
        train_fleet(one, seats, state=folder) for one, folder in zip(made, folders, strict=True)
    )
    for left, right in zip(first, second, strict=True):
        states = left.generator.state_dict(), right.generator.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert left.plan == right.plan
    assert not list(tmp_path.rglob("*.arrow"))


@pytest.mark.parametrize(("where", "free"), product(["device", "mapped", "auto"], [1e3, 1e12]))
def test_rows_are_mapped_where_they_would_fill_the_memory(
    where: str, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SMALL", 0)
    monkeypatch.setattr(measure, "free_memory", lambda device: free)
    with measure.row_folder(recipe("vae", rows=where), [seat()], None) as folder:
        assert (folder is not None) == (where == "mapped" or (where == "auto" and free < 1e4))
    assert folder is None or not folder.exists()
