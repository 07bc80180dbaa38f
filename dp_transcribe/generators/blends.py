"""Images of a generator, blended with each other and sharpened."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import non_negative, probability
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.generators.fields import grid

# Below this an image of an object on black counts as ground.
_GROUND = 0.08


@keras.saving.register_keras_serializable("dp_transcribe")
class Blends(ProceduralGenerator):
    """More variety from a generator: pairs of its images in one, and crisp edges.

    A share of the images is blended with another image of the batch: averaged, the
    lighter of both, their product, one on either side of a random line, or the shape
    of one filled with the other. All are sharpened by a random strength, as
    thumbnails are. It costs next to nothing, where drawing more images would not.

    Args:
        generator: A procedural generator.
        blended: Probability that an image is blended.
        sharpened: Largest strength of the unsharp mask; 0 leaves images as they are.

    **Privacy**: public, see `ProceduralGenerator`.

    References:
        Mixing widens what a student is asked: Beyer et al. 2022, "Knowledge
        distillation: A good teacher is patient and consistent", arXiv:2106.05237.
    """

    def __init__(
        self,
        generator: ProceduralGenerator,
        *,
        blended: float = 0.6,
        sharpened: float = 2.0,
    ) -> None:
        super().__init__(generator.image_shape, output_range=generator.output_range)
        self.generator = generator
        self.blended = probability("blended", blended)
        self.sharpened = non_negative("sharpened", sharpened)

    def draw(self, draws: Draws) -> tf.Tensor:
        """See `ProceduralGenerator.draw`."""
        images = self.generator.draw(Draws(draws.n, draws.seed()))
        images = self._sharpen(draws, tf.clip_by_value(images, 0.0, 1.0))
        others = tf.gather(images, tf.argsort(draws.uniform()))
        share = draws.uniform(1, 1, 1, high=0.8)  # never just the other image
        rules = [
            images + share * (others - images),
            tf.maximum(images, share * others),
            images * (1.0 - share * (1.0 - others)),
            others + self._side(draws) * (images - others),
            tf.cast(images > _GROUND, tf.float32)
            * (images + share * (others - images)),
        ]
        chosen = draws.uniform(1, 1, 1) * len(rules) / max(self.blended, 1e-9)
        for index, blend in enumerate(rules):
            here = (chosen >= index) & (chosen < index + 1)
            images = tf.where(here, blend, images)
        return images

    def _sharpen(self, draws: Draws, images: tf.Tensor) -> tf.Tensor:
        padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
        rows = (padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]) / 4.0
        blurred = (rows[:, :, :-2] + 2.0 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4.0
        strength = draws.uniform(1, 1, 1, high=self.sharpened)
        return tf.clip_by_value(images + strength * (images - blurred), 0.0, 1.0)

    def _side(self, draws: Draws) -> tf.Tensor:
        """1 on one side of a soft random line, 0 on the other, `[n, h, w, 1]`."""
        xs, ys = (axis[..., None] for axis in grid(self.image_shape))
        angle = draws.uniform(1, 1, 1, high=2.0 * np.pi)
        along = xs * tf.cos(angle) + ys * tf.sin(angle)
        return tf.sigmoid(6.0 * (along - 0.25 * draws.normal(1, 1, 1)))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "generator": keras.saving.serialize_keras_object(self.generator),
            "blended": self.blended,
            "sharpened": self.sharpened,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Blends:
        """The generator that `get_config` described."""
        load = keras.saving.deserialize_keras_object
        return cls(**{**config, "generator": load(config["generator"])})
