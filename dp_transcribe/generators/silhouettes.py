"""Shaded, textured shapes on black: objects without any idea of which objects."""

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
from dp_transcribe.generators.fields import grid, smooth_field, stripes, tints

_KNOTS = 9  # corners of a profile from one end of the object to the other
_HARMONICS = 7


@keras.saving.register_keras_serializable("dp_transcribe")
class Silhouettes(ProceduralGenerator):
    """Random outlines, centred on black, filled with shading and texture.

    Half of the outlines are profiles: a left and a right edge that run as random
    polygons from one end of the object to the other, some with a gap in the middle
    and some lying on their side. The others are closed curves around the centre.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        symmetry: Probability that an outline is its own mirror image.
        extent: Range of the object's half height and half width, as a fraction of
            half the image.
        shading: Largest strength of the smooth shading.
        striped: Probability that the object is striped.

    **Privacy**: public, see `ProceduralGenerator`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        symmetry: float = 0.6,
        extent: Sequence[float] = (0.45, 1.0),
        shading: float = 0.5,
        striped: float = 0.35,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.symmetry = probability("symmetry", symmetry)
        self.extent = check_positive_range("extent", extent)
        self.shading = non_negative("shading", shading)
        self.striped = probability("striped", striped)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "symmetry": self.symmetry,
            "extent": list(self.extent),
            "shading": self.shading,
            "striped": self.striped,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        symmetric = draws.chance(self.symmetry, 1)
        upright = self._profile(draws, symmetric)
        blob = self._blob(draws, symmetric)
        level = tf.where(draws.uniform(1, 1) < 0.65, upright, blob)
        pixels = 0.5 * min(self.image_shape[:2])
        cover = tf.clip_by_value(level * pixels + 0.5, 0.0, 1.0)
        return cover[..., None] * self._fill(draws, level)

    def _profile(self, draws: Draws, symmetric: tf.Tensor) -> tf.Tensor:
        """Signed distance to a pair of edges, positive inside, `[n, h, w]`."""
        xs, ys = grid(self.image_shape)
        low, high = self.extent
        # Lying objects: the two axes trade places. Mirrored ones stand upright.
        lying = draws.chance(0.5, 1) * (1.0 - symmetric)
        along = tf.where(lying[..., None] > 0, xs, ys)
        across = tf.where(lying[..., None] > 0, ys, xs)
        length = draws.uniform(1, 1, low=low, high=high)
        width = draws.uniform(1, low=0.2, high=high)
        # Interpolating between knots: a matrix product for each image's own length.
        knots = tf.linspace(-1.0, 1.0, _KNOTS)
        offset = tf.abs(along[..., None] / length[..., None] - knots)
        hats = tf.nn.relu(1.0 - offset * (_KNOTS - 1) / 2.0)
        right = width * self._edge(draws)
        left = symmetric * right + (1.0 - symmetric) * width * self._edge(draws)
        right = tf.einsum("nhwk,nk->nhw", hats, right)
        left = tf.einsum("nhwk,nk->nhw", hats, left)
        inside = tf.minimum(right - across, across + left)
        inside = tf.minimum(inside, length - tf.abs(along))
        return tf.minimum(inside, self._gap(draws, along / length, across))

    def _edge(self, draws: Draws) -> tf.Tensor:
        """Distances of an edge from the axis at its knots, `[n, knots]`."""
        rough = draws.uniform(_KNOTS, low=0.25, high=1.0)
        plain = draws.uniform(1, low=0.4, high=1.0)
        slope = draws.uniform(1, low=-0.4, high=0.4) * tf.linspace(-1.0, 1.0, _KNOTS)
        # From straight edges to ragged ones.
        roughness = draws.uniform(1)
        return roughness * rough + (1.0 - roughness) * (plain + slope)

    def _gap(self, draws: Draws, along: tf.Tensor, across: tf.Tensor) -> tf.Tensor:
        """Signed distance to wedges cut into one end, positive outside of them.

        One wedge in the middle, or a mirrored pair of them to either side.
        """
        open_end = draws.chance(0.5, 1, 1)
        aside = draws.chance(0.5, 1, 1) * draws.uniform(1, 1, low=0.15, high=0.6)
        end = tf.sign(draws.uniform(1, 1, low=-0.5, high=0.5))
        depth = draws.uniform(1, 1, high=1.6)
        spread = draws.uniform(1, 1, low=0.02, high=0.3)
        wedge = spread * tf.nn.tanh(3.0 * (end * along - 1.0 + depth))
        return (
            tf.abs(tf.abs(across) - aside) - wedge * open_end + 2.0 * (1.0 - open_end)
        )

    def _blob(self, draws: Draws, symmetric: tf.Tensor) -> tf.Tensor:
        """Signed distance to a closed curve, positive inside, `[n, h, w]`."""
        xs, ys = grid(self.image_shape)
        low, high = self.extent
        size = draws.uniform(2, 1, 1, low=low, high=high)
        angle = np.arctan2(xs, ys)  # from the vertical: cosines are mirror-symmetric
        orders = np.arange(1, _HARMONICS + 1, dtype=np.float32)
        phases = orders[:, None] * angle.reshape(1, -1)
        falling = draws.uniform(1, low=0.1, high=0.5) / orders**0.7
        cosines = draws.normal(_HARMONICS) * falling
        sines = draws.normal(_HARMONICS) * falling * (1.0 - symmetric)
        wobble = tf.matmul(cosines, np.cos(phases)) + tf.matmul(sines, np.sin(phases))
        wobble = tf.reshape(tf.tanh(wobble), [-1, *self.image_shape[:2]])
        radius = tf.sqrt(tf.square(xs / size[:, 0]) + tf.square(ys / size[:, 1]))
        scale = tf.minimum(size[:, 0], size[:, 1])
        return scale * (0.85 + 0.55 * wobble - radius)

    def _fill(self, draws: Draws, level: tf.Tensor) -> tf.Tensor:
        """Colour, shading, stripes and a rim, `[n, h, w, c]`."""
        channels = self.image_shape[-1]
        color = tints(draws, 1, 1, channels=channels, low=0.25)
        cloud = smooth_field(draws, self.image_shape, smoothness=(0.7, 6.0), channels=1)
        strength = self.shading * tf.square(draws.uniform(1, 1, 1))
        shade = 1.0 + strength * cloud
        wave = stripes(draws, self.image_shape, frequency=(1.5, 12.0))
        striped = draws.chance(self.striped, 1, 1, 1) * draws.uniform(1, 1, 1)
        shade *= 1.0 - striped * (0.5 + 0.5 * wave)
        rim = draws.uniform(1, 1, 1, low=-0.6, high=0.6)
        shade *= 1.0 + rim * tf.exp(-8.0 * tf.nn.relu(level))[..., None]
        return tf.clip_by_value(color * shade, 0.0, 1.0)
