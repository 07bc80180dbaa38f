import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.losses import (
    BatchNormStatistics,
    GeneratorObjective,
    activation,
    adversarial,
    information_entropy,
    one_hot,
    student_disagreement,
)

SURE = 50.0 * tf.one_hot([0, 1, 2, 3], 4)
UNSURE = tf.zeros([4, 4])
COLLAPSED = 50.0 * tf.one_hot([1, 1, 1, 1], 4)


def test_one_hot_rewards_being_sure():
    np.testing.assert_allclose(one_hot(UNSURE), np.log(4.0), rtol=1e-6)
    assert float(one_hot(SURE)) < 1e-6


def test_information_entropy_rewards_balanced_classes():
    np.testing.assert_allclose(information_entropy(SURE), -np.log(4.0), rtol=1e-5)
    np.testing.assert_allclose(information_entropy(COLLAPSED), 0.0, atol=1e-6)


def test_activation_rewards_large_features_of_either_sign():
    assert float(activation(tf.constant([[1.0, -3.0]]))) == -2.0


def test_adversarial_rewards_a_student_that_is_wrong():
    right, wrong = tf.one_hot([0, 1, 2, 3], 4), tf.one_hot([1, 2, 3, 0], 4)
    np.testing.assert_allclose(adversarial(SURE, right), 0.0, atol=1e-6)
    np.testing.assert_allclose(adversarial(SURE, wrong), -2.0, rtol=1e-6)


def test_adversarial_sends_no_gradient_into_the_answers():
    answers, logits = tf.one_hot([1, 2, 3, 0], 4), tf.ones([4, 4]) * [0.0, 1, 2, 3]
    with tf.GradientTape() as tape:
        tape.watch([answers, logits])
        loss = adversarial(logits, answers)
    to_answers, to_logits = tape.gradient(loss, [answers, logits])
    assert to_answers is None
    assert float(tf.norm(to_logits)) > 0


def test_students_disagree_by_their_standard_deviation():
    first = tf.math.log(tf.constant([[0.7, 0.2, 0.1]]))
    second = tf.math.log(tf.constant([[0.1, 0.4, 0.5]]))
    probabilities = np.array([[0.7, 0.2, 0.1], [0.1, 0.4, 0.5]])
    expected = -probabilities.std(axis=0).sum()
    np.testing.assert_allclose(student_disagreement(first, second), expected, rtol=1e-5)
    np.testing.assert_allclose(student_disagreement(first, first), 0.0, atol=1e-7)


def _nested_teacher():
    layers = keras.layers
    block = keras.Sequential(
        [layers.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization()]
    )
    inputs = keras.Input((8, 8, 3))
    hidden = block(layers.BatchNormalization(scale=False)(inputs))
    return keras.Model(inputs, layers.Dense(5)(layers.Flatten()(hidden)))


def _by_hand(model, images):
    """The distances from the definition, layer by layer."""
    outer, block = model.layers[1], model.layers[2]
    first = images
    second = block.layers[0](outer(first, training=False))
    total = 0.0
    for layer, inputs in ((outer, first), (block.layers[1], second)):
        mean = np.mean(inputs, axis=(0, 1, 2))
        variance = np.var(inputs, axis=(0, 1, 2))
        total += np.linalg.norm(mean - layer.moving_mean.numpy())
        total += np.linalg.norm(variance - layer.moving_variance.numpy())
    return total


def test_batch_norm_statistics_match_the_definition_in_nested_models():
    keras.utils.set_random_seed(0)
    model = _nested_teacher()
    images = tf.random.stateless_uniform((16, 8, 8, 3), (0, 1))
    model(images, training=True)  # so that the statistics are those of data
    weights = model.get_weights()
    statistics = BatchNormStatistics(model)
    for _ in range(2):  # a second call must not add to the first
        np.testing.assert_allclose(
            statistics(images), _by_hand(model, images), rtol=1e-4
        )
    with tf.GradientTape() as tape:
        tape.watch(images)
        loss = statistics(images)
    assert float(tf.norm(tape.gradient(loss, images))) > 0
    np.testing.assert_allclose(tf.function(statistics)(images), loss, rtol=1e-5)
    for old, new in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_batch_norm_statistics_fall_on_the_data_the_teacher_knows():
    layers = keras.layers
    model = keras.Sequential(
        [layers.Input((4,)), layers.BatchNormalization(momentum=0.0), layers.Dense(2)]
    )
    known = 3.0 + 2.0 * tf.random.stateless_normal((512, 4), (0, 0))
    model(known, training=True)
    statistics = BatchNormStatistics(model)
    assert float(statistics(known)) < 1e-2 < float(statistics(known + 1.0))


def test_batch_norm_statistics_need_batch_norm():
    plain = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="BatchNormalization"):
        BatchNormStatistics(plain)

    class Subclassed(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="Functional or Sequential"):
        BatchNormStatistics(Subclassed())


def test_objective_is_the_weighted_sum():
    objective = GeneratorObjective(
        one_hot=2.0,
        information_entropy=3.0,
        activation=0.5,
        adversarial=0.25,
        student_disagreement=4.0,
        batch_norm_statistics=10.0,
    )
    logits = tf.random.stateless_normal((6, 4), (0, 0))
    second = tf.random.stateless_normal((6, 4), (0, 1))
    features, released = tf.ones([6, 3]), tf.one_hot([0, 1, 2, 3, 0, 1], 4)
    total = objective(
        logits,
        second_logits=second,
        features=features,
        released=released,
        statistics=tf.constant(0.3),
    )
    expected = (
        2.0 * one_hot(logits)
        + 3.0 * information_entropy(tf.concat([logits, second], 0))
        + 0.5 * activation(features)
        + 0.25 * adversarial(logits, released)
        + 4.0 * student_disagreement(logits, second)
        + 3.0
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("term", "argument"),
    [
        ("activation", "features"),
        ("adversarial", "released"),
        ("student_disagreement", "second_logits"),
        ("batch_norm_statistics", "statistics"),
    ],
)
def test_objective_asks_for_what_a_term_needs(term, argument):
    objective = GeneratorObjective(**{term: 1.0})
    with pytest.raises(ValueError, match=f"`{argument}`.*`{term}` has a weight"):
        objective(UNSURE)


def test_objective_is_frozen_and_checks_its_weights():
    objective = GeneratorObjective()
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.one_hot = 2.0
    with pytest.raises(ValueError, match="`adversarial`"):
        GeneratorObjective(adversarial=-1.0)
    with pytest.raises(ValueError, match="`one_hot`"):
        GeneratorObjective(one_hot=float("nan"))
    assert not objective.reads_teacher
    assert GeneratorObjective(batch_norm_statistics=1.0).reads_teacher
