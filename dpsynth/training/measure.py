"""Measuring: whatever reads rows before DP-SGD does, each through a mechanism that is paid for."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsynth.checks import RefusedError
from dpsynth.codec import Codec
from dpsynth.data import Table
from dpsynth.devices import free_memory, resolve
from dpsynth.marginals import Marginals
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import Stream, keyed_stream, secure_stream
from dpsynth.rows import MappedRows, read_rows, write_rows
from dpsynth.survey import Survey
from dpsynth.training.recipe import (
    FAMILIES,
    Recipe,
    Seat,
    bins_of,
    captured,
    codec_settings,
    plan_of,
)

__all__ = ["Measured", "measure", "row_folder", "stacked"]

# Rows that are encoded at a time, and how a level number is kept.
_ROWS, _CODE = 1 << 20, torch.int16
# Bytes of encoded rows that fit anywhere.
_SMALL = 1 << 28


@dataclass(frozen=True, eq=False)
class Measured:
    """A seat after everything that reads rows outside of DP-SGD.

    Attributes:
        plan: Calibrated.
        ledger: What was paid so far.
        codec: Fitted.
        codes: Encoded rows, in pieces.
        marginals: Label × column tables.
        surveyed: What the family made of the tables that it chose itself, if it has a share for
            them.
    """

    plan: PrivacyPlan
    ledger: Ledger
    codec: Codec
    codes: Sequence[Tensor]
    marginals: Marginals
    surveyed: Any = None

    @property
    def rows(self) -> int:
        """True number of rows, which is private."""
        return sum(map(len, self.codes))


@contextlib.contextmanager
def row_folder(recipe: Recipe, seats: Sequence[Seat], state: Path | None) -> Iterator[Path | None]:
    """Folder for encoded rows that do not stay in memory; it is gone afterwards.

    What an earlier attempt left there is written anew: rows are encoded by the same noise.
    """
    size = sum(len(seat.table) * len(seat.table.schema.columns) * _CODE.itemsize for seat in seats)
    large = recipe.rows == "auto" and size > _SMALL
    large = large and size > free_memory(resolve(recipe.device).type) / 2
    if recipe.rows != "mapped" and not large:
        yield None
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpsynth-")))
        if state is not None:
            folder = state / "rows"
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _encoded(codec: Codec, table: Table) -> Iterator[Tensor]:
    """The rows as level numbers, piece by piece (rows, D)."""
    for start in range(0, max(len(table), 1), _ROWS):
        piece = table.take(np.arange(start, min(start + _ROWS, len(table))))
        yield codec.encode(piece).to(_CODE)


def _written(codec: Codec, table: Table, file: Path) -> list[Tensor]:
    """The same, in a file."""
    write_rows(file, _encoded(codec, table), codec.layout.columns)
    return read_rows(file)


def measure(
    recipe: Recipe,
    seat: Seat,
    key: int,
    sink: Callable[[Event], Event],
    file: Path | None = None,
    *,
    measurer: Callable[..., Measurer] = Measurer,
) -> Measured:
    """Row count (if not declared), codec and marginals, each through a paid mechanism.

    Args:
        recipe: How.
        seat: On which rows, at which ε.
        key: Of all noise.
        sink: Takes each event before its answer is computed.
        file: Where encoded rows go; they stay in memory without.
        measurer: What answers; an auditor listens here.
    """
    _check_bounded(seat.table, recipe)
    # Where no row count is public yet the first plan must not depend on the true one.
    rough = plan_of(recipe, seat, seat.table.schema.expected_rows or 1)
    ledger = replace(rough.ledger(_noise(recipe, rough, seat)), sink=sink)
    for event in rough.spent:
        ledger.pay(event)
    rows = _public_rows(seat, rough, ledger, key, measurer)
    plan = plan_of(recipe, seat, rows).calibrate()
    asked = Codec.questions(seat.table.schema, **codec_settings(recipe))
    parts = sum(share for _, share in asked)
    answers = measurer(ledger, plan.mu("codec"), parts, _stream(plan, key, "codec"))
    settings = {**codec_settings(recipe), "wanted": bins_of(recipe, seat, plan)}
    codec = Codec.fit(seat.table, answers, rows=rows, **settings)
    codes = list(_encoded(codec, seat.table)) if file is None else _written(codec, seat.table, file)
    parts = Marginals.asked(codec.layout)
    answers = measurer(ledger, plan.mu("marginals"), parts, _stream(plan, key, "marginals"))
    marginals = Marginals.measure(
        codes, codec.layout, codec.used, answers, codec.schema.names, codec.values
    )
    surveyed = None
    if plan.shares.get("tables", 0.0) > 0:
        purse = measurer(ledger, plan.mu("tables"), 1, _stream(plan, key, "tables")).purse("tables")
        survey = Survey(codes, codec.layout, codec.used, marginals, purse)
        surveyed = FAMILIES[recipe.model].survey(survey, plan, recipe.options, recipe.device)
    return Measured(plan, ledger, codec, codes, marginals, surveyed)


def _check_bounded(table: Table, recipe: Recipe) -> None:
    """Refuse rows of one unit beyond the most that is accounted for."""
    most = recipe.privacy.get("contributions", 1)
    if recipe.privacy.get("unit", "record") == "record" or table.units is None:
        return
    if np.unique(table.units, return_counts=True)[1].max() > most:
        raise RefusedError(
            f"privacy.contributions={most}: a unit has more rows; bound them first with "
            "Table.bounded"
        )


def _noise(recipe: Recipe, plan: PrivacyPlan, seat: Seat) -> str:
    """Where the noise comes from, as the ledger says it: on a CPU from AES, measuring and steps."""
    source, trained = "aes256-ctr", FAMILIES[recipe.model].trained
    if captured(recipe):
        source += "+threefry"
    elif trained and resolve(recipe.device).type == "cuda" and not plan.secure:
        source += "+philox"
    return f"{source}:{'system' if seat.seed is None else 'seed'}"


def _stream(plan: PrivacyPlan, key: int, purpose: str) -> Stream:
    return secure_stream(key, purpose) if plan.secure else keyed_stream(key, purpose)


def _public_rows(
    seat: Seat, plan: PrivacyPlan, ledger: Ledger, key: int, measurer: Callable[..., Measurer]
) -> int:
    """The declared number of rows, or a noisy count that the ledger pays for."""
    declared = seat.table.schema.expected_rows
    if declared is not None:
        return declared
    if not plan.private:
        return len(seat.table)
    noise = measurer(ledger, plan.mu("rows"), 1, _stream(plan, key, "rows")).histograms("rows", 1)
    return max(1, round(float(noise(np.array([float(len(seat.table))]))[0])))


def stacked(measured: Sequence[Measured], device: str, *, mapped: bool) -> Tensor | MappedRows:
    """The encoded rows of all runs, on disk or in memory."""
    if mapped:
        return MappedRows([m.codes for m in measured], device)
    return _stack([torch.cat(list(m.codes)) for m in measured])


def _stack(codes: Sequence[Tensor]) -> Tensor:
    """Runs side by side (runs, rows, D); shorter ones are padded, never drawn beyond their end."""
    rows = max(len(c) for c in codes)
    padded = [torch.nn.functional.pad(c, (0, 0, 0, rows - len(c))) for c in codes]
    return torch.stack(padded)
