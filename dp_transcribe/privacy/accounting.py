"""Epsilon of a list of releases, computed by `dp_accounting`.

Two accountants: `"rdp"` (Rényi, the default) and `"pld"` (privacy loss
distributions, tighter and slower). Both give upper bounds, and so does the smaller
of the two, which is what `"pld"` reports.

Privacy:
    A Gaussian event's noise multiplier is the noise's standard deviation over the
    sensitivity *under the relation it is recorded with*: a sum of contributions
    bounded by C moves by C under zero-out or add-or-remove and by 2 C under
    replace-one, so the same noise has half the multiplier there.
"""

import functools
from collections.abc import Iterable

import dp_accounting
import numpy as np
from dp_accounting.pld import privacy_loss_distribution as pld_lib
from dp_accounting.rdp import rdp_privacy_accountant as rdp_lib
from scipy import special

from dp_transcribe import _validate
from dp_transcribe.privacy.events import (
    SAMPLED_EVENTS,
    Event,
    PureDpEvent,
    check_event,
    leaves,
)
from dp_transcribe.privacy.units import Relation, accounting_relation

ACCOUNTANTS = ("rdp", "pld")

_ORDERS = tuple(float(order) for order in rdp_lib.DEFAULT_RDP_ORDERS)
# Asked only where the best of dp_accounting's own orders is its last one: without
# them no epsilon below about 0.0035 (at delta 1e-5) can be certified.
_MORE_ORDERS = (*_ORDERS, *(float(2**power) for power in range(11, 14)))

# Added to the divergence of each sampled release, at whole and at fractional
# orders. dp_accounting sums series there whose rounding and truncation (measured
# against 60 digits: 6e-17 and 1e-12) exceed the divergence itself when the sampling
# probability is tiny; a divergence rounded to zero would read as epsilon 0.
_SLACK_WHOLE, _SLACK_FRACTIONAL = 1e-15, 1e-11

# Below this a Gaussian is reported as not private: dp_accounting would divide by
# the square of it.
_SMALLEST_NOISE = 1e-100

# Privacy losses are rounded up to multiples of this, which is dp_accounting's own
# default; wider for large epsilons, where the grid would not fit into memory.
_LOSS_INTERVAL = 1e-4
_INTERVAL_GROWS_FROM = 5.0
_LARGEST_EPSILON_FOR_PLD = 1e4

# The transforms that compose distributions err by about 1e-13 in delta, so that a
# PLD says nothing about a smaller one; the answer is then that of "rdp".
_SMALLEST_DELTA_FOR_PLD = 1e-10

# Outside of this range a pure epsilon is added instead of convolved: rounding or a
# probability of exactly zero would make the distribution worthless.
_PURE_RANGE_FOR_PLD = (1e-9, 30.0)

Releases = tuple[tuple[Event, int], ...]


def epsilon_of(
    releases: Iterable[tuple[Event, int]],
    *,
    relation: Relation,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """Epsilon of releases that compose sequentially.

    The result is never below the epsilon of the largest pure release in the list,
    so that one release of a `PureDpEvent` costs exactly its epsilon.

    Args:
        releases: pairs of an event and how often it happened.
        relation: the neighbouring relation of all of them.
        delta: between 0 and 1.
        accountant: `"rdp"` or `"pld"`.

    Returns:
        The epsilon: 0.0 for no release, infinity if one of them is not private.

    Raises:
        ValueError: an argument is out of range, or `dp_accounting` cannot account
            for an event under this relation or with this accountant (fixed-size
            samples have no PLD; Poisson sampling needs add-or-remove or zero-out).

    References:
        Mironov: Rényi Differential Privacy, arXiv:1702.07476.
        Koskela, Jälkö, Honkela: Computing Tight Differential Privacy Guarantees
        Using FFT, arXiv:1906.03049.
    """
    _validate.fraction_open("delta", delta)
    _validate.one_of("accountant", accountant, ACCOUNTANTS)
    _validate.instance_of("relation", relation, Relation)
    return _epsilon(_gather(releases), relation, float(delta), accountant)


def pure_epsilon_of(releases: Iterable[tuple[Event, int]]) -> float | None:
    """Epsilon that holds with delta 0, or None if some release needs a delta.

    Args:
        releases: pairs of an event and how often it happened.

    Returns:
        The sum of the pure epsilons (basic composition), or None.
    """
    gathered = _gather(releases)
    if not all(isinstance(event, PureDpEvent) for event, _ in gathered):
        return None
    return _sum_of_pure(gathered)


def _gather(releases: Iterable[tuple[Event, int]]) -> Releases:
    """Flattens and merges equal releases; the result can be a cache key."""
    counts: dict[Event, int] = {}
    for event, count in releases:
        _validate.non_negative_int("count", count)
        for leaf, times in leaves(check_event(event), int(count)):
            counts[leaf] = counts.get(leaf, 0) + times
    return tuple(counts.items())


@functools.lru_cache(maxsize=4096)
def _epsilon(
    releases: Releases, relation: Relation, delta: float, accountant: str
) -> float:
    if not releases:
        return 0.0
    if any(_has_no_noise(event) for event, _ in releases):
        return float("inf")
    pure = tuple(r for r in releases if isinstance(r[0], PureDpEvent))
    epsilon = _rdp_epsilon(releases, relation, delta)
    if pure:
        rest = tuple(r for r in releases if not isinstance(r[0], PureDpEvent))
        basic = _epsilon(rest, relation, delta, "rdp") + _sum_of_pure(pure)
        epsilon = min(epsilon, basic)
    if accountant == "pld" and _pld_is_worth_it(epsilon, delta):
        epsilon = min(epsilon, _pld_epsilon(releases, delta, epsilon))
    return max([epsilon, *(event.epsilon for event, _ in pure)])


def _pld_is_worth_it(epsilon: float, delta: float) -> bool:
    return epsilon <= _LARGEST_EPSILON_FOR_PLD and delta >= _SMALLEST_DELTA_FOR_PLD


def _has_no_noise(event: Event) -> bool:
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return True
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return event.noise_multiplier < _SMALLEST_NOISE
    return hasattr(event, "event") and _has_no_noise(event.event)


def _sum_of_pure(releases: Releases) -> float:
    return float(sum(event.epsilon * count for event, count in releases))


def _rdp_epsilon(releases: Releases, relation: Relation, delta: float) -> float:
    epsilon, order = _rdp_epsilon_at(_ORDERS, releases, relation, delta)
    if order == _ORDERS[-1]:
        epsilon, _ = _rdp_epsilon_at(_MORE_ORDERS, releases, relation, delta)
    return float(epsilon)


def _rdp_epsilon_at(
    orders: tuple[float, ...], releases: Releases, relation: Relation, delta: float
) -> tuple[float, float]:
    """Best epsilon and the order it was found at."""
    relation = accounting_relation(relation)
    divergences = sum(
        count * _rdp(event, relation, orders) for event, count in releases
    )
    return rdp_lib.compute_epsilon(orders, divergences, delta)


@functools.lru_cache(maxsize=256)
def _rdp(event: Event, relation: Relation, orders: tuple[float, ...]) -> np.ndarray:
    """Rényi divergences `[orders]` of one release."""
    at = np.array(orders)
    if isinstance(event, PureDpEvent):
        return _rdp_of_pure(event.epsilon, at)
    accountant = rdp_lib.RdpAccountant(orders, relation)
    try:
        divergences = accountant.compose(event).rdp
    except dp_accounting.UnsupportedEventError as error:
        mend = (
            "Poisson sampling is accounted under ADD_OR_REMOVE_ONE or "
            "REPLACE_SPECIAL (zero-out), fixed-size sampling under REPLACE_ONE."
        )
        expected = f"an event dp_accounting supports under {relation.name}"
        raise _validate.invalid("event", event, expected, mend) from error
    if isinstance(event, SAMPLED_EVENTS):
        slack = np.where(at % 1 == 0, _SLACK_WHOLE, _SLACK_FRACTIONAL)
        divergences = np.maximum(divergences, 0.0) + slack
    return divergences


def _rdp_of_pure(epsilon: float, orders: np.ndarray) -> np.ndarray:
    """Rényi divergences `[orders]` of the two-valued randomised response.

    The largest of any epsilon-DP release (see `PureDpEvent`). At order a it is
    log(cosh((a - 1/2) epsilon) / cosh(epsilon / 2)) / (a - 1), computed here so that
    neither a tiny nor a huge epsilon is lost to rounding.

    References:
        Mironov, arXiv:1702.07476, Proposition 5.
    """
    at = np.minimum(epsilon, 1.0 / orders)
    growth = np.sinh(orders * at / 2) * np.sinh((orders - 1) * at / 2)
    small = np.log1p(2 * growth / np.cosh(at / 2))
    large = _log_cosh((orders - 0.5) * epsilon) - _log_cosh(epsilon / 2)
    return np.where(orders * epsilon <= 1, small, large) / (orders - 1)


def _log_cosh(value: np.ndarray | float) -> np.ndarray:
    return value + np.log1p(np.exp(-2 * np.asarray(value))) - np.log(2.0)


def _pld_epsilon(releases: Releases, delta: float, upper: float) -> float:
    """Epsilon by privacy loss distributions; `upper` sets how fine they are."""
    interval = _LOSS_INTERVAL * max(1.0, upper / _INTERVAL_GROWS_FROM)
    total = pld_lib.identity(value_discretization_interval=interval)
    added = 0.0
    for event, count in releases:
        if isinstance(event, PureDpEvent) and not _convolvable(event):
            added += count * event.epsilon
        else:
            total = total.compose(_pld(event, count, interval))
    return float(total.get_epsilon_for_delta(delta)) + added


def _convolvable(event: PureDpEvent) -> bool:
    low, high = _PURE_RANGE_FOR_PLD
    return low <= event.epsilon <= high


def _pld(event: Event, count: int, interval: float) -> pld_lib.PrivacyLossDistribution:
    """Privacy loss distribution of one event repeated `count` times."""
    if isinstance(event, PureDpEvent):
        return pld_lib.from_randomized_response(
            noise_parameter=2 * float(special.expit(-event.epsilon)),
            num_buckets=2,
            value_discretization_interval=interval,
        ).self_compose(count)
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return pld_lib.from_gaussian_mechanism(
            standard_deviation=event.noise_multiplier / np.sqrt(count),
            value_discretization_interval=interval,
        )
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return _pld_of_poisson(event, count, interval)
    mend = "Use accountant='rdp'."
    raise _validate.invalid("event", event, "an event that has a PLD", mend)


def _pld_of_poisson(
    event: dp_accounting.PoissonSampledDpEvent, count: int, interval: float
) -> pld_lib.PrivacyLossDistribution:
    if event.sampling_probability == 0:
        return pld_lib.identity(value_discretization_interval=interval)
    if event.sampling_probability == 1:
        return _pld(event.event, count, interval)
    return pld_lib.from_gaussian_mechanism(
        standard_deviation=event.event.noise_multiplier,
        value_discretization_interval=interval,
        sampling_prob=event.sampling_probability,
    ).self_compose(count)


def worst_epsilon_of(
    alternatives: Iterable[Iterable[tuple[Event, int]]],
    *,
    relation: Relation,
    delta: float,
    accountant: str = "rdp",
) -> float:
    """Epsilon of releases of which a unit is touched by one list only.

    Parallel composition: each unit meets one of the lists, so the cost is that of
    the most expensive list.

    Args:
        alternatives: lists of releases; every unit is touched by at most one.
        relation: the neighbouring relation of all of them.
        delta: between 0 and 1.
        accountant: `"rdp"` or `"pld"`.

    Returns:
        The largest epsilon, 0.0 for no lists.
    """
    distinct = {_gather(releases) for releases in alternatives}
    cost = functools.partial(
        epsilon_of, relation=relation, delta=delta, accountant=accountant
    )
    return max((cost(releases) for releases in distinct), default=0.0)
