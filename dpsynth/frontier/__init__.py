"""Fidelity against attack success over a sweep: rows, intervals, the figure and its data."""

from dpsynth.frontier.plot import figure, interactive, write_frontier
from dpsynth.frontier.results import (
    aggregate,
    collect,
    falls,
    non_dominated,
    read,
    row,
    violations,
    write,
)

__all__ = [
    "aggregate",
    "collect",
    "falls",
    "figure",
    "interactive",
    "non_dominated",
    "read",
    "row",
    "violations",
    "write",
    "write_frontier",
]
