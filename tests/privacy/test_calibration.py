"""Calibration: never over the target, and as little noise as that allows."""

import math

import dp_accounting
import pytest
from dp_accounting import rdp

from dp_transcribe.privacy.accounting import epsilon_of
from dp_transcribe.privacy.calibration import (
    _smallest,
    gaussian_noise_multiplier,
    noise_multiplier_for,
    poisson_noise_multiplier,
)
from dp_transcribe.privacy.events import PureDpEvent
from dp_transcribe.privacy.units import Relation

GAUSSIAN = dp_accounting.GaussianDpEvent
ZERO_OUT = Relation.REPLACE_SPECIAL


def epsilon(event, delta, accountant="rdp", relation=ZERO_OUT, count=1):
    return epsilon_of(
        [(event, count)], relation=relation, delta=delta, accountant=accountant
    )


def poisson(q, noise_multiplier):
    return dp_accounting.PoissonSampledDpEvent(q, GAUSSIAN(noise_multiplier))


def test_figures_of_the_design():
    assert gaussian_noise_multiplier(1.0, 1e-5) == pytest.approx(4.045, abs=0.001)
    assert poisson_noise_multiplier(1.0, 1e-5, 512 / 80_000, 1500) == pytest.approx(
        1.27, abs=0.005
    )
    assert poisson_noise_multiplier(1.0, 1e-5, 1024 / 1e6, 3000) == pytest.approx(
        0.87, abs=0.005
    )


def test_equals_the_calibration_of_dp_accounting():
    def make_event(noise_multiplier):
        return dp_accounting.SelfComposedDpEvent(poisson(0.01, noise_multiplier), 300)

    expected = dp_accounting.calibrate_dp_mechanism(
        rdp.RdpAccountant,
        make_event,
        2.0,
        1e-5,
        dp_accounting.ExplicitBracketInterval(0.3, 10.0),
    )
    found = noise_multiplier_for(2.0, 1e-5, make_event, ZERO_OUT)
    assert expected * (1 - 1e-6) <= found <= expected * (1 + 2e-4)


@pytest.mark.parametrize("delta", [1e-10, 1e-5, 0.4])
@pytest.mark.parametrize("target", [1e-6, 0.01, 1.0, 10.0, 1000.0, 1e12])
def test_gaussian_is_never_over_and_barely_under(target, delta):
    found = gaussian_noise_multiplier(target, delta)
    assert epsilon(GAUSSIAN(found), delta) <= target
    assert epsilon(GAUSSIAN(found * (1 - 2e-4)), delta) > target


@pytest.mark.parametrize(
    "target,q,steps",
    [
        (1e-3, 0.01, 1),
        (0.5, 1e-6, 10**6),
        (1.0, 0.9, 3),
        (1.0, 1.0, 1),
        (10.0, 0.0064, 1),
        (1e6, 0.01, 100),
    ],
)
def test_poisson_is_never_over_and_barely_under(target, q, steps):
    found = poisson_noise_multiplier(target, 1e-5, q, steps)
    assert epsilon(poisson(q, found), 1e-5, count=steps) <= target
    assert epsilon(poisson(q, found * (1 - 2e-4)), 1e-5, count=steps) > target


def test_sampling_everything_once_is_one_gaussian():
    assert poisson_noise_multiplier(1.0, 1e-5, 1.0, 1) == gaussian_noise_multiplier(
        1.0, 1e-5
    )


def test_multipliers_are_short_decimals():
    found = gaussian_noise_multiplier(1.0, 1e-5)
    assert found == float(f"{found:.5g}")


@pytest.mark.parametrize("relation", list(Relation))
def test_multiplier_is_relative_to_the_relation(relation):
    assert gaussian_noise_multiplier(
        1.0, 1e-5, relation=relation
    ) == gaussian_noise_multiplier(1.0, 1e-5)


def test_releases_compose():
    one = gaussian_noise_multiplier(1.0, 1e-5)
    hundred = gaussian_noise_multiplier(1.0, 1e-5, releases=100)
    assert hundred == pytest.approx(10 * one, rel=2e-4)


def test_pld_needs_less_noise_for_the_same_target():
    found = gaussian_noise_multiplier(1.0, 1e-5, accountant="pld")
    assert found == pytest.approx(3.7307, rel=1e-3)
    assert epsilon(GAUSSIAN(found), 1e-5, "pld") <= 1.0
    assert epsilon(GAUSSIAN(found * (1 - 2e-4)), 1e-5, "pld") > 1.0


@pytest.mark.slow
def test_pld_of_a_sampled_pool():
    found = poisson_noise_multiplier(1.0, 1e-5, 512 / 80_000, 1500, accountant="pld")
    assert found < 1.2
    event = poisson(512 / 80_000, found)
    assert epsilon(event, 1e-5, "pld", count=1500) <= 1.0


@pytest.mark.parametrize("target,delta", [(1e-4, 1e-5), (300.0, 1e-5), (1.0, 1e-13)])
def test_pld_edges_do_not_crash(target, delta):
    found = gaussian_noise_multiplier(target, delta, accountant="pld")
    assert epsilon(GAUSSIAN(found), delta, "pld") <= target
    assert found <= gaussian_noise_multiplier(target, delta)


def test_fixed_costs_are_counted():
    def make_event(noise_multiplier):
        return dp_accounting.ComposedDpEvent(
            [PureDpEvent(0.5), GAUSSIAN(noise_multiplier)]
        )

    found = noise_multiplier_for(1.0, 1e-5, make_event, Relation.REPLACE_ONE)
    assert found > gaussian_noise_multiplier(1.0, 1e-5)
    at_found = epsilon(make_event(found), 1e-5, relation=Relation.REPLACE_ONE)
    assert at_found <= 1.0


def test_rounding_to_a_value_that_is_just_too_little_moves_on():
    for thousandths in range(4001, 8000, 7):
        step = thousandths / 1000 * (1 + 1e-12)
        found = _smallest(lambda x, step=step: -1.0 if x > step else 1.0, (4.0, 8.0))
        assert step < found <= step * (1 + 1.1e-4)


@pytest.mark.parametrize("fixed", [dp_accounting.NonPrivateDpEvent(), PureDpEvent(2.0)])
def test_a_target_that_no_noise_reaches_is_refused(fixed):
    def make_event(noise_multiplier):
        return dp_accounting.ComposedDpEvent([fixed, GAUSSIAN(noise_multiplier)])

    with pytest.raises(ValueError, match="No noise multiplier reaches the target"):
        noise_multiplier_for(1.0, 1e-5, make_event, ZERO_OUT)


def test_poisson_under_replace_one_is_refused():
    with pytest.raises(ValueError, match="under REPLACE_ONE"):
        poisson_noise_multiplier(1.0, 1e-5, 0.1, 10, relation=Relation.REPLACE_ONE)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf, None])
def test_target_out_of_range(target):
    with pytest.raises(ValueError, match="`target_epsilon`"):
        gaussian_noise_multiplier(target, 1e-5)


@pytest.mark.parametrize(
    "arguments,match",
    [
        ((1.0, 0.0, 0.1, 10), "`delta`"),
        ((1.0, 1.0, 0.1, 10), "`delta`"),
        ((1.0, 1e-5, 0.0, 10), "`sampling_probability`"),
        ((1.0, 1e-5, 1.1, 10), "`sampling_probability`"),
        ((1.0, 1e-5, 0.1, 0), "`steps`"),
        ((1.0, 1e-5, 0.1, 1.5), "`steps`"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ValueError, match=match):
        poisson_noise_multiplier(*arguments)
