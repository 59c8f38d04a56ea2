"""Stages: the parts of a long audit, each kept when it is done, so that a killed audit goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from dpsynth.checks import UsageError

__all__ = ["Stages", "minutes"]

Scores = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(eq=False)
class Stages:
    """Runs named pieces of work once and keeps what they return.

    Attributes:
        folder: Private; results by the name of their stage.
        identity: What is audited and how: a folder that was begun for something else is refused.
        console: Where progress is shown.
        estimates: Seconds that each stage is expected to take, for those that are known.
        seconds: What each took, also in an earlier process.
    """

    folder: Path
    identity: Mapping[str, Any]
    console: Console
    estimates: Mapping[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = json.dumps(self.identity, sort_keys=True, default=str)
        mark, digest = self.folder / "audit", hashlib.sha256(text.encode()).hexdigest()
        if mark.is_file() and mark.read_text() != digest:
            raise UsageError(
                f"audit {str(self.folder)!r}: was begun for another run, other rows or settings; "
                "remove it or choose another --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(digest)

    def json(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` returns, JSON-able; from the folder if it was done before."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            value, seconds = self._timed(name, work)
            _replace(path, json.dumps({"seconds": seconds, "value": value}).encode())
        body = json.loads(path.read_text())
        self.seconds[name] = body["seconds"]
        return body["value"]

    def scores(self, name: str, work: Callable[[], Scores]) -> Scores:
        """Attack scores (member and holdout rows by name); from the folder if done before."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            found, seconds = self._timed(name, work)
            arrays = {"seconds": np.array(seconds)}
            for number, (attack, (inside, outside)) in enumerate(found.items()):
                arrays |= {f"{number}:in:{attack}": inside, f"{number}:out:{attack}": outside}
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
            partial.replace(path)
        with np.load(path, allow_pickle=False) as held:
            self.seconds[name] = float(held["seconds"])
            named = (key.split(":", 2) for key in held.files if ":" in key)
            order = sorted((int(number), name) for number, side, name in named if side == "in")
            return {name: (held[f"{i}:in:{name}"], held[f"{i}:out:{name}"]) for i, name in order}

    def announce(self, names: list[str]) -> None:
        """What is to be done, and how long it may take."""
        left = [name for name in names if not self._done(name)]
        if not left:
            self.console.print("every stage is there")
            return
        known = [name for name in left if name in self.estimates]
        other = [name for name in left if name not in self.estimates]
        about = f"about {minutes(sum(self.estimates[n] for n in known))} for {', '.join(known)}"
        words = [about] if known else []
        words += [f"time of {', '.join(other)}: told when begun"] if other else []
        words += [f"{len(names) - len(left)} stages done"] if len(left) < len(names) else []
        self.console.print("; ".join(words), soft_wrap=True)

    def _done(self, name: str) -> bool:
        return any((self.folder / f"{name}{end}").is_file() for end in (".json", ".npz"))

    def _timed(self, name: str, work: Callable[[], Any]) -> tuple[Any, float]:
        expected = self.estimates.get(name)
        shown = "" if expected is None else f" (about {minutes(expected)})"
        self.console.print(f"{name}{shown}", soft_wrap=True)
        begun = time.perf_counter()
        value = work()
        return value, time.perf_counter() - begun


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def minutes(seconds: float) -> str:
    """A time as a person says it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
