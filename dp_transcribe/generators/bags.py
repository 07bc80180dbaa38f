"""Bags: a box with a flap, a clasp and handles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe._validate import non_negative, probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.outlines import cloth, cover, crumpled_grid


@keras.saving.register_keras_serializable("dp_transcribe")
class Bags(ProceduralGenerator):
    """Bags on black: a rounded trapezoid with a handle arc, a flap and a clasp.

    The object is centred and fills the image in one direction, as cropped product
    photos do. What is drawn is general knowledge of bags. It reads no image; its
    default ranges were chosen as those of `Garments`.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        handles: Probability of a handle.
        flaps: Probability of a flap.
        patterned: Probability of stripes; half as many have a print.
        crumpled: Largest displacement of an outline, as a fraction of half the image.

    **Privacy**: public, see `ProceduralGenerator`. What is taken as known is that
    the domain shows bags.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        handles: float = 0.75,
        flaps: float = 0.5,
        patterned: float = 0.3,
        crumpled: float = 0.2,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.handles = probability("handles", handles)
        self.flaps = probability("flaps", flaps)
        self.crumpled = non_negative("crumpled", crumpled)
        self.patterned = probability("patterned", patterned)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "handles": self.handles,
            "flaps": self.flaps,
            "crumpled": self.crumpled,
            "patterned": self.patterned,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        xs, ys = crumpled_grid(draws, self.image_shape, crumpled=self.crumpled)
        has_handle = draws.chance(self.handles, 1, 1)
        rise = has_handle * draws.uniform(1, 1, low=0.1, high=1.0)
        height = draws.uniform(1, 1, low=0.5, high=1.9)
        height = tf.minimum(height, 1.93 - rise)
        top = rise - (rise + height) / 2.0  # where the body begins
        width = draws.uniform(1, 1, low=0.55, high=0.97)
        body = cover(self._body(draws, xs, ys, top, height, width), self.image_shape)
        body *= self._flap(draws, xs, ys, top, height)
        handle = has_handle * self._handle(draws, xs, ys, top, rise, width)
        shape = tf.maximum(body, handle)
        return shape[..., None] * cloth(
            draws, self.image_shape, patterned=self.patterned
        )

    def _body(
        self,
        draws: Draws,
        xs: tf.Tensor,
        ys: tf.Tensor,
        top: tf.Tensor,
        height: tf.Tensor,
        width: tf.Tensor,
    ) -> tf.Tensor:
        """Signed distance to a rounded trapezoid, positive inside, `[n, h, w]`."""
        taper = draws.uniform(1, 1, low=-0.3, high=0.15)
        down = tf.clip_by_value((ys - top) / height, 0.0, 1.0)
        lean = width + taper * tf.abs(down - tf.cast(taper < 0, tf.float32))
        corner = draws.uniform(1, 1, high=0.3)
        across = tf.abs(xs) - tf.minimum(lean, 0.97) + corner
        vertical = tf.abs(ys - top - height / 2.0) - height / 2.0 + corner
        outside = tf.square(tf.nn.relu(across)) + tf.square(tf.nn.relu(vertical))
        inside = tf.minimum(tf.maximum(across, vertical), 0.0)
        return corner - tf.sqrt(outside + 1e-6) - inside

    def _flap(
        self,
        draws: Draws,
        xs: tf.Tensor,
        ys: tf.Tensor,
        top: tf.Tensor,
        height: tf.Tensor,
    ) -> tf.Tensor:
        """A flap of another brightness, its edge and a clasp, a factor `[n, h, w]`."""
        sag = draws.uniform(1, 1, low=-0.3, high=0.3) * tf.square(xs)
        edge = top + height * draws.uniform(1, 1, low=0.05, high=0.8) - sag
        shade = draws.uniform(1, 1, low=-0.4, high=0.5) * cover(
            edge - ys, self.image_shape
        )
        line = cover(0.03 - tf.abs(ys - edge), self.image_shape)
        shade += draws.uniform(1, 1, high=0.8) * line
        half = draws.uniform(1, 1, low=0.03, high=0.15)
        clasp = tf.minimum(half - tf.abs(xs), half - tf.abs(ys - edge))
        shade += draws.uniform(1, 1, low=-0.8, high=0.8) * cover(
            clasp, self.image_shape
        )
        return 1.0 - draws.chance(self.flaps, 1, 1) * tf.clip_by_value(shade, -1.0, 1.0)

    def _handle(
        self,
        draws: Draws,
        xs: tf.Tensor,
        ys: tf.Tensor,
        top: tf.Tensor,
        rise: tf.Tensor,
        width: tf.Tensor,
    ) -> tf.Tensor:
        """An arc over the body, `[n, h, w]` in 0..1; some hang down over it."""
        half = width * draws.uniform(1, 1, low=0.3, high=0.95)
        thick = draws.uniform(1, 1, low=0.03, high=0.12)
        rise = rise - thick
        power = draws.uniform(1, 1, low=1.0, high=3.0)
        across = tf.pow(tf.abs(xs / half) + 1e-6, power)
        up = tf.pow(tf.nn.relu((top - ys) / tf.maximum(rise, 0.05)) + 1e-6, power)
        radius = tf.pow(across + up, 1.0 / power)
        ring = thick - tf.abs(1.0 - radius) * tf.minimum(half, tf.maximum(rise, 0.05))
        below = draws.chance(0.25, 1, 1) * draws.uniform(1, 1, high=0.6)
        ring = tf.minimum(ring, top + 0.05 + below - ys)
        return cover(ring, self.image_shape) * draws.uniform(1, 1, low=0.4)
