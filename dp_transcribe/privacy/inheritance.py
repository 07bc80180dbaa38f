"""A guarantee passed on: what is computed from a private model is as private as it."""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dp_transcribe import _validate
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit

_MEND = "Take the statement that was written when the teacher was trained privately."


def check_inheritable(statement: Any, name: str = "statement") -> PrivacyStatement:
    """Checks that a statement is of a form that can be passed on.

    The form is all that can be checked: whether the statement is true of the model it
    comes with is known to whoever trained the model.

    Args:
        statement: the statement of a private model.
        name: the argument's name for the error.

    Returns:
        The statement.

    Raises:
        ValueError: it is no statement, its unit is not `RECORD`, its epsilon is not
            finite, or it names no accountant or mechanism.
    """
    _validate.instance_of(name, statement, PrivacyStatement, _MEND)
    if statement.unit is not Unit.RECORD:
        mend = "Only a guarantee for the records of the training data is passed on."
        raise _validate.invalid(f"{name}.unit", statement.unit, "Unit.RECORD", mend)
    if not statement.is_private:
        expected = "a finite number"
        raise _validate.invalid(f"{name}.epsilon", statement.epsilon, expected, _MEND)
    for field in ("accountant", "mechanism"):
        value = getattr(statement, field)
        if not isinstance(value, str) or not value:
            raise _validate.invalid(f"{name}.{field}", value, "a name", _MEND)
    return statement


def inherit(
    statement: PrivacyStatement,
    *,
    covered: Sequence[str],
    not_covered: Sequence[str] = (),
    source: str = "the teacher",
) -> PrivacyStatement:
    """The statement of what was computed from a private model alone.

    Args:
        statement: the private model's own, checked by `check_inheritable`.
        covered: what was computed from it.
        not_covered: what goes with it and is not.
        source: how the statement calls the private model.

    Returns:
        The same guarantee, with more covered.

    **Privacy**: post-processing. `covered` must have been computed from what the
    statement covers and from public randomness, and from nothing else.
    """
    return dataclasses.replace(
        check_inheritable(statement),
        covered=_merged(statement.covered, covered),
        not_covered=_merged(statement.not_covered, not_covered),
        inherited_from=source,
    )


def fingerprint(statement: PrivacyStatement | None) -> str:
    """Tells whose guarantee this is: SHA-256 of the statement, "" for none."""
    if statement is None:
        return ""
    return hashlib.sha256(statement.to_json().encode()).hexdigest()


def read_statement(path: str | os.PathLike[str]) -> PrivacyStatement:
    """Reads a statement file, checked for its form.

    Args:
        path: of a JSON file, as `PrivacyStatement.to_json` writes it.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is no statement, or one that cannot be passed on.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return check_inheritable(PrivacyStatement.from_json(text), "path")


def _merged(first: Sequence[str], second: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*first, *second]))
