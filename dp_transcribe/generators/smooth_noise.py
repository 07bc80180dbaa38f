"""Smooth noise, softly thresholded into blobs and edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe._validate import probability
from dp_transcribe.generators.base import (
    Draws,
    ProceduralGenerator,
    check_positive_range,
    check_range,
)
from dp_transcribe.generators.fields import grid, mix_channels, smooth_field


@keras.saving.register_keras_serializable("dp_transcribe")
class SmoothNoise(ProceduralGenerator):
    """Low-pass noise through a sigmoid of random steepness and threshold.

    A steep sigmoid gives black and white blobs with sharp edges, a flat one soft
    clouds. Some images are faded to black towards the border.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        smoothness: Range of the blur's standard deviation in pixels of a 28 x 28
            image.
        contrast: Range of the sigmoid's steepness, per standard deviation.
        threshold: Range of the value, in standard deviations, that becomes mid-grey.
        window: Probability that an image fades to black towards its border.

    **Privacy**: public, see `ProceduralGenerator`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        smoothness: Sequence[float] = (0.8, 5.0),
        contrast: Sequence[float] = (1.0, 20.0),
        threshold: Sequence[float] = (-0.5, 1.5),
        window: float = 0.5,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.smoothness = check_positive_range("smoothness", smoothness)
        self.contrast = check_positive_range("contrast", contrast)
        self.threshold = check_range("threshold", threshold)
        self.window = probability("window", window)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "smoothness": list(self.smoothness),
            "contrast": list(self.contrast),
            "threshold": list(self.threshold),
            "window": self.window,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        field = smooth_field(draws, self.image_shape, smoothness=self.smoothness)
        field = mix_channels(draws, field, spread=0.5)
        low, high = self.contrast
        contrast = draws.log_uniform(1, 1, 1, low=low, high=high)
        low, high = self.threshold
        threshold = draws.uniform(1, 1, 1, low=low, high=high)
        return tf.sigmoid(contrast * (field - threshold)) * self._window(draws)

    def _window(self, draws: Draws) -> tf.Tensor:
        """1 inside a random centred oval, 0 outside, `[n, height, width, 1]`."""
        xs, ys = grid(self.image_shape)
        size = draws.uniform(1, 1, 2, low=0.45, high=1.0)
        squared = tf.square(xs / size[..., 0]) + tf.square(ys / size[..., 1])
        oval = tf.sigmoid(6.0 * (1.0 - squared))
        keep = draws.chance(self.window, 1, 1)
        return (1.0 - keep * (1.0 - oval))[..., None]
