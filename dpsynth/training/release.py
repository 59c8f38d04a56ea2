"""What a run must be before its folder is published under its ε."""

from __future__ import annotations

import math

from dpsynth.checks import RefusedError
from dpsynth.privacy.plan import SECURE_NOISE
from dpsynth.schema import Schema
from dpsynth.training.recipe import Recipe

__all__ = ["check_release"]


def check_release(
    recipe: Recipe, epsilon: float, seed: int | None, schema: Schema | None = None
) -> None:
    """Refuse to make a release that its ε would not cover.

    Args:
        recipe: How it is to be trained.
        epsilon: Its target ε.
        seed: Its fixed seed, if any.
        schema: Facts about the table.

    Raises:
        RefusedError: Without privacy; with a fixed seed, which lets anyone redraw the noise and
            take it off; with noise that is not cryptographic, in training or in the schema.
    """
    if not math.isfinite(epsilon):
        raise RefusedError("release=true with privacy.epsilon=inf: nothing would be protected")
    if seed is not None:
        raise RefusedError(
            f"release=true with seed={seed}: whoever knows the seed can take the noise off; use "
            "seed=null"
        )
    if not recipe.privacy.get("secure"):
        raise RefusedError("release=true with privacy.secure=false: a release needs secure noise")
    for event in () if schema is None else schema.spent:
        if event["noise"] != SECURE_NOISE:
            raise RefusedError(
                f"release=true: schema fact {event['what']!r} was measured with noise "
                f"{event['noise']}; measure it again without --seed"
            )
