"""Support images that stand for a linear model; costs no privacy.

Kernel ridge regression on support images is itself a linear model of the features.
Here the images are moved until that model is the given one. Only the given weights
and public images are read, so the result is as private as the weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import balanced_labels
from dp_transcribe.distillation.kernels import (
    KEPT_PER_PIXEL,
    LARGEST,
    Kernel,
    embed_in_batches,
    pull_back_in_batches,
)
from dp_transcribe.distillation.ridge import centred_one_hot, ridge_solve

_BATCH = 250
# Support images that are embedded at once.
_CHUNK = 25
# A step holds about this many copies of all embeddings and kernel values.
_COPIES = 8


# From embeddings to a value and its gradient.
Pull = Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]]


class ImageSource(Protocol):
    """A public source of images, such as a procedural generator."""

    def sample(self, n: int, seed: tf.Tensor) -> tf.Tensor:
        """Draws images `[n, height, width, colours]`."""


@dataclasses.dataclass(frozen=True)
class Synthesis:
    """How support images are made.

    Attributes:
        images_per_class: number of support images of each class.
        steps: number of steps of Adam.
        learning_rate: of Adam, in units of the pixels.
        penalty: regularisation of the ridge regression, as in
            `KernelRidgeClassifier`.
        queries: number of public images to start from and to compare models on.
        pixel_range: lowest and highest value of a pixel.
    """

    images_per_class: int = 10
    steps: int = 200
    learning_rate: float = 0.03
    penalty: float = 1e-3
    queries: int = 4000
    pixel_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for name in ("images_per_class", "steps", "queries"):
            _validate.positive_int(name, getattr(self, name))
        _validate.positive_finite("learning_rate", self.learning_rate)
        _validate.positive_finite("penalty", self.penalty)
        _validate.pixel_range("pixel_range", self.pixel_range)


def synthesize(
    weights: np.ndarray,
    kernel: Kernel,
    source: ImageSource,
    *,
    settings: Synthesis | None = None,
    seed: int = 0,
    verbose: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes support images whose ridge regression acts as a linear model.

    They start from the public images that the model is surest of. Two similarities
    are raised: that of the weights, and that of the outputs on the public images.

    Args:
        weights: float `[features, classes]`, a linear model of the kernel's
            embeddings. `InterceptKernel.weights` makes them of weights and offset.
        kernel: a kernel that is the inner product of its embeddings.
        source: a public source of images; its images must know nothing of the data.
        settings: how the images are made.
        seed: of the public images.
        verbose: 1 shows a bar, 0 nothing.

    Returns:
        Images, float32 `[n, height, width, colours]`, and int32 labels `[n]`, the
        classes in order.

    Raises:
        ValueError: see `check_support`.

    **Privacy**: post-processing of the weights; nothing else that is private is read.
    """
    settings = settings or Synthesis()
    labels = balanced_labels(settings.images_per_class, weights.shape[1])
    chunk = check_support(kernel, source, settings, num_classes=weights.shape[1])
    images = draw_images(source, settings.queries, seed)
    features = embed_in_batches(kernel, images)
    target = tf.constant(_centred(weights), tf.float32)
    start = _surest(features @ target.numpy(), settings.images_per_class)
    targets = tf.constant(centred_one_hot(labels, weights.shape[1]))
    pull = _pull(kernel, targets, target, tf.constant(features), settings.penalty)
    support = move_images(
        images[start],
        lambda moved: support_gradient(moved.numpy(), kernel, pull, chunk=chunk),
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        pixel_range=settings.pixel_range,
        verbose=verbose,
    )
    return support, labels


def check_support(
    kernel: Kernel, source: ImageSource, settings: Synthesis, *, num_classes: int
) -> int:
    """Refuses, before any work, what `synthesize` cannot make.

    Args:
        kernel: embeds the images.
        source: a public source of images.
        settings: how many images are asked for, and from how many.
        num_classes: number of classes.

    Returns:
        The number of images whose embedding is differentiated at once.

    Raises:
        ValueError: the kernel is no inner product of its embeddings, there are more
            support images asked for than public ones drawn, or they or a single
            embedding would not fit into 4 GiB.
    """
    if not kernel.is_inner_product:
        expected = "an inner product of embeddings, such as that of `ScatteringKernel`"
        raise _validate.invalid("kernel", kernel, expected)
    _validate.num_classes("num_classes", num_classes)
    asked = settings.images_per_class
    if asked > settings.queries:
        expected = f"at most `queries`, which is {settings.queries}"
        raise _validate.invalid("images_per_class", asked, expected)
    example = source.sample(1, tf.constant([0, 0], tf.int32))
    values = math.prod(example.shape)
    # Twice, since a kernel may embed an image and its mirror image.
    most = LARGEST // (2 * KEPT_PER_PIXEL)
    if values > most:
        expected = f"images of at most {most} values, one of which takes 4 GiB"
        raise _validate.invalid("source", example.shape[1:].as_list(), expected)
    width = int(kernel.embed(example).shape[1]) + values
    largest = (math.isqrt(width**2 + 4 * (LARGEST // _COPIES)) - width) // 2
    if asked * num_classes > largest:
        expected = f"at most {largest // num_classes}, which take 4 GiB"
        raise _validate.invalid("images_per_class", asked, expected)
    return min(_CHUNK, most // values)


def check_images(
    images: np.ndarray, example: np.ndarray, pixel_range: tuple[float, float]
) -> None:
    """Refuses, before any release, private images that public ones cannot stand for.

    Args:
        images: private images, float `[records, height, width, colours]`.
        example: public images, float `[n, height, width, colours]`.
        pixel_range: lowest and highest value of a pixel.

    Raises:
        ValueError: the shapes differ, or pixels lie outside of the range by more than
            rounding; what is not finite is passed over. The message does not quote the
            private pixels.
    """
    if np.ndim(images) != 4:
        expected = "images of shape (records, height, width, colours)"
        raise _validate.invalid("images", np.shape(images), expected)
    shape = np.shape(images)[1:]
    if np.shape(example)[1:] != shape:
        expected = f"public images of shape {shape}, as the private ones"
        raise _validate.invalid("source", np.shape(example)[1:], expected)
    for kind, held in (("public", example), ("private", images)):
        if not _in_range(held, pixel_range):
            expected = f"a range that holds the pixels of the {kind} images"
            mend = "Scale the images, or give the range that they are in."
            raise _validate.invalid("pixel_range", pixel_range, expected, mend)


def _in_range(images: np.ndarray, pixel_range: tuple[float, float]) -> bool:
    """Whether all finite pixels are in a range, up to a thousandth of its width."""
    low, high = pixel_range
    slack = 1e-3 * (high - low)
    for start in range(0, len(images), _BATCH):
        pixels = np.asarray(images[start : start + _BATCH], np.float32)
        finite = pixels[np.isfinite(pixels)]
        if np.any((finite < low - slack) | (finite > high + slack)):
            return False
    return True


def implied_weights(
    embedded: tf.Tensor, targets: tf.Tensor, kernel: Kernel, penalty: float
) -> tf.Tensor:
    """Weights of the linear model that ridge regression on the support is.

    Args:
        embedded: float32 `[n, features]`, the embeddings of the support images.
        targets: float32 `[n, classes]`.
        kernel: a kernel that is the inner product of its embeddings.
        penalty: as in `KernelRidgeClassifier`.

    Returns:
        float32 `[features, classes]`; differentiable in the embeddings.
    """
    solution = ridge_solve(kernel.between(embedded, embedded), targets, penalty)
    return tf.matmul(embedded, solution, transpose_a=True)


def _pull(
    kernel: Kernel,
    targets: tf.Tensor,
    target: tf.Tensor,
    public: tf.Tensor,
    penalty: float,
) -> Pull:
    """What draws the embeddings of the support to a linear model.

    Args:
        kernel: the kernel.
        targets: float32 `[n, classes]`, of the ridge regression.
        target: float32 `[features, classes]`, the model.
        public: float32 `[queries, features]`, embeddings to compare outputs on.
        penalty: of the ridge regression.

    Returns:
        A function of the embeddings, float32 `[n, features]`: the dissimilarity of
        the ridge regression and the model, and its gradient.
    """
    wanted = tf.matmul(public, target)

    @tf.function
    def pull(embedded: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(embedded)
            found = implied_weights(embedded, targets, kernel, penalty)
            found -= tf.reduce_mean(found, axis=1, keepdims=True)
            outputs = tf.matmul(public, found)
            likeness = _cosine(found, target) + _cosine(outputs, wanted)
            loss = 2.0 - likeness
        return loss, tape.gradient(loss, embedded)

    return pull


def support_gradient(
    support: np.ndarray, kernel: Kernel, pull: Pull, *, chunk: int
) -> tuple[tf.Tensor, np.ndarray]:
    """A function of embeddings and its gradient with respect to the images.

    The images are embedded in chunks without a tape, and each chunk once more with
    one to carry the gradient back: memory for that is that of one chunk.

    Args:
        support: float32 `[n, height, width, colours]`.
        kernel: embeds the images.
        pull: gives a value and its gradient for embeddings `[n, features]`.
        chunk: images that are embedded at once.

    Returns:
        The value, and the gradient, float32 of the support's shape.
    """
    embedded = embed_in_batches(kernel, support, batch_size=chunk)
    value, upstream = pull(tf.constant(embedded))
    gradient = pull_back_in_batches(kernel, support, upstream.numpy(), batch_size=chunk)
    return value, gradient


def move_images(
    start: np.ndarray,
    gradient_of: Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor]],
    *,
    steps: int,
    learning_rate: float,
    pixel_range: tuple[float, float],
    verbose: int,
) -> np.ndarray:
    """Moves images down a gradient by Adam, at a rate that falls to a tenth.

    Args:
        start: float32 `[n, height, width, colours]`.
        gradient_of: from images to a value, which is shown, and its gradient.
        steps: number of steps.
        learning_rate: the first one, in units of the pixels.
        pixel_range: lowest and highest value of a pixel.
        verbose: 1 shows a bar, 0 nothing.

    Returns:
        float32, of the shape of `start`.
    """
    images = tf.Variable(start)
    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(learning_rate, steps, alpha=0.1)
    )
    bar = keras.utils.Progbar(
        steps, verbose=verbose, stateful_metrics=["dissimilarity"]
    )
    for number in range(1, steps + 1):
        value, gradient = gradient_of(images.value())
        optimizer.apply_gradients([(tf.constant(gradient), images)])
        images.assign(tf.clip_by_value(images, *pixel_range))
        bar.update(number, [("dissimilarity", float(value))])
    return images.numpy()


def draw_images(
    source: ImageSource, count: int, seed: int, *, first_part: int = 0
) -> np.ndarray:
    """Draws public images in batches.

    Args:
        source: public images.
        count: how many.
        seed: the first half of the seed of every batch, modulo 2**31.
        first_part: the second half of the first batch's; it counts up from there.

    Returns:
        float32 `[count, height, width, colours]`.
    """
    parts = range(first_part, first_part - (-count // _BATCH))
    batches = [
        np.asarray(source.sample(_BATCH, tf.constant([seed % 2**31, part], tf.int32)))
        for part in parts
    ]
    return np.concatenate(batches)[:count]


def margins(scores: np.ndarray) -> np.ndarray:
    """How far each class is above the best of the others, of scores `[n, classes]`."""
    return np.stack(
        [
            scores[:, label] - np.delete(scores, label, axis=1).max(axis=1)
            for label in range(scores.shape[1])
        ],
        axis=1,
    )


def _surest(scores: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the images with the largest margin for each class, `[n]`."""
    order = np.argsort(-margins(scores), axis=0)
    return order[:per_class].T.ravel()


def _centred(weights: np.ndarray) -> np.ndarray:
    """Weights less their mean over the classes, which changes no prediction."""
    return weights - weights.mean(axis=1, keepdims=True)


def _cosine(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(left * right) / (tf.norm(left) * tf.norm(right))
