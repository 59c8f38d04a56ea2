"""CapturedSteps: the private steps of a fleet as a few recorded programs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpsynth.capture import TRIALS, capture
from dpsynth.counter import CounterRng
from dpsynth.optimizers import RunwiseOptimizer
from dpsynth.rows import MappedRows

if TYPE_CHECKING:
    from dpsynth.models.base import Generator

__all__ = ["CapturedSteps"]

# Standard deviations of a batch's size that its buffer has room for.
_SPREAD = 6.0
# Bytes of rows that are brought from the disk at a time.
_FETCHED = 1 << 28


class CapturedSteps:
    """Takes a generator's steps without their Python: batches of a block of steps are drawn ahead,
    then each step is one replay.

    Whether a batch fits its buffer is looked at once a block, the only time that the host waits
    for the device. A longer one is drawn again, whole, and added piece by piece: none is cut short.

    Args:
        generator: In the middle of a fit: it has rows, plans, engine and optimizers.
        rng: Keys of the runs.
        block: Most steps that are drawn ahead.
        compiled: Whether operations are fused.
    """

    def __init__(
        self, generator: Generator, rng: CounterRng, block: int, *, compiled: bool
    ) -> None:
        self._of, self._rng, self._compiled = generator, rng, compiled
        self._network = list(generator.network.parameters())
        self._programs: dict[Any, Callable[[], Any]] = {}
        self._batches(block)
        for parameter in self._network:
            parameter.summed_grad = None  # type: ignore[attr-defined]
        self._sums = [torch.zeros_like(parameter) for parameter in self._network]
        generator._engine.clipper.static = True

    def _batches(self, block: int) -> None:
        """Buffers for a block of batches, and for one piece of a batch."""
        batches, device = self._of._batches, self._of.device
        runs, piece = len(batches.rows), batches.piece
        mean = max(n * q for n, q in zip(batches.rows.tolist(), batches.q, strict=True))
        room = min(math.ceil(mean + _SPREAD * math.sqrt(mean)) + 1, int(batches.rows.max()))
        self._width = min(room, piece)
        self._pieces = -(-room // self._width)
        self._room = self._width * self._pieces
        self._block = block
        if isinstance(self._of._codes, MappedRows):
            row = 2 * runs * self._room * self._of._codes.shape[-1]
            self._block = max(1, min(block, _FETCHED // row))
        self._rows, self._log_miss = batches.rows.to(device), batches.log_miss.to(device)
        # Where a step is recorded in the last place, it is tried out on those that follow.
        whole, one = (self._block + TRIALS, runs, self._room), (runs, self._width)
        self._index = torch.zeros(whole, dtype=torch.long, device=device)
        self._inside = torch.zeros(whole, dtype=torch.bool, device=device)
        self._more = torch.zeros(self._block + TRIALS, dtype=torch.bool, device=device)
        self._part = torch.zeros(one, dtype=torch.long, device=device)
        self._counts = torch.zeros(one, dtype=torch.bool, device=device)
        self._piece, self._ahead, self._base = torch.zeros(3, 1, dtype=torch.long, device=device)
        self._fetched: Tensor | None = None
        if isinstance(self._of._codes, MappedRows):
            shape = (*whole, self._of._codes.shape[-1])
            self._fetched = torch.zeros(shape, dtype=torch.int16, device=device)
            self._read = torch.zeros((*one, shape[-1]), dtype=torch.int16, device=device)

    def take(self, first: int, last: int) -> None:
        """Steps `first` to `last` - 1."""
        for start in range(first, last, self._block):
            self._take(start, min(start + self._block, last))

    def _take(self, first: int, last: int) -> None:
        """Steps of one block."""
        self._base.fill_(first)
        self._ahead.fill_(first)
        draw = self._program("draw", self._draw)
        for _ in range(first, last):
            draw()
        longer = self._more.tolist()
        self._fetch(last - first)
        for step in range(first, last):
            every = self._of.public_every
            public = bool(every) and (step + 1) % every == 0
            if self._pieces == 1 and not longer[step - first]:
                self._program(("whole", public), lambda p=public: self._whole(p))()
                continue
            batch = self._index[step - first], self._inside[step - first]
            self._add_pieces(*(self._again(step) if longer[step - first] else batch))
            self._program(("finish", public), lambda p=public: self._finish(p))()

    def _program(self, name: Any, work: Callable[[], None]) -> Callable[[], Any]:
        if name not in self._programs:
            self._programs[name] = capture(work, self._state(), compiled=self._compiled)
        return self._programs[name]

    def _state(self) -> list[Tensor]:
        """Every tensor that a program changes, or that changes between two of its replays."""
        generator = self._of
        found = [*generator.parameters(), generator.completed, *self._sums]
        for optimizer in generator._optimizers:
            assert isinstance(optimizer, RunwiseOptimizer)
            optimizer.prepare()
            optimizer.static = True
            found += [t for state in optimizer.state.values() for t in state.values()]
        found += [self._index, self._inside, self._more, self._part, self._counts]
        if self._fetched is not None:
            found += [self._fetched, self._read]
        return [*found, self._piece, self._ahead, self._base]

    def _fetch(self, steps: int) -> None:
        """Bring the rows of the batches that were drawn from the disk."""
        if self._fetched is None or self._pieces > 1:
            return
        assert isinstance(self._of._codes, MappedRows)
        # Runs come first where rows are read.
        found = self._of._codes.read(self._index[:steps].transpose(0, 1))
        self._fetched[:steps].copy_(found.transpose(0, 1), non_blocking=True)

    # -- what is captured ----------------------------------------------------------------------

    def _draw(self) -> None:
        """Put the batch of the next step into its place in the block."""
        step, slot = self._ahead[0], self._ahead - self._base
        index = self._gaps(self._rng.at("poisson", step)).cumsum(1) - 1
        active = (self._of._steps > step)[:, None]
        inside = (index < self._rows[:, None]) & active
        self._index.index_copy_(0, slot, torch.where(inside, index, 0).long()[None])
        self._inside.index_copy_(0, slot, inside[None])
        self._more.index_copy_(0, slot, (inside[:, -1] & self._beyond(index)).any()[None])
        self._ahead.add_(1)

    def _beyond(self, index: Tensor) -> Tensor:
        """Whether rows are left after the last one drawn (runs,)."""
        return index[:, -1] < self._rows - 1

    def _gaps(self, opened: CounterRng) -> Tensor:
        uniform = opened.uniform(self._room, dtype=torch.float64)
        return torch.floor(torch.log1p(-uniform) / self._log_miss[:, None]) + 1

    def _whole(self, public: bool) -> None:
        """A step whose batch is one piece."""
        slot = self._of.completed - self._base
        draws = self._rng.at("draws", self._of.completed[0])
        index, inside = (b.index_select(0, slot)[0] for b in (self._index, self._inside))
        if self._fetched is None:
            rows = self._of._rows_at(index)
        else:
            rows = self._fetched.index_select(0, slot)[0].long()
        self._of._accumulate(rows, inside, draws)
        self._move(public)

    def _add(self) -> None:
        """Add the piece of a batch that lies in the buffer."""
        draws = self._rng.at("draws", self._of.completed[0], self._piece[0])
        rows = self._of._rows_at(self._part) if self._fetched is None else self._read.long()
        self._of._accumulate(rows, self._counts, draws)
        with torch.no_grad():
            for parameter, held in zip(self._network, self._sums, strict=True):
                held.add_(parameter.summed_grad)  # type: ignore[attr-defined]
                parameter.summed_grad = None  # type: ignore[attr-defined]

    def _finish(self, public: bool) -> None:
        """Release what was added and move."""
        for parameter, held in zip(self._network, self._sums, strict=True):
            parameter.summed_grad = held.clone()  # type: ignore[attr-defined]
            held.zero_()
        self._move(public)

    def _move(self, public: bool) -> None:
        self._of._finish_step(self._of.completed[0], self._rng, public=public)

    # -- rare ------------------------------------------------------------------------------------

    def _again(self, step: int) -> tuple[Tensor, Tensor]:
        """The whole of a batch that is longer than its buffer (runs, a multiple of its width)."""
        opened = self._rng.at("poisson", step)
        parts: list[Tensor] = []
        last = torch.full_like(self._rows[:, None], -1.0)
        while not parts or bool(self._beyond(parts[-1]).any()):
            parts.append(last + self._gaps(opened).cumsum(1))
            last = parts[-1][:, -1:]
        index = torch.cat(parts, 1)
        inside = (index < self._rows[:, None]) & (self._of._steps > step)[:, None]
        return torch.where(inside, index, 0).long(), inside

    def _add_pieces(self, index: Tensor, inside: Tensor) -> None:
        add = self._program("add", self._add)
        pairs = zip(index.split(self._width, 1), inside.split(self._width, 1), strict=True)
        for number, (part, counts) in enumerate(pairs):
            self._piece.fill_(number)
            self._part.copy_(part)
            self._counts.copy_(counts)
            if isinstance(self._of._codes, MappedRows):
                self._read.copy_(self._of._codes.read(part))
            add()
