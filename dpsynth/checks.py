"""Argument checks: one line that says what, which value, and what to do."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Real

__all__ = [
    "RefusedError",
    "UsageError",
    "check_choice",
    "check_count",
    "check_fraction",
    "check_positive",
]


class UsageError(ValueError):
    """The input cannot be worked with as given; the message is one line (exit code 2)."""


class RefusedError(UsageError):
    """The input is well formed but policy forbids it (exit code 3)."""


def check_positive(name: str, value: float, *, allow_inf: bool = False) -> None:
    """Refuse anything but a number above 0; infinity only where `allow_inf`."""
    real = isinstance(value, Real)
    if not real or not value > 0 or (math.isinf(value) and not allow_inf):
        raise UsageError(f"{name}={value}: must be a number above 0")


def check_count(name: str, value: int, *, least: int = 1) -> None:
    """Refuse anything but a whole number of at least `least`."""
    # NaN and ±inf leave NaN after `% 1`.
    if not isinstance(value, Real) or value % 1 != 0 or value < least:
        raise UsageError(f"{name}={value}: must be a whole number of at least {least}")


def check_fraction(name: str, value: float) -> None:
    """Refuse anything outside the open interval (0, 1)."""
    if not isinstance(value, Real) or not 0 < value < 1:
        raise UsageError(f"{name}={value}: must lie strictly between 0 and 1")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Refuse anything that is not among `choices`."""
    if value not in list(choices):  # a list, so that an unhashable value is just unknown
        known = ", ".join(sorted(map(str, choices)))
        raise UsageError(f"{name}={value}: unknown; choose one of {known}")
