"""How queries are drawn decides what they cost; both are tested together."""

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms import NormalizedGradient
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.units import Unit
from dp_transcribe.queries import (
    CHUNK,
    SHOWN_EVERY,
    FreshQueries,
    PoolStore,
    QueryPool,
    Replay,
    dequantize,
    quantize,
)
from tests import tiny

MECHANISM = NormalizedGradient(noise_multiplier=1.5)
POOL = QueryPool(size=2000, batch_size=100, updates=60)


def epsilon_of(event, count=1):
    """Straight from dp_accounting; zero-out is accounted as add or remove."""
    accountant = dp_accounting.rdp.RdpAccountant()
    return accountant.compose(event, count).get_epsilon(tiny.DELTA)


def ledger_epsilon(ledger):
    return ledger.epsilon(unit=Unit.RESPONSE, delta=tiny.DELTA)


# What it costs.


def test_fresh_queries_cost_one_release_whatever_their_number():
    ledger = Ledger()
    for number in range(50):
        ledger.record(FreshQueries(batch_size=8).spend(MECHANISM, number), 7)
    expected = epsilon_of(dp_accounting.GaussianDpEvent(1.5))
    assert ledger_epsilon(ledger) == pytest.approx(expected, rel=1e-6)
    assert FreshQueries().schedule(MECHANISM.event()) == MECHANISM.event()


def test_a_pool_costs_its_poisson_sampled_releases():
    ledger = Ledger()
    ledger.record(POOL.spend(MECHANISM, 1), 60)
    sampled = dp_accounting.PoissonSampledDpEvent(
        0.05, dp_accounting.GaussianDpEvent(1.5)
    )
    assert ledger_epsilon(ledger) == pytest.approx(epsilon_of(sampled, 60), rel=1e-3)
    assert POOL.schedule(MECHANISM.event()).event == sampled
    assert POOL.schedule(MECHANISM.event()).count == 60


def test_three_pools_cost_as_one_and_one_pool_used_thrice_costs_more():
    one, three, again = Ledger(), Ledger(), Ledger()
    one.record(POOL.spend(MECHANISM, 1), 60)
    for number in (1, 2, 3):
        three.record(POOL.spend(MECHANISM, number), 60)
        again.record(POOL.spend(MECHANISM, 1), 60)
    assert ledger_epsilon(one) == ledger_epsilon(three)
    assert ledger_epsilon(again) > 1.3 * ledger_epsilon(one)


def test_a_pool_and_fresh_queries_hold_different_answers():
    ledger = Ledger()
    ledger.record(POOL.spend(MECHANISM, 1), 60)
    pool_alone = ledger_epsilon(ledger)
    ledger.record(FreshQueries().spend(MECHANISM, 0), 1)
    fresh = epsilon_of(dp_accounting.GaussianDpEvent(1.5))
    assert ledger_epsilon(ledger) == pytest.approx(max(pool_alone, fresh), rel=1e-6)


@pytest.mark.parametrize("queries", [FreshQueries(), POOL], ids=["fresh", "pool"])
def test_without_noise_the_cost_is_infinite(queries):
    ledger = Ledger()
    ledger.record(queries.spend(NormalizedGradient(noise_multiplier=0.0), 1))
    assert ledger_epsilon(ledger) == np.inf


@pytest.mark.parametrize("queries", [FreshQueries(), POOL], ids=["fresh", "pool"])
@pytest.mark.parametrize("target", [0.3, 1.0, 10.0])
def test_calibration_for_the_schedule_keeps_the_target(queries, target):
    mechanism = NormalizedGradient().calibrated(target, tiny.DELTA, queries.schedule)
    ledger = Ledger()
    for pool in (1, 2):
        ledger.record(queries.spend(mechanism, pool), getattr(queries, "updates", 1))
    assert 0.99 * target < ledger_epsilon(ledger) <= target


def test_statement_names_the_sampling():
    assert "Poisson" in POOL.assumption() and "0.05" in POOL.assumption()
    assert "fresh" in FreshQueries().assumption()
    assert "Poisson" not in FreshQueries().assumption()


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_that_are_no_counts_are_refused(value):
    with pytest.raises(ValueError, match="`batch_size`"):
        FreshQueries(batch_size=value)
    for name in ("size", "batch_size", "updates"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            QueryPool(**{name: value})


def test_a_batch_larger_than_the_pool_is_refused():
    with pytest.raises(ValueError, match="`batch_size`"):
        QueryPool(size=10, batch_size=11)


def test_a_pool_that_would_be_mostly_unused_is_refused():
    QueryPool(size=200, batch_size=10, updates=20)
    with pytest.raises(ValueError, match="mislead"):
        QueryPool(size=201, batch_size=10, updates=20)


# How it is drawn.


def filled_store(size, **kwargs):
    """A pool whose query i has the code i (modulo 256) and the answer i."""
    store = PoolStore(size, (1,), 2)

    def make(count, chunk):
        index = tf.cast(chunk, tf.int32) * CHUNK + tf.range(count)
        codes = tf.cast(index % 256, tf.uint8)[:, None]
        answers = tf.cast(tf.stack([index, -index], -1), tf.float32)
        return codes, answers, None

    tf.function(lambda: store.fill(make, **kwargs))()
    return store


def members(sample):
    """Which members were taken; checks that the last row alone is masked."""
    _, answers, mask = (part.numpy() for part in sample)
    assert mask[-1] == 0 and np.all(mask[:-1] == 1)
    return answers[:-1, 0].astype(int)


def test_every_part_of_the_pool_is_filled_and_keeps_queries_with_answers():
    store = filled_store(2 * CHUNK + 123)
    answers = store.answers.numpy()
    assert np.array_equal(answers[:, 0], np.arange(2 * CHUNK + 123))
    assert np.array_equal(store.codes.numpy()[:, 0], np.arange(2 * CHUNK + 123) % 256)
    codes, answers, _ = store.sample(0.5, tf.constant([1, 2], tf.int64))
    assert np.array_equal(codes.numpy()[:, 0], answers.numpy()[:, 0] % 256)


def test_a_pool_of_features_keeps_them_in_place_of_the_images():
    store = PoolStore(5, (28, 28, 1), 2, feature_shape=(3,))
    codes, features = tf.zeros([5, 28, 28, 1], tf.uint8), tf.random.normal([5, 3])
    tf.function(lambda: store.fill(lambda *_: (codes, tf.zeros([5, 2]), features)))()
    kept, _, _ = store.sample(1.0, tf.constant([1, 2], tf.int64))
    assert store.codes is None
    np.testing.assert_allclose(kept[:-1], features, rtol=2e-3)


def test_filling_a_large_pool_says_how_far_it_is(capfd):
    filled_store(SHOWN_EVERY * CHUNK, show=True)
    shown = capfd.readouterr()
    assert f"{SHOWN_EVERY * CHUNK} of {SHOWN_EVERY * CHUNK}" in shown.err + shown.out
    filled_store(SHOWN_EVERY * CHUNK)
    assert "Queries" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def inclusions():
    """Which of 400 members each of 1,500 updates took, `[updates, members]`."""
    store = filled_store(400)
    draw = tf.function(lambda seed: store.sample(0.1, seed)[1])
    rows = np.zeros((1500, 400), bool)
    for update in range(1500):
        taken = draw(tf.constant([5, update], tf.int64)).numpy()[:-1, 0]
        rows[update, taken.astype(int)] = True
    return rows


def test_sample_sizes_are_binomial(inclusions):
    sizes = inclusions.sum(1)
    edges = stats.binom.ppf(np.linspace(0, 1, 13)[1:-1], 400, 0.1)
    cells = np.searchsorted(edges, sizes, side="left")
    cumulative = np.append(stats.binom.cdf(edges, 400, 0.1), 1.0)
    expected = 1500 * np.diff(np.insert(cumulative, 0, 0.0))
    counts = np.bincount(cells, minlength=len(expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3
    # A batch of fixed size, or a shuffled one, would have no spread at all.
    assert 0.9 < sizes.var() / (400 * 0.1 * 0.9) < 1.1


def test_every_member_is_taken_with_the_stated_probability(inclusions):
    counts = inclusions.sum(0)
    scores = (counts - 150) / np.sqrt(1500 * 0.1 * 0.9)
    assert stats.kstest(scores, "norm").pvalue > 1e-3
    assert np.abs(scores).max() < 5


def test_members_are_taken_independently_of_each_other_and_of_the_last_time(
    inclusions,
):
    centred = (inclusions - 0.1) / np.sqrt(0.09)
    between = centred.T @ centred / 1500
    off_diagonal = between[np.triu_indices(400, 1)]
    assert abs(off_diagonal.mean()) < 0.002
    assert 0.95 < off_diagonal.std() * np.sqrt(1500) < 1.05
    in_time = (centred[1:] * centred[:-1]).mean(0)
    assert 0.9 < in_time.std() * np.sqrt(1499) < 1.1


def test_nobody_is_taken_twice():
    store = filled_store(50)
    for update in range(20):
        taken = members(store.sample(0.7, tf.constant([1, update], tf.int64)))
        assert len(set(taken)) == len(taken)


def test_probability_one_takes_everybody_and_a_tiny_one_nobody():
    store, seed = filled_store(50), tf.constant([1, 2], tf.int64)
    assert members(store.sample(1.0, seed)).tolist() == list(range(50))
    nobody = store.sample(1e-12, seed)
    assert members(nobody).size == 0
    assert nobody[0].shape[0] == 1


# How it is kept.


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
def test_quantising_keeps_images_to_half_a_grey_value(bounds):
    low, high = bounds
    images = tf.random.stateless_uniform([500], [1, 2], low, high)
    codes = quantize(images, bounds)
    assert codes.dtype == tf.uint8
    back = dequantize(codes, bounds)
    assert float(tf.reduce_max(tf.abs(back - images))) <= (high - low) / 255 * 0.501
    assert np.array_equal(quantize(back, bounds), codes)
    assert low <= float(tf.reduce_min(back)) and float(tf.reduce_max(back)) <= high


def test_quantising_clips_what_lies_outside():
    assert quantize(tf.constant([-9.0, 9.0]), (0.0, 1.0)).numpy().tolist() == [0, 255]


def rows_of(*indices):
    codes = tf.constant(indices, tf.uint8)[:, None]
    released = tf.cast(codes, tf.float32)[:, None] * tf.constant([[[1.0], [10.0]]])
    return codes, released


def test_replay_draws_only_what_was_written_and_keeps_pairs_together():
    replay = Replay(100, (1,), 1)
    replay.add(*rows_of(3, 4, 5))
    codes, released = replay.sample(200, tf.constant([1, 2], tf.int64))
    assert set(codes.numpy().ravel()) == {3, 4, 5}
    assert np.array_equal(released[:, 0, 0], codes[:, 0])
    assert np.array_equal(released[:, 1, 0], codes.numpy()[:, 0] * 10.0)


def test_a_full_replay_overwrites_the_oldest():
    replay = Replay(4, (1,), 1)
    for start in (1, 4, 7):
        replay.add(*rows_of(start, start + 1, start + 2))
    codes, _ = replay.sample(200, tf.constant([1, 2], tf.int64))
    assert set(codes.numpy().ravel()) == {6, 7, 8, 9}


def test_replay_keeps_only_what_may_be_saved():
    replay = Replay(4, (1,), 3)
    replay.add(*rows_of(1))
    names = [tuple(v.shape) for v in replay.variables()]
    assert names == [(4, 1), (4, 2, 3), ()]
