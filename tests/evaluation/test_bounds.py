"""Lower bounds: valid over repetitions, and not trivially zero."""

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_mechanism
from scipy.special import expit
from scipy.stats import binom

from dp_transcribe.evaluation import epsilon_lower_bound, gaussian_lower_bound
from dp_transcribe.evaluation.bounds import p_value

DELTA = 1e-5


def gaussian_guesses(random, mu, canaries, guesses):
    """Correct guesses about canaries that move an output of variance one by mu."""
    included = random.random(canaries) < 0.5
    order = np.argsort(mu * included + random.normal(size=canaries))
    half = guesses // 2
    return int((~included[order[:half]]).sum() + included[order[-half:]].sum())


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 3.0])
def test_randomised_response_is_bounded_tightly_and_rarely_too_high(epsilon):
    random = np.random.default_rng(0)
    correct = random.binomial(1000, expit(epsilon), 300)
    bounds = np.array([epsilon_lower_bound(int(c), 1000) for c in correct])
    assert np.mean(bounds > epsilon) <= 0.09  # 5 % promised, 0.013 standard error
    assert bounds.mean() > 0.75 * epsilon - 0.05


def test_confidence_is_kept_and_used():
    bounds = [epsilon_lower_bound(750, 1000, 0.0, c) for c in (0.5, 0.9, 0.99)]
    assert bounds == sorted(bounds, reverse=True)
    assert abs(bounds[0] - np.log(3.0)) < 0.01  # the median is the plain estimate


def test_without_delta_it_is_the_bound_of_clopper_and_pearson():
    bound = epsilon_lower_bound(80, 100)
    assert abs(binom.sf(79, 100, expit(bound)) - 0.05) < 2e-3


def test_delta_explains_some_guesses_and_more_with_more_canaries():
    plain = epsilon_lower_bound(95, 100)
    few = epsilon_lower_bound(95, 100, 1e-3)
    many = epsilon_lower_bound(95, 100, 1e-3, canaries=1000)
    assert many < few < plain


def test_p_value_of_theorem_5_2_by_hand():
    truth = expit(1.0)
    tail = [binom.sf(count - 1, 20, truth) for count in range(21)]
    steepest = max((tail[18 - i] - tail[18]) / i for i in range(1, 19))
    expected = tail[18] + 2 * 50 * 1e-3 * steepest
    assert p_value(18, 20, 50, 1.0, 1e-3) == pytest.approx(expected)


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_gaussian_mechanism_is_bounded_from_below_by_both(mu):
    random = np.random.default_rng(1)
    loss = privacy_loss_mechanism.GaussianPrivacyLoss(1.0 / mu)
    found = {"plain": [], "gaussian": []}
    for _ in range(40):
        few = gaussian_guesses(random, mu, 4000, 400)
        found["plain"].append(epsilon_lower_bound(few, 400, DELTA, canaries=4000))
        found["gaussian"].append(gaussian_lower_bound(few, 400, DELTA, canaries=4000))
    for bounds in found.values():
        # A bound is above the truth if its delta there is above DELTA.
        too_high = [loss.get_delta_for_epsilon(b) < DELTA for b in bounds]
        assert np.mean(too_high) <= 0.15  # 5 % promised, 40 trials
    fourfold = loss.get_delta_for_epsilon(4.0 * np.mean(found["gaussian"]))
    assert fourfold < DELTA  # the bound is more than a quarter of the truth
    assert np.mean(found["gaussian"]) > np.mean(found["plain"]) > 0.2


@pytest.mark.parametrize("bound", [epsilon_lower_bound, gaussian_lower_bound])
def test_a_coin_gives_zero_and_certainty_gives_much(bound):
    assert bound(500, 1000, DELTA) == 0.0
    assert bound(0, 0, DELTA, canaries=10) == 0.0
    assert bound(1000, 1000, DELTA) > 4.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"correct": 11},
        {"correct": -1},
        {"guesses": 20, "canaries": 15},
        {"delta": 1.0},
        {"confidence": 0.0},
    ],
)
def test_impossible_counts_are_refused(arguments):
    given = {"correct": 5, "guesses": 10, **arguments}
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`"):
        epsilon_lower_bound(**given)
