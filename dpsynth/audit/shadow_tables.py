"""Shadow tables: synthetic tables of other generators, and what is known of who was in each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dpsynth.checks import UsageError
from dpsynth.data import read_frame

__all__ = ["LABEL", "ShadowTable", "read_shadows"]

# The column of candidates that tells the truth; never a feature.
LABEL = "member"
# Columns that say which generator a row belongs to in the flat layout.
FLAT = ("phase", "model")


@dataclass(frozen=True, eq=False)
class ShadowTable:
    """One other generator of the same kind.

    Attributes:
        name: What messages call it.
        synthetic: What it put out.
        candidates: Rows of which it is known whether it saw them; `None` if there are none.
        labels: Whether it saw each candidate: bool (rows,); `None` without candidates.
        members: ALL rows that it saw, as far as they are at hand, or `None`. A row of another
            shadow's list that is not in this one counts as unseen.
    """

    name: str
    synthetic: pd.DataFrame
    candidates: pd.DataFrame | None = None
    labels: np.ndarray | None = None
    members: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        if self.synthetic.empty:
            raise UsageError(f"shadow {self.name!r}: its synthetic table has no rows")
        if (self.candidates is None) != (self.labels is None):
            raise UsageError(f"shadow {self.name!r}: give candidates and labels, or neither")
        if self.candidates is None or self.labels is None:
            return
        if self.labels.shape != (len(self.candidates),) or self.labels.dtype != bool:
            raise UsageError(
                f"shadow {self.name!r}: labels {self.labels.dtype} {self.labels.shape} for "
                f"{len(self.candidates)} candidates; give one bool a row"
            )


def read_shadows(folder: str | Path) -> list[ShadowTable]:
    """Read a folder of shadow tables, in either layout.

    Sub-folders, one a generator: `synthetic`, `candidates` with a 0/1 column `member` (optional),
    `members` with all rows that it saw (optional); each .parquet or .csv.

    Flat (the files of the MIDST challenge): `synthetic` and `challenge`, both with a column `model`
    and the latter with `member`; `train_members` (optional) lists the members of some models by an
    id that `reference` has too, and is turned into their rows.

    Raises:
        UsageError: If the folder has neither layout, or a file of it does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"shadows {str(folder)!r}: no such folder")
    if _find(folder, "synthetic"):
        return _read_flat(folder)
    found = [_read_one(part) for part in sorted(folder.iterdir()) if _find(part, "synthetic")]
    if not found:
        raise UsageError(
            f"shadows {str(folder)!r}: no synthetic.parquet or synthetic.csv in it or in a "
            "sub-folder"
        )
    return found


def _find(folder: Path, name: str) -> Path | None:
    for ending in (".parquet", ".csv"):
        if (folder / (name + ending)).is_file():
            return folder / (name + ending)
    return None


def _read_one(folder: Path) -> ShadowTable:
    synthetic, candidates, members = (
        None if path is None else read_frame(path)
        for path in (_find(folder, name) for name in ("synthetic", "candidates", "members"))
    )
    assert synthetic is not None
    if candidates is None:
        return ShadowTable(folder.name, synthetic, members=members)
    where = f"shadow {folder.name!r}: candidates"
    labels = _labels(candidates, where)
    return ShadowTable(folder.name, synthetic, candidates.drop(columns=LABEL), labels, members)


def _labels(candidates: pd.DataFrame, where: str) -> np.ndarray:
    if LABEL not in candidates:
        raise UsageError(f"{where} have no column {LABEL!r}; say 1 for members and 0 for others")
    values = pd.to_numeric(candidates[LABEL], errors="coerce").to_numpy(float, na_value=np.nan)
    if not np.isin(values, (0.0, 1.0)).all():
        raise UsageError(f"{where}: column {LABEL!r} must be 0 or 1 in every row")
    return values == 1


def _read_flat(folder: Path) -> list[ShadowTable]:
    synthetic = _with_model(folder, "synthetic")
    assert synthetic is not None
    challenge = _with_model(folder, "challenge")
    lists = _member_rows(folder)
    parts = {} if challenge is None else dict(list(challenge.groupby("model")))
    shadows = []
    for model, rows in synthetic.groupby("model"):
        name = f"model {model}"
        asked, labels = parts.get(model), None
        if asked is not None:
            labels = _labels(asked, f"shadow {name!r}: challenge")
            asked = _plain(asked).drop(columns=LABEL)
        shadows.append(ShadowTable(name, _plain(rows), asked, labels, lists.get(model)))
    return shadows


def _with_model(folder: Path, name: str) -> pd.DataFrame | None:
    path = _find(folder, name)
    if path is None:
        return None
    frame = read_frame(path)
    if "model" not in frame:
        raise UsageError(
            f"shadows {str(path)!r}: has no column 'model'; add it, or give each generator a "
            "sub-folder"
        )
    return frame


def _plain(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=[name for name in FLAT if name in rows]).reset_index(drop=True)


def _member_rows(folder: Path) -> dict[object, pd.DataFrame]:
    """Rows of each model's members, looked up in the reference by id."""
    listed, path = _with_model(folder, "train_members"), _find(folder, "reference")
    if listed is None or path is None:
        return {}
    reference = read_frame(path)
    shared = [name for name in listed if name in reference and name not in FLAT]
    keys = [name for name in shared if reference[name].is_unique]
    if not keys:
        raise UsageError(
            f"shadows {str(folder)!r}: train_members and reference share no column that is unique "
            "in the reference; keep an id in both"
        )
    index = pd.Index(reference[keys[0]])
    rows = {}
    for model, part in listed.groupby("model"):
        places = index.get_indexer(pd.Index(part[keys[0]]))
        rows[model] = reference.iloc[places[places >= 0]].reset_index(drop=True)
    return rows
