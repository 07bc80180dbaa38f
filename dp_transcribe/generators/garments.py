"""Clothes for the upper body and the legs: upright, mirrored, with limbs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import non_negative, probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.outlines import (
    bar,
    cloth,
    cover,
    crumpled_grid,
    through_knots,
)

_KNOTS = 6  # places at which a torso's width is drawn


@keras.saving.register_keras_serializable("dp_transcribe")
class Garments(ProceduralGenerator):
    """Laid-out clothes on black: a torso with mirrored sleeves, or two trouser legs.

    Torsos have a random outline, some a neckline, seams, a button placket or an open
    front; sleeves are short or long; all of it is crumpled at random. What is drawn is
    general knowledge of clothes (upright, mirrored, cropped to the image). It reads no
    image; its default ranges were chosen by how well students do on training images
    of Fashion-MNIST that were held out from the teacher.

    Args:
        image_shape: `(height, width, channels)`.
        output_range: Lowest and highest pixel value.
        trousers: Probability of trousers instead of a torso.
        sleeves: Probability that a torso has sleeves.
        long_sleeves: Probability that sleeves are long.
        necklines: Probability that a torso has a neckline cut out.
        fronts: Probability of an open front, and that of a button placket.
        patterned: Probability of stripes; half as many have a print.
        crumpled: Largest displacement of an outline, as a fraction of half the image.

    **Privacy**: public, see `ProceduralGenerator`. What is taken as known is that
    the domain shows clothes.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        output_range: Sequence[float] = (0.0, 1.0),
        trousers: float = 0.15,
        sleeves: float = 0.9,
        long_sleeves: float = 0.75,
        necklines: float = 0.9,
        fronts: float = 0.65,
        patterned: float = 0.25,
        crumpled: float = 0.25,
    ) -> None:
        super().__init__(image_shape, output_range=output_range)
        self.trousers = probability("trousers", trousers)
        self.sleeves = probability("sleeves", sleeves)
        self.long_sleeves = probability("long_sleeves", long_sleeves)
        self.necklines = probability("necklines", necklines)
        self.fronts = probability("fronts", fronts)
        self.patterned = probability("patterned", patterned)
        self.crumpled = non_negative("crumpled", crumpled)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "trousers": self.trousers,
            "sleeves": self.sleeves,
            "long_sleeves": self.long_sleeves,
            "necklines": self.necklines,
            "fronts": self.fronts,
            "patterned": self.patterned,
            "crumpled": self.crumpled,
        }

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        legs = draws.chance(self.trousers, 1, 1)
        places = crumpled_grid(draws, self.image_shape, crumpled=self.crumpled)
        shape = tf.where(
            legs > 0, self._trousers(draws, *places), self._top(draws, *places)
        )
        return shape[..., None] * cloth(
            draws, self.image_shape, patterned=self.patterned
        )

    def _top(self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor) -> tf.Tensor:
        """A torso with sleeves, details included, `[n, h, w]` in 0..1."""
        full = draws.chance(0.9, 1, 1)
        upper = -0.97 + (1.0 - full) * draws.uniform(1, 1, high=0.5)
        lower = 0.97 - (1.0 - full) * draws.uniform(1, 1, high=0.5)
        sleeved = draws.chance(self.sleeves, 1, 1)
        knots = self._knots(draws, sleeved[:, :, 0])
        width = through_knots(knots, ys)
        slope = draws.uniform(1, 1, high=0.4)
        yoke = ys - upper - slope * tf.nn.relu(tf.abs(xs) - 0.15)
        torso = tf.minimum(width - tf.abs(xs), tf.minimum(yoke, lower - ys))
        sleeve = self._sleeves(draws, xs, ys, knots[:, :1, None], upper, slope)
        sleeve = tf.where(sleeved > 0, sleeve, -1.0)
        shade = draws.uniform(1, 1, low=0.75, high=1.15)
        body = tf.maximum(self._cover(torso), shade * self._cover(sleeve))
        rim = draws.uniform(1, 1, low=-0.5, high=0.3)
        body *= 1.0 + rim * tf.exp(-12.0 * tf.nn.relu(tf.maximum(torso, sleeve)))
        seam = self._cover(0.03 - tf.abs(tf.abs(xs) - width)) * self._cover(ys + 0.5)
        body *= 1.0 - draws.uniform(1, 1, high=0.7) * seam
        body *= self._neckline(draws, xs, ys, upper) * self._front(draws, xs, ys)
        return body * self._placket(draws, xs, ys) * self._trims(draws, xs, ys, lower)

    def _cover(self, level: tf.Tensor) -> tf.Tensor:
        return cover(level, self.image_shape)

    def _knots(self, draws: Draws, sleeved: tf.Tensor) -> tf.Tensor:
        """Half widths of the torso from the shoulders to the hem, `[n, knots]`."""
        # Sleeveless ones are dresses and tops, narrower and more often flared.
        usual = sleeved * draws.chance(0.9, 1)
        shoulder = draws.uniform(1, low=0.2, high=0.6)
        shoulder += usual * (draws.uniform(1, low=0.34, high=0.58) - shoulder)
        straight = draws.chance(0.3, 1) + 0.7 * usual
        straight = tf.minimum(straight, 1.0)
        flared = draws.uniform(1, low=0.2, high=0.75)
        hem = straight * shoulder * draws.uniform(1, low=0.85, high=1.2)
        hem += (1.0 - straight) * flared
        waist = draws.uniform(1, low=-0.1, high=0.06)
        down = np.linspace(0.0, 1.0, _KNOTS, dtype=np.float32)
        knots = shoulder + (hem - shoulder) * down + waist * 4.0 * down * (1.0 - down)
        return knots + 0.02 * draws.normal(_KNOTS)

    def _sleeves(
        self,
        draws: Draws,
        xs: tf.Tensor,
        ys: tf.Tensor,
        shoulder: tf.Tensor,
        upper: tf.Tensor,
        slope: tf.Tensor,
    ) -> tf.Tensor:
        """Signed distance to a pair of sleeves, long or short, `[n, h, w]`."""
        long = draws.chance(self.long_sleeves, 1, 1)
        thick = draws.uniform(1, 1, low=0.1, high=0.22)
        thin = thick * draws.uniform(1, 1, low=0.5, high=1.0)
        angle = long * draws.uniform(1, 1, low=1.2, high=1.53)
        angle += (1.0 - long) * draws.uniform(1, 1, low=0.1, high=1.3)
        length = long * draws.uniform(1, 1, low=1.0, high=1.7)
        length += (1.0 - long) * draws.uniform(1, 1, low=0.1, high=0.6)
        ax = shoulder - 0.7 * thick
        ay = upper + thick + slope * tf.nn.relu(ax - 0.15)
        bx = tf.minimum(ax + length * tf.cos(angle), 0.97 - thin)
        by = tf.minimum(ay + length * tf.sin(angle), 0.97 - thin)
        return bar(tf.abs(xs), ys, start=(ax, ay), end=(bx, by), thick=thick, thin=thin)

    def _neckline(
        self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor, upper: tf.Tensor
    ) -> tf.Tensor:
        """A round or pointed neckline and its collar, a factor `[n, h, w]`."""
        half = draws.uniform(1, 1, low=0.1, high=0.4)
        pointed = draws.chance(0.4, 1, 1)
        depth = 0.04 + (0.5 + 0.4 * pointed) * tf.square(draws.uniform(1, 1))
        across, down = tf.abs(xs) / half, tf.nn.relu(ys - upper) / depth
        oval = 1.0 - tf.sqrt(tf.square(across) + tf.square(down) + 1e-6)
        level = tf.minimum(half, depth) * tf.where(pointed > 0, 1 - across - down, oval)
        hole = draws.uniform(1, 1, low=0.1, high=1.2) * self._cover(level)
        thick = draws.uniform(1, 1, low=0.02, high=0.12)
        edge = draws.uniform(1, 1, low=-0.6, high=0.6)
        edge *= draws.chance(0.6, 1, 1) * self._cover(thick - tf.abs(level + thick))
        cut = draws.chance(self.necklines, 1, 1)
        return (1.0 - cut * tf.minimum(hole, 1.0)) * (1.0 - cut * edge)

    def _front(self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor) -> tf.Tensor:
        """A panel between two open halves, a factor `[n, h, w]`."""
        off = 0.08 * draws.normal(1, 1)
        half = draws.uniform(1, 1, high=0.3)
        spread = draws.uniform(1, 1, low=-0.25, high=0.25)
        begin = draws.uniform(1, 1, low=-1.0, high=0.0)
        end = draws.uniform(1, 1, low=0.2, high=1.6)
        panel = tf.minimum(half + spread * ys - tf.abs(xs - off), ys - begin)
        panel = self._cover(tf.minimum(panel, end - ys))
        opened = draws.chance(self.fronts, 1, 1)
        return 1.0 - opened * draws.uniform(1, 1, low=-0.5, high=0.9) * panel

    def _placket(self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor) -> tf.Tensor:
        """A line down the middle, with buttons, a factor `[n, h, w]`."""
        aside = xs - 0.05 * draws.normal(1, 1)
        line = self._cover(draws.uniform(1, 1, low=0.01, high=0.05) - tf.abs(aside))
        line *= self._cover(ys - draws.uniform(1, 1, low=-1.0, high=-0.4))
        pitch = draws.uniform(1, 1, low=0.15, high=0.4)
        rung = tf.math.floormod(ys + draws.uniform(1, 1), pitch) - pitch / 2.0
        button = 0.04 - tf.sqrt(tf.square(aside) + tf.square(rung) + 1e-6)
        factor = 1.0 - draws.uniform(1, 1, low=-0.4, high=0.8) * line
        buttoned = draws.chance(0.4, 1, 1) * draws.uniform(1, 1, low=-0.5, high=0.8)
        factor *= 1.0 - buttoned * self._cover(button)
        # One half lies over the other: a step in brightness.
        factor *= 1.0 + draws.uniform(1, 1, low=-0.15, high=0.15) * tf.tanh(
            20.0 * aside
        )
        return tf.where(draws.chance(self.fronts, 1, 1) > 0, factor, 1.0)

    def _trims(
        self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor, lower: tf.Tensor
    ) -> tf.Tensor:
        """Pockets and a band at the hem or the waist, a factor `[n, h, w]`."""
        center = draws.uniform(1, 1, low=0.15, high=0.35)
        middle = draws.uniform(1, 1, low=-0.4, high=0.7)
        wide = draws.uniform(1, 1, low=0.05, high=0.18) - tf.abs(tf.abs(xs) - center)
        tall = draws.uniform(1, 1, low=0.02, high=0.2) - tf.abs(ys - middle)
        pocket = draws.chance(0.25, 1, 1) * self._cover(tf.minimum(wide, tall))
        place = tf.where(draws.chance(0.5, 1, 1) > 0, lower, draws.uniform(1, 1))
        band = self._cover(
            draws.uniform(1, 1, low=0.02, high=0.12) - tf.abs(ys - place)
        )
        band *= draws.chance(0.3, 1, 1)
        factor = 1.0 - draws.uniform(1, 1, low=-0.4, high=0.6) * pocket
        return factor * (1.0 - draws.uniform(1, 1, low=-0.4, high=0.7) * band)

    def _trousers(self, draws: Draws, xs: tf.Tensor, ys: tf.Tensor) -> tf.Tensor:
        """Two legs below a waist, `[n, h, w]` in 0..1."""
        side = tf.abs(xs)
        thick = draws.uniform(1, 1, low=0.1, high=0.28)
        ax, bx = (
            draws.uniform(1, 1, low=0.1, high=0.35),
            draws.uniform(1, 1, low=0.15, high=0.5),
        )
        ay = draws.uniform(1, 1, low=-0.95, high=-0.5)
        by = draws.uniform(1, 1, low=0.3, high=1.05)
        thin = thick * draws.uniform(1, 1, low=0.5, high=1.1)
        leg = bar(side, ys, start=(ax, ay), end=(bx, by), thick=thick, thin=thin)
        hips = draws.uniform(1, 1, low=0.15, high=0.45) - side
        crotch = draws.uniform(1, 1, low=-0.9, high=0.0)
        waist = tf.minimum(hips, tf.minimum(ys + 0.97, crotch - ys))
        between = draws.uniform(1, 1, high=0.06) - side
        below = ys - draws.uniform(1, 1, low=-0.7, high=0.3)
        gap = self._cover(tf.minimum(between, below))
        return self._cover(tf.maximum(leg, waist)) * (1.0 - gap)
