"""Public features for small teachers: scattering, whitened by public images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe._principal import principal_directions
from dp_transcribe.distillation.kernels import ScatteringKernel
from dp_transcribe.distillation.synthesis import ImageSource

_BATCH = 250


@keras.saving.register_keras_serializable("dp_transcribe")
class ScatteringFeatures(keras.layers.Layer):
    """Scattering coefficients, centred and projected; nothing in it is trained.

    Args:
        image_shape: `(height, width, channels)`.
        rank: number of features.

    **Privacy**: public as long as centre and basis were made from public images.
    """

    def __init__(self, image_shape: Sequence[int], rank: int, **kwargs: Any) -> None:
        super().__init__(**{**kwargs, "trainable": False})
        height, width, channels = image_shape
        self.image_shape = (int(height), int(width), int(channels))
        self.rank = _validate.positive_int("rank", rank)
        self.scattering = ScatteringKernel(self.image_shape)

    def build(self, input_shape: Any) -> None:
        """Makes room for centre and basis."""
        length = self.scattering.num_features
        self.centre = self.add_weight(
            shape=(length,), initializer="zeros", name="centre"
        )
        self.basis = self.add_weight(
            shape=(length, self.rank), initializer="zeros", name="basis"
        )

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Features, float32 `[batch, rank]`."""
        return tf.matmul(self.scattering.embed(images) - self.centre, self.basis)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, int]:
        """`(batch, rank)`."""
        return (input_shape[0], self.rank)

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        own = {"image_shape": list(self.image_shape), "rank": self.rank}
        return {**super().get_config(), **own}


def scattering_features(
    source: ImageSource,
    image_shape: Sequence[int],
    *,
    rank: int = 600,
    damping_rank: int = 100,
    images: int = 2000,
    seed: int = 0,
) -> keras.Model:
    """A public feature extractor: the principal scattering coefficients, whitened.

    Directions in which public images vary most are shortened, so that a teacher with
    a few dozen records is not blinded by them. Features have root mean square norm
    one on the public images.

    Args:
        source: of public images, such as a procedural generator.
        image_shape: `(height, width, channels)`.
        rank: number of features, below `images`.
        damping_rank: the variance of this direction is added to all variances.
        images: public images that centre and directions are computed from.
        seed: of the public images.

    Returns:
        A Keras model, images to features `[batch, rank]`.

    **Privacy**: public. Not a record is read.
    """
    _validate.in_range("rank", rank, 1, images - 1)
    _validate.in_range("damping_rank", damping_rank, 0, rank - 1)
    layer = ScatteringFeatures(image_shape, rank)
    model = keras.Sequential([keras.layers.Input(tuple(image_shape)), layer])
    starts = range(0, images, _BATCH)
    parts = [
        layer.scattering.embed(
            source.sample(min(_BATCH, images - start), tf.constant([seed, start]))
        ).numpy()
        for start in starts
    ]
    centre, basis = _whitened_directions(np.concatenate(parts), rank, damping_rank)
    layer.set_weights([centre, basis])
    return model


def _whitened_directions(
    embedded: np.ndarray, rank: int, damping_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Centre `[features]` and scaled principal directions `[features, rank]`."""
    centre, variances, directions = principal_directions(embedded, rank)
    shrunk = variances + variances[damping_rank]
    norm = np.sqrt(np.sum(variances / shrunk))
    return centre, directions / (np.sqrt(shrunk) * norm)
