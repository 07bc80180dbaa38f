"""Kernel ridge regression on a distilled data set, as a Keras teacher."""

from __future__ import annotations

import keras
import numpy as np

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import DistilledDataset
from dp_transcribe.distillation.kernels import InterceptKernel, Kernel
from dp_transcribe.distillation.ridge import KernelRidgeClassifier
from dp_transcribe.privacy.inheritance import inherit
from dp_transcribe.private_teachers.scattering import embedding_layer
from dp_transcribe.teachers import Teacher


def ridge_teacher(
    distilled: DistilledDataset,
    kernel: Kernel,
    *,
    penalty: float = 1e-3,
    sharpness: float = 10.0,
) -> Teacher:
    """The teacher that a distilled data set makes of itself.

    A network that sees nothing but a few distilled images learns less from them than
    ridge regression does. Taught by that regression on any number of public images it
    learns more: give this teacher to `transcribe_private_teacher`.

    Args:
        distilled: images of all classes.
        kernel: scattering, mirrored or not, with an intercept or without; the one that
            the images were made for.
        penalty: as in `KernelRidgeClassifier`.
        sharpness: logits are the regression's outputs, which are near 1 for the class
            and near 0 for others, times this.

    Returns:
        A teacher with a Keras model `[batch, height, width, colours]` to logits
        `[batch, classes]`, and the data set's statement.

    Raises:
        ValueError: the kernel is no scattering kernel, a class has no image, or an
            argument is out of range.

    **Privacy**: post-processing of the distilled images; their own statement, unit
    `RECORD`.
    """
    intercept = kernel if isinstance(kernel, InterceptKernel) else None
    embedding = embedding_layer(kernel if intercept is None else intercept.kernel)
    _validate.positive_finite("sharpness", sharpness)
    present = np.unique(distilled.labels)
    if len(present) < distilled.num_classes:
        expected = f"an image of each of {distilled.num_classes} classes"
        raise _validate.invalid("distilled", present, expected)
    ridge = KernelRidgeClassifier(kernel, penalty=penalty)
    ridge.fit(distilled.images, distilled.labels)
    weights = sharpness * ridge.linear_weights()
    bias = np.zeros(distilled.num_classes, np.float32)
    if intercept is not None:
        weights, bias = weights[:-1], intercept.length * weights[-1]
    last = keras.layers.Dense(distilled.num_classes, dtype="float32", name="logits")
    model = keras.Sequential(
        [keras.layers.Input(embedding.image_shape), embedding, last], name="teacher"
    )
    last.set_weights([weights, bias])
    statement = inherit(
        distilled.statement, covered=("teacher",), source="the distilled data set"
    )
    return Teacher(model, outputs="logits", statement=statement)
