"""Pretraining of a generator on a procedural source: a public starting point."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._validate import invalid, non_negative, positive_finite, positive_int
from dp_transcribe.generators.base import Draws
from dp_transcribe.generators.trainable import TrainableGenerator


def pretrain(
    generator: TrainableGenerator,
    source: Any,
    *,
    steps: int = 800,
    batch_size: int = 64,
    seed: int = 0,
    learning_rate: float = 1.5e-3,
    kl_weight: float = 0.5,
    adversarial_weight: float = 0.05,
) -> np.ndarray:
    """Fits a generator to the images of a source, in place.

    The generator is the decoder of a variational autoencoder, which spreads it over
    everything the source makes, and at the same time deceives a critic, which makes
    its samples as sharp as the source's. Encoder and critic are thrown away. Fresh
    images are drawn for every step, so nothing is seen twice.

    Args:
        generator: What to train.
        source: Anything with the `sample`, `image_shape` and `output_range` of a
            procedural generator.
        steps: Updates.
        batch_size: Images in an update.
        seed: For the source's images and the weights and noise of the helpers.
        learning_rate: Of Adam at the start; it falls to zero along a cosine.
        kl_weight: Of the divergence of codes from the Gaussian latents are drawn
            from, against the reconstruction.
        adversarial_weight: Of the critic, against the reconstruction per pixel.
            Zero leaves a plain autoencoder, whose samples are blurred.

    Returns:
        The autoencoder's loss at each step, in nats per image, float32 `[steps]`.

    Raises:
        ValueError: if the source's images are not what the generator makes.

    **Privacy**: free, if the source is public: neither the teacher nor data is read.

    References:
        Kingma and Welling 2013, arXiv:1312.6114; Larsen et al. 2015,
        arXiv:1512.09300 (autoencoder with critic); Lim and Ye 2017, arXiv:1705.02894
        (hinge loss).
    """
    _check_alike(generator, source)
    steps = positive_int("steps", steps)
    positive_int("batch_size", batch_size)
    rate = positive_finite("learning_rate", learning_rate)
    kl_weight = non_negative("kl_weight", kl_weight)
    adversarial_weight = non_negative("adversarial_weight", adversarial_weight)
    encoder = _reader(generator, 2 * generator.latent_dim, seed=seed)
    critic = _reader(generator, 1, seed=seed + 100)
    autoencode = _Updater(
        encoder.trainable_variables + generator.trainable_variables, rate, steps
    )
    criticize = _Updater(critic.trainable_variables, rate, steps)

    @tf.function
    def update(step: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
        draws = Draws(batch_size, tf.stack([tf.constant(seed, tf.int32), step]))
        real = source.sample(batch_size, draws.seed())
        with tf.GradientTape(persistent=True) as tape:
            loss = _autoencoder_loss(generator, encoder, real, draws, kl_weight)
            fake = generator.sample(batch_size, draws.seed())
            score = critic(fake)
            total = loss / float(np.prod(generator.image_shape))
            total -= weight * tf.reduce_mean(score)
            hinge = _hinge_loss(critic(real), critic(tf.stop_gradient(fake)))
        autoencode(tape, total)
        criticize(tape, hinge)
        return loss

    def weight_at(step: int) -> tf.Tensor:
        # The critic gains influence as it learns what the source looks like.
        return tf.constant(adversarial_weight * min(1.0, 4.0 * step / steps))

    losses = [update(tf.constant(step), weight_at(step)) for step in range(steps)]
    return np.array(losses, np.float32)


class _Updater:
    """Adam with a cosine schedule for one player of the game."""

    def __init__(self, variables: list[Any], rate: float, steps: int) -> None:
        schedule = keras.optimizers.schedules.CosineDecay(rate, steps)
        self._optimizer = keras.optimizers.Adam(schedule, beta_1=0.5)
        self._optimizer.build(variables)
        self._variables = variables

    def __call__(self, tape: tf.GradientTape, loss: tf.Tensor) -> None:
        gradients = tape.gradient(loss, self._variables)
        pairs = zip(gradients, self._variables, strict=True)
        self._optimizer.apply_gradients(pairs)


def _check_alike(generator: TrainableGenerator, source: Any) -> None:
    for name in ("image_shape", "output_range"):
        received, expected = getattr(source, name), getattr(generator, name)
        if received != expected:
            wanted = f"a source with the generator's {name} {expected}"
            raise invalid("source", f"{name} {received}", wanted)


def _reader(generator: TrainableGenerator, outputs: int, *, seed: int) -> keras.Model:
    """A small network from images to `[batch, outputs]`: encoder or critic."""
    layers = keras.layers
    low, high = generator.output_range

    def start(index: int) -> keras.initializers.Initializer:
        return keras.initializers.HeNormal(seed=seed + index)

    model = keras.Sequential([layers.Input(generator.image_shape)])
    model.add(layers.Rescaling(1.0 / (high - low), offset=-low / (high - low)))
    if len(generator.image_shape) == 3:
        for index, filters in enumerate((32, 64)):
            model.add(
                layers.Conv2D(filters, 4, 2, "same", kernel_initializer=start(index))
            )
            model.add(layers.GroupNormalization(8))
            model.add(layers.LeakyReLU(0.2))
    model.add(layers.Flatten())
    model.add(layers.Dense(128, kernel_initializer=start(2)))
    model.add(layers.LeakyReLU(0.2))
    model.add(layers.Dense(outputs, kernel_initializer=start(3)))
    return model


def _autoencoder_loss(
    generator: TrainableGenerator,
    encoder: keras.Model,
    images: tf.Tensor,
    draws: Draws,
    kl_weight: float,
) -> tf.Tensor:
    """The negative evidence lower bound in nats, mean over the batch, scalar."""
    low, high = generator.output_range
    mean, log_variance = tf.split(encoder(images), 2, axis=-1)
    code = mean + tf.exp(0.5 * log_variance) * draws.normal(generator.latent_dim)
    labels = generator.draw_inputs(draws.n, draws.seed())[1]
    error = tf.nn.sigmoid_cross_entropy_with_logits(
        labels=(images - low) / (high - low), logits=generator.logits(code, labels)
    )
    divergence = tf.exp(log_variance) + tf.square(mean) - 1.0 - log_variance
    per_image = tf.reduce_sum(error, axis=list(range(1, len(images.shape))))
    per_image += 0.5 * kl_weight * tf.reduce_sum(divergence, axis=-1)
    return tf.reduce_mean(per_image)


def _hinge_loss(real: tf.Tensor, fake: tf.Tensor) -> tf.Tensor:
    """Zero once real images score above 1 and generated ones below -1."""
    return tf.reduce_mean(tf.nn.relu(1.0 - real) + tf.nn.relu(1.0 + fake))
