"""What a person sees while a fleet trains, and what a resumed training needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from dpsynth.models.base import Generator
from dpsynth.privacy.accounting import compose_epsilon
from dpsynth.privacy.plan import PrivacyPlan

__all__ = ["LastCheckpoint", "SpentEpsilon", "TrainingProgress", "default_callbacks", "spent"]


def spent(plan: PrivacyPlan, steps: int) -> float:
    """ε after `steps` DP-SGD steps of a plan, with all that was measured before (PLD)."""
    if not plan.private:
        return float("inf")
    events = [*plan.spent, *plan.measured()]
    if steps:
        events.append(replace(plan.training_event("dpsgd"), steps=steps))
    return compose_epsilon(events, plan.delta, group=plan.contributions)


class SpentEpsilon(Callback):
    """Logs ε spent by each run, ten times a training, to whatever logger is attached.

    Losses are not logged: on private rows they are not private.

    Args:
        loggers: Those of each run, which see that run alone and as if it had trained alone; others
            see all runs, by their targets.
    """

    def __init__(self, loggers: Sequence[Sequence[Logger]] = ()) -> None:
        self._logged = -1
        self._own = [(list(held), [-1]) for held in loggers]
        self._known: dict[tuple[str, int], float] = {}
        self.latest: dict[float, float] = {}

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        generator: Generator = pl_module
        done = int(generator.completed)
        for (loggers, logged), plan in zip(self._own, generator.plans, strict=False):
            self._log_own(loggers, logged, plan, min(done, plan.steps))
        tenth = done * 10 // max(1, generator.total)
        if tenth == self._logged:
            return
        self._logged = tenth
        self.latest = {}
        for plan in generator.plans:
            if plan.private:
                paid = self._spent(plan, min(done, plan.steps))
                self.latest[plan.epsilon] = max(paid, self.latest.get(plan.epsilon, 0.0))
        record = {f"epsilon/{target:g}": value for target, value in self.latest.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"steps": float(done), **record}, step=done)
            logger.save()

    def _log_own(
        self, loggers: Sequence[Logger], logged: list[int], plan: PrivacyPlan, done: int
    ) -> None:
        """What a run's own loggers see, until it is done."""
        tenth = done * 10 // max(1, plan.steps)
        if not loggers or logged[0] == tenth or not plan.steps:
            return
        logged[0] = tenth
        record = {f"epsilon/{plan.epsilon:g}": self._spent(plan, done)} if plan.private else {}
        for logger in loggers:
            logger.log_metrics({"steps": float(done), **record}, step=done)
            logger.save()

    def _spent(self, plan: PrivacyPlan, steps: int) -> float:
        key = (repr(plan), steps)
        if key not in self._known:
            self._known[key] = spent(plan, steps)
        return self._known[key]


class TrainingProgress(Callback):
    """A bar with steps, records a second, ε spent and time left; plain lines where no terminal is.

    Args:
        title: Shown before the bar.
        watched: The callback that knows ε.
        console: Where to write.
    """

    def __init__(self, title: str, watched: SpentEpsilon, console: Console) -> None:
        self.title, self.watched, self.console = title, watched, console
        self._progress: Progress | None = None
        self._tenth = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._began, self._first = time.monotonic(), int(pl_module.completed)
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps {task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=pl_module.total, note="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        done = int(pl_module.completed)
        note = self._note(pl_module, done)
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif (tenth := done * 10 // max(1, pl_module.total)) != self._tenth:
            self._tenth = tenth
            self.console.print(
                f"{self.title}: {done}/{pl_module.total} steps {note}", soft_wrap=True
            )

    def _note(self, generator: Generator, done: int) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (done - self._first) * generator.records_a_step / elapsed
        eps = ", ".join(f"{v:.2f}/{t:g}" for t, v in sorted(self.watched.latest.items()))
        return f"· {rate:,.0f} records/s" + (f" · ε {eps}" if eps else "")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class LastCheckpoint(Callback):
    """Keeps `last.ckpt` between blocks of steps, never within one: a resumed training repeats the
    same steps with the same draws, so no noise is used for two different sums.

    Args:
        state: Private folder of the fleet.
        seconds: Least time between two checkpoints.
    """

    def __init__(self, state: Path, seconds: float = 20.0) -> None:
        self.state, self.seconds = state, seconds
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._saved < self.seconds:
            return
        self.state.mkdir(parents=True, exist_ok=True)
        partial = self.state / "last.partial"
        trainer.save_checkpoint(partial)
        partial.replace(self.state / "last.ckpt")
        self._saved = time.monotonic()


def default_callbacks(
    title: str,
    state: Path | None,
    console: Console,
    loggers: Sequence[Sequence[Logger]] = (),
) -> Sequence[Callback]:
    """ε log (`loggers` are those of each run), progress and, where there is a folder for it,
    checkpoints."""
    watched = SpentEpsilon(loggers)
    kept = [] if state is None else [LastCheckpoint(state)]
    return [watched, TrainingProgress(title, watched, console), *kept]
