"""Schema and Column: what they hold comes back, what they cannot hold is refused, with one line."""

import json
import math
from dataclasses import replace

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
from dpsynth.schema import FORMAT, MAX_LEVELS, Column, Schema, as_level

AGE = Column("age", "integer", lower=17, upper=90)
SEX = Column("sex", "categorical", ("Female", "Male"))
PAY = Column("pay", "decimal", lower=0, upper=9.5, step=0.5, nullable=True)
NOISY = {"mechanism": "gaussian", "sigma": 2.0, "steps": 1, "when": "then"}
FAILED = {"mechanism": "failure", "delta": 1e-7, "when": "then"}
UNDER = {"unit": "record", "contributions": 1, "noise": "philox:seed"}
SCHEMA = Schema((AGE, SEX, PAY), target="sex", expected_rows=100)

names = st.text(min_size=1, max_size=8)


@st.composite
def categorical_columns(draw: st.DrawFn) -> Column:
    levels = draw(st.lists(st.text(max_size=6), min_size=2, max_size=6, unique=True))
    opened = draw(st.booleans())
    return Column(
        draw(names),
        "categorical",
        tuple(levels[: draw(st.integers(0, 6))] if opened else levels),
        nullable=draw(st.booleans()),
        ordered=draw(st.booleans()) and not opened,
        provenance=draw(st.sampled_from(["declared", "data", "measured"])),
        source=draw(st.text(max_size=6)),
        other=draw(st.none() | st.sampled_from(levels)),
        open=opened,
        max_levels=draw(st.none() | st.integers(1, 99)) if opened else None,
    )


categorical = categorical_columns()


@st.composite
def numeric(draw: st.DrawFn) -> Column:
    kind = draw(st.sampled_from(["integer", "decimal"]))
    bound = st.integers(-(2**40), 2**40)
    if kind == "decimal":
        bound = st.floats(allow_nan=False, allow_infinity=False)
    lower, upper = sorted(draw(st.lists(bound, min_size=2, max_size=2, unique=True)))
    step = draw(st.none() | st.floats(0.001, 10)) if kind == "decimal" else None
    nullable = draw(st.booleans())
    bounds = {"lower": lower, "upper": upper}
    for bound in draw(st.lists(st.sampled_from(["lower", "upper"]), unique=True)):
        bounds[bound] = None
    opened = None in bounds.values()
    return Column(draw(names), kind, **bounds, step=step, nullable=nullable, open=opened)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    unique = st.lists(categorical | numeric(), min_size=1, max_size=5, unique_by=lambda c: c.name)
    columns = tuple(draw(unique))
    target = draw(st.none() | st.sampled_from([c.name for c in columns]))
    event = st.builds(lambda what: {"what": what, **NOISY, **UNDER}, names)
    return Schema(
        columns,
        target,
        draw(st.none() | st.integers(1, 10**9)),
        draw(st.sampled_from(["declared", "data", "measured"])),
        draw(st.text(max_size=6)),
        tuple(draw(st.lists(event, max_size=2))),
    )


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
        r"provenance of column 'c'=guess: unknown; choose one of data, declared, measured",
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
    "other that is none": (
        {"kind": "categorical", "levels": ("a", "b"), "other": "c"},
        r"'c': other='c' is none of its levels",
    ),
    "other of a number": (
        {"kind": "integer", "lower": 0, "upper": 4, "other": "c"},
        r"'c': integer, so it takes bounds, not levels",
    ),
    "other a number": (
        {"kind": "categorical", "levels": ("a", "b"), "other": 1},
        r"'c': source and other must be texts",
    ),
    "source a number": (
        {"kind": "categorical", "levels": ("a", "b"), "source": 1},
        r"'c': source and other must be texts",
    ),
    "open a text": (
        {"kind": "categorical", "levels": ("a", "b"), "open": "yes"},
        r"'c': open='yes' must be true or false",
    ),
    "open and ordered": (
        {"kind": "categorical", "levels": ("a", "b"), "open": True, "ordered": True},
        r"'c': open, so the order of its levels is unknown",
    ),
    "open with bounds": (
        {"kind": "integer", "lower": 0, "upper": 4, "open": True},
        r"'c': open, but both bounds are given; close it",
    ),
    "open with a fraction": (
        {"kind": "integer", "lower": 0.5, "open": True},
        r"'c': integer bounds 0\.5\.\.None must be whole",
    ),
    "open with infinity": (
        {"kind": "decimal", "upper": math.inf, "open": True},
        r"'c': bounds None\.\.inf must be finite",
    ),
    "max_levels of a closed column": (
        {"kind": "categorical", "levels": ("a", "b"), "max_levels": 3},
        r"'c': max_levels=3 is for open columns",
    ),
    "max_levels of a number": (
        {"kind": "integer", "open": True, "max_levels": 3},
        r"'c': integer, so it takes bounds, not levels",
    ),
    "no max_levels": (
        {"kind": "categorical", "open": True, "max_levels": 0},
        r"max_levels of column 'c'=0: must be a whole number",
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


def test_a_measured_fact_is_public_only_beside_what_it_cost():
    def paid(what: str, *events: dict) -> tuple[dict, ...]:
        return tuple({"what": what, **event, **UNDER} for event in events)

    age = Schema((replace(AGE, provenance="measured"), SEX))
    sex = Schema((AGE, replace(SEX, provenance="measured")))
    rows = Schema((AGE, SEX), expected_rows=9, rows_provenance="measured")
    none = {"mechanism": "none", "steps": 1, "when": "then"}
    cases = [
        (age, "bounds:age", [NOISY], [[], [FAILED], [none], [NOISY, none]]),
        (sex, "levels:sex", [NOISY, FAILED], [[], [FAILED], [NOISY], [none, FAILED]]),
        (rows, "rows", [NOISY], [[], [FAILED], [none]]),
    ]
    for schema, what, enough, lacking in cases:
        replace(schema, spent=paid(what, *enough)).check_public()
        for events in lacking:
            with pytest.raises(RefusedError, match=f"event {what!r} paid for"):
                replace(schema, spent=paid(what, *events)).check_public()
        with pytest.raises(RefusedError, match="measured"):
            replace(schema, spent=paid(what + "x", *enough)).check_public()
    assert age.measured and sex.measured and not rows.measured


def test_every_fault_is_named_in_one_line():
    schema = Schema(
        (
            replace(AGE, provenance="data"),
            Column("pay", "decimal", open=True),
            Column("job", "categorical", open=True),
            replace(SEX, provenance="measured"),
        ),
        expected_rows=9,
        rows_provenance="data",
    )
    found = schema.faults()
    words = ["read off the data", "bounds are still open", "levels are still open", "'levels:sex'"]
    for fault, word in zip(found, [*words, "expected_rows=9: was read off"], strict=True):
        assert word in fault
        assert "\n" not in fault
    with pytest.raises(RefusedError) as caught:
        schema.check_public()
    assert str(caught.value) == found[0]
    assert replace(schema.select(["job"]), expected_rows=None).faults() == found[2:3]
    assert SCHEMA.faults() == []


def test_a_schema_can_be_looked_up_whatever_was_spent():
    spent = ({"what": "rows", **NOISY, **UNDER},)
    assert hash(replace(SCHEMA, spent=spent)) == hash(SCHEMA)
    assert replace(SCHEMA, spent=spent) != SCHEMA


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
    "other a number": (
        '{"columns": [{"name": "a", "kind": "categorical", "levels": ["x", "y"], "other": 1}]}',
        "'a'",
    ),
    "unknown provenance of rows": (
        f'{{"columns": [{AGE_TEXT}], "rows_provenance": "guess"}}',
        "rows_provenance=guess: unknown",
    ),
    "source a number": (f'{{"columns": [{AGE_TEXT}], "source": 1}}', "schema source=1"),
    "spent a number": (
        f'{{"columns": [{AGE_TEXT}], "spent": 1}}',
        "schema spent=1: must be a list",
    ),
    "spent a list of numbers": (f'{{"columns": [{AGE_TEXT}], "spent": [1]}}', "spent: 1 must be"),
    "spent on nothing": (f'{{"columns": [{AGE_TEXT}], "spent": [{{}}]}}', "spent None: what=None"),
    "spent by nobody": (
        f'{{"columns": [{AGE_TEXT}], "spent": [{{"what": "rows", "mechanism": "none"}}]}}',
        "spent 'rows': unit=None must be a text",
    ),
    "spent for no rows": (
        f'{{"columns": [{AGE_TEXT}], "spent": [{{"what": "rows", "mechanism": "none", "unit": '
        '"record", "noise": "x", "contributions": 0}]}',
        "contributions=0: must be a whole number",
    ),
    "spent for many rows": (
        f'{{"columns": [{AGE_TEXT}], "spent": [{{"what": "rows", "mechanism": "none", "unit": '
        '"record", "noise": "x", "contributions": "many"}]}',
        "contributions='many' must be a whole number",
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
    # How many rows there are is private; a draft does not tell.
    assert json.loads(schema.to_json())["expected_rows"] is None
    assert len(schema.faults()) == len(schema.columns)


def test_a_value_is_named_by_itself():
    """Were whole floats of a mixed column named otherwise, one text would rename all of them."""
    for values in ([1.0, 2.5, None], [1, 2.5, None], [1.0, 2.5, "x"], [1.0, 2.5, True]):
        names = as_level(pd.Series(values, dtype=object))
        assert names.tolist()[:2] == ["1", "2.5"]
    assert as_level(pd.Series([1.0, 2.5])).tolist() == ["1", "2.5"]
    assert as_level(pd.Series(["1.0", "2.50"])).tolist() == ["1.0", "2.50"]


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
