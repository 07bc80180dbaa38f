"""Images of a generator, blended with each other and finished like photographs."""

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
# Blurring makes white noise weaker by this: one over the norm of its weights.
_BLUR_GAIN = 16.0 / 6.0


@keras.saving.register_keras_serializable("dp_transcribe")
class Blends(ProceduralGenerator):
    """More variety from a generator: pairs of its images in one, edges, tones, grain.

    All images are sharpened by a random strength, as thumbnails are. A share is
    blended with another image of the batch: averaged, the lighter of both, their
    product, one on either side of a random line, or the shape of one filled with the
    other. Then a share changes its tones: the lightest pixel becomes nearly white and
    the rest follows a random gamma. Last, a share gets the grain of cloth or film,
    noise in proportion to the pixel. It costs next to nothing, where drawing more
    images would not.

    Args:
        generator: A procedural generator.
        blended: Probability that an image is blended.
        sharpened: Largest strength of the unsharp mask; 0 leaves images as they are.
        toned: Probability that an image changes its tones.
        grained: Probability that an image gets a grain.

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
        toned: float = 0.7,
        grained: float = 0.6,
    ) -> None:
        super().__init__(generator.image_shape, output_range=generator.output_range)
        self.generator = generator
        self.blended = probability("blended", blended)
        self.sharpened = non_negative("sharpened", sharpened)
        self.toned = probability("toned", toned)
        self.grained = probability("grained", grained)

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
        return self._grain(draws, self._tone(draws, images))

    def _sharpen(self, draws: Draws, images: tf.Tensor) -> tf.Tensor:
        strength = draws.uniform(1, 1, 1, high=self.sharpened)
        sharp = images + strength * (images - _blurred(images))
        return tf.clip_by_value(sharp, 0.0, 1.0)

    def _tone(self, draws: Draws, images: tf.Tensor) -> tf.Tensor:
        lightest = tf.reduce_max(images, axis=(1, 2, 3), keepdims=True)
        light = draws.uniform(1, 1, 1, low=0.6)
        gamma = draws.uniform(1, 1, 1, low=0.35, high=1.2)
        toned = light * (images / tf.maximum(lightest, 1e-6)) ** gamma
        # Hardly anything is in the image: not to be blown up.
        chosen = (draws.chance(self.toned, 1, 1, 1) > 0.0) & (lightest > _GROUND)
        return tf.where(chosen, toned, images)

    def _grain(self, draws: Draws, images: tf.Tensor) -> tf.Tensor:
        fine = draws.normal(*self.image_shape)
        coarse = _blurred(fine) * _BLUR_GAIN
        grain = tf.where(draws.chance(0.5, 1, 1, 1) > 0.0, fine, coarse)
        strength = draws.log_uniform(1, 1, 1, low=0.01, high=0.3)
        return images * (1.0 + draws.chance(self.grained, 1, 1, 1) * strength * grain)

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
            "toned": self.toned,
            "grained": self.grained,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Blends:
        """The generator that `get_config` described."""
        load = keras.saving.deserialize_keras_object
        return cls(**{**config, "generator": load(config["generator"])})


def _blurred(images: tf.Tensor) -> tf.Tensor:
    """Every pixel averaged with its neighbours, by weights 1, 2, 1 along both axes."""
    padded = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]], "SYMMETRIC")
    rows = (padded[:, :-2] + 2.0 * padded[:, 1:-1] + padded[:, 2:]) / 4.0
    return (rows[:, :, :-2] + 2.0 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4.0
