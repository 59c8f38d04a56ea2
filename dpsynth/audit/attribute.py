"""Attribute inference and singling out: what a synthetic table tells of members beyond strangers.

An attacker who learns a population from any honest sample guesses right about strangers, too. Only
the excess over a control of rows that the generator never saw speaks of the generator: the
advantage (r_members − r_control)/(1 − r_control), how much of the room that strangers leave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from dpsynth.audit.attacks import tree_classifier, tree_features
from dpsynth.audit.neighbours import MISSING, Features, quantile_map
from dpsynth.checks import UsageError, check_count
from dpsynth.data import Table
from dpsynth.devices import resolve

__all__ = ["Advantage", "infer_attributes", "single_out", "wilson"]

Z95 = float(special.ndtri(0.975))
# Entries of one block of distances or truth values.
BLOCK = 1 << 22
EQUAL, AT_LEAST, AT_MOST, ABSENT = range(4)


def wilson(hits: int, trials: int) -> tuple[float, float, float]:
    """Share with its 95 % interval (Wilson 1927): (share, low, high)."""
    check_count("trials", trials)
    check_count("hits", hits, least=0)
    if hits > trials:
        raise UsageError(f"hits={hits}: more than the {trials} trials")
    share, weight = hits / trials, Z95**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    reach = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    # At 0 and 1 the ends are exact, whatever the rounding.
    return (
        share,
        max(0.0, middle - reach) if hits else 0.0,
        (min(1.0, middle + reach) if hits < trials else 1.0),
    )


@dataclass(frozen=True)
class Advantage:
    """Successes on members beside those on control rows; every property is (value, low, high).

    Intervals are 95 % each, so of twenty honest ones about one misses.

    Attributes:
        target: The secret column, or the kind of predicate.
        attacker: `trees`, `nearest` or `single_out`.
        member_hits: Successes on members, of `member_trials`.
        control_hits: Successes on control rows, of `control_trials`.
    """

    target: str
    attacker: str
    member_hits: int
    member_trials: int
    control_hits: int
    control_trials: int

    def __post_init__(self) -> None:
        wilson(self.member_hits, self.member_trials)
        wilson(self.control_hits, self.control_trials)

    @property
    def members(self) -> tuple[float, float, float]:
        """Success rate on members, with Wilson's interval."""
        return wilson(self.member_hits, self.member_trials)

    @property
    def control(self) -> tuple[float, float, float]:
        """Success rate on control rows, with Wilson's interval."""
        return wilson(self.control_hits, self.control_trials)

    @property
    def difference(self) -> tuple[float, float, float]:
        """r_members − r_control, with the interval of Newcombe 1998 (method 10)."""
        (p, p_low, p_high), (q, q_low, q_high) = self.members, self.control
        low = p - q - math.hypot(p - p_low, q_high - q)
        return p - q, low, p - q + math.hypot(p_high - p, q - q_low)

    @property
    def advantage(self) -> tuple[float, float, float]:
        """(r_members − r_control)/(1 − r_control), cut at −1.

        The interval is that of Newcombe carried over to the ratio of failure rates (MOVER-R, Donner
        & Zou 2012), so it contains 0 exactly where the interval of `difference` does. Where the
        control leaves no room the value is −1, or 0 if the members leave none either, and the
        interval says how little is known.
        """
        failed = [self.member_trials - self.member_hits, self.control_trials - self.control_hits]
        a, a_low, a_high = wilson(failed[0], self.member_trials)
        b, b_low, b_high = wilson(failed[1], self.control_trials)
        product = a * b
        least, most = a_low * (2 * a - a_low), a_high * (2 * a - a_high)
        # Both roots in the form that loses no digits.
        root = math.sqrt(max(0.0, product**2 - least * b_high * (2 * b - b_high)))
        ratio_low = least / (product + root) if least else 0.0
        square, room = product**2, b_low * (2 * b - b_low)
        root = math.sqrt(max(0.0, square - most * room))
        ratio_high = (product + root) / room if room > 0 else math.inf
        value = 1 - a / b if failed[1] else -1.0 if failed[0] else 0.0
        return max(-1.0, value), max(-1.0, 1 - ratio_high), max(-1.0, 1 - ratio_low)


# -- attribute inference -----------------------------------------------------------------------


def infer_attributes(
    synthetic: Table,
    *,
    members: Table,
    holdout: Table,
    reference: Table,
    rng: np.random.Generator,
    secrets: Sequence[str] | None = None,
    bins: int = 10,
    max_candidates: int = 2000,
    max_train: int = 10_000,
    device: str = "cpu",
) -> tuple[Advantage, ...]:
    """Guess each secret column of a row from all its others, on members and on the holdout.

    Two attackers who know the synthetic table: boosted trees fitted on it, and the value of the
    nearest synthetic row, which finds what was copied. A number counts as inferred when the guess
    falls into the same of `bins` quantile bins of the reference; a value that fills several of
    them, such as a spike at 0, is a bin of its own. Rows whose secret is missing are left out.

    Args:
        synthetic: What the generator put out.
        members: Rows that it saw.
        holdout: Rows that it did not see, from the same population: the control.
        reference: Other rows of the population, for the bins and the metric.
        rng: Draws the candidates and seeds the trees.
        secrets: Columns to infer; all of them if not given.
        bins: Quantile bins of a number.
        max_candidates: Most rows of members and of holdout together, equally many of both.
        max_train: Most synthetic rows that trees learn from; the nearest row is sought among all.
        device: Where the nearest row is sought.

    Returns:
        Two a secret, `trees` and `nearest`, in the order of the schema.

    Raises:
        UsageError: On tables under different schemas, an unknown secret, fewer than two columns or
            two rows a table, a secret that is missing in all candidates of a side or in all
            synthetic rows, or a device that is not there.
    """
    check_count("bins", bins, least=2)
    check_count("max_train", max_train, least=2)
    _check_tables(synthetic, members, holdout, reference)
    names = _secrets(synthetic, secrets)
    sides = _candidates(members, holdout, max_candidates, rng)
    learnt = _some(synthetic, max_train, rng)
    spots = [_nearest(side, synthetic, reference, names, device) for side in sides]
    found = []
    for name in names:
        edges = _edges(reference, name, bins)
        truths = [_codes(side, name, edges) for side in sides]
        kept = [np.flatnonzero(truth >= 0) for truth in truths]
        if not all(len(rows) for rows in kept):
            raise UsageError(f"secret {name!r}: is missing in all candidates of a side; leave out")
        guesses = {
            "trees": _tree_guesses(learnt, sides, name, edges, rng),
            "nearest": [_codes(synthetic, name, edges)[spot[name]] for spot in spots],
        }
        for attacker, guessed in guesses.items():
            hits = [int((g == t)[k].sum()) for g, t, k in zip(guessed, truths, kept, strict=True)]
            counts = (hits[0], len(kept[0]), hits[1], len(kept[1]))
            found.append(Advantage(name, attacker, *counts))
    return tuple(found)


def _check_tables(synthetic: Table, members: Table, holdout: Table, reference: Table) -> None:
    parts = {"members": members, "holdout": holdout, "reference": reference}
    for name, part in parts.items():
        if part.schema.columns != synthetic.schema.columns:
            raise UsageError(f"synthetic and {name} have different schemas; use the run's schema")
    for name, part in {"synthetic": synthetic, **parts}.items():
        if len(part) < 2:
            raise UsageError(f"{name} has {len(part)} rows; inference needs at least 2")


def _secrets(table: Table, secrets: Sequence[str] | None) -> list[str]:
    known = table.schema.names
    if len(known) < 2:
        raise UsageError(f"columns={known}: there is no other column to infer it from")
    wanted = known if secrets is None else list(secrets)
    for name in wanted:
        if name not in known:
            raise UsageError(f"secret {name!r}: no such column; choose from {', '.join(known)}")
    return [name for name in known if name in wanted]


def _candidates(
    members: Table, holdout: Table, most: int, rng: np.random.Generator
) -> tuple[Table, Table]:
    """Equally many random rows of both."""
    check_count("max_candidates", most, least=4)
    size = min(most // 2, len(members), len(holdout))
    return _some(members, size, rng), _some(holdout, size, rng)


def _some(table: Table, most: int, rng: np.random.Generator) -> Table:
    return table if len(table) <= most else table.take(rng.permutation(len(table))[:most])


def _edges(reference: Table, name: str, bins: int) -> np.ndarray:
    """Inner edges of a number's quantile bins; none for a category."""
    if not reference.schema[name].numeric:
        return np.empty(0)
    values = reference.frame[name].to_numpy(dtype=float, na_value=np.nan)
    values = values[~np.isnan(values)]
    if not len(values):
        return np.empty(0)
    edges, counts = np.unique(
        np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]), return_counts=True
    )
    # A value that fills several bins has one of its own, cut off just above it, too.
    return np.union1d(edges, np.nextafter(edges[counts > 1], math.inf))


def _codes(table: Table, name: str, edges: np.ndarray) -> np.ndarray:
    """Bin or level of each row (rows,), -1 where missing."""
    column = table.frame[name]
    if not table.schema[name].numeric:
        return column.cat.codes.to_numpy(dtype=np.int64)
    values = column.to_numpy(dtype=float, na_value=np.nan)
    return np.where(np.isnan(values), -1, np.searchsorted(edges, values, side="right"))


def _tree_guesses(
    learnt: Table,
    sides: Iterable[Table],
    name: str,
    edges: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    inputs = [other for other in learnt.schema.names if other != name]
    truth = _codes(learnt, name, edges)
    rows = np.flatnonzero(truth >= 0)
    if not len(rows):
        raise UsageError(f"secret {name!r}: is missing in all synthetic rows; leave it out")
    known = learnt.select(inputs)
    if len(np.unique(truth[rows])) == 1:
        return [np.full(len(side), truth[rows[0]]) for side in sides]
    features = tree_features(known)[rows]
    # scikit-learn refuses to bin a column without any value; any constant is as good.
    features[:, np.isnan(features).all(axis=0)] = 0.0
    model = tree_classifier(known, rng).fit(features, truth[rows])
    return [model.predict(tree_features(side.select(inputs))) for side in sides]


def _nearest(
    candidates: Table, synthetic: Table, reference: Table, names: Sequence[str], device: str
) -> dict[str, np.ndarray]:
    """Row of `synthetic` nearest to each candidate in all columns but the secret, by secret.

    Squared L2 over reference quantiles and unequal categories; a number that is missing on one
    side only counts 1 more. One matrix product gives all columns' sum in single precision, and
    each secret's own part is taken off again. Rows without the secret are passed over.
    """
    measure, place = quantile_map(reference), resolve(device)
    asked, known = (_Side.of(measure(table), place) for table in (candidates, synthetic))
    columns = {column.name: column for column in synthetic.schema.columns}
    order = (
        [n for n, c in columns.items() if c.numeric],
        [n for n, c in columns.items() if not c.numeric],
    )
    lacking = {
        name: torch.tensor(np.array(synthetic.frame[name].isna()), device=place) for name in names
    }
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    step = max(1, BLOCK // max(1, len(known)))
    for start in range(0, len(asked), step):
        part = asked.rows(start, start + step)
        whole = part.distances(known)
        for name in names:
            numeric = columns[name].numeric
            own = part.own(known, order[not numeric].index(name), numeric)
            rest = (whole - own).masked_fill_(lacking[name], math.inf)
            found[name].append(rest.argmin(1))
    return {name: torch.cat(parts).cpu().numpy() for name, parts in found.items()}


@dataclass(frozen=True, eq=False)
class _Side:
    """Rows on a device: numbers and whether they are missing (rows, numeric columns), codes (rows,
    categorical columns), and all of it as vectors whose squared distance is the sum over columns.
    """

    numbers: Tensor
    absent: Tensor
    codes: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, features: Features, place: torch.device) -> _Side:
        absent = features.numbers == MISSING
        numbers = torch.from_numpy(np.where(absent, 0.5, features.numbers) - 0.5).float()
        lack, codes = torch.from_numpy(absent).float(), torch.from_numpy(features.codes)
        # Two unequal categories are √½ apart from 0 each, hence 1 from each other.
        hot = [
            torch.nn.functional.one_hot(codes[:, j], count) * math.sqrt(0.5)
            for j, count in enumerate(features.levels)
        ]
        vectors = torch.cat([numbers, lack, *hot], dim=1).float()
        return cls(*(part.to(place) for part in (numbers, lack, codes, vectors)))

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, start: int, stop: int) -> _Side:
        part = slice(start, stop)
        return _Side(self.numbers[part], self.absent[part], self.codes[part], self.vectors[part])

    def distances(self, keys: _Side) -> Tensor:
        """Squared distances over all columns: (rows, keys)."""
        lengths = (self.vectors**2).sum(1)[:, None] + (keys.vectors**2).sum(1)
        return lengths.addmm_(self.vectors, keys.vectors.T, alpha=-2)

    def own(self, keys: _Side, place: int, numeric: bool) -> Tensor:
        """What one column adds to them: (rows, keys)."""
        if not numeric:
            return (self.codes[:, place, None] != keys.codes[:, place]).float()
        gap = self.numbers[:, place, None] - keys.numbers[:, place]
        lack = self.absent[:, place, None] - keys.absent[:, place]
        return gap.square_().add_(lack.square_())


# -- singling out ------------------------------------------------------------------------------


def single_out(
    synthetic: Table,
    *,
    members: Table,
    holdout: Table,
    rng: np.random.Generator,
    predicates: int = 1000,
    columns: int = 4,
) -> tuple[Advantage, ...]:
    """Predicates that hold for exactly one synthetic row: how many isolate exactly one member?

    Isolation by a predicate that was made without looking at the members is what anonymisation is
    to prevent (Cohen & Nissim 2020); some predicates isolate one row of any table of that size, so
    the same predicates are tried on as many holdout rows. `univariate`: a value that occurs once,
    a number beyond all others, a gap that occurs once. `multivariate`: of one synthetic row, its
    categories and on which side of it the rest of a number's values lies, in `columns` columns
    drawn at random; each row makes one predicate at most.

    Args:
        synthetic: What the generator put out.
        members: Rows that it saw.
        holdout: Rows that it did not see, from the same population.
        rng: Draws predicates, and rows where the parts differ in size.
        predicates: Most predicates of each kind.
        columns: Conditions of a multivariate predicate, at most one a column.

    Returns:
        One a kind, with a trial a predicate; a kind for which the synthetic table gives no
        predicate is left out.

    Raises:
        UsageError: On tables under different schemas or of fewer than two rows.
    """
    check_count("predicates", predicates)
    check_count("columns", columns)
    _check_tables(synthetic, members, holdout, members)
    size = min(len(members), len(holdout))
    made, *sides = (
        tree_features(table)
        for table in (synthetic, _some(members, size, rng), _some(holdout, size, rng))
    )
    numeric = np.array([column.numeric for column in synthetic.schema.columns])
    width = min(columns, len(numeric))
    kinds = {
        "univariate": _univariate(made, numeric, predicates, rng),
        "multivariate": _multivariate(made, numeric, width, predicates, rng),
    }
    found = []
    for kind, made_up in kinds.items():
        if len(made_up):
            hits = [int((made_up.matches(side) == 1).sum()) for side in sides]
            trials = len(made_up)
            found.append(Advantage(kind, "single_out", hits[0], trials, hits[1], trials))
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Predicates:
    """Conjunctions: predicate i holds where, for all j, `kind[i, j]` of column `place[i, j]`
    against `value[i, j]` does; (predicates, conditions) each."""

    place: np.ndarray
    kind: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: np.ndarray) -> _Predicates:
        return _Predicates(self.place[rows], self.kind[rows], self.value[rows])

    def matches(self, table: np.ndarray) -> np.ndarray:
        """Rows of `table` (rows, columns) for which each predicate holds: int (predicates,)."""
        step = max(1, BLOCK // len(table))
        parts = (
            self.take(np.arange(s, min(s + step, len(self)))) for s in range(0, len(self), step)
        )
        return np.concatenate([np.empty(0, dtype=np.int64), *(p._count(table) for p in parts)])

    def _count(self, table: np.ndarray) -> np.ndarray:
        columns = np.ascontiguousarray(table.T)
        holds = np.ones((len(self), len(table)), dtype=bool)
        for place, kind, value in zip(self.place.T, self.kind.T, self.value.T, strict=True):
            for which in np.unique(kind):
                rows = np.flatnonzero(kind == which)
                holds[rows] &= _holds(columns[place[rows]], which, value[rows, None])
        return holds.sum(axis=1)


def _holds(values: np.ndarray, kind: int, bound: np.ndarray) -> np.ndarray:
    """A missing value (NaN) is neither equal to, nor above, nor below any number."""
    if kind == EQUAL:
        return values == bound
    if kind == AT_LEAST:
        return values >= bound
    return values <= bound if kind == AT_MOST else np.isnan(values)


def _univariate(
    made: np.ndarray, numeric: np.ndarray, most: int, rng: np.random.Generator
) -> _Predicates:
    found = [each for j in range(made.shape[1]) for each in _of_column(made[:, j], j, numeric[j])]
    order = rng.permutation(len(found))[:most]
    table = np.array([found[i] for i in order], dtype=float).reshape(-1, 3)
    return _Predicates(table[:, :1].astype(int), table[:, 1:2].astype(int), table[:, 2:])


def _of_column(values: np.ndarray, place: int, numeric: bool) -> Iterator[tuple[int, int, float]]:
    absent = np.isnan(values)
    if absent.sum() == 1:
        yield place, ABSENT, 0.0
    distinct, counts = np.unique(values[~absent], return_counts=True)
    yield from ((place, EQUAL, value) for value in distinct[counts == 1].tolist())
    if numeric and len(distinct) > 1:
        if counts[-1] == 1:
            yield place, AT_LEAST, float(distinct[-1])
        if counts[0] == 1:
            yield place, AT_MOST, float(distinct[0])


def _multivariate(
    made: np.ndarray, numeric: np.ndarray, width: int, most: int, rng: np.random.Generator
) -> _Predicates:
    """The first `most` that hold for one synthetic row, of one drawn for each row."""
    present = np.where(np.isnan(made).all(axis=0), 0.0, made)
    middle = np.nanmedian(present, axis=0)
    rows = rng.permutation(len(made))
    place = rng.random(made.shape).argsort(axis=1)[:, :width]
    value = made[rows[:, None], place]
    side = np.where(value >= middle[place], AT_LEAST, AT_MOST)
    kind = np.where(np.isnan(value), ABSENT, np.where(numeric[place], side, EQUAL))
    drawn = _Predicates(place, kind, value)
    kept: list[np.ndarray] = [np.empty(0, dtype=np.int64)]
    step = 2 * most
    for start in range(0, len(drawn), step):
        part = np.arange(start, min(start + step, len(drawn)))
        kept.append(part[drawn.take(part).matches(made) == 1])
        if sum(map(len, kept)) >= most:
            break
    return drawn.take(np.concatenate(kept)[:most])
