"""Noise with the spectrum of natural images, 1 / frequency ** exponent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.generators.base import Draws, ProceduralGenerator, check_range
from dp_transcribe.generators.fields import mix_channels, standardize


@keras.saving.register_keras_serializable("dp_transcribe")
class PowerLawNoise(ProceduralGenerator):
    """Noise whose amplitude falls with frequency as natural images' does.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        exponent: Range of the exponent; height and width draw their own. Natural
            images lie near 1.
        contrast: Range of the standard deviation of the pixels, as a fraction of the
            output range.
        brightness: Range of the mean of the pixels, as a fraction of the output range.

    **Privacy**: public, see `ProceduralGenerator`.

    References:
        Baradad et al. 2021, arXiv:2106.05963 ("Spectrum" and "Spectrum + Color").
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        exponent: Sequence[float] = (0.5, 3.5),
        contrast: Sequence[float] = (0.1, 0.4),
        brightness: Sequence[float] = (0.2, 0.8),
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.exponent = check_range("exponent", exponent)
        self.contrast = check_range("contrast", contrast)
        self.brightness = check_range("brightness", brightness)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "exponent": list(self.exponent),
            "contrast": list(self.contrast),
            "brightness": list(self.brightness),
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        field = standardize(self._colored_noise(draws))
        field = mix_channels(draws, field, spread=0.6)
        low, high = self.contrast
        contrast = draws.uniform(1, 1, 1, low=low, high=high)
        low, high = self.brightness
        return draws.uniform(1, 1, 1, low=low, high=high) + contrast * field

    def _colored_noise(self, draws: Draws) -> tf.Tensor:
        """White noise filtered in the frequency domain, `[n, h, w, c]`."""
        height, width, channels = self.image_shape
        noise = draws.normal(channels, height, width)
        low, high = self.exponent
        exponents = draws.uniform(2, 1, 1, 1, low=low, high=high)
        rows = np.abs(np.fft.fftfreq(height)).astype(np.float32)[:, None] * height
        columns = np.fft.rfftfreq(width).astype(np.float32)[None, :] * width
        squared = 0.25 + np.square(rows) + np.square(columns)
        # The share of each axis in the direction of a frequency blends its exponent.
        share = (np.square(rows) + 0.125) / squared
        exponent = exponents[:, 0] * share + exponents[:, 1] * (1.0 - share)
        gain = tf.exp(-0.5 * exponent * np.log(squared))
        spectrum = tf.signal.rfft2d(noise) * tf.cast(gain, tf.complex64)
        field = tf.signal.irfft2d(spectrum, fft_length=[height, width])
        return tf.transpose(field, [0, 2, 3, 1])
