"""What every trainable generator shares: latents, labels and output range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe._validate import positive_int
from dp_transcribe.generators.base import Draws, check_output_range


class TrainableGenerator(keras.Model):
    """A network from Gaussian latents, and classes if asked, to images.

    Sampling is stateless in its seed, as a procedural generator's is.

    **Privacy**: as private as what trains it. Pretrained on a procedural source or
    guided by the student, its samples may be released with the student; guided by
    the teacher, the generator is not covered and must not be released.

    Args:
        image_shape: Shape of one image.
        latent_dim: Length of a latent vector.
        num_classes: Number of classes to condition on, or `None`.
        output_range: Lowest and highest pixel value; the teacher's input range.
        guided_by_teacher: Whether a teacher's gradients went into its weights; set by
            `pretrain_by_teacher`.
        guides: Which teachers those were: for each the fingerprint of its privacy
            statement, "" for one without.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        latent_dim: int = 64,
        num_classes: int | None = None,
        output_range: Sequence[float] = (0.0, 1.0),
        guided_by_teacher: bool = False,
        guides: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_shape = tuple(positive_int("image_shape", s) for s in image_shape)
        self.latent_dim = positive_int("latent_dim", latent_dim)
        if num_classes is not None:
            num_classes = positive_int("num_classes", num_classes)
        self.num_classes = num_classes
        self.output_range = check_output_range(output_range)
        self.guided_by_teacher = guided_by_teacher
        self.guides = tuple(guides)
        self.embedding = None
        if num_classes is not None:
            self.embedding = keras.layers.Embedding(num_classes, self.latent_dim)
            self.embedding.build((None,))
        self.body = self._build_body(
            self.latent_dim * (1 if num_classes is None else 2)
        )
        self.built = True

    def _build_body(self, inputs: int) -> keras.Sequential:
        """The network `[batch, inputs] -> [batch, *image_shape]`, ending in logits."""
        raise NotImplementedError

    def build(self, input_shape: Any = None) -> None:
        """Nothing is left to build: all shapes are known to the constructor."""
        self.built = True

    def call(self, latents: tf.Tensor, labels: tf.Tensor | None = None) -> tf.Tensor:
        """Images from latents.

        Args:
            latents: float32 `[batch, latent_dim]`.
            labels: int32 `[batch]` for a conditional generator, otherwise `None`.

        Returns:
            float32 `[batch, *image_shape]` within `output_range`.
        """
        low, high = self.output_range
        return low + (high - low) * tf.sigmoid(self.logits(latents, labels))

    def logits(self, latents: tf.Tensor, labels: tf.Tensor | None = None) -> tf.Tensor:
        """As `call`, before the sigmoid that maps to `output_range`."""
        if (labels is None) != (self.num_classes is None):
            needed = "no labels" if self.num_classes is None else "one label per image"
            raise ValueError(
                f"Invalid value for argument `labels`. Expected {needed}, since "
                f"num_classes={self.num_classes}. Received: labels={labels}."
            )
        inputs = latents
        if self.embedding is not None:
            inputs = tf.concat([latents, self.embedding(labels)], axis=-1)
        return tf.cast(self.body(inputs), tf.float32)

    def draw_inputs(
        self, n: int | tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Random latents `[n, latent_dim]`, and labels `[n]` if conditional.

        Args:
            n: How many, an int or a scalar int32 tensor.
            seed: int32 `[2]`; what is drawn depends on nothing else.
        """
        draws = Draws(n, seed)
        latents = draws.normal(self.latent_dim)
        if self.num_classes is None:
            return latents, None
        unit = draws.uniform()
        return latents, tf.cast(unit * float(self.num_classes), tf.int32)

    def sample(self, n: int | tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Draws `n` images `[n, *image_shape]`; see `ProceduralGenerator.sample`."""
        return self(*self.draw_inputs(n, seed))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            **super().get_config(),
            "image_shape": list(self.image_shape),
            "latent_dim": self.latent_dim,
            "num_classes": self.num_classes,
            "output_range": list(self.output_range),
            "guided_by_teacher": self.guided_by_teacher,
            "guides": list(self.guides),
        }
