"""The frozen record of one table's evaluation; a missing or non-finite figure is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.evaluation.coding import check_comparable
from dpsynth.evaluation.detection import c2st
from dpsynth.evaluation.fidelity import column_detail, fidelity
from dpsynth.evaluation.utility import CLASSIFICATION, REGRESSION, utility

__all__ = ["DISTANCES", "FORMAT", "NOT_PRIVATE", "Report", "evaluate", "floors"]

FORMAT = 1
DISTANCES = ("tvd1", "tvd2", "tvd3", "ks", "wasserstein", "correlation_difference", "c2st_auc")
TSTR = "tstr_"
# What a report may hold: distances alone (no target), or those and the figures of one kind of task.
METRIC_SETS = tuple(
    frozenset(DISTANCES) | {TSTR + name for name in task}
    for task in ((), CLASSIFICATION, REGRESSION)
)
ROWS = ("synthetic", "train", "holdout")
NOT_PRIVATE = (
    "These figures were computed on private rows without noise: they are not themselves "
    "differentially private, and publishing them is outside the run's privacy guarantee."
)
NO_NUMBERS = "No numeric column: ks and wasserstein are 0 by convention."


@dataclass(frozen=True)
class Report:
    """One evaluation.

    Attributes:
        metrics: The `DISTANCES`, and with a target `tstr_` + the metrics of `utility`.
        floors: The same keys for real against real: `train` against `holdout`, and for `tstr_`
            keys training on the real rows (TRTR).
        per_class: Detail of `utility` on the synthetic table; empty without a categorical target.
        rows: Number of rows of `synthetic`, `train` and `holdout`.
        notes: What a reader must know beside the figures.
        columns: `tvd`, `psi` and `rare_level_coverage` by column name.

    Raises:
        UsageError: On a metric too many or too few, floors of other keys, or a figure that is not
            a finite number.
    """

    metrics: Mapping[str, float]
    floors: Mapping[str, float]
    per_class: Mapping[str, Any]
    rows: Mapping[str, int]
    notes: tuple[str, ...]
    columns: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in ("metrics", "floors", "per_class", "rows", "columns"):
            if not isinstance(getattr(self, part), Mapping):
                raise UsageError(f"report: {part} must map names to figures")
            _check_finite(part, getattr(self, part))
        if not all(isinstance(note, str) for note in self.notes):
            raise UsageError("report: notes must be texts")
        for part in ("metrics", "floors"):
            _check_flat(part, getattr(self, part))
        _check_names("rows", set(self.rows), frozenset(ROWS))
        given = set(self.metrics)
        closest = min(METRIC_SETS, key=lambda names: len(names ^ given))
        _check_names("metrics", given, closest)
        _check_names("floors", set(self.floors), closest)

    def to_json(self) -> str:
        """Text of a report file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Inverse of `to_json`; unknown or missing keys and other formats are refused."""
        try:
            body = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"report is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise UsageError("report must be a JSON object")
        if body.get("format") != FORMAT:
            raise UsageError(f"report format={body.get('format')}: this version reads {FORMAT}")
        parts = {key: value for key, value in body.items() if key != "format"}
        _check_names("report", set(parts), frozenset(f.name for f in fields(cls)))
        if not isinstance(parts["notes"], list):
            raise UsageError("report: notes must be a list of texts")
        return cls(**{**parts, "notes": tuple(parts["notes"])})


def _check_names(what: str, given: set[str], wanted: frozenset[str]) -> None:
    for name in sorted(wanted - given):
        raise UsageError(f"{what}: {name!r} is missing; evaluate the table again")
    for name in sorted(given - wanted):
        raise UsageError(f"{what}: unknown key {name!r}")


def _check_flat(what: str, figures: Mapping[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, str | Mapping | list):
            raise UsageError(f"{what}: {name}={value!r}: must be one number")


def _check_finite(what: str, value: Any) -> None:
    """Refuse anything but finite numbers in a tree of mappings and lists."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _check_finite(f"{what}: {name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _check_finite(what, inner)
    elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{what}={value!r}: must be a finite number")


def evaluate(
    synthetic: Table,
    *,
    train: Table,
    holdout: Table,
    target: str | None = None,
    rng: np.random.Generator,
    max_rows: int | None = None,
    floors: Mapping[str, float] | None = None,
    triples_seed: int = 0,
    device: str = "cpu",
) -> Report:
    """Judge a synthetic table.

    Distances are taken to `train` (what the generator should reproduce), the classifier test and
    the downstream task to `holdout` (rows it has not seen, so copying gains nothing).

    Args:
        synthetic: The table to judge, whoever made it.
        train: Real rows behind it; bins are fitted on them.
        holdout: Real rows kept from the generator.
        target: Column of the downstream task; default the target of `train`'s schema, if any.
        rng: Same state, same report; a given `floors` does not change the other figures.
        max_rows: Cap on the rows a classifier learns from; distances always use all rows.
        floors: Result of `floors` on the same tables, target and `max_rows`; computed if absent.
        triples_seed: Which column triples `tvd3` looks at; figures of one seed are comparable.
        device: Where contingency tables are counted: `cpu`, `cuda`, or `auto`; same figures.

    Raises:
        UsageError: When the tables' columns differ, one has fewer than two rows, the target is
            unknown or constant in `holdout`, `floors` are those of another task, or the device
            is not there.
    """
    check_comparable(train, holdout, synthetic)
    target = target or train.schema.target
    score_rng, floor_rng = rng.spawn(2)
    if floors is None:
        floors, _ = _score(
            holdout, train, train, holdout, target, floor_rng, max_rows, triples_seed, device
        )
    metrics, per_class = _score(
        synthetic, synthetic, train, holdout, target, score_rng, max_rows, triples_seed, device
    )
    notes = [NOT_PRIVATE]
    if not any(column.numeric for column in train.schema.columns):
        notes.append(NO_NUMBERS)
    if max_rows is not None:
        notes.append(f"Classifiers saw at most {max_rows} rows a table.")
    tables = (synthetic, train, holdout)
    return Report(
        metrics=metrics,
        floors=dict(floors),
        per_class=per_class,
        rows={name: len(table) for name, table in zip(ROWS, tables, strict=True)},
        notes=tuple(notes),
        columns=column_detail(train, synthetic, device=device),
    )


def floors(
    train: Table,
    holdout: Table,
    *,
    target: str | None = None,
    rng: np.random.Generator,
    max_rows: int | None = None,
    triples_seed: int = 0,
    device: str = "cpu",
) -> dict[str, float]:
    """What real rows reach, by the keys of `Report.metrics`; computed once for a whole sweep.

    Distances of `holdout` from `train`, the classifier test of `train` against `holdout`, and the
    downstream task learned from `train`. A distance floor shrinks with the rows of `holdout`, so
    a synthetic table larger than `holdout` may come out below it. Arguments and errors as in
    `evaluate`.
    """
    check_comparable(train, holdout)
    target = target or train.schema.target
    return _score(holdout, train, train, holdout, target, rng, max_rows, triples_seed, device)[0]


def _score(
    distant: Table,
    judged: Table,
    train: Table,
    holdout: Table,
    target: str | None,
    rng: np.random.Generator,
    max_rows: int | None,
    triples_seed: int,
    device: str,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Distances of `distant` from `train`; `judged` detected against, and tested on, `holdout`."""
    # Not `rng`: reports and their floors are comparable only over the same triples.
    metrics = fidelity(train, distant, rng=np.random.default_rng(triples_seed), device=device)
    detect_rng, learn_rng = rng.spawn(2)
    metrics["c2st_auc"] = c2st(holdout, judged, rng=detect_rng, max_rows=max_rows)
    if target is None:
        return metrics, {}
    learned, per_class = utility(judged, holdout, target=target, rng=learn_rng, max_rows=max_rows)
    return metrics | {TSTR + name: value for name, value in learned.items()}, per_class
