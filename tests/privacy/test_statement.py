"""The statement: what its words and its JSON say."""

import json
import math

import dp_accounting
import pytest

from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.prose import round_up
from dp_transcribe.privacy.statement import PrivacyStatement, statement_from_ledger
from dp_transcribe.privacy.units import Relation, Unit

DELTA = 1e-5
GAUSSIAN = dp_accounting.GaussianDpEvent


def ledger_of(event, unit=Unit.RESPONSE, count=1, **fields):
    ledger = Ledger()
    fields = {"relation": Relation.REPLACE_SPECIAL, "mechanism": "Test", **fields}
    ledger.record(Spend(unit=unit, event=event, **fields), count)
    return ledger


def statement(event=None, unit=Unit.RESPONSE, count=1, **asked):
    event = GAUSSIAN(4.046) if event is None else event
    return statement_from_ledger(
        ledger_of(event, unit, count), unit=unit, delta=DELTA, **asked
    )


def flat(text):
    return " ".join(text.split())


def test_response_statement_says_first_what_it_does_not_protect():
    text = flat(statement().to_text())
    assert text.startswith("Differential privacy per unit RESPONSE: epsilon = 0.9999 ")
    assert (
        text.index("protects each answer of the teacher to one synthetic query") < 260
    )
    assert (
        "It does NOT protect a person in the teacher's training data, because one "
        "record can change every answer." in text
    )
    for route in ("DP-KIP", "ensemble of teachers", "itself trained with differential"):
        assert route in text


def test_record_statement_protects_a_person():
    text = flat(statement(unit=Unit.RECORD).to_text())
    assert text.startswith("Differential privacy per unit RECORD")
    assert "protects each record of the private training set" in text
    assert "does NOT protect a person in the teacher's training data" not in text


def test_figures_come_from_the_ledger():
    made = statement(count=3, covered=("student", "generator"))
    ledger = ledger_of(GAUSSIAN(4.046), count=3)
    assert made.epsilon == ledger.epsilon(unit=Unit.RESPONSE, delta=DELTA)
    assert made.epsilon_pld == ledger.epsilon(
        unit=Unit.RESPONSE, delta=DELTA, accountant="pld"
    )
    assert made.epsilon_pld < made.epsilon
    assert made.relation is Relation.REPLACE_SPECIAL
    assert (made.delta, made.accountant, made.mechanism) == (DELTA, "rdp", "Test")
    assert made.details == {"releases": 3}
    assert made.versions["dp-accounting"] == "0.4.3"
    text = flat(str(made))
    assert f"tighter PLD figure: {round_up(made.epsilon_pld)}" in text
    assert "delta = 1e-05" in text
    assert "REPLACE_SPECIAL" in text and "zero-out" in text
    assert "Covered: student, generator" in text
    assert "NOT covered, not to be released under this statement: teacher." in text


def test_second_figure_can_be_left_out_or_be_the_first():
    assert statement(tighter=False).epsilon_pld is None
    by_pld = statement(accountant="pld")
    assert by_pld.epsilon_pld is None
    assert by_pld.epsilon == statement().epsilon_pld


def test_second_figure_is_left_out_where_there_is_none():
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 7, GAUSSIAN(2.0))
    ledger = ledger_of(fixed, Unit.RECORD, relation=Relation.REPLACE_ONE)
    made = statement_from_ledger(ledger, unit=Unit.RECORD, delta=DELTA)
    assert made.epsilon_pld is None
    assert "draws 7 of 100 units" in flat(made.to_text())


def test_randomised_responses_need_no_delta():
    ledger = ledger_of(PureDpEvent(1.0), count=40_000, disjoint=True)
    made = statement_from_ledger(ledger, unit=Unit.RESPONSE, delta=DELTA)
    assert (made.epsilon, made.delta) == (1.0, 0.0)
    assert "epsilon = 1, delta = 0" in flat(made.to_text())
    assert "Every query is fresh" in made.sampling


def test_many_composed_responses_keep_their_delta():
    made = statement(PureDpEvent(0.01), count=2000)
    assert made.delta == DELTA
    assert made.epsilon < 20.0


def test_sampling_assumption_is_named():
    event = dp_accounting.PoissonSampledDpEvent(0.0064, GAUSSIAN(1.28))
    made = statement(dp_accounting.SelfComposedDpEvent(event, 15))
    assert "probability 0.0064 (Poisson sampling)" in made.sampling
    assert made.sampling in flat(made.to_text())
    assert statement(sampling="As agreed.").sampling == "As agreed."


def test_known_seed_voids_the_guarantee_against_who_knows_it():
    text = flat(statement(noise_seed=7).to_text())
    assert "given seed 7" in text
    assert "does not hold against anyone who knows the seed" in text
    assert "secret entropy" in flat(statement().to_text())
    assert "seed 0" in flat(statement(noise_seed=0).to_text())


def test_limits_are_always_named():
    for made in (statement(), statement(unit=Unit.RECORD), statement(GAUSSIAN(0.0))):
        text = flat(made.to_text())
        assert "hyper-parameters" in text
        assert "not hardened against precision attacks" in text


@pytest.mark.parametrize("unit", list(Unit))
def test_without_noise_it_says_not_private(unit):
    made = statement(GAUSSIAN(0.0), unit=unit)
    assert not made.is_private
    text = flat(made.to_text())
    assert text.startswith("NOT PRIVATE: epsilon is infinite")
    assert "It protects" not in text
    assert json.loads(made.to_json())["epsilon"] == "inf"
    assert PrivacyStatement.from_json(made.to_json()) == made


def test_nothing_released():
    made = statement_from_ledger(Ledger(), unit=Unit.RESPONSE, delta=DELTA)
    assert made.epsilon == 0.0
    assert made.mechanism == "none"
    assert made.sampling == "Nothing was released."


def test_json_round_trip():
    made = statement(count=3, noise_seed=5, details={"clip_norm": 1.0})
    again = PrivacyStatement.from_json(made.to_json())
    assert again == made
    assert again.to_text() == made.to_text()
    values = json.loads(made.to_json())
    assert values["unit"] == "RESPONSE"
    assert values["relation"] == "REPLACE_SPECIAL"
    assert values["epsilon"] == made.epsilon
    assert values["details"] == {"releases": 3, "clip_norm": 1.0}


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"unit": "PERSON"}'])
def test_damaged_json_is_refused(text):
    with pytest.raises(ValueError, match="JSON of a privacy statement"):
        PrivacyStatement.from_json(text)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": True},
        {"epsilon": False},
        {"epsilon": "0.1"},
        {"epsilon": "nan"},
        {"epsilon_pld": False},
        {"epsilon_pld": "0.1"},
        {"delta": False},
        {"delta": "0"},
        {"covered": "student"},
        {"covered": [1]},
        {"mechanism": 5},
        {"accountant": None},
        {"sampling": None},
        {"details": [1]},
        {"versions": "1.0"},
        {"inherited_from": 3},
    ],
    ids=str,
)
def test_edited_json_is_refused_when_it_is_read_and_not_when_it_is_shown(change):
    values = {**statement(unit=Unit.RECORD).to_dict(), **change}
    with pytest.raises(ValueError, match=f"`{next(iter(change))}`"):
        PrivacyStatement.from_json(json.dumps(values))


def inherited(**changes):
    fields = dict(
        unit=Unit.RECORD,
        relation=Relation.ADD_OR_REMOVE_ONE,
        epsilon=2.0,
        epsilon_pld=None,
        delta=1e-5,
        accountant="as stated with the teacher",
        mechanism="Inherited",
        covered=("student", "generator"),
        not_covered=(),
        sampling="As stated with the teacher.",
        noise_seed=None,
    )
    return PrivacyStatement(**{**fields, **changes})


def test_statement_without_a_ledger():
    text = flat(inherited().to_text())
    assert "epsilon = 2, delta = 1e-05, by Inherited" in text
    assert "NOT covered" not in text


@pytest.mark.parametrize(
    "changes,match",
    [
        (dict(epsilon=-1.0), "`epsilon`"),
        (dict(epsilon=math.nan), "`epsilon`"),
        (dict(epsilon_pld=math.nan), "`epsilon_pld`"),
        (dict(delta=1.0), "`delta`"),
        (dict(delta=math.nan), "`delta`"),
        (dict(noise_seed=-1), "`noise_seed`"),
        (dict(unit="RECORD"), "`unit`"),
        (dict(covered="student"), "`covered`"),
    ],
)
def test_fields_out_of_range(changes, match):
    with pytest.raises(ValueError, match=match):
        inherited(**changes)


@pytest.mark.parametrize(
    "value", [0.0, 1.0, 0.99991, 0.999949, 1.00001, 2.0 / 3.0, 123456.7, 3.14159e-7]
)
def test_printed_figures_are_never_below_the_true_ones(value):
    printed = float(round_up(value))
    assert value <= printed <= value * 1.0011


def test_the_printed_delta_is_never_below_the_true_one():
    text = flat(inherited(delta=1.2345649e-5).to_text())
    printed = float(text.split("delta = ")[1].split(",")[0])
    assert 1.2345649e-5 <= printed <= 1.24e-5
