"""A stand-in for the pool of judging processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from dpsynth.checks import UsageError

__all__ = ["Inline"]


class Inline(Executor):
    """Judges where the caller stands: a process of its own costs seconds."""

    def __init__(
        self, workers: int, context: Any, initializer: Callable[..., None], initargs: tuple
    ) -> None:
        del workers, context
        initializer(*initargs)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        job: Future = Future()
        try:
            job.set_result(fn(*args, **kwargs))
        except UsageError as error:
            job.set_exception(error)
        return job
