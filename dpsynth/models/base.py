"""Generator: the contract of every family, and the one training step that all of them share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

import lightning
import torch
from torch import Tensor, nn

from dpsynth.checks import RefusedError, UsageError, check_count, check_fraction, check_positive
from dpsynth.chosen import Choice, choose_tables
from dpsynth.codec import Layout
from dpsynth.counter import CounterRng
from dpsynth.devices import resolve
from dpsynth.draws import RecordRng
from dpsynth.leading import Answers, Leading, cells_of
from dpsynth.marginals import Marginals
from dpsynth.mixture import Mixture, anchored, classed
from dpsynth.models.captured import CapturedSteps
from dpsynth.models.labels import LabelHead, balanced
from dpsynth.models.reconcile import corrected, evenly_within
from dpsynth.networks import draw_level, evenly
from dpsynth.optimizers import FALL, FleetAdam, RunwiseOptimizer
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng
from dpsynth.rows import MappedRows
from dpsynth.shapes import expand
from dpsynth.survey import Survey

__all__ = ["COMPONENTS", "Generator"]

_NEVER = -1e4
# Components of a mixture where nothing else is said.
COMPONENTS = 512
# Most rows that are reconciled together, for memory. For each level, rows that must be, enough for
# means, and rows that a label head is fitted to; least and most of both.
_MOST = 1 << 16
_RECONCILED, _SEEN = (32, 512, 1 << 13), (256, 2048, 1 << 16)
# Steps from which it pays to compile a captured step, which takes about a minute.
_LONG = 5000


class Generator(lightning.LightningModule, ABC):
    """R generators of one family, trained as one fleet.

    A family adds `record_loss` (one unreduced loss a record), `sample`, and, where it has weights
    that see no rows, `public_step`. Every logit starts from noisy tables of the run: those of label
    × column, so that an untrained network is a DP naive Bayes, or, with `components`, a mixture of
    products that agrees with chosen tables of three columns too. Training learns what they miss.

    A mixture's component is a hidden part of each record. In training it is drawn anew from its
    posterior given the record, which is public arithmetic on that record alone.

    Args:
        layout: Public shape of encoded rows.
        runs: R.
        lr: Learning rate, one for all runs or one each; constant, then decayed linearly over the
            last 30 % of a run's steps.
        average: Decay of the moving average of weights that is sampled from (post-processing).
        block: Private steps a Lightning `training_step`; by default 10, or 200 where captured.
        components: Most components of the mixture, 0 for naive Bayes.
        reconcile: Whether samples meet the tables: each column's logits are shifted until its mean
            probabilities given the target are those it starts from, draws are spread evenly, and
            the target is drawn last, by a `LabelHead`. It is post-processing.
    """

    family: ClassVar[str]
    # When it is the one to choose, for its card.
    suits: ClassVar[str]
    trained: ClassVar[bool] = True
    # Whether it has a use for tables of its own choice (`survey`).
    surveys: ClassVar[bool] = False
    # Default clipping bound: about the median norm of a record's gradient at the start. Far below
    # it every record is clipped to the same length, which under-weights rare levels.
    clip: ClassVar[float] = 1.0
    # Most rows that are drawn, and reconciled, together.
    together: ClassVar[int] = _MOST
    # Settings that the runs of one fleet may have for themselves.
    own: ClassVar[frozenset[str]] = frozenset({"lr"})

    network: nn.Module
    prior_logits: Tensor
    given_logits: Tensor
    weight_logits: Tensor
    component_logits: Tensor
    level_rank: Tensor
    noise: Tensor
    leading_columns: Tensor
    leading_logits: Tensor
    completed: Tensor

    def __init__(
        self,
        layout: Layout,
        runs: int,
        *,
        lr: float | Sequence[float] = 1e-3,
        average: float = 0.99,
        block: int | None = None,
        components: int = COMPONENTS,
        reconcile: bool = True,
    ) -> None:
        super().__init__()
        check_count("runs", runs)
        check_count("components", components, least=0)
        check_fraction("average", average)
        if block is not None:
            check_count("block", block)
        self.automatic_optimization = False
        self.layout, self.runs, self.decay, self.block = layout, runs, average, block
        self.lr = self.per_run("lr", lr)
        groups, width = layout.groups, layout.width
        self.register_buffer("prior_logits", torch.zeros(runs, groups))
        self.register_buffer("given_logits", torch.zeros(runs, groups, width))
        if reconcile not in (True, False):
            raise UsageError(f"reconcile={reconcile}: must be true or false")
        self.components, self.reconcile = components, bool(reconcile)
        self._heads: tuple[tuple[int, ...], list[LabelHead]] | None = None
        self.register_buffer("level_rank", torch.zeros(runs, width))
        self.register_buffer("noise", torch.zeros(runs))
        self.leads = classed(layout) and not anchored(layout) and layout.columns > 1
        if self.leads:
            # Positions of the columns that lead; -1 for none.
            self.register_buffer("leading_columns", torch.full((runs, 2), -1))
            shape = (runs, groups, cells_of(layout))
            self.register_buffer("leading_logits", torch.zeros(shape))
            self.register_load_state_dict_pre_hook(_nothing_leads)
        if components:
            self.register_buffer("weight_logits", torch.full((runs, components), _NEVER))
            self.register_buffer("component_logits", torch.zeros(runs, components, width))
        self.register_buffer("completed", torch.zeros(1, dtype=torch.long))
        self.total = 0

    def per_run(self, name: str, value: float | Sequence[float]) -> list[float]:
        """A positive setting of each run, given for all or one by one (runs,)."""
        values = [*value] if isinstance(value, Sequence) else [float(value)] * self.runs
        if len(values) != self.runs:
            raise UsageError(f"{name}: {len(values)} values for {self.runs} runs; give one each")
        for one in values:
            check_positive(name, one)
        return values

    @classmethod
    def planned(cls, plan: PrivacyPlan, columns: int) -> Mapping[str, Any]:
        """Settings of a plan that suit the family, where the user names none; from public facts.

        Args:
            plan: What is settled, with its other settings as they are by default.
            columns: D.
        """
        return {}

    @classmethod
    def survey(
        cls, survey: Survey, plan: PrivacyPlan, options: Mapping[str, Any], device: str
    ) -> Any:
        """Spend the share `tables` of the budget; what comes of it goes to `prepare`.

        Args:
            survey: Answers.
            plan: Calibrated.
            options: The family's settings.
            device: Where to compute.

        Returns:
            By default the mixture that agrees with the tables that are worth most.
        """
        choice = Choice.planned(survey.layout, plan.mu("tables"), plan.rows, survey.used)
        choice = choice.within(options.get("components", COMPONENTS))
        return choose_tables(survey, choice, device=resolve(device).type)

    # -- what a family adds ------------------------------------------------------------------

    @abstractmethod
    def reset(self, rng: FleetRng) -> None:
        """Draw the initial weights."""

    @abstractmethod
    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """One loss a record, averaged over its noise draws: (runs, batch, D) -> (runs, batch)."""

    @abstractmethod
    def draw(
        self,
        component: Tensor,
        group: Tensor,
        draws: Tensor,
        rng: FleetRng,
        given: Mapping[int, int],
    ) -> Tensor:
        """Codes (runs, rows, D) of rows with components and target levels (runs, rows).

        Args:
            component: Where each row starts (`offset`).
            group: Its target's level; the target's codes are put in afterwards.
            draws: One uniform draw a column (runs, rows, D); what else is drawn comes from `rng`.
            rng: Open.
            given: Columns that are fixed, of those that the family can fix.
        """

    @torch.no_grad()
    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        """Draw rows: codes (runs, rows, D). `given` fixes columns by position; a family that cannot
        condition on one of them draws it freely (see `conditions`)."""
        parts = []
        for number, size in enumerate(self.chunks(rows, self.together)):
            opened = rng.at("sample", number)
            # Few rows would all be bent to the tables, so more are drawn than are kept.
            least = self._enough(*_RECONCILED) if self.reconcile else 1
            drawn = self._rows(max(size, least), opened, given or {})
            parts.append(self._labelled(drawn, opened, given or {})[:, :size])
        return torch.cat(parts, dim=1)

    def _enough(self, each: int, least: int, most: int) -> int:
        """Rows by the number of levels; the same for all runs of a fleet."""
        return min(max(each * self.layout.width, least), most)

    def _rows(self, rows: int, rng: FleetRng, given: Mapping[int, int]) -> Tensor:
        component, group = self.draw_components(rows, rng, given)
        draws = rng.uniform(rows, self.layout.columns)
        if self.reconcile:
            pairs = zip(component, draws, strict=True)
            draws = torch.stack([evenly_within(part, drawn) for part, drawn in pairs])
        return self.with_target(self.draw(component, group, draws, rng, given), group)

    def _label_heads(self, rng: FleetRng) -> list[LabelHead]:
        """Of each run, fitted to rows that follow from its state alone, and kept as long as that
        stays."""
        state = tuple(value._version for value in self.state_dict().values())
        if self._heads is None or self._heads[0] != state:
            opened = FleetRng([0] * self.runs, device=rng.device, dtype=rng.dtype).at("labels")
            seen = self._rows(self._enough(*_SEEN), opened, {}).cpu()
            ranks = self.level_rank.cpu()
            heads = [
                LabelHead(seen[r], ranks[r], self.layout, self._leading(r))
                for r in range(self.runs)
            ]
            self._heads = (state, heads)
        return self._heads[1]

    def _leading(self, run: int) -> Leading | None:
        """What leads in a run, if the target is of that kind and anything does."""
        if not self.leads:
            return None
        columns = tuple(c for c in self.leading_columns[run].tolist() if c >= 0)
        return Leading(columns, self.leading_logits[run].cpu()) if columns else None

    def reconciled(self, logits: Tensor, component: Tensor, group: Tensor) -> Tensor:
        """Logits (runs, rows, W) whose means given the target are those of the tables."""
        if not self.reconcile:
            return logits
        levels, made = list(self.layout.levels), []
        for run, tables in enumerate(self.offset(component)):
            pairs = zip(logits[run].split(levels, -1), tables.split(levels, -1), strict=True)
            made.append(torch.cat([corrected(*pair, group[run]) for pair in pairs], dim=-1))
        return torch.stack(made)

    def _labelled(self, codes: Tensor, rng: FleetRng, given: Mapping[int, int]) -> Tensor:
        """Rows with the target drawn anew given all else, unless it is fixed or a number."""
        target = self.layout.target
        drawn_last = classed(self.layout) and self.layout.columns > 1 and target not in given
        if not (self.reconcile and drawn_last) or target is None:
            return codes
        offsets, made = rng.uniform(1)[:, 0], codes.clone()
        for run, head in enumerate(self._label_heads(rng)):
            rows, prior = codes[run].cpu(), self.prior_logits[run].cpu()
            blocks = self.given_logits[run].cpu().split(list(self.layout.levels), dim=-1)
            tables = [prior.softmax(-1)[:, None] * blocks[j].softmax(-1) for j in head.others]
            scores = head.scores(rows, tables, prior, float(self.noise[run]))
            drawn = balanced(scores, head.features(rows), float(offsets[run]))
            made[run, :, target] = drawn.to(made)
        return made

    def conditions(self) -> frozenset[int]:
        """Columns that `sample(given=…)` can fix exactly; the rest need rejection."""
        return frozenset() if self.layout.target is None else frozenset({self.layout.target})

    def attack_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """What a white-box attacker would look at, low for a member (runs, batch)."""
        return self.record_loss(codes, rng)

    @property
    def signal_names(self) -> tuple[str, ...]:
        """What each of `signals` is."""
        return ("loss",)

    def signal_losses(self, codes: Tensor, rng: FleetRng, draws: int) -> Tensor:
        """Several losses a record, low for a member: (runs, batch, D) -> (runs, batch, signals).

        Draws are shared by all records and runs, so that they are paired; a family whose
        `attack_loss` draws nothing has no more to add.
        """
        return self.attack_loss(codes, rng)[..., None]

    @property
    def public_every(self) -> int:
        """After how many private steps one `public_step` is due; 0 for never."""
        return 0

    def public_step(self, rng: FleetRng) -> None:
        """Training that touches no rows; families without one do nothing."""

    def averaged(self) -> nn.Module:
        """The module that is sampled from, whose weights are averaged over steps."""
        return self.network

    # -- shared ------------------------------------------------------------------------------

    def prepare(
        self,
        marginals: Sequence[Marginals],
        used: Sequence[Tensor],
        rng: FleetRng,
        surveyed: Sequence[Any] | None = None,
    ) -> None:
        """Take each run's noisy tables as starting logits; levels never used stay impossible.

        Whatever else a family needs to know before the first step follows from these, which are
        published with it, from `rng`, and from what `survey` gave.
        """
        found = surveyed or [None] * self.runs
        held = [
            model.marginals(m, self.layout) if isinstance(model, Mixture) else m
            for m, model in zip(marginals, found, strict=True)
        ]
        self._take_tables(held, used)
        for run, tables in enumerate(marginals):
            self.noise[run] = tables.noise
            blocks = tables.values.split(list(self.layout.levels))
            ranks = [block.argsort(stable=True).argsort() for block in blocks]
            self.level_rank[run] = torch.cat(ranks).to(self.level_rank)
            if self.leads:
                self._take_leading(run, tables, found[run])
        if self.components:
            self._take_components(held, used, found)

    def _take_leading(self, run: int, tables: Marginals, found: Any) -> None:
        """What leads by the tables asked besides, or by the label × column tables alone."""
        if isinstance(found, Mixture):
            leading = found.leading
        else:
            answers = Answers.settled(tables, self.layout)
            leading = answers.found({answers.alone[0].columns: answers.alone[0].counts})
        self.leading_columns[run] = -1
        if leading is not None:
            self.leading_columns[run, : len(leading.columns)] = torch.tensor(leading.columns)
            self.leading_logits[run, :, : leading.logits.shape[1]] = leading.logits

    def _take_tables(self, marginals: Sequence[Marginals], used: Sequence[Tensor]) -> None:
        prior = torch.stack([m.prior.clamp_min(1e-6).log() for m in marginals])
        given = torch.stack([m.logits(self.layout) for m in marginals])
        mask = torch.stack(list(used))[:, None, :]
        if self.layout.target is not None:
            start, groups = self.layout.offsets[self.layout.target], self.layout.groups
            prior = torch.where(mask[:, 0, start : start + groups], prior, _NEVER)
        self.prior_logits.copy_(prior)
        self.given_logits.copy_(torch.where(mask, given, _NEVER))

    def _take_components(
        self, marginals: Sequence[Marginals], used: Sequence[Tensor], found: Sequence[Any]
    ) -> None:
        for run, (tables, possible, model) in enumerate(zip(marginals, used, found, strict=True)):
            if not isinstance(model, Mixture):
                model = Mixture.naive_bayes(tables, self.layout)
            number = len(model.weight)
            if number > self.components:
                raise UsageError(
                    f"components={self.components}: the tables ask for {number}; raise it"
                )
            blocks = model.logits(tables, self.layout).where(possible, _NEVER)
            blocks = blocks.split(list(self.layout.levels), dim=-1)
            logits = torch.cat([block.log_softmax(-1) for block in blocks], dim=-1)
            weight = model.weight.clamp_min(1e-12).log().to(logits)
            if self.layout.target is not None:  # no component of a target level that cannot occur
                weight = weight + blocks[self.layout.target].logsumexp(-1)
            self.weight_logits[run] = _NEVER
            self.weight_logits[run, :number] = weight.clamp_min(_NEVER)
            self.component_logits[run, :number] = logits.clamp_min(_NEVER)

    def offset(self, component: Tensor) -> Tensor:
        """Starting logits of rows of components, or without them of target levels, (runs, rows) ->
        (runs, rows, W)."""
        run = torch.arange(self.runs, device=component.device)[:, None]
        held = self.component_logits if self.components else self.given_logits
        return held[run, component]

    def component_of(self, codes: Tensor, rng: FleetRng | None) -> Tensor:
        """A component of each record: codes (runs, rows, D) -> (runs, rows).

        Drawn from its posterior under the starting logits, or without `rng` the likeliest one.
        Without components it is the target's level.
        """
        if not self.components:
            return self.layout.group_of(codes)
        logits = self.weight_logits[:, None, :]
        for column in range(self.layout.columns):
            logits = logits + self.level_logits(column, codes[..., column])
        if rng is None:
            return logits.argmax(-1)
        return draw_level(logits, rng.uniform(codes.shape[1]))

    def level_logits(self, column: int, level: Tensor) -> Tensor:
        """Log-probability of a level (runs, rows) under each component (runs, rows, K)."""
        start, levels = self.layout.offsets[column], self.layout.levels[column]
        block = self.component_logits[:, :, start : start + levels].mT.contiguous()
        run = torch.arange(self.runs, device=level.device)[:, None]
        return block[run, level]

    def draw_components(
        self, rows: int, rng: FleetRng, given: Mapping[int, int] | None
    ) -> tuple[Tensor, Tensor]:
        """Components and target levels of new rows, (runs, rows) both; `given` fixes columns.

        Each component is drawn as often as it is due but for less than one row, in random order.
        """
        fixed = given or {}
        if not self.components:
            if self.layout.target in fixed:
                group = self.draw_groups(rows, rng, given)
            else:
                share = self.prior_logits.softmax(-1)
                group = evenly(share, rng.uniform(1)[:, 0], rng.uniform(rows))
            return group, group
        weight = self.weight_logits
        for column, level in fixed.items():
            at = torch.full((self.runs, 1), level, device=weight.device)
            weight = weight + self.level_logits(column, at)[:, 0]
        component = evenly(weight.softmax(-1), rng.uniform(1)[:, 0], rng.uniform(rows))
        target = self.layout.target
        if target is None:
            return component, torch.zeros_like(component)
        if target in fixed:
            return component, torch.full_like(component, fixed[target])
        start = self.layout.offsets[target]
        block = self.offset(component)[..., start : start + self.layout.groups]
        return component, draw_level(block, rng.uniform(rows))

    def components_given(self, group: Tensor, rng: FleetRng) -> Tensor:
        """A component of each target level (runs, rows), drawn from those that have it."""
        if not self.components:
            return group
        logits = self.weight_logits[:, None, :]
        if self.layout.target is not None:
            logits = logits + self.level_logits(self.layout.target, group)
        return draw_level(logits.expand(*group.shape, -1), rng.uniform(group.shape[1]))

    def group_one_hot(self, group: Tensor) -> Tensor:
        """Target level as 0/1 features (runs, rows) -> (runs, rows, groups)."""
        shape = (*group.shape, self.layout.groups)
        zero = torch.zeros(shape, dtype=self.prior_logits.dtype, device=group.device)
        return zero.scatter_(-1, group[..., None], 1.0)

    def draw_groups(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None) -> Tensor:
        """Target levels from the noisy prior, or the given one (runs, rows)."""
        target = self.layout.target
        if given and target is not None and target in given:
            return torch.full((self.runs, rows), given[target], device=self.prior_logits.device)
        noisy = self.prior_logits[:, None, :] + rng.gumbel(rows, self.layout.groups)
        return noisy.argmax(-1)

    def with_target(self, codes: Tensor, group: Tensor) -> Tensor:
        """Put the target level into the codes (runs, rows, D); without a target, unchanged."""
        if self.layout.target is None:
            return codes
        place = torch.tensor(self.layout.target, device=codes.device)
        return torch.where(
            torch.arange(self.layout.columns, device=codes.device) == place, group[..., None], codes
        )

    # -- training ----------------------------------------------------------------------------

    def bind(
        self,
        codes: Tensor | MappedRows,
        batches: PoissonBatches,
        plans: Sequence[PrivacyPlan],
        rng: FleetRng,
        *,
        engine: str = "taps",
        precision: str = "32",
        captured: bool = False,
        ahead: Callable[[int, int], None] = lambda first, last: None,
    ) -> None:
        """Give the fleet its private rows, its plans and its randomness.

        Args:
            codes: Encoded rows (runs, rows, D), in memory or on disk.
            batches: The sampler; nothing but Poisson sampling fits the accountant.
            plans: One a run; a run whose steps are done keeps its weights until all are.
            rng: Keys of the runs.
            engine: How clipped sums are computed.
            precision: Format of the products that sum gradients, one of `PRECISIONS`.
            captured: Whether steps are recorded once and replayed; `rng` is then a `CounterRng`.
            ahead: Called with a range of steps before the first of them is taken.

        Raises:
            RefusedError: On a sampler that is not `PoissonBatches`, or not at the planned rate.
        """
        if not isinstance(batches, PoissonBatches):
            raise RefusedError(
                f"sampler {type(batches).__name__}: the accountant covers Poisson sampling alone; "
                "use PoissonBatches"
            )
        for plan, q in zip(plans, batches.q, strict=True):
            if q != plan.q:
                raise RefusedError(f"sampler q={q}: the plan is accounted for q={plan.q}")
        self._codes, self._batches, self._plans, self._rng = codes, batches, list(plans), rng
        self._mode, self._precision = engine, precision
        self._captured, self._ahead = captured, ahead
        self._replay: CapturedSteps | None = None
        self.total = max(plan.steps for plan in plans)
        self._average = copy.deepcopy(self.averaged()).requires_grad_(False)

    @property
    def plans(self) -> Sequence[PrivacyPlan]:
        """Plan of each run, while training."""
        return self._plans

    @property
    def records_a_step(self) -> float:
        """Expected records a step, all runs together."""
        return sum(plan.q * plan.rows for plan in self._plans)

    def configure_optimizers(self) -> Any:
        return [self.adam(self.network, self.lr, betas=(0.9, 0.99))]

    def adam(self, part: nn.Module, lr: Sequence[float], **settings: Any) -> FleetAdam:
        """Adam over the weights of `part`, with a learning rate a run (runs,)."""
        rates = torch.tensor(lr, dtype=self.prior_logits.dtype, device=self.prior_logits.device)
        return FleetAdam(part.parameters(), rates, **settings)

    def on_fit_start(self) -> None:
        optimizers = self.optimizers(use_pl_optimizer=False)
        self._optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._engine = PrivateEngine(
            self.network,
            self._optimizers[0],
            # A run without steps is never moved; were it, then by noise.
            sigma=[plan.noise if plan.steps or not plan.private else 1.0 for plan in self._plans],
            bound=[plan.bound for plan in self._plans],
            batch=[plan.q * plan.rows for plan in self._plans],
            mode=self._mode,
            precision=self._precision,
        )
        if isinstance(self._codes, Tensor):
            self._codes = self._codes.to(self.device)
        steps = [plan.steps for plan in self._plans]
        for optimizer in self._optimizers:
            apart = len(set(steps)) > 1 or self._captured
            if apart and not isinstance(optimizer, RunwiseOptimizer):
                raise UsageError(
                    f"optimizer {type(optimizer).__name__}: cannot stop runs one by one or be "
                    "captured; use one of dpsynth.optimizers, or the same steps for all runs and "
                    "capture=false"
                )
        self._steps = torch.tensor(steps, dtype=self.prior_logits.dtype, device=self.device)

    def log(self, name: str, *args: Any, **settings: Any) -> None:
        """Lightning's own at ε=∞; refused where a plan is private, since what a step, a hook or a
        callback would log is a figure of private rows that no ledger has paid for.

        Raises:
            RefusedError: While a run with a finite ε is trained.
        """
        if any(plan.private for plan in getattr(self, "_plans", ())):
            raise RefusedError(
                f"log {name!r}: a figure of private rows that is not charged; leave it out, or "
                "train with privacy.epsilon=inf"
            )
        super().log(name, *args, **settings)

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        """A block of private steps; `batch` carries no data, only how many to take at most.

        Lightning fetches one batch ahead, so what is left is counted here, where it is spent.
        """
        first = int(self.completed)
        last = min(first + int(batch), self.total)
        if first == last:
            return
        self._ahead(first, last)
        if self._captured:
            self._replayed().take(first, last)
            return
        for step in range(first, last):
            self._private_step(step)

    @property
    def steps_a_block(self) -> int:
        """Private steps a Lightning `training_step`."""
        usual = 200 if getattr(self, "_captured", False) else 10
        return self.block or usual

    def _replayed(self) -> CapturedSteps:
        """The recorded steps; recorded at the first, when a checkpoint has been restored."""
        if self._replay is None:
            assert isinstance(self._rng, CounterRng)
            fused = self.device.type == "cuda" and self.total >= _LONG
            self._replay = CapturedSteps(self, self._rng, self.steps_a_block, compiled=fused)
        return self._replay

    def _private_step(self, step: int) -> None:
        active = self._steps.cpu() > step
        for piece, (index, inside) in enumerate(self._batches.draw(self._rng, step)):
            inside = inside & active[:, None]
            records = inside.sum(1).tolist()
            draws = RecordRng(self._rng, f"draws:{piece}", step, records, inside.shape[1])
            self._accumulate(self._rows_at(index), inside.to(self.device), draws)
        public = bool(self.public_every) and (step + 1) % self.public_every == 0
        self._finish_step(step, self._rng, public=public)

    def _finish_step(self, step: int | Tensor, rng: FleetRng, *, public: bool) -> None:
        """Release the sum of the batch, move, and blend the weights in."""
        self._schedule(step)
        self._engine.step(rng, step)
        if public:
            self.public_step(rng.at("public", cast(int, step)))
        self._blend(step)
        self.completed += 1

    def _rows_at(self, index: Tensor) -> Tensor:
        """Codes of the rows at these positions (runs, width) -> (runs, width, D)."""
        if isinstance(self._codes, MappedRows):
            return self._codes.take(index)
        run = torch.arange(self.runs, device=self.device)[:, None]
        return self._codes[run, index.to(self.device)].long()

    def _accumulate(self, rows: Tensor, inside: Tensor, draws: FleetRng) -> None:
        """Add one piece of a batch: codes (runs, width, D) and which of them count."""
        counts = inside.to(self.prior_logits.dtype)
        self._engine.accumulate(lambda: self.record_loss(rows, draws), counts)

    def _schedule(self, step: int | Tensor) -> None:
        """Give every optimizer the learning rates of this step; 0 for a run that is done."""
        left = ((self._steps - step) / (FALL * self._steps).clamp_min(FALL)).clamp(0, 1)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                rate = group.setdefault("base_lr", group["lr"])
                if isinstance(rate, Tensor):
                    group["lr"] = rate.to(self.device) * left
                else:  # an optimizer of the family's own, whose runs are all equally long
                    group["lr"] = rate * float(left[0])

    @torch.no_grad()
    def _blend(self, step: int | Tensor) -> None:
        """EMA with a warm-up, so that the first weights do not linger; none of a run that is done.

        The first step's weights are taken whole.
        """
        at = torch.as_tensor(step, device=self.device)
        weight = 1 - ((1 + at) / (10 + at)).clamp(max=self.decay)
        share = torch.where(at > 0, weight, 1.0) * (self._steps > at)
        pairs = zip(self._average.parameters(), self.averaged().parameters(), strict=True)
        for average, value in pairs:
            average.lerp_(value, expand(share.to(value.dtype), value))

    def finish(self) -> None:
        """Sample from the averaged weights from now on, and let go of rows and optimizers."""
        if self.total:
            self.averaged().load_state_dict(self._average.state_dict())
        for name in (
            "_average",
            "_codes",
            "_batches",
            "_plans",
            "_rng",
            "_engine",
            "_optimizers",
            "_steps",
            "_ahead",
            "_replay",
        ):
            if hasattr(self, name):
                delattr(self, name)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, codes: Tensor, rng: FleetRng, *, draws: int = 8, piece: int = 4096) -> Tensor:
        """White-box membership scores of all runs in one pass, higher for a member.

        Args:
            codes: Encoded rows of each run (runs, rows, D), or the same for all (1, rows, D).
            rng: Keys of the runs; equal keys give all runs the same draws.
            draws: Evaluations of the loss that are averaged.
            piece: Rows at a time.

        Returns:
            Minus the mean of `attack_loss`, (runs, rows).
        """
        check_count("draws", draws)
        check_count("piece", piece)
        device = self.prior_logits.device
        total = torch.zeros(self.runs, codes.shape[1], device=device)
        for start in range(0, codes.shape[1], piece):
            part = codes[:, start : start + piece].to(device)
            part = part.expand(self.runs, -1, -1)
            for draw in range(draws):
                loss = self.attack_loss(part, rng.at(f"attack:{draw}", start))
                total[:, start : start + piece] -= loss / draws
        return total.cpu()

    def signals(self, codes: Tensor, rng: FleetRng, *, draws: int = 16, piece: int = 512) -> Tensor:
        """White-box numbers of each record under noises that are the same for all records and runs.

        Args:
            codes: Encoded rows of each run (runs, rows, D), or the same for all (1, rows, D).
            rng: One key.
            draws: Noises that are averaged.
            piece: Rows at a time; changes no number.

        Returns:
            The losses named by `signal_names`, low for a member (runs, rows, signals).

        Raises:
            UsageError: On several keys, or on no draws or rows at a time.
        """
        check_count("draws", draws)
        return self.by_pieces(
            codes, rng, piece, lambda part, opened: self.signal_losses(part, opened, draws)
        )

    @torch.no_grad()
    def by_pieces(
        self,
        codes: Tensor,
        rng: FleetRng,
        piece: int,
        work: Callable[[Tensor, FleetRng], Tensor],
    ) -> Tensor:
        """`work` on a few rows of all runs at a time, each piece under the same draws."""
        check_count("piece", piece)
        if rng.runs != 1:
            raise UsageError(f"rng with {rng.runs} keys: signals share their draws; give one key")
        parts = []
        for start in range(0, codes.shape[1], piece):
            part = codes[:, start : start + piece].to(self.prior_logits.device)
            parts.append(work(part.expand(self.runs, -1, -1), rng.at("signals")).cpu())
        return torch.cat(parts, dim=1)

    def chunks(self, rows: int, size: int = 8192) -> list[int]:
        """Sizes of the pieces that `rows` are sampled in."""
        return [min(size, rows - start) for start in range(0, rows, size)]


def _nothing_leads(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Runs that were saved before anything led: nothing does."""
    for name in ("leading_columns", "leading_logits"):
        state.setdefault(prefix + name, getattr(module, name))
