"""Upright figures with limbs on black: torsos with arms, and pairs of legs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.fields import grid, smooth_field, stripes, tints


@keras.saving.register_keras_serializable("dp_transcribe")
class Figures(ProceduralGenerator):
    """Mirror-symmetric upright objects, shaded and textured, on black.

    A figure is a torso between two smooth edges, with or without a pair of arms and a
    cut-out at the neck, or a pair of legs under a waist; then shading, stripes, a
    panel, a seam along the middle.

    A prior for images of clothes and of people: it knows that such objects stand
    upright, are their own mirror image and have limbs. That is public knowledge; no
    image of any data set was used.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        legs: Probability of a pair of legs instead of a torso.
        arms: Probability that a torso has arms.

    **Privacy**: public, see `ProceduralGenerator`.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        legs: float = 0.25,
        arms: float = 0.65,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.legs = probability("legs", legs)
        self.arms = probability("arms", arms)
        self._x, self._y = grid(self.image_shape)
        self._edge = float(self.image_shape[0])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "legs": self.legs, "arms": self.arms}

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        with_legs = draws.chance(self.legs, 1, 1)
        torso, trousers = self._torso(draws), self._trousers(draws)
        mask = with_legs * trousers + (1.0 - with_legs) * torso
        return mask[..., None] * self._fill(draws)

    def _inside(self, distance: tf.Tensor) -> tf.Tensor:
        """1 where a signed distance is positive, with an edge one pixel wide."""
        return tf.sigmoid(distance * self._edge)

    def _torso(self, draws: Draws) -> tf.Tensor:
        """Torso, arms and neck, `[n, height, width]`."""
        top = -0.97 + draws.chance(0.3, 1, 1) * draws.uniform(1, 1, high=0.75)
        half = self._half_width(draws)
        mask = self._inside(half - np.abs(self._x)) * self._inside(self._y - top)
        bottom = 0.97 - draws.chance(0.3, 1, 1) * draws.uniform(1, 1, high=0.65)
        mask *= self._inside(bottom - self._y)
        arms = self._arms(draws) * draws.uniform(1, 1, low=0.75, high=1.15)
        mask = tf.maximum(mask, arms * draws.chance(self.arms, 1, 1))
        seam = self._inside(0.03 - tf.abs(np.abs(self._x) - half))
        below = self._inside(self._y + 0.6)
        mask *= 1.0 - seam * below * draws.uniform(1, 1, high=0.7)
        return mask * (1.0 - self._neck(draws, top))

    def _half_width(self, draws: Draws) -> tf.Tensor:
        """Half width of the torso at every height, `[n, height, 1]`."""
        down = (self._y[:, :1] + 1.0) / 2.0
        shoulder, hem = (draws.uniform(1, 1, low=0.2, high=0.7) for _ in range(2))
        waist = draws.uniform(1, 1, low=-0.15, high=0.1) * 4.0 * down * (1.0 - down)
        wobble = 0.02 * draws.normal(1, 1) * np.sin(3.0 * np.pi * down)
        return shoulder * (1.0 - down) + hem * down + waist + wobble

    def _limb(
        self,
        draws: Draws,
        start: tuple[tuple[float, float], tuple[float, float]],
        end: tuple[tuple[float, float], tuple[float, float]],
        radius: tuple[float, float],
    ) -> tf.Tensor:
        """A mirrored, tapered capsule, `[n, height, width]`.

        Args:
            draws: Source of randomness.
            start: Ranges of x and y of one end.
            end: Ranges of x and y of the other end.
            radius: Range of the radius at the start.
        """
        places = (*start, *end, radius)
        ax, ay, bx, by, r = (draws.uniform(1, 1, low=a, high=b) for a, b in places)
        taper = draws.uniform(1, 1, low=0.5, high=1.1)
        x, dx, dy = np.abs(self._x), bx - ax, by - ay
        along = ((x - ax) * dx + (self._y - ay) * dy) / (dx * dx + dy * dy + 1e-6)
        t = tf.clip_by_value(along, 0.0, 1.0)
        squared = tf.square(x - ax - t * dx) + tf.square(self._y - ay - t * dy)
        return self._inside(r * (1.0 + (taper - 1.0) * t) - tf.sqrt(squared + 1e-6))

    def _arms(self, draws: Draws) -> tf.Tensor:
        """Short or spread arms, or long ones that hang down."""
        spread = self._limb(
            draws,
            ((0.3, 0.55), (-0.85, -0.55)),
            ((0.5, 0.95), (-0.5, 0.6)),
            (0.1, 0.25),
        )
        hanging = self._limb(
            draws,
            ((0.3, 0.5), (-0.85, -0.55)),
            ((0.55, 0.85), (0.4, 1.0)),
            (0.1, 0.22),
        )
        return tf.where(draws.chance(0.5, 1, 1) > 0, spread, hanging)

    def _neck(self, draws: Draws, top: tf.Tensor) -> tf.Tensor:
        width = draws.uniform(1, 1, low=0.1, high=0.4)
        depth = draws.uniform(1, 1, low=0.05, high=0.5)
        ellipse = tf.square(self._x / width) + tf.square((self._y - top) / depth)
        strength = draws.chance(0.6, 1, 1) * draws.uniform(1, 1, low=0.3, high=1.0)
        return self._inside(1.0 - ellipse) * strength

    def _trousers(self, draws: Draws) -> tf.Tensor:
        """Two legs under a waist, with a gap between them."""
        legs = self._limb(
            draws,
            ((0.1, 0.35), (-0.95, -0.5)),
            ((0.15, 0.5), (0.3, 1.05)),
            (0.1, 0.28),
        )
        waist = self._inside(draws.uniform(1, 1, low=0.15, high=0.45) - np.abs(self._x))
        waist *= self._inside(self._y + 0.97)
        waist *= self._inside(draws.uniform(1, 1, low=-0.9, high=0.0) - self._y)
        gap = self._inside(draws.uniform(1, 1, high=0.06) - np.abs(self._x))
        gap *= self._inside(self._y - draws.uniform(1, 1, low=-0.7, high=0.3))
        return tf.maximum(legs, waist) * (1.0 - gap)

    def _fill(self, draws: Draws) -> tf.Tensor:
        """Colour, shading, stripes, a panel and a middle seam, `[n, h, w, c]`."""
        color = tints(draws, 1, 1, channels=self.image_shape[-1], low=0.15)
        shade = 1.0 + 0.0 * color[..., :1]
        for smoothness in ((0.5, 1.0), (1.5, 3.0), (4.0, 8.0)):
            cloud = smooth_field(
                draws, self.image_shape, smoothness=smoothness, channels=1
            )
            shade += 0.25 * draws.uniform(1, 1, 1) * draws.chance(0.6, 1, 1, 1) * cloud
        wave = 0.5 + 0.5 * stripes(draws, self.image_shape, frequency=(1.5, 7.0))
        striped = draws.chance(0.3, 1, 1, 1) * draws.uniform(
            1, 1, 1, low=-0.4, high=0.7
        )
        shade *= 1.0 - striped * wave
        shade *= 1.0 - self._panel(draws)[..., None]
        return color * shade

    def _panel(self, draws: Draws) -> tf.Tensor:
        """A lighter or darker upright panel and a thin line, `[n, height, width]`."""
        centre = draws.uniform(1, 1, low=-0.25, high=0.25)
        width = draws.uniform(1, 1, low=0.02, high=0.35)
        panel = self._inside(width - tf.abs(self._x - centre))
        panel *= self._inside(self._y - draws.uniform(1, 1, low=-1.0, high=0.0))
        panel *= self._inside(draws.uniform(1, 1) - self._y)
        panel *= draws.chance(0.4, 1, 1) * draws.uniform(1, 1, low=-0.5, high=0.9)
        middle = draws.uniform(1, 1, low=-0.1, high=0.1)
        line = self._inside(0.03 - tf.abs(self._x - middle))
        line *= draws.chance(0.35, 1, 1) * draws.uniform(1, 1, high=0.8)
        return panel + line
