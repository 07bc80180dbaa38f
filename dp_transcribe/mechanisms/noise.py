"""Secret, counter-based randomness: one fresh stream per draw, never one twice."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate

# What a draw is for. Each purpose has a word of its own in the seed, so that the
# public sampling of latents can never repeat the bits of the secret noise.
NOISE, ANSWERS, SAMPLING, QUERIES = range(4)
_WORD = np.iinfo(np.int64).max


@keras.saving.register_keras_serializable(package="dp_transcribe")
class NoiseSource(keras.layers.Layer):
    """Key and counter from which all randomness of a transcription is drawn.

    The key is 126 bits from the operating system unless a seed is given. Every draw
    takes a number from the counter, and the counter is saved with the weights, so
    that a resumed run goes on where the saved one stopped.

    Args:
        seed: None for a secret key; an int makes runs repeatable, for tests.

    **Privacy**: whoever knows the key can subtract the noise. It is in every
    checkpoint of the transcriber, which must be kept as secret as the teacher. A
    given seed is recorded in the privacy statement. Draws are float32 and are not
    hardened against attacks on floating-point arithmetic.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(trainable=False, dtype="float32", **kwargs)
        self.seed = _validate.optional_seed("seed", seed)
        words = _key_words(self.seed)
        self.key = self.add_weight(
            name="key",
            shape=(2,),
            dtype="int64",
            initializer=lambda *_, **__: tf.constant(words, tf.int64),
            trainable=False,
        )
        self.counter = self.add_weight(
            name="counter",
            shape=(),
            dtype="int64",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )
        self.built = True

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments; the key itself is a weight."""
        return {"name": self.name, "seed": self.seed}

    def advance(self) -> tf.Tensor:
        """Takes the next number; call once per update, before it draws anything.

        Returns:
            The number taken, a scalar int64; the same on every replica.
        """
        number = tf.identity(self.counter.value)
        self.counter.assign_add(tf.ones([], tf.int64))
        return number

    def stream(
        self, number: tf.Tensor, purpose: int, *, part: tf.Tensor | int = 0
    ) -> tf.Tensor:
        """Seed of one stateless stream.

        Args:
            number: what `advance` returned.
            purpose: `NOISE`, `ANSWERS`, `SAMPLING` or `QUERIES`.
            part: which of several independent streams of that purpose, for example
                the replica's index. `NOISE` has one part, shared by all replicas.

        Returns:
            int64 `[2]`, for TensorFlow's stateless operations.
        """
        key = tf.convert_to_tensor(self.key.value)
        part = tf.cast(part, tf.int64)
        return tf.stack([key[0] ^ (part * 8 + purpose), key[1] + number])

    def normal_like(
        self, tensors: Sequence[tf.Tensor], *, number: tf.Tensor
    ) -> list[tf.Tensor]:
        """Independent standard Gaussian noise for several tensors, as one draw.

        Args:
            tensors: tensors of any shapes.
            number: what `advance` returned for this update.

        Returns:
            float32 tensors of the same shapes.
        """
        sizes = [tf.size(tensor) for tensor in tensors]
        seed = self.stream(number, NOISE)
        flat = standard_normal([tf.add_n(sizes)], seed)
        parts = tf.split(flat, sizes, num=len(tensors))
        return [
            tf.reshape(part, tf.shape(tensor))
            for part, tensor in zip(parts, tensors, strict=True)
        ]


def standard_normal(shape: Any, seed: tf.Tensor) -> tf.Tensor:
    """Independent standard Gaussians, by Box and Muller's transform.

    `tf.random.stateless_normal` computes its transform one number at a time on a CPU,
    which takes longer than the random bits and, for a perceptron, as long as a step.
    Here the radius has 32 bits and the angle 24, so tails reach 6.6 deviations.

    Args:
        shape: of the result; may be a tensor.
        seed: `[2]`, as `NoiseSource.stream` returns it.

    Returns:
        float32, the same numbers for the same shape and seed.
    """
    size = tf.reduce_prod(tf.cast(shape, tf.int32))
    bits = tf.random.stateless_uniform([2, (size + 1) // 2], seed, None, None, tf.int32)
    first, second = tf.unstack(tf.cast(bits, tf.float32))
    radius = tf.sqrt(-2.0 * tf.math.log((tf.abs(first) + 0.5) * 2.0**-31))
    angle = second * (math.pi * 2.0**-31)
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], 0)
    return tf.reshape(pairs[:size], shape)


def _key_words(seed: int | None) -> list[int]:
    """Two words of 63 bits: secret without a seed, spread from it otherwise."""
    if seed is None:
        words = np.frombuffer(os.urandom(16), np.uint64).tolist()
    else:
        words = np.random.SeedSequence(seed).generate_state(2, np.uint64).tolist()
    return [word & _WORD for word in words]
