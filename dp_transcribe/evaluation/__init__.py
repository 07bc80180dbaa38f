"""Attacks and audits: what an attacker gets, and whether a claim is too small."""

from dp_transcribe.evaluation.bounds import epsilon_lower_bound, gaussian_lower_bound
from dp_transcribe.evaluation.canaries import AuditResult, audit_scores
from dp_transcribe.evaluation.data_dependent import data_dependent_cost
from dp_transcribe.evaluation.inversion import Inversion, invert, recognised
from dp_transcribe.evaluation.membership import (
    Answers,
    MembershipResult,
    ask,
    offline_lira,
    regression_attack,
    strongest_attack,
    threshold_attack,
)
from dp_transcribe.evaluation.records import (
    audit_class_means,
    audit_dpkip,
    audit_linear_model,
    audit_private_teacher,
)
from dp_transcribe.evaluation.responses import audit_responses
from dp_transcribe.evaluation.shards import audit_ensemble_gradient, audit_votes

__all__ = [
    "Answers",
    "AuditResult",
    "Inversion",
    "MembershipResult",
    "ask",
    "audit_class_means",
    "audit_dpkip",
    "audit_ensemble_gradient",
    "audit_linear_model",
    "audit_private_teacher",
    "audit_responses",
    "audit_scores",
    "audit_votes",
    "data_dependent_cost",
    "epsilon_lower_bound",
    "gaussian_lower_bound",
    "invert",
    "offline_lira",
    "recognised",
    "regression_attack",
    "strongest_attack",
    "threshold_attack",
]
