"""A fully connected generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras

from dp_transcribe._validate import positive_int
from dp_transcribe.generators.trainable import TrainableGenerator


@keras.saving.register_keras_serializable("dp_transcribe")
class MLPGenerator(TrainableGenerator):
    """Dense layers to a vector, or to an image without any sense of space.

    Args:
        image_shape: Shape of one example: `(features,)` or an image's.
        latent_dim: Length of a latent vector.
        num_classes: Number of classes to condition on, or `None`.
        output_range: Lowest and highest value; the teacher's input range.
        units: Widths of the hidden layers.
        **kwargs: As for `keras.Model`.

    **Privacy**: see `TrainableGenerator`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent_dim: int = 64,
        num_classes: int | None = None,
        output_range: Sequence[float] = (0.0, 1.0),
        units: Sequence[int] = (256, 512),
        **kwargs: Any,
    ) -> None:
        self.units = tuple(positive_int("units", width) for width in units)
        super().__init__(
            image_shape,
            latent_dim=latent_dim,
            num_classes=num_classes,
            output_range=output_range,
            **kwargs,
        )

    def _build_body(self, inputs: int) -> keras.Sequential:
        layers = keras.layers
        body = keras.Sequential([layers.Input((inputs,))], name="body")
        for width in self.units:
            body.add(layers.Dense(width))
            body.add(layers.LayerNormalization())
            body.add(layers.LeakyReLU(0.2))
        body.add(layers.Dense(math.prod(self.image_shape)))
        body.add(layers.Reshape(self.image_shape))
        return body

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "units": list(self.units)}
