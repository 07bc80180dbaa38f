"""How embeddings move with their inputs, computed once for all records."""

from __future__ import annotations

import math

import tensorflow as tf

from dp_transcribe.distillation.kernels import Kernel


def embedding_jacobians(kernel: Kernel, inputs: tf.Tensor) -> tf.Tensor | None:
    """Jacobians of the embeddings, one per input.

    All records' gradients pass through the same Jacobians, which take one forward
    pass per pixel; nothing is propagated back through the embedding per record.

    Args:
        kernel: the kernel.
        inputs: float32 `[n, ...]`.

    Returns:
        float32 `[n, features, pixels]`, or None where the embedding is the input.
    """
    if kernel.embeds_identically:
        return None
    return tf.stack([_jacobian(kernel, example) for example in inputs])


def _jacobian(kernel: Kernel, example: tf.Tensor) -> tf.Tensor:
    """Jacobian of one embedding, `[features, pixels]`, by forward differentiation."""
    pixels = math.prod(example.shape)
    repeated = tf.repeat(example[None], pixels, axis=0)
    directions = tf.reshape(tf.eye(pixels), [pixels, *example.shape])
    with tf.autodiff.ForwardAccumulator(repeated, directions) as accumulator:
        embedded = kernel.embed(repeated)
    return tf.transpose(accumulator.jvp(embedded))
