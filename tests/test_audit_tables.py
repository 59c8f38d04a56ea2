"""Tables of any generator: laws of the scores, known answers, and all that tables can do wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dpsynth.audit import shadow_scores
from dpsynth.audit.kinds import FEW, draft_schema, relaxed, unstamped
from dpsynth.audit.shadow_scores import _excluded
from dpsynth.audit.statistics import auc, null_band
from dpsynth.audit.tables import ShadowTable, audit_table, read_shadows
from dpsynth.checks import UsageError
from dpsynth.schema import MAX_LEVELS, Column, Schema

ROWS = 60


def people(rows: int, rng: np.random.Generator) -> pd.DataFrame:
    """Correlated numbers, gaps and two categories."""
    x = rng.normal(size=(rows, 2)) @ np.array([[1.0, 0.6], [0.0, 0.8]])
    frame = pd.DataFrame(x, columns=["income", "rent"])
    frame["age"] = rng.integers(18, 90, rows)
    frame["job"] = rng.choice(["clerk", "nurse", "smith"], rows)
    frame["rooms"] = rng.integers(1, 6, rows)
    frame.loc[rng.random(rows) < 0.05, "rent"] = np.nan
    return frame


def leaky(members: pd.DataFrame, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """A generator that hands out a share of its members nearly as they are, and strangers."""
    made = people(len(members), rng)
    kept = rng.permutation(len(members))[: round(share * len(members))]
    made.iloc[kept] = members.iloc[kept]
    made["income"] += rng.normal(scale=1e-3, size=len(made))
    return made


def game(seed: int, share: float) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """A leaky table, its candidates in random order, and who of them was a member."""
    rng = np.random.default_rng(seed)
    members, strangers = people(ROWS, rng), people(ROWS, rng)
    made = leaky(members, share, rng)
    order = rng.permutation(2 * ROWS)
    both = pd.concat([members, strangers], ignore_index=True).iloc[order].reset_index(drop=True)
    return made, both, (np.arange(2 * ROWS) < ROWS)[order]


def shadows(count: int, share: float, *, labelled: bool = True) -> list[ShadowTable]:
    found = []
    for place in range(count):
        made, both, inside = game(1000 + place, share)
        extra = {"candidates": both, "labels": inside} if labelled else {}
        found.append(ShadowTable(f"s{place}", made, **extra))
    return found


def population(rows: int = 400) -> pd.DataFrame:
    return people(rows, np.random.default_rng(77))


def scored(*parts: Any, seed: int = 0, **rest: Any) -> pd.DataFrame:
    return audit_table(*parts, rng=np.random.default_rng(seed), **rest)


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": dict,
    "reference": lambda: {"reference": population()},
    "shadows": lambda: {"shadows": shadows(4, 0.5, labelled=False)},
    "labelled": lambda: {"shadows": shadows(4, 0.5), "reference": population()},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_follow_the_candidates_and_the_seed_and_never_the_label(
    name: str, tmp_path: Path
) -> None:
    made, both, inside = game(0, 0.5)
    given = {**SETTINGS[name](), "cache": None if name == "labelled" else tmp_path}
    found = scored(made, both, **given)
    given["cache"] = tmp_path
    assert np.isfinite(found.to_numpy()).all()
    assert len(found) == len(both) and list(found)[-1] == "combined"
    pd.testing.assert_frame_equal(found, scored(made, both, **given))
    order = np.random.default_rng(1).permutation(len(both))
    moved = scored(made, both.iloc[order], **given)
    np.testing.assert_allclose(moved.to_numpy(), found.to_numpy()[order], rtol=1e-5, atol=1e-6)
    for labels in (inside, ~inside):
        remarks: list[str] = []
        told = both.assign(member=labels.astype(int), id=range(len(both)))
        again = scored(made, told, **given, progress=remarks.append)
        pd.testing.assert_frame_equal(again, found)
        assert any("['member', 'id'] are ignored" in remark for remark in remarks)


@pytest.mark.parametrize("name", SETTINGS)
def test_copies_get_the_highest_scores_and_a_fresh_table_none(name: str, tmp_path: Path) -> None:
    given = {**SETTINGS[name](), "cache": tmp_path}
    made, both, inside = game(3, 1.0)
    combined = scored(made, both, **given)["combined"].to_numpy()
    assert auc(combined[inside], combined[~inside]) > 0.95
    areas = []
    for seed in range(4):
        made, both, inside = game(10 + seed, 0.0)
        combined = scored(made, both, **given)["combined"].to_numpy()
        areas.append(auc(combined[inside], combined[~inside]))
    low, high = null_band(4 * ROWS, 4 * ROWS)
    assert low < np.mean(areas) < high


def test_a_p_leak_has_the_auc_that_theory_gives(tmp_path: Path) -> None:
    given = {"shadows": shadows(4, 0.5), "reference": population(), "cache": tmp_path}
    areas = []
    for seed in range(3):
        made, both, inside = game(20 + seed, 0.5)
        found = scored(made, both, **given)
        areas.append(auc(*(found["combined"].to_numpy()[w] for w in (inside, ~inside))))
    assert abs(np.mean(areas) - 0.75) < 0.07


def test_a_shadow_with_the_audited_rows_is_left_out() -> None:
    made, both, inside = game(0, 0.0)
    turned = made.iloc[::-1].astype({"income": "float32"})
    given = shadows(4, 0.5)
    remarks: list[str] = []
    twin = ShadowTable("twin", turned, both, inside)
    found = scored(made, both, shadows=[*given, twin], progress=remarks.append)
    assert any("'twin': its synthetic table is the audited one; left out" in r for r in remarks)
    names = ["shadow_z", "shadow_density", "combined"]
    plain = scored(made, both, shadows=given)
    areas = [auc(*(one["combined"].to_numpy()[w] for w in (inside, ~inside)))
             for one in (found, plain)]  # fmt: skip
    assert abs(areas[0] - areas[1]) < 0.1 and max(areas) < 0.65
    alone = scored(made, both, shadows=[twin])
    assert not set(names[:2]) & set(alone)


def test_every_row_leaves_out_equally_many_tables_and_those_that_saw_it() -> None:
    rng = np.random.default_rng(0)
    inside, own = rng.random((50, 8)) < 0.15, rng.integers(8, size=50)
    excluded = _excluded(inside, own, rng.random(inside.shape))
    assert len(set(excluded.sum(axis=1))) == 1
    assert not excluded[np.arange(50), own].any()
    inside[np.arange(50), own] = False
    few = inside.sum(axis=1) <= excluded.sum(axis=1)
    assert few.mean() >= 0.95 and excluded[few][inside[few]].all()


def test_shadows_that_saw_the_candidates_calibrate_as_well() -> None:
    made, both, inside = game(0, 0.6)
    rng = np.random.default_rng(5)
    fleet = []
    for place in range(8):
        seen = rng.random(len(both)) < 0.5
        table = leaky(both[seen].reset_index(drop=True), 0.6, rng)
        fleet.append(ShadowTable(f"f{place}", table, both, seen))
    found = scored(made, both, shadows=fleet)
    assert auc(*(found["combined"].to_numpy()[w] for w in (inside, ~inside))) > 0.7


def test_a_cached_classifier_gives_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, both, _ = game(0, 0.5)
    given = {"shadows": shadows(4, 0.5), "reference": population(), "cache": tmp_path / "new"}
    first = scored(made, both, **given)
    (stored,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(shadow_scores, "labelled_rows", None)
    pd.testing.assert_frame_equal(scored(made, both, **given), first)
    # Other candidates and another table share it; another seed or shadow does not.
    made, both, _ = game(9, 0.5)
    scored(made, both.iloc[:7], **given)
    for change in ({"seed": 1}, {"shadows": shadows(5, 0.5)}):
        with pytest.raises(TypeError):
            scored(made, both, **{**given, **change})
    stored.write_bytes(b"broken")
    with pytest.raises(UsageError, match="cannot be read; delete it"):
        scored(made, both, **given)


# -- what tables can do ------------------------------------------------------------------------


def _spoil(frame: pd.DataFrame, how: str) -> pd.DataFrame:
    frame = frame.copy()
    if how == "all missing":
        frame["rent"] = np.nan
    if how == "constant":
        frame["rooms"] = 3
    if how == "text":
        frame["age"] = frame["age"].astype(str)
    if how == "fractions":
        frame["age"] = frame["age"] + 0.25
    if how == "strange levels":
        frame.loc[frame.index[0], "job"] = "baker"
    if how == "infinite":
        frame.loc[frame.index[0], "income"] = np.inf
    if how == "one row":
        frame = frame.iloc[:1]
    if how == "repeated":
        frame = pd.concat([frame, frame])
    if how == "nullable":
        frame = frame.convert_dtypes()
    if how == "categories":
        frame["job"] = pd.Categorical(frame["job"])
    if how == "huge":
        frame.loc[frame.index[0], "income"] = 1e300
    if how == "flags":
        frame["flag"] = frame["rooms"] > 2
    if how == "dates":
        frame["day"] = pd.Timestamp("2020-01-01", tz="UTC") + pd.to_timedelta(frame["age"], "D")
    if how == "names":
        frame["name"] = [f"n{i}" for i in range(len(frame))]
    return frame


HOWS = ("all missing", "constant", "text", "fractions", "strange levels", "infinite", "one row",
        "repeated", "nullable", "categories", "huge")  # fmt: skip


@pytest.mark.parametrize("where", ["synthetic", "candidates", "both"])
@pytest.mark.parametrize("how", [*HOWS, "flags", "dates", "names"])
def test_odd_tables_are_scored(how: str, where: str) -> None:
    if how in ("flags", "dates", "names"):
        where = "all"
    made, both, _ = game(0, 0.5)
    made = made if where == "candidates" else _spoil(made, how)
    both = both if where == "synthetic" else _spoil(both, how)
    known = population(100)
    for given in ({}, {"reference": _spoil(known, how) if where == "all" else known}):
        found = scored(made, both, **given)
        assert len(found) == len(both)
        assert np.isfinite(found.to_numpy()).all()


def test_shadows_with_other_types_and_levels_are_scored() -> None:
    made, both, _ = game(0, 0.5)
    odd = [
        ShadowTable(one.name, _spoil(one.synthetic, how), _spoil(both, "strange levels"), labels)
        for how, one in zip(("text", "fractions", "nullable"), shadows(3, 0.5), strict=True)
        for labels in [np.arange(len(both)) % 2 == 0]
    ]
    assert np.isfinite(scored(made, both, shadows=odd).to_numpy()).all()
    one_row = [ShadowTable("tiny", made.iloc[:1])]
    assert np.isfinite(scored(made, both, shadows=one_row).to_numpy()).all()


def test_a_given_schema_names_the_columns_that_count() -> None:
    made, both, _ = game(0, 1.0)
    columns = (
        Column("income", "decimal", lower=-9.0, upper=9.0),
        Column("age", "integer", lower=0.0, upper=120.0),
        Column("job", "categorical", levels=("clerk", "nurse"), nullable=True),
    )
    found = scored(made, both, schema=Schema(columns), reference=population())
    fewer = [column.name for column in columns]
    assert found.equals(scored(made[fewer], both, schema=Schema(columns), reference=population()))
    with pytest.raises(UsageError, match="'age': in the schema but not in the synthetic table"):
        scored(made.drop(columns="age"), both, schema=Schema(columns))
    loose = relaxed(Schema(columns))
    assert all(column.nullable for column in loose.columns) and loose["age"].kind == "decimal"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": lambda f: f.drop(columns="age")}, "'age': the table candidates lacks it"),
        ({"reference": lambda f: f.drop(columns="job")}, "'job': the table reference lacks it"),
        ({"candidates": lambda f: pd.concat([f, f[["age"]]], axis=1)}, "candidates has it twice"),
        ({"candidates": lambda f: f.iloc[:0]}, "table candidates: has no rows"),
        ({"synthetic": lambda f: f.iloc[:0]}, "table synthetic: has no rows"),
        ({"reference": lambda f: f.iloc[:49]}, "reference: 49 rows; give at least 50"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    change: dict[str, Callable[[pd.DataFrame], pd.DataFrame]], message: str
) -> None:
    made, both, _ = game(0, 0.5)
    parts = {"synthetic": made, "candidates": both, "reference": population(100)}
    for where, spoil in change.items():
        parts[where] = spoil(parts[where])
    with pytest.raises(UsageError, match=message):
        audit_table(**parts, rng=np.random.default_rng(0))


def test_columns_that_no_table_varies_in_and_mixed_dates_are_refused() -> None:
    made, both, _ = game(0, 0.5)
    with pytest.raises(UsageError, match="one value only; nothing can be compared"):
        scored(made[["age"]].assign(age=1), both.assign(age=1))
    day = pd.Timestamp("2020-01-01") + pd.to_timedelta(made["age"], "D")
    with pytest.raises(UsageError, match="'day': dates in synthetic and texts in candidates"):
        scored(made.assign(day=day), both.assign(day="2020-01-01"))
    with pytest.raises(UsageError, match="holds periods"):
        scored(made.assign(day=day.dt.to_period("M")), both.assign(day=1))
    with pytest.raises(UsageError, match="two have this name"):
        scored(made, both, shadows=[ShadowTable("a", made), ShadowTable("a", made)])


def test_kinds_are_drafted_from_all_tables_together() -> None:
    one = pd.DataFrame({"few": [1, 2], "some": [0.5, 2], "text": ["7", "x"], "same": [1, 1]})
    two = pd.DataFrame({"few": [2, 9], "some": [1, 2], "text": ["y", "x"], "same": [1, 1]})
    many = pd.DataFrame({"n": range(FEW + 1)})
    schema, dropped = draft_schema({"one": one, "two": two}, list(one))
    assert dropped == ["same"]
    assert schema["few"].levels == ("1", "2", "9", "(other)")
    assert (schema["some"].kind, schema["some"].lower, schema["some"].upper) == ("decimal", 0.5, 2)
    assert schema["text"].levels == ("7", "x", "y", "(other)")
    assert draft_schema({"many": many}, ["n"])[0]["n"].kind == "decimal"
    names = pd.DataFrame({"n": [f"n{i}" for i in range(MAX_LEVELS + 5)] + ["n7", "(other)"]})
    wide = draft_schema({"names": names}, ["n"])[0]["n"]
    assert len(wide.levels) == MAX_LEVELS and "n7" in wide.levels
    wait = unstamped(pd.Series(pd.to_timedelta([1, 2], "h")), "here")
    assert list(wait) == [3600.0, 7200.0]


# -- folders -----------------------------------------------------------------------------------


def test_sub_folders_are_read(tmp_path: Path) -> None:
    made, both, inside = game(0, 0.5)
    for name, ending in (("a", ".parquet"), ("b", ".csv")):
        (tmp_path / name).mkdir()
        write = (lambda f, p: f.to_parquet(p)) if ending == ".parquet" else (
            lambda f, p: f.to_csv(p, index=False))  # fmt: skip
        write(made, tmp_path / name / f"synthetic{ending}")
        write(both.assign(member=inside.astype(int)), tmp_path / name / f"candidates{ending}")
    both[inside].to_parquet(tmp_path / "a" / "members.parquet")
    (tmp_path / "c").mkdir()
    made.to_parquet(tmp_path / "c" / "synthetic.parquet")
    found = read_shadows(tmp_path)
    assert [one.name for one in found] == ["a", "b", "c"]
    for one in found[:2]:
        assert one.labels is not None and one.candidates is not None
        np.testing.assert_array_equal(one.labels, inside)
        assert "member" not in one.candidates
    assert found[0].members is not None and len(found[0].members) == ROWS
    assert found[2].labels is None
    assert len(scored(made.iloc[5:], both, shadows=found)) == len(both)


def flat(folder: Path) -> None:
    """The flat layout: three models whose members overlap in a reference with ids."""
    rng = np.random.default_rng(0)
    plain = people(300, rng)
    pool = plain.assign(key=range(300, 600), account=1)
    made, asked, listed = [], [], []
    for model in (1, 2, 3):
        rows = np.sort(rng.permutation(300)[:150])
        made.append(leaky(plain.iloc[rows], 0.5, rng).assign(phase="train", model=model))
        asked.append(people(20, rng).assign(model=model, key=0, member=np.arange(20) % 2))
        listed.append(pool.iloc[rows][["income", "key", "account"]].assign(model=model))
    pd.concat(made).to_parquet(folder / "synthetic.parquet")
    pd.concat(asked).to_parquet(folder / "challenge.parquet")
    pd.concat(listed[:2]).to_parquet(folder / "train_members.parquet")
    pool.assign(income=pool["income"].round(0)).to_parquet(folder / "reference.parquet")


def test_the_flat_layout_is_read(tmp_path: Path) -> None:
    flat(tmp_path)
    found = read_shadows(tmp_path)
    assert [one.name for one in found] == ["model 1", "model 2", "model 3"]
    assert [None if one.members is None else len(one.members) for one in found] == [150, 150, None]
    assert list(found[0].synthetic) == ["income", "rent", "age", "job", "rooms"]
    labels = found[2].labels
    assert labels is not None and labels.sum() == 10
    remarks: list[str] = []
    made, both, _ = game(0, 0.5)
    scored(made, both, shadows=found, progress=remarks.append)
    # 3 · 20 candidates and as many listed members as unlisted rows: 75 or so of each, twice.
    (fitted,) = [one for one in remarks if one.startswith("classifier: fitted")]
    assert 60 + 200 < int(fitted.split()[3]) <= 60 + 600


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "synthetic.parquet").unlink(), "no synthetic.parquet or synthetic.csv"),
        (lambda d: _rewrite(d / "synthetic.parquet", lambda f: f.drop(columns="model")),
         "no column 'model'"),
        (lambda d: _rewrite(d / "challenge.parquet", lambda f: f.drop(columns="member")),
         "have no column 'member'"),
        (lambda d: _rewrite(d / "challenge.parquet", lambda f: f.assign(member=2)),
         "must be 0 or 1 in every row"),
        (lambda d: _rewrite(d / "train_members.parquet", lambda f: f.drop(columns="key")),
         "share no column that is unique"),
    ],
)  # fmt: skip
def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    flat(tmp_path)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        read_shadows(tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        read_shadows(tmp_path / "nowhere")


def _rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_parquet(path)).to_parquet(path)


def test_a_shadow_tells_all_or_nothing() -> None:
    made, both, inside = game(0, 0.5)
    with pytest.raises(UsageError, match="its synthetic table has no rows"):
        ShadowTable("s", made.iloc[:0])
    with pytest.raises(UsageError, match="give candidates and labels, or neither"):
        ShadowTable("s", made, both)
    with pytest.raises(UsageError, match=r"labels int64 \(120,\) for 120 candidates"):
        ShadowTable("s", made, both, inside.astype(int))


def test_diffusion_models_of_the_midst_challenge(shared_data: Callable[[str], Path]) -> None:
    parts = {
        name: pd.read_parquet(shared_data(f"midst/{name}.parquet"))
        for name in ("synthetic", "challenge")
    }
    drop = ["phase", "model"]
    made, asked = (
        {model: rows.drop(columns=drop) for model, rows in part.groupby("model")}
        for part in parts.values()
    )
    models = sorted(made)[:10]
    others = [ShadowTable(f"m{m}", made[m]) for m in models]
    members, strangers = [], []
    for model in models[:5]:
        found = scored(made[model], asked[model], shadows=others)["combined"].to_numpy()
        inside = asked[model]["member"].to_numpy() == 1
        members.append(found[inside])
        strangers.append(found[~inside])
    pooled = auc(np.concatenate(members), np.concatenate(strangers))
    # .616 over all fifty; its standard error here is .018.
    assert 0.56 < pooled < 0.68
