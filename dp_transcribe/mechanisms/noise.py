"""Secret, counter-based randomness: one fresh stream per draw, never one twice."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class _Hidden:
    """Variables where neither Keras nor `tf.train.Checkpoint` finds them.

    Callbacks put the weights of Keras back to what they were, hand them to other models
    and draw them into logs; a checkpoint of TensorFlow would turn the counter back.
    """

    key: tf.Variable
    counter: tf.Variable


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
        self._hidden = _Hidden(
            key=tf.Variable(
                tf.constant(_key_words(self.seed), tf.int64), trainable=False
            ),
            counter=tf.Variable(
                tf.zeros([], tf.int64),
                trainable=False,
                aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
            ),
        )
        self.built = True

    @property
    def key(self) -> tf.Variable:
        """The key, int64 `[2]`."""
        return self._hidden.key

    @property
    def counter(self) -> tf.Variable:
        """How many numbers were taken, a scalar int64."""
        return self._hidden.counter

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments, without the key."""
        return {"name": self.name, "seed": self.seed}

    def state(self) -> dict[str, np.ndarray]:
        """Key and counter. **Privacy**: as secret as what the noise protects."""
        return {"key": self.key.numpy(), "counter": self.counter.numpy()}

    def save_own_variables(self, store: Any) -> None:
        """Writes key and counter."""
        for name, value in self.state().items():
            store[name] = value

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote.

        The counter of a key never goes back: what was drawn since is not drawn again.
        """
        key, counter = np.asarray(store["key"]), int(np.asarray(store["counter"]))
        own = self.state()
        if np.array_equal(key, own["key"]):
            counter = max(counter, int(own["counter"]))
        self.key.assign(key)
        self.counter.assign(counter)

    def renew(self, entropy: np.ndarray) -> None:
        """Takes a new key; a source with a seed keeps its own.

        Args:
            entropy: uint8 `[16]`, from `secret_bytes`, the same on all workers.
        """
        if self.seed is None:
            self.key.assign(_words(entropy))

    def advance(self) -> tf.Tensor:
        """Takes the next number; call once per update, before it draws anything.

        Returns:
            The number taken, a scalar int64; the same on every replica.
        """
        number = tf.identity(self.counter)
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
        key = tf.convert_to_tensor(self.key)
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
    Here the radius has 40 bits and the angle 24, so tails reach 7.4 deviations.

    Args:
        shape: of the result; may be a tensor.
        seed: `[2]`, as `NoiseSource.stream` returns it.

    Returns:
        float32, the same numbers for the same shape and seed.
    """
    size = tf.reduce_prod(tf.cast(shape, tf.int32))
    bits = tf.random.stateless_uniform([2, (size + 1) // 2], seed, None, None, tf.int32)
    first, second = tf.unstack(bits)
    # What the angle leaves of its word refines the radius, which only shows far out.
    fine = tf.cast(tf.bitwise.bitwise_and(second, 255), tf.float32)
    whole = tf.abs(tf.cast(first, tf.float32))
    radius = tf.sqrt(-2.0 * tf.math.log((whole + (fine + 0.5) / 256.0) * 2.0**-31))
    angle = tf.cast(tf.bitwise.right_shift(second, 8), tf.float32)
    angle *= math.pi * 2.0**-23
    pairs = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], 0)
    return tf.reshape(pairs[:size], shape)


def secret_bytes() -> np.ndarray:
    """Entropy for one key from the operating system, uint8 `[16]`."""
    return np.frombuffer(os.urandom(16), np.uint8)


def _key_words(seed: int | None) -> list[int]:
    """Two words of 63 bits: secret without a seed, spread from it otherwise."""
    if seed is None:
        return _words(secret_bytes())
    spread = np.random.SeedSequence(seed).generate_state(2, np.uint64)
    return _words(spread.view(np.uint8))


def _words(entropy: np.ndarray) -> list[int]:
    """16 bytes as two words of 63 bits."""
    return [word & _WORD for word in entropy.view(np.uint64).tolist()]
