import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.generators import (
    ConvGenerator,
    MLPGenerator,
    SmoothNoise,
    pretrain,
)

SEED = tf.constant([1, 2])


def _conv(**kwargs):
    return ConvGenerator((12, 12, 1), latent_dim=6, filters=(16, 8, 8), **kwargs)


def _mlp(**kwargs):
    return MLPGenerator((12, 12, 1), latent_dim=6, units=(64,), **kwargs)


BUILDS = [_conv, _mlp]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_samples_have_the_stated_shape_range_and_seed(build, num_classes):
    generator = build(num_classes=num_classes, output_range=(-1.0, 1.0))
    images = generator.sample(5, SEED).numpy()
    assert images.shape == (5, 12, 12, 1)
    assert images.min() >= -1.0
    assert images.max() <= 1.0
    graph = tf.function(generator.sample)(tf.constant(5), SEED)
    np.testing.assert_allclose(images, graph, atol=1e-5)
    other = generator.sample(5, tf.constant([2, 1]))
    assert np.abs(images - other).max() > 1e-3
    assert generator.trainable_variables


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (30, 27, 2)])
def test_conv_generator_fits_any_image(shape):
    assert ConvGenerator(shape).sample(2, SEED).shape == (2, *shape)


def test_mlp_generator_makes_vectors():
    assert MLPGenerator((7,)).sample(2, SEED).shape == (2, 7)


@pytest.mark.parametrize("build", BUILDS)
def test_an_image_depends_on_its_own_latent_alone(build):
    generator = build()
    latents, labels = generator.draw_inputs(6, SEED)
    assert labels is None
    together = generator(latents, training=True)
    np.testing.assert_allclose(
        together[2:3], generator(latents[2:3], training=True), atol=1e-5
    )


@pytest.mark.parametrize("build", BUILDS)
def test_labels_condition_the_image(build):
    generator = build(num_classes=3)
    latents, labels = generator.draw_inputs(600, SEED)
    assert 150 < np.bincount(labels, minlength=3).min()
    first = generator(latents[:1], tf.constant([0]))
    second = generator(latents[:1], tf.constant([1]))
    assert np.abs(first - second).max() > 1e-4
    with pytest.raises(ValueError, match="`labels`"):
        generator(latents)
    with pytest.raises(ValueError, match="`labels`"):
        build()(latents[:2], tf.constant([0, 1]))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("num_classes", [None, 3])
def test_a_saved_generator_samples_as_before(build, num_classes, tmp_path):
    generator = build(num_classes=num_classes)
    generator.save(tmp_path / "generator.keras")
    restored = keras.models.load_model(tmp_path / "generator.keras")
    assert restored.get_config() == generator.get_config()
    np.testing.assert_allclose(
        restored.sample(3, SEED), generator.sample(3, SEED), atol=1e-6
    )


@pytest.mark.parametrize("build", BUILDS)
def test_gradients_reach_every_weight(build):
    generator = build(num_classes=3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(generator.sample(8, SEED)))
    gradients = tape.gradient(loss, generator.trainable_variables)
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("build", BUILDS)
def test_pretraining_moves_samples_towards_the_source(build):
    keras.utils.set_random_seed(0)
    generator = build(output_range=(-1.0, 1.0))
    source = SmoothNoise((12, 12, 1), output_range=(-1.0, 1.0), window=1.0)

    def distance():
        samples, images = generator.sample(256, SEED), source.sample(256, SEED)
        difference = np.mean(samples, axis=0) - np.mean(images, axis=0)
        return np.abs(difference).mean()

    before = distance()
    losses = pretrain(generator, source, steps=250, batch_size=32, learning_rate=4e-3)
    assert losses.shape == (250,)
    assert losses[-20:].mean() < losses[:20].mean()
    assert distance() < 0.3 * before
    spread = np.std(generator.sample(64, SEED), axis=0).mean()
    assert spread > 0.25 * np.std(source.sample(64, SEED), axis=0).mean()


def test_pretraining_repeats_with_its_seed():
    def run(seed):
        keras.utils.set_random_seed(0)
        generator = MLPGenerator((6,), latent_dim=2, units=(8,))
        return pretrain(generator, _Vectors(), steps=5, batch_size=8, seed=seed)

    first = run(1)
    np.testing.assert_allclose(first, run(1), rtol=1e-5)
    assert np.abs(first - run(2)).max() > 1e-3


class _Vectors:
    image_shape = (6,)
    output_range = (0.0, 1.0)

    def sample(self, n, seed):
        return tf.random.stateless_uniform([n, 6], seed)


def test_pretraining_refuses_a_source_that_does_not_fit():
    with pytest.raises(ValueError, match="`source`.*image_shape"):
        pretrain(_conv(), SmoothNoise((28, 28, 1)))
    with pytest.raises(ValueError, match="`source`.*output_range"):
        pretrain(_conv(output_range=(-1.0, 1.0)), SmoothNoise((12, 12, 1)))
    with pytest.raises(ValueError, match="`steps`"):
        pretrain(_conv(), SmoothNoise((12, 12, 1)), steps=0)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: ConvGenerator((28, 28)), "image_shape"),
        (lambda: ConvGenerator((28, 28, 1), latent_dim=0), "latent_dim"),
        (lambda: MLPGenerator((28, 28, 1), num_classes=0), "num_classes"),
        (lambda: MLPGenerator((4,), output_range=(1.0, 0.0)), "output_range"),
        (lambda: MLPGenerator((4,), units=(0,)), "units"),
    ],
)
def test_bad_arguments_are_named(build, argument):
    with pytest.raises(ValueError, match=f"Invalid value for argument `{argument}`"):
        build()
