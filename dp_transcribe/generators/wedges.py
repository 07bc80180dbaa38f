"""Low objects that stand on a sole, bodies with a handle, and cut-out straps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.fields import grid, smooth_field, stripes, tints

_KNOTS = 6


@keras.saving.register_keras_serializable("dp_transcribe")
class Wedges(ProceduralGenerator):
    """Objects that lie on their side, shaded and textured, on black.

    A wedge runs between a smooth top line, which may rise to one end, and a sole; a
    body is a symmetric profile, with or without a handle above it. Stripes may be cut
    out of either, which leaves straps.

    A prior for shoes, bags and other household objects, from public knowledge: no
    image of any data set was used.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        body: Probability of a body instead of a wedge.
        handle: Probability of a handle.
        straps: Probability that stripes are cut out.

    **Privacy**: public, see `ProceduralGenerator`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        body: float = 0.45,
        handle: float = 0.2,
        straps: float = 0.25,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.body = probability("body", body)
        self.handle = probability("handle", handle)
        self.straps = probability("straps", straps)
        self._x, self._y = grid(self.image_shape)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"body": self.body, "handle": self.handle, "straps": self.straps}
        return {**super().get_config(), **own}

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        mask = tf.where(
            draws.chance(self.body, 1, 1) > 0, self._body(draws), self._wedge(draws)
        )
        handle = self._handle(draws) * draws.chance(self.handle, 1, 1)
        mask = tf.maximum(mask, handle)[..., None]
        wave = stripes(draws, self.image_shape, frequency=(1.3, 4.5))
        cut = tf.sigmoid(8.0 * (wave + draws.uniform(1, 1, 1, low=-0.5, high=0.8)))
        straps = draws.chance(self.straps, 1, 1, 1)
        return mask * (1.0 - straps + straps * cut) * self._fill(draws)

    def _inside(self, distance: tf.Tensor) -> tf.Tensor:
        """1 where a signed distance is positive, with an edge one pixel wide."""
        return tf.sigmoid(distance * float(self.image_shape[0]))

    def _curve(
        self, draws: Draws, knots: int, low: float, high: float, size: int
    ) -> tf.Tensor:
        """A smooth random line through `knots` heights, `[n, size]`."""
        heights = draws.uniform(knots, 1, 1, low=low, high=high)
        line = tf.image.resize(heights, [size, 1], "bicubic")
        return line[:, :, 0, 0]

    def _wedge(self, draws: Draws) -> tf.Tensor:
        """Between a top line and a sole, `[n, height, width]`."""
        width = self.image_shape[1]
        top = 0.6 * self._curve(draws, _KNOTS, -0.9, 0.9, width)[:, None]
        top += 0.6 * draws.uniform(1, 1, low=-1.0, high=1.0) * self._x
        sole = draws.uniform(1, 1, low=0.1, high=0.9)
        sole -= self._curve(draws, 4, 0.0, 0.3, width)[:, None]
        mask = self._inside(self._y - top) * self._inside(sole - self._y)
        left = draws.uniform(1, 1, low=-1.0, high=-0.6)
        right = draws.uniform(1, 1, low=0.6, high=1.0)
        return mask * self._inside(self._x - left) * self._inside(right - self._x)

    def _body(self, draws: Draws) -> tf.Tensor:
        """A profile that is its own mirror image, `[n, height, width]`."""
        half = self._curve(draws, _KNOTS, 0.1, 0.95, self.image_shape[0])[..., None]
        mean = tf.reduce_mean(half, axis=1, keepdims=True)
        half = tf.where(draws.chance(0.6, 1, 1) > 0, (half + 2.0 * mean) / 3.0, half)
        whole = draws.chance(0.5, 1, 1)
        top = -0.95 + (1.0 - whole) * draws.uniform(1, 1, high=0.85)
        bottom = 0.95 - (1.0 - whole) * draws.uniform(1, 1, high=0.85)
        aside = draws.chance(0.2, 1, 1) * draws.uniform(1, 1, low=-0.4, high=0.4)
        mask = self._inside(half - tf.abs(self._x - aside))
        return mask * self._inside(self._y - top) * self._inside(bottom - self._y)

    def _handle(self, draws: Draws) -> tf.Tensor:
        """A thin elliptic ring, `[n, height, width]`."""
        centre = draws.uniform(1, 1, low=-0.6, high=0.2)
        flat = draws.uniform(1, 1, low=0.5, high=2.0)
        squared = np.square(self._x) + flat * tf.square(self._y - centre)
        radius = draws.uniform(1, 1, low=0.3, high=0.7)
        return self._inside(0.06 - tf.abs(tf.sqrt(squared + 1e-6) - radius))

    def _fill(self, draws: Draws) -> tf.Tensor:
        """Colour, shading and stripes, `[n, h, w, c]`."""
        color = tints(draws, 1, 1, channels=self.image_shape[-1], low=0.1)
        shade = 1.0 + 0.0 * color[..., :1]
        for smoothness, strength in (((0.5, 1.0), 0.2), ((1.5, 4.0), 0.35)):
            cloud = smooth_field(
                draws, self.image_shape, smoothness=smoothness, channels=1
            )
            shade += strength * draws.uniform(1, 1, 1) * cloud
        wave = 0.5 + 0.5 * stripes(draws, self.image_shape, frequency=(2.0, 7.0))
        shade *= 1.0 - 0.5 * draws.chance(0.25, 1, 1, 1) * wave
        return color * shade
