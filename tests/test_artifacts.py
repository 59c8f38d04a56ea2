"""Folders: whole or not at all, and nothing is handed out that was changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpsynth.artifacts import FORMAT, MANIFEST, read_folder, write_folder
from dpsynth.checks import UsageError

FILES = {"model.bin": bytes(range(256)), "ledger.json": b"{}\n", "empty": b""}
LINEAGE = {"created": "2020-01-01", "versions": {"torch": "2"}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "runs" / "one"
    write_folder(place, FILES, LINEAGE)
    return place


def rewrite(folder: Path, **changes: Any) -> None:
    """Change entries of the manifest."""
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_written_is_read(folder: Path) -> None:
    assert read_folder(folder) == (FILES, LINEAGE)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES, MANIFEST])
    assert [p.name for p in folder.parent.iterdir()] == ["one"]


names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=12)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(names, st.binary(max_size=50), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=3),
)
def test_any_files_round_trip(
    tmp_path: Path, files: dict[str, bytes], lineage: dict[str, Any]
) -> None:
    # Some file systems take `a` and `A` for one name.
    files = {name.lower(): content for name, content in files.items()}
    write_folder(tmp_path / "any", files, lineage)
    assert read_folder(tmp_path / "any") == (files, lineage)


def test_writing_replaces_all_that_was_there(folder: Path) -> None:
    write_folder(folder, {"other": b"1"}, {})
    assert read_folder(folder) == ({"other": b"1"}, {})
    assert sorted(p.name for p in folder.iterdir()) == [MANIFEST, "other"]
    assert [p.name for p in folder.parent.iterdir()] == ["one"]


def test_the_manifest_holds_the_hash_of_every_file(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["files"] == {n: hashlib.sha256(c).hexdigest() for n, c in FILES.items()}


@pytest.mark.parametrize("writes", range(4))
@pytest.mark.parametrize("existed", [True, False])
def test_a_failure_while_writing_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool, writes: int
) -> None:
    """At the first file, between two, and at the manifest; a second attempt then succeeds."""
    place = tmp_path / "one"
    if existed:
        write_folder(place, {"old": b"old"}, {"old": 1})
    done: list[str] = []

    def failing(original: Any) -> Any:
        def write(path: Path, *args: Any, **kwargs: Any) -> Any:
            if len(done) == writes:
                original(path, args[0][:1])
                raise OSError("no space left")
            done.append(path.name)
            return original(path, *args, **kwargs)

        return write

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", failing(Path.write_bytes))
        patched.setattr(Path, "write_text", failing(Path.write_text))
        with pytest.raises(OSError, match="no space"):
            write_folder(place, FILES, LINEAGE)
    assert len(done) == writes
    if existed:
        assert read_folder(place) == ({"old": b"old"}, {"old": 1})
    else:
        assert not place.exists()
    write_folder(place, FILES, LINEAGE)
    assert read_folder(place) == (FILES, LINEAGE)
    assert [p.name for p in tmp_path.iterdir()] == ["one"]


def test_a_failure_while_changing_places_brings_the_old_folder_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError("not now")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="not now"):
            write_folder(folder, {"other": b"1"}, {})
    assert read_folder(folder) == (FILES, LINEAGE)


def test_an_old_folder_set_aside_by_a_crash_is_not_thrown_away(folder: Path) -> None:
    """A crash between the two renames leaves the old folder under its other name only; an attempt
    that fails after it must not cost that one too."""
    folder.rename(folder.with_name(".one.old"))
    with pytest.raises(TypeError):
        write_folder(folder, {"new": "no bytes"}, {})  # type: ignore[dict-item]
    assert read_folder(folder.with_name(".one.old")) == (FILES, LINEAGE)


# Refusals


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_refused(folder: Path, name: str) -> None:
    content = FILES[name]
    for changed in (content + b"\0", bytes([content[0] ^ 1]) + content[1:] if content else b"x"):
        (folder / name).write_bytes(changed)
        with pytest.raises(UsageError, match=f"{name} differs"):
            read_folder(folder)
    (folder / name).write_bytes(content)
    assert read_folder(folder)[0] == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        read_folder(folder)
    (folder / name).mkdir()
    with pytest.raises(UsageError, match=f"{name} is missing"):
        read_folder(folder)


@pytest.mark.parametrize("name", ["../secret", "../../secret", "sub/secret", "..", ".", ""])
def test_a_name_that_leads_elsewhere_is_refused(folder: Path, name: str) -> None:
    for place in (folder.parent, folder.parent.parent):
        (place / "secret").write_bytes(b"s")
    (folder / "sub").mkdir()
    (folder / "sub" / "secret").write_bytes(b"s")
    rewrite(folder, files={name: hashlib.sha256(b"s").hexdigest()})
    with pytest.raises(UsageError, match="is missing"):
        read_folder(folder)


def test_an_absolute_name_is_refused(folder: Path) -> None:
    secret = folder.parent / "secret"
    secret.write_bytes(b"s")
    rewrite(folder, files={str(secret): hashlib.sha256(b"s").hexdigest()})
    with pytest.raises(UsageError, match="is missing"):
        read_folder(folder)


@pytest.mark.parametrize("version", [FORMAT + 1, 0, "1", None])
def test_another_format_is_refused(folder: Path, version: Any) -> None:
    rewrite(folder, format=version)
    with pytest.raises(UsageError, match=f"format {version}"):
        read_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"\xff\xfe",
        b"{}",
        b'{"format": 1, "files": {}}',
        b'{"format": 1, "lineage": {}}',
        b'{"format": 1, "files": [], "lineage": {}}',
        b'{"format": 1, "files": "model.bin", "lineage": {}}',
        b'{"format": 1, "files": {}, "lineage": 3}',
    ],
)
def test_a_damaged_manifest_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(UsageError, match="damaged"):
        read_folder(folder)


def test_what_is_no_run_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        read_folder(folder / "nowhere")
    with pytest.raises(UsageError, match="no such folder"):
        read_folder(folder / "model.bin")
    (folder / MANIFEST).unlink()
    with pytest.raises(UsageError, match="not a finished run"):
        read_folder(folder)
