import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.losses import cross_entropy, kl_divergence

RNG = np.random.default_rng(0)
LOGITS = tf.constant(RNG.normal(size=(6, 4)), tf.float32)
SOFT = tf.nn.softmax(tf.constant(RNG.normal(size=(6, 4)), tf.float32))


def test_losses_are_one_per_example_and_match_keras():
    expected = keras.losses.CategoricalCrossentropy(from_logits=True, reduction=None)
    np.testing.assert_allclose(
        cross_entropy(SOFT, LOGITS), expected(SOFT, LOGITS), rtol=1e-5
    )
    expected = keras.losses.KLDivergence(reduction=None)
    np.testing.assert_allclose(
        kl_divergence(SOFT, LOGITS),
        expected(SOFT, tf.nn.softmax(LOGITS)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_divergence_is_zero_only_for_agreement():
    same = kl_divergence(tf.nn.softmax(LOGITS), LOGITS)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
    assert np.all(kl_divergence(SOFT, LOGITS).numpy() > 1e-3)


def test_one_hot_answers_stay_finite():
    answers = tf.one_hot([0, 1, 2, 3, 0, 1], 4)
    np.testing.assert_allclose(
        kl_divergence(answers, LOGITS), cross_entropy(answers, LOGITS), rtol=1e-6
    )
    far = kl_divergence(tf.one_hot([0], 2), tf.constant([[-1e4, 1e4]]))
    np.testing.assert_allclose(far, [2e4])


def test_gradient_at_the_logits_is_the_difference_of_probabilities():
    for loss in (cross_entropy, kl_divergence):
        with tf.GradientTape() as tape:
            tape.watch(LOGITS)
            total = tf.reduce_sum(loss(SOFT, LOGITS))
        gradient = tape.gradient(total, LOGITS)
        np.testing.assert_allclose(gradient, tf.nn.softmax(LOGITS) - SOFT, atol=1e-6)


def test_low_precision_logits_give_float32_losses():
    losses = cross_entropy(SOFT, tf.cast(LOGITS, tf.bfloat16))
    assert losses.dtype == tf.float32
