"""The ledger: composition per unit, append-only, dry runs, JSON."""

import json
import math

import dp_accounting
import pytest

from dp_transcribe.privacy.accounting import epsilon_of
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.ledger import Entry, Ledger, Spend
from dp_transcribe.privacy.units import Relation, Unit

DELTA = 1e-5
GAUSSIAN = dp_accounting.GaussianDpEvent
POISSON = dp_accounting.PoissonSampledDpEvent(512 / 80_000, GAUSSIAN(1.28))


def spend(event, unit=Unit.RESPONSE, relation=Relation.REPLACE_SPECIAL, **fields):
    return Spend(unit=unit, relation=relation, event=event, mechanism="Test", **fields)


def ledger_of(*records):
    ledger = Ledger()
    for one, count in records:
        ledger.record(one, count)
    return ledger


def sequential(*releases):
    return epsilon_of(releases, relation=Relation.REPLACE_SPECIAL, delta=DELTA)


def response(ledger, **fields):
    return ledger.epsilon(unit=Unit.RESPONSE, delta=DELTA, **fields)


def record(ledger, **fields):
    return ledger.epsilon(unit=Unit.RECORD, delta=DELTA, **fields)


def test_empty_ledger():
    ledger = Ledger()
    for unit in Unit:
        assert ledger.epsilon(unit=unit, delta=DELTA) == 0.0
        assert ledger.pure_epsilon(unit=unit) == 0.0
        assert ledger.releases(unit) == 0
        assert ledger.relation(unit) is None
    assert ledger.units() == set()
    assert len(ledger) == 0


def test_releases_of_one_group_compose_sequentially():
    ledger = ledger_of((spend(POISSON), 1000), (spend(POISSON), 500))
    assert response(ledger) == sequential((POISSON, 1500))
    assert response(ledger) < 1.0


def test_groups_compose_in_parallel_per_response():
    ledger = ledger_of(
        (spend(GAUSSIAN(4.0), group="a"), 2),
        (spend(GAUSSIAN(5.0), group="b"), 1),
        (spend(GAUSSIAN(9.0), group="a"), 1),
    )
    assert response(ledger) == sequential((GAUSSIAN(4.0), 2), (GAUSSIAN(9.0), 1))


def test_groups_never_help_a_record():
    ledger = ledger_of(
        *[(spend(GAUSSIAN(4.0), unit=Unit.RECORD, group=g), 1) for g in "abc"]
    )
    assert record(ledger) == sequential((GAUSSIAN(4.0), 3))


def test_disjoint_releases_cost_one():
    ledger = ledger_of((spend(GAUSSIAN(4.046), disjoint=True), 10_000))
    assert response(ledger) == sequential((GAUSSIAN(4.046), 1))
    assert response(ledger) <= 1.0


def test_different_disjoint_releases_cost_the_most_expensive():
    ledger = ledger_of(
        (spend(GAUSSIAN(4.0), disjoint=True), 10),
        (spend(GAUSSIAN(3.0), disjoint=True), 10),
        (spend(GAUSSIAN(5.0), disjoint=True), 10),
    )
    assert response(ledger) == sequential((GAUSSIAN(3.0), 1))


def test_repeated_releases_add_to_the_disjoint_ones_of_their_group():
    ledger = ledger_of(
        (spend(GAUSSIAN(4.0), disjoint=True), 10),
        (spend(GAUSSIAN(3.0), disjoint=True), 10),
        (spend(GAUSSIAN(8.0)), 2),
        (spend(GAUSSIAN(6.0), group="other", disjoint=True), 10),
    )
    expected = sequential((GAUSSIAN(8.0), 2), (GAUSSIAN(3.0), 1))
    assert response(ledger) == expected


def test_memoised_response_costs_its_epsilon_without_delta():
    ledger = ledger_of((spend(PureDpEvent(1.0), disjoint=True), 40_000))
    assert response(ledger) == response(ledger, accountant="pld") == 1.0
    assert ledger.pure_epsilon(unit=Unit.RESPONSE) == 1.0
    ledger.record(spend(GAUSSIAN(9.0), group="gaussian"))
    assert ledger.pure_epsilon(unit=Unit.RESPONSE) is None


def test_units_are_never_added():
    ledger = ledger_of((spend(GAUSSIAN(4.0)), 3))
    before = response(ledger)
    ledger.record(spend(GAUSSIAN(1.0), unit=Unit.RECORD), 5)
    assert response(ledger) == before == sequential((GAUSSIAN(4.0), 3))
    assert record(ledger) == sequential((GAUSSIAN(1.0), 5))
    assert ledger.units() == {Unit.RESPONSE, Unit.RECORD}
    assert ledger.releases(Unit.RESPONSE) == 3
    assert ledger.releases(Unit.RECORD) == 5


def test_units_have_relations_of_their_own():
    ledger = ledger_of((spend(GAUSSIAN(4.0)), 1))
    ledger.record(spend(GAUSSIAN(4.0), unit=Unit.RECORD, relation=Relation.REPLACE_ONE))
    assert ledger.relation(Unit.RESPONSE) is Relation.REPLACE_SPECIAL
    assert ledger.relation(Unit.RECORD) is Relation.REPLACE_ONE


def test_a_second_relation_of_a_unit_is_refused():
    ledger = ledger_of((spend(GAUSSIAN(4.0)), 1))
    before = ledger.to_json()
    other = spend(GAUSSIAN(4.0), relation=Relation.REPLACE_ONE)
    with pytest.raises(ValueError, match="`relation`.*REPLACE_SPECIAL"):
        ledger.record(other)
    with pytest.raises(ValueError, match="`relation`"):
        ledger.epsilon_after(other, 1, unit=Unit.RESPONSE, delta=DELTA)
    assert ledger.to_json() == before


def test_no_noise_is_infinite_and_stays_so():
    ledger = ledger_of((spend(GAUSSIAN(0.0)), 1), (spend(GAUSSIAN(4.0)), 1))
    assert response(ledger) == math.inf


def test_equal_consecutive_releases_are_one_entry():
    a, b = spend(GAUSSIAN(4.0)), spend(GAUSSIAN(4.0), group="b")
    ledger = ledger_of((a, 1), (a, 2), (b, 1), (a, 1))
    assert ledger.entries == (Entry(a, 3), Entry(b, 1), Entry(a, 1))
    assert ledger.mechanisms(Unit.RESPONSE) == ("Test",)


def test_entries_are_a_snapshot_and_nothing_takes_back():
    ledger = ledger_of((spend(GAUSSIAN(4.0)), 1))
    entries = ledger.entries
    ledger.record(spend(GAUSSIAN(4.0)), 1)
    assert entries == (Entry(spend(GAUSSIAN(4.0)), 1),)
    with pytest.raises(AttributeError):
        ledger.entries = ()
    for name in ("clear", "pop", "remove", "__delitem__", "__setitem__"):
        assert not hasattr(ledger, name)


@pytest.mark.parametrize("count", [0, -1, 1.0, True, None])
def test_record_refuses_counts(count):
    ledger = Ledger()
    with pytest.raises(ValueError, match="`count`"):
        ledger.record(spend(GAUSSIAN(4.0)), count)
    assert ledger == Ledger()


def test_epsilon_after_is_what_recording_gives_and_records_nothing():
    ledger = ledger_of((spend(POISSON), 100))
    before = ledger.to_json()
    for count in (0, 1, 400):
        dry = ledger.epsilon_after(
            spend(POISSON), count, unit=Unit.RESPONSE, delta=DELTA
        )
        assert ledger.to_json() == before
        wet = Ledger.from_json(before)
        if count:
            wet.record(spend(POISSON), count)
        assert dry == response(wet)


def test_a_ledger_continues_every_earlier_state_of_its_own_and_no_other():
    one, two = spend(GAUSSIAN(1.0)), spend(GAUSSIAN(2.0))
    states = [ledger_of(), ledger_of((one, 3)), ledger_of((one, 4))]
    states += [ledger_of((one, 4), (two, 1)), ledger_of((one, 4), (two, 5))]
    for late, ledger in enumerate(states):
        for early, earlier in enumerate(states):
            assert ledger.continues(earlier) == (late >= early)
    assert not ledger_of((one, 5), (two, 5)).continues(states[-1])
    assert not ledger_of((two, 9)).continues(ledger_of((one, 1)))


def test_dry_runs_refuse_another_unit():
    other = spend(GAUSSIAN(4.0), unit=Unit.RECORD)
    with pytest.raises(ValueError, match="`unit`.*Unit.RECORD"):
        Ledger().epsilon_after(other, 1, unit=Unit.RESPONSE, delta=DELTA)
    with pytest.raises(ValueError, match="`unit`"):
        Ledger().max_count(
            other, unit=Unit.RESPONSE, delta=DELTA, target_epsilon=1.0, limit=5
        )


@pytest.mark.parametrize(
    "event,already,target",
    [
        (GAUSSIAN(20.0), 0, 1.0),
        (GAUSSIAN(20.0), 7, 1.0),
        (GAUSSIAN(20.0), 40, 1.0),
        (PureDpEvent(0.2), 2, 1.0),
        (dp_accounting.PoissonSampledDpEvent(0.1, GAUSSIAN(4.0)), 3, 0.55),
    ],
)
def test_max_count_by_brute_force(event, already, target):
    ledger = ledger_of((spend(event), already)) if already else Ledger()
    before = ledger.to_json()

    def after(count):
        return ledger.epsilon_after(
            spend(event), count, unit=Unit.RESPONSE, delta=DELTA
        )

    for limit in (0, 1, 2, 13, 60):
        fitting = [n for n in range(limit + 1) if after(n) <= target]
        found = ledger.max_count(
            spend(event),
            unit=Unit.RESPONSE,
            delta=DELTA,
            target_epsilon=target,
            limit=limit,
        )
        assert found == max(fitting, default=0)
    assert ledger.to_json() == before


def test_max_count_reaches_the_target_and_does_not_pass_it():
    asked = dict(unit=Unit.RESPONSE, delta=DELTA)
    one = spend(GAUSSIAN(20.0))
    exact = Ledger().epsilon_after(one, 9, **asked)
    for target, expected in ((exact, 9), (math.nextafter(exact, 0), 8)):
        found = Ledger().max_count(one, target_epsilon=target, limit=50, **asked)
        assert found == expected


def test_max_count_by_pld_is_larger():
    asked = dict(unit=Unit.RESPONSE, delta=DELTA, target_epsilon=1.0, limit=50)
    one = spend(GAUSSIAN(15.0))
    by_rdp = Ledger().max_count(one, **asked)
    by_pld = Ledger().max_count(one, accountant="pld", **asked)
    assert 0 < by_rdp < by_pld < 50


def test_max_count_of_disjoint_releases_is_all_or_nothing():
    asked = dict(unit=Unit.RESPONSE, delta=DELTA, target_epsilon=1.0, limit=10**9)
    assert Ledger().max_count(spend(GAUSSIAN(4.1), disjoint=True), **asked) == 10**9
    assert Ledger().max_count(spend(GAUSSIAN(4.0), disjoint=True), **asked) == 0


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_max_count_refuses_targets(target):
    with pytest.raises(ValueError, match="`target_epsilon`"):
        Ledger().max_count(
            spend(GAUSSIAN(4.0)),
            unit=Unit.RESPONSE,
            delta=DELTA,
            target_epsilon=target,
            limit=5,
        )


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_checked_even_while_empty(delta):
    with pytest.raises(ValueError, match="`delta`"):
        Ledger().epsilon(unit=Unit.RESPONSE, delta=delta)


@pytest.mark.parametrize(
    "fields,match",
    [
        (dict(event=dp_accounting.UnsupportedDpEvent()), "`event`"),
        (dict(event=GAUSSIAN(-1.0)), "noise_multiplier"),
        (dict(event=GAUSSIAN(1.0), unit="RESPONSE"), "`unit`"),
        (dict(event=GAUSSIAN(1.0), relation=3), "`relation`"),
        (dict(event=GAUSSIAN(1.0), group=None), "`group`"),
        (dict(event=GAUSSIAN(1.0), unit=Unit.RECORD, disjoint=True), "`disjoint`"),
    ],
)
def test_spend_refuses(fields, match):
    with pytest.raises(ValueError, match=match):
        spend(**fields)


def full_ledger():
    composed = dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(GAUSSIAN(1 / 3), 4), PureDpEvent(0.1)]
    )
    return ledger_of(
        (spend(composed, group="a"), 2),
        (spend(POISSON), 1500),
        (spend(dp_accounting.NonPrivateDpEvent(), group="b"), 1),
        (spend(PureDpEvent(1.0), group="c", disjoint=True), 9),
        (
            spend(
                dp_accounting.SampledWithoutReplacementDpEvent(100, 7, GAUSSIAN(2.0)),
                unit=Unit.RECORD,
                relation=Relation.REPLACE_ONE,
            ),
            3,
        ),
    )


def test_json_round_trip():
    ledger = full_ledger()
    again = Ledger.from_json(ledger.to_json())
    assert again == ledger
    assert again.entries == ledger.entries
    assert again.to_json() == ledger.to_json()
    assert record(again) == record(ledger)
    again.record(spend(POISSON))
    assert again != ledger


def test_damaged_json_is_refused_whole():
    good = json.loads(full_ledger().to_json())
    damaged = [
        "",
        "[]",
        "{}",
        full_ledger().to_json()[:-20],
        json.dumps({**good, "format": 2}),
        json.dumps({**good, "entries": [{"count": 1}]}),
        json.dumps({**good, "entries": [{**good["entries"][0], "count": -1}]}),
        json.dumps({**good, "entries": [{**good["entries"][0], "count": 0}]}),
    ]
    for text in damaged:
        with pytest.raises(ValueError, match="the JSON of a ledger"):
            Ledger.from_json(text)
