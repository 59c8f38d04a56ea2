"""Verify: recompute what a run folder claims from its files, and refuse the first disagreement."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from dpsynth.artifacts import MANIFEST, read_folder
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import Audit
from dpsynth.checks import RefusedError, UsageError
from dpsynth.codec import Grid, NumericCoder
from dpsynth.data import Table
from dpsynth.privacy.accounting import second_opinion
from dpsynth.privacy.events import Event
from dpsynth.release.card import stated
from dpsynth.rounding import STRETCHES
from dpsynth.training.expected import expected_events
from dpsynth.training.recipe import FAMILIES, Seat, codec_settings, plan_of
from dpsynth.training.run import SEALED, Run
from dpsynth.training.select import Choice, selected_events

__all__ = ["PROFILE", "Verdict", "verify"]

# Where δ(ε) is read off for the ceilings of attacks: dense where the curves bend.
PROFILE = tuple([i / 20 for i in range(161)] + [8.25 + i / 4 for i in range(128)])
CHECKED = (*SEALED, "ledger.json", "README.md", "report.html", "audit.json")
STATE = ("keys", "journal.jsonl", "last.ckpt")
HEADER = ("unit", "contributions", "relation", "delta")
# Another version of an accountant may round otherwise; a changed figure differs by more.
_ROUNDING = 1e-3
# σ is searched for, and a search may stop a little above the least one.
_SEARCH = 2e-3
_SAME = 1e-9


@dataclass(frozen=True)
class Verdict:
    """What held.

    Attributes:
        run: Name of the folder.
        protected: Whether anything is; false at ε=∞.
        epsilon: ε of the ledger by PLD.
        second: The same by the second accountant.
        target: The ε that was not to be exceeded.
        delta: δ of the statement.
        unit: What a neighbouring table has one more or less of.
        contributions: Most rows of one unit.
        noise: Where the noise came from.
        events: Number of events in the ledger.
        steps: DP-SGD steps, paid and taken.
        unchecked: Files whose hash holds but whose content states nothing that can be recomputed.
    """

    run: str
    protected: bool
    epsilon: float
    second: float
    target: float
    delta: float
    unit: str
    contributions: int
    noise: str
    events: int
    steps: int
    unchecked: tuple[str, ...]

    @property
    def line(self) -> str:
        """One line for a terminal."""
        seen = f"{self.events} events, {self.steps} steps, noise {self.noise}"
        if not self.protected:
            return f"{self.run}: consistent, but ε=∞: nothing is protected ({seen})"
        unit = self.unit if self.contributions == 1 else f"{self.unit}, {self.contributions} rows"
        return (
            f"{self.run}: ε={self.epsilon:.4f} (second accountant {self.second:.4f}) of "
            f"{self.target:g} at δ={self.delta:g}, one {unit}; {seen}"
        )


def verify(folder: str | Path) -> Verdict:
    """Recompute a run folder's claim from its files and compare everything that is stated twice.

    What a forger restates everywhere, with all hashes, is a consistent other claim: this tells a
    slip or a forged part from the whole, it is no signature.

    Args:
        folder: What `Run.save` or a sweep wrote.

    Returns:
        The figures that held.

    Raises:
        UsageError: When the folder is damaged or no run.
        RefusedError: When two statements disagree; one line says which.
    """
    try:
        return _verdict(Path(folder))
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RefusedError(
            f"run {str(folder)!r}: a statement is not of the kind it is written in; fetch it again"
        ) from error


def _verdict(folder: Path) -> Verdict:
    files, lineage = _read(folder)
    run = Run.load(folder)
    _check_form(run, files)
    _check_header(run)
    _check_plan(run)
    _check_codec(run)
    _check_weights(run)
    choice = Choice.from_dict(lineage["selection"]) if "selection" in lineage else None
    _check_events(run, choice)
    target = run.plan.epsilon if choice is None else choice.epsilon
    first, second = _check_epsilon(run, target)
    _check_stated(run, files, lineage, first)
    return Verdict(
        run=folder.name,
        protected=math.isfinite(first),
        epsilon=first,
        second=second,
        target=target,
        delta=run.ledger.delta,
        unit=run.ledger.unit,
        contributions=run.ledger.contributions,
        noise=run.ledger.noise,
        events=len(run.ledger.events),
        steps=run.executed,
        unchecked=tuple(sorted(set(files) - set(CHECKED))),
    )


def _refuse(what: str, said: object, found: object) -> None:
    raise RefusedError(f"{what}: {said} is stated but {found} follows; do not release this run")


def _near(first: float, second: float, within: float) -> bool:
    return first == second or abs(first - second) <= within * max(abs(first), abs(second))


# -- files ---------------------------------------------------------------------------------------


def _read(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The folder's files, once there are no others and the manifest is as it was written."""
    files, lineage = read_folder(folder)
    for path in sorted(folder.iterdir()):
        if path.name not in files and path.name != MANIFEST:
            raise RefusedError(f"{path.name}: lies in the folder but not in {MANIFEST}; remove it")
    for name in STATE:
        if name in files:
            raise RefusedError(f"{name}: is private state of a training; it must not be published")
    text = (folder / MANIFEST).read_bytes().decode()
    if json.dumps(json.loads(text), indent=1) + "\n" != text:
        raise RefusedError(f"{MANIFEST}: is not in the form it is written in; fetch it again")
    return files, lineage


def _check_form(run: Run, files: Mapping[str, bytes]) -> None:
    """Nothing in the files but what was understood: an unknown key could claim anything."""
    if run.ledger.to_json().encode() != files["ledger.json"]:
        raise RefusedError("ledger.json: is not in the form it is written in; fetch it again")
    config = {"recipe": run.recipe.to_dict(), "plan": run.plan.to_dict(), "seed": run.seed}
    understood = {
        "config.yaml": (config, yaml.safe_load(files["config.yaml"])),
        "schema.json": (json.loads(run.schema.to_json()), json.loads(files["schema.json"])),
        "codec.json": (run.codec.to_dict(), json.loads(files["codec.json"])),
    }
    for name, (read, held) in understood.items():
        if _text(read) != _text(held):
            raise RefusedError(f"{name}: holds more or other than what is read; fetch it again")


def _text(value: Any) -> str:
    """Text in which 1, 1.0 and true differ."""
    return json.dumps(value, sort_keys=True)


# -- plan and ledger -----------------------------------------------------------------------------


def _check_header(run: Run) -> None:
    """Unit, contributions, relation and δ of plan and ledger; where the noise came from."""
    planned = run.plan.ledger()
    for name in HEADER:
        if getattr(run.ledger, name) != getattr(planned, name):
            _refuse(f"ledger {name}", getattr(run.ledger, name), getattr(planned, name))
    origin = "system" if run.seed is None else "seed"
    secure = bool(getattr(run.plan, "secure", False))
    # What else than AES steps draw from depends on the machine, and on how old the run is.
    other = ("aes256-ctr+threefry", "aes256-ctr+philox", "philox")
    sources = ("aes256-ctr",) if secure else ("aes256-ctr", *other)
    noises = [f"{source}:{origin}" for source in sources]
    if run.ledger.noise not in noises:
        _refuse(f"ledger noise with seed {run.seed}", run.ledger.noise, " or ".join(noises))
    if run.plan.private:
        run.schema.check_public()


def _check_plan(run: Run) -> None:
    """The plan follows from recipe, schema, ε and rows, and its σ from the plan."""
    plan, schema = run.plan, run.schema
    rows = schema.expected_rows
    if rows is not None and rows != plan.rows:
        _refuse("plan rows", plan.rows, rows)
    seat = Seat(Table(schema, pd.DataFrame(columns=schema.names)), plan.epsilon, run.seed)
    follows = plan_of(run.recipe, seat, plan.rows)
    stated, found = plan.to_dict(), follows.to_dict()
    for name in found:
        if name != "sigma" and _text(stated[name]) != _text(found[name]):
            _refuse(f"plan {name}", stated[name], found[name])
    needed = follows.calibrate().noise
    if not _near(plan.noise, needed, _SEARCH):
        _refuse("plan sigma", plan.noise, needed)


def _check_events(run: Run, choice: Choice | None) -> None:
    """What the plan implies is what was paid: nothing missing, nothing twice, in this order."""
    if choice is None:
        wanted = expected_events(run.recipe, run.schema, run.plan)
    else:
        wanted = selected_events(choice, run.recipe, run.schema, run.plan)
    paid = list(run.ledger.events)
    for place, (want, have) in enumerate(zip(wanted, paid, strict=False)):
        if want.what != have.what:
            raise RefusedError(
                f"ledger event {place}: pays for {have.what!r} where the plan implies {want.what!r}"
            )
        _check_event(want, have)
    if len(wanted) > len(paid):
        raise RefusedError(f"ledger: {wanted[len(paid)].what!r} is implied by the plan, not paid")
    if len(paid) > len(wanted):
        raise RefusedError(f"ledger: {paid[len(wanted)].what!r} is paid, not implied by the plan")
    _check_times(paid)
    steps = sum(e.steps for e in paid if e.what.startswith("dpsgd:"))
    if run.executed != steps:
        _refuse("executed steps", run.executed, steps)


def _check_event(want: Event, have: Event) -> None:
    for name in Event.__dataclass_fields__:
        stated, follows = getattr(have, name), getattr(want, name)
        if name in ("what", "when"):
            continue
        same = stated == follows
        if isinstance(follows, float) and not isinstance(stated, str):
            same = _near(stated, follows, _SAME)
        if not same:
            _refuse(f"{name} of {have.what!r}", stated, follows)


def _check_times(events: Sequence[Event]) -> None:
    """Events were written one after the other, in UTC."""
    times = []
    for event in events:
        try:
            time = datetime.fromisoformat(event.when)
        except ValueError as error:
            raise RefusedError(f"{event.what!r}: when={event.when!r} is no time") from error
        if time.utcoffset() != timedelta(0):
            raise RefusedError(f"{event.what!r}: when={event.when!r} is not in UTC")
        if times and time < times[-1]:
            raise RefusedError(f"{event.what!r}: when={event.when!r} lies before the event above")
        times.append(time)


def _check_epsilon(run: Run, target: float) -> tuple[float, float]:
    """ε by both accountants, at most the target."""
    first = run.ledger.epsilon
    if math.isfinite(run.plan.epsilon) != math.isfinite(first):
        _refuse("plan epsilon", run.plan.epsilon, first)
    if first > target * (1 + _SAME):
        _refuse("target epsilon", target, first)
    run.ledger.cross_check()
    ledger = run.ledger
    return first, second_opinion(ledger.events, ledger.delta, group=ledger.contributions)


# -- codec and weights ---------------------------------------------------------------------------


def _check_codec(run: Run) -> None:
    settings = codec_settings(run.recipe)
    measured = {c.name for c in run.codec.measured_columns(run.schema, **settings)}
    if list(run.codec.to_dict()["columns"]) != run.schema.names:
        _refuse("codec columns", list(run.codec.to_dict()["columns"]), run.schema.names)
    for coder in run.codec.coders:
        if not isinstance(coder, NumericCoder):
            continue
        name = coder.column.name
        if name not in measured:
            if coder.to_dict() != NumericCoder.direct(coder.column).to_dict():
                raise RefusedError(f"codec of {name!r}: is measured, but no event paid for it")
            continue
        for what, held, set_to in (
            ("bins", coder.bins, settings["bins"]),
            ("heaps", coder.slots, settings["heaps"]),
        ):
            if held != set_to:
                _refuse(f"codec {what} of {name!r}", held, set_to)
        if not _sound(coder):
            raise RefusedError(f"codec of {name!r}: its cells, bins or masses are out of range")


def _sound(coder: NumericCoder) -> bool:
    """Whether leaves tile the grid (a short one cell by cell) and hold all the rows at most, bins
    ascend, heaps are different spots, and each stretch has a weight for each round step."""
    grid, weights = Grid.of(coder.column), coder.weights
    starts, mass, bins, heaps = coder.starts, coder.mass, coder.leaf_bin, coder.heaps
    return bool(
        starts.ndim == mass.ndim == bins.ndim == heaps.ndim == 1
        and len(starts) == len(mass) == len(bins) > 0
        and starts[0] == 0
        and (np.diff(starts) > 0).all()
        and starts[-1] < grid.cells
        and (len(starts) == grid.cells or not grid.short)
        and np.isfinite(mass).all()
        and (mass >= 0).all()
        and mass.sum() <= 1 + _SAME
        and ((bins >= 0) & (bins < coder.bins)).all()
        and (np.diff(bins) >= 0).all()
        and len(heaps) <= coder.slots
        and len(np.unique(heaps)) == len(heaps)
        and ((heaps >= 0) & (heaps < grid.spots)).all()
        and weights.shape == (STRETCHES, len(grid.steps))
        and (np.isfinite(weights) & (weights >= 0)).all()
    )


def _check_weights(run: Run) -> None:
    for name, value in run.generator.state_dict().items():
        if not torch.isfinite(value).all():
            raise RefusedError(f"weights {name!r}: are not finite; do not release this run")
    completed = int(run.generator.completed)
    if completed != run.executed:
        _refuse("executed steps", run.executed, f"{completed} of the weights")


# -- what is stated elsewhere --------------------------------------------------------------------


def _check_stated(
    run: Run, files: Mapping[str, bytes], lineage: Mapping[str, Any], epsilon: float
) -> None:
    if "result" in lineage:
        _check_result(run, lineage["result"])
    if "README.md" in files:
        _check_card(run, files["README.md"].decode(), epsilon)
    if "report.html" in files and run.plan.private:
        said = f"ε = {epsilon:g} at δ = {run.plan.delta:g}"
        if said not in files["report.html"].decode():
            raise RefusedError(f"report.html: does not state {said!r}, which the ledger gives")
    if "audit.json" in files:
        _check_ceilings(run, Audit.from_json(files["audit.json"].decode()))


def _check_result(run: Run, result: Mapping[str, Any]) -> None:
    trained = FAMILIES[run.recipe.model].trained
    follows = {
        "epsilon": run.plan.epsilon,
        "delta": run.plan.delta,
        "seed": run.seed,
        "role": "model" if trained else "baseline",
    }
    for name, value in follows.items():
        if name not in result or _text(result[name]) != _text(value):
            _refuse(f"{name} of the result", result.get(name), value)
    if str(result.get("family")).split(" ")[0] != run.recipe.model:
        _refuse("family of the result", result.get("family"), run.recipe.model)


def _check_card(run: Run, text: str, epsilon: float) -> None:
    said, plan = stated(text), run.plan
    follows: dict[str, Any] = {"epsilon": epsilon, "delta": plan.delta}
    if plan.private:
        follows |= {"headline": f"ε = {epsilon:g} at δ = {plan.delta:g}"}
        follows |= {"unit": plan.unit, "relation": plan.relation}
        if run.executed:
            follows |= {"sampler": "Poisson", "sample_rate": plan.q, "steps": run.executed}
            follows |= {"noise_multiplier": plan.noise, "clip": plan.bound}
        paid = [(event.what, event.mechanism) for event in run.ledger.events]
        if said["ledger"] != paid:
            _refuse("ledger in README.md", said["ledger"], paid)
    elif "headline" in said:
        _refuse("README.md", said["headline"], "ε = ∞")
    for name, value in follows.items():
        found = said.get(name)
        if isinstance(value, float):
            same = isinstance(found, float) and _near(found, value, _ROUNDING)
        else:
            same = found == value
        if not same:
            _refuse(f"{name} in README.md", found, value)


def _check_ceilings(run: Run, audit: Audit) -> None:
    ceiling = Ceiling.none()
    if run.plan.private:
        ceiling = Ceiling.from_profile(PROFILE, run.ledger.profile(PROFILE).tolist())
    follows = {
        "ceiling_auc": ceiling.auc,
        "ceiling_tpr10": ceiling.tpr_at(0.1),
        "ceiling_tpr1": ceiling.tpr_at(0.01),
    }
    for name, value in follows.items():
        if not _near(getattr(audit, name), value, _ROUNDING):
            _refuse(f"{name} in audit.json", getattr(audit, name), value)
