"""Units of privacy: who owns a row, how few rows of each are kept, and that nobody's presence moves
another's rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dpsynth.checks import UsageError
from dpsynth.data import Split, Table, bounded_rows, unit_ids
from dpsynth.randomness import secure_stream, stream
from dpsynth.schema import Column, Schema

SCHEMA = Schema((Column("x", "integer", lower=0, upper=10**6),))


def owned_by(owners: list, values: list | None = None, **more) -> Table:
    """Rows numbered in order, or of these values, and who owns them."""
    frame = pd.DataFrame(
        {"x": values or range(len(owners)), "who": pd.Series(owners, dtype=object)}
    )
    return Table.from_frame(frame, SCHEMA, strict=False, unit="who", **more)


def contents(table: Table) -> list[int]:
    return table.frame["x"].tolist()


# Who owns a row


def test_the_unit_is_taken_out_of_what_is_modelled():
    table = owned_by(["ann", "bob", "ann"])
    assert list(table.frame.columns) == ["x"]
    assert table.units is not None
    assert table.units[0] == table.units[2] != table.units[1]


def test_ids_are_compared_as_text_each_by_itself(tmp_path):
    same, _ = unit_ids(pd.Series([1, 1.0, "1", " 1 "], dtype=object))
    assert len(set(same)) == 1
    # A gap turns the column of whole numbers into floats; nobody's id changes.
    whole, _ = unit_ids(pd.Series([7, 8]))
    gap, owned = unit_ids(pd.Series([7, 8, None]))
    assert (whole == gap[:2]).all()
    assert owned.tolist() == [True, True, False]
    (tmp_path / "t.csv").write_text("x,who\n1,01\n2,1\n3,1.0\n4,\n5,01\n")
    table = Table.read(tmp_path / "t.csv", SCHEMA, strict=False, unit="who")
    assert table.units is not None
    assert contents(table) == [1, 2, 3, 5]
    assert len(set(table.units)) == 3


def test_a_row_without_an_owner_is_refused_or_left_out():
    frame = pd.DataFrame({"x": [1, 2, 3, 4, 5], "who": ["ann", None, "", " ", "bob"]})
    with pytest.raises(UsageError, match="unit 'who': a row has none; fill it or drop the row"):
        Table.from_frame(frame, SCHEMA, unit="who")
    table = Table.from_frame(frame, SCHEMA, strict=False, unit="who")
    assert contents(table) == [1, 5]
    assert len(Table.from_frame(frame[1:4], SCHEMA, strict=False, unit="who")) == 0


def test_a_unit_that_cannot_be_one_is_refused():
    frame = pd.DataFrame({"x": [1, 2], "who": ["ann", "bob"]})
    with pytest.raises(UsageError, match="unit 'x': is a column of the schema too"):
        Table.from_frame(frame, SCHEMA, unit="x")
    with pytest.raises(UsageError, match=r"unit 'name': no such column in the table; choose"):
        Table.from_frame(frame, SCHEMA, unit="name")
    with pytest.raises(UsageError, match="column 'who': in the table but not in the schema"):
        Table.from_frame(frame, SCHEMA)
    with pytest.raises(UsageError, match="column 'who': stands in the table twice"):
        Table.from_frame(frame[["x", "who", "who"]], SCHEMA, unit="who")
    plain = Table.from_frame(frame[["x"]], SCHEMA)
    with pytest.raises(UsageError, match=r"units of shape \(3,\): must be one for each of 2 rows"):
        Table(SCHEMA, plain.frame, np.arange(3))
    with pytest.raises(UsageError, match="units are Python objects"):
        Table(SCHEMA, plain.frame, np.array(["a", None], dtype=object))


def test_parts_of_a_table_keep_their_owners():
    table = owned_by(["a", "b", "a", "c"])
    assert table.units is not None
    taken = table.take(np.array([3, 0, 0]))
    assert taken.units is not None
    assert (taken.units == table.units[[3, 0, 0]]).all()
    kept = table.select(["x"]).units
    assert kept is not None
    assert (kept == table.units).all()


def test_the_digest_covers_who_owns_what():
    one, two = owned_by(["a", "b", "a"]), owned_by(["a", "b", "b"])
    assert one.digest() == owned_by(["a", "b", "a"]).digest()
    assert one.digest() != two.digest() != Table(SCHEMA, two.frame).digest()


# Bounded contributions

owners = st.lists(st.sampled_from(["a", "b", "cc", "ddd", "7"]), min_size=1, max_size=30)


@given(owners, st.integers(1, 4), st.integers(0, 2**32))
def test_a_unit_keeps_as_many_rows_as_allowed(owners, contributions, seed):
    kept = contents(owned_by(owners).bounded(contributions, stream(seed, "unit")))
    assert kept == sorted(set(kept))
    left = Counter(owners[row] for row in kept)
    assert left == {one: min(n, contributions) for one, n in Counter(owners).items()}


@given(owners, st.integers(1, 4), st.integers(0, 2**32), st.data())
def test_one_unit_more_changes_nothing_for_the_others(owners, contributions, seed, data):
    """The law that contributions and ε rest on: neighbours differ in one unit's rows alone."""
    with_one, numbers = list(owners), list(range(len(owners)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(with_one)))
        with_one.insert(place, "a new unit with a long name")
        numbers.insert(place, 1000)
    few = owned_by(owners).bounded(contributions, stream(seed, "unit"))
    more = owned_by(with_one, numbers).bounded(contributions, stream(seed, "unit"))
    assert [x for x in contents(more) if x != 1000] == contents(few)
    assert contents(more).count(1000) <= contributions


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8, "U4", "U9", "S3"])
def test_units_of_any_width_are_bounded_alike(kind):
    units = np.array([1, 2, 1, 1, 2, 1]).astype(kind)
    kept = bounded_rows(units, 2, stream(0, "unit"))
    assert Counter(units[kept].tolist()) == dict.fromkeys(units.tolist(), 2)
    if isinstance(kind, str) and kind.startswith("U"):
        assert kept.tolist() == bounded_rows(units.astype("U20"), 2, stream(0, "unit")).tolist()


def test_every_row_of_a_unit_is_as_likely_to_stay():
    sizes, contributions, runs = [5, 9], 2, 1500
    units = np.repeat([3, 4], sizes)
    counts = np.zeros(len(units))
    pairs = Counter()
    for seed in range(runs):
        kept = bounded_rows(units, contributions, stream(seed, "unit"))
        counts[kept] += 1
        pairs[tuple(kept[kept < 5])] += 1
    for size, found in zip(sizes, np.split(counts, [5]), strict=True):
        # Without replacement counts vary less than χ² would have it: only too much is a fault.
        expected = np.full(size, runs * contributions / size)
        assert stats.chisquare(found, expected).pvalue > 1e-3
    assert len(pairs) == 10
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_records_are_units_of_one_row():
    plain = Table.from_frame(pd.DataFrame({"x": [1, 2, 2]}), SCHEMA)
    assert plain.bounded(1, stream(0, "unit")) is plain
    with pytest.raises(UsageError, match="contributions=2: the table has no units"):
        plain.bounded(2, stream(0, "unit"))
    for table in (plain, owned_by(["a", "b"])):
        with pytest.raises(UsageError, match="contributions=0: must be a whole number"):
            table.bounded(0, stream(0, "unit"))


def test_a_secure_stream_bounds_as_well():
    kept = owned_by(["a"] * 9).bounded(4, secure_stream(1 << 255, "unit"))
    assert len(kept) == 4


# Splits


def crowd(units: int, seed: int, first: int = 0) -> tuple[list[str], list[int]]:
    """Units of one to four rows with few distinct values: copies within units and across."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(first, first + units), rng.integers(1, 5, units))
    order = rng.permutation(len(who))
    return [f"p{n}" for n in who[order]], rng.integers(0, 12, len(who)).tolist()


def owned_rows(table: Table) -> list[tuple[bytes, int]]:
    assert table.units is not None
    return list(zip(table.units.tolist(), contents(table), strict=True))


def parts(split: Split) -> list[list[tuple[bytes, int]]]:
    return [owned_rows(part) for part in (split.members, split.holdout, split.reference)]


@pytest.mark.parametrize("seed", range(4))
def test_a_random_split_keeps_units_together_and_loses_only_their_own_copies(seed):
    who, values = crowd(80, seed)
    table = owned_by(who, values)
    found = parts(Split.random(table, np.random.default_rng(seed)))
    seen = [{unit for unit, _ in part} for part in found]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])
    together = [row for part in found for row in part]
    assert len(set(together)) == len(together)
    assert set(together) == set(owned_rows(table))


@pytest.mark.parametrize("seed", range(20))
def test_one_unit_more_moves_no_other_unit(seed):
    who, values = crowd(60, seed)
    extra, new = crowd(1, seed, first=999)
    table, more = owned_by(who, values), owned_by(extra + who, new + values)
    stranger = set(unit_ids(pd.Series(extra))[0].tolist())
    for cut in (
        lambda t: Split.random(t, stream(seed, "split"), holdout=0.3, reference=0.2),
        lambda t: Split.official(t, 40 + len(extra) * (t is more), stream(seed, "split")),
    ):
        for before, after in zip(parts(cut(table)), parts(cut(more)), strict=True):
            assert [row for row in after if row[0] not in stranger] == before


def test_shares_of_units_are_right_on_average():
    who, values = crowd(4000, 0)
    split = Split.random(owned_by(who, values), stream(0, "split"), holdout=0.3, reference=0.1)
    shares = [len({unit for unit, _ in part}) for part in parts(split)]
    assert stats.chisquare(shares, [2400, 1200, 400]).pvalue > 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_an_official_split_keeps_members_and_parts_units(seed):
    who, values = crowd(80, seed)
    table = owned_by(who, values)
    cut = 60
    split = Split.official(table, cut, np.random.default_rng(seed))
    members, held, known = parts(split)
    assert members == list(dict.fromkeys(owned_rows(table)[:cut]))
    inside = {unit for unit, _ in members}
    assert not ({u for u, _ in held} & {u for u, _ in known})
    rest = {row for row in owned_rows(table) if row[0] not in inside}
    assert set(held) | set(known) == rest
    assert split.members.schema.expected_rows == cut


def test_the_members_share_of_a_measured_count_stays_measured():
    schema = Schema(SCHEMA.columns, expected_rows=1000, rows_provenance="measured")
    table = Table.from_frame(pd.DataFrame({"x": range(100)}), schema)
    assert Split.random(table, stream(0, "s")).members.schema.rows_provenance == "measured"
    # A published split is a published size.
    assert Split.official(table, 50, stream(0, "s")).members.schema.rows_provenance == "declared"


@given(st.lists(st.integers(0, 5), min_size=12, max_size=20), st.integers(0, 5), st.integers(0, 12))
def test_removing_copies_moves_neighbours_by_one_row_at_most(values, value, place):
    """What `Split.random` says of tables without units: as sets of rows, whatever is first."""

    def distinct(rows: list[int]) -> list[int]:
        table = Table.from_frame(pd.DataFrame({"x": rows}), SCHEMA, strict=False)
        split = Split.official(table, len(rows) - 6, stream(0, "s"))
        return contents(split.members)

    values = [*values, 200, 201]
    rest = [100, 101, 102, 103, 104, 105]
    before = distinct(values + rest)
    after = distinct([*values[:place], value, *values[place:], *rest])
    assert len(set(before)) == len(before)
    assert set(before) <= set(after)
    assert len(after) - len(before) == (value not in values)
