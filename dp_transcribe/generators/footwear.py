"""Shoes, boots and sandals seen from the side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe._validate import non_negative, probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.fields import stripes
from dp_transcribe.generators.outlines import (
    cloth,
    cover,
    crumpled_grid,
    through_knots,
)

_KNOTS = 7  # places from toe to heel at which the upper's height is drawn


@keras.saving.register_keras_serializable("dp_transcribe")
class Footwear(ProceduralGenerator):
    """Side views of shoes on black: a sole, a heel, an upper, perhaps a shaft.

    The upper's height runs through random knots from the toe to the heel. Boots add
    a shaft over the heel, heeled shoes lift the sole, sandals keep only straps. The
    object is as wide as the image and centred, as cropped product photos are. What is
    drawn is general knowledge of shoes. It reads no image; its default ranges were
    chosen as those of `Garments`.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        facing_left: Probability that the toe is on the left, the usual side in
            product photos.
        boots: Probability of a shaft.
        heels: Probability of a raised heel.
        straps: Probability that the upper consists of straps.
        patterned: Probability of stripes; half as many have a print.
        crumpled: Largest displacement of an outline, as a fraction of half the image.

    **Privacy**: public, see `ProceduralGenerator`. What is taken as known is that
    the domain shows shoes.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        facing_left: float = 0.85,
        boots: float = 0.4,
        heels: float = 0.45,
        straps: float = 0.35,
        patterned: float = 0.2,
        crumpled: float = 0.2,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.facing_left = probability("facing_left", facing_left)
        self.boots = probability("boots", boots)
        self.heels = probability("heels", heels)
        self.straps = probability("straps", straps)
        self.crumpled = non_negative("crumpled", crumpled)
        self.patterned = probability("patterned", patterned)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "facing_left": self.facing_left,
            "boots": self.boots,
            "heels": self.heels,
            "straps": self.straps,
            "crumpled": self.crumpled,
            "patterned": self.patterned,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        xs, ys = crumpled_grid(draws, self.image_shape, crumpled=self.crumpled)
        lift, raised = self._lift(draws, xs)
        upper = self._upper(draws, xs)
        total = tf.reduce_max(lift + upper, axis=[1, 2], keepdims=True)
        ground = tf.minimum(total, 1.93) / 2.0
        upper = tf.minimum(upper, 1.93 - lift)
        shape = self._shoe(draws, xs, ground - ys, lift, upper, raised)
        flip = draws.chance(1.0 - self.facing_left, 1, 1)
        shape = tf.where(flip > 0, shape[:, :, ::-1], shape)
        return shape[..., None] * cloth(
            draws, self.image_shape, patterned=self.patterned
        )

    def _cover(self, level: tf.Tensor) -> tf.Tensor:
        return cover(level, self.image_shape)

    def _lift(self, draws: Draws, xs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Height of the sole above the ground `[n, h, w]`, at the heel `[n, 1, 1]`."""
        raised = draws.chance(self.heels, 1, 1)
        raised *= draws.uniform(1, 1, low=0.1, high=0.75)
        ball = draws.uniform(1, 1, low=-0.7, high=0.2)
        rise = tf.clip_by_value((xs - ball) / (0.8 - ball), 0.0, 1.0)
        return raised * tf.square(rise) * (3.0 - 2.0 * rise), raised

    def _upper(self, draws: Draws, xs: tf.Tensor) -> tf.Tensor:
        """Height of the upper above the sole, `[n, h, w]`."""
        slope = tf.linspace(0.0, 1.0, _KNOTS)
        toe = draws.uniform(1, low=0.15, high=0.5)
        heel = draws.uniform(1, low=0.2, high=1.1)
        bulge = draws.uniform(1, low=-0.2, high=0.3) * 4.0 * slope * (1.0 - slope)
        knots = toe + (heel - toe) * slope + bulge + 0.05 * draws.normal(_KNOTS)
        low = through_knots(tf.nn.relu(knots - 0.06) + 0.06, xs)
        front = draws.uniform(1, 1, low=-0.4, high=0.5)
        lean = draws.uniform(1, 1, low=0.01, high=0.09)
        shaft = draws.uniform(1, 1, low=0.7, high=1.9)
        shaft *= tf.sigmoid((xs - front) / lean)
        return tf.maximum(low, draws.chance(self.boots, 1, 1) * shaft)

    def _shoe(
        self,
        draws: Draws,
        xs: tf.Tensor,
        height: tf.Tensor,
        lift: tf.Tensor,
        upper: tf.Tensor,
        raised: tf.Tensor,
    ) -> tf.Tensor:
        """Sole, heel and upper together, details included, `[n, h, w]` in 0..1."""
        right = draws.uniform(1, 1, low=0.6, high=1.0) - xs
        ends = tf.minimum(xs + 0.97, right)
        above = height - lift  # above the underside of the sole
        inside = tf.minimum(tf.minimum(above, upper - above), ends)
        thick = draws.uniform(1, 1, low=0.03, high=0.25)
        sole = self._cover(tf.minimum(tf.minimum(above, thick - above), ends))
        body = self._cover(inside) * self._cuts(draws)
        body *= self._opening(draws, xs, upper - above)
        shade = draws.uniform(1, 1, low=0.3, high=1.2)
        shoe = body + sole * (tf.minimum(shade, 1.0) - body)
        level = self._heel(draws, right, height, lift)
        heel = tf.where(raised > 0, self._cover(level), 0.0)
        return tf.maximum(shoe, heel * draws.uniform(1, 1, low=0.4))

    def _heel(
        self, draws: Draws, right: tf.Tensor, height: tf.Tensor, lift: tf.Tensor
    ) -> tf.Tensor:
        """Signed distance to a post or wedge from the lifted sole to the ground."""
        width = draws.uniform(1, 1, low=0.06, high=0.4)
        wedge = draws.chance(0.25, 1, 1)
        post = tf.minimum(right, width - right)
        across = tf.where(wedge > 0, right, post)
        return tf.minimum(across, tf.minimum(height, lift + 0.05 - height))

    def _cuts(self, draws: Draws) -> tf.Tensor:
        """Gaps between straps, a factor `[n, h, w]`."""
        wave = stripes(draws, self.image_shape, frequency=(1.0, 4.5))[..., 0]
        gaps = tf.sigmoid(8.0 * (wave + draws.uniform(1, 1, low=-0.6, high=0.8)))
        return 1.0 - draws.chance(self.straps, 1, 1) * gaps

    def _opening(self, draws: Draws, xs: tf.Tensor, below: tf.Tensor) -> tf.Tensor:
        """The dark inside of a shoe, seen at its top edge, a factor `[n, h, w]`."""
        center = draws.uniform(1, 1, low=0.1, high=0.7)
        width = draws.uniform(1, 1, low=0.15, high=0.5)
        depth = draws.uniform(1, 1, low=0.05, high=0.4)
        across = tf.square((xs - center) / width)
        level = 1.0 - across - tf.square(below / depth)
        strength = draws.chance(0.6, 1, 1) * draws.uniform(1, 1)
        return 1.0 - strength * self._cover(0.2 * level)
