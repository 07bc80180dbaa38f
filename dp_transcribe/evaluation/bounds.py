"""From correct guesses to a lower bound on epsilon: the theorems of one-run audits.

An auditor includes each of m canaries by a fair coin, sees what a mechanism releases
and guesses some of the coins. A private mechanism limits how many guesses are right;
more of them than it allows, and its epsilon must be larger than claimed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from dp_accounting.pld import privacy_loss_mechanism
from scipy import optimize, special, stats

from dp_transcribe import _validate

# Beyond this nobody claims a guarantee; a bound is not looked for above it.
_LARGEST_EPSILON = 64.0
_LARGEST_MU = 16.0


def epsilon_lower_bound(
    correct: int,
    guesses: int,
    delta: float = 0.0,
    confidence: float = 0.95,
    *,
    canaries: int | None = None,
) -> float:
    """Largest epsilon that the guesses speak against.

    Args:
        correct: number of correct guesses.
        guesses: number of guesses; the auditor abstains from the other canaries.
        delta: of the guarantee that is tested; 0 for a pure one.
        confidence: probability with which the bound holds, strictly between 0 and 1.
        canaries: number of canaries, each included by an independent fair coin; by
            default as many as guesses. Decides what delta can explain.

    Returns:
        Epsilon, 0.0 if the guesses speak against none. With probability `confidence`
        over coins and mechanism it does not exceed the true epsilon at `delta`.

    Raises:
        ValueError: an argument is out of range.

    References:
        Steinke, Nasr, Jagielski: Privacy Auditing with One (1) Training Run,
        arXiv:2305.08846, theorem 5.2.
    """
    canaries = _check_counts(correct, guesses, canaries)
    if delta != 0.0:
        _validate.fraction_open("delta", delta)
    level = 1.0 - _validate.fraction_open("confidence", confidence)
    return _largest_rejected(
        lambda epsilon: level - p_value(correct, guesses, canaries, epsilon, delta),
        _LARGEST_EPSILON,
    )


def p_value(
    correct: int, guesses: int, canaries: int, epsilon: float, delta: float
) -> float:
    """Most probable that so many guesses are correct under (epsilon, delta)-DP.

    Args:
        correct: number of correct guesses.
        guesses: number of guesses.
        canaries: number of canaries.
        epsilon: of the guarantee.
        delta: of the guarantee.

    Returns:
        A bound on the probability of `correct` or more correct guesses.

    References:
        arXiv:2305.08846, theorem 5.2.
    """
    # A guess is at best as good as one about a randomised response of this epsilon.
    truth = special.expit(epsilon)
    at_least = stats.binom.sf(correct - 1, guesses, truth)
    if delta == 0.0 or correct == 0:
        return float(at_least)
    fewer = np.arange(1, correct + 1)
    within = stats.binom.sf(correct - fewer - 1, guesses, truth) - at_least
    steepest = max(0.0, float(np.max(within / fewer)))
    return float(min(at_least + 2.0 * canaries * delta * steepest, 1.0))


def gaussian_lower_bound(
    correct: int,
    guesses: int,
    delta: float,
    confidence: float = 0.95,
    *,
    canaries: int | None = None,
) -> float:
    """As `epsilon_lower_bound`, for a mechanism that claims a Gaussian's guarantee.

    (epsilon, delta) is one point of what a Gaussian mechanism promises. Tested
    against its whole trade-off between error rates, the same guesses say far more.

    Args:
        correct: number of correct guesses.
        guesses: number of guesses.
        delta: at which the bound is expressed as an epsilon, strictly in 0..1.
        confidence: strictly between 0 and 1.
        canaries: number of canaries; by default as many as guesses.

    Returns:
        Epsilon at `delta` of the noisiest Gaussian mechanism that the guesses do not
        speak against, 0.0 if they speak against none.

    Raises:
        ValueError: an argument is out of range.

    References:
        Mahloujifar, Melis, Chaudhuri: Auditing f-Differential Privacy in One Run,
        arXiv:2410.22235.
    """
    canaries = _check_counts(correct, guesses, canaries)
    _validate.fraction_open("delta", delta)
    level = 1.0 - _validate.fraction_open("confidence", confidence)
    mu = _largest_rejected(
        lambda mu: _excess_mass(correct, guesses, canaries, mu, level), _LARGEST_MU
    )
    return _epsilon_of_gaussian(mu, delta) if mu > 0.0 else 0.0


def _epsilon_of_gaussian(mu: float, delta: float) -> float:
    """Epsilon at `delta` of the Gaussian mechanism of multiplier 1 / mu."""
    loss = privacy_loss_mechanism.GaussianPrivacyLoss(1.0 / mu)

    def excess(epsilon: float) -> float:
        return loss.get_delta_for_epsilon(epsilon) - delta

    if excess(0.0) <= 0.0:
        return 0.0
    high = 1.0
    while excess(high) > 0.0:
        high *= 2.0
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-6))


def _excess_mass(
    correct: int, guesses: int, canaries: int, mu: float, level: float
) -> float:
    """Probability mass that a mu-Gaussian mechanism would need beyond what there is.

    If `correct` guesses or more had the probability `level`, the trade-off function
    bounds from below how probable fewer correct guesses are, count by count.
    Above zero it is too much: `level` was too high, and mu is rejected.
    """
    right = level * correct / canaries
    wrong = level * (guesses - correct) / canaries
    for count in range(correct - 1, -1, -1):
        moved = special.ndtr(special.ndtri(right) - mu)
        if moved <= wrong:
            break
        right = min(right + count / (guesses - count) * (moved - wrong), 1.0)
        wrong = moved
    return right + wrong - guesses / canaries


def _largest_rejected(excess: Callable[[float], float], largest: float) -> float:
    """Largest parameter at which the test rejects (`excess` above 0), or 0."""
    if excess(0.0) <= 0.0:
        return 0.0
    low, high = 0.0, 0.25
    while excess(high) > 0.0:
        low, high = high, 2.0 * high
        if high > largest:
            return low
    root = optimize.brentq(excess, low, high, xtol=1e-3)
    # On the rejected side of the root, so that the bound is never too large.
    return max(low, root - 2e-3) if excess(root) <= 0.0 else float(root)


def _check_counts(correct: int, guesses: int, canaries: int | None) -> int:
    canaries = guesses if canaries is None else canaries
    _validate.positive_int("canaries", canaries)
    _validate.in_range("guesses", guesses, 0, canaries)
    _validate.in_range("correct", correct, 0, guesses)
    return canaries
