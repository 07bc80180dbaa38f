"""Epsilons against dp_accounting called directly, exact figures and limits."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld, rdp
from scipy import optimize, stats

from dp_transcribe.privacy.accounting import (
    _rdp_of_pure,
    epsilon_of,
    pure_epsilon_of,
    worst_epsilon_of,
)
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.units import Relation, accounting_relation

DELTA = 1e-5
GAUSSIAN = dp_accounting.GaussianDpEvent


def poisson(q, noise_multiplier):
    return dp_accounting.PoissonSampledDpEvent(q, GAUSSIAN(noise_multiplier))


def epsilon(*releases, relation=Relation.REPLACE_SPECIAL, delta=DELTA, by="rdp"):
    return epsilon_of(releases, relation=relation, delta=delta, accountant=by)


def direct(kind, *releases, delta=DELTA):
    accountant = kind()
    for event, count in releases:
        accountant.compose(event, count)
    return accountant.get_epsilon(delta)


CASES = [
    [(GAUSSIAN(4.045), 1)],
    [(GAUSSIAN(4.045), 7), (GAUSSIAN(9.0), 2)],
    [(poisson(512 / 80_000, 1.28), 1500)],
    [(poisson(1024 / 1_000_000, 0.87), 3000)],
    [(poisson(0.01, 2.0), 100), (GAUSSIAN(20.0), 3)],
]


@pytest.mark.parametrize("releases", CASES)
def test_rdp_equals_dp_accounting(releases):
    expected = direct(rdp.RdpAccountant, *releases)
    assert epsilon(*releases) == pytest.approx(expected, rel=1e-7)
    assert epsilon(*releases) >= expected


@pytest.mark.parametrize("releases", CASES[:2] + CASES[4:])
def test_pld_equals_dp_accounting(releases):
    expected = direct(pld.PLDAccountant, *releases)
    assert epsilon(*releases, by="pld") == pytest.approx(expected, rel=1e-6)
    assert epsilon(*releases, by="pld") < epsilon(*releases)


def test_figures_of_the_design():
    assert epsilon((GAUSSIAN(4.0454), 1)) == pytest.approx(1.0, abs=1e-4)
    assert epsilon((poisson(512 / 80_000, 1.27), 1500)) == pytest.approx(1, abs=0.005)
    assert epsilon((poisson(1024 / 1e6, 0.87), 3000)) == pytest.approx(1, abs=0.01)
    steps = 15 * 60_000 // 256
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(60_000, 256, GAUSSIAN(1.1))
    replaced = epsilon((fixed, steps), relation=Relation.REPLACE_ONE)
    assert replaced == pytest.approx(2.44, abs=0.01)


@pytest.mark.parametrize("relation", list(Relation))
def test_gaussian_multiplier_is_relative_to_the_relations_sensitivity(relation):
    assert epsilon((GAUSSIAN(4.045), 1), relation=relation) == epsilon(
        (GAUSSIAN(4.045), 1)
    )


def test_zero_out_is_accounted_as_add_or_remove():
    release = (poisson(0.01, 1.0), 100)
    assert epsilon(release, relation=Relation.REPLACE_SPECIAL) == epsilon(
        release, relation=Relation.ADD_OR_REMOVE_ONE
    )
    assert accounting_relation(Relation.REPLACE_ONE) is Relation.REPLACE_ONE


@pytest.mark.parametrize("by", ["rdp", "pld"])
def test_unsupported_combinations_are_refused(by):
    with pytest.raises(ValueError, match="supports under REPLACE_ONE.*Poisson"):
        epsilon((poisson(0.01, 1.0), 1), relation=Relation.REPLACE_ONE, by=by)
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, GAUSSIAN(1.0))
    with pytest.raises(ValueError, match="fixed-size sampling under REPLACE_ONE"):
        epsilon((fixed, 1), by=by)


def test_fixed_size_sample_has_no_pld():
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, GAUSSIAN(1.0))
    with pytest.raises(ValueError, match="a PLD.*accountant='rdp'"):
        epsilon((fixed, 1), relation=Relation.REPLACE_ONE, by="pld")


def test_compositions_are_flattened():
    nested = dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.ComposedDpEvent([GAUSSIAN(5.0), PureDpEvent(0.1)]), 3
            ),
            dp_accounting.NoOpDpEvent(),
        ]
    )
    flat = [(GAUSSIAN(5.0), 6), (PureDpEvent(0.1), 6)]
    assert epsilon((nested, 2)) == epsilon(*flat)


def test_no_release_costs_nothing():
    assert epsilon() == 0.0
    assert epsilon((GAUSSIAN(1.0), 0)) == 0.0
    assert epsilon((dp_accounting.NoOpDpEvent(), 5), by="pld") == 0.0
    assert epsilon((poisson(0.0, 1.0), 5), by="pld") == 0.0


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize(
    "event",
    [
        dp_accounting.NonPrivateDpEvent(),
        GAUSSIAN(0.0),
        GAUSSIAN(1e-300),
        poisson(0.1, 0.0),
    ],
)
def test_no_noise_is_infinite(event, by):
    assert epsilon((GAUSSIAN(4.0), 1), (event, 1), by=by) == math.inf


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize("size", [1e-12, 1e-3, 0.5, 1.0, 8.0, 40.0, 1e6])
def test_one_pure_release_costs_exactly_its_epsilon(size, by):
    for delta in (1e-12, 1e-5, 0.3):
        assert epsilon((PureDpEvent(size), 1), delta=delta, by=by) == size


def hockey_stick(first, second, level):
    return float(np.maximum(first - np.exp(level) * second, 0.0).sum())


def responses(size, classes, count):
    """Both output distributions of `count` k-ary responses to one question."""
    other = 1 / (np.exp(size) + classes - 1)
    first = np.full(classes, other)
    second = first.copy()
    first[0] = second[1] = np.exp(size) * other
    pairs = [[first, second]] * count
    return [
        np.array(
            [math.prod(p) for p in itertools.product(*(pair[i] for pair in pairs))]
        )
        for i in (0, 1)
    ]


@pytest.mark.parametrize("by", ["rdp", "pld"])
@pytest.mark.parametrize("size,classes,count", [(0.5, 2, 12), (1.0, 3, 7), (0.2, 4, 5)])
def test_composed_responses_keep_the_guarantee(size, classes, count, by):
    delta = 0.01
    first, second = responses(size, classes, count)
    found = epsilon((PureDpEvent(size), count), delta=delta, by=by)
    assert hockey_stick(first, second, found) <= delta
    assert found <= size * count


@pytest.mark.parametrize("size,count", [(0.05, 500), (0.5, 60)])
def test_composed_binary_responses_are_nearly_tight(size, count):
    heads = np.arange(count + 1)
    odds = stats.binom(count, 1 / (1 + math.exp(-size)))
    first, second = odds.pmf(heads), odds.pmf(heads)[::-1]
    exact = optimize.brentq(lambda e: hockey_stick(first, second, e) - DELTA, 0, 100)
    by_pld = epsilon((PureDpEvent(size), count), by="pld")
    assert exact <= by_pld <= exact * 1.02
    assert by_pld <= epsilon((PureDpEvent(size), count)) <= exact * 1.25


def test_divergence_of_pure_release():
    orders = np.array([1.5, 2.0, 30.0, 1024.0])
    for size in (1e-3, 1.0, 20.0, 800.0):
        divergences = _rdp_of_pure(size, orders)
        # The bound for any pure release, which dp_accounting uses for Laplace.
        assert np.all(divergences <= np.minimum(size, orders * size**2 / 2) + 1e-12)
        assert np.all(np.diff(divergences) >= -1e-12)
    for size in (0.01, 0.499, 0.501, 3.0):
        true = 1 / (1 + math.exp(-size))
        exact = math.log(true**2 / (1 - true) + (1 - true) ** 2 / true)
        assert _rdp_of_pure(size, np.array([2.0]))[0] == pytest.approx(exact, rel=1e-9)
    # To first order a * epsilon**2 / 2, far below the resolution of 1 + epsilon**2.
    assert _rdp_of_pure(1e-12, np.array([3.0]))[0] == pytest.approx(1.5e-24, rel=1e-9)


def test_pure_beside_gaussian_is_at_most_their_sum():
    both = epsilon((PureDpEvent(0.7), 1), (GAUSSIAN(4.0), 1))
    assert epsilon((GAUSSIAN(4.0), 1)) < both
    assert both <= epsilon((GAUSSIAN(4.0), 1)) + 0.7
    tight = epsilon((PureDpEvent(0.7), 1), (GAUSSIAN(4.0), 1), by="pld")
    assert 0.7 < tight < both


def test_pure_epsilon():
    assert pure_epsilon_of([(PureDpEvent(0.5), 3), (PureDpEvent(1.0), 1)]) == 2.5
    assert pure_epsilon_of([]) == 0.0
    assert pure_epsilon_of([(PureDpEvent(0.5), 1), (GAUSSIAN(5.0), 1)]) is None


def test_rounding_in_dp_accounting_is_not_taken_for_privacy():
    # A million steps at q = 1e-6: about mu-Gaussian DP with the mu below, so at
    # epsilon 0 delta is 7e-5. dp_accounting's divergence rounds to 0 at an order
    # and it answers epsilon 0 for delta 1e-12.
    q, noise_multiplier, steps = 1e-6, 5.8267, 10**6
    mu = q * math.sqrt(steps * math.expm1(noise_multiplier**-2))
    true_delta = 2 * stats.norm.cdf(mu / 2) - 1
    assert true_delta > 5e-5
    for delta in (1e-12, 1e-9, 1e-5):
        release = (poisson(q, noise_multiplier), steps)
        assert delta < true_delta
        assert epsilon(release, delta=delta) > 0
        assert epsilon(release, delta=delta, by="pld") > 0


@pytest.mark.parametrize("delta", [1e-5, 1e-9, 1e-14])
@pytest.mark.parametrize("noise_multiplier", [0.5, 4.0, 300.0])
def test_gaussian_is_never_under_the_exact_figure(noise_multiplier, delta):
    def excess(level):
        shift, scaled = 0.5 / noise_multiplier, level * noise_multiplier
        lost = stats.norm.cdf(shift - scaled)
        return lost - np.exp(level) * stats.norm.cdf(-shift - scaled) - delta

    exact = optimize.brentq(excess, 0, 100, xtol=1e-12) if excess(0) > 0 else 0.0
    one = (GAUSSIAN(noise_multiplier), 1)
    assert exact * (1 - 1e-6) <= epsilon(one, delta=delta, by="pld")
    assert epsilon(one, delta=delta, by="pld") <= epsilon(one, delta=delta)
    # Steps that are worth as much as one, convolved instead of in closed form.
    many = (poisson(1 - 1e-12, noise_multiplier * 100), 10_000)
    assert exact * (1 - 1e-6) <= epsilon(many, delta=delta, by="pld")


def test_more_noise_and_a_larger_delta_cost_less():
    for make, points in ((GAUSSIAN, 100), (lambda noise: poisson(0.01, noise), 12)):
        costs = [epsilon((make(n), 10)) for n in np.geomspace(0.3, 3000, points)]
        assert all(a >= b for a, b in zip(costs, costs[1:], strict=False))
    by_delta = [epsilon((GAUSSIAN(3.0), 1), delta=d) for d in (1e-9, 1e-5, 1e-2)]
    assert by_delta == sorted(by_delta, reverse=True)


def test_large_epsilons_are_found_in_bounded_memory():
    for noise_multiplier in (0.05, 0.003, 1e-8):
        release = (GAUSSIAN(noise_multiplier), 1)
        assert epsilon(release, by="pld") <= epsilon(release) < math.inf
        assert epsilon(release, by="pld") > 0.5 / noise_multiplier**2


def test_worst_of_alternatives():
    lists = [[(GAUSSIAN(4.0), 1)], [(GAUSSIAN(2.0), 1)], [(GAUSSIAN(4.0), 2)]]
    worst = worst_epsilon_of(lists, relation=Relation.REPLACE_ONE, delta=DELTA)
    assert worst == epsilon((GAUSSIAN(2.0), 1))
    assert worst_epsilon_of([], relation=Relation.REPLACE_ONE, delta=DELTA) == 0.0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_delta_out_of_range(delta):
    with pytest.raises(ValueError, match="`delta`"):
        epsilon((GAUSSIAN(4.0), 1), delta=delta)


def test_unknown_accountant_and_negative_count():
    with pytest.raises(ValueError, match="`accountant`.*'rdp', 'pld'"):
        epsilon((GAUSSIAN(4.0), 1), by="moments")
    with pytest.raises(ValueError, match="`count`"):
        epsilon((GAUSSIAN(4.0), -1))
