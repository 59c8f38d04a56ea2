"""What is to be published under its ε, and what is refused because ε would not cover it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import yaml

from dpsynth import cli
from dpsynth.checks import RefusedError, UsageError
from dpsynth.data import Table
from dpsynth.training.fleet import train_fleet
from dpsynth.training.recipe import Seat, check_seat
from dpsynth.training.release import check_release
from dpsynth.training.run import Run

SECURE = tiny.recipe(privacy={"secure": True})


def test_a_sound_release_passes() -> None:
    check_release(SECURE, 1.0, None)


@pytest.mark.parametrize(
    ("recipe", "epsilon", "seed", "reason"),
    [
        (SECURE, math.inf, None, "nothing would be protected"),
        (SECURE, 1.0, 7, "seed=7"),
        (tiny.recipe(), 1.0, None, r"privacy\.secure=false"),
    ],
)
def test_what_epsilon_would_not_cover_is_refused(
    recipe: Any, epsilon: float, seed: int | None, reason: str
) -> None:
    with pytest.raises(RefusedError, match=reason):
        check_release(recipe, epsilon, seed)


def test_a_schema_measured_with_a_seed_is_refused() -> None:
    paid = {"what": "rows", "mechanism": "gaussian", "sigma": 9.0, "steps": 1, "when": ""}
    of = {"unit": "record", "contributions": 1}
    for noise, fine in (("aes256-ctr:system", True), ("philox:seed", False)):
        schema = replace(tiny.SCHEMA, spent=({**paid, **of, "noise": noise},))
        if fine:
            check_release(SECURE, 1.0, None, schema)
        else:
            with pytest.raises(RefusedError, match="'rows' was measured with noise philox:seed"):
                check_release(SECURE, 1.0, None, schema)


def test_secure_noise_has_no_seed() -> None:
    with pytest.raises(UsageError, match="seed=3"):
        check_seat(SECURE, tiny.seat(1.0, 3))


def test_secure_runs_say_so_and_never_repeat() -> None:
    first, second = (train_fleet(SECURE, [tiny.seat(1.0, None)])[0] for _ in range(2))
    assert first.ledger.noise == "aes256-ctr:system"
    assert not np.array_equal(first.generator.given_logits, second.generator.given_logits)


def people(rows: int = 600, each: int = 5) -> pd.DataFrame:
    """Rows of which `each` belong to one person."""
    return tiny.frame(rows).assign(person=[f"p{i // each}" for i in range(rows)])


UNIT = {"unit": "person", "contributions": 2}


def test_a_unit_with_more_rows_than_accounted_for_is_refused() -> None:
    table = Table.from_frame(people(), tiny.SCHEMA, unit="person")
    with pytest.raises(RefusedError, match=r"contributions=2: a unit has more"):
        train_fleet(tiny.recipe(privacy=UNIT), [Seat(table, 1.0, 0)])
    bounded = table.bounded(2, np.random.default_rng(0))
    (trained,) = train_fleet(tiny.recipe(privacy=UNIT), [Seat(bounded, 1.0, 0)])
    assert (trained.ledger.unit, trained.ledger.contributions) == ("person", 2)
    assert trained.ledger.epsilon <= 1.0


def test_protecting_people_takes_more_noise_than_protecting_records() -> None:
    table = Table.from_frame(people(), tiny.SCHEMA, unit="person")
    bounded = table.bounded(2, np.random.default_rng(0))
    people_, records = (
        train_fleet(tiny.recipe(privacy=privacy), [Seat(bounded, 1.0, 0)])[0]
        for privacy in (UNIT, {})
    )
    assert people_.plan.noise > 1.5 * records.plan.noise
    assert people_.plan.mu("codec") == pytest.approx(records.plan.mu("codec") / 2, rel=1e-6)


def test_a_table_that_does_not_say_whose_rows_they_are_is_refused() -> None:
    with pytest.raises(UsageError, match="does not say who owns a row"):
        check_seat(tiny.recipe(privacy=UNIT), tiny.seat(1.0))


# Through the command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    people(900).to_csv(tmp_path / "rows.csv", index=False)
    tiny.frame(900).to_csv(tmp_path / "plain.csv", index=False)
    (tmp_path / "schema.json").write_text(tiny.SCHEMA.to_json())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*settings: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    usual = ["+experiment=tiny", "model=naive_bayes", "data=file", "data.schema=schema.json"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", *usual, "out=run", *settings])
    shown = capsys.readouterr()
    code = ended.value.code
    assert isinstance(code, int)
    return code, shown.out + shown.err


def test_a_release_holds_nothing_that_epsilon_does_not_cover(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = train("data.path=plain.csv", "release=true", capsys=capsys)
    assert code == 0, said
    public = {path.name for path in (home / "run").iterdir()}
    assert public == {
        "MANIFEST.json",
        "README.md",
        "codec.json",
        "config.yaml",
        "ledger.json",
        "model.safetensors",
        "samples.parquet",
        "schema.json",
    }
    kept = {path.name for path in (home / "run.private").iterdir()}
    assert {"metrics.json", "audit.json", "report.html"} <= kept
    run = Run.load(home / "run")
    assert run.seed is None and run.ledger.noise == "aes256-ctr:system"
    figures = json.loads((home / "run.private" / "metrics.json").read_text())["metrics"]
    card = (home / "run" / "README.md").read_text()
    assert not any(f"{value:.4f}" in card or f"{value:.3f}" in card for value in figures.values())
    assert "TVD" not in said and "AUC" not in said


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("seed=1", "seed=1"),
        ("privacy.secure=false", "privacy.secure=false"),
        ("privacy.epsilon=inf", "nothing would be protected"),
        ("data.strict=true", "messages quote rows"),
    ],
)
def test_a_release_refuses(
    setting: str, reason: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = train("data.path=plain.csv", "release=true", setting, capsys=capsys)
    assert code == 3 and reason in said and said.count("\n") == 1
    assert not (home / "run").exists()


def test_a_release_mends_in_silence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strange = tiny.frame(900).astype(object)
    strange.loc[3, "age"] = "secret-value"
    strange.to_csv(home / "strange.csv", index=False)
    code, said = train("data.path=strange.csv", capsys=capsys)
    assert code == 2 and "secret-value" in said, "the custodian is told at the keyboard"
    code, said = train("data.path=strange.csv", "release=true", capsys=capsys)
    assert code == 0 and "secret-value" not in said


def test_a_budget_in_other_terms(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = train("data.path=plain.csv", "privacy.target.advantage=.2", capsys=capsys)
    assert code == 0, said
    run = Run.load(home / "run")
    assert 0.199 <= run.ledger.profile([0.0])[0] <= 0.2
    assert run.epsilon == pytest.approx(run.plan.epsilon, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("privacy.target.advantage=.2", "privacy.epsilon=1"), "both are given"),
        (("privacy.target.charm=.2",), "charm"),
        (("privacy.target.advantage=2",), "advantage=2"),
    ],
)
def test_a_target_that_means_nothing_is_refused(
    settings: tuple[str, ...], reason: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "charm" in settings[0]:
        settings = (f"+{settings[0]}",)
    code, said = train("data.path=plain.csv", *settings, capsys=capsys)
    assert code == 2 and reason in said


def test_people_with_several_rows(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("privacy.unit=person", "privacy.contributions=2")
    code, said = train("data.path=rows.csv", *settings, capsys=capsys)
    assert code == 0, said
    config = yaml.safe_load((home / "run" / "config.yaml").read_text())
    assert config["plan"]["unit"] == "person" and config["plan"]["contributions"] == 2
    assert "person" in (home / "run" / "README.md").read_text()
    assert "person" not in Run.load(home / "run").schema.names
