"""A small convolutional generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from dp_transcribe._validate import positive_int
from dp_transcribe.generators.base import check_image_shape
from dp_transcribe.generators.trainable import TrainableGenerator

_GROUPS = 8


@keras.saving.register_keras_serializable("dp_transcribe")
class ConvGenerator(TrainableGenerator):
    """Transposed convolutions from a 4 times smaller map up to the image.

    Group normalisation, never batch normalisation: an image depends on its own
    latent alone, so queries stay independent of one another.

    Args:
        image_shape: `(height, width, channels)`.
        latent_dim: Length of a latent vector.
        num_classes: Number of classes to condition on, or `None`.
        output_range: Lowest and highest pixel value; the teacher's input range.
        filters: Channels of the smallest, the middle and the largest map, multiples
            of 8.
        **kwargs: As for `keras.Model`.

    **Privacy**: see `TrainableGenerator`.

    Example:
        >>> generator = ConvGenerator((28, 28, 1), latent_dim=16)
        >>> tuple(generator.sample(4, seed=(0, 1)).shape)
        (4, 28, 28, 1)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent_dim: int = 64,
        num_classes: int | None = None,
        output_range: Sequence[float] = (0.0, 1.0),
        filters: Sequence[int] = (64, 32, 16),
        **kwargs: Any,
    ) -> None:
        check_image_shape(image_shape)
        self.filters = tuple(positive_int("filters", width) for width in filters)
        super().__init__(
            image_shape,
            latent_dim=latent_dim,
            num_classes=num_classes,
            output_range=output_range,
            **kwargs,
        )

    def _build_body(self, inputs: int) -> keras.Sequential:
        layers = keras.layers
        height, width, channels = self.image_shape
        small, middle, large = self.filters
        rows, columns = -(-height // 4), -(-width // 4)
        body = keras.Sequential([layers.Input((inputs,))], name="body")
        body.add(layers.Dense(rows * columns * small, use_bias=False))
        body.add(layers.Reshape((rows, columns, small)))
        for filters in (middle, large):
            body.add(layers.GroupNormalization(_GROUPS))
            body.add(layers.LeakyReLU(0.2))
            body.add(
                layers.Conv2DTranspose(
                    filters, 4, strides=2, padding="same", use_bias=False
                )
            )
        body.add(layers.GroupNormalization(_GROUPS))
        body.add(layers.LeakyReLU(0.2))
        body.add(layers.Cropping2D(((0, 4 * rows - height), (0, 4 * columns - width))))
        body.add(layers.Conv2D(channels, 3, padding="same"))
        return body

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "filters": list(self.filters)}
