"""Building blocks of procedural images: pixel grids, smooth fields, colours."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dp_transcribe.generators.base import Draws

REFERENCE_SIZE = 28.0  # lengths given in pixels are meant for images of this size


def pixel_scale(image_shape: tuple[int, int, int]) -> float:
    """Pixels per reference pixel: 1.0 for 28 x 28, larger for larger images."""
    return float(min(image_shape[:2])) / REFERENCE_SIZE


def grid(image_shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as `(x, y)`, each float32 `[height, width]`.

    The origin is the image's centre, y points down, and 1.0 is half the shorter side.
    """
    height, width, _ = image_shape
    half = min(height, width) / 2.0
    x = (np.arange(width) + 0.5 - width / 2.0) / half
    y = (np.arange(height) + 0.5 - height / 2.0) / half
    xs, ys = np.meshgrid(x, y)
    return xs.astype(np.float32), ys.astype(np.float32)


def standardize(field: tf.Tensor) -> tf.Tensor:
    """Each channel of each image to mean 0 and standard deviation 1."""
    mean, variance = tf.nn.moments(field, axes=[1, 2], keepdims=True)
    return (field - mean) * tf.math.rsqrt(variance + 1e-6)


def _blur_matrix(size: int, sigma: tf.Tensor) -> tf.Tensor:
    """Row-normalised Gaussian kernels `[n, size, size]` for widths `[n]` in pixels."""
    position = tf.range(size, dtype=tf.float32)
    squared = tf.square(position[:, None] - position[None, :])
    kernel = tf.exp(-squared[None] / (2.0 * tf.square(sigma)[:, None, None]))
    return kernel / tf.reduce_sum(kernel, axis=-1, keepdims=True)


def smooth_field(
    draws: Draws,
    image_shape: tuple[int, int, int],
    *,
    smoothness: tuple[float, float],
    channels: int | None = None,
) -> tf.Tensor:
    """White noise under a random, possibly lopsided, Gaussian blur.

    Args:
        draws: Source of randomness.
        image_shape: Shape of one image.
        smoothness: Range of the blur's standard deviation, in pixels of a 28 x 28
            image; height and width draw their own.
        channels: Number of channels, by default the image's.

    Returns:
        Standardised fields, float32 `[n, height, width, channels]`.
    """
    height, width, image_channels = image_shape
    scale = pixel_scale(image_shape)
    low, high = smoothness[0] * scale, smoothness[1] * scale
    noise = draws.normal(channels or image_channels, height, width)
    rows = _blur_matrix(height, draws.log_uniform(low=low, high=high))[:, None]
    columns = _blur_matrix(width, draws.log_uniform(low=low, high=high))[:, None]
    blurred = rows @ noise @ tf.linalg.matrix_transpose(columns)
    return standardize(tf.transpose(blurred, [0, 2, 3, 1]))


def mix_channels(draws: Draws, field: tf.Tensor, *, spread: float) -> tf.Tensor:
    """Correlates the channels of `[n, h, w, c]` as those of natural images are.

    Every output channel is the first input channel plus `spread` times a random
    mixture of the others; one channel passes unchanged.
    """
    channels = int(field.shape[-1])
    if channels == 1:
        return field
    mixing = spread * draws.normal(1, channels, channels)
    shared = field[..., :1] * tf.ones([channels])
    return standardize(shared + tf.matmul(field, mixing))


def tints(draws: Draws, *shape: int, channels: int, low: float) -> tf.Tensor:
    """Random colours `[n, *shape, channels]`: a common brightness and a random hue."""
    brightness = draws.uniform(*shape, 1, low=low)
    if channels == 1:
        return brightness
    hue = draws.uniform(*shape, channels, low=-0.5, high=0.5)
    saturation = draws.uniform(*shape, 1)
    return tf.clip_by_value(brightness + saturation * hue, 0.0, 1.0)


def stripes(
    draws: Draws, image_shape: tuple[int, int, int], *, frequency: tuple[float, float]
) -> tf.Tensor:
    """Sine waves of random direction, frequency and sharpness.

    Args:
        draws: Source of randomness.
        image_shape: Shape of one image.
        frequency: Range of the number of waves across the image.

    Returns:
        float32 `[n, height, width, 1]` in -1..1.
    """
    xs, ys = grid(image_shape)
    angle = draws.uniform(1, 1, high=np.pi)
    # Upright and level stripes are as common as all slanted ones together.
    level = tf.round(angle * 2.0 / np.pi) * (np.pi / 2.0)
    angle = tf.where(draws.uniform(1, 1) < 0.5, level, angle)
    waves = np.pi * draws.log_uniform(1, 1, low=frequency[0], high=frequency[1])
    phase = draws.uniform(1, 1, high=2.0 * np.pi)
    along = xs * tf.cos(angle) + ys * tf.sin(angle)
    sharpness = draws.log_uniform(1, 1, low=0.7, high=4.0)
    return tf.tanh(sharpness * tf.sin(waves * along + phase))[..., None]
