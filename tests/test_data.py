"""Table keeps to its schema whatever it is given; Split shares no row; files come back."""

import csv
import datetime
import decimal
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.data import Split, Table, read_frame, write_frame
from dpsynth.schema import Column, Schema

LEVELS = ("low", "high", "1", "2")
CATEGORY = Column("c", "categorical", LEVELS, nullable=True, ordered=True)
INTEGER = Column("i", "integer", lower=-3, upper=9, nullable=True)
OPEN_SET = Column("o", "categorical", ("a", "b", "rest"), nullable=True, other="rest")
DECIMAL = Column("d", "decimal", lower=-0.5, upper=9.5, nullable=True)
SCHEMA = Schema((CATEGORY, INTEGER, DECIMAL), target="c")
KINDS = [
    CATEGORY,
    INTEGER,
    DECIMAL,
    Column("c", "categorical", LEVELS),
    Column("i", "integer", lower=-3, upper=9),
    Column("d", "decimal", lower=-0.5, upper=9.5),
]

row = st.tuples(
    st.none() | st.sampled_from(LEVELS),
    st.none() | st.integers(-3, 9),
    st.none() | st.floats(-0.5, 9.5).map(lambda x: x + 0.0),
)


def frame_of(rows: list[tuple]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=SCHEMA.names)


def table_of(rows: list[tuple]) -> Table:
    return Table.from_frame(frame_of(rows), SCHEMA, strict=False)


def in_domain(values: pd.Series, column: Column) -> bool:
    """Whether dtype and every value are what the schema promises (an oracle of few words)."""
    if values.isna().any() and not column.nullable:
        return False
    present = values.dropna()
    if column.kind == "categorical":
        return list(values.cat.categories) == list(column.levels)
    assert column.lower is not None and column.upper is not None
    dtype = {"integer": "Int64", "decimal": "float64"}[column.kind]
    return values.dtype == dtype and bool(present.between(column.lower, column.upper).all())


odd = st.none() | st.text() | st.integers() | st.floats() | st.booleans() | st.dates()

# What Table.from_frame brings into shape


@given(st.lists(row, min_size=1, max_size=20))
def test_values_inside_the_domain_are_kept(rows):
    table = table_of(rows)
    assert len(table) == len(rows)
    for column, given_values in zip(SCHEMA.columns, zip(*rows, strict=True), strict=True):
        values = table.frame[column.name]
        assert in_domain(values, column)
        kept = [None if pd.isna(value) else value for value in values]
        assert kept == list(given_values)


@given(st.lists(row, min_size=1, max_size=20))
def test_from_frame_changes_nothing_the_second_time(rows):
    once = table_of(rows)
    again = Table.from_frame(once.frame, SCHEMA, strict=False)
    pd.testing.assert_frame_equal(once.frame, again.frame)
    assert once.digest() == again.digest()


def test_columns_take_the_order_of_the_schema_and_any_index():
    frame = frame_of([("low", 1, 0.5), ("high", 2, 1.5)])[["d", "c", "i"]]
    table = Table.from_frame(frame.set_axis([7, 7]), SCHEMA)
    assert list(table.frame.columns) == SCHEMA.names
    assert list(table.frame.index) == [0, 1]
    assert table.frame["c"].cat.ordered


def test_whole_floats_are_the_levels_they_look_like():
    schema = Schema((CATEGORY,))
    table = Table.from_frame(pd.DataFrame({"c": [1.0, 2.0, None]}), schema)
    assert table.frame["c"].dropna().tolist() == ["1", "2"]


def test_column_names_may_be_numbers():
    schema = Schema((Column("0", "integer", lower=0, upper=9),))
    assert Table.from_frame(pd.DataFrame({0: [1, 2]}), schema).frame["0"].tolist() == [1, 2]


# What it refuses


def refused(frame: pd.DataFrame, column: Column, message: str) -> None:
    """Strict refuses `frame` with `message`, in one line; without strict it is mended."""
    with pytest.raises(UsageError, match=message) as caught:
        Table.from_frame(frame, Schema((column,)))
    assert "\n" not in str(caught.value)
    mended = Table.from_frame(frame, Schema((column,)), strict=False)
    assert in_domain(mended.frame[column.name], column)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (CATEGORY, ["low", "middle"], "column 'c': level 'middle' is not declared"),
        (CATEGORY, [1.0, 3.0], r"column 'c': level '3(\.0)?' is not declared"),
        (INTEGER, [1, "many"], "column 'i': 'many' is not a number"),
        (DECIMAL, [1.0, np.inf], "column 'd': holds an infinite value"),
        (DECIMAL, [1.0, 9.6], r"column 'd': value 9\.6 is outside the declared bounds -0\.5\.\.9"),
        (INTEGER, [1, -4], r"column 'i': value -4 is outside the declared bounds -3\.\.9"),
        (INTEGER, [1, 1.5], "column 'i': holds fractions but is declared integer"),
        (KINDS[3], ["low", None], "column 'c': holds a missing value"),
        (KINDS[4], [1, None], "column 'i': holds a missing value"),
        (KINDS[5], [1.0, np.nan], "column 'd': holds a missing value"),
        (CATEGORY, [None, None], "column 'c': all values are missing"),
        (DECIMAL, [np.nan, np.nan], "column 'd': all values are missing"),
        (CATEGORY, ["low", "low"], "column 'c': constant"),
        (INTEGER, [3, 3], "column 'i': constant"),
    ],
)
def test_value_outside_the_domain_is_refused(column, values, message):
    refused(pd.DataFrame({column.name: pd.Series(values, dtype=object)}), column, message)
    refused(pd.DataFrame({column.name: values}), column, message)


@pytest.mark.parametrize("strict", [True, False])
def test_other_columns_or_no_rows_are_refused(strict):
    frame = frame_of([("low", 1, 0.5), ("high", 2, 1.5)])
    cases = {
        "column 'd': in the schema but not in the table": frame[["c", "i"]],
        "column 'x': in the table but not in the schema": frame.assign(x=1),
        "table has no rows": frame.iloc[:0],
        "column 'c'.* twice": frame[["c", "c", "i", "d"]],
    }
    for message, bad in cases.items():
        with pytest.raises(UsageError, match=message):
            Table.from_frame(bad, SCHEMA, strict=strict)


def test_a_single_row_is_not_called_constant():
    assert len(Table.from_frame(frame_of([("low", 1, 0.5)]), SCHEMA)) == 1


# strict=False: nothing about a value is ever reported

ODD = {
    "numbers": [1, 2.5, -7, 1e300, -1e300],
    "infinities": [np.inf, -np.inf, np.nan, 1.0],
    "whole and infinite": [1.0, np.inf],
    "beyond 64 bits": [1e300, 2.0],
    "beyond a double": [10**400, 1],
    "big integers": [10**30, -(10**30)],
    "texts": ["low", "1.0", "1e5", "", " 1", "nan", "inf", "0x10"],
    "mixed": ["low", 1, 2.0, None, pd.NA, pd.NaT, True],
    "truth values": [True, False],
    "complex": [complex(1, 2), 1],
    "containers": [[1], {"a": 1}, (1, 2), {3}],
    "bytes": [b"low", "low"],
    "objects": [object(), len, Column],
    "exact decimals": [decimal.Decimal("1.5"), decimal.Decimal("NaN")],
    "dates": [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1)],
    "times": pd.to_datetime(["2020-01-01", None]),
    "time zones": pd.to_datetime(["2020-01-01", None]).tz_localize("UTC"),
    "durations": pd.to_timedelta([1, None], unit="D"),
    "periods": pd.period_range("2020", periods=2, freq="Y"),
    "intervals": pd.interval_range(0, 2),
    "foreign categories": pd.Categorical(["low", "never seen", None]),
    "number categories": pd.Categorical([1.5, 2.0]),
    "masked integers": pd.array([1, None, 99], dtype="Int64"),
    "masked truth values": pd.array([True, None], dtype="boolean"),
    "small floats": np.array([1.5, np.inf], dtype=np.float16),
    "unsigned": np.array([1, 2**64 - 1], dtype=np.uint64),
    "all missing": [None, None],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("column", KINDS, ids=lambda c: f"{c.kind}-{c.nullable}")
@pytest.mark.parametrize("case", ODD)
def test_not_strict_never_reports_and_never_lets_through(case, column):
    frame = pd.DataFrame({column.name: pd.Series(ODD[case])})
    table = Table.from_frame(frame, Schema((column,)), strict=False)
    assert len(table) == len(frame)
    assert in_domain(table.frame[column.name], column)


@pytest.mark.parametrize("column", KINDS, ids=lambda c: f"{c.kind}-{c.nullable}")
@given(values=st.lists(odd, min_size=1))
def test_not_strict_takes_any_mixture(column, values):
    frame = pd.DataFrame({column.name: pd.Series(values, dtype=object)})
    table = Table.from_frame(frame, Schema((column,)), strict=False)
    assert in_domain(table.frame[column.name], column)


@settings(max_examples=30)
@pytest.mark.parametrize("column", KINDS, ids=lambda c: f"{c.kind}-{c.nullable}")
@given(
    values=st.lists(st.sampled_from([1.0, 2.0, 1.5, 40.0]) | st.floats(), min_size=2, max_size=4)
    | st.lists(odd, min_size=2, max_size=4)
)
def test_a_row_is_conformed_by_itself(column, values):
    """Sensitivity: if one row could change how another is read, adding it would move them all."""
    schema = Schema((column,))
    frame = pd.DataFrame({column.name: pd.Series(values)})
    whole = Table.from_frame(frame, schema, strict=False).frame
    alone = [
        Table.from_frame(frame.iloc[[i]], schema, strict=False).frame for i in range(len(frame))
    ]
    pd.testing.assert_frame_equal(whole, pd.concat(alone, ignore_index=True))


def test_not_strict_clips_rounds_and_fills():
    def mended(column: Column, values: list) -> list:
        frame = pd.DataFrame({column.name: pd.Series(values, dtype=object)})
        series = Table.from_frame(frame, Schema((column,)), strict=False).frame[column.name]
        return [None if pd.isna(value) else value for value in series]

    assert mended(INTEGER, [-9, 99, 1.6, "x", np.inf]) == [-3, 9, 2, None, None]
    assert mended(KINDS[4], [-9, 99, 1.6, "x", None]) == [-3, 9, 2, -3, -3]
    assert mended(DECIMAL, [-9, 99, 1.6, "x", -np.inf]) == [-0.5, 9.5, 1.6, None, None]
    assert mended(KINDS[5], [-9, 99, 1.6, "x", None]) == [-0.5, 9.5, 1.6, -0.5, -0.5]
    assert mended(CATEGORY, ["high", "x", None]) == ["high", None, None]
    assert mended(KINDS[3], ["high", "x", None]) == ["high", "low", "low"]
    assert mended(OPEN_SET, ["a", "x", None]) == ["a", "rest", None]
    assert mended(replace(OPEN_SET, nullable=False), ["b", "x", None]) == ["b", "rest", "rest"]


def test_a_stray_level_is_refused_even_where_there_is_an_other():
    frame = pd.DataFrame({"o": ["a", "b", "x"]})
    for column, advice in (
        (OPEN_SET, "add it to the schema"),
        (replace(OPEN_SET, provenance="measured"), r"strict=False \(data\.strict=false\)"),
    ):
        message = f"column 'o': level 'x' is not declared; .*{advice}"
        with pytest.raises(UsageError, match=message):
            Table.from_frame(frame, Schema((column,)))


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_keeps_to_an_open_column(strict):
    for column in (
        Column("c", "categorical", open=True),
        Column("c", "categorical", ("low", "high"), open=True),
        Column("c", "integer", lower=0, open=True),
    ):
        with pytest.raises(UsageError, match="column 'c': is open; measure it with"):
            Table.from_frame(pd.DataFrame({"c": ["low", "high"]}), Schema((column,)), strict=strict)


def test_a_number_is_the_same_number_in_whatever_company():
    column = Column("d", "decimal", lower=-1e6, upper=1e6, nullable=True)
    cells = ["0.1", 2, 3.5, True, "TRUE", " false ", 1 + 0j, 10**400, "1e400", "x", b"5", 1j]
    expected = [0.1, 2, 3.5, 1, 1, 0, 1, None, None, None, 5, None]
    for company in ([], ["x"], [None], [1 + 1j], [True], [0.5], [10**30]):
        frame = pd.DataFrame({"d": pd.Series([*cells, *company], dtype=object)})
        read = Table.from_frame(frame, Schema((column,)), strict=False).frame["d"]
        assert [None if pd.isna(value) else value for value in read[: len(cells)]] == expected


# Parts of a table


@given(st.lists(row, min_size=1, max_size=20), st.data())
def test_take_and_select(rows, data):
    table = table_of(rows)
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=30))
    taken = table.take(np.array(picked, dtype=int))
    assert list(taken.frame.index) == list(range(len(picked)))
    expected = table.frame.iloc[picked].reset_index(drop=True)
    pd.testing.assert_frame_equal(taken.frame, expected)
    part = table.select(["d", "c"])
    assert part.schema == SCHEMA.select(["d", "c"])
    assert list(part.frame.columns) == ["d", "c"]


@given(st.lists(row, min_size=1, max_size=10), st.lists(row, min_size=1, max_size=10))
def test_digest_tells_tables_apart(one, two):
    a, b = table_of(one), table_of(two)
    assert (a.digest() == b.digest()) == a.frame.equals(b.frame)


def test_digest_covers_the_schema():
    table = table_of([("low", 1, 0.5)])
    assert table.digest() != Table(Schema(SCHEMA.columns), table.frame).digest()


# Split


def keys(table: Table) -> list[tuple]:
    return [tuple(map(str, values)) for values in table.frame.itertuples(index=False)]


def check_disjoint(split: Split, source: Table) -> None:
    """No row twice, none lost: parts together are the de-duplicated source."""
    together = [
        key for part in (split.members, split.holdout, split.reference) for key in keys(part)
    ]
    assert len(set(together)) == len(together)
    assert set(together) == set(keys(source))


many_rows = st.lists(row, min_size=20, max_size=60).filter(lambda rows: len(set(rows)) >= 20)


def split_or_none(table: Table, seed: int, **shares: float) -> Split | None:
    """`None` where chance left a part with fewer than two rows."""
    try:
        return Split.random(table, np.random.default_rng(seed), **shares)
    except UsageError:
        return None


@given(many_rows, st.integers(0, 2**32), st.floats(0.15, 0.4), st.floats(0.15, 0.4))
def test_random_split_is_disjoint_and_complete(rows, seed, holdout, reference):
    table = table_of(rows)
    split = split_or_none(table, seed, holdout=holdout, reference=reference)
    if split is not None:
        check_disjoint(split, table)


@given(many_rows, row, st.integers(0, 60), st.integers(0, 2**32))
def test_one_row_more_moves_no_other_row(rows, extra, place, seed):
    before = split_or_none(table_of(rows), seed)
    after = split_or_none(table_of([*rows[:place], extra, *rows[place:]]), seed)
    if before is None or after is None:
        return
    grown = 0
    for name in ("members", "holdout", "reference"):
        old, new = (set(keys(getattr(split, name))) for split in (before, after))
        assert old <= new
        grown += len(new - old)
    assert grown == (extra not in rows)


def test_shares_of_rows_are_right_on_average(adult):
    split = Split.random(adult, np.random.default_rng(0), holdout=0.3, reference=0.1)
    sizes = np.array([len(split.members), len(split.holdout), len(split.reference)])
    expected = sizes.sum() * np.array([0.6, 0.3, 0.1])
    assert stats.chisquare(sizes, expected).pvalue > 1e-3


@given(many_rows, st.integers(0, 2**32))
def test_official_split_is_disjoint_and_keeps_members_in_order(rows, seed):
    rows = [*sorted(set(rows), key=str), *rows]
    cut = 10
    table = table_of(rows)
    split = Split.official(table, cut, np.random.default_rng(seed))
    check_disjoint(split, table)
    assert keys(split.members) == list(dict.fromkeys(keys(table)[:cut]))
    assert len(split.reference) - len(split.holdout) in (0, 1)


def test_split_follows_its_generator(adult):
    def members(seed: int) -> str:
        return Split.random(adult, np.random.default_rng(seed)).members.digest()

    assert members(1) == members(1) != members(2)


def test_bad_split_is_refused(adult, rng):
    for name in ("holdout", "reference"):
        for value in (0, 1, -0.1, np.nan):
            with pytest.raises(UsageError, match=f"^{name}={value}: must lie strictly"):
                Split.random(adult, rng, **{name: value})
    with pytest.raises(UsageError, match=r"holdout \+ reference=1\.1: must lie strictly"):
        Split.random(adult, rng, holdout=0.5, reference=0.6)
    with pytest.raises(UsageError, match="train_rows=0: must be a whole number"):
        Split.official(adult, 0, rng)
    with pytest.raises(UsageError, match="holdout part has 0 row; each part needs at least 2"):
        Split.official(adult, len(adult), rng)
    with pytest.raises(UsageError, match=r"part has [01] row; each part needs at least 2"):
        Split.random(adult.take(np.arange(6)), rng, holdout=0.01)
    with pytest.raises(UsageError, match="members part has 1 row"):
        Split(adult.take(np.arange(1)), adult, adult)
    with pytest.raises(UsageError, match="reference part has 0 row"):
        Split(adult, adult, adult.take(np.arange(0)))


# Files


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_file_round_trip(tmp_path, ending, adult):
    path = tmp_path / "new" / f"adult{ending}"
    write_frame(adult.frame, path)
    again = Table.read(path, adult.schema)
    pd.testing.assert_frame_equal(again.frame, adult.frame)
    assert again.digest() == adult.digest()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_failed_write_leaves_nothing(tmp_path, ending, monkeypatch):
    def fail(self, path, **_):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(OSError, match="disk full"):
        write_frame(pd.DataFrame({"a": [1]}), tmp_path / f"t{ending}")
    assert list(tmp_path.iterdir()) == []


def test_unreadable_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"none\.csv': no such file"):
        read_frame(tmp_path / "none.csv")
    (tmp_path / "t.xlsx").write_text("a")
    with pytest.raises(UsageError, match=r"t\.xlsx': unknown ending; use \.csv or \.parquet"):
        read_frame(tmp_path / "t.xlsx")
    with pytest.raises(UsageError, match=r"t\.txt': unknown ending; use \.csv or \.parquet"):
        write_frame(pd.DataFrame({"a": [1]}), tmp_path / "t.txt")
    for name, text in {
        "empty.csv": "",
        "ragged.csv": "a\n1\n1,2\n",
        "torn.parquet": "PAR1",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=f"{name}': cannot be read: .") as caught:
            read_frame(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_question_marks_are_values_and_empty_cells_are_missing(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n?,1\nx,\n")
    frame = read_frame(tmp_path / "t.csv")
    assert frame["a"].tolist() == ["?", "x"]
    assert frame["b"].isna().tolist() == [False, True]


def test_categories_of_a_csv_are_read_as_the_text_they_are(tmp_path):
    column = Column("zip", "categorical", ("01", "1", "2.0", "x"))
    for cells in (["01", "1", "2.0"], ["01", "1", "2.0", "x"]):
        (tmp_path / "t.csv").write_text("\n".join(["zip", *cells]))
        table = Table.read(tmp_path / "t.csv", Schema((column,)))
        assert table.frame["zip"].tolist() == cells


READ = Schema(
    (
        Column("n", "integer", lower=-3, upper=10**15, nullable=True),
        Column("x", "decimal", lower=-1e3, upper=1e18, nullable=True),
        Column("t", "categorical", ("1", "01", "1.0", "True", "a", "rest"), other="rest"),
    )
)
cell = st.sampled_from(
    [
        *["", "0", "1", "01", "1.0", "-2", "3.7", "0.1", "5e-3", "1e3", "1e400", "-1e400", "inf"],
        *["NaN", "NA", "True", "false", "a", "?", "1_0", " 7", "0x10", "1,5", "no\nway", "9" * 400],
        *["99999999999999999999", "9007199254740993", "0.30000000000000004", "2.3e-308"],
    ]
)


@pytest.mark.filterwarnings("error")
@settings(max_examples=60)
@given(rows=st.lists(st.tuples(cell, cell, cell), min_size=1, max_size=6))
def test_a_row_of_a_csv_is_read_by_itself(rows, tmp_path_factory):
    """One cell that pandas cannot take for a number must not change what the others say."""
    path = tmp_path_factory.getbasetemp() / "cells.csv"

    def read(lines: list[tuple[str, ...]]) -> pd.DataFrame:
        with path.open("w", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows([READ.names, *lines])
        return Table.read(path, READ, strict=False).frame

    alone = pd.concat([read([line]) for line in rows], ignore_index=True)
    pd.testing.assert_frame_equal(read(rows), alone, check_exact=True)


@pytest.mark.filterwarnings("error")
def test_a_gap_in_a_parquet_file_renames_no_level(tmp_path):
    big = 10**16 + 1
    column = Column("k", "categorical", (str(big), "1", "1.0"), nullable=True)
    for cells in ([big, 1], [big, 1, None]):
        # As others write it: without the types that pandas notes down for itself.
        pq.write_table(pa.table({"k": pa.array(cells, pa.int64())}), tmp_path / "t.parquet")
        table = Table.read(tmp_path / "t.parquet", Schema((column,)))
        assert table.frame["k"][:2].tolist() == [str(big), "1"]


def test_an_untyped_frame_is_text(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,true\n2.50,\n")
    frame = read_frame(tmp_path / "t.csv", typed=False)
    assert frame["a"].tolist() == ["1", "2.50"]
    assert frame["b"].isna().tolist() == [False, True]
