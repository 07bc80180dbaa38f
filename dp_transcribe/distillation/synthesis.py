"""Support images that stand for a linear model; costs no privacy.

Kernel ridge regression on support images is itself a linear model of the features.
Here the images are moved until that model is the given one. Only the given weights
and public images are read, so the result is as private as the weights.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Protocol

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import balanced_labels
from dp_transcribe.distillation.kernels import KEPT_PER_PIXEL, LARGEST, Kernel
from dp_transcribe.distillation.ridge import centred_one_hot, ridge_solve

_LOGGER = logging.getLogger(__name__)
_BATCH = 250
_LOG_EVERY = 25


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


def synthesize(
    weights: np.ndarray,
    kernel: Kernel,
    source: ImageSource,
    *,
    settings: Synthesis | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Makes support images whose ridge regression acts as a linear model.

    They start from the public images that the model is surest of. Two similarities
    are raised: that of the weights, and that of the outputs on the public images.

    Args:
        weights: float `[features, classes]`, a linear model of the kernel's features.
        kernel: a kernel that is the inner product of its embeddings.
        source: a public source of images; its images must know nothing of the data.
        settings: how the images are made.
        seed: of the public images.

    Returns:
        Images, float32 `[n, height, width, colours]`, and int32 labels `[n]`, the
        classes in order.

    Raises:
        ValueError: there are more support images asked for than public ones drawn,
            or than fit into 4 GiB while they are moved.

    **Privacy**: post-processing of the weights; nothing else that is private is read.
    """
    settings = settings or Synthesis()
    labels = balanced_labels(settings.images_per_class, weights.shape[1])
    if settings.images_per_class > settings.queries:
        expected = f"at most `queries`, which is {settings.queries}"
        raise _validate.invalid("images_per_class", settings.images_per_class, expected)
    _check_memory(source, len(labels), weights.shape[1])
    images, features = _public_images(source, kernel, settings.queries, seed)
    target = tf.constant(_centred(weights), tf.float32)
    start = _surest(features @ target.numpy(), settings.images_per_class)
    support = tf.Variable(images[start])
    _match(support, labels, kernel, target, features, settings)
    return support.numpy(), labels


def implied_weights(
    support: tf.Tensor, targets: tf.Tensor, kernel: Kernel, penalty: float
) -> tf.Tensor:
    """Weights of the linear model that ridge regression on the support is.

    Args:
        support: float32 `[n, height, width, colours]`.
        targets: float32 `[n, classes]`.
        kernel: a kernel that is the inner product of its embeddings.
        penalty: as in `KernelRidgeClassifier`.

    Returns:
        float32 `[features, classes]`; differentiable in the support.
    """
    embedded = kernel.embed(support)
    solution = ridge_solve(kernel.between(embedded, embedded), targets, penalty)
    return tf.matmul(embedded, solution, transpose_a=True)


def _match(
    support: tf.Variable,
    labels: np.ndarray,
    kernel: Kernel,
    target: tf.Tensor,
    features: np.ndarray,
    settings: Synthesis,
) -> None:
    """Moves the support images."""
    targets = tf.constant(centred_one_hot(labels, target.shape[1]))
    public = tf.constant(features)
    wanted = tf.matmul(public, target)
    optimizer = keras.optimizers.Adam(
        keras.optimizers.schedules.CosineDecay(
            settings.learning_rate, settings.steps, alpha=0.1
        )
    )
    optimizer.build([support])

    @tf.function
    def step() -> tf.Tensor:
        with tf.GradientTape() as tape:
            found = implied_weights(support, targets, kernel, settings.penalty)
            found -= tf.reduce_mean(found, axis=1, keepdims=True)
            outputs = tf.matmul(public, found)
            likeness = _cosine(found, target) + _cosine(outputs, wanted)
            loss = 2.0 - likeness
        gradient = tape.gradient(loss, support)
        optimizer.apply_gradients([(gradient, support)])
        support.assign(tf.clip_by_value(support, *settings.pixel_range))
        return loss

    for number in range(1, settings.steps + 1):
        loss = step()
        if number % _LOG_EVERY == 0:
            _LOGGER.info("step %d: dissimilarity %.4f", number, float(loss))


def _public_images(
    source: ImageSource, kernel: Kernel, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Public images and their embeddings."""
    images, features = [], []
    for part in range(-(-count // _BATCH)):
        batch = source.sample(_BATCH, tf.constant([seed, part], tf.int32))
        images.append(np.asarray(batch))
        features.append(kernel.embed(batch).numpy())
    return np.concatenate(images)[:count], np.concatenate(features)[:count]


def _check_memory(source: ImageSource, count: int, num_classes: int) -> None:
    """Refuses more support images than fit, naming the number that does."""
    example = source.sample(1, tf.constant([0, 0], tf.int32))
    largest = LARGEST // (KEPT_PER_PIXEL * math.prod(example.shape))
    if count > largest:
        expected = f"at most {largest // num_classes}, which take 4 GiB"
        raise _validate.invalid("images_per_class", count // num_classes, expected)


def _surest(scores: np.ndarray, per_class: int) -> np.ndarray:
    """Indices of the images with the largest margin for each class, `[n]`."""
    chosen = []
    for label in range(scores.shape[1]):
        others = np.delete(scores, label, axis=1).max(axis=1)
        margin = scores[:, label] - others
        chosen.append(np.argsort(-margin)[:per_class])
    return np.concatenate(chosen)


def _centred(weights: np.ndarray) -> np.ndarray:
    """Weights less their mean over the classes, which changes no prediction."""
    return weights - weights.mean(axis=1, keepdims=True)


def _cosine(left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(left * right) / (tf.norm(left) * tf.norm(right))
