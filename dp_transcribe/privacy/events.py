"""Privacy events as data: the ones of `dp_accounting`, and pure epsilon.

An event says what a release costs and nothing about what was released. Events are
flattened to leaves for accounting and written to JSON for the ledger.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import dp_accounting

from dp_transcribe import _validate


@dataclasses.dataclass(frozen=True)
class PureDpEvent:
    """A release that is epsilon-DP with delta 0, such as a randomised response.

    `dp_accounting` 0.4.3 has no such event. A k-ary randomised response, or any
    other epsilon-DP mechanism, is a post-processing of the two-valued randomised
    response of the same epsilon, which is therefore what is accounted.

    Attributes:
        epsilon: the cost of one release, under the relation it is recorded with.

    Raises:
        ValueError: epsilon is not a finite number above 0.

    References:
        Kairouz, Oh, Viswanath: The Composition Theorem for Differential Privacy,
        arXiv:1311.0776.
    """

    epsilon: float

    def __post_init__(self) -> None:
        """Checks the value."""
        mend = "Record a release without privacy as `NonPrivateDpEvent()`."
        _validate.positive_finite("epsilon", self.epsilon, mend)


Event: TypeAlias = dp_accounting.DpEvent | PureDpEvent

SAMPLED_EVENTS = (
    dp_accounting.PoissonSampledDpEvent,
    dp_accounting.SampledWithoutReplacementDpEvent,
)
_KNOWN = {
    kind.__name__: kind
    for kind in (
        dp_accounting.NoOpDpEvent,
        dp_accounting.NonPrivateDpEvent,
        dp_accounting.GaussianDpEvent,
        dp_accounting.SelfComposedDpEvent,
        dp_accounting.ComposedDpEvent,
        PureDpEvent,
        *SAMPLED_EVENTS,
    )
}


def leaves(event: Event, count: int = 1) -> Iterator[tuple[Event, int]]:
    """Flattens compositions into the single releases they stand for.

    Args:
        event: a checked event (see `check_event`).
        count: how often it happened.

    Yields:
        Pairs of a hashable event that is no composition and its count. Events
        without a cost, and counts of zero, are left out.
    """
    if count == 0 or isinstance(event, dp_accounting.NoOpDpEvent):
        return
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        yield from leaves(event.event, count * event.count)
    elif isinstance(event, dp_accounting.ComposedDpEvent):
        for part in event.events:
            yield from leaves(part, count)
    else:
        yield event, count


def check_event(event: Any, name: str = "event") -> Event:
    """Checks an event and everything nested in it before it is recorded.

    Args:
        event: the event to check.
        name: the argument's name for the error.

    Returns:
        The event.

    Raises:
        ValueError: its type is not known to the accounting here, a number in it is
            out of range, or something other than a Gaussian is sampled.
    """
    if type(event) not in _KNOWN.values():
        listed = ", ".join(_KNOWN)
        raise _validate.invalid(name, event, f"an event of a known type ({listed})")
    check = _CHECKS.get(type(event))
    if check is not None:
        check(event, name)
    return event


def _check_gaussian(event: dp_accounting.GaussianDpEvent, name: str) -> None:
    _validate.non_negative(f"{name}.noise_multiplier", event.noise_multiplier)


def _check_self_composed(event: dp_accounting.SelfComposedDpEvent, name: str) -> None:
    _validate.non_negative_int(f"{name}.count", event.count)
    check_event(event.event, f"{name}.event")


def _check_composed(event: dp_accounting.ComposedDpEvent, name: str) -> None:
    for i, part in enumerate(event.events):
        check_event(part, f"{name}.events[{i}]")


def _check_sampled_gaussian(event: Any, name: str) -> None:
    if not isinstance(event.event, dp_accounting.GaussianDpEvent):
        mend = "Only a Gaussian release is amplified by sampling here."
        expected = "a `GaussianDpEvent`"
        raise _validate.invalid(f"{name}.event", event.event, expected, mend)
    _check_gaussian(event.event, f"{name}.event")


def _check_poisson(event: dp_accounting.PoissonSampledDpEvent, name: str) -> None:
    field = f"{name}.sampling_probability"
    _validate.probability(field, event.sampling_probability)
    _check_sampled_gaussian(event, name)


def _check_fixed_size(
    event: dp_accounting.SampledWithoutReplacementDpEvent, name: str
) -> None:
    size = _validate.positive_int(
        f"{name}.source_dataset_size", event.source_dataset_size
    )
    _validate.in_range(f"{name}.sample_size", event.sample_size, 0, size)
    _check_sampled_gaussian(event, name)


_CHECKS: dict[type, Callable[[Any, str], None]] = {
    dp_accounting.GaussianDpEvent: _check_gaussian,
    dp_accounting.SelfComposedDpEvent: _check_self_composed,
    dp_accounting.ComposedDpEvent: _check_composed,
    dp_accounting.PoissonSampledDpEvent: _check_poisson,
    dp_accounting.SampledWithoutReplacementDpEvent: _check_fixed_size,
}


def event_to_dict(event: Event) -> dict[str, Any]:
    """Turns a checked event into plain values for JSON.

    Args:
        event: a checked event.

    Returns:
        A dictionary with the event's type under `"type"` and its fields.
    """
    if isinstance(event, PureDpEvent):
        return {"type": "PureDpEvent", "epsilon": float(event.epsilon)}
    fields = {
        field.name: _plain(getattr(event, field.name))
        for field in type(event).__attrs_attrs__
    }
    return {"type": type(event).__name__, **fields}


def _plain(value: Any) -> Any:
    if isinstance(value, (dp_accounting.DpEvent, PureDpEvent)):
        return event_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.item() if hasattr(value, "item") else value


def event_from_dict(values: dict[str, Any]) -> Event:
    """Turns what `event_to_dict` wrote back into the event.

    Args:
        values: the dictionary.

    Returns:
        The checked event.

    Raises:
        ValueError: the type or the fields are not those of a known event.
    """
    return check_event(_build(values))


def _build(values: Any) -> Any:
    if isinstance(values, list):
        return [_build(part) for part in values]
    if not isinstance(values, dict):
        return values
    fields = {key: _build(value) for key, value in values.items() if key != "type"}
    kind = _validate.one_of("type", values.get("type"), _KNOWN)
    try:
        return _KNOWN[kind](**fields)
    except TypeError as error:
        expected = f"the fields of `{kind}`"
        raise _validate.invalid("event", values, expected) from error
