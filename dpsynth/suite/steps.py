"""Step audit of a run: the same network, engine, clipping bound and noise, stepped with canaries on
rows that the run itself made up, and ε composed anew from what the steps show (Nasr et al. 2023,
arXiv 2302.07956)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dpsynth.audit import SamplerAudit, StepAudit, audit_sampler, audit_steps
from dpsynth.checks import UsageError, check_count, check_positive
from dpsynth.devices import resolve
from dpsynth.models import Generator
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.batches import PoissonBatches
from dpsynth.privacy.plan import PrivacyPlan
from dpsynth.randomness import FleetRng, derive, fresh_key
from dpsynth.training.canary import Observed, StepCanary
from dpsynth.training.fleet import products, quiet
from dpsynth.training.recipe import build
from dpsynth.training.run import Run

__all__ = ["AUDITED_Q", "RunStepAudit", "audit_run_steps", "observe_steps"]

# Rows that the run makes up, and how many of them are expected in a batch.
_ROWS, _BATCH = 256, 8
AUDITED_Q = _BATCH / _ROWS
# Most steps of a run: what the step audit of a whole training takes.
_MOST_STEPS = 2000


@dataclass(frozen=True)
class RunStepAudit:
    """What steps like those of a run say of its ε.

    Attributes:
        noise: Bounds on σ, recomposed with the run's own q, T and other events.
        sampler: Whether batches were drawn as claimed, at the audit's own rate.
        runs: Copies that were stepped.
        steps: Steps of each.
        planned: Steps that were to be taken; fewer where `limit` came first.
        limit: Seconds after which no further step is begun.
        seconds: What it took.
        rows: Rows made up by the run that were trained on.
        q: Sampling rate of the run; the audit's is `sampler.q`.
        clip: Clipping bound C.
        trained: Steps T of the run.
        delta: δ of the claim.
    """

    noise: StepAudit
    sampler: SamplerAudit
    runs: int
    steps: int
    planned: int
    limit: float
    seconds: float
    rows: int
    q: float
    clip: float
    trained: int
    delta: float

    @property
    def epsilon(self) -> float:
        """Lower bound on the run's ε."""
        return self.noise.bound.epsilon

    @property
    def attainable(self) -> float:
        """What an honest engine shows in every second audit of this size."""
        return self.noise.attainable.epsilon

    @property
    def flags(self) -> tuple[str, ...]:
        """Tests that refute the claimed noise or sampling; each audit flags an honest engine with
        probability `alpha` at most."""
        return (*self.noise.flags, *self.sampler.flags)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        own = {"epsilon": self.epsilon, "attainable": self.attainable, "flags": list(self.flags)}
        return {**own, **_plain(asdict(self))}


def _plain(value: Any) -> Any:
    """Numbers of numpy's as Python's; ∞ as the text `inf`."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    value = value.item() if hasattr(value, "item") else value
    return "inf" if isinstance(value, float) and math.isinf(value) else value


class _Until(Callback):
    """Ends a training when its time is up."""

    def __init__(self, seconds: float, tell: Callable[[int, int], None]) -> None:
        self._end = time.monotonic() + seconds
        self._tell = tell

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tell(int(pl_module.completed), pl_module.total)
        if time.monotonic() > self._end:
            trainer.should_stop = True


class _Blocks(IterableDataset):
    """One item a block of steps; carries no data."""

    def __init__(self, steps: int, block: int) -> None:
        self._blocks = math.ceil(steps / block)
        self._block = block

    def __iter__(self) -> Iterator[Tensor]:
        return iter([torch.tensor(self._block)] * self._blocks)


def _check(run: Run) -> None:
    """Refuse a run without private steps."""
    if not run.plan.private:
        raise UsageError("epsilon=inf: a step without noise has nothing to audit")
    if not run.generator.trained or not run.plan.steps:
        raise UsageError(
            f"model={run.recipe.model}: takes no private steps; there are none to audit"
        )


def _copies(run: Run, runs: int, block: int) -> Generator:
    """The weights and tables of the run, `runs` times side by side, and no step taken yet."""
    options = {**run.recipe.options, "block": block}
    generator = build(replace(run.recipe, options=options), run.codec.layout, runs)
    state = {
        name: torch.zeros_like(value)
        if name == "completed"
        else value.expand(runs, *value.shape[1:]).clone()
        for name, value in run.generator.state_dict().items()
    }
    generator.load_state_dict(state)
    return generator


def _audited_plan(plan: PrivacyPlan, steps: int) -> PrivacyPlan:
    """The run's σ and C on few made-up rows in small batches."""
    return replace(plan, rows=_ROWS, batch=_BATCH, steps=steps, delta=min(plan.delta, 0.5 / _ROWS))


def observe_steps(
    run: Run,
    *,
    runs: int,
    steps: int,
    seed: int,
    seconds: float = math.inf,
    device: str = "auto",
    plant: Sequence[Callback] = (),
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Observed:
    """Step copies of a run with canaries, on rows that it makes up.

    Args:
        run: Whose network, weights, engine, σ and C are taken; no row that it was trained on is
            read.
        runs: Copies, each with noise of its own.
        steps: Steps of each.
        seed: Of rows, noise and canaries; a run with secure noise takes fresh keys for it.
        seconds: After which no further block of steps is begun.
        device: `auto`, `cpu` or `cuda`.
        plant: Callbacks that come before the auditor's: what is to be found.
        tell: Called with the steps done and all of them.

    Raises:
        UsageError: On a run without private steps.
    """
    _check(run)
    where, plan = resolve(device), _audited_plan(run.plan, steps)
    block = max(1, min(10, steps))
    generator = _copies(run, runs, block)
    made = run.sample_table(_ROWS, rng=derive(seed, "rows"))
    codes = run.codec.encode(made).expand(runs, -1, -1).clone()
    keys = [fresh_key() if plan.secure else derive(seed, "copy", k) for k in range(runs)]
    generator.bind(
        codes,
        PoissonBatches([_ROWS] * runs, [plan.q] * runs, piece=run.recipe.piece),
        [plan] * runs,
        FleetRng(keys, device=where.type, secure=plan.secure),
        engine=run.recipe.engine,
        precision=run.recipe.precision,
    )
    canary, until = StepCanary(key=derive(seed, "canary")), _Until(seconds, tell)
    _train(generator, steps, run.recipe.precision, where.type, [*plant, canary, until])
    return canary.observed()


def _train(
    generator: Generator, steps: int, precision: str, device: str, callbacks: Sequence[Callback]
) -> None:
    """As a fleet is trained, but that nothing is kept for a resumed training."""
    with quiet(), products(precision):
        trainer = lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            callbacks=list(callbacks),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        blocks = _Blocks(steps, generator.steps_a_block)
        trainer.fit(generator, DataLoader(blocks, batch_size=None))


def audit_run_steps(
    run: Run,
    *,
    runs: int = 8,
    steps: int | None = None,
    seconds: float = 60.0,
    seed: int = 0,
    console: Console | None = None,
    device: str = "auto",
    confidence: float = 0.95,
    alpha: float = 1e-3,
    plant: Sequence[Callback] = (),
) -> RunStepAudit:
    """Bound the noise of a run's steps, and its ε with that noise.

    Copies of the run take steps on a few hundred rows that the run itself makes up, with canaries
    in half of them. Network, engine, precision, σ and C are the run's; its sampling rate is scaled
    so that batches are small, which the bound on σ does not depend on. ε is composed with the run's
    own q and T and everything else in its ledger.

    Args:
        run: A run with a finite ε.
        runs: Copies.
        steps: Steps of each, at least 4; by default those of the run, 2000 at most.
        seconds: After which no further block of steps is begun: fewer steps, a lower bound.
        seed: Of made-up rows, noise and canaries.
        console: Where progress is shown; by default nowhere.
        device: `auto`, `cpu` or `cuda`.
        confidence: Of the bounds.
        alpha: Chance that noise, or sampling, of an honest engine is flagged.
        plant: As of `observe_steps`.

    Raises:
        UsageError: On ε=∞, a family without private steps, or too few steps.
    """
    check_count("runs", runs)
    check_positive("seconds", seconds, allow_inf=True)
    _check(run)
    planned = min(run.plan.steps, _MOST_STEPS) if steps is None else steps
    check_count("steps", planned, least=4)
    begun = time.monotonic()
    told = _Told(console, begun, seconds)
    seen = observe_steps(
        run,
        runs=runs,
        steps=planned,
        seed=seed,
        seconds=seconds,
        device=device,
        plant=plant,
        tell=told,
    )
    noise = audit_steps(
        seen.scores,
        seen.present,
        seen.noise,
        sigma=run.plan.noise,
        epsilon_of=_recomposed(run),
        alpha=alpha,
        confidence=confidence,
    )
    sampler = audit_sampler(seen.batches, q=AUDITED_Q, alpha=alpha)
    return RunStepAudit(
        noise,
        sampler,
        runs,
        seen.scores.shape[1],
        planned,
        seconds,
        time.monotonic() - begun,
        _ROWS,
        run.plan.q,
        run.plan.clip,
        run.plan.steps,
        run.ledger.delta,
    )


class _Told:
    """Says every tenth how far the steps are."""

    def __init__(self, console: Console | None, begun: float, limit: float) -> None:
        self._console, self._begun, self._limit, self._tenth = console, begun, limit, 0

    def __call__(self, done: int, total: int) -> None:
        tenth = done * 10 // total
        if self._console is None or tenth == self._tenth:
            return
        self._tenth = tenth
        spent = time.monotonic() - self._begun
        left = max(0.0, min(spent * (total - done) / done, self._limit - spent))
        self._console.print(
            f"step audit: {done} of {total} steps, about {left:.0f} s left", soft_wrap=True
        )


def _recomposed(run: Run) -> Callable[[float], float]:
    """ε of the run's ledger with another σ in its steps (PLD)."""
    paid = run.plan.training_event(f"dpsgd:{run.recipe.model}")
    rest = [event for event in run.ledger.events if event.what != paid.what]
    if len(rest) + 1 != len(run.ledger.events):
        raise UsageError(
            f"ledger: has no single event {paid.what!r}; there is nothing to recompose"
        )

    def epsilon_of(sigma: float) -> float:
        events = [*rest, replace(paid, sigma=sigma)]
        return compose_epsilon(events, run.ledger.delta, group=run.ledger.contributions)

    return epsilon_of
