"""A training killed at any moment forgets no step, reuses no draw and loses no run."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import crash
import numpy as np
import pytest
import torch

from dpsynth.checks import UsageError
from dpsynth.privacy.events import Event
from dpsynth.privacy.journal import Journal
from dpsynth.privacy.ledger import Executed
from dpsynth.training.run import Run

KILLS = 50
EVENT = Event("marginal:age", "gaussian", sigma=3.0)


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # What takes seconds to import; the server does not know where the tests lie.
    context.set_forkserver_preload(["dpsynth.training.run", "dpsynth.training.callbacks"])
    return context


def attempt(
    server: ForkServerContext, home: Path, seconds: float | None, releases: int | None = None
) -> bool:
    """Train in a process of its own, killed after `seconds` or once it has released so much;
    whether it was killed."""
    child = server.Process(target=crash.train, args=(str(home),))
    child.start()
    if releases is None:
        child.join(seconds)
    else:
        wanted = size(home) + releases
        while child.is_alive() and size(home) < wanted:
            time.sleep(0.001)
    if child.exitcode is None:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def size(home: Path) -> int:
    """Bytes of what was released."""
    path = home / "released"
    return path.stat().st_size if path.is_file() else 0


def keys_of(home: Path) -> list[int]:
    return [int(line) for line in (home / "state" / "keys").read_text().split()[1:]]


def check_released(home: Path) -> None:
    """Every step that began was paid for, and no draw met two different sums."""
    released = home / "released"
    if not released.is_file():
        return
    sums: dict[tuple[str, str], str] = {}
    steps = {0}
    for line in released.read_text().splitlines():
        step, place, digest = line.split()
        steps.add(int(step) + 1)
        assert sums.setdefault((step, place), digest) == digest, f"step {step}: reused draw"
    if len(steps) > 1:
        held = Journal(home / "state" / "journal.jsonl", keys_of(home))
        assert held.executed().steps >= max(steps), "a step was taken that is not written"


@pytest.fixture(scope="module")
def whole(server: ForkServerContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without a crash."""
    home = tmp_path_factory.mktemp("whole")
    assert not attempt(server, home, None)
    return home


def test_fifty_kills(server: ForkServerContext, whole: Path, tmp_path: Path) -> None:
    (timing := tmp_path / "timing").mkdir()
    began = time.monotonic()
    attempt(server, timing, None)
    usual = time.monotonic() - began
    rng = np.random.default_rng(0)
    kills, round_number, resumed = 0, 0, 0
    while kills < KILLS:
        home = tmp_path / f"round{round_number}"
        (home / "state").mkdir(parents=True)
        # The uncrashed training's keys, so that the two can be compared draw by draw.
        shutil.copy(whole / "state" / "keys", home / "state" / "keys")
        for _ in range(8):
            # By the clock, which also falls on measuring and saving, and by what was done.
            releases = int(rng.uniform(0, size(whole))) if kills % 2 else None
            if not attempt(server, home, rng.uniform(0, usual), releases):
                break
            kills += 1
            check_released(home)
        else:
            attempt(server, home, None)
        check_released(home)
        for number in range(2):
            mine, theirs = (Run.load(h / f"run{number}") for h in (home, whole))
            resumed += mine.ledger.executed.replayed > 0
            assert mine.ledger.executed.steps == theirs.ledger.executed.steps == 24
            events = [
                [(e.what, e.sigma, e.q, e.steps) for e in r.ledger.events] for r in (mine, theirs)
            ]
            assert events[0] == events[1]
            left, right = mine.generator.state_dict(), theirs.generator.state_dict()
            assert all(torch.equal(left[name], right[name]) for name in left)
        round_number += 1
    assert resumed, "no kill ever fell between a step and its checkpoint; the test shows nothing"


def test_a_journal_hands_back_what_was_paid(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    paid = Journal(path, [1, 2]).sink(1)(Event("rows", "gaussian", sigma=2.0, when="then"))
    again = Journal(path, [1, 2])
    assert again.sink(1)(Event("rows", "gaussian", sigma=2.0, when="now")) == paid
    before = path.read_bytes()
    again.sink(0)(EVENT)
    assert path.read_bytes().startswith(before) and path.read_bytes() != before
    assert path.stat().st_mode & 0o077 == 0, "others may not read it"


def test_a_journal_refuses_another_event_than_was_paid(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, [1]).sink(0)(EVENT)
    with pytest.raises(UsageError, match=r"paid for 'marginal:age' .* asks for 'rows'"):
        Journal(path, [1]).sink(0)(Event("rows", "gaussian", sigma=3.0))


def test_a_journal_refuses_other_keys(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, [1])
    with pytest.raises(UsageError, match="another fleet"):
        Journal(path, [2])


def test_a_torn_last_row_never_happened(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, [1]).execute(0, 5)
    whole = path.read_bytes()
    Journal(path, [1]).execute(5, 9)
    for cut in range(len(whole), path.stat().st_size):
        path.write_bytes(path.read_bytes()[:cut] if cut < path.stat().st_size else whole)
        assert Journal(path, [1]).executed() == Executed(5)
        assert path.read_bytes() == whole
        Journal(path, [1]).execute(5, 9)


def changed_rows(content: bytes) -> Iterator[bytes]:
    """One byte changed at a time, in every row but for the line ends."""
    for place in range(0, len(content), 7):
        if content[place : place + 1] != b"\n":
            yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_changed_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, [1])
    journal.sink(0)(EVENT)
    journal.execute(0, 5)
    for changed in changed_rows(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(UsageError, match="journal"):
            Journal(path, [1])


def test_steps_are_counted_once_and_repeats_apart() -> None:
    journal = Journal(None, [1])
    for first, last in ((0, 5), (5, 9), (5, 9), (7, 12)):
        journal.execute(first, last)
    assert journal.executed() == Executed(12, 6)


def test_a_gap_in_the_steps_is_refused() -> None:
    journal = Journal(None, [1])
    journal.execute(0, 5)
    with pytest.raises(UsageError, match="step 7 follows 5"):
        journal.execute(7, 9)


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 3), (4, 3)])
def test_an_empty_range_of_steps_is_refused(first: int, last: int) -> None:
    with pytest.raises(UsageError, match="are none"):
        Journal(None, [1]).execute(first, last)
