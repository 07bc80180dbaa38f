"""What a transcriber guarantees: its statements, from what it released."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dp_transcribe import _validate
from dp_transcribe.mechanisms.inherited import Inherited
from dp_transcribe.privacy.inheritance import inherit
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.transcriber.compatibility import guided_by_another

if TYPE_CHECKING:
    from dp_transcribe.transcriber.model import DPTranscriber

_CHECKPOINTS = "checkpoints (they hold keys)"


def own_statement(
    owner: DPTranscriber, *, delta: float | None, accountant: str | None
) -> PrivacyStatement:
    """The statement of the mechanism's unit.

    Args:
        owner: the transcriber.
        delta: None for that of `fit`; one that is inherited keeps the teacher's.
        accountant: None for that of `fit`.
    """
    mechanism = owner.mechanism
    if isinstance(mechanism, Inherited):
        _validate.one_of("delta", delta, (None, mechanism.statement.delta))
        return _inherited(owner, mechanism.statement)
    covered, not_covered = ["student"], ["teacher", _CHECKPOINTS]
    (covered if owner.generator_covered else not_covered).append("generator")
    return statement_from_ledger(
        owner.ledger,
        unit=mechanism.unit,
        relation=mechanism.relation,
        delta=owner.budget.terms["delta"] if delta is None else delta,
        accountant=accountant or owner.budget.accountant,
        mechanism=mechanism.name,
        covered=covered,
        not_covered=not_covered,
        sampling=owner.queries.assumption(mechanism.unit),
        noise_seed=owner.seed,
        details={
            "mechanism": mechanism.get_config(),
            "queries": dataclasses.asdict(owner.queries),
        },
    )


def inherited_beside(
    owner: DPTranscriber, own: PrivacyStatement
) -> tuple[PrivacyStatement, ...]:
    """The private teacher's guarantee, where it is of another unit than the own one.

    Args:
        owner: the transcriber.
        own: its `own_statement`.

    Returns:
        One statement, or none.
    """
    statement = getattr(owner.teacher, "statement", None)
    if statement is None or own.unit is statement.unit:
        return ()
    if guided_by_another(owner.generator, owner.teacher):
        return ()
    return (_inherited(owner, statement, _CHECKPOINTS),)


def _inherited(
    owner: DPTranscriber, statement: PrivacyStatement, *left_out: str
) -> PrivacyStatement:
    """The teacher's guarantee, handed on to the student."""
    covered, not_covered = ["student"], [*left_out]
    (covered if owner.generator_covered else not_covered).append("generator")
    return inherit(statement, covered=covered, not_covered=not_covered)
