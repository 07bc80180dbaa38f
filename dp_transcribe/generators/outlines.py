"""Building blocks of drawn objects: edges, limbs, curves through knots, cloth."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from dp_transcribe.generators.base import Draws
from dp_transcribe.generators.fields import grid, smooth_field, stripes, tints

_EDGE = 2.5  # steepness of an edge, per pixel


def cover(level: tf.Tensor, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """How much of a pixel lies inside, 0..1, from its distance to the edge.

    Args:
        level: Signed distances, positive inside; 1.0 is half the shorter side.
        image_shape: `(height, width, channels)`.
    """
    pixels = 0.5 * min(image_shape[:2])
    return tf.sigmoid(_EDGE * pixels * level)


def crumpled_grid(
    draws: Draws, image_shape: tuple[int, int, int], *, crumpled: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Pixel centres as `(x, y)`, each `[n, h, w]`, displaced at random.

    What is drawn on them has outlines that are not quite straight nor mirrored.

    Args:
        draws: Source of randomness.
        image_shape: `(height, width, channels)`.
        crumpled: Largest standard deviation of the displacement, as a fraction of half
            the shorter side.
    """
    xs, ys = grid(image_shape)
    field = smooth_field(draws, image_shape, smoothness=(0.7, 6.0), channels=2)
    field *= crumpled * tf.square(draws.uniform(1, 1, 1))
    return xs + field[..., 0], ys + field[..., 1]


def bar(
    xs: tf.Tensor | np.ndarray,
    ys: tf.Tensor | np.ndarray,
    *,
    start: tuple[tf.Tensor, tf.Tensor],
    end: tuple[tf.Tensor, tf.Tensor],
    thick: tf.Tensor,
    thin: tf.Tensor,
) -> tf.Tensor:
    """Signed distance to a tapered bar with round ends, positive inside, `[n, h, w]`.

    Args:
        xs: Horizontal positions of the pixels.
        ys: Vertical positions of the pixels.
        start: Position `(x, y)` of one end, each `[n, 1, 1]`.
        end: Position `(x, y)` of the other end.
        thick: Half width at the start.
        thin: Half width at the end.
    """
    (ax, ay), (bx, by) = start, end
    dx, dy = bx - ax, by - ay
    along = ((xs - ax) * dx + (ys - ay) * dy) / (tf.square(dx) + tf.square(dy) + 1e-6)
    along = tf.clip_by_value(along, 0.0, 1.0)
    gap = tf.square(xs - ax - along * dx) + tf.square(ys - ay - along * dy)
    return thick + (thin - thick) * along - tf.sqrt(gap + 1e-6)


def through_knots(knots: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """A polygon line through evenly spaced knots.

    Args:
        knots: Heights `[n, knots]` at evenly spaced places from -1 to 1.
        position: Places `[n, h, w]` at which to evaluate it.

    Returns:
        Heights `[n, h, w]`; beyond the ends the line runs level.
    """
    count = int(knots.shape[-1])
    spacing = 2.0 / (count - 1)
    within = tf.clip_by_value(position, -1.0, 1.0)
    height = tf.zeros_like(within)
    for index in range(count):
        hat = tf.nn.relu(1.0 - tf.abs(within + 1.0 - index * spacing) / spacing)
        height += hat * knots[:, index, None, None]
    return height


def cloth(
    draws: Draws, image_shape: tuple[int, int, int], *, patterned: float
) -> tf.Tensor:
    """Colour, folds, weave, stripes and prints, `[n, h, w, c]` in 0..1.

    Args:
        draws: Source of randomness.
        image_shape: `(height, width, channels)`.
        patterned: Probability of stripes; half as many have a print.
    """
    color = tf.sqrt(tints(draws, 1, 1, channels=image_shape[-1], low=0.02))
    folds = smooth_field(draws, image_shape, smoothness=(1.5, 7.0), channels=1)
    shade = 1.0 + 0.3 * tf.square(draws.uniform(1, 1, 1)) * folds
    weave = smooth_field(draws, image_shape, smoothness=(0.3, 1.5), channels=1)
    woven = draws.chance(0.6, 1, 1, 1)
    shade += woven * 0.25 * tf.square(draws.uniform(1, 1, 1)) * weave
    wave = 0.5 + 0.5 * stripes(draws, image_shape, frequency=(1.5, 7.0))
    striped = draws.chance(patterned, 1, 1, 1)
    shade *= 1.0 - striped * draws.uniform(1, 1, 1, low=-0.4, high=0.7) * wave
    shade *= _creases(draws, image_shape) * _creases(draws, image_shape)
    return tf.clip_by_value(color * shade * _print(draws, image_shape, patterned), 0, 1)


def _creases(draws: Draws, image_shape: tuple[int, int, int]) -> tf.Tensor:
    """Factor of brightness along winding lines, some mirrored, `[n, h, w, 1]`."""
    field = smooth_field(draws, image_shape, smoothness=(1.0, 6.0), channels=1)
    mirrored = tf.cast(draws.uniform(1, 1, 1) < 0.6, tf.float32)
    field += mirrored * (field[:, :, ::-1] - field) / 2.0
    level = field - draws.uniform(1, 1, 1, low=-1.0, high=1.0)
    line = tf.exp(-tf.square(level / draws.uniform(1, 1, 1, low=0.1, high=0.4)))
    area = tf.sigmoid(level * draws.log_uniform(1, 1, 1, low=2.0, high=12.0))
    mark = tf.where(draws.uniform(1, 1, 1) < 0.6, line, area)
    strength = draws.chance(0.7, 1, 1, 1) * draws.uniform(1, 1, 1, low=-0.35, high=0.6)
    return 1.0 - strength * tf.abs(draws.uniform(1, 1, 1)) * mark


def _print(
    draws: Draws, image_shape: tuple[int, int, int], patterned: float
) -> tf.Tensor:
    """Factor of brightness of a blotchy motif in the middle, `[n, h, w, 1]`."""
    xs, ys = grid(image_shape)
    blotches = smooth_field(draws, image_shape, smoothness=(0.8, 2.5), channels=1)
    oval = np.square(xs / 0.3) + np.square((ys + 0.1) / 0.35)
    motif = (
        tf.sigmoid(8.0 * (blotches - 0.4)) * tf.sigmoid(9.0 * (1.0 - oval))[..., None]
    )
    printed = draws.chance(0.5 * patterned, 1, 1, 1)
    return 1.0 - printed * draws.uniform(1, 1, 1, low=-0.6, high=0.9) * motif
