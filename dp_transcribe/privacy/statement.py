"""The privacy statement: what an epsilon protects and what it does not.

One dataclass, written as prose for people and as JSON for programs.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from dp_transcribe import _validate
from dp_transcribe.privacy import prose
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.units import Relation, Unit

_PACKAGES = (
    "dp-transcribe",
    "dp-accounting",
    "tensorflow",
    "keras",
    "tensorflow-privacy",
    "numpy",
)
_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class PrivacyStatement:
    """A guarantee with everything that is needed to read it.

    Attributes:
        unit: what the epsilon protects.
        relation: between which neighbours it holds.
        epsilon: the guarantee; infinity if there is none.
        epsilon_pld: a second, tighter figure for the same delta, or None.
        delta: the probability outside of epsilon's reach; 0.0 for a pure guarantee.
        accountant: what computed `epsilon`, `"rdp"`, `"pld"`, or how it was reached.
        mechanism: the name of what made the releases.
        covered: what the guarantee speaks of, such as `"student"`.
        not_covered: what must not be released under it, such as the teacher.
        sampling: the assumption on how queries were drawn.
        noise_seed: the seed of the noise, None if it came from secret entropy.
        details: further public facts (JSON values), never derived from private data.
        versions: versions of the packages that made the releases.
        inherited_from: whose guarantee this is, where it is passed on by
            post-processing (see `inherit`); None if the releases are its own.

    Privacy:
        A statement is public. It holds configuration and ledger, no private data.

    Raises:
        ValueError: a field is out of range.
    """

    unit: Unit
    relation: Relation
    epsilon: float
    epsilon_pld: float | None
    delta: float
    accountant: str
    mechanism: str
    covered: tuple[str, ...]
    not_covered: tuple[str, ...]
    sampling: str
    noise_seed: int | None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    inherited_from: str | None = None

    def __post_init__(self) -> None:
        """Checks the fields."""
        _validate.instance_of("unit", self.unit, Unit)
        _validate.instance_of("relation", self.relation, Relation)
        _check_epsilon("epsilon", self.epsilon)
        if self.epsilon_pld is not None:
            _check_epsilon("epsilon_pld", self.epsilon_pld)
        if _validate.non_negative("delta", self.delta) != 0:
            _validate.fraction_open("delta", self.delta)
        _validate.optional_seed("noise_seed", self.noise_seed)
        for name in ("accountant", "mechanism", "sampling"):
            _validate.instance_of(name, getattr(self, name), str)
        _validate.instance_of("inherited_from", self.inherited_from, (str, type(None)))
        for name in ("covered", "not_covered"):
            for part in _validate.instance_of(name, getattr(self, name), tuple):
                _validate.instance_of(name, part, str)
        for name in ("details", "versions"):
            _validate.instance_of(name, getattr(self, name), dict)

    @property
    def is_private(self) -> bool:
        """Whether there is a guarantee at all."""
        return math.isfinite(self.epsilon)

    def to_text(self) -> str:
        """The statement as prose, its first lines saying what is protected."""
        paragraphs = [
            prose.headline(self),
            prose.protection(self),
            prose.inheritance(self),
            prose.neighbours(self),
            prose.scope(self),
            prose.assumptions(self),
            prose.limits(self),
            prose.origin(self),
        ]
        wrapped = (
            textwrap.fill(text, _WIDTH, break_on_hyphens=False)
            for text in paragraphs
            if text
        )
        return "\n\n".join(wrapped) + "\n"

    def __str__(self) -> str:
        """The same as `to_text`."""
        return self.to_text()

    def to_dict(self) -> dict[str, Any]:
        """The statement as plain values; an infinite epsilon becomes `"inf"`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values.update(
            unit=self.unit.value,
            relation=self.relation.name,
            epsilon=_number_to_json(self.epsilon),
            epsilon_pld=_number_to_json(self.epsilon_pld),
            covered=list(self.covered),
            not_covered=list(self.not_covered),
            details=dict(self.details),
            versions=dict(self.versions),
        )
        return values

    def to_json(self) -> str:
        """The statement as JSON, indented for reading."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "PrivacyStatement":
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            A statement equal to the one written.

        Raises:
            ValueError: the text is not that of a statement.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            expected = f"the JSON of a privacy statement ({error})"
            raise _validate.invalid("text", text[:200], expected) from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PrivacyStatement":
        """Reads what `to_dict` wrote; raises what a missing or wrong value raises."""
        parsed = {
            "unit": Unit(values["unit"]),
            "relation": Relation[values["relation"]],
            "epsilon": _number_from_json(values["epsilon"]),
            "epsilon_pld": _number_from_json(values["epsilon_pld"]),
            "covered": _tuple_from_json(values["covered"]),
            "not_covered": _tuple_from_json(values["not_covered"]),
        }
        return cls(**{**values, **parsed})


def statement_from_ledger(
    ledger: Ledger,
    *,
    unit: Unit,
    delta: float,
    relation: Relation = Relation.REPLACE_SPECIAL,
    accountant: str = "rdp",
    tighter: bool = True,
    mechanism: str | None = None,
    covered: Sequence[str] = ("student",),
    not_covered: Sequence[str] = ("teacher",),
    sampling: str | None = None,
    noise_seed: int | None = None,
    details: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
) -> PrivacyStatement:
    """Writes the statement of what a ledger has recorded.

    Args:
        ledger: what was released.
        unit: what the statement is about.
        delta: strictly between 0 and 1. The statement says 0.0 where the epsilon
            holds without any delta (randomised responses).
        relation: what to name while nothing is recorded; the ledger's own after.
        accountant: `"rdp"` or `"pld"`.
        tighter: also give the PLD figure where RDP is asked (takes seconds for
            large epsilons, nothing is lost without it).
        mechanism: a name in place of the recorded mechanisms' names.
        covered: what the guarantee speaks of.
        not_covered: what must not be released under it.
        sampling: the assumption in words, in place of the one the ledger implies.
        noise_seed: the seed of the noise, None if it came from secret entropy.
        details: further public facts.
        versions: in place of the versions installed.

    Returns:
        The statement.

    Raises:
        ValueError: an argument is out of range.
    """
    epsilon = ledger.epsilon(unit=unit, delta=delta, accountant=accountant)
    pure = ledger.pure_epsilon(unit=unit)
    without_delta = pure is not None and pure <= epsilon
    names = " + ".join(ledger.mechanisms(unit)) or "none"
    return PrivacyStatement(
        unit=unit,
        relation=ledger.relation(unit) or relation,
        epsilon=epsilon,
        epsilon_pld=(
            _second_figure(ledger, unit, delta, epsilon)
            if tighter and accountant == "rdp" and not without_delta
            else None
        ),
        delta=0.0 if without_delta else delta,
        accountant=accountant,
        mechanism=names if mechanism is None else mechanism,
        covered=tuple(covered),
        not_covered=tuple(not_covered),
        sampling=prose.sampling(ledger, unit) if sampling is None else sampling,
        noise_seed=noise_seed,
        details={"releases": ledger.releases(unit), **(details or {})},
        versions=installed_versions() if versions is None else dict(versions),
    )


def with_digest(
    statement: PrivacyStatement, name: str, digest: str
) -> PrivacyStatement:
    """The statement with the digest of the file that it is kept beside."""
    details = {**statement.details, name: digest}
    return dataclasses.replace(statement, details=details)


def split_digest(
    statement: PrivacyStatement, name: str
) -> tuple[PrivacyStatement, str | None]:
    """The opposite of `with_digest`; None for a statement that names no file."""
    details = dict(statement.details)
    digest = details.pop(name, None)
    return dataclasses.replace(statement, details=details), digest


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the result."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _second_figure(
    ledger: Ledger, unit: Unit, delta: float, epsilon: float
) -> float | None:
    """The PLD figure, None where there is none or it says nothing new."""
    if not math.isfinite(epsilon):
        return None
    try:
        tighter = ledger.epsilon(unit=unit, delta=delta, accountant="pld")
    except ValueError:  # fixed-size samples have no PLD
        return None
    return tighter if tighter < epsilon else None


def _check_epsilon(name: str, value: float) -> None:
    if value != math.inf:
        _validate.non_negative(name, value)


def _number_to_json(value: float | None) -> float | str | None:
    return "inf" if value == math.inf else value


def _number_from_json(value: Any) -> Any:
    """Anything else than a number is left to the checks of the statement."""
    return math.inf if value == "inf" else value


def _tuple_from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
