"""Support images that stand for a linear model: match, gradient and memory."""

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    InterceptKernel,
    KernelRidgeClassifier,
    MirroredKernel,
    RBFKernel,
    ScatteringKernel,
    Synthesis,
    synthesize,
)
from dp_transcribe.distillation.synthesis import (
    check_support,
    implied_weights,
    support_gradient,
)

KERNEL = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=4)


class Noise:
    """Smooth random images."""

    def sample(self, n, seed):
        coarse = tf.random.stateless_uniform([n, 3, 3, 1], seed)
        return tf.image.resize(coarse, [8, 8])


def random_weights(kernel):
    """Weights that give the mean image to no class."""
    mean = kernel.embed(Noise().sample(200, [0, 0])).numpy().mean(axis=0)
    weights = np.random.default_rng(5).normal(size=(len(mean), 2))
    weights -= np.outer(mean, mean @ weights) / (mean @ mean)
    return weights.astype(np.float32)


@pytest.mark.parametrize("kernel", [KERNEL, InterceptKernel(MirroredKernel(KERNEL))])
def test_the_images_approach_the_given_model(kernel):
    weights = random_weights(kernel)
    settings = Synthesis(images_per_class=4, steps=60, queries=300)
    images, labels = synthesize(weights, kernel, Noise(), settings=settings)
    np.testing.assert_array_equal(labels, np.repeat([0, 1], 4))
    ridge = KernelRidgeClassifier(kernel).fit(images, labels)
    fresh = Noise().sample(300, [9, 9])
    wanted = (kernel.embed(fresh).numpy() @ weights).argmax(axis=1)
    assert 0.1 < wanted.mean() < 0.9
    assert np.mean(ridge.predict(fresh.numpy()) == wanted) > 0.8


# Chunks that divide the images, that do not, and one that is longer.
@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_the_gradient_in_chunks_is_that_of_all_images_at_once(chunk):
    kernel = InterceptKernel(MirroredKernel(KERNEL))
    support = Noise().sample(6, [1, 2])
    targets = tf.constant(np.eye(2, dtype=np.float32)[[0, 0, 0, 1, 1, 1]])
    weights = tf.constant(random_weights(kernel))

    def distance(embedded):
        found = implied_weights(embedded, targets, kernel, 1e-2)
        return tf.reduce_sum(found * weights)

    def pull(embedded):
        with tf.GradientTape() as tape:
            tape.watch(embedded)
            value = distance(embedded)
        return value, tape.gradient(value, embedded)

    with tf.GradientTape() as tape:
        tape.watch(support)
        whole = distance(kernel.embed(support))
    expected = tape.gradient(whole, support).numpy()
    value, gradient = support_gradient(support.numpy(), kernel, pull, chunk=chunk)
    np.testing.assert_allclose(value, whole, rtol=1e-3)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(gradient / scale, expected / scale, atol=1e-3)


def test_more_images_than_were_drawn_are_refused_with_the_number():
    settings = Synthesis(images_per_class=300, queries=200)
    weights = np.zeros((KERNEL.num_features, 2), np.float32)
    with pytest.raises(ValueError, match="200"):
        synthesize(weights, KERNEL, Noise(), settings=settings)


def test_a_kernel_that_is_no_inner_product_is_refused():
    with pytest.raises(ValueError, match="`kernel`"):
        synthesize(np.zeros((64, 2)), RBFKernel(), Noise())


def test_kernel_matrices_that_do_not_fit_are_refused_with_the_number():
    settings = Synthesis(images_per_class=6000, queries=6000)
    with pytest.raises(ValueError, match="`images_per_class`.*at most ") as refused:
        check_support(KERNEL, Noise(), settings, num_classes=2)
    most = int(str(refused.value).split("at most ")[1].split(",")[0])
    assert 5000 < most < 6000
    assert check_support(
        KERNEL, Noise(), Synthesis(images_per_class=most, queries=6000), num_classes=2
    )


def test_embeddings_that_do_not_fit_are_refused_with_the_number():
    class Wide(ScatteringKernel):
        def embed(self, inputs):
            return tf.zeros([len(inputs), 2**24])

    settings = Synthesis(images_per_class=4)
    with pytest.raises(ValueError, match="`images_per_class`.*at most 3, "):
        check_support(Wide((8, 8, 1)), Noise(), settings, num_classes=2)


@pytest.mark.parametrize(("side", "chunk"), [(8, 25), (150, 7), (400, 1)])
def test_larger_images_are_embedded_in_smaller_chunks(side, chunk):
    class Small(ScatteringKernel):
        def embed(self, inputs):
            return tf.zeros([len(inputs), 10])

    class Posters:
        def sample(self, n, seed):
            return tf.zeros([n, side, side, 3])

    kernel = Small((8, 8, 1))
    assert check_support(kernel, Posters(), Synthesis(), num_classes=2) == chunk


def test_an_image_that_does_not_fit_is_refused_with_the_size():
    class Hoardings:
        def sample(self, n, seed):
            return tf.zeros([n, 500, 500, 3])

    with pytest.raises(ValueError, match="`source`.*at most 536870 values"):
        check_support(KERNEL, Hoardings(), Synthesis(), num_classes=2)
