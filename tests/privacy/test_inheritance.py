"""A guarantee that is passed on by post-processing."""

import dataclasses
import math

import pytest

from dp_transcribe.privacy.inheritance import (
    check_inheritable,
    inherit,
    read_statement,
)
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Relation, Unit

STATEMENT = PrivacyStatement(
    unit=Unit.RECORD,
    relation=Relation.REPLACE_SPECIAL,
    epsilon=0.75,
    epsilon_pld=None,
    delta=1e-6,
    accountant="pld",
    mechanism="ClippedGradient",
    covered=("teacher",),
    not_covered=("the private records",),
    sampling="Each release draws its units independently (Poisson sampling).",
    noise_seed=None,
    details={"releases": 12},
)


def test_what_was_computed_from_it_is_covered_and_nothing_else_changes():
    passed_on = inherit(STATEMENT, covered=["student", "generator"])
    assert passed_on.covered == ("teacher", "student", "generator")
    same = dataclasses.replace(
        passed_on, covered=STATEMENT.covered, inherited_from=None
    )
    assert same == STATEMENT


def test_the_prose_says_that_it_is_inherited():
    text = " ".join(inherit(STATEMENT, covered=["student"]).to_text().split())
    assert "Inherited from the teacher by post-processing" in text
    assert "epsilon = 0.75" in text and "unit RECORD" in text
    assert "Inherited" not in STATEMENT.to_text()


@pytest.mark.parametrize(
    "change",
    [
        {"unit": Unit.RESPONSE},
        {"epsilon": math.inf},
        {"accountant": ""},
        {"accountant": None},
        {"mechanism": ""},
    ],
)
def test_what_is_no_guarantee_for_records_is_not_passed_on(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        check_inheritable(dataclasses.replace(STATEMENT, **change))


@pytest.mark.parametrize("value", [None, "statement.json", {"epsilon": 1.0}])
def test_only_a_statement_is_a_statement(value):
    with pytest.raises(ValueError, match="statement"):
        check_inheritable(value)


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "statement.json"
    path.write_text(STATEMENT.to_json())
    assert read_statement(path) == STATEMENT


@pytest.mark.parametrize(
    ("former", "new"),
    [
        ('"epsilon": 0.75', '"epsilon": "many"'),
        ('"epsilon": 0.75', '"epsilon": NaN'),
        ('"epsilon": 0.75', '"epsilon": -1'),
        ('"delta": 1e-06', '"delta": 1.5'),
        ('"delta": 1e-06', '"delta": "small"'),
        ('"relation": "REPLACE_SPECIAL"', '"relation": "SIMILAR"'),
        ('"unit": "RECORD"', '"unit": "PERSON"'),
        ('"unit": "RECORD"', '"unit": "RESPONSE"'),
        ('"accountant": "pld"', '"accountant": 3'),
        ('"accountant": "pld",', ""),
        ("{", "{{"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, former, new):
    path = tmp_path / "statement.json"
    assert former in STATEMENT.to_json()
    path.write_text(STATEMENT.to_json().replace(former, new, 1))
    with pytest.raises(ValueError, match="Expected"):
        read_statement(path)


def test_an_older_file_without_the_newest_field_is_read(tmp_path):
    values = STATEMENT.to_dict()
    del values["inherited_from"]
    assert PrivacyStatement.from_dict(values) == STATEMENT
