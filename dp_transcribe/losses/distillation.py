"""What a student minimises: distances to released answers, one per example.

None of these is averaged over the batch: a mechanism bounds the contribution of each
example, so it must see each example's loss by itself.
"""

from __future__ import annotations

import tensorflow as tf


def cross_entropy(targets: tf.Tensor, student_logits: tf.Tensor) -> tf.Tensor:
    """Cross entropy with soft or one-hot targets.

    Args:
        targets: float32 `[batch, classes]`, probabilities or one-hot labels.
        student_logits: float32 `[batch, classes]`.

    Returns:
        float32 `[batch]`, in nats.
    """
    log_probabilities = tf.nn.log_softmax(tf.cast(student_logits, tf.float32), axis=-1)
    return -tf.reduce_sum(tf.cast(targets, tf.float32) * log_probabilities, axis=-1)


def kl_divergence(
    teacher_probabilities: tf.Tensor, student_logits: tf.Tensor
) -> tf.Tensor:
    """Kullback-Leibler divergence of the student from the teacher.

    Its gradient is that of `cross_entropy`; its value is zero where they agree.

    Args:
        teacher_probabilities: float32 `[batch, classes]`, rows sum to 1.
        student_logits: float32 `[batch, classes]`.

    Returns:
        float32 `[batch]`, in nats, 0 or more.

    References:
        Hinton et al. 2015, "Distilling the Knowledge in a Neural Network",
        arXiv:1503.02531.
    """
    probabilities = tf.cast(teacher_probabilities, tf.float32)
    negative_entropy = tf.reduce_sum(
        tf.math.xlogy(probabilities, probabilities), axis=-1
    )
    return negative_entropy + cross_entropy(probabilities, student_logits)
