"""Expected events: what a plan says a training pays for, known before any row is read."""

from __future__ import annotations

import math

from dpsynth.codec import Codec, Layout
from dpsynth.marginals import Marginals
from dpsynth.privacy.events import Event
from dpsynth.privacy.plan import PrivacyPlan, gaussian_event
from dpsynth.schema import Schema
from dpsynth.training.recipe import FAMILIES, Recipe, codec_settings

__all__ = ["expected_events"]


def expected_events(recipe: Recipe, schema: Schema, plan: PrivacyPlan) -> list[Event]:
    """The events of one training, in the order in which they are paid.

    Args:
        recipe: How it is trained.
        schema: Public facts of the table.
        plan: The calibrated plan.
    """
    settings = codec_settings(recipe)
    events = list(plan.spent)
    if plan.private and plan.shares.get("rows", 0.0) > 0:
        events.append(gaussian_event("rows", plan.mu("rows")))
    asked = Codec.questions(schema, **settings)
    mu = plan.mu("codec") / math.sqrt(max(1, sum(parts for _, parts in asked)))
    events += [gaussian_event(what, mu * math.sqrt(parts)) for what, parts in asked]
    layout = Layout.of(schema, **settings)
    mu = plan.mu("marginals") / math.sqrt(Marginals.asked(layout))
    counted = [n for n in schema.names if n != schema.target or layout.columns == 1]
    events += [gaussian_event(f"marginal:{name}", mu) for name in counted]
    if plan.shares.get("tables", 0.0) > 0:
        events.append(gaussian_event("tables", plan.mu("tables")))
    if FAMILIES[recipe.model].trained and plan.steps:
        events.append(plan.training_event(f"dpsgd:{recipe.model}"))
    return events
