"""Schema and Column: what they hold comes back, what they cannot hold is refused, with one line."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpsynth.checks import (
    RefusedError,
    UsageError,
    check_choice,
    check_count,
    check_fraction,
    check_positive,
)
from dpsynth.schema import FORMAT, MAX_LEVELS, Column, Schema

AGE = Column("age", "integer", lower=17, upper=90)
SEX = Column("sex", "categorical", ("Female", "Male"))
PAY = Column("pay", "decimal", lower=0, upper=9.5, step=0.5, nullable=True)
SCHEMA = Schema((AGE, SEX, PAY), target="sex", expected_rows=100)

names = st.text(min_size=1, max_size=8)
categorical = st.builds(
    Column,
    name=names,
    kind=st.just("categorical"),
    levels=st.lists(st.text(max_size=6), min_size=2, max_size=6, unique=True).map(tuple),
    nullable=st.booleans(),
    ordered=st.booleans(),
    provenance=st.sampled_from(["declared", "data"]),
)


@st.composite
def numeric(draw: st.DrawFn) -> Column:
    kind = draw(st.sampled_from(["integer", "decimal"]))
    bound = st.integers(-(2**40), 2**40)
    if kind == "decimal":
        bound = st.floats(allow_nan=False, allow_infinity=False)
    lower, upper = sorted(draw(st.lists(bound, min_size=2, max_size=2, unique=True)))
    step = draw(st.none() | st.floats(0.001, 10)) if kind == "decimal" else None
    nullable = draw(st.booleans())
    return Column(draw(names), kind, lower=lower, upper=upper, step=step, nullable=nullable)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    unique = st.lists(categorical | numeric(), min_size=1, max_size=5, unique_by=lambda c: c.name)
    columns = tuple(draw(unique))
    target = draw(st.none() | st.sampled_from([c.name for c in columns]))
    return Schema(columns, target, draw(st.none() | st.integers(1, 10**9)))


# Round trips


@given(schemas())
def test_json_round_trip(schema):
    assert Schema.from_json(schema.to_json()) == schema


@given(categorical | numeric())
def test_column_round_trip_leaves_defaults_out(column):
    facts = column.to_dict()
    assert Column.from_dict(json.loads(json.dumps(facts))) == column
    assert all(facts.get(key, True) for key in ("nullable", "ordered", "levels"))


def test_file_round_trip(tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(SCHEMA.to_json(), encoding="utf-8")
    assert Schema.load(path) == Schema.load(str(path)) == SCHEMA
    assert json.loads(path.read_text())["format"] == FORMAT


@given(schemas(), st.data())
def test_select_and_drop_are_complements(schema, data):
    kept = data.draw(st.lists(st.sampled_from(schema.names), min_size=1, unique=True))
    chosen = schema.select(kept)
    assert chosen.names == kept
    assert chosen.target == (schema.target if schema.target in kept else None)
    assert chosen.expected_rows == schema.expected_rows
    in_order = [name for name in schema.names if name in kept]
    gone = [name for name in schema.names if name not in kept]
    assert schema.drop(gone) == schema.select(in_order)


def test_columns_are_found_by_name():
    assert SCHEMA["pay"] is PAY
    assert [c.numeric for c in SCHEMA.columns] == [True, False, True]


def test_integers_step_by_one():
    assert AGE.step == 1
    assert Column("n", "integer", lower=0, upper=1, step=1).step == 1
    assert PAY.step == 0.5
    assert Column("d", "decimal", lower=0, upper=1).step is None


# Refusals of a column

BAD_COLUMNS = {
    "unknown kind": (
        {"kind": "text"},
        r"kind of column 'c'=text: unknown; choose one of categorical, decimal, integer",
    ),
    "unknown provenance": (
        {"kind": "decimal", "lower": 0, "upper": 1, "provenance": "guess"},
        r"provenance of column 'c'=guess: unknown; choose one of data, declared",
    ),
    "categorical with lower": (
        {"kind": "categorical", "levels": ("a", "b"), "lower": 0},
        r"'c': categorical, so it takes levels, not bounds",
    ),
    "categorical with upper": (
        {"kind": "categorical", "levels": ("a", "b"), "upper": 0},
        r"'c': categorical, so it takes levels, not bounds",
    ),
    "categorical with step": (
        {"kind": "categorical", "levels": ("a", "b"), "step": 1},
        r"'c': categorical, so it takes levels, not bounds",
    ),
    "level twice": (
        {"kind": "categorical", "levels": ("a", "b", "a")},
        r"'c': a level is listed twice",
    ),
    "one level": ({"kind": "categorical", "levels": ("a",)}, r"'c': constant \(1 level\)"),
    "no level": ({"kind": "categorical"}, r"'c': constant \(0 level\)"),
    "many levels": (
        {"kind": "categorical", "levels": tuple(map(str, range(MAX_LEVELS + 1)))},
        rf"'c': {MAX_LEVELS + 1} levels, more than {MAX_LEVELS}",
    ),
    "numeric with levels": (
        {"kind": "integer", "lower": 0, "upper": 1, "levels": ("a", "b")},
        r"'c': integer, so it takes bounds, not levels",
    ),
    "numeric and ordered": (
        {"kind": "decimal", "lower": 0, "upper": 1, "ordered": True},
        r"'c': decimal, so it takes bounds, not levels",
    ),
    "no lower": ({"kind": "decimal", "upper": 1}, r"'c': decimal needs lower and upper bounds"),
    "no upper": ({"kind": "integer", "lower": 1}, r"'c': integer needs lower and upper bounds"),
    "infinite lower": (
        {"kind": "decimal", "lower": -math.inf, "upper": 1},
        r"'c': bounds -inf\.\.1 must be finite",
    ),
    "NaN upper": (
        {"kind": "decimal", "lower": 0, "upper": math.nan},
        r"'c': bounds 0\.\.nan must be finite",
    ),
    "equal bounds": ({"kind": "integer", "lower": 3, "upper": 3}, r"reversed bounds 3\.\.3"),
    "reversed bounds": ({"kind": "decimal", "lower": 4, "upper": 3}, r"reversed bounds 4\.\.3"),
    "fractional lower": (
        {"kind": "integer", "lower": 0.5, "upper": 3},
        r"'c': integer bounds 0\.5\.\.3 must be whole",
    ),
    "fractional upper": (
        {"kind": "integer", "lower": 0, "upper": 2.5},
        r"'c': integer bounds 0\.\.2\.5 must be whole",
    ),
    "integer step": (
        {"kind": "integer", "lower": 0, "upper": 4, "step": 2},
        r"'c': step=2; integers step by 1",
    ),
    "zero step": (
        {"kind": "decimal", "lower": 0, "upper": 4, "step": 0},
        r"step of column 'c'=0: must be a number above 0",
    ),
}


@pytest.mark.parametrize("case", BAD_COLUMNS)
def test_bad_column_is_refused(case):
    facts, message = BAD_COLUMNS[case]
    with pytest.raises(UsageError, match=message) as caught:
        Column("c", **facts)
    assert "\n" not in str(caught.value)


def test_as_many_levels_as_allowed_are_taken():
    levels = tuple(map(str, range(MAX_LEVELS)))
    assert len(Column("c", "categorical", levels).levels) == MAX_LEVELS


# Refusals of a schema


def test_bad_schema_is_refused():
    with pytest.raises(UsageError, match="schema has no columns"):
        Schema(())
    with pytest.raises(UsageError, match="'age' is declared twice"):
        Schema((AGE, SEX, AGE))
    with pytest.raises(UsageError, match=r"target='wage': no such column; choose one of"):
        Schema((AGE, SEX), target="wage")
    with pytest.raises(UsageError, match="expected_rows=0: must be a whole number of at least 1"):
        Schema((AGE, SEX), expected_rows=0)


def test_unknown_column_is_refused():
    for call in (lambda: SCHEMA["wage"], lambda: SCHEMA.select(["wage"])):
        with pytest.raises(UsageError, match="'wage': not in the schema; choose one of"):
            call()
    with pytest.raises(UsageError, match="'wage': not in the schema"):
        SCHEMA.drop(["wage"])
    with pytest.raises(UsageError, match="no columns"):
        SCHEMA.drop(SCHEMA.names)


def test_facts_read_off_the_data_are_refused_by_policy():
    SCHEMA.check_public()
    drafted = Schema((AGE, Column("s", "categorical", ("a", "b"), provenance="data")))
    with pytest.raises(RefusedError, match=r"column 's': .* read off the data"):
        drafted.check_public()


# Refusals of a schema file

AGE_TEXT = '{"name": "age", "kind": "integer", "lower": 17, "upper": 90}'
BAD_TEXTS = {
    "not JSON": ("{", "schema is not JSON: "),
    "a list": ("[]", "schema needs a list 'columns'"),
    "no columns": ("{}", "schema needs a list 'columns'"),
    "columns no list": ('{"columns": {"age": {}}}', "schema needs a list 'columns'"),
    "unknown key": (f'{{"columns": [{AGE_TEXT}], "rows": 3}}', "schema: unknown key 'rows'"),
    "newer format": (f'{{"columns": [{AGE_TEXT}], "format": 99}}', "schema format=99: .* reads 1"),
    "unknown column key": (
        '{"columns": [{"name": "a", "kind": "integer", "min": 0}]}',
        "schema column 'a': unknown key 'min'",
    ),
    "no kind": ('{"columns": [{"name": "a"}]}', "needs a name and a kind"),
    "no name": ('{"columns": [{"kind": "integer"}]}', "needs a name and a kind"),
    "column a number": ('{"columns": [1]}', "column"),
    "column a text": ('{"columns": ["age"]}', "column"),
    "name a number": ('{"columns": [{"name": 1, "kind": "integer", "lower": 0, "upper": 1}]}', "1"),
    "levels a text": (
        '{"columns": [{"name": "a", "kind": "categorical", "levels": "abc"}]}',
        "'a'",
    ),
    "levels null": ('{"columns": [{"name": "a", "kind": "categorical", "levels": null}]}', "'a'"),
    "bound a text": (
        '{"columns": [{"name": "a", "kind": "integer", "lower": "1", "upper": 3}]}',
        "'a'",
    ),
    "step a text": (
        '{"columns": [{"name": "a", "kind": "decimal", "lower": 1, "upper": 3, "step": "x"}]}',
        "'a'",
    ),
    "nullable a text": (
        '{"columns": [{"name": "a", "kind": "integer", "lower": 1, "upper": 3, "nullable": "no"}]}',
        "'a'",
    ),
    "rows a text": (f'{{"columns": [{AGE_TEXT}], "expected_rows": "many"}}', "expected_rows=many"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_schema_file_is_refused(case):
    text, message = BAD_TEXTS[case]
    with pytest.raises(UsageError, match=message) as caught:
        Schema.from_json(text)
    assert "\n" not in str(caught.value)


def test_missing_schema_file_is_refused(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            Schema.load(path)


# Drafting


def test_infer_reads_kinds_bounds_and_gaps():
    frame = pd.DataFrame(
        {
            "whole": [3.0, 1.0, 2.0, None],
            "part": [0.5, 1.0, 2.0, 3.0],
            "flag": [0.0, 1.0, 0.0, None],
            "truth": [True, False, True, True],
            "word": ["b", "a", "c", "a"],
        }
    )
    schema = Schema.infer(frame, target="word")
    facts = {"provenance": "data"}
    assert schema == Schema(
        (
            Column("whole", "integer", lower=1, upper=3, nullable=True, **facts),
            Column("part", "decimal", lower=0.5, upper=3, step=0.1, **facts),
            Column("flag", "categorical", ("0", "1"), nullable=True, **facts),
            Column("truth", "categorical", ("False", "True"), **facts),
            Column("word", "categorical", ("a", "b", "c"), **facts),
        ),
        target="word",
    )
    with pytest.raises(RefusedError):
        schema.check_public()


BAD_FRAMES = {
    "no rows": (pd.DataFrame({"a": []}), "table has no rows"),
    "no columns": (pd.DataFrame(), "table has no rows"),
    "all missing": (pd.DataFrame({"a": [None, np.nan]}), "'a': all values are missing"),
    "constant": (pd.DataFrame({"a": [1, 1]}), "'a': constant"),
    "constant with gaps": (pd.DataFrame({"a": ["x", None]}), "'a': constant"),
    "infinite": (pd.DataFrame({"a": [1.0, 2.0, np.inf]}), "'a': holds an infinite value"),
    "one or infinite": (pd.DataFrame({"a": [1.0, np.inf]}), "'a': holds an infinite value"),
    "too many levels": (pd.DataFrame({"a": [f"v{i}" for i in range(MAX_LEVELS + 1)]}), "levels"),
    "name twice": (pd.DataFrame([[1, 2], [3, 4]], columns=["a", "a"]), "'a'"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_frame_that_no_schema_fits_is_refused(case):
    frame, message = BAD_FRAMES[case]
    with pytest.raises(UsageError, match=message):
        Schema.infer(frame)


# Argument checks


@pytest.mark.parametrize("value", [0, -1, -0.0, math.nan, -math.inf, math.inf, "one", None])
def test_check_positive_refuses(value):
    with pytest.raises(UsageError, match=f"sigma={value}: must be a number above 0"):
        check_positive("sigma", value)


@pytest.mark.parametrize("value", [0, 2, -3, 1.5, math.nan, math.inf, -math.inf, "many", None])
def test_check_count_refuses(value):
    with pytest.raises(UsageError, match=f"n={value}: must be a whole number of at least 3"):
        check_count("n", value, least=3)


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, math.nan, math.inf, "half", None])
def test_check_fraction_refuses(value):
    with pytest.raises(UsageError, match=f"q={value}: must lie strictly between 0 and 1"):
        check_fraction("q", value)


@pytest.mark.parametrize("value", ["vea", 3, None, ["vae"]])
def test_check_choice_refuses_and_lists_what_is_known(value):
    for known in (["vae", "gan"], {"vae": 1, "gan": 2}):
        with pytest.raises(UsageError) as caught:
            check_choice("model", value, known)
        assert str(caught.value) == f"model={value}: unknown; choose one of gan, vae"


def test_checks_let_good_values_through():
    check_positive("sigma", 1e-300)
    check_positive("epsilon", math.inf, allow_inf=True)
    check_count("n", 1)
    check_count("n", np.int64(3), least=3)
    check_count("n", 0, least=0)
    check_fraction("q", 0.5)
    check_choice("model", "gan", ("vae", "gan"))


def test_refusal_is_a_usage_error_is_a_value_error():
    assert issubclass(RefusedError, UsageError)
    assert issubclass(UsageError, ValueError)
