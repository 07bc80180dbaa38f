"""The smallest noise that keeps a target epsilon.

Privacy:
    Every function rounds up and then asks the accountant again: the epsilon of the
    multiplier that is returned never exceeds the target.
"""

import functools
import math
from collections.abc import Callable

import dp_accounting
from scipy import optimize

from dp_transcribe import _validate
from dp_transcribe.privacy.accounting import ACCOUNTANTS, epsilon_of
from dp_transcribe.privacy.events import Event
from dp_transcribe.privacy.units import Relation

# Multipliers are rounded up to this many digits, 1e-4 of their value at most.
_DIGITS = 5
_LARGEST_POWER = 80


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    make_event: Callable[[float], Event],
    relation: Relation,
    accountant: str = "rdp",
) -> float:
    """Smallest noise multiplier whose epsilon does not exceed a target.

    Args:
        target_epsilon: the epsilon to keep, above 0.
        delta: strictly between 0 and 1.
        make_event: turns a noise multiplier into all of the releases planned, as
            one event. More noise must not cost more.
        relation: the neighbouring relation. The multiplier is relative to the
            sensitivity under it.
        accountant: `"rdp"` or `"pld"` (tighter, so less noise; slower).

    Returns:
        The multiplier, rounded up to five significant digits.

    Raises:
        ValueError: an argument is out of range, or no amount of noise reaches the
            target.
    """
    _validate.positive_finite("target_epsilon", target_epsilon)
    _validate.fraction_open("delta", delta)
    _validate.one_of("accountant", accountant, ACCOUNTANTS)

    @functools.cache
    def excess(noise_multiplier: float, by: str) -> float:
        event = make_event(noise_multiplier)
        epsilon = epsilon_of(
            [(event, 1)], relation=relation, delta=delta, accountant=by
        )
        return min(epsilon, 1e300) - target_epsilon

    by_rdp = functools.partial(excess, by="rdp")
    found = _smallest(by_rdp, _bracket(by_rdp))
    if accountant == "pld":
        by_pld = functools.partial(excess, by="pld")
        found = _smallest(by_pld, _bracket_below(by_pld, found))
    return found


def gaussian_noise_multiplier(
    target_epsilon: float,
    delta: float,
    *,
    relation: Relation = Relation.REPLACE_SPECIAL,
    releases: int = 1,
    accountant: str = "rdp",
) -> float:
    """Noise multiplier for answers that enter a Gaussian release.

    Args:
        target_epsilon: the epsilon to keep, above 0.
        delta: strictly between 0 and 1.
        relation: the neighbouring relation. The multiplier is relative to the
            sensitivity under it.
        releases: releases that one unit enters; 1 for fresh queries.
        accountant: `"rdp"` or `"pld"`.

    Returns:
        The multiplier, rounded up.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("releases", releases)

    def make_event(noise_multiplier: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        return dp_accounting.SelfComposedDpEvent(gaussian, releases)

    return noise_multiplier_for(target_epsilon, delta, make_event, relation, accountant)


def poisson_noise_multiplier(
    target_epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    *,
    relation: Relation = Relation.REPLACE_SPECIAL,
    accountant: str = "rdp",
) -> float:
    """Noise multiplier for steps that Poisson-sample a fixed pool.

    Args:
        target_epsilon: the epsilon to keep, above 0.
        delta: strictly between 0 and 1.
        sampling_probability: probability with which a step takes each member of
            the pool (expected batch size over pool size), above 0 and at most 1.
        steps: number of steps.
        relation: `REPLACE_SPECIAL` (zero-out) or `ADD_OR_REMOVE_ONE`.
        accountant: `"rdp"` or `"pld"`.

    Returns:
        The multiplier, rounded up.

    Raises:
        ValueError: an argument is out of range, or the relation is `REPLACE_ONE`.

    References:
        Mironov, Talwar, Zhang: Rényi Differential Privacy of the Sampled Gaussian
        Mechanism, arXiv:1908.10530.
    """
    _validate.probability("sampling_probability", sampling_probability)
    _validate.positive_finite("sampling_probability", sampling_probability)
    _validate.positive_int("steps", steps)

    def make_event(noise_multiplier: float) -> dp_accounting.DpEvent:
        gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
        step = dp_accounting.PoissonSampledDpEvent(sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(step, steps)

    return noise_multiplier_for(target_epsilon, delta, make_event, relation, accountant)


def _bracket(excess: Callable[[float], float]) -> tuple[float, float]:
    """Powers of two around the target: too little noise, and enough."""
    powers = range(0, _LARGEST_POWER)
    if excess(1.0) > 0:
        for power in powers:
            if excess(2.0 ** (power + 1)) <= 0:
                return 2.0**power, 2.0 ** (power + 1)
        raise ValueError(
            "No noise multiplier reaches the target epsilon. Expected `make_event` "
            "to cost less with more noise. Remove what is released without noise "
            "or at a fixed cost above the target, or raise the target."
        )
    for power in powers:
        if excess(2.0 ** -(power + 1)) > 0:
            return 2.0 ** -(power + 1), 2.0**-power
    return 2.0**-_LARGEST_POWER, 2.0**-_LARGEST_POWER


def _bracket_below(
    excess: Callable[[float], float], enough: float
) -> tuple[float, float]:
    """Bracket from a multiplier that is known to be enough, close to the answer."""
    low = high = enough
    for _ in range(_LARGEST_POWER):
        low = high * 0.85
        if excess(low) > 0:
            break
        high = low
    return low, high


def _smallest(excess: Callable[[float], float], bracket: tuple[float, float]) -> float:
    """Root within the bracket, rounded up until it is certain to be enough."""
    low, high = bracket
    root = high
    if excess(low) > 0 > excess(high):
        root = optimize.brentq(excess, low, high, xtol=low * 1e-6, rtol=1e-6)
    found = _round_up(root)
    while excess(found) > 0 and found < high:
        found = _round_up(found * (1 + 10.0**-_DIGITS))
    return found if excess(found) <= 0 else high


def _round_up(value: float) -> float:
    """Rounds up to `_DIGITS` significant digits."""
    exponent = math.floor(math.log10(value)) + 1 - _DIGITS
    digits = math.ceil(round(value / 10.0**exponent, 6))
    return float(f"{digits}e{exponent}")
