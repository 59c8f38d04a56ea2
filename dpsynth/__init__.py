"""Synthetic tables from networks trained with DP-SGD, and the evidence of what they leak.

The public names are loaded on first use, so that `import dpsynth` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpsynth import datasets as datasets
    from dpsynth.api import evaluate as evaluate
    from dpsynth.api import fit as fit
    from dpsynth.api import load as load
    from dpsynth.checks import RefusedError as RefusedError
    from dpsynth.checks import UsageError as UsageError
    from dpsynth.data import Split as Split
    from dpsynth.data import Table as Table
    from dpsynth.evaluation import Report as Report
    from dpsynth.privacy.ledger import Ledger as Ledger
    from dpsynth.privacy.plan import PrivacyPlan as PrivacyPlan
    from dpsynth.schema import Column as Column
    from dpsynth.schema import Schema as Schema
    from dpsynth.training.run import Run as Run

_HOMES = {
    "Column": "schema",
    "Ledger": "privacy.ledger",
    "PrivacyPlan": "privacy.plan",
    "RefusedError": "checks",
    "Report": "evaluation",
    "Run": "training.run",
    "Schema": "schema",
    "Split": "data",
    "Table": "data",
    "UsageError": "checks",
    "evaluate": "api",
    "fit": "api",
    "load": "api",
}

__all__ = ["datasets", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "datasets":
        return import_module("dpsynth.datasets")
    if name not in _HOMES:
        raise AttributeError(f"module 'dpsynth' has no attribute {name!r}")
    return getattr(import_module(f"dpsynth.{_HOMES[name]}"), name)
