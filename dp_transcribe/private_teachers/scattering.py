"""A private linear model of public features of an image, as a Keras teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.distill import Distillation, fit_linear_model
from dp_transcribe.distillation.kernels import Kernel, MirroredKernel, ScatteringKernel
from dp_transcribe.distillation.linear import (
    PrivateLinearModel,
    centred_logits,
)
from dp_transcribe.distillation.synthesis import ImageSource
from dp_transcribe.distillation.whitening import PublicWhitening
from dp_transcribe.teachers import Teacher

# Images that are embedded at once; one compiled function serves any batch.
_ROWS = 128


@keras.saving.register_keras_serializable(package="dp_transcribe")
class ScatteringEmbedding(keras.layers.Layer):
    """The embedding of a `ScatteringKernel`, mirrored or not, without weights.

    Args:
        image_shape: height, width and number of colours.
        groups: see `ScatteringKernel`.
        scale: see `ScatteringKernel`.
        orientations: see `ScatteringKernel`.
        mirrored: whether the embedding is that of a `MirroredKernel`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        groups: int | None = None,
        scale: int = 2,
        orientations: int = 8,
        mirrored: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(trainable=False, dtype="float32", **kwargs)
        height, width, colours = image_shape
        shape = (height, width, colours)
        self.scattering = ScatteringKernel(shape, groups, scale, orientations)
        self.mirrored = mirrored

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and number of colours."""
        return self.scattering.image_shape

    @property
    def kernel(self) -> Kernel:
        """What embeds the images."""
        return MirroredKernel(self.scattering) if self.mirrored else self.scattering

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Images `[batch, *image_shape]` to features `[batch, features]`."""
        shape = self.scattering.image_shape
        count = tf.shape(images)[0]
        missing = -count % _ROWS
        padded = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
        blocks = tf.reshape(padded, [-1, _ROWS, *shape])
        size = self.scattering.num_features
        embedded = tf.map_fn(
            self.kernel.embed,
            blocks,
            fn_output_signature=tf.TensorSpec([_ROWS, size], tf.float32),
            parallel_iterations=1,
        )
        return tf.reshape(embedded, [-1, size])[:count]

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """`(batch, features)`."""
        return input_shape[0], self.scattering.num_features

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        scattering = self.scattering
        return {
            "name": self.name,
            "image_shape": list(scattering.image_shape),
            "groups": scattering.groups,
            "scale": scattering.scale,
            "orientations": scattering.orientations,
            "mirrored": self.mirrored,
        }


@keras.saving.register_keras_serializable(package="dp_transcribe")
class WhitenedLinear(keras.layers.Layer):
    """A `PublicWhitening` and a `PrivateLinearModel` of what it makes of features.

    Args:
        rank: number of directions that are whitened.
        num_classes: number of logits.
    """

    def __init__(self, rank: int, num_classes: int, **kwargs: Any) -> None:
        super().__init__(trainable=False, dtype="float32", **kwargs)
        self.rank = rank
        self.num_classes = num_classes

    def build(self, input_shape: Any) -> None:
        """Makes the weights, all zero."""
        features = input_shape[-1]
        shapes = {
            "basis": (self.rank, features),
            "factors": (self.rank,),
            "centre": (features,),
            "kernel": (features, self.num_classes),
        }
        made = {
            name: self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False
            )
            for name, shape in shapes.items()
        }
        self.basis, self.factors, self.centre, self.kernel = made.values()
        self.built = True

    def call(self, features: tf.Tensor) -> tf.Tensor:
        """Features `[batch, features]` to logits `[batch, num_classes]`."""
        along = tf.matmul(features, self.basis, transpose_b=True)
        whitened = features + tf.matmul(along * (self.factors - 1.0), self.basis)
        return centred_logits(
            whitened,
            tf.convert_to_tensor(self.centre),
            tf.convert_to_tensor(self.kernel),
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        """`(batch, num_classes)`."""
        return input_shape[0], self.num_classes

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {
            "name": self.name,
            "rank": self.rank,
            "num_classes": self.num_classes,
        }


def scattering_classifier(
    kernel: ScatteringKernel | MirroredKernel,
    whitening: PublicWhitening,
    model: PrivateLinearModel,
) -> keras.Model:
    """The Keras model that embeds, whitens and scores.

    Args:
        kernel: a `ScatteringKernel`, or a `MirroredKernel` around one.
        whitening: maps the embeddings.
        model: fitted on whitened embeddings.

    Returns:
        A model `[batch, *image_shape]` to logits `[batch, classes]`.
    """
    embedding = embedding_layer(kernel)
    last = WhitenedLinear(len(whitening.basis), model.num_classes, name="logits")
    classifier = keras.Sequential(
        [keras.layers.Input(embedding.image_shape), embedding, last], name="teacher"
    )
    last.set_weights([whitening.basis, whitening.factors, model.centre, model.weights])
    return classifier


def embedding_layer(kernel: Kernel) -> ScatteringEmbedding:
    """A kernel's embedding as a layer.

    Args:
        kernel: a `ScatteringKernel`, or a `MirroredKernel` around one.

    Raises:
        ValueError: it is another one.
    """
    scattering = _scattering(kernel)
    return ScatteringEmbedding(
        scattering.image_shape,
        scattering.groups,
        scattering.scale,
        scattering.orientations,
        mirrored=isinstance(kernel, MirroredKernel),
    )


def _scattering(kernel: Kernel) -> ScatteringKernel:
    """The scattering kernel that this is or mirrors; others are refused."""
    inner = kernel.kernel if isinstance(kernel, MirroredKernel) else kernel
    mend = "`kernel_for_domain` makes one, mirrored where images may be."
    return _validate.instance_of("kernel", inner, ScatteringKernel, mend)


def fit_scattering_teacher(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    kernel: ScatteringKernel | MirroredKernel | None = None,
    settings: Distillation | None = None,
    features: np.ndarray | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> Teacher:
    """Fits a private linear model of wavelet scattering features.

    At small epsilons this is more accurate than a network trained by DP-SGD, since the
    features are public and a few thousand numbers are all that is learnt.

    Args:
        images: private, float `[records, height, width, colours]` in 0..1.
        labels: private, int `[records]`.
        num_classes: number of classes.
        source: public images, such as random processes, for the whitening.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        kernel: embeds private images while fitting and whatever the teacher is asked
            about later, such as that of `kernel_for_domain`; by default a
            `ScatteringKernel`.
        settings: further settings.
        features: the embeddings of `images` by the kernel, if they are there already.
        seed: None for secret noise; an int makes runs repeatable, for tests.
        verbose: 1 shows bars with the epsilon so far, 0 nothing.

    Returns:
        The teacher, a Keras model that carries its statement.

    Raises:
        ValueError: an argument is out of range or the labels do not fit. Nothing was
            spent.

    **Privacy**: unit `RECORD`, zero-out; see `PrivateLinearModel`.

    References:
        Tramèr and Boneh 2021, arXiv:2011.11660.
    """
    settings = settings or Distillation()
    height, width, colours = np.shape(images)[1:]
    kernel = kernel or ScatteringKernel((height, width, colours))
    fitting = _scattering(kernel).image_shape
    if fitting != (height, width, colours):
        expected = f"a kernel of images {(height, width, colours)}"
        raise _validate.invalid("kernel", kernel, expected)
    model, whitening = fit_linear_model(
        images,
        labels,
        num_classes=num_classes,
        kernel=kernel,
        source=source,
        target_epsilon=target_epsilon,
        delta=delta,
        settings=settings,
        features=features,
        seed=seed,
        verbose=verbose,
    )
    return Teacher(
        scattering_classifier(kernel, whitening, model),
        outputs="logits",
        statement=model.privacy_statement(covered=("teacher",)),
    )
