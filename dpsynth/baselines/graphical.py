"""AIM and MST: graphical models of noisy tables, fitted by the package `mbi`.

Both measure tables that the exponential mechanism chose and fit the graphical model of greatest
entropy to them (McKenna, Sheldon & Miklau 2019). They differ in what they choose: MST a spanning
tree of pairs (McKenna, Miklau & Sheldon 2021), AIM in many rounds whatever the model still gets
most wrong, as long as it stays small (McKenna, Mullins, Sheldon & Miklau 2022, PVLDB 15(11)). Here
they run on the library's private codec, start from the label × column tables that it has paid for,
and are paid out of one Gaussian purse.

A fitted model is kept as a pool of rows drawn from it. `mbi` is no dependency:
`pip install 'dpsynth[marginals]'`.
"""

from __future__ import annotations

import importlib
import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpsynth.baselines.marginal import NaiveBayes
from dpsynth.baselines.tree import one_way_counts, refuse_components
from dpsynth.checks import UsageError, check_count, check_positive
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals, NoisyTable
from dpsynth.networks import sample_columns
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng, derive
from dpsynth.survey import Survey

__all__ = ["Aim", "Mst"]

_POOL = 1 << 16
_DEGREE, _MODEL_MB = 3, 80.0
# Of a round or of all: the part that its choice is paid from.
_AIM_CHOICE, _MST_CHOICE = 0.1, 1 / 3
# Rounds a column that AIM begins with; without noise it has no reason to go slowly.
_ROUNDS, _EXACT_ROUNDS = 16, 2
# Steps of mirror descent: at first, between rounds, at last.
_FIRST, _BETWEEN, _LAST = 500, 100, 2000
# Fits after which compiled programs are dropped: each model has its own, and a process may have so
# many memory maps only.
_PROGRAMS = 32
# Noise below which a table counts as no more exact.
_EXACT = 1.0
# Most cells of a table that AIM may choose, and most of its memory.
_MOST_CELLS, _MOST_PART = 300_000, 0.1
# E|N(0, σ²)| / σ.
_MEAN = math.sqrt(2 / math.pi)

_Columns = tuple[int, ...]


class _Pooled(NaiveBayes):
    """Samples from a pool of rows without replacement, as often as it takes.

    Its loss is that of a DP naive Bayes of the same label × column tables: a fitted graphical model
    is not kept, so a row's own likelihood is not known.

    Args:
        pool: Rows that are kept, a run.
    """

    surveys = True

    pool: Tensor

    def __init__(self, layout: Layout, runs: int, *, pool: int = _POOL, **common: Any) -> None:
        refuse_components(self.family, common)
        super().__init__(layout, runs, **common)
        check_count("pool", pool)
        size = (runs, pool, layout.columns)
        self.register_buffer("pool", torch.zeros(size, dtype=torch.int16))

    @classmethod
    def survey(
        cls, survey: Survey, plan: PrivacyPlan, options: Mapping[str, Any], device: str
    ) -> Tensor | None:
        """Choose, measure and fit; (pool, D), or nothing where there is one column."""
        del plan, device
        if survey.layout.columns < 2:
            return None
        with _quiet_mbi() as mbi:
            fit = _Fit(mbi, survey)
            cls.measure(fit, survey, options)
            return fit.rows(options.get("pool", _POOL))

    @classmethod
    @abstractmethod
    def measure(cls, fit: _Fit, survey: Survey, options: Mapping[str, Any]) -> None:
        """Spend the purse on tables and leave the model fitted to them."""

    def prepare(
        self,
        marginals: Sequence[Marginals],
        used: Sequence[Tensor],
        rng: FleetRng,
        surveyed: Sequence[Any] | None = None,
    ) -> None:
        """Keep each run's rows; without a survey those of naive Bayes."""
        super().prepare(marginals, used, rng, surveyed)
        found = list(surveyed or [None] * self.runs)
        if not all(isinstance(rows, Tensor) for rows in found):
            draws = rng.at("pool")
            group = self.draw_groups(self.pool.shape[1], draws, None)
            codes = sample_columns(self.offset(group), self.layout.levels, draws)
            self.pool.copy_(self.with_target(codes, group))
        for run, rows in enumerate(found):
            if isinstance(rows, Tensor):
                self.pool[run] = rows

    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        keys = rng.at("sample").uniform(self.pool.shape[1])
        level = (given or {}).get(self.layout.target) if self.layout.target is not None else None
        parts = []
        for pool, order in zip(self.pool, keys.argsort(-1), strict=True):
            shuffled = pool[order]
            if level is not None:
                shuffled = shuffled[shuffled[:, self.layout.target] == level]
                if not len(shuffled):
                    raise UsageError(
                        f"target level {level}: no row of the pool has it; raise the option pool"
                    )
            place = torch.arange(rows, device=pool.device) % len(shuffled)
            parts.append(shuffled[place].long())
        return torch.stack(parts)


class Mst(_Pooled):
    """A spanning tree of pairs, each chosen by how far it is from independence."""

    family = "mst"
    suits = "For comparison: the usual tree of two-way tables, by the package mbi."

    @classmethod
    def measure(cls, fit: _Fit, survey: Survey, options: Mapping[str, Any]) -> None:
        """A third of the purse chooses the D - 1 pairs one by one, the rest measures them."""
        del options
        columns, marginals = survey.layout.columns, survey.marginals
        alone = one_way_counts(marginals.tables, survey.layout, fit.masks, marginals.rows)
        apart = {
            (i, j): np.outer(alone[i], alone[j]) / marginals.rows for i, j in fit.candidates(2)
        }
        group = list(range(columns))
        chosen: list[_Columns] = []
        for _ in range(columns - 1):
            left = {pair: t for pair, t in apart.items() if group[pair[0]] != group[pair[1]]}
            first, second = survey.farthest(left, _MST_CHOICE / (columns - 1))
            chosen.append((first, second))
            group = [group[first] if g == group[second] else g for g in group]
        known = [table for table in marginals.tables if tuple(sorted(table.columns)) in chosen]
        share = survey.purse.left / len(chosen) * (1 - 1e-9)
        fit.take([*fit.one_way(alone), *known, *survey.tables(chosen, [share] * len(chosen))])
        fit.run(_LAST)


class Aim(_Pooled):
    """Round by round the table that the model gets most wrong, for what is left.

    Args:
        degree: Columns of the largest tables; 2 for wide tables.
        max_model_mb: Largest size of the graphical model in MiB, all of the purse being spent.
        rounds: How many rounds a column the purse is divided into at first; fewer take less time.
    """

    family = "aim"
    suits = (
        "For comparison: the strongest published choice of tables, by the package mbi; minutes to "
        "hours a run."
    )

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        degree: int = _DEGREE,
        max_model_mb: float = _MODEL_MB,
        rounds: int = _ROUNDS,
        **common: Any,
    ) -> None:
        super().__init__(layout, runs, **common)
        check_count("degree", degree, least=2)
        check_positive("max_model_mb", max_model_mb)
        check_count("rounds", rounds)

    @classmethod
    def measure(cls, fit: _Fit, survey: Survey, options: Mapping[str, Any]) -> None:
        """Budget annealing: shares grow fourfold where a table has told nothing new."""
        degree = min(options.get("degree", _DEGREE), survey.layout.columns)
        most = options.get("max_model_mb", _MODEL_MB)
        purse = survey.purse
        workload = [
            columns for size in range(2, degree + 1) for columns in fit.candidates(size, most)
        ]
        fit.take(survey.marginals.tables)
        fit.run(_FIRST)
        rounds = options.get("rounds", _ROUNDS)
        rounds = rounds if purse.sigma(1.0) else min(rounds, _EXACT_ROUNDS)
        share = 1 / (rounds * survey.layout.columns)
        last = False
        while not last:
            if purse.left < 2 * share:
                share, last = purse.left * (1 - 1e-9), True
            sigma = purse.sigma((1 - _AIM_CHOICE) * share)
            allowed = fit.allowed(workload, most * (1 - purse.left + share))
            if not allowed:
                break
            columns = survey.farthest(
                {columns: fit.table(columns) for columns in allowed},
                _AIM_CHOICE * share,
                weights=[len(columns) for columns in allowed],
                penalties=[_MEAN * sigma * fit.cells(columns) for columns in allowed],
            )
            before = fit.table(columns)
            fit.take(survey.tables([columns], [(1 - _AIM_CHOICE) * share]))
            fit.run(_LAST if last else _BETWEEN)
            if _gap(fit.table(columns), before) <= _MEAN * sigma * fit.cells(columns):
                share *= 4
        if not last:
            fit.run(_LAST)


def _gap(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(counts - expected).sum())


class _Fit:
    """The state of a fit: measurements over levels that can occur, and the model of the last run.

    Args:
        mbi: The package.
        survey: Answers.
    """

    def __init__(self, mbi: Any, survey: Survey) -> None:
        self._mbi, self._survey = mbi, survey
        layout = survey.layout
        self.masks = [mask.numpy() for mask in survey.used.split(list(layout.levels))]
        self.inside = [np.flatnonzero(mask) for mask in self.masks]
        names = list(range(layout.columns))
        self._domain = mbi.Domain(names, [len(kept) for kept in self.inside])
        self._measured: list[Any] = []
        self._model: Any = None
        self._fits = 0

    def cells(self, columns: _Columns) -> int:
        """Cells of a table that can occur."""
        return math.prod(len(self.inside[c]) for c in columns)

    def candidates(self, size: int, most_mb: float = math.inf) -> list[_Columns]:
        """All tables of so many columns that are small enough; pairs always are."""
        subsets = itertools.combinations(range(self._survey.layout.columns), size)
        most = min(_MOST_CELLS, most_mb * _MOST_PART * 2**20 / 8)
        return [columns for columns in subsets if size == 2 or self.cells(columns) <= most]

    def allowed(self, workload: Sequence[_Columns], megabytes: float) -> list[_Columns]:
        """Tables that keep the model below a size, or are part of what it has."""
        held = [measurement.clique for measurement in self._measured]
        size = importlib.import_module("mbi.junction_tree").hypothetical_model_size
        return [
            columns
            for columns in workload
            if any(set(columns) <= set(clique) for clique in held)
            or size(self._domain, [*held, columns]) <= megabytes
        ]

    def one_way(self, alone: Sequence[np.ndarray]) -> list[NoisyTable]:
        """Counts of single columns as tables, with the noise of a label × column table's sums."""
        layout, tables = self._survey.layout, self._survey.marginals.tables
        sigma = max(table.sigma for table in tables) * math.sqrt(layout.groups)
        return [NoisyTable((column,), counts, sigma) for column, counts in enumerate(alone)]

    def take(self, tables: Sequence[NoisyTable]) -> None:
        """Add measurements."""
        for table in tables:
            cut = table.counts[np.ix_(*(self.inside[c] for c in table.columns))]
            sigma = max(table.sigma, _EXACT)
            measured = self._mbi.LinearMeasurement(cut.ravel(), table.columns, sigma)
            self._measured.append(measured)

    def run(self, steps: int) -> None:
        """Mirror descent from the last model."""
        estimation = importlib.import_module("mbi.estimation")
        self._model = estimation.MirrorDescent().estimate(
            self._domain,
            self._measured,
            known_total=float(self._survey.marginals.rows),
            iters=steps,
            warm_start=self._model,
        )
        self._junction = _Junction(self._model)
        self._fits += 1
        if self._fits % _PROGRAMS == 0:
            importlib.import_module("jax").clear_caches()

    def table(self, columns: _Columns) -> np.ndarray:
        """Expected counts, 0 where a level cannot occur."""
        layout = self._survey.layout
        full = np.zeros(tuple(layout.levels[c] for c in columns))
        full[np.ix_(*(self.inside[c] for c in columns))] = self._junction.table(columns)
        return full

    def rows(self, number: int) -> Tensor:
        """Rows of the model (number, D), by rounding rather than by chance where that can be."""
        with _numpy_seed(derive(0, "pool") % 2**32):
            drawn = self._model.synthetic_data(rows=number).to_dict()
        codes = [kept[np.asarray(drawn[c]).astype(int)] for c, kept in enumerate(self.inside)]
        return torch.from_numpy(np.stack(codes, axis=1)).to(torch.int16)


class _Junction:
    """Tables of a fitted model from the marginals of its junction tree, in NumPy: mbi would compile
    a program for each table of each round.

    Args:
        model: As mbi fits it.
    """

    def __init__(self, model: Any) -> None:
        trees = importlib.import_module("mbi.junction_tree")
        oracles = importlib.import_module("mbi.marginal_oracles")
        self._contract = importlib.import_module("opt_einsum").contract
        tree, _ = trees.make_junction_tree(model.domain, [tuple(c) for c in model.cliques])
        marginals = oracles.message_passing_stable(
            model.potentials.expand(list(tree.nodes)), model.total
        )
        self._total = float(model.total)
        self._near = {clique: set(tree.neighbors(clique)) for clique in tree.nodes}
        self._mass = {
            clique: np.asarray(marginals.project(clique).datavector(flatten=False), dtype=float)
            for clique in tree.nodes
        }

    def table(self, columns: _Columns) -> np.ndarray:
        """Expected counts of columns, by the cells that can occur."""
        holding = [clique for clique in self._mass if set(columns) <= set(clique)]
        if holding:
            smallest = min(holding, key=lambda clique: self._mass[clique].size)
            return self._projected(smallest, columns)
        operands: list[Any] = []
        near, seen, trees = self._pruned(set(columns)), set(), 0
        for root in near:
            if root in seen:
                continue
            trees += 1
            stack: list[tuple[_Columns, _Columns | None]] = [(root, None)]
            while stack:
                clique, above = stack.pop()
                seen.add(clique)
                operands += self._given(clique, above, near, columns)
                stack += [(other, clique) for other in near[clique] if other != above]
        counts = self._contract(*operands, list(columns))
        # Each tree has the number of rows as its mass.
        return np.asarray(counts) / self._total ** (trees - 1)

    def _pruned(self, wanted: set[int]) -> dict[_Columns, set[_Columns]]:
        """The junction tree without leaves that say nothing more of what is wanted."""
        near = {clique: set(others) for clique, others in self._near.items()}
        going = True
        while going:
            going = False
            for clique, others in list(near.items()):
                inside = wanted & set(clique)
                leaf = len(others) == 1 and inside <= set(next(iter(others)))
                if leaf or (not others and not inside):
                    going = True
                    for other in near.pop(clique):
                        near[other].discard(clique)
        return near

    def _given(
        self,
        clique: _Columns,
        above: _Columns | None,
        near: Mapping[_Columns, set[_Columns]],
        columns: _Columns,
    ) -> list[Any]:
        """What a clique adds to a product: its counts, or its distribution given the clique above,
        without the columns that nobody asks for; and the names of the axes."""
        shared = {c for other in near[clique] for c in clique if c in other}
        kept = tuple(c for c in clique if c in shared or c in columns)
        counts = self._projected(clique, kept)
        if above is None:
            return [counts, list(kept)]
        axes = tuple(a for a, c in enumerate(kept) if c not in above)
        whole = counts.sum(axis=axes, keepdims=True)
        return [np.divide(counts, whole, out=np.zeros_like(counts), where=whole > 0), list(kept)]

    def _projected(self, clique: _Columns, columns: _Columns) -> np.ndarray:
        """Counts of some columns of a clique, in their order."""
        gone = tuple(a for a, c in enumerate(clique) if c not in columns)
        kept = [c for c in clique if c in columns]
        return self._mass[clique].sum(axis=gone).transpose([kept.index(c) for c in columns])


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """mbi draws from NumPy's global generator, which is put back afterwards: equal models give
    equal rows, and nothing else notices."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


@contextmanager
def _quiet_mbi() -> Iterator[Any]:
    """The package, in double precision, without its advice about JAX.

    Raises:
        UsageError: Where it is not installed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="mbi")
        try:
            mbi, jax = importlib.import_module("mbi"), importlib.import_module("jax")
        except ImportError as error:
            raise UsageError(
                "model=aim and model=mst need the package mbi: pip install 'dpsynth[marginals]'"
            ) from error
        with jax.enable_x64(True):
            yield mbi
