"""DPDFD: per-answer gradients of the student's weights, bounded, summed, noised."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import Batch, GradientMechanism, Noise, Release
from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from dp_transcribe.mechanisms.clipping.step import PATHS


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClippedGradient(GradientMechanism):
    """Clips each answer's weight gradient to C, sums, adds N(0, σ²C²) once.

    Args:
        noise_multiplier: σ, the noise's standard deviation over the sensitivity C.
        l2_norm: the clip norm C.
        monitor_share: share of the squared norm spent on agreement and loss.
        distillation_loss: "kl_divergence" or "cross_entropy".
        clipping: "ghost" (one pass), "vectorized" or "tf_privacy".
        microbatches: parts computed one after the other; saves memory only.

    **Privacy**: unit `RESPONSE`, zero-out. An answer moves the sum by at most C; one
    Gaussian event per update that it enters.

    References:
        Abadi et al. 2016, arXiv:1607.00133; as A_{C,σ} in DPDFD, arXiv:2304.12528.
    """

    clipping: str = "ghost"
    microbatches: int = 1

    reusable: ClassVar[bool] = True
    _normalize: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        _validate.one_of("clipping", self.clipping, PATHS)
        _validate.positive_int("microbatches", self.microbatches)

    @property
    def shared_stddevs(self) -> tuple[float, float]:
        """σC on every coordinate of the joint release."""
        return self.stddev, self.stddev

    def summed(self, student: keras.Model, batch: Batch, noise: Noise) -> Release:
        """Sum of the bounded weight gradients and statistics of the rows."""

        def losses(answers: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
            return self.losses(answers, batch.adjusted(logits))

        clipped = clipped_gradient_sum(
            student,
            batch.queries,
            batch.answers,
            losses,
            l2_norm=self.gradient_norm,
            normalize=self._normalize,
            mask=batch.mask,
            clipping=self.clipping,
            microbatches=self.microbatches,
        )
        statistics = self.monitored(
            batch, batch.adjusted(clipped.outputs), clipped.losses
        )
        return Release(clipped.gradients, statistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedGradient(ClippedGradient):
    """As `ClippedGradient`, but every gradient is scaled *to* the norm C.

    The default of DPDFD: the clip norm needs no tuning, since the learning rate
    takes its place.

    References:
        DPDFD, arXiv:2304.12528; Bu et al. 2022, arXiv:2206.07136.
    """

    _normalize: ClassVar[bool] = True
