"""Audit: how well can someone tell who was in, how well could anyone, and is the noise there."""

from dpsynth.audit.attacks import ATTACKS, QUICK
from dpsynth.audit.attribute import infer_attributes, single_out
from dpsynth.audit.bounds import lower_bounds
from dpsynth.audit.ceiling import Ceiling
from dpsynth.audit.membership import AttackResult, Audit, audit
from dpsynth.audit.one_run import OneRunAudit, audit_one_run
from dpsynth.audit.roc import roc_figure
from dpsynth.audit.step import SamplerAudit, StepAudit, audit_sampler, audit_steps

__all__ = [
    "ATTACKS",
    "QUICK",
    "AttackResult",
    "Audit",
    "Ceiling",
    "OneRunAudit",
    "SamplerAudit",
    "StepAudit",
    "audit",
    "audit_one_run",
    "audit_sampler",
    "audit_steps",
    "infer_attributes",
    "lower_bounds",
    "roc_figure",
    "single_out",
]
