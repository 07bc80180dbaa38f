"""Model inversion: what a class looks like, read out of a classifier."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.linear_model import LogisticRegression

from dp_transcribe import _validate
from dp_transcribe.teachers import Teacher

_BYTES = 255


@dataclasses.dataclass(frozen=True)
class Inversion:
    """How images are reconstructed.

    Attributes:
        images_per_class: images for each class.
        steps: of gradient ascent (Adam).
        learning_rate: in units of the range of pixels.
        total_variation: weight of the prior that neighbouring pixels are alike.
        shrinkage: weight of the prior that pixels are dark.
        seed: of the noise that the images start from.
    """

    images_per_class: int = 5
    steps: int = 200
    learning_rate: float = 0.05
    total_variation: float = 0.02
    shrinkage: float = 0.002
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the attributes."""
        _validate.positive_int("images_per_class", self.images_per_class)
        _validate.positive_int("steps", self.steps)
        _validate.positive_finite("learning_rate", self.learning_rate)
        _validate.non_negative("total_variation", self.total_variation)
        _validate.non_negative("shrinkage", self.shrinkage)


def invert(
    model: Teacher, settings: Inversion | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Reconstructs images of each class by gradient ascent from noise.

    Args:
        model: the teacher, or a student wrapped as one.
        settings: how.

    Returns:
        Images float32 `[n, height, width, channels]` in the model's input range, and
        their classes int32 `[n]`, the classes one after the other.

    **Privacy**: as private as the model. From an ordinary teacher they may show
    training images.

    References:
        Fredrikson et al. 2015 (model inversion); Mahendran and Vedaldi 2015,
        arXiv:1412.0035 (total variation prior).
    """
    settings = settings or Inversion()
    low, high = model.input_range
    labels = np.repeat(np.arange(model.num_classes), settings.images_per_class)
    shape = (len(labels), *model.input_shape)
    seed = (settings.seed, 0)
    images = keras.Variable(tf.random.stateless_uniform(shape, seed, 0.3, 0.7))
    optimizer = keras.optimizers.Adam(settings.learning_rate)
    optimizer.build([images])

    @tf.function(jit_compile=False)
    def ascend() -> None:
        unit = tf.convert_to_tensor(images.value)
        with tf.GradientTape() as tape:
            tape.watch(unit)
            logits = model.logits(low + (high - low) * unit)
            loss = tf.reduce_sum(_losses(labels, logits) + _prior(unit, settings))
        optimizer.apply_gradients([(tape.gradient(loss, unit), images)])
        images.assign(tf.clip_by_value(images.value, 0.0, 1.0))

    for _ in range(settings.steps):
        ascend()
    return (low + (high - low) * images.numpy()), labels.astype(np.int32)


def recognised(
    classifier: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    labels: np.ndarray,
) -> float:
    """Share of the reconstructions that another classifier recognises.

    Args:
        classifier: images to scores `[n, classes]`, trained independently of the
            model that was inverted.
        images: `[n, height, width, channels]`.
        labels: int `[n]`, what they are to show.

    Returns:
        A fraction; one over the number of classes is chance.
    """
    return float(np.mean(np.argmax(classifier(images), axis=-1) == labels))


def linear_classifier(
    images: np.ndarray, labels: np.ndarray
) -> Callable[[np.ndarray], np.ndarray]:
    """A classifier that has nothing to do with teacher and student.

    Args:
        images: `[n, height, width, channels]`, none of which the teacher saw.
        labels: int `[n]`, every class at least once.

    Returns:
        A function of images that gives probabilities `[n, classes]`.
    """

    def flat(images: np.ndarray) -> np.ndarray:
        return np.reshape(images, [len(images), -1])

    model = LogisticRegression(C=0.01, max_iter=200).fit(flat(images), labels)
    return lambda images: model.predict_proba(flat(images))


def save_grid(
    path: str | os.PathLike[str], images: np.ndarray, labels: np.ndarray
) -> None:
    """Writes reconstructions as one PNG, a column for each class.

    Args:
        path: of the PNG.
        images: float `[n, height, width, channels]` with 1 or 3 channels, as many of
            each class.
        labels: int `[n]`.
    """
    _validate.one_of("channels", images.shape[-1], (1, 3))
    low, high = images.min(), max(images.max(), images.min() + 1e-6)
    columns = [
        np.concatenate(list(images[labels == label]), axis=0)
        for label in np.unique(labels)
    ]
    grid = (np.concatenate(columns, axis=1) - low) / (high - low)
    png = tf.io.encode_png((grid * _BYTES).round().astype(np.uint8))
    Path(path).write_bytes(png.numpy())


def _losses(labels: np.ndarray, logits: Any) -> tf.Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _prior(images: tf.Tensor, settings: Inversion) -> tf.Tensor:
    """How unlike a picture each image is, `[n]`."""
    variation = tf.image.total_variation(images)
    size = tf.reduce_sum(tf.square(images), axis=[1, 2, 3])
    return settings.total_variation * variation + settings.shrinkage * size
