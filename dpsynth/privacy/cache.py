"""Noise multipliers that were calibrated before, kept in the user's cache folder."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

__all__ = ["ALGORITHM", "FOLDER", "folder", "load", "store"]

# Raise when calibration would find another σ for the same plan.
ALGORITHM = 1
FOLDER = "DPSYNTH_CACHE"
_FILE = "sigma.json"
_MOST = 4096

Entry = tuple[float, float]


def folder() -> Path | None:
    """`$DPSYNTH_CACHE`, else `dpsynth` in the user's cache folder; None where it is set but
    empty, or nobody has a home."""
    named = os.environ.get(FOLDER)
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "dpsynth"
    except RuntimeError:
        return None


def load(key: str) -> Entry | None:
    """(σ, the ε it reached) that was stored under `key`; None where there is none to be trusted."""
    where = folder()
    if where is None:
        return None
    path = where / _FILE
    try:
        state = path.stat()
    except OSError:
        return None
    return _read(path, state.st_mtime_ns, state.st_size, state.st_ino).get(key)


def store(key: str, sigma: float, reached: float) -> None:
    """Keep an entry; without a word where the folder cannot be written.

    The file is replaced as a whole. Of two processes that write at once the later one wins, and
    what the other had found is calibrated again.
    """
    where = folder()
    if where is None:
        return
    with suppress(OSError):
        where.mkdir(parents=True, exist_ok=True)
        entries = {**_parsed(where / _FILE), key: (sigma, reached)}
        kept = dict(list(entries.items())[-_MOST:])
        body = {
            "maker": _maker(),
            "entries": {k: [s, e, _digest(k, s, e)] for k, (s, e) in kept.items()},
        }
        _replace(where / _FILE, json.dumps(body))


def _replace(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".sigma-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


@functools.lru_cache(maxsize=4)
def _read(path: Path, changed: int, size: int, node: int) -> dict[str, Entry]:
    """Content of the file in the state that the other three name."""
    return _parsed(path)


def _parsed(path: Path) -> dict[str, Entry]:
    """Every entry that is whole; none of a file of another version or a damaged one."""
    try:
        body = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(body, dict) or body.get("maker") != _maker():
        return {}
    held = body.get("entries")
    if not isinstance(held, dict):
        return {}
    return {key: (row[0], row[1]) for key, row in held.items() if _is_whole(key, row)}


def _is_whole(key: str, row: object) -> bool:
    if not isinstance(row, list) or len(row) != 3:
        return False
    sigma, reached, digest = row
    numbers = isinstance(sigma, float) and isinstance(reached, float)
    if not numbers or not (math.isfinite(sigma) and sigma > 0 and reached > 0):
        return False
    return digest == _digest(key, sigma, reached)


def _digest(key: str, sigma: float, reached: float) -> str:
    text = json.dumps([_maker(), key, sigma, reached])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.cache
def _maker() -> str:
    return f"dp-accounting {version('dp-accounting')}, calibration {ALGORITHM}"
