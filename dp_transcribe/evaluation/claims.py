"""Audits with canaries of what a statement claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from dp_transcribe import _validate, mechanisms
from dp_transcribe.evaluation.canaries import AuditResult
from dp_transcribe.evaluation.records import (
    audit_class_means,
    audit_dpkip,
    audit_linear_model,
    audit_private_teacher,
)
from dp_transcribe.evaluation.responses import audit_responses
from dp_transcribe.evaluation.shards import audit_ensemble_gradient, audit_votes
from dp_transcribe.mechanisms.base import Mechanism
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import FreshQueries, Queries, QueryPool

# Audits of the unit RECORD by the mechanism that a statement names.
RECORD_AUDITS: dict[str, Callable[..., AuditResult]] = {
    "ClassMeans": audit_class_means,
    "ClippedGradient": audit_private_teacher,
    "DPKIP": audit_dpkip,
    "EnsembleGradient": audit_ensemble_gradient,
    "NoisyVotes": audit_votes,
    "PrivateLinearModel": audit_linear_model,
}
# What a bound in audit.json says something about.
AUDITED = {
    Unit.RESPONSE: "the statement's mechanism and noise, in a run of the audit's own",
    Unit.RECORD: (
        "the code of the statement's mechanism, calibrated to the statement's epsilon, "
        "in a run of the audit's own: not the noise that the release had"
    ),
}


def audit_claim(
    statement: PrivacyStatement,
    *,
    canaries: int,
    delta: float = 1e-5,
    seed: int | None = None,
) -> AuditResult:
    """Audits with canaries what a statement claims.

    Args:
        statement: of unit `RESPONSE`: its mechanism is audited with its noise, on its
            queries. Of unit `RECORD`: what made the release is audited in the size and
            with the settings of its own audit, calibrated to the statement's epsilon.
        canaries: number of canaries.
        delta: of the audit's own run, for a statement of pure epsilon.
        seed: for tests; noise and coins are secret without it.

    Returns:
        The result, whose claim is the statement's.

    Raises:
        ValueError: there is no audit of what the statement describes.
    """
    terms: dict[str, Any] = {"canaries": canaries, "seed": seed}
    if statement.unit is Unit.RESPONSE:
        # A statement of pure epsilon has none, but a run asks for one.
        terms.update(target_epsilon=None, delta=statement.delta or delta)
        result = audit_responses(*released_by(statement), **terms)
        return dataclasses.replace(result, claimed_epsilon=statement.epsilon)
    last = statement.mechanism.rpartition(" + ")[2].removesuffix(" (votes)")
    if last not in RECORD_AUDITS:
        expected = f"a statement of one of {sorted(RECORD_AUDITS)} for the unit RECORD"
        raise _validate.invalid("student", statement.mechanism, expected)
    terms.update(target_epsilon=statement.epsilon, delta=statement.delta)
    return RECORD_AUDITS[last](**terms)


def released_by(statement: PrivacyStatement) -> tuple[Mechanism, Queries]:
    """Mechanism and queries as a statement of unit `RESPONSE` describes them.

    Args:
        statement: of a transcription.

    Returns:
        The mechanism, with its noise, and the queries.

    Raises:
        ValueError: the statement does not describe them.
    """
    kind = getattr(mechanisms, statement.mechanism, None)
    details = statement.details
    if kind is None or not {"mechanism", "queries"} <= details.keys():
        expected = "a student with a statement of its mechanism and queries"
        mend = "Transcribe again with this version, or audit a `--method`."
        raise _validate.invalid("student", statement.mechanism, expected, mend)
    settings = dict(details["queries"])
    pooled = "updates" in settings
    if pooled:
        # A pool that was not used up has cost less, and fewer fill no pool.
        fewest = -(-settings["size"] // settings["batch_size"])
        made = max(details["releases"], fewest)
        settings["updates"] = min(settings["updates"], made)
    queries = (QueryPool if pooled else FreshQueries)(**settings)
    return kind(**details["mechanism"]), queries
