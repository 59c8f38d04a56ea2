"""Generator: the contract of every family, and the one training step that all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dpsynth.checks import RefusedError, UsageError, check_count, check_fraction, check_positive
from dpsynth.codec import Layout
from dpsynth.marginals import Marginals
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.engine import PrivateEngine
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng

__all__ = ["Generator"]

_NEVER = -1e4


class Generator(lightning.LightningModule, ABC):
    """R generators of one family, trained as one fleet.

    A family adds `record_loss` (one unreduced loss a record), `sample`, and, where it has weights
    that see no rows, `public_step`. Every logit starts from the noisy label × column tables of the
    run, so an untrained network is a DP naive Bayes and training learns what that misses.

    Args:
        layout: Public shape of encoded rows.
        runs: R.
        lr: Learning rate, constant and then decayed linearly over the last 30 % of the steps.
        average: Decay of the moving average of weights that is sampled from (post-processing).
        block: Private steps a Lightning `training_step`.
    """

    family: ClassVar[str]
    trained: ClassVar[bool] = True
    # Default clipping bound: about the median norm of a record's gradient at the start. Far below
    # it every record is clipped to the same length, which under-weights rare levels.
    clip: ClassVar[float] = 1.0

    network: nn.Module
    prior_logits: Tensor
    given_logits: Tensor
    completed: Tensor

    def __init__(
        self, layout: Layout, runs: int, *, lr: float = 1e-3, average: float = 0.99, block: int = 10
    ) -> None:
        super().__init__()
        check_count("runs", runs)
        check_positive("lr", lr)
        check_fraction("average", average)
        check_count("block", block)
        self.automatic_optimization = False
        self.layout, self.runs, self.lr, self.decay, self.block = layout, runs, lr, average, block
        groups, width = layout.groups, layout.width
        self.register_buffer("prior_logits", torch.zeros(runs, groups))
        self.register_buffer("given_logits", torch.zeros(runs, groups, width))
        self.register_buffer("completed", torch.zeros(1, dtype=torch.long))
        self.total = 0

    # -- what a family adds ------------------------------------------------------------------

    @abstractmethod
    def reset(self, rng: FleetRng) -> None:
        """Draw the initial weights."""

    @abstractmethod
    def record_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """One loss a record, averaged over its noise draws: (runs, batch, D) -> (runs, batch)."""

    @abstractmethod
    def sample(self, rows: int, rng: FleetRng, given: Mapping[int, int] | None = None) -> Tensor:
        """Draw rows: codes (runs, rows, D). `given` fixes columns by position; a family that cannot
        condition on one of them draws it freely (see `conditions`)."""

    def conditions(self) -> frozenset[int]:
        """Columns that `sample(given=…)` can fix exactly; the rest need rejection."""
        return frozenset() if self.layout.target is None else frozenset({self.layout.target})

    def attack_loss(self, codes: Tensor, rng: FleetRng) -> Tensor:
        """What a white-box attacker would look at, low for a member (runs, batch)."""
        return self.record_loss(codes, rng)

    def public_step(self, rng: FleetRng, step: int) -> None:
        """Training that touches no rows; families without one do nothing."""

    def averaged(self) -> nn.Module:
        """The module that is sampled from, whose weights are averaged over steps."""
        return self.network

    # -- shared ------------------------------------------------------------------------------

    def prepare(self, marginals: Sequence[Marginals], used: Sequence[Tensor]) -> None:
        """Take each run's noisy tables as starting logits; levels never used stay impossible."""
        prior = torch.stack([m.prior.clamp_min(1e-6).log() for m in marginals])
        given = torch.stack([m.logits(self.layout) for m in marginals])
        mask = torch.stack(list(used))[:, None, :]
        if self.layout.target is not None:
            start, groups = self.layout.offsets[self.layout.target], self.layout.groups
            prior = torch.where(mask[:, 0, start : start + groups], prior, _NEVER)
        self.prior_logits.copy_(prior)
        self.given_logits.copy_(torch.where(mask, given, _NEVER))

    def offset(self, group: Tensor) -> Tensor:
        """Starting logits of rows with target levels `group` (runs, rows) -> (runs, rows, W)."""
        run = torch.arange(self.runs, device=group.device)[:, None]
        return self.given_logits[run, group]

    def group_one_hot(self, group: Tensor) -> Tensor:
        """Target level as 0/1 features (runs, rows) -> (runs, rows, groups)."""
        return nn.functional.one_hot(group, self.layout.groups).to(self.prior_logits.dtype)

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
        codes: Tensor,
        batches: PoissonBatches,
        plans: Sequence[PrivacyPlan],
        rng: FleetRng,
        *,
        engine: str = "taps",
        ahead: Callable[[int, int], None] = lambda first, last: None,
    ) -> None:
        """Give the fleet its private rows, its plans and its randomness.

        Args:
            codes: Encoded rows (runs, rows, D).
            batches: The sampler; nothing but Poisson sampling fits the accountant.
            plans: One a run, all with the same number of steps.
            rng: Keys of the runs.
            engine: How clipped sums are computed.
            ahead: Called with a range of steps before the first of them is taken.

        Raises:
            RefusedError: On a sampler that is not `PoissonBatches`, or not at the planned rate.
        """
        if not isinstance(batches, PoissonBatches):
            raise RefusedError(
                f"sampler {type(batches).__name__}: the accountant covers Poisson sampling alone; "
                "use PoissonBatches"
            )
        if len({plan.steps for plan in plans}) != 1:
            raise UsageError("steps differ between the runs of a fleet; train them apart")
        for plan, q in zip(plans, batches.q, strict=True):
            if q != plan.q:
                raise RefusedError(f"sampler q={q}: the plan is accounted for q={plan.q}")
        self._codes, self._batches, self._plans, self._rng = codes, batches, list(plans), rng
        self._mode, self._ahead = engine, ahead
        self.total = plans[0].steps
        self._average = AveragedModel(self.averaged(), multi_avg_fn=self._blend)

    @property
    def plans(self) -> Sequence[PrivacyPlan]:
        """Plan of each run, while training."""
        return self._plans

    @property
    def records_a_step(self) -> float:
        """Expected records a step, all runs together."""
        return sum(plan.q * plan.rows for plan in self._plans)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.network.parameters(), lr=self.lr, betas=(0.9, 0.99))]

    def on_fit_start(self) -> None:
        optimizers = self.optimizers(use_pl_optimizer=False)
        private = optimizers[0] if isinstance(optimizers, list) else optimizers
        self._optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._engine = PrivateEngine(
            self.network,
            private,
            sigma=[plan.noise for plan in self._plans],
            bound=[plan.bound for plan in self._plans],
            batch=[plan.q * plan.rows for plan in self._plans],
            mode=self._mode,
        )
        self._codes = self._codes.to(self.device)

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
        """`block` private steps; `batch` carries no data, only how many steps to take at most.

        Lightning fetches one batch ahead, so what is left is counted here, where it is spent.
        """
        first = int(self.completed)
        last = min(first + int(batch), self.total)
        if first == last:
            return
        self._ahead(first, last)
        for step in range(first, last):
            self._private_step(step)

    def _private_step(self, step: int) -> None:
        fraction = (self.total - step) / (0.3 * self.total)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("base_lr", group["lr"]) * min(1.0, fraction)
        run = torch.arange(self.runs, device=self.device)[:, None]
        for piece, (index, inside) in enumerate(self._batches.draw(self._rng, step)):
            rows = self._codes[run, index.to(self.device)].long()
            draws = self._rng.at(f"draws:{piece}", step)
            counts = inside.to(self.device, self.prior_logits.dtype)
            self._engine.accumulate(lambda r=rows, d=draws: self.record_loss(r, d), counts)
        self._engine.step(self._rng, step)
        self.public_step(self._rng.at("public", step), step)
        self._average.update_parameters(self.averaged())
        self.completed += 1

    def _blend(self, averages: Any, current: Any, count: Any) -> None:
        """EMA with a warm-up, so that the first weights do not linger."""
        weight = 1 - min(self.decay, (1 + float(count)) / (10 + float(count)))
        for average, value in zip(averages, current, strict=True):
            average.lerp_(value, weight)

    def finish(self) -> None:
        """Sample from the averaged weights from now on, and let go of rows and optimizers."""
        if self.total:
            self.averaged().load_state_dict(self._average.module.state_dict())
        for name in (
            "_average",
            "_codes",
            "_batches",
            "_plans",
            "_rng",
            "_engine",
            "_optimizers",
            "_ahead",
        ):
            if hasattr(self, name):
                delattr(self, name)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def scores(self, codes: Tensor, rng: FleetRng, *, draws: int = 8, piece: int = 4096) -> Tensor:
        """White-box membership scores, higher for a member (runs, rows): minus the mean of
        `attack_loss` over `draws` evaluations."""
        check_count("draws", draws)
        rows = codes.shape[1]
        total = torch.zeros(self.runs, rows)
        for draw in range(draws):
            for start in range(0, rows, piece):
                part = codes[:, start : start + piece]
                loss = self.attack_loss(part, rng.at(f"attack:{draw}", start))
                total[:, start : start + piece] -= loss.cpu() / draws
        return total

    def chunks(self, rows: int, size: int = 8192) -> list[int]:
        """Sizes of the pieces that `rows` are sampled in."""
        return [min(size, rows - start) for start in range(0, rows, size)]
