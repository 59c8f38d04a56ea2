"""How close a table is to the real one, and how useful: tables in, numbers out.

Nothing here knows who made the table, so any CSV under the schema is judged by the same code.
"""

from dpsynth.evaluation.report import Report, evaluate, floors

__all__ = ["Report", "evaluate", "floors"]
