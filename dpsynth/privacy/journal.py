"""Journal: what a fleet pays and does, on disk before it happens: no crash can forget it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpsynth.checks import UsageError
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Executed

__all__ = ["Journal"]

FORMAT = 1


class Journal:
    """Append-only file of a fleet's events and steps; every row holds a hash of all before it.

    A row is on disk (fsync) before the mechanism or the steps it stands for read a record. Opened
    again after a crash, it hands back what was paid: the same event is not paid twice, another
    one is refused, because the draws of this fleet's keys belong to what was paid with them.

    Args:
        path: The file; `None` keeps everything in memory, for a training that cannot be resumed.
        keys: Keys of the fleet's runs; only a hash of them is written.
    """

    def __init__(self, path: Path | None, keys: Sequence[int]) -> None:
        self._path = path
        self._paid: dict[int, list[Event]] = {run: [] for run in range(len(keys))}
        self._taken = dict.fromkeys(self._paid, 0)
        self._blocks: list[tuple[int, int]] = []
        self._chain = ""
        fleet = hashlib.sha256("/".join(map(str, keys)).encode()).hexdigest()
        header = {"format": FORMAT, "fleet": fleet}
        rows = [] if path is None else _rows(path)
        if not rows:
            self._append(header)
            return
        for row in rows:
            self._follow(row)
        if rows[0]["row"] != header:
            raise UsageError(f"journal {str(path)!r}: belongs to another fleet; remove its folder")

    def sink(self, run: int) -> Callable[[Event], Event]:
        """What `Ledger.sink` of one run is: writes an event, or hands back the one that was
        written before a crash."""

        def write(event: Event) -> Event:
            held, place = self._paid[run], self._taken[run]
            self._taken[run] += 1
            if place < len(held):
                if replace(event, when=held[place].when) != held[place]:
                    raise UsageError(
                        f"journal: run {run} paid for {held[place].what!r} before it stopped and "
                        f"now asks for {event.what!r}; remove the fleet's folder to begin anew"
                    )
                return held[place]
            held.append(event)
            self._append({"run": run, "event": event.to_dict()})
            return event

        return write

    def execute(self, first: int, last: int) -> None:
        """Write that steps `first` to `last - 1` of all runs are about to be taken."""
        if not 0 <= first < last:
            raise UsageError(f"journal: steps {first}..{last} are none")
        if first > self.executed().steps:
            raise UsageError(
                f"journal: step {first} follows {self.executed().steps}; the steps between are not "
                "written, so the checkpoint does not belong to it"
            )
        self._append({"steps": [first, last]})
        self._blocks.append((first, last))

    def executed(self, planned: int | None = None) -> Executed:
        """Steps begun so far, and how many of them twice; of a run with `planned` steps, only
        those, since the fleet may have gone on without it."""
        blocks = self._blocks
        if planned is not None:
            blocks = [(min(first, planned), min(last, planned)) for first, last in blocks]
        steps = max((last for _, last in blocks), default=0)
        return Executed(steps, sum(last - first for first, last in blocks) - steps)

    def _append(self, row: dict[str, Any]) -> None:
        self._chain = _link(self._chain, row)
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"row": row, "chain": self._chain}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _follow(self, held: dict[str, Any]) -> None:
        """Take up one row of the file."""
        row = held["row"]
        self._chain = _link(self._chain, row)
        if held["chain"] != self._chain:
            raise UsageError(
                f"journal {str(self._path)!r}: a row differs from its hash; remove its folder"
            )
        if "steps" in row:
            self._blocks.append((row["steps"][0], row["steps"][1]))
        elif "run" in row:
            self._paid.setdefault(row["run"], []).append(Event.from_dict(row["event"]))


def _rows(path: Path) -> list[dict[str, Any]]:
    """All whole rows; a last one that a crash cut short is taken off the file, since what it
    announced never began."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        rows = [json.loads(line) for line in whole.splitlines()]
        return [{"row": dict(row["row"]), "chain": row["chain"]} for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"journal {str(path)!r}: is damaged; remove its folder") from error


def _link(before: str, row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([before, row], sort_keys=True).encode()).hexdigest()
