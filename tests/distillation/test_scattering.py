"""The scattering transform equals kymatio's."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    Scattering,
    ScatteringKernel,
    embed_in_batches,
)

# Inputs and outputs of kymatio 0.3.0's NumPy front end: J=2, L=8 and J=3, L=4.
KYMATIO = Path(__file__).with_name("kymatio.npz")


@pytest.mark.parametrize(
    ("name", "scale", "orientations"), [("grey", 2, 8), ("colour", 3, 4)]
)
def test_equals_what_kymatio_computed(name, scale, orientations):
    with np.load(KYMATIO) as arrays:
        images, expected = arrays[name], arrays[f"{name}_out"]
    transform = Scattering(*images.shape[1:3], scale, orientations)
    outputs = transform(images).numpy()
    assert outputs.shape[1] == transform.channels * images.shape[3]
    np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(28, 28), (32, 32), (30, 41)])
@pytest.mark.parametrize("scale", [1, 2])
def test_equals_kymatio_live(shape, scale):
    from kymatio.numpy import Scattering2D

    images = np.random.default_rng(1).random((3, *shape)).astype(np.float32)
    outputs = Scattering(*shape, scale)(images[..., None]).numpy()
    np.testing.assert_allclose(outputs, Scattering2D(scale, shape)(images), atol=1e-4)


def test_gradient_of_a_constant_image_is_finite():
    transform = Scattering(8, 8, 1, 2)
    images = tf.zeros([1, 8, 8, 1])
    with tf.GradientTape() as tape:
        tape.watch(images)
        loss = tf.reduce_sum(transform(images) ** 2)
    assert np.isfinite(tape.gradient(loss, images)).all()


@pytest.mark.parametrize("shape", [(2, 4, 16, 1), (2, 8, 8), (2, 16, 4, 1)])
def test_images_of_another_shape_are_refused_though_they_have_as_many_pixels(shape):
    with pytest.raises(ValueError, match="`images`"):
        Scattering(8, 8, 1, 2)(tf.zeros(shape))
    kernel = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=2)
    with pytest.raises(ValueError, match=r"`inputs`.*\(8, 8, 1\)"):
        kernel.embed(tf.zeros(shape))
    with pytest.raises(ValueError, match=r"`example`.*\(8, 8, 1\)"):
        kernel.jacobian(tf.zeros(shape[1:]))


def test_images_of_other_colours_are_refused():
    kernel = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=2)
    with pytest.raises(ValueError, match=r"`inputs`.*\(8, 8, 1\)"):
        kernel.embed(np.zeros((2, 8, 8, 3), np.float32))


# A window as large as the image would be mirrored at its border by more than there is.
@pytest.mark.parametrize("shape", [(4, 28), (8, 8), (28, 8)])
def test_a_window_that_is_not_smaller_than_the_image_is_refused(shape):
    with pytest.raises(ValueError, match=r"`scale`.*2\*\*scale below"):
        Scattering(*shape, 3)


def test_an_image_larger_than_the_window_by_a_pixel_is_transformed():
    transform = Scattering(9, 9, 3, 2)
    outputs = transform(tf.ones([2, 9, 9, 1]))
    assert outputs.shape == (2, transform.channels, *transform.output_size)
    np.testing.assert_allclose(outputs[:, 0], 1.0, atol=1e-3)


def test_embedding_has_norm_one_and_groups_have_mean_zero():
    kernel = ScatteringKernel((28, 28, 1))
    images = np.random.default_rng(2).random((3, 28, 28, 1)).astype(np.float32)
    embedded = kernel.embed(images).numpy()
    assert embedded.shape == (3, kernel.num_features) == (3, 3969)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-5)
    groups = embedded.reshape(3, 27, -1)
    np.testing.assert_allclose(groups.mean(axis=-1), 0.0, atol=1e-6)


def test_embedding_of_one_image_does_not_depend_on_the_others():
    kernel = ScatteringKernel((12, 12, 1), scale=1, orientations=2)
    images = np.random.default_rng(3).random((4, 12, 12, 1)).astype(np.float32)
    together = kernel.embed(images).numpy()
    alone = kernel.embed(images[2:3]).numpy()
    np.testing.assert_allclose(together[2:3], alone, atol=1e-6)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="groups"):
        ScatteringKernel((28, 28, 1), groups=10)


def test_an_image_of_nan_spoils_no_other():
    kernel = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=2)
    images = np.random.default_rng(4).random((5, 8, 8, 1)).astype(np.float32)
    expected = embed_in_batches(kernel, images, batch_size=3)
    images[1, 2, 2] = np.nan
    embedded = embed_in_batches(kernel, images, batch_size=3)
    assert np.isnan(embedded[1]).any()
    others = [0, 2, 3, 4]
    np.testing.assert_allclose(embedded[others], expected[others], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "scale", "groups"),
    [
        ((8, 8, 2), 1, 1),  # one group of both colours
        ((8, 8, 2), 1, 2),
        ((8, 8, 3), 1, None),
        ((16, 12, 1), 2, 1),
    ],
)
def test_jacobian_equals_back_propagation(shape, scale, groups):
    kernel = ScatteringKernel(shape, groups=groups, scale=scale, orientations=2)
    image = np.random.default_rng(5).random(shape).astype(np.float32)
    rows = np.random.default_rng(6).normal(size=(2, kernel.num_features))
    rows = tf.constant(rows.astype(np.float32))
    repeated = tf.Variable(np.stack([image, image]))
    with tf.GradientTape() as tape:
        product = tf.reduce_sum(kernel.embed(repeated) * rows)
    expected = tape.gradient(product, repeated).numpy().reshape(2, -1)
    pulled = kernel.jacobian(tf.constant(image)).pulled(rows).numpy()
    np.testing.assert_allclose(pulled, expected, atol=1e-4 * np.abs(expected).max())


def test_a_blank_image_has_a_jacobian():
    kernel = ScatteringKernel((8, 8, 3), scale=1, orientations=2)
    pulled = kernel.jacobian(tf.zeros((8, 8, 3))).pulled(tf.eye(kernel.num_features))
    assert np.isfinite(pulled).all()
