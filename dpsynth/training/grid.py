"""Grid: many runs trained as fleets, and what lies on disk until none of them is needed again."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console

from dpsynth.artifacts import MANIFEST
from dpsynth.checks import UsageError
from dpsynth.devices import resolve
from dpsynth.training.callbacks import default_callbacks
from dpsynth.training.fleet import Trained, train_fleet
from dpsynth.training.packing import GIB, capacity, pack
from dpsynth.training.recipe import FAMILIES, Recipe, Seat
from dpsynth.training.run import Run

__all__ = ["Grid", "Member", "RunLoggers"]

# Loggers of one run, given its name.
RunLoggers = Callable[[str], Sequence[Logger] | bool]
Fleet = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Member:
    """A run to train.

    Attributes:
        name: Its own among all that were ever trained in a folder, for its recipe, ε and seed.
        recipe: How.
        seat: On what, at which ε and seed.
    """

    name: str
    recipe: Recipe
    seat: Seat


@dataclass(frozen=True, eq=False)
class Grid:
    """Runs to train and the folder where they lie meanwhile.

    Attributes:
        members: By name.
        folder: Private, never published: `packing.json` says who trains with whom, `fleets/` holds
            keys, journals and checkpoints, `trained/` the runs.
        memory: GiB that fleets may fill; `None` for most of what is free.
    """

    members: Mapping[str, Member]
    folder: Path
    memory: float | None = None

    def trained(self, name: str) -> Path:
        """Run folder of a member."""
        return self.folder / "trained" / name

    def is_trained(self, name: str) -> bool:
        """Whether that folder is whole."""
        return (self.trained(name) / MANIFEST).is_file()

    def fleets(self, needed: Collection[str]) -> tuple[list[Fleet], list[str]]:
        """The fleets that train all members that are `needed` and not trained, and why there are
        so many.

        Those of an earlier start stay as they were, whatever memory is free by now, since what is
        half trained goes on in its own fleet only; the others are packed.

        Raises:
            UsageError: On a damaged `packing.json`, or as `pack` does.
        """
        kept = self._kept()
        held = {name for fleet in kept for name in fleet}
        fresh = [
            member
            for name, member in self.members.items()
            if name in needed and name not in held and not self.is_trained(name)
        ]
        packing = pack([m.recipe for m in fresh], [m.seat for m in fresh], self.memory)
        packed = [tuple(fresh[i].name for i in fleet) for fleet in packing.fleets]
        notes = [f"{len(kept)} as before"] if kept else []
        return [*kept, *packed], [*notes, *packing.notes]

    def keep(self, fleets: Sequence[Fleet]) -> None:
        """Write which fleets there are, for the next start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "packing.json"
        partial = path.with_suffix(".partial")
        body = {"memory": self.memory, "fleets": [list(fleet) for fleet in fleets]}
        partial.write_text(json.dumps(body, indent=1))
        partial.replace(path)

    def forget(self) -> None:
        """Remove what only a training that goes on needs."""
        for part in ("fleets", "trained"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        (self.folder / "packing.json").unlink(missing_ok=True)

    def train(
        self,
        fleet: Fleet,
        needed: Collection[str],
        *,
        data: str,
        console: Console,
        loggers: RunLoggers,
    ) -> None:
        """Train one fleet if any of its runs is needed and not trained; in halves where the GPU's
        memory is not enough after all.

        Raises:
            UsageError: Where it is not enough and halves cannot be trained.
        """
        if all(name not in needed or self.is_trained(name) for name in fleet):
            return
        members = [self.members[name] for name in fleet]
        digest = hashlib.sha256("/".join(fleet).encode()).hexdigest()[:8]
        state = self.folder / "fleets" / f"{members[0].recipe.model}-{digest}"
        trained = _attempt(members, state, console, loggers)
        if trained is None:
            halves = _halves(members, state)
            others = [other for other in self._kept() if other != fleet]
            self.keep([*others, *halves])
            shutil.rmtree(state, ignore_errors=True)
            console.print(f"{state.name}: out of memory, once more in halves", soft_wrap=True)
            for half in halves:
                self.train(half, needed, data=data, console=console, loggers=loggers)
            return
        for name, one in zip(fleet, trained, strict=True):
            Run.of(one, data=data).save(self.trained(name))

    def _kept(self) -> list[Fleet]:
        """Fleets of an earlier start whose runs are all known. Where another `memory` is asked for
        only those with an unseeded run stay: its key lies with its fleet."""
        path = self.folder / "packing.json"
        if not path.is_file():
            return []
        try:
            body = json.loads(path.read_text())
            memory, fleets = body["memory"], [tuple(map(str, names)) for names in body["fleets"]]
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(
                f"packing {str(path)!r}: is damaged; remove it and the folder fleets beside it"
            ) from error
        known = [fleet for fleet in fleets if set(fleet) <= set(self.members)]
        if memory == self.memory:
            return known
        return [f for f in known if any(self.members[name].seat.seed is None for name in f)]


def _attempt(
    members: Sequence[Member], state: Path, console: Console, loggers: RunLoggers
) -> list[Trained] | None:
    """The trained fleet, or nothing where the GPU's memory is not enough."""
    model = members[0].recipe.model
    runs = [member.name for member in members if member.seat.role == "model"]
    counted = [member.name for member in members if member.seat.role != "reference"]
    trained = FAMILIES[model].trained
    found = [trained and m.name in runs and loggers(m.name) for m in members]
    own = [() if isinstance(held, bool) else held for held in found]
    try:
        return train_fleet(
            [member.recipe for member in members],
            [member.seat for member in members],
            state=state,
            callbacks=default_callbacks(f"{model} ({len(counted)} runs)", state, console, own),
        )
    except torch.OutOfMemoryError:
        pass  # and what the error's frames hold goes with it
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _halves(members: Sequence[Member], state: Path) -> list[Fleet]:
    """The halves of a fleet that was out of memory.

    Nothing of the failed attempt is released, and its folder goes. A seeded run derives the same
    key again, so that it repeats the very draws that it had paid for. The key of an unseeded run
    goes with the folder: a second one would draw other noise on the same rows for one charge, so
    that such a fleet is refused.
    """
    fleet = tuple(member.name for member in members)
    if len(fleet) == 1:
        raise UsageError(f"{fleet[0]}: out of memory alone; lower training.piece")
    if any(member.seat.seed is None for member in members):
        recipe = members[0].recipe
        half = capacity(resolve(recipe.device).type) / GIB / 2
        raise UsageError(
            f"{recipe.model}: {len(fleet)} runs without a seed are out of memory as one fleet; "
            f"remove {str(state)!r} and {str(state.parents[1] / 'packing.json')!r}, then give "
            f"training.memory={half:.3g}"
        )
    middle = len(fleet) // 2
    return [fleet[:middle], fleet[middle:]]
