"""What every procedural generator shares: its image shape, range and seeds."""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dp_transcribe._validate import invalid, positive_int

Range = tuple[float, float]


def check_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns `(height, width, channels)`, or says what is wrong with it."""
    shape = tuple(image_shape)
    if len(shape) != 3:
        expected = "(height, width, channels)"
        raise invalid("image_shape", image_shape, expected, "E.g. (28, 28, 1).")
    height, width, channels = (positive_int("image_shape", side) for side in shape)
    return height, width, channels


def check_range(name: str, bounds: Sequence[float]) -> Range:
    """Returns `(low, high)` with low <= high, or names the argument at fault."""
    if len(bounds) != 2 or not -math.inf < bounds[0] <= bounds[1] < math.inf:
        raise invalid(name, bounds, "a finite pair (low, high) with low <= high")
    return float(bounds[0]), float(bounds[1])


def check_positive_range(name: str, bounds: Sequence[float]) -> Range:
    """As `check_range`, for lengths and factors, which are above zero."""
    low, high = check_range(name, bounds)
    if low <= 0.0:
        raise invalid(name, bounds, "a pair (low, high) of numbers above 0")
    return low, high


def check_output_range(bounds: Sequence[float]) -> Range:
    """As `check_range`, but an empty range holds no image."""
    low, high = check_range("output_range", bounds)
    if low == high:
        mend = "Give the range of the teacher's input."
        raise invalid("output_range", bounds, "(low, high) with low < high", mend)
    return low, high


class Draws:
    """A sequence of stateless draws for `n` images that follows from one seed.

    The i-th call gives the same numbers for the same seed, in graphs as in eager
    mode, and different calls are independent.

    Args:
        n: Number of images, an int or a scalar int32 tensor.
        seed: int32 tensor `[2]`.
    """

    def __init__(self, n: int | tf.Tensor, seed: tf.Tensor) -> None:
        self.n = n
        self._seed = tf.convert_to_tensor(seed, tf.int32)
        self._calls = 0

    def seed(self) -> tf.Tensor:
        """The next sub-seed, int32 `[2]`."""
        self._calls += 1
        return tf.random.fold_in(self._seed, self._calls)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> tf.Tensor:
        """Uniform numbers in [low, high), float32 `[n, *shape]`."""
        return tf.random.stateless_uniform([self.n, *shape], self.seed(), low, high)

    def log_uniform(self, *shape: int, low: float, high: float) -> tf.Tensor:
        """Numbers whose logarithm is uniform, float32 `[n, *shape]`."""
        unit = self.uniform(*shape)
        return low * tf.pow(high / low, unit)

    def normal(self, *shape: int) -> tf.Tensor:
        """Standard normal numbers, float32 `[n, *shape]`."""
        return tf.random.stateless_normal([self.n, *shape], self.seed())

    def chance(self, probability: float, *shape: int) -> tf.Tensor:
        """1.0 with the given probability, otherwise 0.0, float32 `[n, *shape]`."""
        return tf.cast(self.uniform(*shape) < probability, tf.float32)


class ProceduralGenerator(abc.ABC):
    """Random images made by a formula, from nothing that was learned.

    A procedural generator is a public prior: it reads neither the teacher nor any
    data. Sampling is stateless, so one seed always gives the same images.

    **Privacy**: samples are public; drawing them costs nothing and they may be
    released. A source whose images do not follow from the seed is refused, since its
    queries would be asked again; one that sets `asked_once` vouches that none is.

    Args:
        image_shape: `(height, width, channels)` of one image.
        output_range: Lowest and highest pixel value; the teacher's input range.

    References:
        Baradad et al. 2021, "Learning to See by Looking at Noise", arXiv:2106.05963.
        Tang et al. 2023, DP-RandP, arXiv:2306.06076.
    """

    trainable = False
    asked_once = False

    def __init__(
        self, image_shape: Sequence[int], *, output_range: Sequence[float] = (0.0, 1.0)
    ) -> None:
        self.image_shape = check_image_shape(image_shape)
        self.output_range = check_output_range(output_range)

    def sample(self, n: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws `n` images.

        Args:
            n: How many, an int or a scalar int32 tensor.
            seed: int32 `[2]`; the images depend on nothing else.

        Returns:
            float32 `[n, height, width, channels]` within `output_range`.
        """
        low, high = self.output_range
        unit = tf.clip_by_value(self.draw(Draws(n, seed)), 0.0, 1.0)
        images = tf.ensure_shape(unit, (None, *self.image_shape))
        return low + (high - low) * images

    @abc.abstractmethod
    def draw(self, draws: Draws) -> tf.Tensor:
        """Images `[n, height, width, channels]`, nominally in 0..1."""

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "image_shape": list(self.image_shape),
            "output_range": list(self.output_range),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ProceduralGenerator:
        """The generator that `get_config` described."""
        return cls(**config)
