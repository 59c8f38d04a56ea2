"""MappedRows: encoded rows that stay on disk, for tables larger than the device's memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dpsynth.checks import UsageError

__all__ = ["MappedRows", "read_rows", "write_rows"]

_COLUMN = "codes"


def write_rows(path: Path, pieces: Iterable[Tensor], columns: int) -> None:
    """Write encoded rows as an uncompressed Arrow file of int16 lists that only its owner reads.

    Args:
        path: File to write; it holds private rows.
        pieces: Level numbers (rows, D) of consecutive rows.
        columns: D.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    schema = pa.schema([(_COLUMN, pa.list_(pa.int16(), columns))])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for piece in pieces:
            flat = pa.array(piece.to(torch.int16).numpy().reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, columns)
            writer.write_batch(pa.record_batch([lists], schema=schema))


def read_rows(path: Path) -> list[Tensor]:
    """The pieces of a file (rows, D), int16, on disk until they are looked at; not to be changed.

    Raises:
        UsageError: Where there is no such file, or another one.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        columns = reader.schema.field(_COLUMN).type.list_size
    except (OSError, KeyError, AttributeError, pa.ArrowInvalid) as error:
        raise UsageError(f"rows {str(path)!r}: no encoded rows; encode the table again") from error
    lists = [reader.get_batch(number).column(0) for number in range(reader.num_record_batches)]
    arrays = [one.flatten().to_numpy().reshape(-1, columns) for one in lists]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return [torch.from_numpy(array) for array in arrays]


class MappedRows:
    """Rows of R runs in memory-mapped files: only those of a batch are read, when it is drawn.

    Args:
        runs: The pieces of each run, as `read_rows` gives them.
        device: Where batches are wanted.
    """

    def __init__(
        self, runs: Sequence[Sequence[Tensor]], device: torch.device | str = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self._runs = [[piece.numpy() for piece in pieces] for pieces in runs]
        self._ends = [np.cumsum([len(piece) for piece in pieces]) for pieces in self._runs]
        rows = max(int(ends[-1]) for ends in self._ends)
        self.shape = (len(runs), rows, self._runs[0][0].shape[1])

    def take(self, index: Tensor) -> Tensor:
        """Level numbers, on the device, of the rows at these positions of each run: (runs, ...)
        -> (runs, ..., D)."""
        return self.read(index).to(self.device, non_blocking=True).long()

    def read(self, index: Tensor) -> Tensor:
        """As `take`, but int16 and in the host's memory."""
        shape = (*index.shape, self.shape[-1])
        found = torch.empty(shape, dtype=torch.int16, pin_memory=self.device.type == "cuda")
        for run, places in enumerate(index.cpu().numpy()):
            _gather(self._runs[run], self._ends[run], places, found[run].numpy())
        return found


def _gather(
    pieces: Sequence[np.ndarray], ends: np.ndarray, places: np.ndarray, out: np.ndarray
) -> None:
    """Rows at `places` (...) into `out` (..., D)."""
    if len(pieces) == 1:
        np.take(pieces[0], places, axis=0, out=out)
        return
    owner = np.searchsorted(ends, places, side="right")
    for number in np.unique(owner):
        here = owner == number
        out[here] = pieces[number][places[here] - (ends[number] - len(pieces[number]))]
