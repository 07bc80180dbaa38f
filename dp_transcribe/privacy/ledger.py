"""The append-only list of what was released, from which epsilon is computed.

A release is written here before its noisy result is used, so that a crash can only
over-count. Epsilons are always computed from the ledger, never stored in it.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator
from typing import Any

from dp_transcribe import _validate
from dp_transcribe.privacy.accounting import pure_epsilon_of, worst_epsilon_of
from dp_transcribe.privacy.events import (
    Event,
    check_event,
    event_from_dict,
    event_to_dict,
)
from dp_transcribe.privacy.units import Relation, Unit

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Spend:
    """What one release costs a unit that it touches.

    Attributes:
        unit: what the event protects.
        relation: between which neighbours.
        event: the cost of one release to a unit that it touches.
        mechanism: name of the mechanism that made the release.
        group: releases of one group touch the same answers and compose
            sequentially; different groups touch different answers and compose in
            parallel. Only for `Unit.RESPONSE`: a record is touched by every group.
        disjoint: every disjoint release of the group touches answers that no other
            disjoint release of it touches (fresh queries). Only for
            `Unit.RESPONSE`.

    Privacy:
        `group` and `disjoint` are promises of the caller. A mechanism that makes
        two releases from the same fresh answers records them as one composed
        event, not as two disjoint spends.

    Raises:
        ValueError: a field is of the wrong kind, the event is out of range, or
            `disjoint` is asked for `Unit.RECORD`.
    """

    unit: Unit
    relation: Relation
    event: Event
    mechanism: str
    group: str = "default"
    disjoint: bool = False

    def __post_init__(self) -> None:
        """Checks the fields, so that a ledger holds nothing it cannot account."""
        _validate.instance_of("unit", self.unit, Unit)
        _validate.instance_of("relation", self.relation, Relation)
        check_event(self.event)
        _validate.instance_of("mechanism", self.mechanism, str)
        _validate.instance_of("group", self.group, str)
        _validate.instance_of("disjoint", self.disjoint, bool)
        if self.disjoint and self.unit is not Unit.RESPONSE:
            expected = f"False for unit {self.unit.name}"
            mend = "One record can change every answer: its releases all compose."
            raise _validate.invalid("disjoint", self.disjoint, expected, mend)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A spend and how often it was made in a row.

    Attributes:
        spend: what one release costs.
        count: number of consecutive equal releases, 1 or more.
    """

    spend: Spend
    count: int


class Ledger:
    """An append-only account of releases.

    Example:
        >>> import dp_accounting
        >>> ledger = Ledger()
        >>> spend = Spend(
        ...     unit=Unit.RESPONSE,
        ...     relation=Relation.REPLACE_SPECIAL,
        ...     event=dp_accounting.GaussianDpEvent(4.046),
        ...     mechanism="NormalizedGradient",
        ...     disjoint=True,
        ... )
        >>> ledger.record(spend, count=500)
        >>> round(ledger.epsilon(unit=Unit.RESPONSE, delta=1e-5), 3)
        1.0

    Privacy:
        Each unit has an account and an epsilon of its own, and one relation: a
        release under another relation is refused, since the two epsilons would
        speak of different neighbours.

        `RESPONSE`: an answer belongs to one group. Its cost is that of all of the
        group's releases, of the disjoint ones only the most expensive; the
        ledger's epsilon is the largest over the groups (parallel composition).

        `RECORD`: all releases compose sequentially, whatever their groups.
    """

    def __init__(self) -> None:
        """Makes an empty ledger."""
        self._entries: list[Entry] = []

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The releases in the order in which they were recorded."""
        return tuple(self._entries)

    def record(self, spend: Spend, count: int = 1) -> None:
        """Appends releases; call it before their noisy results are used.

        Args:
            spend: what one release costs.
            count: number of releases.

        Raises:
            ValueError: the count is not 1 or more, or the unit was recorded under
                another relation before.
        """
        count = _validate.positive_int("count", count)
        self._check_relation(spend)
        last = self._entries[-1] if self._entries else None
        if last is not None and last.spend == spend:
            self._entries[-1] = Entry(spend, last.count + count)
        else:
            self._entries.append(Entry(spend, count))

    def continues(self, earlier: "Ledger") -> bool:
        """Whether this ledger begins with all that an earlier one holds."""
        before = earlier.entries
        if not before or len(self.entries) < len(before):
            return not before
        last, reached = before[-1], self.entries[len(before) - 1]
        return (
            self.entries[: len(before) - 1] == before[:-1]
            and reached.spend == last.spend
            and reached.count >= last.count
        )

    def epsilon(self, *, unit: Unit, delta: float, accountant: str = "rdp") -> float:
        """Epsilon of everything recorded for one unit.

        Args:
            unit: what the epsilon is to protect.
            delta: strictly between 0 and 1.
            accountant: `"rdp"` or `"pld"` (tighter, slower).

        Returns:
            The epsilon under `relation(unit)`, 0.0 if nothing was recorded.

        Raises:
            ValueError: an argument is out of range.
        """
        _validate.fraction_open("delta", delta)
        relation = self.relation(unit)
        if relation is None:
            return 0.0
        return worst_epsilon_of(
            _alternatives(self._entries, unit),
            relation=relation,
            delta=delta,
            accountant=accountant,
        )

    def pure_epsilon(self, *, unit: Unit) -> float | None:
        """Epsilon that holds with delta 0, or None if a release needs a delta.

        Args:
            unit: what the epsilon is to protect.

        Returns:
            The pure epsilon (basic composition), 0.0 if nothing was recorded.
        """
        alternatives = _alternatives(self._entries, unit)
        pure = [pure_epsilon_of(releases) for releases in alternatives]
        known = [epsilon for epsilon in pure if epsilon is not None]
        return max(known, default=0.0) if len(known) == len(pure) else None

    def epsilon_after(
        self,
        spend: Spend,
        count: int,
        *,
        unit: Unit,
        delta: float,
        accountant: str = "rdp",
    ) -> float:
        """Epsilon if `count` more releases were made; nothing is recorded.

        Args:
            spend: what one release would cost.
            count: number of further releases, 0 or more.
            unit: what the epsilon is to protect, equal to the spend's.
            delta: strictly between 0 and 1.
            accountant: `"rdp"` or `"pld"`.

        Returns:
            The epsilon.

        Raises:
            ValueError: an argument is out of range, the spend is of another unit,
                or its relation is not the one recorded so far.
        """
        if spend.unit is not unit:
            mend = "Ask for the epsilon of the unit that the release touches."
            raise _validate.invalid("unit", unit, str(spend.unit), mend)
        dry_run = Ledger()
        dry_run._entries = list(self._entries)
        if _validate.non_negative_int("count", count):
            dry_run.record(spend, count)
        return dry_run.epsilon(unit=unit, delta=delta, accountant=accountant)

    def max_count(
        self,
        spend: Spend,
        *,
        unit: Unit,
        delta: float,
        target_epsilon: float,
        limit: int,
        accountant: str = "rdp",
    ) -> int:
        """Number of further releases that stay within a target; records nothing.

        Args:
            spend: what one release would cost.
            unit: what the target protects, equal to the spend's unit.
            delta: strictly between 0 and 1.
            target_epsilon: the epsilon that may be reached and not passed.
            limit: the largest number of interest.
            accountant: `"rdp"` or `"pld"`.

        Returns:
            The largest such number up to `limit`; 0 if not even one fits, or the
            target is passed already.

        Raises:
            ValueError: as `epsilon_after`.
        """
        _validate.positive_finite("target_epsilon", target_epsilon)
        fits = _validate.non_negative_int("limit", limit)

        def within(count: int) -> bool:
            epsilon = self.epsilon_after(
                spend, count, unit=unit, delta=delta, accountant=accountant
            )
            return epsilon <= target_epsilon

        if within(fits):
            return fits
        low, high = 0, fits
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def units(self) -> set[Unit]:
        """Units of which something was recorded."""
        return {entry.spend.unit for entry in self._entries}

    def relation(self, unit: Unit) -> Relation | None:
        """The relation a unit was recorded under, None if it was not."""
        _validate.instance_of("unit", unit, Unit)
        for entry in self._entries:
            if entry.spend.unit is unit:
                return entry.spend.relation
        return None

    def releases(self, unit: Unit) -> int:
        """Number of releases recorded for a unit."""
        _validate.instance_of("unit", unit, Unit)
        return sum(e.count for e in self._entries if e.spend.unit is unit)

    def mechanisms(self, unit: Unit) -> tuple[str, ...]:
        """Names of the mechanisms recorded for a unit, in order of first use."""
        _validate.instance_of("unit", unit, Unit)
        names = (e.spend.mechanism for e in self._entries if e.spend.unit is unit)
        return tuple(dict.fromkeys(names))

    def to_json(self) -> str:
        """Writes the ledger as JSON for a checkpoint."""
        entries = [_entry_to_dict(entry) for entry in self._entries]
        return json.dumps({"format": _FORMAT, "entries": entries}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.

        Returns:
            A ledger equal to the one written.

        Raises:
            ValueError: the text is damaged, or of a format not known here. A damaged
                ledger is never read in part: that would under-count.
        """
        ledger = cls()
        try:
            values = json.loads(text)
            _validate.one_of("format", values["format"], (_FORMAT,))
            for entry in values["entries"]:
                ledger.record(_spend_from_dict(entry["spend"]), entry["count"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            expected = f"the JSON of a ledger ({error})"
            mend = "Go back to a checkpoint that is whole."
            raise _validate.invalid("text", text[:200], expected, mend) from error
        return ledger

    def __len__(self) -> int:
        """Number of entries (runs of equal releases)."""
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        """Equal if the same releases were recorded in the same order."""
        if not isinstance(other, Ledger):
            return NotImplemented
        return self._entries == other._entries

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Shows the entries."""
        return f"Ledger({self._entries!r})"

    def _check_relation(self, spend: Spend) -> None:
        recorded = self.relation(spend.unit)
        if recorded not in (None, spend.relation):
            expected = f"{recorded}, as in this ledger's {spend.unit.name} releases"
            mend = "Use one relation throughout, or start a ledger of its own."
            raise _validate.invalid("relation", spend.relation, expected, mend)


def _alternatives(entries: Iterable[Entry], unit: Unit) -> Iterator[list[Any]]:
    """Lists of releases of which one unit meets at most one."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.spend.unit is unit:
            name = entry.spend.group if unit is Unit.RESPONSE else ""
            groups.setdefault(name, []).append(entry)
    for group in groups.values():
        yield from _alternatives_in_group(group)


def _alternatives_in_group(group: list[Entry]) -> Iterator[list[Any]]:
    """All repeated releases, with each of the disjoint ones in turn."""
    repeated = [(e.spend.event, e.count) for e in group if not e.spend.disjoint]
    disjoint = [e.spend.event for e in group if e.spend.disjoint]
    if not disjoint:
        yield repeated
    for event in disjoint:
        yield [*repeated, (event, 1)]


def _entry_to_dict(entry: Entry) -> dict[str, Any]:
    spend = entry.spend
    return {
        "count": entry.count,
        "spend": {
            "unit": spend.unit.value,
            "relation": spend.relation.name,
            "event": event_to_dict(spend.event),
            "mechanism": spend.mechanism,
            "group": spend.group,
            "disjoint": spend.disjoint,
        },
    }


def _spend_from_dict(values: dict[str, Any]) -> Spend:
    return Spend(
        unit=Unit(values["unit"]),
        relation=Relation[values["relation"]],
        event=event_from_dict(values["event"]),
        mechanism=values["mechanism"],
        group=values["group"],
        disjoint=values["disjoint"],
    )
