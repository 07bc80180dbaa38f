"""Training a generator against the teacher."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators import MLPGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.losses import GeneratorObjective
from dp_transcribe.teachers import Teacher


def _teacher(*, batch_norm: bool) -> Teacher:
    keras.utils.set_random_seed(0)
    layers = [keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3)]
    if batch_norm:
        layers.append(keras.layers.BatchNormalization())
    layers += [keras.layers.ReLU(), keras.layers.Flatten(), keras.layers.Dense(3)]
    return Teacher(keras.Sequential(layers))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_guidance_lowers_the_objective_and_leaves_the_teacher_alone(batch_norm):
    teacher = _teacher(batch_norm=batch_norm)
    before = [np.copy(weight) for weight in teacher.get_weights()]
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    losses = pretrain_by_teacher(generator, teacher, steps=60, batch_size=32)
    assert losses.shape == (60,)
    assert losses[-10:].mean() < losses[:10].mean()
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_guided_images_spread_over_the_classes():
    teacher = _teacher(batch_norm=False)
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    balance = GeneratorObjective(one_hot=0.0, information_entropy=1.0)
    seed = tf.constant([1, 2])
    before = teacher.probabilities(generator.sample(256, seed)).numpy().mean(0)
    pretrain_by_teacher(generator, teacher, objective=balance, steps=100, batch_size=64)
    after = teacher.probabilities(generator.sample(256, seed)).numpy().mean(0)
    assert np.ptp(after) < np.ptp(before)


def test_bad_numbers_are_refused():
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    with pytest.raises(ValueError, match="steps"):
        pretrain_by_teacher(generator, _teacher(batch_norm=False), steps=0)
