"""The page loads nothing, escapes every text, and keeps real rows out where it must."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_release_card import BASE, audit

from dpsynth.checks import UsageError
from dpsynth.data import Table
from dpsynth.release import Overlays, overlays, page
from dpsynth.schema import Column, Schema

EVIL = "<script>alert('x')</script>"
SCHEMA = Schema(
    (
        Column(EVIL, "categorical", ("a", "<b>&", "c"), nullable=True),
        Column("age", "integer", lower=0, upper=9),
        Column("gain", "decimal", lower=0, upper=1e5, nullable=True),
        Column("code", "categorical", tuple(f"L{i}" for i in range(40))),
    ),
    target=EVIL,
)


def table(rows: int, root: int) -> Table:
    rng = np.random.default_rng(root)
    gain = np.where(rng.random(rows) < 0.9, 0.0, rng.random(rows) * 1e4)
    frame = pd.DataFrame(
        {
            EVIL: rng.choice(["a", "<b>&", "c", None], rows),
            "age": rng.integers(0, 10, rows),
            "gain": np.where(rng.random(rows) < 0.1, np.nan, gain),
            "code": [f"L{i}" for i in rng.integers(0, 40, rows)],
        }
    )
    return Table.from_frame(frame, SCHEMA)


def report() -> Any:
    metrics = {"tvd2": 0.05, "c2st_auc": 0.7, "tstr_gbt_auc": 0.87}
    levels = {EVIL: {"precision": 0.5, "recall": 0.25, "support": 3}}
    points = [{"predicted": 0.1, "observed": 0.2, "rows": 5}]
    return SimpleNamespace(
        metrics=metrics,
        floors={"tvd2": 0.02, "c2st_auc": 0.5, "tstr_gbt_auc": 0.92},
        per_class={"gbt": {"levels": levels, "calibration": points}},
        notes=(EVIL,),
        columns={
            name: {"tvd": 0.1, "psi": 0.123, "rare_level_coverage": 1} for name in SCHEMA.names
        },
    )


class Checker(HTMLParser):
    """Collects tags; every opened one must be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def well_formed(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def test_whole_page_is_well_formed_escaped_and_asks_for_nothing():
    facts = BASE | {"name": EVIL, "data": EVIL, "seed": 1, "accountant": EVIL, "unit": EVIL}
    facts |= {"ledger": [{"what": EVIL, "mechanism": EVIL, "params": {EVIL: 1}}]}
    facts |= {"not_covered": [EVIL]}
    text = page(facts, report(), audit(notes=(EVIL,)), overlays(table(300, 0), table(300, 1)))
    seen = well_formed(text).seen
    assert "script" not in seen
    assert "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=.(?!data:image/png)", text)
    assert "default-src 'none'" in text
    assert seen.count("image") == 3
    assert "PSI 0.123" in text
    assert "Reproducible noise: not for release" in text


def test_without_private_rows_the_real_side_is_gone():
    shown = overlays(table(300, 0), table(300, 1))
    text = page(BASE, report(), audit(), shown, private=False)
    seen = well_formed(text).seen
    assert seen.count("image") == 1
    assert "PSI" not in text and "By class" not in text and ", real " not in text
    assert "Real rows are not drawn here" in text
    alone = page(BASE, report(), audit(), overlays(None, table(300, 1)), private=False)
    assert alone == text


def test_a_page_before_evaluation():
    text = page(BASE, None, None, None)
    well_formed(text)
    assert "Not evaluated yet." in text and "Not audited yet." in text


def test_a_violation_and_no_privacy_are_loud():
    text = page(BASE | {"epsilon": math.inf}, None, audit(violation=True), None)
    well_formed(text)
    assert "An attack did better than the ledger allows" in text
    assert "No differential privacy (ε = ∞): not for release" in text


def test_bad_facts_are_refused():
    with pytest.raises(UsageError, match="unknown"):
        page(BASE | {"colour": 1}, None, None, None)


def test_overlays_are_shares_of_each_table():
    real, synthetic = table(400, 0), table(250, 1)
    shown = overlays(real, synthetic)
    for column in shown.columns:
        assert column.real is not None
        assert len(column.labels) == len(column.synthetic) == len(column.real)
        assert sum(column.synthetic) == pytest.approx(1)
        assert sum(column.real) == pytest.approx(1)
    first, age, gain, code = shown.columns
    assert first.labels == ("a", "<b>&", "c", "missing")
    assert first.synthetic[3] == pytest.approx(synthetic.frame[EVIL].isna().mean())
    assert first.real is not None
    assert first.real[1] == pytest.approx((real.frame[EVIL] == "<b>&").mean())
    counts = np.bincount(synthetic.frame["age"].to_numpy(dtype=int), minlength=10)
    np.testing.assert_allclose(age.synthetic, counts / 250)
    assert age.labels[1:-1] == tuple(map(str, range(1, 9)))
    assert gain.synthetic[-1] == pytest.approx(synthetic.frame["gain"].isna().mean())
    assert code.labels[-1] == "24 further levels" and len(code.labels) == 17


def test_bins_do_not_depend_on_real_rows():
    synthetic = table(250, 1)
    one, two = (overlays(table(300, root), synthetic) for root in (2, 3))
    assert [c.labels for c in one.columns] == [c.labels for c in two.columns]
    for with_real, alone in zip(one.columns, overlays(None, synthetic).columns, strict=True):
        assert with_real.synthetic == alone.synthetic and alone.real is None
    assert isinstance(one.public(), Overlays) and one.public().real is None


def test_an_empty_column_falls_back_to_the_declared_bounds():
    schema = Schema((Column("a", "decimal", lower=0, upper=1, nullable=True),
                     Column("b", "integer", lower=0, upper=1)))  # fmt: skip
    frame = pd.DataFrame({"a": [np.nan] * 3, "b": [0, 1, 1]})
    shown = overlays(None, Table.from_frame(frame, schema, strict=False))
    assert shown.columns[0].synthetic[-1] == 1
    assert shown.columns[1].synthetic == pytest.approx((1 / 3, 2 / 3))
    well_formed(page(BASE, None, None, shown))


def test_other_columns_are_refused():
    with pytest.raises(UsageError, match="different columns"):
        overlays(table(20, 0).select(["age"]), table(20, 1))


def test_many_columns_keep_the_maps_unlabelled():
    columns = tuple(Column(f"c{i}", "integer", lower=0, upper=3) for i in range(35))
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.integers(0, 4, (50, 35)), columns=[c.name for c in columns])
    shown = overlays(None, Table.from_frame(frame, Schema(columns)))
    text = page(BASE, None, None, shown)
    well_formed(text)
    assert "rotate(-90)" not in text
