"""The card says what it must, refuses what it does not know, and lets no text break its tables."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dpsynth.checks import UsageError
from dpsynth.frontier.results import markdown_text
from dpsynth.release import FACTS, card
from dpsynth.training.recipe import FAMILIES

BASE: dict[str, Any] = {
    "name": "adult-vae-1", "family": "vae", "epsilon": 1.0, "delta": 1e-5, "data": "adult",
    "seed": None, "unit": "record", "relation": "add_remove", "accountant": "dp-accounting PLD",
}  # fmt: skip


def audit(**change: Any) -> Any:
    one = {"name": "nn_ratio", "diagnostic": False, "auc": 0.52, "auc_low": 0.51, "auc_high": 0.53}
    one |= {"tpr10": 0.12, "tpr10_low": 0.1, "tpr10_high": 0.14}
    one |= {"tpr1": 0.013, "tpr1_low": 0.008, "tpr1_high": 0.02}
    strongest = SimpleNamespace(**one)
    dcr = SimpleNamespace(**(one | {"name": "dcr", "diagnostic": True}))
    facts = {"attacks": (strongest, dcr), "strongest": strongest, "blind_auc": 0.503}
    facts["chosen"] = "chosen on one half of the candidates and measured on the other"
    facts |= {"null_low": 0.489, "null_high": 0.511, "ceiling_auc": 0.574, "ceiling_tpr10": 0.16}
    facts |= {"ceiling_tpr1": 0.02, "violation": False, "notes": ("half of | candidates",)}
    return SimpleNamespace(**(facts | change))


def table_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|")]


def test_front_matter_is_yaml():
    tricky = {"family": 'va"e: [#', "tags": ["a\nb", "vae"], "license": "cc0-1.0"}
    head = card(BASE | tricky).split("---\n")[1]
    read = yaml.safe_load(head)
    assert read["license"] == "cc0-1.0"
    assert 'va"e: [#' in read["tags"] and "a\nb" in read["tags"]
    assert yaml.safe_load(card(BASE).split("---\n")[1])["license"] == "other"


def test_a_card_before_evaluation():
    text = card(BASE)
    assert "Not evaluated yet." in text and "Not audited yet." in text
    assert "**ε = 1 at δ = 1e-05**" in text
    for heading in ("Purpose", "Privacy", "What the guarantee does not cover", "Sign-off"):
        assert f"\n## {heading}\n" in text


def test_seeded_noise_is_not_for_release_and_unseeded_says_so():
    assert "OS entropy" in card(BASE)
    assert "not for release" not in card(BASE)
    assert "Reproducible noise: not for release" in card(BASE | {"seed": 0})


def test_without_privacy_nothing_is_claimed():
    text = card({k: v for k, v in BASE.items() if k not in ("unit", "relation", "accountant")}
                | {"epsilon": math.inf, "seed": 3})  # fmt: skip
    assert "No differential privacy" in text and "Not for release" in text
    assert "Everything: there is no guarantee." in text
    assert "differential-privacy" not in text.split("---")[1]


@pytest.mark.parametrize("epsilon", [1.0, math.inf])
def test_never_called_anonymous(epsilon):
    text = card(BASE | {"epsilon": epsilon, "audit": audit()}).lower()
    assert "anonym" not in text


def test_metrics_with_floors_and_thresholds():
    facts = BASE | {
        "metrics": {"tvd2": 0.05, "tstr_gbt_auc": 0.87, "c2st_auc": 0.7},
        "floors": {"tvd2": 0.02, "tstr_gbt_auc": 0.92, "c2st_auc": 0.5},
        "thresholds": {"tvd2": 0.06, "tstr_gbt_auc": 0.88, "tvd3": 0.1},
    }
    text = card(facts)
    assert "| tvd2 ↓ | 0.0500 | 0.0200 | ≤ 0.06 | yes |" in text
    assert "| tstr_gbt_auc ↑ | 0.8700 | 0.9200 | ≥ 0.88 | **no** |" in text
    assert "| c2st_auc ↓ | 0.7000 | 0.5000 |  |  |" in text
    assert "Asked for but not measured: tvd3." in text
    assert "not differentially private" in text


def test_audit_beside_its_ceilings():
    text = card(BASE | {"audit": audit()})
    assert "| AUC | 0.5200 | 0.5100 to 0.5300 | 0.5740 |" in text
    assert "| TPR at 1 % FPR | 0.0130 | 0.0080 to 0.0200 | 0.0200 |" in text
    assert "dcr (diagnostic, no privacy score)" in text
    assert "better than the ledger allows" not in text
    assert "better than the ledger allows" in card(BASE | {"audit": audit(violation=True)})


def test_parameters_ledger_and_rows():
    ledger = [
        {"what": "marginals", "mechanism": "gaussian", "params": {"sigma": 5.1234567, "steps": 1}},
        {"what": "dpsgd", "mechanism": "poisson_gaussian", "params": "q .01"},
    ]
    facts = {"ledger": ledger, "sample_rate": 0.01, "steps": 500, "noise_multiplier": 1.25}
    text = card(BASE | facts | {"clip": 1.0, "expected_rows": 32561, "accountant_version": "0.6"})
    assert "| marginals | gaussian | sigma = 5.12346, steps = 1 |" in text
    assert "| dpsgd | poisson_gaussian | q .01 |" in text
    assert "| noise multiplier σ | 1.25 |" in text
    assert "dp-accounting PLD 0.6" in text
    assert "32561 declared as public" in text


@pytest.mark.parametrize("name", [n for n in FACTS if n in ("name", "data", "purpose", "source")])
def test_texts_cannot_break_out(name):
    evil = "x <script>alert(1)</script>\n## Sign-off | y"
    text = card(BASE | {name: evil, "reviewers": [evil]})
    assert "<script" not in text
    assert text.count("\n## Sign-off\n") == 1
    row = next(line for line in table_lines(text) if "x &lt;script" in line)
    assert row.replace("\\|", "").count("|") == 5


def test_further_lines_are_added():
    lists = ("intended_use", "forbidden_use", "limits", "not_covered", "reviewers")
    text = card(BASE | {name: [f"my {name}"] for name in lists})
    assert all(f"my {name}" in text for name in lists)
    assert "data owner" not in text


@pytest.mark.parametrize("name", ["name", "family", "epsilon", "delta", "data", "seed", "unit",
                                  "relation", "accountant"])  # fmt: skip
def test_a_needed_fact_is_missed(name):
    with pytest.raises(UsageError, match=f"fact '{name}' is missing"):
        card({k: v for k, v in BASE.items() if k != name})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "fact 'colour': unknown"),
        ({"name": None}, "fact 'name' is missing"),
        ({"epsilon": -1}, "epsilon=-1"),
        ({"delta": 2}, "delta=2"),
        ({"limits": "one text"}, "fact 'limits': must be a list"),
        ({"metrics": {"tvd2": 0.1}}, "metrics and floors"),
        ({"ledger": [{"what": "x"}]}, "give what, mechanism and params"),
    ],
)
def test_bad_facts_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        card(BASE | change)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_says_when_to_choose_it(family: str) -> None:
    suits = FAMILIES[family].suits
    assert suits[0].isupper() and suits.endswith(".")
    assert markdown_text(suits) in card({**BASE, "family": family, "suits": suits})
    assert len({other.suits for other in FAMILIES.values()}) == len(FAMILIES)
