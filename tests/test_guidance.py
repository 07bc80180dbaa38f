"""Training a generator against the teacher."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators import MLPGenerator
from dp_transcribe.guidance import pretrain_by_teacher
from dp_transcribe.losses import GeneratorObjective
from dp_transcribe.students import last_features
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


def test_guided_images_excite_the_features():
    teacher = _teacher(batch_norm=False)
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    excite = GeneratorObjective(one_hot=0.0, information_entropy=0.0, activation=1.0)
    losses = pretrain_by_teacher(
        generator, teacher, objective=excite, steps=60, batch_size=32
    )
    features = last_features(teacher.model)
    images = generator.sample(256, tf.constant([1, 2]))
    seen, logits = features(images)
    assert seen.shape == (256, 6 * 6 * 4)
    np.testing.assert_allclose(logits, teacher.model(images), rtol=1e-5)
    assert -np.abs(seen).mean() == pytest.approx(losses[-10:].mean(), rel=0.1)
    assert losses[-1] < losses[0]


def test_features_of_a_function_cannot_be_looked_at():
    teacher = Teacher(lambda x: x[:, :3, 0, 0], input_shape=(8, 8, 1))
    excite = GeneratorObjective(activation=1.0)
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    with pytest.raises(ValueError, match="`activation`"):
        pretrain_by_teacher(generator, teacher, objective=excite)


def test_bad_numbers_are_refused():
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    with pytest.raises(ValueError, match="steps"):
        pretrain_by_teacher(generator, _teacher(batch_norm=False), steps=0)


def _classes(images):
    return tf.one_hot(tf.argmax(tf.reshape(images, (-1, 64))[:, :3], -1), 3)


def _numpy(images):
    return np.asarray(images).reshape(-1, 64)[:, :3]


@pytest.mark.parametrize(
    ("forward", "message"), [(_classes, "gradient.*`dpsd`"), (_numpy, "numpy_function")]
)
def test_a_teacher_without_a_gradient_guides_nothing(forward, message):
    teacher = Teacher(forward, input_shape=(8, 8, 1), outputs="logits")
    generator = MLPGenerator((8, 8, 1), latent_dim=4, units=(16,))
    with pytest.raises(ValueError, match=f"`teacher`.*{message}"):
        pretrain_by_teacher(generator, teacher, steps=1)
    assert not generator.guided_by_teacher
