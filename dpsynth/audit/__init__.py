"""Audit: how well can someone tell who was in, how well could anyone, and is the noise there."""

from dpsynth.audit.attacks import ATTACKS
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import AttackResult, Audit, audit
from dpsynth.audit.step import SamplerAudit, StepAudit, audit_sampler, audit_steps

__all__ = [
    "ATTACKS",
    "AttackResult",
    "Audit",
    "Ceiling",
    "SamplerAudit",
    "StepAudit",
    "audit",
    "audit_sampler",
    "audit_steps",
]
