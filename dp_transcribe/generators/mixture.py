"""A mixture of procedural generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import invalid
from dp_transcribe.generators.base import Draws, ProceduralGenerator


@keras.saving.register_keras_serializable("dp_transcribe")
class Mixture(ProceduralGenerator):
    """Images from several generators, in fixed proportions.

    A batch of n images holds n times its weight of each source, rounded up or down
    at random so that the proportions hold on average for any n; the order is
    shuffled. Only the images that are asked for are drawn.

    Args:
        generators: Procedural generators of one image shape and output range.
        weights: Positive weights, by default all equal; scaled to sum to 1.

    **Privacy**: public, see `ProceduralGenerator`.
    """

    def __init__(
        self,
        generators: Sequence[ProceduralGenerator],
        *,
        weights: Sequence[float] | None = None,
    ) -> None:
        if not generators:
            raise invalid("generators", generators, "at least one generator")
        self.generators = list(generators)
        first = self.generators[0]
        for other in self.generators[1:]:
            self._check_alike(first, other)
        super().__init__(first.image_shape, output_range=first.output_range)
        self.weights = self._check_weights(weights)

    @staticmethod
    def _check_alike(first: ProceduralGenerator, other: ProceduralGenerator) -> None:
        for name in ("image_shape", "output_range"):
            if getattr(first, name) != getattr(other, name):
                received = [getattr(first, name), getattr(other, name)]
                raise invalid("generators", received, f"generators of one `{name}`")

    def _check_weights(self, weights: Sequence[float] | None) -> tuple[float, ...]:
        count = len(self.generators)
        values = np.ones(count) if weights is None else np.asarray(weights, np.float64)
        if values.shape != (count,) or not np.all(values > 0):
            expected = f"one positive weight for each of the {count} generators"
            raise invalid("weights", weights, expected)
        return tuple(float(value) for value in values / values.sum())

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        source = self._sources(draws)
        parts = []
        for index, generator in enumerate(self.generators):
            count = tf.reduce_sum(tf.cast(tf.equal(source, index), tf.int32))
            parts.append(generator.draw(Draws(count, draws.seed())))
        order = tf.argsort(draws.uniform())
        return tf.gather(tf.concat(parts, axis=0), order)

    def _sources(self, draws: Draws) -> tf.Tensor:
        """Systematic sampling: the source of each image, sorted, int32 `[n]`."""
        count = tf.cast(draws.n, tf.float32)
        offset = tf.random.stateless_uniform([], draws.seed())
        position = (tf.range(count) + offset) / tf.maximum(count, 1.0)
        limits = tf.constant(np.cumsum(self.weights)[:-1], tf.float32)
        return tf.searchsorted(limits, position, side="right")

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        serialize = keras.saving.serialize_keras_object
        return {
            "generators": [serialize(generator) for generator in self.generators],
            "weights": list(self.weights),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Mixture:
        """The mixture that `get_config` described."""
        load = keras.saving.deserialize_keras_object
        generators = [load(entry) for entry in config["generators"]]
        return cls(generators, weights=config["weights"])
