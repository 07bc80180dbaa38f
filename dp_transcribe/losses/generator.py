"""What a generator minimises, each term a scalar.

The discriminator whose outputs these read is the student, or, for a generator that is
not covered by the guarantee, the teacher.
"""

from __future__ import annotations

import tensorflow as tf


def one_hot(logits: tf.Tensor) -> tf.Tensor:
    """Cross entropy of the discriminator's output with its own most probable class.

    Small where the discriminator is sure, as it is of examples like those it learned
    from.

    Args:
        logits: float32 `[batch, classes]`.

    Returns:
        Scalar, in nats.

    References:
        Chen et al. 2019, DAFL, arXiv:1904.01186.
    """
    labels = tf.argmax(logits, axis=-1)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(losses)


def information_entropy(logits: tf.Tensor) -> tf.Tensor:
    """Negative entropy of the mean prediction of the batch.

    Smallest, minus the logarithm of the number of classes, where all classes come up
    equally often.

    Args:
        logits: float32 `[batch, classes]`.

    Returns:
        Scalar, in nats, 0 or less.

    References:
        Chen et al. 2019, DAFL, arXiv:1904.01186.
    """
    mean = tf.reduce_mean(tf.nn.softmax(logits, axis=-1), axis=0)
    return tf.reduce_sum(tf.math.xlogy(mean, mean))


def activation(features: tf.Tensor) -> tf.Tensor:
    """Negative mean absolute feature: real examples excite the features more.

    Args:
        features: float32 `[batch, ...]`, what the discriminator's last layer reads.

    Returns:
        Scalar, 0 or less.

    References:
        Chen et al. 2019, DAFL, arXiv:1904.01186.
    """
    return -tf.reduce_mean(tf.abs(features))


def adversarial(logits: tf.Tensor, released: tf.Tensor) -> tf.Tensor:
    """Negative distance of the student's predictions from the released answers.

    Leads to queries on which the student is wrong. Only the student is differentiated:
    the answers count as constants.

    Args:
        logits: The student's, float32 `[batch, classes]`.
        released: Answers that a mechanism let through, `[batch, classes]`.

    Returns:
        Scalar between -2 and 0 for answers that are probabilities.

    **Privacy**: post-processing, as long as `released` is what was released.

    References:
        Fang et al. 2019, data-free adversarial distillation, arXiv:1912.11006;
        Truong et al. 2021, DFME, arXiv:2011.14779 (the L1 distance).
    """
    probabilities = tf.nn.softmax(logits, axis=-1)
    distance = tf.abs(probabilities - tf.stop_gradient(released))
    return -tf.reduce_mean(tf.reduce_sum(distance, axis=-1))


def student_disagreement(logits: tf.Tensor, second_logits: tf.Tensor) -> tf.Tensor:
    """Negative disagreement of two students: queries neither can be sure of.

    Two students that saw the same answers differ where the answers do not yet decide.
    No answer of the teacher is needed to find such a query.

    Args:
        logits: The first student's, float32 `[batch, classes]`.
        second_logits: The second student's.

    Returns:
        Scalar: minus the standard deviation between the two predicted probabilities,
        summed over classes and averaged over the batch.

    References:
        Rosenthal et al. 2023, DisGUIDE, AAAI 2023.
    """
    first = tf.nn.softmax(logits, axis=-1)
    second = tf.nn.softmax(second_logits, axis=-1)
    deviation = 0.5 * tf.abs(first - second)
    return -tf.reduce_mean(tf.reduce_sum(deviation, axis=-1))
