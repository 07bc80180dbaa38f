"""How a small change of an input moves its embedding."""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf


class EmbeddingJacobian(NamedTuple):
    """Jacobian of the embedding of one input, without the zeros it is known to have.

    Inputs are in interleaved parts and features in as many consecutive ones, as the
    colours of an image and of its scattering coefficients are: a part of the inputs
    moves that part of the features alone, before the embedding is brought to norm one.

    Attributes:
        blocks: float32 `[blocks, inputs of a block, features of a block]`.
        unit: float32 `[features]`, the direction in which an embedding of norm one
            cannot move, which is taken out of what `blocks` do; zero for none.
    """

    blocks: tf.Tensor
    unit: tf.Tensor

    @classmethod
    def dense(cls, jacobian: tf.Tensor) -> EmbeddingJacobian:
        """One of which nothing is known.

        Args:
            jacobian: float32 `[inputs, features]`.
        """
        return cls(jacobian[None], tf.zeros_like(jacobian[0]))

    def pulled(self, rows: tf.Tensor) -> tf.Tensor:
        """Carries gradients with respect to the features back to the input.

        Args:
            rows: float32 `[n, features]`.

        Returns:
            float32 `[n, inputs]`, each row times the transposed Jacobian.
        """
        along = tf.linalg.matvec(rows, self.unit)[:, None]
        return self._by_blocks(rows) - along * self._by_blocks(self.unit[None])

    def _by_blocks(self, rows: tf.Tensor) -> tf.Tensor:
        count, inputs, _ = self.blocks.shape
        parts = tf.split(rows, count, axis=1)
        moved = [
            tf.matmul(part, block, transpose_b=True)
            for part, block in zip(parts, tf.unstack(self.blocks), strict=True)
        ]
        return tf.reshape(tf.stack(moved, axis=2), [-1, inputs * count])
