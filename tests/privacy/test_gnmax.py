"""The data-dependent accounting of GNMax, and that it says what it is."""

import math

import numpy as np
import pytest
from scipy import stats

from dp_transcribe.privacy import gnmax

ORDERS = np.array([1.5, 2.0, 4.0, 8.0, 16.0, 32.0])
DELTA = 1e-5


def test_the_bound_on_the_error_is_above_the_error():
    counts, stddev = np.array([[60.0, 30.0, 10.0], [34.0, 33.0, 33.0]]), 20.0
    noise = np.random.default_rng(0).normal(0, stddev, (200_000, 1, 3))
    wrong = np.mean((counts + noise).argmax(-1) != 0, axis=0)
    bound = np.exp(gnmax.log_error_probability(counts, stddev))
    assert np.all(bound >= wrong - 0.005)
    two = gnmax.log_error_probability(np.array([[60.0, 40.0]]), stddev)
    exact = stats.norm.logsf(20.0 / (math.sqrt(2) * stddev))
    assert two[0] == pytest.approx(exact)


@pytest.mark.parametrize("log_q", [-1e-3, -1.0, -5.0, -30.0, -300.0])
@pytest.mark.parametrize("stddev", [5.0, 40.0])
def test_it_is_never_above_the_data_independent_divergence(log_q, stddev):
    divergences = gnmax.gnmax_rdp(log_q, stddev, ORDERS)
    assert np.all(divergences >= 0)
    assert np.all(divergences <= ORDERS / stddev**2 * (1 + 1e-12))


def test_agreement_costs_less_and_a_tie_costs_the_worst_case():
    agreeing, tie = np.array([[250.0, 0, 0]] * 100), np.array([[84.0, 83, 83]] * 100)
    cheap = gnmax.data_dependent_epsilon(agreeing, stddev=20.0, delta=DELTA)
    dear = gnmax.data_dependent_epsilon(tie, stddev=20.0, delta=DELTA)
    assert cheap.epsilon < 0.1 * cheap.epsilon_data_independent
    assert dear.epsilon == pytest.approx(dear.epsilon_data_independent)
    assert cheap.epsilon_data_independent == dear.epsilon_data_independent


def test_it_bounds_the_true_divergence_of_a_neighbour():
    """One teacher changes its vote between two classes: the exact divergence."""
    stddev, counts = 10.0, np.array([70.0, 30.0])
    scale = math.sqrt(2) * stddev
    likely = stats.norm.cdf((counts[0] - counts[1]) / scale)
    neighbour = stats.norm.cdf((counts[0] - counts[1] - 2.0) / scale)
    one = np.array([likely, 1 - likely])
    other = np.array([neighbour, 1 - neighbour])
    log_q = gnmax.log_error_probability(counts[None], stddev)[0]
    bounds = gnmax.gnmax_rdp(log_q, stddev, ORDERS)
    for order, bound in zip(ORDERS, bounds, strict=True):
        exact = np.log(np.sum(one**order * other ** (1 - order))) / (order - 1)
        assert 0 < exact <= bound * (1 + 1e-9)


def divergence(one, other, order):
    """Of log probabilities."""
    return np.logaddexp.reduce(order * one + (1 - order) * other) / (order - 1)


def labels(gap, stddev):
    """Log probabilities that the class ahead is released, and that the other is."""
    scaled = gap / (math.sqrt(2) * stddev)
    return np.array([stats.norm.logcdf(scaled), stats.norm.logsf(scaled)])


def test_it_bounds_these_records_from_a_neighbours_and_not_the_reverse():
    stddev, exceeded = 3.0, []
    for gap in range(30):
        here = labels(gap, stddev)
        log_q = gnmax.log_error_probability(np.array([[gap, 0.0]]), stddev)[0]
        bounds = gnmax.gnmax_rdp(log_q, stddev, ORDERS)
        for there in (labels(gap - 2, stddev), labels(gap + 2, stddev)):
            for order, bound in zip(ORDERS, bounds, strict=True):
                assert divergence(here, there, order) <= bound + 1e-12
                exceeded.append(divergence(there, here, order) > 1.1 * bound)
    assert any(exceeded)  # so its text may not promise more
    result = gnmax.data_dependent_epsilon(
        np.array([[30.0, 10.0]]), stddev=5.0, delta=DELTA
    )
    assert "not the reverse" in result.to_text()


def test_it_says_that_the_figure_depends_on_the_data():
    result = gnmax.data_dependent_epsilon(
        np.array([[30.0, 10.0]]), stddev=5.0, delta=DELTA
    )
    text = result.to_text()
    for words in ("depends on the data", "not private", "RECORD", "REPLACE_ONE"):
        assert words in text
    assert result.queries == 1


def test_no_query_costs_nothing():
    result = gnmax.data_dependent_epsilon(np.zeros((0, 3)), stddev=5.0, delta=DELTA)
    assert result.epsilon == result.epsilon_data_independent == 0.0


@pytest.mark.parametrize(
    "arguments",
    [
        {"stddev": 0.0},
        {"delta": 1.0},
        {"counts": np.ones(3)},
        {"counts": -np.ones((2, 3))},
    ],
    ids=["stddev", "delta", "shape", "negative"],
)
def test_bad_arguments_are_refused(arguments):
    good = {"counts": np.ones((2, 3)), "stddev": 5.0, "delta": DELTA}
    with pytest.raises(ValueError):
        gnmax.data_dependent_epsilon(**{**good, **arguments})
