"""Verify: a sound run passes; a flipped byte, a changed leaf and a forged parameter do not."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tiny import frame, recipe, seat

from dpsynth.artifacts import MANIFEST
from dpsynth.audit import Ceiling, audit
from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.frontier.sweep import run_facts
from dpsynth.privacy.events import Event
from dpsynth.privacy.ledger import Executed, Ledger
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import stream
from dpsynth.release.card import card
from dpsynth.release.page import page
from dpsynth.release.verify import PROFILE, verify
from dpsynth.training.expected import expected_events
from dpsynth.training.fleet import train_fleet
from dpsynth.training.run import SEALED, Run

PARTS = ("ledger.json", "config.yaml", "schema.json", "codec.json")


def judged(run: Run, folder: Path) -> Path:
    """The run saved as a sweep does it: with its card, page, audit and result."""
    ceiling = Ceiling.none()
    if run.plan.private:
        ceiling = Ceiling.from_profile(PROFILE, run.ledger.profile(PROFILE).tolist())
    rows = Table.from_frame(frame(1500).drop_duplicates(), run.schema)
    parts = [rows.take(np.arange(300 * part, 300 * part + 300)) for part in range(3)]
    attacked, _ = audit(
        run.sample_table(200, rng=1),
        members=parts[0],
        holdout=parts[1],
        reference=parts[2],
        white_box={},
        ceiling=ceiling,
        max_candidates=60,
        rng=stream(0, "audit"),
    )
    result = {
        "family": run.recipe.model,
        "role": "model",
        "epsilon": run.plan.epsilon,
        "delta": run.plan.delta,
        "seed": run.seed,
        "run": folder.name,
    }
    facts = run_facts(run, name=folder.name, data="tiny")
    extra = {
        "README.md": card({**facts, "audit": attacked}).encode(),
        "report.html": page(facts, None, attacked, None).encode(),
        "audit.json": attacked.to_json().encode(),
        "notes.txt": b"anything",
    }
    replace(run, lineage={**run.lineage, "result": result}).save(folder, extra)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run.of(train_fleet(recipe("vae"), [seat(1.0, 0)])[0], data="tiny")
    return judged(run, tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path / "run")
    return tmp_path / "run"


def repair(folder: Path) -> None:
    """Make the manifest fit what the folder holds."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.iterdir())
        if p.name != MANIFEST
    }
    text = json.dumps(manifest, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def refused(folder: Path, match: str = "") -> str:
    with pytest.raises(UsageError, match=match) as error:
        verify(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# What is sound


def test_a_sound_run_holds(sound: Path) -> None:
    verdict = verify(sound)
    assert verdict.protected and verdict.run == "run"
    assert 0.99 < verdict.epsilon <= verdict.target == 1.0
    assert verdict.epsilon <= verdict.second <= verdict.epsilon * 1.01 + 0.02
    assert (verdict.steps, verdict.events, verdict.delta) == (5, 7, 1e-5)
    assert verdict.unchecked == ("notes.txt",)
    assert "ε=1.0000" in verdict.line and "\n" not in verdict.line


@pytest.mark.parametrize("model", ["gan", "naive_bayes"])
@pytest.mark.parametrize("seed", [0, None])
def test_other_families_and_seeds_hold(model: str, seed: int | None, tmp_path: Path) -> None:
    Run.of(train_fleet(recipe(model), [seat(1.0, seed)])[0]).save(tmp_path / "run")
    verdict = verify(tmp_path / "run")
    assert verdict.noise == ("aes256-ctr:system" if seed is None else "aes256-ctr:seed")
    assert verdict.steps == (5 if model == "gan" else 0)


def test_a_paid_row_count_and_no_heaps_hold(tmp_path: Path) -> None:
    fitted = recipe("vae", codec={"heaps": 0})
    run = Run.of(train_fleet(fitted, [seat(1.0, 0, expected_rows=None)])[0])
    run.save(tmp_path / "run")
    names = [event.what for event in run.ledger.events]
    assert names[0] == "rows" and not any(name.startswith("heaps") for name in names)
    assert verify(tmp_path / "run").epsilon <= 1.0


def test_without_privacy_it_says_so(tmp_path: Path) -> None:
    run = Run.of(train_fleet(recipe("vae"), [seat(math.inf, 0)])[0], data="tiny")
    verdict = verify(judged(run, tmp_path / "run"))
    assert not verdict.protected and verdict.epsilon == math.inf
    assert "nothing is protected" in verdict.line


# a. Bytes


def test_any_flipped_byte_is_caught(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        every = len(content) <= 400
        places = range(len(content)) if every else rng.integers(0, len(content), 60)
        for place in (*places, 0, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            refused(folder)
        path.write_bytes(content)
    verify(folder)


def test_blanks_of_the_manifest_count_too(folder: Path) -> None:
    """JSON does not see them, and its own hash is of what JSON sees."""
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("\n", "\r", 1))
    refused(folder, "not in the form")


@pytest.mark.parametrize("name", ["members.csv", "last.ckpt", ".hidden"])
def test_a_file_that_is_not_listed_is_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"rows")
    refused(folder, "lies in the folder but not in")


@pytest.mark.parametrize("name", ["keys", "journal.jsonl", "last.ckpt"])
def test_private_state_is_refused_even_listed(name: str, folder: Path) -> None:
    (folder / name).write_bytes(b"1")
    repair(folder)
    refused(folder, "private state")


# b. Leaves, under a manifest that fits


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all leaves and of all members of lists and mappings."""
    if not isinstance(value, (dict, list)):
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from leaves(one, (*path, key))


def parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 1.001 if value else 1
    if isinstance(value, str):
        return f"{value}x" if value else "x"
    return "x" if value is None else None


def read(folder: Path, name: str) -> Any:
    return yaml.safe_load((folder / name).read_text())


def write(folder: Path, name: str, tree: Any) -> None:
    text = yaml.safe_dump(tree) if name.endswith("yaml") else json.dumps(tree, indent=1) + "\n"
    (folder / name).write_text(text)


@pytest.mark.parametrize("name", PARTS)
def test_any_changed_or_missing_leaf_is_caught(name: str, folder: Path) -> None:
    tree = yaml.safe_load((folder / name).read_text())
    if name == "ledger.json":
        tree = json.loads((folder / name).read_text())
    paths = list(leaves(tree))
    paths = paths[:: max(1, len(paths) // 150)]
    for path in paths:
        for drop in (False, True):
            forged = copy.deepcopy(tree)
            holder = parent(forged, path)
            if drop:
                del holder[path[-1]]
            else:
                holder[path[-1]] = changed(holder[path[-1]])
            write(folder, name, forged)
            repair(folder)
            refused(folder)


def test_events_dropped_doubled_or_reordered_are_caught(folder: Path) -> None:
    tree = json.loads((folder / "ledger.json").read_text())
    events = tree["events"]
    for place in range(len(events)):
        rest = events[:place] + events[place + 1 :]
        for other in (rest, [*events, events[place]], [events[place], *rest]):
            if other != events:
                write(folder, "ledger.json", {**tree, "events": other})
                repair(folder)
                refused(folder)


# c. A forger who recomputes every hash


class Forger:
    """Takes a folder apart, and puts it together with all hashes anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = Ledger.from_json((folder / "ledger.json").read_text())
        self.events = list(self.ledger.events)
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.schema = json.loads((folder / "schema.json").read_text())
        self.codec = json.loads((folder / "codec.json").read_text())
        self.weights = load_tensors((folder / "model.safetensors").read_bytes())
        self.lineage = json.loads((folder / MANIFEST).read_text())["lineage"]

    def header(self, **change: Any) -> None:
        self.ledger = replace(self.ledger, **change)

    def event(self, name: str, **change: Any) -> None:
        self.events = [replace(e, **change) if e.what.startswith(name) else e for e in self.events]

    def plan(self, **change: Any) -> None:
        self.config["plan"] |= change

    def settings(self, **change: Any) -> None:
        self.config["recipe"]["privacy"] |= change

    def done(self) -> Path:
        write(self.folder, "config.yaml", self.config)
        write(self.folder, "schema.json", self.schema)
        write(self.folder, "codec.json", self.codec)
        (self.folder / "model.safetensors").write_bytes(save_tensors(self.weights))
        files = {name: (self.folder / name).read_bytes() for name in SEALED}
        ledger = replace(self.ledger, _events=self.events).sealed(files)
        (self.folder / "ledger.json").write_text(ledger.to_json())
        manifest = json.loads((self.folder / MANIFEST).read_text())
        write(self.folder, MANIFEST, {**manifest, "lineage": self.lineage})
        repair(self.folder)
        return self.folder


def sigma_of(forger: Forger, name: str) -> float:
    return next(e.sigma for e in forger.events if e.what.startswith(name))


def scaled(name: str, factor: float) -> Callable[[Forger], None]:
    return lambda f: f.event(name, sigma=sigma_of(f, name) * factor)


def both_sigma(factor: float) -> Callable[[Forger], None]:
    def forge(f: Forger) -> None:
        f.event("dpsgd", sigma=sigma_of(f, "dpsgd") * factor)
        f.plan(sigma=f.config["plan"]["sigma"] * factor)

    return forge


def all_steps(steps: int) -> Callable[[Forger], None]:
    """Everywhere but in σ, which more steps would have to raise."""

    def forge(f: Forger) -> None:
        f.event("dpsgd", steps=steps)
        f.plan(steps=steps)
        f.settings(steps=steps)
        f.header(executed=Executed(steps))
        f.weights["completed"] = torch.tensor([steps])

    return forge


def all_delta(f: Forger) -> None:
    f.header(delta=1e-6)
    f.plan(delta=1e-6)
    f.settings(delta=1e-6)
    f.lineage["result"]["delta"] = 1e-6


def all_rows(f: Forger) -> None:
    f.plan(rows=800)
    f.schema["expected_rows"] = 800
    f.event("dpsgd", q=32 / 800)


def all_batch(f: Forger) -> None:
    f.plan(batch=16)
    f.settings(batch=16)
    f.event("dpsgd", q=16 / 400)


def codec_column(**change: Any) -> Callable[[Forger], None]:
    return lambda f: f.codec["columns"]["pay"].update(change)


FORGED: dict[str, Callable[[Forger], None]] = {
    "σ of DP-SGD doubled": scaled("dpsgd", 2.0),
    "σ of DP-SGD halved": scaled("dpsgd", 0.5),
    "σ of a codec event": scaled("cells:age", 1.01),
    "σ of a marginal": scaled("marginal:job", 0.99),
    "σ in plan and ledger": both_sigma(1.1),
    "a smaller σ in plan and ledger": both_sigma(0.9),
    "q": lambda f: f.event("dpsgd", q=0.01),
    "steps of the ledger": lambda f: f.event("dpsgd", steps=4),
    "steps of ledger and plan": lambda f: (f.event("dpsgd", steps=4), f.plan(steps=4)),
    "steps everywhere": all_steps(4),
    "more steps everywhere": all_steps(6),
    "executed steps fewer": lambda f: f.header(executed=Executed(4)),
    "executed steps more": lambda f: f.header(executed=Executed(6)),
    "steps of the weights": lambda f: f.weights.update(completed=torch.tensor([4])),
    "δ of the ledger": lambda f: f.header(delta=1e-6),
    "δ of the plan": lambda f: f.plan(delta=1e-6),
    "δ everywhere": all_delta,
    "ε of the plan": lambda f: f.plan(epsilon=0.5),
    "ε of plan and result": lambda f: (
        f.plan(epsilon=2.0), f.lineage["result"].update(epsilon=2.0)),
    "ε=∞ of the plan": lambda f: f.plan(epsilon=math.inf),
    "shares of the plan": lambda f: f.config["plan"]["shares"].update(codec=0.2),
    "shares of plan and recipe": lambda f: (
        f.config["plan"]["shares"].update(codec=0.2), f.settings(shares={"codec": 0.2})),
    "rows of the plan": lambda f: f.plan(rows=800),
    "rows everywhere": all_rows,
    "batch of the plan": lambda f: f.plan(batch=64),
    "batch everywhere": all_batch,
    "clip of the plan": lambda f: f.plan(clip=0.01),
    "clip of the recipe": lambda f: f.settings(clip=0.01),
    "unit": lambda f: f.header(unit="person", contributions=3),
    "unit of plan and ledger": lambda f: (
        f.header(unit="person", contributions=3), f.plan(unit="person", contributions=3)),
    "secure noise": lambda f: f.header(noise="aes256-ctr:system"),
    "secure plan": lambda f: (f.header(noise="aes256-ctr:seed"), f.plan(secure=True)),
    "unseeded noise": lambda f: f.header(noise="aes256-ctr:system"),
    "no seed": lambda f: f.config.update(seed=None),
    "another seed": lambda f: f.config.update(seed=5),
    "another family": lambda f: f.config["recipe"].update(model="gan"),
    "another name of DP-SGD": lambda f: f.event("dpsgd", what="dpsgd:gan"),
    "another name of a marginal": lambda f: f.event("marginal:job", what="marginal:rich"),
    "an event without noise": lambda f: f.event(
        "marginal:job", mechanism="none", sigma=0.0),
    "spent in the plan alone": lambda f: f.plan(
        spent=[Event("levels:job", "gaussian", sigma=50.0).to_dict()]),
    "an event dropped": lambda f: f.events.pop(0),
    "the last event dropped": lambda f: f.events.pop(),
    "an event doubled": lambda f: f.events.append(f.events[-1]),
    "an event added": lambda f: f.events.append(
        Event("other", "gaussian", sigma=1e6, when=f.events[-1].when)),
    "events reordered": lambda f: f.events.reverse(),
    "no time": lambda f: f.event("dpsgd", when="noon"),
    "a time without its zone": lambda f: f.event("dpsgd", when="2030-01-01T00:00:00"),
    "a time of another zone": lambda f: f.event("dpsgd", when="2030-01-01T00:00:00+01:00"),
    "a time before the last": lambda f: f.event("dpsgd", when="2001-01-01T00:00:00+00:00"),
    "a fact read off the rows": lambda f: f.schema["columns"][0].update(provenance="data"),
    "bounds that no event paid for": lambda f: f.schema["columns"][0].update(
        provenance="measured"),
    "weights that are not finite": lambda f: f.weights.update(
        prior_logits=f.weights["prior_logits"] * math.nan),
    "bins of the codec": codec_column(bins=31),
    "heap slots of the codec": codec_column(slots=15),
    "a mass that is no share": codec_column(mass=[-1.0]),
    "cells out of range": codec_column(starts=[5], mass=[1.0], leaf_bin=[0]),
    "a weight below 0": codec_column(weights=[[-1.0]] * 3),
    "weights of too few stretches": codec_column(weights=[[1.0]]),
    "a column of the codec too many": lambda f: f.codec["columns"].update(more={}),
    "codec settings": lambda f: f.config["recipe"]["codec"].update(heaps=0),
    "result of another ε": lambda f: f.lineage["result"].update(epsilon=0.1),
    "result of another δ": lambda f: f.lineage["result"].update(delta=1e-9),
    "result of another family": lambda f: f.lineage["result"].update(family="gan"),
    "result of another role": lambda f: f.lineage["result"].update(role="baseline"),
    "an unknown key": lambda f: f.config.update(release="approved"),
    "a selection that was none": lambda f: f.lineage.update(
        selection={"epsilon": 1.0, "mean": 2.0, "shape": 1.0, "share": 0.1,
                   "candidates": [f.config["recipe"]]}),
    "a result of another kind": lambda f: f.lineage.update(result=5),
    "a selection of another kind": lambda f: f.lineage.update(selection=[1]),
    "a selection of half a sentence": lambda f: f.lineage.update(selection={"epsilon": 1.0}),
}  # fmt: skip


def test_hashes_made_anew_over_the_same_content_hold(folder: Path) -> None:
    """Else the forgeries below could be caught for the forger's want of skill."""
    assert verify(Forger(folder).done()).protected


@pytest.mark.parametrize("forge", FORGED.values(), ids=FORGED)
def test_a_parameter_forged_with_all_hashes_is_caught(
    forge: Callable[[Forger], Any], folder: Path
) -> None:
    forger = Forger(folder)
    forge(forger)
    refused(forger.done())


@pytest.mark.parametrize("name", ["README.md", "report.html", "audit.json"])
def test_another_figure_on_card_page_or_audit_is_caught(name: str, folder: Path) -> None:
    text = (folder / name).read_text()
    said = {
        "README.md": ["epsilon: 0.9", "delta: 1.0e-05", "**ε = ", "| steps T | ", "| marginal:age ",
                      "| sampling rate q | 0.", "| noise multiplier σ | ", "| relation | "],
        "report.html": ["ε = "],
        "audit.json": ['"ceiling_auc": ', '"ceiling_tpr10": ', '"ceiling_tpr1": '],
    }[name]  # fmt: skip
    for start in said:
        if start == "epsilon: 0.9" and start not in text:
            start = "epsilon: "
        place = text.index(start) + len(start) - (start[-2:] == "05")
        digit = "2" if text[place] == "1" else "1"
        (folder / name).write_text(text[:place] + digit + text[place + 1 :])
        repair(folder)
        refused(folder)
    (folder / name).write_text(text)
    repair(folder)
    verify(folder)


def test_a_private_claim_on_a_card_without_privacy_is_caught(tmp_path: Path) -> None:
    run = Run.of(train_fleet(recipe("vae"), [seat(math.inf, 0)])[0], data="tiny")
    folder = judged(run, tmp_path / "run")
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text + "\n**ε = 1 at δ = 1e-05**\n")
    repair(folder)
    refused(folder, "follows")


def test_what_is_restated_everywhere_is_another_claim(sound: Path, tmp_path: Path) -> None:
    """The limit of what consistency can show, stated: times, repetitions that cost nothing,
    weights, and a whole other budget with the σ that it needs all pass. Only a signature over the
    folder's own hash could tell."""
    bare = tmp_path / "bare"
    shutil.copytree(sound, bare)
    for name in ("README.md", "report.html", "audit.json"):
        (bare / name).unlink()
    repair(bare)

    def restated(f: Forger) -> None:
        run = Run.load(bare)
        plan = PrivacyPlan(**{**f.config["plan"], "epsilon": 0.5, "sigma": None}).calibrate()
        f.config["plan"] = plan.to_dict()
        f.lineage["result"]["epsilon"] = 0.5
        when = f.events[0].when
        f.events = [replace(e, when=when) for e in expected_events(run.recipe, run.schema, plan)]

    harmless: dict[str, Callable[[Forger], Any]] = {
        "all times": lambda f: f.event("", when="2031-01-01T00:00:00+00:00"),
        "replayed steps": lambda f: f.header(executed=Executed(5, 3)),
        "weights": lambda f: f.weights.update(prior_logits=f.weights["prior_logits"] + 1),
        "when it was made": lambda f: f.lineage.update(created="2031-01-01"),
        "a budget with its own noise": restated,
    }
    for name, forge in harmless.items():
        folder = tmp_path / name
        shutil.copytree(bare, folder)
        forger = Forger(folder)
        forge(forger)
        verdict = verify(forger.done())
        assert verdict.epsilon <= (0.5 if name.startswith("a budget") else 1.0)


def test_accountants_that_disagree_are_refused(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpsynth.privacy.accounting.second_opinion", lambda *_, **__: 0.9)
    refused(sound, "do not use this plan")


def test_more_than_the_target_is_refused(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ledger, "epsilon", property(lambda _: 1.0001))
    refused(sound, "target epsilon")


def test_no_run_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", MANIFEST)


def test_a_refusal_is_a_refusal(folder: Path) -> None:
    forger = Forger(folder)
    forger.header(noise="aes256-ctr:system")
    with pytest.raises(RefusedError):
        verify(forger.done())
