"""The result of an audit: its confidence is that of all bounds together."""

import dp_accounting
import numpy as np
import pytest

from dp_transcribe.evaluation import (
    audit_scores,
    epsilon_lower_bound,
    gaussian_lower_bound,
)
from dp_transcribe.evaluation.canaries import SHARES
from dp_transcribe.privacy import Ledger, PureDpEvent, Relation, Spend, Unit

DELTA = 1e-5


def ledger_of(event, relation=Relation.REPLACE_ONE):
    ledger = Ledger()
    ledger.record(
        Spend(unit=Unit.RECORD, relation=relation, event=event, mechanism="Tested")
    )
    return ledger


def audit(event, canaries, delta, attacks=1):
    """Of attacks that know every coin."""
    included = np.arange(canaries) % 2 == 0
    scores = {f"attack {number}": included.astype(float) for number in range(attacks)}
    return audit_scores(
        scores, included, ledger_of(event), unit=Unit.RECORD, delta=delta
    )


def best(bound, tests, canaries, delta):
    """The bound of all guesses being right, at a confidence of 95 % over all tests."""
    guesses = [2 * (int(share * canaries) // 2) for share in SHARES]
    confidence = 1.0 - 0.05 / tests
    return max(bound(n, n, delta, confidence, canaries=canaries) for n in guesses)


@pytest.mark.parametrize("attacks", [1, 3])
def test_two_bounds_share_the_error_with_all_guesses(attacks):
    result = audit(dp_accounting.GaussianDpEvent(1.0), 200, DELTA, attacks)
    tests = 2 * attacks * len(SHARES)
    assert result.epsilon_lower_bound == best(epsilon_lower_bound, tests, 200, DELTA)
    assert result.gaussian_lower_bound == best(gaussian_lower_bound, tests, 200, DELTA)
    assert result.confidence == 0.95


def test_the_one_bound_of_a_pure_claim_shares_it_with_the_guesses_alone():
    result = audit(PureDpEvent(1.0), 200, DELTA)
    assert result.epsilon_lower_bound == best(
        epsilon_lower_bound, len(SHARES), 200, 0.0
    )
    assert result.gaussian_lower_bound is None
