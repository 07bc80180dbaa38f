"""Random pen strokes: Bézier curves drawn with a round, anti-aliased pen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import non_negative, probability
from dp_transcribe.generators.base import (
    Draws,
    ProceduralGenerator,
    check_positive_range,
)
from dp_transcribe.generators.fields import pixel_scale, tints

_POINTS_PER_STROKE = 48


def _bernstein(points: int) -> np.ndarray:
    """Weights of the four control points along a cubic curve, `[points, 4]`."""
    t = (np.arange(points, dtype=np.float32) + 0.5)[:, None] / points
    return np.concatenate(
        [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1
    )


@keras.saving.register_keras_serializable("dp_transcribe")
class RandomStrokes(ProceduralGenerator):
    """A few random pen strokes on a black background.

    Each stroke is a cubic Bézier curve that starts at a random place or anywhere on
    the stroke before it. The drawing is scaled to a random extent and centred, as
    written signs are, then drawn with a pen of random width.

    A pixel's ink follows from the sum over curve points of Gaussians, which is a
    product of a row and a column factor; so a whole batch is one matrix product.

    It reads no image. The default extent is the public format of MNIST (a box of 20
    in 28 pixels); the other defaults were chosen by how well students do on training
    images of MNIST that were held out from the teacher.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        strokes: Fewest and most strokes in an image.
        pen_radius: Range of the pen's radius in pixels of a 28 x 28 image.
        extent: Range of the longer side of the drawing, as a fraction of the image.
        connected: Probability that a stroke starts on the stroke before it.
        jitter: Largest distance of the drawing's centre from the image's, as a
            fraction of the image.

    **Privacy**: public, see `ProceduralGenerator`.

    Example:
        >>> generator = RandomStrokes((28, 28, 1))
        >>> tuple(generator.sample(4, seed=(0, 1)).shape)
        (4, 28, 28, 1)
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        strokes: Sequence[int] = (2, 5),
        pen_radius: Sequence[float] = (0.6, 1.3),
        extent: Sequence[float] = (0.68, 0.76),
        connected: float = 0.6,
        jitter: float = 0.06,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        fewest, most = check_positive_range("strokes", strokes)
        self.strokes = (int(fewest), int(most))
        self.pen_radius = check_positive_range("pen_radius", pen_radius)
        self.extent = check_positive_range("extent", extent)
        self.connected = probability("connected", connected)
        self.jitter = non_negative("jitter", jitter)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "strokes": list(self.strokes),
            "pen_radius": list(self.pen_radius),
            "extent": list(self.extent),
            "connected": self.connected,
            "jitter": self.jitter,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        curves, present = self._curves(draws)
        curves = self._place(draws, curves, present)
        ink = self._ink(draws, curves, present)
        channels = self.image_shape[-1]
        return ink[..., None] * tints(draws, 1, 1, channels=channels, low=0.7)

    def _curves(self, draws: Draws) -> tuple[tf.Tensor, tf.Tensor]:
        """Curve points `[n, strokes, points, 2]` and which strokes exist, 0/1."""
        fewest, most = self.strokes
        count = draws.uniform(1, low=float(fewest), high=float(most + 1))
        present = tf.cast(tf.range(1, most + 1, dtype=tf.float32) <= count, tf.float32)
        weights = tf.constant(_bernstein(_POINTS_PER_STROKE))
        curves = [self._one_curve(draws, weights)]
        for _ in range(most - 1):
            curve = self._one_curve(draws, weights)
            curves.append(curve + self._attach(draws, curve, curves[-1]))
        return tf.stack(curves, axis=1), present

    def _one_curve(self, draws: Draws, weights: tf.Tensor) -> tf.Tensor:
        """A random curve `[n, points, 2]` of random overall size."""
        control = draws.uniform(4, 2, low=-1.0) * draws.uniform(1, 1, low=0.5)
        center = draws.uniform(1, 2, low=-0.6, high=0.6)
        # Pulling both ends together makes closed loops common, as in writing.
        closing = draws.chance(0.15, 1, 1)
        ends = closing * (control[:, :1] - control[:, 3:])
        control = tf.concat([control[:, :3], control[:, 3:] + ends], axis=1)
        control *= 1.0 + 0.8 * closing
        return center + tf.einsum("pk,nkd->npd", weights, control)

    def _attach(self, draws: Draws, curve: tf.Tensor, before: tf.Tensor) -> tf.Tensor:
        """The shift `[n, 1, 2]` that lets `curve` start on the curve `before`."""
        last = _POINTS_PER_STROKE - 1
        # Where on it: beyond the ends counts as the end, so ends are common.
        place = draws.uniform(low=-0.3, high=1.5) * last
        place = tf.cast(tf.clip_by_value(place, 0.0, float(last)), tf.int32)
        start = tf.gather(before, place, axis=1, batch_dims=1)[:, None]
        return draws.chance(self.connected, 1, 1) * (start - curve[:, :1])

    def _place(self, draws: Draws, curves: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """Scales and centres the drawing; returns pixel coordinates."""
        height, width, _ = self.image_shape
        exists = present[:, :, None, None] > 0
        top = tf.reduce_max(tf.where(exists, curves, -1e9), axis=[1, 2], keepdims=True)
        bottom = tf.reduce_min(tf.where(exists, curves, 1e9), [1, 2], keepdims=True)
        # A slim drawing keeps its shape instead of being blown up without bound.
        longest = tf.maximum(tf.reduce_max(top - bottom, axis=-1, keepdims=True), 0.3)
        side = float(min(height, width))
        low, high = self.extent
        size = side * draws.uniform(1, 1, 1, low=low, high=high)
        shift = side * self.jitter * draws.uniform(1, 1, 2, low=-1.0)
        center = tf.constant([width / 2.0, height / 2.0]) + shift
        return center + (curves - (top + bottom) / 2.0) * size / longest

    def _ink(self, draws: Draws, curves: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """How much of each pixel the pen covers, `[n, height, width]` in 0..1."""
        height, width, _ = self.image_shape
        low, high = (r * pixel_scale(self.image_shape) for r in self.pen_radius)
        radius = draws.log_uniform(1, 1, low=low, high=high)
        pen = radius * draws.uniform(self.strokes[1], 1, low=0.8, high=1.2)
        steps = tf.norm(curves[:, :, 1:] - curves[:, :, :-1], axis=-1)
        length = tf.concat([steps, steps[:, :, -1:]], axis=-1)
        # Where points lie far apart the pen widens, lest they show as beads.
        pen = tf.maximum(pen, length / 2.4)
        # Weighted by arc length, a long straight stroke sums to exp(-d^2 / 2 pen^2).
        weight = length / (pen * np.sqrt(2.0 * np.pi)) * present[:, :, None]
        rows = self._profile(curves[..., 1], pen, height) * weight[..., None]
        columns = self._profile(curves[..., 0], pen, width)
        points = self.strokes[1] * _POINTS_PER_STROKE
        field = tf.matmul(
            tf.reshape(rows, [-1, points, height]),
            tf.reshape(columns, [-1, points, width]),
            transpose_a=True,
        )
        distance = tf.sqrt(tf.nn.relu(-2.0 * tf.math.log(field + 1e-9)))
        # From an edge of one pixel to one as soft as that of a rescaled scan.
        sharpness = draws.uniform(1, 1, low=0.5)
        return tf.clip_by_value(sharpness * radius * (1.0 - distance) + 0.5, 0.0, 1.0)

    @staticmethod
    def _profile(position: tf.Tensor, pen: tf.Tensor, size: int) -> tf.Tensor:
        """One axis of the Gaussians, `[n, strokes, points, size]`."""
        pixels = tf.range(size, dtype=tf.float32) + 0.5
        offset = (position[..., None] - pixels) / pen[..., None]
        return tf.exp(-0.5 * tf.square(offset))
