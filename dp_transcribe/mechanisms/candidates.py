"""Candidate sets of classes, taken from a prior and never from the answer."""

from __future__ import annotations

import tensorflow as tf


def top_candidates(scores: tf.Tensor, k: tf.Tensor | int | None) -> tf.Tensor:
    """Marks the k highest scores of every row.

    Args:
        scores: `[batch, classes]`: the student's logits or probabilities. **Never
            the teacher's**: a candidate set chosen from the answer gives it away.
        k: number of candidates, a scalar or `[batch]`; None is all classes.

    Returns:
        `[batch, classes]` float32, 1 for a candidate; ties go to the lower class.
    """
    if k is None:
        return tf.ones_like(scores, tf.float32)
    order = tf.argsort(scores, direction="DESCENDING", stable=True)
    ranks = tf.argsort(order, stable=True)
    limits = tf.reshape(tf.cast(k, tf.int32), [-1, 1])
    return tf.cast(ranks < limits, tf.float32)
