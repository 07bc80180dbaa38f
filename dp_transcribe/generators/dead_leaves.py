"""Dead leaves: random shapes that fall on and cover each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import positive_int, probability
from dp_transcribe.generators.base import (
    Draws,
    ProceduralGenerator,
    check_positive_range,
)
from dp_transcribe.generators.fields import grid, tints

_POLYGON_SIDES = 4
_Outline = Callable[[Draws, tf.Tensor, tf.Tensor], tf.Tensor]


@keras.saving.register_keras_serializable("dp_transcribe")
class DeadLeaves(ProceduralGenerator):
    """Ovals, rectangles and polygons of random size that occlude one another.

    Sizes follow the scale-free law of the dead leaves model (density of the radius
    as its inverse cube), so few leaves are large and many small.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        rounds: How often leaves fall on an image: one oval, one rectangle and one
            polygon in each round.
        radius: Smallest and largest radius, as a fraction of half the shorter side.
        texture: Probability that a leaf is striped instead of plain.
        background: Probability that the ground stays black, and each leaf with it
            falls near the centre: a pile of leaves on black.

    **Privacy**: public, see `ProceduralGenerator`.

    References:
        Lee, Mumford and Huang 2001; Baradad et al. 2021, arXiv:2106.05963.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        rounds: int = 8,
        radius: Sequence[float] = (0.15, 1.2),
        texture: float = 0.3,
        background: float = 0.5,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.rounds = positive_int("rounds", rounds)
        self.radius = check_positive_range("radius", radius)
        self.texture = probability("texture", texture)
        self.background = probability("background", background)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "rounds": self.rounds,
            "radius": list(self.radius),
            "texture": self.texture,
            "background": self.background,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        height, width, channels = self.image_shape
        black = draws.chance(self.background, 1, 1)
        ground = tints(draws, 1, 1, channels=channels, low=0.0)
        image = (1.0 - black[..., None]) * ground * tf.ones([height, width, 1])
        seed = draws.seed()

        def fall(index: tf.Tensor, image: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            draws_of_round = Draws(draws.n, tf.random.fold_in(seed, index))
            return index + 1, self._round(draws_of_round, image, black)

        # A loop in the graph rather than of graph nodes, which take long to trace.
        state = (tf.constant(0), image)
        return tf.while_loop(lambda index, _: index < self.rounds, fall, state)[1]

    def _round(self, draws: Draws, image: tf.Tensor, black: tf.Tensor) -> tf.Tensor:
        """The image after a leaf of each kind has fallen on it."""
        channels = self.image_shape[-1]
        for outline in (self._oval, self._rectangle, self._polygon):
            cover, shade = self._leaf(draws, outline, black)
            color = tints(draws, 1, 1, channels=channels, low=0.0)
            image += cover[..., None] * (color * shade[..., None] - image)
        return image

    def _leaf(
        self, draws: Draws, outline: _Outline, black: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """What a leaf covers and how bright it is there, each `[n, h, w]` in 0..1."""
        xs, ys = grid(self.image_shape)
        # On black the leaves make a pile: small ones, in the middle of the image.
        radius = self._radius(draws) * (1.0 - 0.35 * black)
        center = draws.uniform(2, 1, 1, low=-1.0) * (1.2 - 0.75 * black)[:, None]
        angle = draws.uniform(1, 1, high=2.0 * np.pi)
        stretch = draws.log_uniform(1, 1, low=0.5, high=2.0)
        cosine, sine = tf.cos(angle), tf.sin(angle)
        x, y = xs - center[:, 0], ys - center[:, 1]
        u = (cosine * x + sine * y) / (radius * stretch)
        v = (cosine * y - sine * x) / (radius / stretch)
        pixels = 0.5 * min(self.image_shape[:2]) * radius
        edge = (1.0 - outline(draws, u, v)) * pixels
        cover = tf.clip_by_value(edge + 0.5, 0.0, 1.0)
        return cover, self._texture(draws, u)

    def _radius(self, draws: Draws) -> tf.Tensor:
        """Radii `[n, 1, 1]` of density proportional to the inverse cube."""
        small, large = (1.0 / np.square(r) for r in self.radius)
        return tf.math.rsqrt(small + (large - small) * draws.uniform(1, 1))

    def _texture(self, draws: Draws, u: tf.Tensor) -> tf.Tensor:
        striped = draws.chance(self.texture, 1, 1)
        frequency = draws.uniform(1, 1, low=2.0, high=9.0)
        wave = 0.5 + 0.5 * tf.sin(frequency * u)
        return 1.0 - striped * draws.uniform(1, 1, low=0.3) * wave

    @staticmethod
    def _oval(draws: Draws, u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        del draws
        return tf.sqrt(tf.square(u) + tf.square(v))

    @staticmethod
    def _rectangle(draws: Draws, u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        del draws
        return tf.maximum(tf.abs(u), tf.abs(v))

    @staticmethod
    def _polygon(draws: Draws, u: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        """The largest of several half-plane distances: a convex polygon."""
        level = tf.zeros_like(u)
        for side in range(_POLYGON_SIDES):
            turn = (side + draws.uniform(1, 1, high=0.9)) * 2.0 * np.pi / _POLYGON_SIDES
            level = tf.maximum(level, u * tf.cos(turn) + v * tf.sin(turn))
        return level
