"""Audits with canaries of what a statement claims: the right one, with its terms."""

import dataclasses

import dp_accounting
import pytest

from dp_transcribe.evaluation import AuditResult, claims
from dp_transcribe.mechanisms import NormalizedGradient, RandomizedResponse
from dp_transcribe.privacy import (
    Ledger,
    Relation,
    Spend,
    Unit,
    statement_from_ledger,
)
from dp_transcribe.queries import FreshQueries, QueryPool
from tests import tiny


def audited(bound=0.3):
    return AuditResult(
        unit=Unit.RESPONSE,
        mechanism="NormalizedGradient",
        claimed_epsilon=1.0,
        delta=1e-5,
        epsilon_lower_bound=bound,
        gaussian_lower_bound=None,
        confidence=0.95,
        canaries=100,
        guesses=100,
        correct=60,
        attack="sum",
    )


@pytest.mark.parametrize(
    "mechanism", ["ClippedGradient", "NoisyMean + PrivateLinearModel"]
)
def test_a_statement_for_records_is_audited_by_what_it_names(mechanism):
    result = claims.audit_claim(statement_for_records(mechanism), canaries=100, seed=1)
    assert result.unit is Unit.RECORD
    assert result.mechanism == mechanism
    assert 1.9 < result.claimed_epsilon <= 2.0
    assert result.delta == 1e-6
    assert not result.flagged


@pytest.mark.parametrize("name", ["EnsembleGradient", "NoisyVotes"])
def test_a_statement_of_an_ensemble_is_audited_by_its_own_audit(name, monkeypatch):
    asked = {}
    monkeypatch.setitem(
        claims.RECORD_AUDITS, name, lambda **terms: asked.update(terms) or audited()
    )
    told = statement_for_records(name)
    claims.audit_claim(told, canaries=64, delta=0.1, seed=1)
    assert asked == {"target_epsilon": 2.0, "delta": 1e-6, "canaries": 64, "seed": 1}


@pytest.mark.parametrize(("noise", "flagged"), [(5.0, False), (0.02, True)])
def test_what_is_claimed_is_what_the_statement_says(noise, flagged):
    pool = QueryPool(size=200, batch_size=20, updates=12)
    model = tiny.transcriber(NormalizedGradient(), queries=pool, seed=None)
    tiny.fit(model, 2, target_epsilon=2.0, delta=1e-5)
    told = model.privacy_statement()
    mechanism = told.details["mechanism"] | {"noise_multiplier": noise}
    queries = told.details["queries"] | {"size": 2000, "batch_size": 2000}
    edited = dataclasses.replace(
        told,
        epsilon=1.0,
        details=told.details
        | {"mechanism": mechanism, "queries": queries | {"updates": 40}, "releases": 1},
    )
    result = claims.audit_claim(edited, canaries=2000, delta=0.1, seed=1)
    assert (result.claimed_epsilon, result.delta) == (1.0, told.delta)
    assert result.flagged is flagged, result


def test_a_claim_of_pure_epsilon_is_audited_without_delta():
    model = tiny.transcriber(RandomizedResponse(), queries=FreshQueries(batch_size=16))
    model.fit(target_epsilon=1.0, epochs=1, steps_per_epoch=1, verbose=0)
    told = model.privacy_statement()
    assert told.delta == 0.0
    result = claims.audit_claim(told, canaries=400, seed=1)
    assert (result.delta, result.claimed_epsilon) == (0.0, told.epsilon)
    assert not result.flagged


@pytest.mark.parametrize("name", ["ClassMeans", "DPKIP", "NoisyVotes (votes)"])
def test_every_statement_for_records_that_is_made_here_has_an_audit(name, monkeypatch):
    for audit in claims.RECORD_AUDITS:
        monkeypatch.setitem(claims.RECORD_AUDITS, audit, lambda **_: audited())
    before = "NoisyVotes (check) + " if "votes" in name else ""
    told = statement_for_records(before + name)
    assert claims.audit_claim(told, canaries=64, seed=1) == audited()


def test_a_statement_that_nothing_audits_is_refused():
    with pytest.raises(ValueError, match="EnsembleGradient"):
        claims.audit_claim(statement_for_records("NoisySums"), canaries=64)


def statement_for_records(mechanism):
    ledger = Ledger()
    event = dp_accounting.GaussianDpEvent(2.5)
    relation = Relation.REPLACE_SPECIAL
    ledger.record(
        Spend(unit=Unit.RECORD, relation=relation, event=event, mechanism=mechanism)
    )
    stated = statement_from_ledger(ledger, unit=Unit.RECORD, delta=1e-6)
    return dataclasses.replace(stated, epsilon=2.0)
