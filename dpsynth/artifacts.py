"""Folders that are written whole or not at all, and checked before anything in them is used."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpsynth.checks import UsageError

__all__ = ["FORMAT", "MANIFEST", "read_folder", "write_folder"]

FORMAT = 1
MANIFEST = "MANIFEST.json"


def write_folder(folder: Path, files: Mapping[str, bytes], lineage: Mapping[str, Any]) -> None:
    """Write `files` and a manifest of their sha256 to `folder`, replacing what was there.

    The folder appears under its name only when it is complete.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    manifest = {
        "format": FORMAT,
        "lineage": dict(lineage),
        "files": {n: hashlib.sha256(c).hexdigest() for n, c in sorted(files.items())},
    }
    manifest["sha256"] = _own_hash(manifest)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def read_folder(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files of a folder and its lineage, after checking format and hashes.

    Raises:
        UsageError: When the folder, its manifest or a listed file is missing, a hash differs, or
            the format is newer.
    """
    if not folder.is_dir():
        raise UsageError(f"run {str(folder)!r}: no such folder")
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"run {str(folder)!r}: has no {MANIFEST}; it is not a finished run")
    try:
        manifest = json.loads(path.read_text())
        version, listed = manifest["format"], dict(manifest["files"].items())
        lineage = dict(manifest["lineage"].items())
        own = manifest.pop("sha256", None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"run {str(folder)!r}: {MANIFEST} is damaged; fetch it again") from error
    if version != FORMAT:
        raise UsageError(
            f"run {str(folder)!r}: format {version} is not {FORMAT}, the one this version reads"
        )
    files: dict[str, bytes] = {}
    for name, digest in listed.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            raise UsageError(f"run {str(folder)!r}: {name} is missing; fetch it again")
        files[name] = file.read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise UsageError(f"run {str(folder)!r}: {name} differs from its hash; fetch it again")
    if own != _own_hash(manifest):
        raise UsageError(f"run {str(folder)!r}: {MANIFEST} differs from its hash; fetch it again")
    return files, lineage


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 of the manifest itself, so that a slip in its lineage does not pass either."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
