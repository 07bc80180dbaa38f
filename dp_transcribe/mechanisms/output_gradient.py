"""DPDFD as published, DPSD data-sensitive: noisy gradients at the logits."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import Batch, GradientMechanism, Noise, Release
from dp_transcribe.mechanisms.candidates import top_candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedOutputGradient(GradientMechanism):
    """Normalises each answer's gradient at the student's logits and noises it.

    The row g = ∂loss/∂logits is restricted to the student's top k classes, scaled
    to norm C and gets N(0, σ²C²) on each of the k coordinates; the chain rule to the
    weights is post-processing. The published code divides by the largest entry of
    the whole batch and adds a noisy copy of the same mean to every row: then no
    row's norm is bounded. Here each row is bounded by its own L2 norm.

    Args:
        noise_multiplier: σ, the noise's standard deviation over the sensitivity C.
        l2_norm: the bound C of a row.
        monitor_share: share of the squared norm spent on agreement and loss.
        distillation_loss: "kl_divergence" or "cross_entropy".
        top_k: number of classes kept, by the student's own prediction; None is all.

    **Privacy**: unit `RESPONSE`, zero-out, one Gaussian event per answer. The rows
    are noised one by one, so sampling from a pool does not amplify: fresh queries.

    References:
        DPDFD, arXiv:2304.12528; DPSD, arXiv:2601.19090.
    """

    top_k: int | None = None

    reusable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        if self.top_k is not None:
            _validate.positive_int("top_k", self.top_k)

    def check(self, num_classes: int) -> None:
        """Refuses a `top_k` above the number of classes."""
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 1, num_classes)

    @property
    def shared_stddevs(self) -> tuple[float, float]:
        """None on the gradients, whose rows are noised; σC on the statistics."""
        return 0.0, self.stddev

    def summed(self, student: keras.Model, batch: Batch, noise: Noise) -> Release:
        """Chain rule from the noisy rows to the student's weights."""
        with tf.GradientTape() as tape:
            logits = batch.adjusted(student(batch.queries, training=True))
        with tf.GradientTape() as row_tape:
            row_tape.watch(logits)
            losses = self.losses(batch.answers, logits)
        rows = self._noisy_rows(row_tape.gradient(losses, logits), logits, noise)
        rows *= batch.mask[:, None]
        gradients = tape.gradient(logits, student.trainable_variables, rows)
        return Release(gradients, self.monitored(batch, logits, losses))

    def _noisy_rows(
        self, rows: tf.Tensor, logits: tf.Tensor, noise: Noise
    ) -> tf.Tensor:
        keep = top_candidates(logits, self.top_k)
        bounded = normalized_rows(rows * keep) * self.gradient_norm
        return bounded + noise(tf.shape(rows)) * self.stddev * keep


def normalized_rows(rows: tf.Tensor) -> tf.Tensor:
    """Rows `[batch, classes]` of L2 norm one; zero, NaN and infinite ones are zero.

    **Privacy**: every row's norm is at most one, whatever the other rows hold.
    """
    norms = tf.norm(rows, axis=-1, keepdims=True)
    usable = tf.math.is_finite(norms) & (norms > 1e-12)
    return tf.where(usable, rows / tf.where(usable, norms, 1.0), 0.0)
