"""Codec and marginals: round trips, what may depend on rows and what may not, known answers."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpsynth import codec as codec_module
from dpsynth import datasets
from dpsynth.checks import UsageError
from dpsynth.codec import Codec, Grid, Layout, NumericCoder, _shrink
from dpsynth.data import Table
from dpsynth.evaluation.coding import Coder
from dpsynth.marginals import Marginals
from dpsynth.privacy.calibration import gaussian_mu
from dpsynth.privacy.ledger import Ledger
from dpsynth.privacy.mechanisms import Measurer
from dpsynth.schema import Column, Schema

BINS, HEAPS = 8, 4
FREE = math.inf


def measurer(mu: float = FREE, parts: int = 20, seed: int = 0, ledger: Ledger | None = None):
    return Measurer(ledger or Ledger(1e-5), mu, parts, np.random.default_rng(seed))


def fit(table: Table, mu: float = FREE, *, seed: int = 0, bins: int = BINS, heaps: int = HEAPS):
    """A codec whose parts are all paid for."""
    parts = sum(part for _, part in Codec.questions(table.schema, bins, heaps))
    return Codec.fit(table, measurer(mu, parts, seed), rows=len(table), bins=bins, heaps=heaps)


def filled(column: Column, values: Sequence[Any] | np.ndarray) -> Table:
    frame = pd.DataFrame({column.name: values})
    return Table.from_frame(frame, Schema((column,)), strict=False)


# Fewer bins than slots


@pytest.mark.parametrize("name", ["LONG", "AGE", "PRICE"])
@pytest.mark.parametrize("mu", [0.5, FREE])
def test_fewer_bins_leave_slots_empty_and_rows_where_they_are(name: str, mu: float) -> None:
    """A row's bin then covers about as much more of all rows; shapes and what is paid stay."""
    column = globals()[name]
    rng = np.random.default_rng(4)
    values = np.round(rng.uniform(column.lower, column.upper, 4000))
    table = filled(column, values)
    parts = sum(part for _, part in Codec.questions(table.schema, BINS, 0))
    made = {}
    for wanted in (None, 3):
        ledger = Ledger(1e-5)
        answers = measurer(mu, parts, ledger=ledger)
        codec = Codec.fit(table, answers, rows=4000, bins=BINS, heaps=0, wanted=wanted)
        codes = codec.encode(table)[:, 0]
        shares = np.bincount(codes.numpy(), minlength=codec.layout.width) / 4000
        assert (shares[codec.used.numpy()] > 0).sum() == (wanted or BINS)
        assert shares.max() < 1.6 / (wanted or BINS)
        again = codec.decode(codec.encode(table), np.random.default_rng(0)).frame[name.lower()]
        width = (column.upper - column.lower) / (wanted or BINS)
        assert np.abs(again.to_numpy(float) - values).max() < 1.6 * width
        made[wanted] = codec.layout, [replace(event, when="") for event in ledger.events]
    assert made[None] == made[3]


@pytest.mark.parametrize("wanted", [1, BINS + 1])
def test_bins_that_are_wanted_must_fit_in_their_slots(wanted: int) -> None:
    table = filled(LONG, np.arange(10))
    with pytest.raises(UsageError, match=f"wanted={wanted}: must be between 2 and bins={BINS}"):
        Codec.fit(table, measurer(), rows=10, bins=BINS, heaps=0, wanted=wanted)


# Columns of every kind

DIRECT = Column("direct", "integer", lower=-3, upper=5)
COUNT = Column("count", "integer", lower=-500, upper=9_000, nullable=True)
LONG = Column("long", "integer", lower=-5_000_000, upper=800_000_000)
PRICE = Column("price", "decimal", lower=-20.0, upper=1000.0, step=0.05)
CENTS = Column("cents", "decimal", lower=0.0, upper=900_000.0, step=0.01, nullable=True)
AGE = Column("age", "integer", lower=17, upper=190, nullable=True)
RATIO = Column("ratio", "decimal", lower=-1.5, upper=4.5, nullable=True)
VAST = Column("vast", "decimal", lower=-1e300, upper=1e300)
HUGE = Column("huge", "integer", lower=-(2**53), upper=2**53)
KIND = Column("kind", "categorical", ("a", "b", "c"), nullable=True)
SIZE = Column("size", "categorical", ("s", "m", "l"), ordered=True)
COLUMNS = {
    c.name: c for c in (DIRECT, COUNT, AGE, LONG, PRICE, CENTS, RATIO, VAST, HUGE, KIND, SIZE)
}
MEASURED = [name for name, column in COLUMNS.items() if column.numeric and name != "direct"]


@st.composite
def numeric_columns(draw: st.DrawFn) -> Column:
    nullable = draw(st.booleans())
    if draw(st.booleans()):
        lower = draw(st.integers(-(10**6), 10**6))
        width = draw(st.integers(1, 60) | st.integers(100, 10**4) | st.integers(3 * 10**7, 10**9))
        return Column("x", "integer", lower=lower, upper=lower + width, nullable=nullable)
    lower = draw(st.floats(-1e6, 1e6))
    if draw(st.booleans()):
        width = draw(st.floats(1e-2, 1e9))
        return Column("x", "decimal", lower=lower, upper=lower + width, nullable=nullable)
    step = draw(st.sampled_from([0.01, 0.05, 0.1, 0.25, 1.0, 2.5]))
    steps = draw(st.integers(1, 5000) | st.integers(3 * 10**7, 10**9))
    # A multiple of the step, so that no bound is off the grid that it declares.
    lower = step * round(lower / step)
    upper = lower + steps * step
    return Column("x", "decimal", lower=lower, upper=upper, step=step, nullable=nullable)


def values_of(column: Column, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Values inside the declared domain: a broad part, spikes, both bounds, and gaps."""
    if not column.numeric:
        choices = np.array([*column.levels, None] if column.nullable else column.levels, object)
        return choices[rng.integers(len(choices), size=rows)]
    assert column.lower is not None and column.upper is not None
    broad = rng.beta(0.5, 4, rows)
    spikes = rng.random(3)[rng.integers(3, size=rows)]
    unit = np.where(rng.random(rows) < 0.4, spikes, broad)
    unit[:2] = 0, 1
    values = column.lower * (1 - unit) + column.upper * unit
    if column.step is not None:
        values = column.lower + np.round((values - column.lower) / column.step) * column.step
        # 718.9, not 718.9000000000001
        values = np.round(values, 9 if column.kind == "decimal" else 0)
    values = np.clip(values, column.lower, column.upper)
    return np.where((rng.random(rows) < 0.1) & column.nullable, np.nan, values)


def table_of(column: Column, rows: int, seed: int) -> Table:
    """Rows of one column, spikes and all."""
    return filled(column, values_of(column, rows, np.random.default_rng(seed)))


def assert_round_trips(table: Table, codec: Codec, seed: int) -> None:
    """Everything decoded is of the domain and keeps its code."""
    rng = np.random.default_rng(seed)
    codes = codec.encode(table)
    used = codec.used.numpy()
    assert codes.dtype == torch.int64
    assert ((codes >= 0) & (codes < torch.tensor(codec.layout.levels))).all()
    flat = codes.numpy() + np.array(codec.layout.offsets)
    assert used[flat].all(), "encoded into a level that is marked unused"
    for given_codes in (codes, every_used(codec)):
        decoded = codec.decode(given_codes, rng)
        assert_in_domain(decoded)
        assert torch.equal(codec.encode(decoded), given_codes)


def every_used(codec: Codec, times: int = 30) -> torch.Tensor:
    """Each used level of each column, `times` over (rows, D)."""
    blocks = np.split(codec.used.numpy(), np.cumsum(codec.layout.levels)[:-1])
    most = max(int(block.sum()) for block in blocks)
    columns = [np.resize(np.flatnonzero(block), most) for block in blocks]
    return torch.from_numpy(np.repeat(np.stack(columns, axis=1), times, axis=0))


def assert_in_domain(table: Table) -> None:
    """Bringing it under its schema changes nothing: types, levels, bounds, gaps, steps."""
    again = Table.from_frame(table.frame, table.schema, strict=False)
    pd.testing.assert_frame_equal(again.frame, table.frame)
    for column in table.schema.columns:
        if column.numeric and column.step is not None:
            steps = (table.frame[column.name].dropna().to_numpy(float) - column.lower) / column.step
            np.testing.assert_allclose(steps, np.round(steps), rtol=1e-12, atol=1e-4)


@pytest.mark.parametrize("mu", [FREE, 1.0, 0.1])
@pytest.mark.parametrize("name", COLUMNS)
def test_round_trip_of_every_kind_of_column(name: str, mu: float) -> None:
    table = table_of(COLUMNS[name], 600, 3)
    codec = fit(table, mu)
    assert_round_trips(table, codec, 5)
    # Rows that the codec has never seen.
    assert_round_trips(table_of(COLUMNS[name], 300, 4), codec, 6)


@settings(max_examples=40)
@given(
    column=numeric_columns(),
    rows=st.integers(1, 400),
    mu=st.sampled_from([FREE, 2.0, 0.05]),
    bins=st.integers(2, 12),
    heaps=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_of_any_number(
    column: Column, rows: int, mu: float, bins: int, heaps: int, seed: int
) -> None:
    table = table_of(column, rows + 2, seed)
    codec = fit(table, mu, seed=seed, bins=bins, heaps=heaps)
    assert_round_trips(table, codec, seed)


@pytest.mark.parametrize("mu", [FREE, 1.0])
def test_a_whole_table_round_trips(mu: float) -> None:
    rng = np.random.default_rng(0)
    schema = Schema(tuple(COLUMNS.values()), target="kind")
    frame = pd.DataFrame({name: values_of(c, 400, rng) for name, c in COLUMNS.items()})
    table = Table.from_frame(frame, schema)
    codec = fit(table, mu)
    assert_round_trips(table, codec, 1)
    missing = table.frame.isna()
    decoded = codec.decode(codec.encode(table), rng)
    pd.testing.assert_frame_equal(decoded.frame.isna(), missing)
    for name in ("kind", "size", "direct"):
        pd.testing.assert_series_equal(decoded.frame[name], table.frame[name])


def test_adult_round_trips(adult: Table) -> None:
    codec = fit(adult, 1.0, bins=32, heaps=16)
    assert_round_trips(adult, codec, 1)


def test_values_that_share_a_cell_keep_to_its_bin() -> None:
    """One value holds half of the rows, on a range too long for a cell a value: the bin is one
    cell of some twelve thousand whole numbers, and what is drawn from it stays in it."""
    values = np.r_[np.full(500, 123_456_789), np.arange(500) * 999_999]
    table = filled(LONG, values)
    codec = fit(table)
    code = int(codec.encode(table)[0, 0])
    decoded = codec.decode(torch.full((20_000, 1), code), np.random.default_rng(0))
    assert (codec.encode(decoded) == code).all()
    assert abs(decoded.frame["long"] - 123_456_789).max() < 13_000


@pytest.mark.parametrize("name", ["long", "cents", "ratio", "vast", "huge"])
def test_piles_at_zero_and_at_the_bounds_become_levels_on_any_grid(name: str) -> None:
    """Where a cell is not one value, these three still are: capped and censored amounts."""
    column, rng = COLUMNS[name], np.random.default_rng(0)
    assert column.lower is not None and column.upper is not None
    piles = np.unique([column.lower, 0.0, column.upper])
    values = column.lower + (column.upper / 2 - column.lower / 2) * rng.random(700)
    values = values if column.kind == "decimal" and column.step is None else np.round(values)
    table = filled(column, np.r_[np.repeat(piles, 100), values])
    codec = fit(table)
    codes = codec.encode(table)[: 100 * len(piles), 0]
    assert set(codes.tolist()) == set(range(BINS, BINS + len(piles)))
    again = codec.decode(codes[:, None], rng).frame[name].astype(float)
    np.testing.assert_array_equal(again, np.repeat(piles, 100))
    assert (codec.encode(table)[100 * len(piles) :] < BINS).all()


def test_a_pile_leaves_the_rest_of_its_cell_to_the_bin() -> None:
    """Zero is a level of its own, five is not: drawing from the cell they share spares zero."""
    column = Column("x", "integer", lower=0, upper=2**24 + 1000)
    values = np.r_[np.zeros(300), np.full(300, 5), np.arange(400) * 40_000 + 1000]
    table = filled(column, values)
    codec = fit(table)
    codes = codec.encode(table)[:, 0]
    assert codes[0] == BINS
    assert codes[300] < BINS
    decoded = codec.decode(torch.full((20_000, 1), int(codes[300])), np.random.default_rng(0))
    assert decoded.frame["x"].max() < 300
    assert (codec.encode(decoded) == codes[300]).all()


@pytest.mark.parametrize("beyond", range(4))
def test_no_cell_of_a_long_grid_is_a_single_value(beyond: int) -> None:
    """Were a bound alone in its cell and a level of its own, its bin would have nothing to draw."""
    for span in (2**24 + 1, 2**24 + 257, 257 * 65_281, 10**8, 10**9):
        column = Column("x", "integer", lower=-7, upper=-7 + span + beyond)
        ends = np.array([-7, -6, -8 + span + beyond, -7 + span + beyond], dtype=float)
        first, second, last_but_one, last = Grid.of(column).cell(ends)
        assert first == second
        assert last_but_one == last


class Patience:
    """A generator that fails after so many draws that whoever draws will never stop."""

    def __init__(self) -> None:
        self._rng, self._calls = np.random.default_rng(0), 0

    def __getattr__(self, name: str) -> Any:
        self._calls += 1
        assert self._calls < 5000, "drawing goes on for ever"
        return getattr(self._rng, name)


@pytest.mark.parametrize(
    ("column", "piles"),
    [
        # One value more than whole cells hold, and a pile on it.
        (Column("x", "integer", lower=0, upper=2**24 + 1), [2**24 + 1, 2**24 - 4]),
        # Doubles know three numbers between the bounds.
        (Column("x", "decimal", lower=1e16, upper=1e16 + 4), [1e16, 1e16 + 2, 1e16 + 4]),
    ],
)
def test_decoding_ends_even_where_a_bin_is_all_piles(column: Column, piles: list[float]) -> None:
    table = filled(column, np.repeat(piles, 300))
    codec = fit(table)
    decoded = codec.decode(every_used(codec), Patience())  # type: ignore[arg-type]
    assert_in_domain(decoded)


def test_bins_share_out_the_rows_that_no_heap_has() -> None:
    rng = np.random.default_rng(0)
    broad = rng.integers(0, 10_000, 5000)
    column = Column("x", "integer", lower=0, upper=9999)
    codec = fit(filled(column, np.r_[broad, np.full(5000, 4000)]))
    codes = codec.encode(filled(column, broad[broad != 4000]))[:, 0]
    shares = np.bincount(codes, minlength=BINS) / len(codes)
    assert (shares > 0.5 / BINS).all()
    assert (shares < 1.6 / BINS).all()


def test_bounds_beyond_what_a_double_can_tell_apart_are_refused() -> None:
    column = Column("x", "decimal", lower=-1e308, upper=1e308)
    with pytest.raises(UsageError, match="'x'"):
        fit(filled(column, [0.0, 1.0]))


def test_a_step_far_below_the_range_is_just_a_long_grid() -> None:
    column = Column("x", "decimal", lower=0.0, upper=1e300, step=1e-9)
    table = filled(column, [0.0, 1e299, 1e300])
    codec = fit(table)
    decoded = codec.decode(codec.encode(table), np.random.default_rng(0))
    assert torch.equal(codec.encode(decoded), codec.encode(table))


@pytest.mark.parametrize("name", ["count", "price", "ratio", "long", "cents"])
def test_decoded_numbers_are_distributed_like_the_encoded_ones(name: str) -> None:
    column, rng = COLUMNS[name], np.random.default_rng(8)
    values = values_of(column, 6000, rng)
    if name in ("ratio", "long", "cents"):  # heaps at zero and at the bounds only: no spikes
        values = column.lower + (column.upper - column.lower) * rng.beta(0.5, 4, 6000)
        values = values if name == "ratio" else np.round(values, 2 * (name == "cents"))
    table = filled(column, values)
    codec = fit(table, bins=32, heaps=16)
    decoded = codec.decode(codec.encode(table), rng)
    before, after = (t.frame[name].dropna().to_numpy(float) for t in (table, decoded))
    assert stats.ks_2samp(before, after).statistic < 0.03


# Levels


def test_a_short_grid_is_taken_as_it_is_and_costs_nothing() -> None:
    ledger = Ledger(1e-5)
    column = Column("x", "integer", lower=-2, upper=9, nullable=True)
    table = filled(column, [-2, 9, None, 0])
    codec = Codec.fit(table, measurer(0.1, 0, ledger=ledger), rows=4, bins=8, heaps=4)
    assert ledger.events == ()
    assert codec.layout.levels == (13,)
    assert codec.used.all()
    assert codec.encode(table)[:, 0].tolist() == [0, 11, 12, 2]
    pd.testing.assert_frame_equal(
        codec.decode(codec.encode(table), np.random.default_rng(0)).frame, table.frame
    )
    assert Codec.measured_columns(table.schema, 8, 4) == []
    assert Codec.measured_columns(table.schema, 8, 3) == [column]


def test_categories_keep_their_declared_levels() -> None:
    table = filled(KIND, ["c", None, "a", "b"])
    codec = fit(table)
    assert codec.encode(table)[:, 0].tolist() == [2, 3, 0, 1]
    assert codec.layout.levels == (4,)


def test_layout_follows_from_the_schema_alone() -> None:
    schema = Schema(tuple(COLUMNS.values()), target="kind")
    layouts = set()
    for seed, rows, mu in ((0, 500, FREE), (1, 7, 1.0), (2, 60, 0.01)):
        rng = np.random.default_rng(seed)
        values = {name: values_of(c, rows, rng) for name, c in COLUMNS.items()}
        if seed == 2:  # a column that holds one value only
            values["count"] = np.full(rows, 17.0)
        frame = pd.DataFrame(values)
        codec = fit(Table.from_frame(frame, schema, strict=False), mu)
        layouts.add(codec.layout)
        assert len(codec.used) == codec.layout.width
    assert len(layouts) == 1
    (layout,) = layouts
    assert layout.levels[0] == 9
    assert layout.levels[1] == BINS + HEAPS + 1
    assert layout.levels[-1] == 3


def test_layout_places_blocks_side_by_side() -> None:
    layout = Layout((3, 2, 4), target=1)
    assert (layout.columns, layout.width, layout.offsets, layout.groups) == (3, 9, (0, 3, 5), 2)
    codes = torch.tensor([[[2, 0, 3], [0, 1, 1]]])
    assert layout.group_of(codes).tolist() == [[0, 1]]
    flat = layout.one_hot(codes)
    assert flat.shape == (1, 2, 9)
    for block, column in zip(flat.split([3, 2, 4], dim=-1), codes.unbind(-1), strict=True):
        assert (block.sum(-1) == 1).all()
        assert torch.equal(block.argmax(-1), column)
    alone = Layout((3, 2), target=None)
    assert alone.groups == 1
    assert alone.group_of(torch.tensor([[2, 1], [0, 0]])).tolist() == [0, 0]


def test_codes_of_single_values_are_those_of_the_table() -> None:
    for name, column in COLUMNS.items():
        table = table_of(column, 200, 2)
        codec = fit(table, 1.0)
        for value, code in zip(table.frame[name][:60], codec.encode(table)[:, 0], strict=False):
            assert codec.code_of(name, value) == int(code)


@pytest.mark.parametrize("name", ["count", "ratio", "kind"])
def test_missing_has_a_code_of_its_own(name: str) -> None:
    codec = fit(table_of(COLUMNS[name], 200, 2))
    last = codec.layout.levels[0] - 1
    for value in (None, np.nan, pd.NA):
        assert codec.code_of(name, value) == last


def test_codes_of_values_outside_are_refused() -> None:
    schema = Schema((COUNT, SIZE))
    frame = pd.DataFrame({"count": [0, 100], "size": ["s", "m"]})
    codec = fit(Table.from_frame(frame, schema))
    for name, value in (("count", 9_001), ("count", 1.5), ("size", "xl"), ("size", None)):
        with pytest.raises(UsageError, match=name):
            codec.code_of(name, value)


@pytest.mark.parametrize("mu", [FREE, 1.0])
def test_codec_json_round_trip(mu: float) -> None:
    for column in COLUMNS.values():
        table = table_of(column, 300, 1)
        codec = fit(table, mu)
        again = Codec.from_dict(table.schema, json.loads(json.dumps(codec.to_dict())))
        assert again.layout == codec.layout
        assert torch.equal(again.used, codec.used)
        codes = codec.encode(table)
        assert torch.equal(again.encode(table), codes)
        first, second = (c.decode(codes, np.random.default_rng(3)).frame for c in (codec, again))
        pd.testing.assert_frame_equal(first, second)
        assert again.to_dict() == codec.to_dict()


@pytest.mark.parametrize(
    ("settings", "part"), [({"bins": 1}, "bins=1"), ({"heaps": -1}, "heaps=-1")]
)
def test_refusals(settings: dict[str, int], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        fit(table_of(COUNT, 10, 0), **settings)


# Heaps


def heaps_of(codec: Codec) -> set[int]:
    """Values that are levels of their own."""
    (column,) = codec.schema.columns
    (state,) = codec.to_dict()["columns"].values()
    assert column.lower is not None and column.step is not None
    return {round(column.lower + cell * column.step) for cell in state["heaps"]}


SHORT = Column("x", "integer", lower=0, upper=9999)
SHAPES = ["flat", "bell", "slope", "crowd"]


def smooth(shape: str, rows: int) -> np.ndarray:
    """Whole numbers in 0..9999 without a spike."""
    rng = np.random.default_rng(2)
    if shape == "flat":
        values = rng.uniform(0, 9999, rows)
    elif shape == "slope":
        values = rng.exponential(400, rows)
    else:  # in a crowd, hundreds of rows to a value
        values = rng.normal(4000, {"bell": 900, "crowd": 15}[shape], rows)
    return np.round(values[(values >= 0) & (values <= 9999)])


@pytest.mark.parametrize("mu", [FREE, 2.0, 0.3])
@pytest.mark.parametrize("shape", ["flat", "bell", "slope"])
def test_planted_spikes_become_heaps(mu: float, shape: str) -> None:
    """All of them, and beside them half a false one a column at most."""
    spikes = {0, 4000, 9999}
    values = np.r_[smooth(shape, 8500), np.repeat(list(spikes), 500)]
    false = 0
    for seed in range(10):
        codec = fit(filled(SHORT, values), mu, seed=seed, heaps=16)
        assert heaps_of(codec) >= spikes
        false += len(heaps_of(codec) - spikes)
        decoded = codec.decode(codec.encode(filled(SHORT, list(spikes))), np.random.default_rng(0))
        assert set(decoded.frame["x"]) == spikes
    assert stats.poisson.sf(false - 1, 0.5 * 10) > 1e-4


@pytest.mark.parametrize("mu", [FREE, 1.0, 0.3, 0.1, 0.01])
@pytest.mark.parametrize("shape", SHAPES)
def test_smooth_columns_have_next_to_no_heaps(shape: str, mu: float) -> None:
    """None without noise; with noise half a false one a column in expectation."""
    table = filled(SHORT, smooth(shape, 10_000))
    seeds = 1 if mu == FREE else 30
    found = sum(len(heaps_of(fit(table, mu, seed=seed, heaps=64))) for seed in range(seeds))
    assert found == 0 if mu == FREE else stats.poisson.sf(found - 1, 0.5 * seeds) > 1e-4


def test_only_the_heaviest_heaps_get_a_slot() -> None:
    weights = {100: 400, 300: 900, 500: 600, 700: 500}
    values = np.concatenate([np.full(count, value) for value, count in weights.items()])
    column = Column("x", "integer", lower=0, upper=999)
    assert heaps_of(fit(filled(column, values), heaps=2)) == {300, 500}
    assert heaps_of(fit(filled(column, values), heaps=0)) == set()


# Masses


class Overheard(Measurer):
    """A measurer whose answers are kept, by event."""

    def __init__(self, mu: float, parts: int, seed: int = 0) -> None:
        super().__init__(Ledger(1e-5), mu, parts, np.random.default_rng(seed))
        self.told: dict[str, list[np.ndarray]] = {}

    def answering(self, what: str, mu: float, queries: int) -> Any:
        noise = super().answering(what, mu, queries)
        answers = self.told.setdefault(what, [])

        class Kept:
            sigma = noise.sigma

            def __call__(self, counts: np.ndarray) -> np.ndarray:
                answers.append(noise(counts))
                return answers[-1].copy()

        return Kept()


def coder_of(codec: Codec) -> NumericCoder:
    (coder,) = codec.coders
    assert isinstance(coder, NumericCoder)
    return coder


def free_cells(coder: NumericCoder) -> np.ndarray:
    """How many cells of each leaf are no heaps, by looking at each heap."""
    grid = Grid.of(coder.column)
    size = np.diff(np.append(coder.starts, grid.cells))
    for heap in coder.heaps if grid.exact else ():
        size[np.flatnonzero(coder.starts <= heap)[-1]] -= 1
    return size


@pytest.mark.parametrize("heaps", [HEAPS, 0])
@pytest.mark.parametrize("name", MEASURED)
def test_without_noise_masses_are_the_shares_of_the_rows(name: str, heaps: int) -> None:
    table = table_of(COLUMNS[name], 3000, 7)
    coder = coder_of(fit(table, heaps=heaps))
    grid = Grid.of(coder.column)
    numbers = table.frame[name].dropna().to_numpy(float)
    numbers = numbers[~np.isin(grid.spot(numbers), coder.heaps)]
    leaf = np.searchsorted(coder.starts, grid.cell(numbers), side="right") - 1
    exact = np.bincount(leaf, minlength=len(coder.starts)) / len(table)
    assert len(coder.starts) > BINS
    np.testing.assert_allclose(coder.mass, exact, atol=1e-9)


@pytest.mark.parametrize("heaps", [HEAPS, 0])
@pytest.mark.parametrize("mu", [3.0, 0.3, 0.01])
@pytest.mark.parametrize("name", MEASURED)
def test_masses_add_up_to_what_heaps_and_missing_rows_leave(
    name: str, mu: float, heaps: int
) -> None:
    """By their noisy counts, which are in the first answer of all; one row at least."""
    column, rows = COLUMNS[name], 3000
    table = table_of(column, rows, 7)
    asked = Codec.questions(table.schema, BINS, heaps)
    measurer = Overheard(mu, sum(parts for _, parts in asked))
    coder = coder_of(Codec.fit(table, measurer, rows=rows, bins=BINS, heaps=heaps))
    first = measurer.told[asked[0][0]][0]
    gone = first[coder.heaps].sum() + column.nullable * max(first[-1], 0)
    assert coder.mass.sum() * rows == pytest.approx(max(rows - gone, 1), rel=1e-9)
    assert (coder.mass >= 0).all()
    assert (coder.mass[free_cells(coder) == 0] == 0).all()


@pytest.mark.parametrize("heaps", [HEAPS, 0])
@pytest.mark.parametrize("mu", [3.0, 0.5])
@pytest.mark.parametrize("name", ["age", "count", "cents", "ratio"])
def test_a_column_of_missing_rows_keeps_its_shape(name: str, mu: float, heaps: int) -> None:
    """Nine rows in ten are missing, the others in the lowest sixteenth: were the missing ones
    shared out among the cells, ten times as many rows would lie above."""
    column, rng, rows = COLUMNS[name], np.random.default_rng(0), 20_000
    assert column.lower is not None and column.upper is not None
    values = column.lower + (column.upper - column.lower) / 16 * rng.random(rows)
    values = np.where(rng.random(rows) < 0.9, np.nan, values)
    steps = {"age": 0, "count": 0, "cents": 2}
    table = filled(column, np.round(values, steps[name]) if name in steps else values)
    coder = coder_of(fit(table, mu, heaps=heaps))
    held = coder.mass.sum()
    assert held == pytest.approx(0.1, abs=0.01)
    above = coder.starts >= Grid.of(column).cells / 8
    assert coder.mass[above].sum() < 0.1 * held


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 3)), min_size=1, max_size=20),
    st.sampled_from([0.0, 0.1, 3.0, 40.0, 1e6]),
)
def test_shrinking_is_positive_part_james_stein(
    leaves: list[tuple[float, int]], sigma: float
) -> None:
    mass, group = np.array([m for m, _ in leaves]), np.array([g for _, g in leaves])
    group = np.unique(group, return_inverse=True)[1]
    found = _shrink(mass, group, np.full(len(mass), sigma))
    for number in range(group.max() + 1):
        own = mass[group == number]
        mean = own.sum() / len(own)
        spread = sum((m - mean) ** 2 for m in own)
        noise = (len(own) - 1) * sigma**2
        kept = 1 - noise / spread if spread > noise else 0.0
        np.testing.assert_allclose(found[group == number], mean + kept * (own - mean), atol=1e-9)
        assert found[group == number].sum() == pytest.approx(own.sum())
    assert (found >= 0).all()
    if sigma == 0:
        np.testing.assert_allclose(found, mass, atol=1e-12)


@pytest.mark.parametrize("name", MEASURED)
def test_shrinking_moves_no_mass_between_bins_or_widths(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves of one bin and of equally many cells share; no others."""
    table = table_of(COLUMNS[name], 3000, 7)
    after = coder_of(fit(table, 0.5))
    monkeypatch.setattr(codec_module, "_shrink", lambda mass, group, sigma: mass)
    before = coder_of(fit(table, 0.5))
    np.testing.assert_array_equal(before.leaf_bin, after.leaf_bin)
    keys = list(zip(before.leaf_bin, free_cells(before), strict=True))
    assert not np.allclose(before.mass, after.mass, atol=1e-6)
    for key in set(keys):
        own = [place for place, other in enumerate(keys) if other == key]
        assert after.mass[own].sum() == pytest.approx(before.mass[own].sum(), abs=1e-12)


def test_a_leaf_that_is_all_heap_has_no_mass() -> None:
    """A spike among crowded values: the tree reaches single cells, the spike's own too."""
    values = np.r_[np.tile(np.arange(4000, 4016), 500), np.full(4000, 4007)]
    for seed in range(5):
        coder = coder_of(fit(filled(SHORT, values), 0.2, seed=seed))
        assert coder.heaps.tolist() == [4007]
        assert 4007 in coder.starts
        assert coder.mass[coder.starts == 4007] == 0


@pytest.mark.parametrize(("mu", "deeper"), [(0.002, False), (2.0, True)])
def test_a_tree_is_grown_only_as_far_as_mass_is_clear_of_the_noise(mu: float, deeper: bool) -> None:
    coder = coder_of(fit(filled(SHORT, smooth("bell", 10_000)), mu))
    assert (len(coder.starts) > math.ceil(10_000 / 16**3)) == deeper


@pytest.mark.parametrize("seed", range(3))
def test_adult_keeps_its_one_way_shares_at_epsilon_one(seed: int) -> None:
    """A twentieth of the squared budget of ε=1, encoded and decoded."""
    adult, mu = datasets.load("adult"), gaussian_mu(1.0, 1e-5) * math.sqrt(0.05)
    codec = fit(adult, mu, seed=seed, bins=20, heaps=16)
    made = codec.decode(codec.encode(adult), np.random.default_rng(seed))
    coder = Coder.fit(adult)
    gaps = []
    for before, after, levels in zip(
        coder.codes(adult).T, coder.codes(made).T, coder.levels, strict=True
    ):
        counts = [np.bincount(codes, minlength=levels) for codes in (before, after)]
        gaps.append(np.abs(counts[0] - counts[1]).sum() / 2 / len(adult))
    assert np.mean(gaps) < 0.004
    assert max(gaps) < 0.04


@pytest.mark.parametrize(("upper", "most"), [(999, 0.025), (999_999, 0.004), (10**9, 0.004)])
def test_noise_does_not_fill_empty_stretches(upper: int, most: float) -> None:
    """Rows fill the lowest 64th of the range. Were noise cut at 0 and left at that, a short grid
    would have 4 % of them above, and a long one 1 %."""
    column = Column("x", "integer", lower=0, upper=upper)
    rng, above = np.random.default_rng(0), []
    table = filled(column, np.floor(rng.random(20_000) * (upper + 1) / 64))
    for seed in range(5):
        codec = fit(table, 0.06, seed=seed, bins=20, heaps=16)
        made = codec.decode(codec.encode(table), rng).frame["x"]
        above.append((made > upper / 16).mean())
    assert np.mean(above) < most


# What may depend on rows


class Watching:
    """Stands in for a measurer: keeps the exact counts it is shown and answers something else.

    Whatever it answers is the same for all tables, so whatever differs has seen a row unpaid.
    """

    def __init__(self, sigma: float, seed: int = 0, scale: float = 60.0) -> None:
        self.sigma = sigma
        self.asked: list[tuple[str, int, int]] = []
        self.shown: list[list[np.ndarray]] = []
        self._rng = np.random.default_rng(seed)
        self._scale = scale

    def histograms(self, what: str, queries: int, parts: int = 1) -> "Watching":
        self.asked.append((what, queries, parts))
        self.shown.append([])
        return self

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        assert len(self.shown[-1]) < self.asked[-1][1], "more histograms than were paid for"
        self.shown[-1].append(np.array(counts, dtype=float))
        return self._rng.exponential(self._scale, counts.shape)


MIXED = Schema((COUNT, PRICE, AGE, RATIO, CENTS, LONG, KIND, SIZE, DIRECT), target="size")


def mixed(rows: int, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({c.name: values_of(c, rows, rng) for c in MIXED.columns})
    return Table.from_frame(frame, MIXED, strict=False)


@pytest.mark.parametrize(("sigma", "scale"), [(0.0, 60.0), (5.0, 60.0), (0.0, 3.0)])
def test_the_codec_is_made_of_noisy_answers_and_nothing_else(sigma: float, scale: float) -> None:
    """Two tables without a row in common, of other sizes: equal answers give equal codecs."""
    found = []
    for rows, seed in ((500, 0), (90, 1)):
        watching = Watching(sigma, scale=scale)
        codec = Codec.fit(mixed(rows, seed), watching, rows=300, bins=BINS, heaps=HEAPS)  # type: ignore[arg-type]
        found.append((codec.to_dict(), watching.asked, codec.layout, codec.used.tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize("heaps", [HEAPS, 0])
def test_the_questions_are_public_and_as_many_as_planned(heaps: int) -> None:
    """The ledger's events and what each has of the budget follow from the schema alone."""
    cells, steps = [("cells", 4)], ("round", 1)
    exact, spots = [("heaps", 8), ("bins", 4), steps], [("heaps", 4), ("bins", 8)]
    kinds = {"count": exact, "price": exact, "age": cells, "ratio": spots}
    kinds |= {"cents": [*spots, steps], "long": [*spots, steps]}
    kinds |= {} if heaps else {"direct": cells}
    planned = [
        (f"{kind}:{name}", parts)
        for name, questions in kinds.items()
        for kind, parts in questions
        if heaps or kind != "heaps"
    ]
    measured = [column.name for column in Codec.measured_columns(MIXED, BINS, heaps)]
    assert measured == list(kinds)
    assert Codec.questions(MIXED, BINS, heaps) == planned
    total = sum(parts for _, parts in planned)
    for rows, seed, mu in ((300, 0, 1.0), (20, 1, 0.02)):
        ledger = Ledger(1e-5)
        noisy = Measurer(ledger, mu, total, np.random.default_rng(seed))
        Codec.fit(mixed(rows, seed), noisy, rows=300, bins=BINS, heaps=heaps)
        assert [event.what for event in ledger.events] == [what for what, _ in planned]
        shares = [(event.sigma * mu) ** -2 for event in ledger.events]
        np.testing.assert_allclose(shares, [parts / total for _, parts in planned])


def test_marginals_are_made_of_noisy_answers_and_nothing_else() -> None:
    layout = Layout((4, 3, 5), 0)
    used = torch.ones(layout.width, dtype=torch.bool)
    found = []
    for rows, seed in ((500, 0), (90, 1)):
        codes = torch.from_numpy(drawn_codes(layout, rows, seed))
        made = Marginals.measure(codes, layout, used, Watching(1.0), ["a", "b", "c"])  # type: ignore[arg-type]
        found.append(made)
    assert torch.equal(found[0].prior, found[1].prior)
    assert torch.equal(found[0].given, found[1].given)


def neighbours(rows: int, seed: int) -> tuple[Table, Table]:
    """A table, and the same without one row."""
    table = mixed(rows, seed)
    gone = np.random.default_rng(seed).integers(rows)
    return table, table.take(np.delete(np.arange(rows), gone))


def assert_within_sensitivity(first: Watching, second: Watching) -> None:
    """One row more moves each histogram by at most one, so all of a part by √queries."""
    assert first.asked == second.asked
    for (_, queries, _), left, right in zip(first.asked, first.shown, second.shown, strict=True):
        assert len(left) == len(right) <= queries
        moves = [np.abs(a - b) for a, b in zip(left, right, strict=True)]
        assert all(move.sum() <= 1 for move in moves)
        assert sum((move**2).sum() for move in moves) <= queries


@pytest.mark.parametrize("seed", range(6))
def test_one_row_moves_what_is_counted_by_the_stated_sensitivity(seed: int) -> None:
    sides, tables = [Watching(1.0, seed), Watching(1.0, seed)], neighbours(120, seed)
    codecs = [
        Codec.fit(table, side, rows=120, bins=BINS, heaps=HEAPS)  # type: ignore[arg-type]
        for table, side in zip(tables, sides, strict=True)
    ]
    assert_within_sensitivity(*sides)
    sides = [Watching(1.0, seed), Watching(1.0, seed)]
    for codec, table, side in zip(codecs, tables, sides, strict=True):
        codes = codec.encode(table)
        Marginals.measure(codes, codec.layout, codec.used, side, MIXED.names)  # type: ignore[arg-type]
    assert_within_sensitivity(*sides)
    # One table for every column but the target, named for the ledger.
    asked = [f"marginal:{name}" for name in MIXED.names if name != MIXED.target]
    assert [what for what, _, _ in sides[0].asked] == asked


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("mu", [0.5, FREE])
def test_a_level_lies_where_it_is_encoded(name: str, mu: float) -> None:
    """A number in the level that it is the place of; categories only where they are ordered."""
    column = COLUMNS[name]
    codec = fit(table_of(column, 3000, 3), mu)
    values, used = codec.values.numpy(), codec.used.numpy()
    assert values.shape == (codec.layout.width,)
    assert np.isnan(values[~used]).all() or not column.numeric
    if column.nullable:
        assert np.isnan(values[-1])
    if not column.numeric:
        placed = np.arange(len(column.levels)) if column.ordered else np.nan
        np.testing.assert_array_equal(values[: len(column.levels)], placed)
        return
    places = used.nonzero()[0][: int(used.sum()) - int(column.nullable)]
    coder = codec.coders[0]
    found = coder.encode(pd.Series(values[places]))
    assert isinstance(coder, NumericCoder)
    heaps = found >= coder.bins
    # The mean of a bin may happen to be a heap, which is a level of its own.
    np.testing.assert_array_equal(found[~heaps], places[~heaps])
    assert (found[places >= coder.bins] == places[places >= coder.bins]).all()


# Marginals


def measured(codes: Any, layout: Layout, used: Any = None, mu: float = FREE, seed: int = 0):
    mask = torch.ones(layout.width, dtype=torch.bool) if used is None else torch.tensor(used)
    source = measurer(mu, Marginals.asked(layout), seed)
    names = [f"x{j}" for j in range(layout.columns)]
    return Marginals.measure(torch.as_tensor(codes), layout, mask, source, names)


def drawn_codes(layout: Layout, rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = [rng.dirichlet(np.ones(n)) for n in layout.levels]
    return np.stack([rng.choice(len(w), rows, p=w) for w in weights], axis=1)


@pytest.mark.parametrize("target", [None, 0, 2])
def test_without_noise_marginals_are_the_frequencies(target: int | None) -> None:
    layout = Layout((4, 3, 5), target)
    codes = drawn_codes(layout, 700, 1)
    found = measured(codes, layout)
    group = np.zeros(700, dtype=int) if target is None else codes[:, target]
    frame = pd.DataFrame(codes)
    shares = np.bincount(group, minlength=layout.groups) / 700
    np.testing.assert_allclose(found.prior, shares, atol=1e-12)
    for j, (start, n) in enumerate(zip(layout.offsets, layout.levels, strict=True)):
        for g in range(layout.groups):
            rows = frame[group == g] if j != target else frame
            expected = np.bincount(rows[j], minlength=n) / len(rows)
            np.testing.assert_allclose(found.given[g, start : start + n], expected, atol=1e-12)
        alone = np.bincount(codes[:, j], minlength=n) / 700
        np.testing.assert_allclose(found.one_way()[start : start + n], alone, atol=1e-12)


@pytest.mark.parametrize("target", [None, 0])
def test_a_single_column_is_its_own_marginal(target: int | None) -> None:
    layout = Layout((4,), target)
    codes = np.repeat([0, 1, 3], [5, 3, 2])[:, None]
    found = measured(codes, layout)
    assert Marginals.asked(layout) == 1
    np.testing.assert_allclose(found.one_way(), [0.5, 0.3, 0, 0.2], atol=1e-12)
    assert found.prior.shape == (layout.groups,)


@pytest.mark.parametrize("target", [None, 0, 2])
@pytest.mark.parametrize("mu", [FREE, 0.5, 0.005])
def test_marginals_are_distributions_and_leave_unused_levels_out(
    mu: float, target: int | None
) -> None:
    """Whatever the noise, for every column and for the target's own levels too."""
    layout = Layout((4, 3, 6), target)
    used = np.array([*(1, 1, 0, 1), *(1, 1, 1), *(0, 1, 1, 0, 1, 0)], dtype=bool)
    codes = np.stack([[0, 1, 3] * 40, [0, 1, 2] * 40, [1, 2, 4, 1] * 30], axis=1)
    blocks = np.split(used, np.cumsum(layout.levels)[:-1])
    for seed in range(5):
        found = measured(codes, layout, used, mu, seed)
        assert (found.prior >= 0).all()
        assert float(found.prior.sum()) == pytest.approx(1)
        assert (found.given >= 0).all()
        assert (found.given[:, ~used] == 0).all()
        for block in found.given.split(layout.levels, dim=-1):
            np.testing.assert_allclose(block.sum(-1), 1, atol=1e-9)
        if target is not None:
            assert (found.prior[~torch.from_numpy(blocks[target])] == 0).all()


def test_logits_are_finite_and_close_to_the_tables() -> None:
    layout = Layout((4, 3, 5), 0)
    found = measured(drawn_codes(layout, 300, 2), layout, mu=0.2)
    logits = found.logits(layout)
    assert logits.isfinite().all()
    assert (logits.exp() - found.given).abs().max() < 2e-3


def test_marginals_say_how_noisy_they_are() -> None:
    layout = Layout((6, 4, 2), 1)
    codes = drawn_codes(layout, 5000, 3)
    assert measured(codes, layout).noise == 0
    assert measured(codes, layout).values.isnan().all()
    found = [measured(codes, layout, mu=0.1, seed=seed) for seed in range(40)]
    for made in found:
        assert made.noise == pytest.approx(math.sqrt(2) / 0.1 / 5000, rel=0.05)
    cells = torch.stack([made.prior[:, None] * made.given for made in found])[:, 0]
    # Cells whose count is far above the noise are not moved by the projection.
    clear = cells.mean(0) > 6 * found[0].noise
    assert clear[:6].any()
    spread = cells.std(0)[:6][clear[:6]].mean()
    assert float(spread) == pytest.approx(found[0].noise, rel=0.25)


def test_noise_of_marginals_is_unbiased_and_shrinks_with_the_budget() -> None:
    layout = Layout((6, 4), 1)
    codes = drawn_codes(layout, 5000, 3)
    exact = measured(codes, layout).given
    errors = []
    for mu in (0.05, 0.5):
        found = torch.stack([measured(codes, layout, mu=mu, seed=s).given for s in range(30)])
        errors.append(float((found - exact).abs().mean()))
        bias = (found.mean(0) - exact).abs()
        spread = found.std(0) / math.sqrt(30)
        assert (bias[exact > 0.1] < 5 * spread[exact > 0.1] + 1e-9).all()
    assert errors[0] > 4 * errors[1]
