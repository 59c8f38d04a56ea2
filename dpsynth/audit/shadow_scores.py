"""Shadow scores: candidates judged by what other generators' tables and known members teach."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import special

from dpsynth.audit.attacks import row_hashes
from dpsynth.audit.calibration import Neighbourhoods
from dpsynth.audit.meta import MetaClassifier
from dpsynth.audit.shadow_tables import ShadowTable
from dpsynth.audit.table_inputs import Inputs
from dpsynth.data import Table, as_floats
from dpsynth.schema import as_level

__all__ = ["Labelled", "labelled_features", "labelled_rows", "other_tables", "shadow_scores"]

# Rows of shadows' member lists that the classifier sees, a generator.
LISTED_ROWS = 3000
# Tables that each labelled row leaves out: enough for this share of rows known to be in several.
COVERED = 0.95
# Fewest generators with known members that a classifier is fitted on.
LEAST_LABELLED = 3
# Bandwidth of the density that is told by itself, in normal scores.
WIDTH = 0.08
# Part of the cache's key: raise it when features or trees change.
VERSION = 1


def other_tables(
    inputs: Inputs, made: Table, say: Callable[[str], None]
) -> list[tuple[ShadowTable, Table]]:
    """The shadows and their tables, without those that hold the audited table's rows."""
    mine, found = _fingerprint(made), []
    for shadow in inputs.shadows:
        table = inputs.table(f"shadow {shadow.name!r}")
        if _fingerprint(table) == mine:
            say(f"shadow {shadow.name!r}: its synthetic table is the audited one; left out")
        else:
            found.append((shadow, table))
    return found


def _fingerprint(table: Table) -> str:
    """Equal for equal rows in any order, numbers compared as float32: formats differ in that."""
    columns = {}
    for column in table.schema.columns:
        values = table.frame[column.name]
        if column.numeric:
            with np.errstate(over="ignore"):
                values = values.to_numpy(dtype=float, na_value=np.nan).astype(np.float32)
        columns[column.name] = values
    hashes = np.sort(row_hashes(replace(table, frame=pd.DataFrame(columns))))
    return hashlib.sha256(hashes.tobytes()).hexdigest()


def shadow_scores(
    inputs: Inputs,
    others: Sequence[tuple[ShadowTable, Table]],
    known: Table,
    rng: np.random.Generator,
    say: Callable[[str], None],
    cache: Path | None,
) -> dict[str, np.ndarray]:
    """Calibrated scores, and the classifier's probability where members are known."""
    seed = int(rng.integers(1 << 63))
    asked, made = (inputs.coarse(inputs.table(name)) for name in ("candidates", "synthetic"))
    others = [(shadow, inputs.coarse(table)) for shadow, table in others]
    known, tables = inputs.coarse(known), [table for _, table in others]
    around = Neighbourhoods([*tables, made], known)
    # Shadows may have been given the candidates themselves; their own column is the last.
    seen = _Sightings.of(inputs, others).among(inputs.frames["candidates"])
    own = np.full(len(asked), len(tables))
    # A stream for each row's values, so that the order of the candidates changes nothing.
    draws = [
        np.random.default_rng([seed, int(row)]).random(len(around))
        for row in _hashes(inputs.frames["candidates"])
    ]
    excluded = _excluded(np.pad(seen, ((0, 0), (0, 1))), own, np.array(draws))
    features = around.features(asked, own, excluded)
    scores = {
        "shadow_z": features["z 1"].to_numpy(float),
        "shadow_density": features[f"density ratio {WIDTH:g}"].to_numpy(float),
    }
    classifier = _classifier(inputs, others, known, seed, say, cache)
    if classifier is None:
        # p_S/(p_S + p_OUT): a probability for a candidate that is a member as likely as not.
        return {**scores, "combined": special.expit(scores["shadow_density"])}
    return {**scores, "combined": classifier.probability(features)}


def _classifier(
    inputs: Inputs,
    others: Sequence[tuple[ShadowTable, Table]],
    known: Table,
    seed: int,
    say: Callable[[str], None],
    cache: Path | None,
) -> MetaClassifier | None:
    """Fitted on the shadows, or read from the cache; `None` where they tell of too few members."""
    path, rng = None, np.random.default_rng(seed)
    if cache is not None:
        path = cache / f"classifier-{_key(inputs, others, known, seed)}.npz"
        if path.is_file():
            say(f"classifier: read from {path}")
            return MetaClassifier.load(path)
    labelled = labelled_rows(inputs, others, rng)
    sides = {bool(label) for rows in labelled for label in np.unique(rows.labels)}
    if len(labelled) < LEAST_LABELLED or len(sides) < 2:
        say("shadows: fewer than three with known members; `combined` is what densities say alone")
        return None
    say(f"classifier: fitted on {sum(len(one.labels) for one in labelled)} rows of "
        f"{len(labelled)} generators")  # fmt: skip
    around = Neighbourhoods([table for _, table in others], known)
    features = labelled_features(inputs, around, labelled, rng)
    classifier = MetaClassifier.fit(features, [one.labels for one in labelled], rng)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        classifier.save(partial)
        partial.replace(path)
    return classifier


@dataclass(frozen=True, eq=False)
class Labelled:
    """Rows with known membership in the generator at `place`.

    Attributes:
        place: Among the shadows in use.
        frame: The rows.
        labels: Whether the generator saw each: bool (rows,).
        inside: Generators known to have seen each: bool (rows, generators).
    """

    place: int
    frame: pd.DataFrame
    labels: np.ndarray
    inside: np.ndarray


def labelled_rows(
    inputs: Inputs, others: Sequence[tuple[ShadowTable, Table]], rng: np.random.Generator
) -> list[Labelled]:
    """Labelled rows of every generator that has any: its candidates, then rows of the lists."""
    sightings = _Sightings.of(inputs, others)
    pool, seen = _pool(inputs, others, sightings)
    found = []
    for place, (shadow, _) in enumerate(others):
        frames, labels, inside = [], [], []
        if shadow.labels is not None:
            frame = inputs.frames[f"shadow {shadow.name!r} candidates"]
            frames.append(frame)
            labels.append(shadow.labels)
            inside.append(sightings.among(frame))
        if shadow.members is not None and len(pool):
            rows = _balanced(seen[:, place], rng)
            frames.append(pool.iloc[rows])
            labels.append(seen[rows, place])
            inside.append(seen[rows])
        if sum(map(len, frames)):
            frame = pd.concat(frames, ignore_index=True)
            found.append(Labelled(place, frame, np.concatenate(labels), np.concatenate(inside)))
    return found


@dataclass(frozen=True, eq=False)
class _Sightings:
    """Which rows are known to have been seen by which generator, by a hash of their values.

    Attributes:
        hashes: Of every known member, sorted; a row that two saw is there twice.
        places: The generator that saw it.
        generators: How many there are.
    """

    hashes: np.ndarray
    places: np.ndarray
    generators: int

    @classmethod
    def of(cls, inputs: Inputs, others: Sequence[tuple[ShadowTable, Table]]) -> _Sightings:
        """From labelled candidates and member lists."""
        hashes, places = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.int64)]
        for place, (shadow, _) in enumerate(others):
            where, parts = f"shadow {shadow.name!r}", []
            if shadow.labels is not None:
                parts.append(inputs.frames[f"{where} candidates"][shadow.labels])
            if shadow.members is not None:
                parts.append(inputs.frames[f"{where} members"])
            for part in parts:
                hashes.append(_hashes(part))
                places.append(np.full(len(part), place))
        every, who = np.concatenate(hashes), np.concatenate(places)
        order = np.argsort(every, kind="stable")
        return cls(every[order], who[order], len(others))

    def among(self, frame: pd.DataFrame) -> np.ndarray:
        """Generators known to have seen each row: bool (rows, generators)."""
        asked = _hashes(frame)
        first, last = (np.searchsorted(self.hashes, asked, side=side) for side in ("left", "right"))
        seen = np.zeros((len(asked), self.generators), dtype=bool)
        rows = np.repeat(np.arange(len(asked)), last - first)
        starts = np.repeat(first - np.cumsum(last - first) + (last - first), last - first)
        seen[rows, self.places[starts + np.arange(len(rows))]] = True
        return seen


def _hashes(frame: pd.DataFrame) -> np.ndarray:
    """64-bit hashes (rows,) that do not depend on how wide a number is stored."""
    plain = {}
    for place, name in enumerate(frame.columns):
        values = frame[name]
        number = pd.api.types.is_numeric_dtype(values)
        plain[place] = as_floats(values) if number else as_level(values).astype(object).to_numpy()
    return pd.util.hash_pandas_object(pd.DataFrame(plain), index=False).to_numpy()


def _pool(
    inputs: Inputs, others: Sequence[tuple[ShadowTable, Table]], sightings: _Sightings
) -> tuple[pd.DataFrame, np.ndarray]:
    """Distinct rows of all member lists, and which generator saw each.

    One list alone says nothing of rows that its generator did not see: then there are none.
    """
    lists = [
        inputs.frames[f"shadow {shadow.name!r} members"]
        for shadow, _ in others
        if shadow.members is not None
    ]
    if len(lists) < 2:
        return pd.DataFrame(), np.zeros((0, len(others)), dtype=bool)
    rows = pd.concat(lists, ignore_index=True)
    first = np.unique(_hashes(rows), return_index=True)[1]
    distinct = rows.iloc[first].reset_index(drop=True)
    return distinct, sightings.among(distinct)


def _balanced(members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Places of equally many members and others, at most `LISTED_ROWS` together."""
    sides = [rng.permutation(np.flatnonzero(side)) for side in (members, ~members)]
    size = min(LISTED_ROWS // 2, *map(len, sides))
    return np.concatenate([side[:size] for side in sides])


def _excluded(inside: np.ndarray, own: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Tables that do not calibrate each row, equally many for every row: bool like `inside`.

    Generators known to have seen a row do not calibrate it. Members are in other lists less often
    than the non-members, which are there because some other list has them; so every row leaves
    out the same number of tables, drawn at random where fewer are known, and none tells its label
    by how many are left.

    Args:
        inside: Generators known to have seen each row: bool (rows, tables).
        own: The table that each row is scored on.
        draws: Which further tables go, the lowest first: in 0..1 like `inside`.
    """
    rows = np.arange(len(own))
    inside = inside.copy()
    inside[rows, own] = False
    most = int(np.quantile(inside.sum(axis=1), COVERED, method="higher"))
    leave = min(most, inside.shape[1] - 2)
    # Those known to have seen the row come first, its own last.
    order = draws - inside
    order[rows, own] = 2.0
    excluded = np.zeros_like(inside)
    np.put_along_axis(excluded, np.argsort(order, axis=1)[:, :leave], True, axis=1)
    return excluded


def labelled_features(
    inputs: Inputs,
    around: Neighbourhoods,
    labelled: Sequence[Labelled],
    rng: np.random.Generator,
) -> list[pd.DataFrame]:
    """Features of each generator's labelled rows, a frame for each of `labelled`."""
    inside = np.concatenate([one.inside for one in labelled])
    own = np.repeat([one.place for one in labelled], [len(one.labels) for one in labelled])
    excluded = _excluded(inside, own, rng.random(inside.shape))
    frame = pd.concat([one.frame for one in labelled], ignore_index=True)
    table = inputs.coarse(Table.from_frame(frame, inputs.schema, strict=False))
    features = around.features(table, own, excluded)
    ends = np.cumsum([len(one.labels) for one in labelled])
    starts = ends - [len(one.labels) for one in labelled]
    return [features.iloc[start:end] for start, end in zip(starts, ends, strict=True)]


def _key(
    inputs: Inputs, others: Sequence[tuple[ShadowTable, Table]], known: Table, seed: int
) -> str:
    """sha256 over all that the classifier depends on."""
    digest = hashlib.sha256(f"{VERSION} {seed}".encode())
    digest.update(known.digest().encode())
    for shadow, table in others:
        digest.update(table.digest().encode())
        for part in ("candidates", "members"):
            frame = inputs.frames.get(f"shadow {shadow.name!r} {part}")
            if frame is not None:
                digest.update(pd.util.hash_pandas_object(frame, index=False).to_numpy().tobytes())
        digest.update(b"" if shadow.labels is None else shadow.labels.tobytes())
    return digest.hexdigest()[:32]
