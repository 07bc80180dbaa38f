"""The sentences of a privacy statement."""

from typing import TYPE_CHECKING

import dp_accounting

from dp_transcribe.privacy.events import leaves
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.units import Relation, Unit

if TYPE_CHECKING:
    from dp_transcribe.privacy.statement import PrivacyStatement

_PROTECTS = {
    Unit.RESPONSE: (
        "It protects each answer of the teacher to one synthetic query. It does NOT "
        "protect a person in the teacher's training data, because one record can "
        "change every answer. For a guarantee for people see the record-level "
        "routes: private data distillation (DP-KIP), a teacher that was itself "
        "trained with differential privacy, or an ensemble of teachers on disjoint "
        "parts of the data."
    ),
    Unit.RECORD: (
        "It protects each record of the private training set, and so a person who "
        "contributed one record. It does NOT protect a person who contributed "
        "several records as well as one who contributed one, and it does not hide "
        "what is true of the population as a whole."
    ),
}
_EXPOSED = {
    Unit.RESPONSE: "an answer of the teacher",
    Unit.RECORD: "a record of the private training set, and so a person,",
}
_NOUNS = {
    Unit.RESPONSE: "the teacher's answer to one query",
    Unit.RECORD: "one record of the private training set",
}
_CHANGES = {
    Relation.ADD_OR_REMOVE_ONE: "is added or removed",
    Relation.REPLACE_ONE: "is replaced by any other",
    Relation.REPLACE_SPECIAL: "is replaced by an empty one (zero-out)",
}


def headline(statement: "PrivacyStatement") -> str:
    """The figure, never without its unit."""
    unit = statement.unit.value
    if not statement.is_private:
        return (
            f"NOT PRIVATE: epsilon is infinite for unit {unit}. There is no noise, "
            "or not enough to count as any."
        )
    figures = f"epsilon = {round_up(statement.epsilon)}"
    if statement.epsilon_pld is not None:
        figures += f" (the tighter PLD figure: {round_up(statement.epsilon_pld)})"
    return (
        f"Differential privacy per unit {unit}: {figures}, delta = "
        f"{round_up(statement.delta)}, by {statement.mechanism}."
    )


def protection(statement: "PrivacyStatement") -> str:
    """What is protected and what is not."""
    if statement.is_private:
        return _PROTECTS[statement.unit]
    return (
        f"Nothing here protects {_EXPOSED[statement.unit]} from being read out of "
        "what is released. Do not release it as private."
    )


def inheritance(statement: "PrivacyStatement") -> str:
    """Whose guarantee this is, if it was passed on."""
    if statement.inherited_from is None:
        return ""
    return (
        f"Inherited from {statement.inherited_from} by post-processing: what is "
        "covered was computed from its answers and from public randomness alone, so "
        "its own guarantee holds unchanged. The private records were not read again, "
        "no noise was added, and no number of questions spends more."
    )


def neighbours(statement: "PrivacyStatement") -> str:
    """The neighbouring relation and who computed the figure."""
    return (
        f"Neighbouring relation {statement.relation.name}: two inputs are neighbours "
        f"if {_NOUNS[statement.unit]} {_CHANGES[statement.relation]}. "
        f"Accountant: {statement.accountant}."
    )


def scope(statement: "PrivacyStatement") -> str:
    """What the statement covers and what must not be released under it."""
    covered = ", ".join(statement.covered) or "nothing"
    text = f"Covered: {covered}, and whatever is computed from it alone."
    if statement.not_covered:
        left_out = ", ".join(statement.not_covered)
        text += f" NOT covered, not to be released under this statement: {left_out}."
    return text


def assumptions(statement: "PrivacyStatement") -> str:
    """Sampling, and where the noise came from."""
    if statement.noise_seed is None:
        noise = "The noise was keyed with secret entropy of the operating system."
    else:
        noise = (
            f"The noise was drawn from the given seed {statement.noise_seed}: the "
            "guarantee does not hold against anyone who knows the seed. Leave the "
            "seed out for a release."
        )
    assumed = statement.sampling.rstrip(".")
    return f"Assumed: {assumed}. {noise}"


def limits(statement: "PrivacyStatement") -> str:
    """What no figure here accounts for."""
    return (
        "Not accounted: the choice of hyper-parameters by looking at several runs, "
        "two students from one checkpoint, the same query asked twice under another "
        "name, and other releases from the same teacher or data. Floating-point noise "
        "is not hardened against precision attacks."
    )


def origin(statement: "PrivacyStatement") -> str:
    """Further facts and package versions."""
    facts = [f"{key}: {value}" for key, value in statement.details.items()]
    versions = [f"{name} {version}" for name, version in statement.versions.items()]
    lists = (("Details", facts, "; "), ("Versions", versions, ", "))
    return " ".join(f"{name}: {by.join(of)}." for name, of, by in lists if of)


def round_up(value: float) -> str:
    """Four digits that are never below the value."""
    text = f"{value:.4g}"
    if float(text) < value:
        text = f"{value + 0.5 * 10.0 ** (_exponent(value) - 3):.4g}"
    return text


def _exponent(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def sampling(ledger: Ledger, unit: Unit) -> str:
    """The assumptions on sampling that a ledger's releases imply, in words."""
    spends = [e.spend for e in ledger.entries if e.spend.unit is unit]
    sentences = [text for spend in spends for text in _sampling_of(spend)]
    return " ".join(dict.fromkeys(sentences)) or "Nothing was released."


def _sampling_of(spend: Spend) -> list[str]:
    events = [event for event, _ in leaves(spend.event)]
    if spend.disjoint:
        return ["Every query is fresh and its answer enters one release only."]
    return [_sampling_of_leaf(event) for event in events]


def _sampling_of_leaf(event: object) -> str:
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return (
            "Each release draws its units independently with probability "
            f"{event.sampling_probability:.6g} (Poisson sampling)."
        )
    if isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent):
        return (
            f"Each release draws {event.sample_size} of "
            f"{event.source_dataset_size} units, all such sets equally likely."
        )
    return "A unit may enter every release of its group; nothing is sampled."
