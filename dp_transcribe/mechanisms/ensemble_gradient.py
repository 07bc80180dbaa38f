"""One bounded gradient per teacher of an ensemble, summed and noised once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import (
    MAX_LOSS,
    Batch,
    GradientMechanism,
    Noise,
    Release,
)
from dp_transcribe.mechanisms.noisy_votes import check_ensemble
from dp_transcribe.privacy.units import Relation, Unit

SPACES = ("logits", "weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EnsembleGradient(GradientMechanism):
    """Sums each teacher's gradient on the batch, clipped to C, plus one noise draw.

    A teacher's contribution is one vector: the gradient of the mean distillation loss
    of the whole batch against this teacher's answers and, with `monitor_share` of the
    squared norm, the share of the batch on which the student agrees with it and its
    bounded loss.

    Args:
        noise_multiplier: σ, the noise's standard deviation over the sensitivity.
        l2_norm: the clip norm C of a teacher's contribution.
        monitor_share: share of the squared norm spent on agreement and loss.
        distillation_loss: "kl_divergence" or "cross_entropy"; their gradients agree.
        num_teachers: K, the number of teachers in the ensemble.
        space: "logits" bounds and noises the gradient with respect to the student's
            logits on the batch, `batch * classes` numbers over √batch; the chain rule
            to the weights is post-processing. "weights" does it with the gradient of
            the weights, which takes K backward passes. The noise is as long as the
            square root of the dimension, so small ensembles teach less that way.

    **Privacy**: unit `RECORD`, replace-one. A record decides about one teacher, whose
    contribution of norm at most C may become any other: the sum moves by 2 C. One
    Gaussian event per update, and *all* updates compose, whatever the queries.
    All teachers take part in every update. Poisson sampling of teachers is not
    offered: it is accounted under add-or-remove, while a record *replaces* a teacher.
    NaN contributions count as zero.
    """

    unit: ClassVar[Unit] = Unit.RECORD
    relation: ClassVar[Relation] = Relation.REPLACE_ONE
    reusable: ClassVar[bool] = False

    num_teachers: int
    l2_norm: float = 0.5
    space: str = "logits"

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        _validate.in_range("num_teachers", self.num_teachers, 2, 10**6)
        _validate.one_of("space", self.space, SPACES)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the sum when one teacher is replaced: 2 C."""
        return 2.0 * self.l2_norm

    @property
    def shared_stddevs(self) -> tuple[float, float]:
        """On gradients and statistics; rows of logits are noised before the chain."""
        return (0.0 if self.space == "logits" else self.stddev), self.stddev

    def divisor(self, batch_size: int) -> int:
        """A sum over teachers of means over the batch is divided by the teachers."""
        return self.num_teachers

    def check_teacher(self, teacher: Any) -> None:
        """Refuses a teacher that is not an ensemble of `num_teachers`."""
        check_ensemble(self.num_teachers, teacher)

    def ask(self, teacher: Any, images: tf.Tensor) -> tf.Tensor:
        """Every member's probabilities `[batch, teachers, classes]`. Protected."""
        return teacher.member_probabilities(images)

    def summed(self, student: keras.Model, batch: Batch, noise: Noise) -> Release:
        """The teachers' sum of clipped mean gradients; with "logits" noised already.

        Args:
            student: ends in logits.
            batch: queries and answers `[batch, teachers, classes]`.
            noise: standard Gaussian noise of this replica.

        Returns:
            This replica's part of the sums over teachers.
        """
        with tf.GradientTape(persistent=self.space == "weights") as tape:
            logits = batch.adjusted(student(batch.queries, training=True))
        # With several replicas each bounds its own part of a contribution.
        parts = _replicas()
        rows = tf.cast(tf.shape(logits)[0], tf.float32)
        residuals, keep = self._residuals(batch, logits)
        statistics = self._statistics(batch, logits, keep) / parts
        variables = student.trainable_variables
        if self.space == "weights":
            each = tf.transpose(residuals, [1, 0, 2]) / (rows * parts)
            bound = self.gradient_norm / parts
            gradients = _sum_over_teachers(tape, logits, each, bound, variables)
            return Release(gradients, statistics)
        length = tf.sqrt(rows * parts)
        total = _clipped_sum(residuals / length, self.gradient_norm / math.sqrt(parts))
        total += noise(tf.shape(total)) * self.stddev
        gradients = tape.gradient(logits, variables, total / length)
        return Release([tf.convert_to_tensor(g) for g in gradients], statistics)

    def _residuals(
        self, batch: Batch, logits: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Gradients of the loss by the logits, `[batch, teachers, classes]`.

        And which teachers gave finite answers to the whole batch, bool `[teachers]`.
        """
        rows = (tf.nn.softmax(logits)[:, None] - batch.answers) * batch.mask[
            :, None, None
        ]
        keep = tf.reduce_all(tf.math.is_finite(rows), [0, 2])
        return tf.where(keep[None, :, None], rows, 0.0), keep

    def _statistics(
        self, batch: Batch, logits: tf.Tensor, keep: tf.Tensor
    ) -> tf.Tensor:
        """Sum over teachers of agreement and bounded loss, each a mean over the batch.

        A teacher's pair has a norm of at most `statistics_norm`.
        """
        agree = tf.argmax(logits, -1)[:, None] == tf.argmax(batch.answers, -1)
        log_probabilities = tf.nn.log_softmax(logits)[:, None]
        losses = -tf.reduce_sum(batch.answers * log_probabilities, -1)
        bounded = tf.clip_by_value(losses / MAX_LOSS, 0.0, 1.0)
        pairs = tf.stack([tf.cast(agree, tf.float32), bounded], -1)
        usable = keep[None, :, None] & tf.math.is_finite(pairs)
        means = tf.reduce_mean(tf.where(usable, pairs, 0.0), 0)
        return tf.reduce_sum(means, 0) * (self.statistics_norm / math.sqrt(2.0))


def _clipped_sum(contributions: tf.Tensor, bound: float) -> tf.Tensor:
    """Sum over teachers `[rows, teachers, classes]`, each clipped jointly.

    Returns:
        `[rows, classes]`, which one teacher moves by at most `bound`.
    """
    norms = tf.sqrt(tf.reduce_sum(contributions**2, [0, 2]))
    factors = bound / tf.maximum(norms, bound)
    return tf.einsum("rkc,k->rc", contributions, factors)


def _sum_over_teachers(
    tape: tf.GradientTape,
    logits: tf.Tensor,
    residuals: tf.Tensor,
    bound: float,
    variables: list[Any],
) -> list[tf.Tensor]:
    """Sum of the teachers' gradients of the weights, each clipped to `bound`.

    The graph holds one backward pass, which is repeated for every teacher.

    Args:
        tape: persistent, has seen the student.
        logits: `[rows, classes]`.
        residuals: `[teachers, rows, classes]`, gradients by the logits.
        bound: of each teacher's gradient over all variables.
        variables: of the student.
    """

    def clipped(residual: tf.Tensor) -> list[tf.Tensor]:
        gradients = tape.gradient(logits, variables, residual)
        norm = tf.linalg.global_norm(gradients)
        usable = tf.math.is_finite(norm)
        factor = bound / tf.maximum(tf.where(usable, norm, bound), bound)
        return [tf.where(usable, g * factor, tf.zeros_like(g)) for g in gradients]

    def add(sums: list[tf.Tensor], residual: tf.Tensor) -> list[tf.Tensor]:
        return [s + g for s, g in zip(sums, clipped(residual), strict=True)]

    zeros = [tf.zeros(variable.shape) for variable in variables]
    return tf.foldl(add, residuals, initializer=zeros, parallel_iterations=1)


def _replicas() -> int:
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync
