"""Membership audit: how well can someone tell who was in, beside how well anyone ever could."""

from dpsynth.audit.attacks import ATTACKS
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import AttackResult, Audit, audit

__all__ = ["ATTACKS", "AttackResult", "Audit", "Ceiling", "audit"]
