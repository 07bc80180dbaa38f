"""Every draw is secret, fresh and of the stated distribution."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from dp_transcribe.mechanisms.noise import (
    ANSWERS,
    NOISE,
    QUERIES,
    SAMPLING,
    NoiseSource,
)

PURPOSES = (NOISE, ANSWERS, SAMPLING, QUERIES)


def streams(source, numbers=20, parts=20):
    combinations = itertools.product(range(numbers), PURPOSES, range(parts))
    return [
        tuple(source.stream(tf.constant(n, tf.int64), purpose, part=part).numpy())
        for n, purpose, part in combinations
    ]


def test_no_two_numbers_purposes_or_parts_share_a_stream():
    found = streams(NoiseSource(3))
    assert len(set(found)) == len(found) == 20 * 4 * 20


@pytest.mark.parametrize("purpose", PURPOSES)
def test_streams_of_different_purposes_are_uncorrelated(purpose):
    source, number = NoiseSource(3), tf.constant(7, tf.int64)
    drawn = {
        other: tf.random.stateless_normal([4000], source.stream(number, other)).numpy()
        for other in PURPOSES
    }
    for other in set(PURPOSES) - {purpose}:
        assert not np.isin(drawn[purpose], drawn[other]).mean() > 0.01
        assert abs(np.corrcoef(drawn[purpose], drawn[other])[0, 1]) < 0.08


def test_without_a_seed_every_source_has_a_key_of_its_own():
    keys = {tuple(NoiseSource().key.numpy()) for _ in range(20)}
    assert len(keys) == 20
    words = np.array(sorted(keys)).ravel()
    assert np.all(words >= 0) and np.median(np.log2(words)) > 60


def test_keras_global_seed_does_not_decide_the_secret_key():
    keys = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        keys.append(tuple(NoiseSource().key.numpy()))
    assert keys[0] != keys[1]


def test_a_seed_repeats_the_key_and_different_seeds_do_not():
    assert np.array_equal(NoiseSource(4).key.numpy(), NoiseSource(4).key.numpy())
    assert not np.array_equal(NoiseSource(4).key.numpy(), NoiseSource(5).key.numpy())


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_a_seed_that_is_no_seed_is_refused(seed):
    with pytest.raises(ValueError, match="`seed`"):
        NoiseSource(seed)


def test_advance_counts_inside_a_function_and_never_repeats():
    source = NoiseSource(0)

    @tf.function
    def two():
        return source.advance(), source.advance()

    taken = [int(n) for _ in range(5) for n in two()]
    assert taken == list(range(10))
    assert int(source.counter.numpy()) == 10


def test_noise_is_standard_normal_over_all_tensors_together():
    source = NoiseSource(11)
    shapes = [(40, 50), (), (3, 4, 5), (1000,)]
    parts = source.normal_like([tf.zeros(s) for s in shapes], number=source.advance())
    assert [tuple(p.shape) for p in parts] == shapes
    assert all(p.dtype == tf.float32 for p in parts)
    flat = np.concatenate([np.ravel(p) for p in parts])
    assert len(np.unique(flat)) > 0.999 * len(flat)
    assert stats.kstest(flat, "norm").pvalue > 1e-3
    assert stats.kstest(flat * 2 / 3, "norm").pvalue < 1e-6
    assert stats.kstest(flat * 3 / 2, "norm").pvalue < 1e-6


def test_tails_are_those_of_a_gaussian():
    source = NoiseSource(3)
    (drawn,) = source.normal_like([tf.zeros([2_000_001])], number=source.advance())
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * 2_000_001
        outside = int(np.sum(np.abs(drawn) > bound))
        assert stats.poisson.sf(outside - 1, expected) > 1e-4
        assert stats.poisson.cdf(outside, expected) > 1e-4
    assert np.all(np.isfinite(drawn))


def test_no_number_of_a_draw_tells_of_another():
    # Pairs share a radius and an angle; no function of one may show in the other.
    source = NoiseSource(4)
    (drawn,) = source.normal_like([tf.zeros([400_000])], number=source.advance())
    first, second = np.split(drawn.numpy(), 2)
    for function in (np.abs, np.square, np.sign):
        for shift in (0, 1):
            other = np.roll(function(second), shift)
            assert abs(np.corrcoef(function(first), other)[0, 1]) < 4.5 / 200_000**0.5


def test_noise_is_float32_for_bfloat16_gradients():
    source = NoiseSource(11)
    (noise,) = source.normal_like([tf.zeros([9], tf.bfloat16)], number=source.advance())
    assert noise.dtype == tf.float32


def test_consecutive_draws_are_independent():
    source = NoiseSource(2)
    like = [tf.zeros([5000])]
    first, second, third = (
        source.normal_like(like, number=source.advance())[0].numpy() for _ in range(3)
    )
    for a, b in [(first, second), (second, third), (first, third)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.07
    assert stats.kstest((first - second) / np.sqrt(2), "norm").pvalue > 1e-3


def test_key_and_counter_are_saved_and_no_number_comes_twice(tmp_path):
    source = keras.Sequential([keras.layers.Input((1,)), NoiseSource(), Pass()])
    noise = source.layers[0]
    for _ in range(3):
        noise.advance()
    source.save_weights(tmp_path / "a.weights.h5")
    other = keras.Sequential([keras.layers.Input((1,)), NoiseSource(), Pass()])
    other.load_weights(tmp_path / "a.weights.h5")
    assert np.array_equal(other.layers[0].key.numpy(), noise.key.numpy())
    assert int(other.layers[0].advance()) == 3


class Pass(keras.layers.Layer):
    """Does nothing, so that a model has an output."""

    def call(self, inputs):
        return inputs


def test_config_has_the_seed_and_not_the_key():
    config = NoiseSource(9).get_config()
    assert config["seed"] == 9
    assert "key" not in config
    copy = NoiseSource.from_config(config)
    assert np.array_equal(copy.key.numpy(), NoiseSource(9).key.numpy())


def test_tails_reach_beyond_seven_deviations(monkeypatch):
    def smallest(shape, *_):
        return tf.zeros(shape, tf.int32)

    monkeypatch.setattr(tf.random, "stateless_uniform", smallest)
    drawn = NoiseSource(0).normal_like([tf.zeros([2])], number=tf.constant(0, tf.int64))
    assert 7.0 < np.abs(drawn[0]).max() < 8.0
