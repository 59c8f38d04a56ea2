"""The audit of one run, quick or full: every stage kept when done, evidence in one folder."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from dpsynth.artifacts import write_folder
from dpsynth.audit.attacks import DIAGNOSTICS, QUICK, blind, score_all
from dpsynth.audit.attribute import Advantage, infer_attributes, single_out
from dpsynth.audit.bounds import Errors
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import Audit, conclude
from dpsynth.audit.roc import roc_figure
from dpsynth.audit.statistics import auc, auc_interval
from dpsynth.checks import UsageError, check_choice, check_count
from dpsynth.data import Split, Table
from dpsynth.devices import resolve
from dpsynth.frontier.sweep import ceiling_of, run_facts
from dpsynth.randomness import derive, stream
from dpsynth.suite.controls import Control, judge_controls
from dpsynth.suite.defects import run_defects
from dpsynth.suite.estimate import MOST_LEARNT, quick_seconds
from dpsynth.suite.figure import bounds_figure
from dpsynth.suite.one_run import audit_by_canaries
from dpsynth.suite.parts import Parts, published_table
from dpsynth.suite.pipeline import audit_pipeline, forms_of
from dpsynth.suite.report import Bound, SuiteReport
from dpsynth.suite.shadows import (
    ShadowSet,
    pseudo_targets,
    shadow_attacks,
    targeted_attack,
    train_shadows,
)
from dpsynth.suite.stages import Stages
from dpsynth.suite.steps import audit_run_steps
from dpsynth.suite.whitebox import reference_run, white_box
from dpsynth.training.canaries import canary_layers
from dpsynth.training.run import Run

__all__ = ["SUITES", "Setting", "audit_run"]

SUITES = ("quick", "full")
# Shadows that play the audited run when the strongest attack is chosen.
PSEUDO = 2
# The step audit ends by itself; planted defects are as many short ones.
STEP_SECONDS, DEFECT_SECONDS = 45.0, 20.0
FORMS = {
    "rates": "both rates, any mechanism",
    "gdp": "both rates, Gaussian",
    "guesses": "right guesses, Gaussian",
}
# Attacks in one figure: the strongest, and those with the largest AUC.
MOST_DRAWN = 12
# Chance that one of the bounds of the pipeline contradicts a true claim.
SURE = 1e-3 / 9
SHOWN_EPSILONS = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)

Scores = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Setting:
    """How much an audit does.

    Attributes:
        suite: `quick`: attacks without shadow models, controls, step audit, planted defects;
            `full`: also shadow models, the whole pipeline's worst case and canaries.
        max_candidates: Most rows that are attacked, members and others together.
        draws: Fixed noises a white-box loss.
        shadows: Shadow models (full).
        fits: Trainings with and as many without the target in the worst case (full).
        canaries: Canaries of the one-run bound (full).
        seed: Of every random choice.
        device: `cpu`, `cuda` or `auto`.
    """

    suite: str = "quick"
    max_candidates: int = 8000
    draws: int = 16
    shadows: int = 32
    fits: int = 1000
    canaries: int = 1000
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        check_choice("suite", self.suite, SUITES)
        for name in ("max_candidates", "draws", "shadows", "fits", "canaries"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, least=0)
        resolve(self.device)


def audit_run(
    folder: Path, split: Split, setting: Setting, *, out: Path, data: str, console: Console
) -> SuiteReport:
    """Audit one run and write what was found, whole or not at all.

    A killed audit goes on: finished stages lie in a private folder beside `out` until the end.

    Args:
        folder: The run.
        split: The rows it was trained on as `members`, others it never saw, and what attackers may
            know.
        setting: How much is done.
        out: Folder for `audit.json`, `scores.parquet`, figures and the page. It holds figures of
            private rows.
        data: Name of the table.
        console: Where the estimate and progress are shown.

    Raises:
        UsageError: On rows under another schema than the run's, a run that protects more than
            single rows, an `out` that exists, or a work folder of another audit.
    """
    run = Run.load(folder)
    _check(run, split, folder, out)
    parts = Parts.of(split, max_candidates=setting.max_candidates, seed=setting.seed)
    work = out.with_name(f".{out.name}.work")
    stages = Stages(work, _identity(folder, split, setting), console)
    synthetic = published_table(run, folder, setting.seed)
    limits = {"steps": STEP_SECONDS, "defects": DEFECT_SECONDS}
    stages.estimates = limits | quick_seconds(
        run, parts, synthetic, draws=setting.draws, device=setting.device
    )
    todo = _Todo(run, parts, synthetic, setting, stages)
    report = todo.report(run_facts(run, name=folder.name, data=data))
    write_folder(out, todo.files(report), {"suite": setting.suite, "run": folder.name})
    shutil.rmtree(work)
    return report


def _check(run: Run, split: Split, folder: Path, out: Path) -> None:
    if out.exists():
        raise UsageError(f"out={str(out)!r}: exists already; choose another or remove it")
    if run.schema.columns != split.members.schema.columns:
        raise UsageError(
            f"run {str(folder)!r}: has another schema than the rows; give the data=… settings that "
            "it was trained with"
        )
    if run.plan.unit != "record":
        raise UsageError(f"unit={run.plan.unit!r}: an audit tells single records apart only")


def _identity(folder: Path, split: Split, setting: Setting) -> dict[str, Any]:
    manifest = hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
    rows = [part.digest() for part in (split.members, split.holdout, split.reference)]
    return {"run": manifest, "rows": rows, "setting": asdict(setting)}


@dataclass(frozen=True, eq=False)
class _Todo:
    """One audit: every method is a stage, or puts stages together."""

    run: Run
    parts: Parts
    synthetic: Table
    setting: Setting
    stages: Stages

    def report(self, facts: dict[str, Any]) -> SuiteReport:
        self.stages.announce(self._names())
        quick = self._quick()
        shadow = self._shadow() if self.setting.suite == "full" else None
        controls = self.stages.json("controls", self._controls)
        defects = self.stages.json("defects", self._defects)
        return SuiteReport(
            suite=self.setting.suite,
            facts={**facts, **self._profile()},
            membership=quick,
            shadow=shadow,
            controls=tuple(Control(**entry) for entry in controls),
            defects=defects,
            bounds=tuple(self._bounds()),
            attributes=tuple(self.stages.json("attributes", self._attributes)),
            seconds=dict(self.stages.seconds),
            notes=tuple(self._notes()),
        )

    def _names(self) -> list[str]:
        names = ["attacks", "white box", "controls", "defects", "attributes"]
        names += ["steps"] if self._stepped else []
        if self.setting.suite == "full":
            names += ["shadows", "pseudo targets", "targeted"]
            names += ["pipeline"] if self._stepped else []
            names += ["canaries"] if self._canaried else []
        return names

    @property
    def _stepped(self) -> bool:
        return self.run.plan.private and self.run.executed > 0

    @property
    def _canaried(self) -> bool:
        return self._stepped and bool(canary_layers(self.run.generator.network))

    # -- who was in --------------------------------------------------------------------------

    def _quick(self) -> Audit:
        scores = self._quick_scores()
        return conclude(scores, (), self._blind(), self.ceiling, self._rng("conclude"))

    def _attacks(self) -> Scores:
        parts, setting = self.parts, self.setting
        found = score_all(
            QUICK,
            parts.candidates,
            self.synthetic,
            parts.attacker,
            self._rng("attacks"),
            device=setting.device,
        )
        size = len(parts.inside)
        return {name: (values[:size], values[size:]) for name, values in found.items()}

    def _quick_scores(self) -> Scores:
        table = self.stages.scores("attacks", self._attacks)
        return table | self.stages.scores("white box", self._white_box)

    def _white_box(self) -> Scores:
        parts, setting = self.parts, self.setting
        folder = self.stages.folder / "reference"
        reference = reference_run(
            self.run, parts.attacker, folder, setting.seed, self.stages.console
        )
        return white_box(
            self.run,
            reference,
            parts,
            draws=setting.draws,
            seed=setting.seed,
            device=setting.device,
        )

    def _blind(self) -> float:
        def work() -> float:
            return auc(*blind(self.parts.inside, self.parts.outside, self._rng("blind")))

        return float(self.stages.json("blind", work))

    def _shadow(self) -> Audit:
        """Shadow models: the strongest attack is chosen on those that play the run."""
        shadows = self._trained_shadows
        rest = {
            "console": self.stages.console,
            "device": self.setting.device,
            "synthetic": self.synthetic,
        }
        of = (self.run, shadows, self.parts.inside, self.parts.outside)
        scores = self.stages.scores(
            "shadows", lambda: shadow_attacks(*of, rng=self._rng("shadows"), **rest)
        )
        played = self.stages.scores("pseudo targets", lambda: self._pseudo(of, rest))
        pseudo = [
            {name.split("|", 1)[1]: pair for name, pair in played.items() if name[0] == str(number)}
            for number in range(PSEUDO)
        ]
        return conclude(scores, pseudo, self._blind(), self.ceiling, self._rng("conclude shadows"))

    def _pseudo(self, of: Any, rest: Any) -> Scores:
        found = pseudo_targets(*of, count=PSEUDO, rng=self._rng("pseudo"), **rest)
        return {
            f"{number}|{name}": pair
            for number, scores in enumerate(found)
            for name, pair in scores.items()
            if name != "targeted"
        }

    @cached_property
    def _trained_shadows(self) -> ShadowSet:
        setting = self.setting
        rows = [self.parts.attacker.frame, self.parts.population.frame]
        known = Table(self.run.schema, pd.concat(rows, ignore_index=True))
        return train_shadows(
            self.run,
            self.parts.candidates,
            known,
            count=setting.shadows,
            seed=derive(setting.seed, "shadows"),
            folder=self.stages.folder / "shadows",
            console=self.stages.console,
            device=setting.device,
        )

    def _targeted(self) -> dict[str, Any]:
        """Queries aimed at the records that lie farthest from all others."""
        pair, _ = targeted_attack(
            self.run,
            self._trained_shadows,
            self.parts.inside,
            self.parts.outside,
            console=self.stages.console,
            device=self.setting.device,
            synthetic=self.synthetic,
        )
        area, low, high = auc_interval(*pair)
        return {"records": sum(map(len, pair)), "auc": area, "low": low, "high": high}

    @cached_property
    def ceiling(self) -> Ceiling:
        """Of this very run."""
        return ceiling_of(self.run)

    def _rng(self, purpose: str) -> np.random.Generator:
        return stream(self.setting.seed, f"audit {purpose}")

    # -- is the claim true -------------------------------------------------------------------

    def _bounds(self) -> Iterator[Bound]:
        if not self._stepped:
            return
        claimed = self.run.epsilon
        steps = self.stages.json("steps", self._steps)
        watched = f"{steps['runs']} copies, {steps['steps']} steps each, on rows the run made up"
        for form, shown, best in (
            ("right guesses → σ → ε by PLD", "bound", "attainable"),
            ("both rates → σ → ε by PLD", "by_rates", "rates_attainable"),
        ):
            found = steps["noise"]
            values = (found[shown]["epsilon"], found[best]["epsilon"], claimed)
            yield Bound("steps", form, *values, found["sure"]["epsilon"], watched)
        if self.setting.suite == "quick":
            return
        yield from self._of_pipeline(self.stages.json("pipeline", self._pipeline))
        if self._canaried:
            yield from self._of_canaries(self.stages.json("canaries", self._canaries))

    def _of_pipeline(self, found: dict[str, Any]) -> Iterator[Bound]:
        forms = forms_of(found["delta"])
        for threat, evidence in found["threats"].items():
            for form, shown in evidence["bounds"].items():
                yield Bound(
                    f"whole pipeline, {threat} seen",
                    FORMS[form],
                    shown["epsilon"],
                    shown["attainable"],
                    found["epsilon"],
                    forms[form](Errors(**shown["errors"]), SURE),
                    f"{found['fits']} trainings with the target and as many without",
                )

    def _of_canaries(self, found: dict[str, Any]) -> Iterator[Bound]:
        for name, form in (("any", "one run, any mechanism"), ("fdp", "one run, f-DP")):
            shown = found[name]
            yield Bound(
                "canaries in DP-SGD",
                form,
                shown["epsilon"],
                shown["attainable"],
                found["claimed"],
                # Far below the claim by its nature: no need of a second level.
                shown["epsilon"],
                f"{shown['right']} of {shown['guesses']} guesses right, {found['canaries']} "
                "canaries; the claim is that of the steps alone",
            )

    def _canaries(self) -> dict[str, Any]:
        found = audit_by_canaries(
            self.run,
            self.parts.members,
            self.stages.folder / "canaries",
            number=self.setting.canaries,
            seed=derive(self.setting.seed, "canaries"),
            console=self.stages.console,
        )
        return asdict(found)

    def _steps(self) -> dict[str, Any]:
        setting = self.setting
        with _one_thread():
            found = audit_run_steps(
                self.run,
                seed=setting.seed,
                console=self.stages.console,
                device=setting.device,
                seconds=STEP_SECONDS,
            )
        return found.to_dict()

    def _defects(self) -> dict[str, bool]:
        run = self.run if self._stepped else None
        with _one_thread():
            return dict(run_defects(run, seed=self.setting.seed, device=self.setting.device))

    def _pipeline(self) -> dict[str, Any]:
        setting, run = self.setting, self.run
        found = audit_pipeline(
            run.recipe.model,
            run.plan.epsilon,
            run.plan.delta,
            fits=setting.fits,
            seed=setting.seed,
            state=self.stages.folder / "pipeline",
            console=self.stages.console,
            device=setting.device,
        )
        return found.to_dict()

    def _controls(self) -> list[dict[str, Any]]:
        found = judge_controls(self.parts, seed=self.setting.seed, device=self.setting.device)
        return [asdict(control) for control in found]

    def _attributes(self) -> list[dict[str, Any]]:
        parts, rng = self.parts, self._rng("attributes")
        inferred = infer_attributes(
            self.synthetic,
            members=parts.inside,
            holdout=parts.outside,
            reference=parts.attacker,
            rng=rng,
            max_train=MOST_LEARNT,
            device=self.setting.device,
        )
        singled = single_out(self.synthetic, members=parts.inside, holdout=parts.outside, rng=rng)
        found = [*inferred, *singled]
        return [_advantage(one) for one in found]

    def _profile(self) -> dict[str, Any]:
        """μ and δ at several ε of the run's ledger."""
        ledger = self.run.ledger
        if not self.run.plan.private:
            return {}
        deltas = ledger.profile(SHOWN_EPSILONS)
        pairs = zip(SHOWN_EPSILONS, deltas.tolist(), strict=True)
        return {"mu": ledger.mu, "profile": ", ".join(f"{d:.2g} at {e:g}" for e, d in pairs)}

    def _notes(self) -> Iterator[str]:
        if self.setting.suite == "full":
            if self._stepped and not self._canaried:
                yield "no bound from one run: the network has no layer that gradient canaries go to"
            yield from self._trained_shadows.notes
            aimed = self.stages.json("targeted", self._targeted)
            yield (
                f"targeted queries on the {aimed['records']} most isolated records: AUC "
                f"{aimed['auc']:.3f} ({aimed['low']:.3f}..{aimed['high']:.3f})"
            )
        yield (
            "attribute inference: an advantage beyond 0 means that members are guessed better than "
            "rows the run never saw; the rest is what the population gives away"
        )

    # -- files -------------------------------------------------------------------------------

    def files(self, report: SuiteReport) -> dict[str, bytes]:
        """What the audit's folder holds."""
        scores = self._quick_scores()
        strongest = report.membership.strongest.name
        if report.shadow is not None:
            scores |= self.stages.scores("shadows", dict)
            strongest = report.shadow.strongest.name
        drawn = {name: pair for name, pair in scores.items() if name not in DIAGNOSTICS}
        return {
            "audit.json": report.to_json().encode(),
            "README.md": report.page().encode(),
            "scores.parquet": self._table_of(scores),
            **self._curves(drawn, strongest),
            **(bounds_figure(report.bounds) if report.bounds else {}),
        }

    def _table_of(self, scores: Scores) -> bytes:
        size = len(self.parts.inside)
        frame = pd.DataFrame({name: np.concatenate(pair) for name, pair in scores.items()})
        frame.insert(0, "member", np.arange(len(frame)) < size)
        buffer = BytesIO()
        pd.concat([frame, self.parts.candidates.frame], axis=1).to_parquet(buffer, index=False)
        return buffer.getvalue()

    def _curves(self, scores: Scores, strongest: str) -> dict[str, bytes]:
        areas = {name: auc(*pair) for name, pair in scores.items()}
        order = sorted(areas, key=lambda name: (name != strongest, -areas[name]))
        shown = {name: scores[name] for name in order[:MOST_DRAWN]}
        files = {}
        for ending in ("png", "pdf"):
            path = self.stages.folder / f"roc.{ending}"
            roc_figure(shown, self.ceiling, strongest=strongest, path=path, title="Who was in")
            files[path.name] = path.read_bytes()
        return files


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of a few records: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _advantage(found: Advantage) -> dict[str, Any]:
    value, low, high = found.advantage
    return {
        "name": f"{found.target}, {found.attacker}",
        "members": found.members[0],
        "control": found.control[0],
        "advantage": value,
        "low": low,
        "high": high,
    }
