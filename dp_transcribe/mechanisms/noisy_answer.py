"""DPSD data-sensitive read as a private label: the noisy answer itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import (
    AnswerMechanism,
    Released,
    calibrated_gaussian,
    gaussian_event,
    gaussian_stddev,
)
from dp_transcribe.mechanisms.candidates import top_candidates
from dp_transcribe.mechanisms.noise import standard_normal
from dp_transcribe.mechanisms.output_gradient import normalized_rows
from dp_transcribe.privacy.events import Event


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyAnswer(AnswerMechanism):
    """Releases the centred, normalised answer plus Gaussian noise, once per query.

    The teacher's probabilities are restricted to the prior's top k classes, centred
    over them and scaled to norm C; each of the k coordinates gets N(0, σ²C²).

    Args:
        noise_multiplier: σ; None lets `fit` compute it from `target_epsilon`.
        l2_norm: the bound C of an answer; only σ matters for what is learnt.
        top_k: number of classes kept, by the student's prediction; None is all.
        smoothing: chooses k for every query instead, so that the candidates' directions
            lie far apart and the truth is likely among them: argmax_k k/(k-1) times
            the prior's mass on its top k. This share of the uniform distribution is
            mixed into the prior, since a student in training is surer than it is right.

    **Privacy**: unit `RESPONSE`, zero-out: an answer moves the release by at most C.
    One Gaussian event per answer, which is memoised and never asked again.

    References:
        DPSD, arXiv:2601.19090 (top-k reduction, normalisation and noise).
    """

    noise_multiplier: float | None = None
    l2_norm: float = 1.0
    top_k: int | None = None
    smoothing: float | None = None

    def __post_init__(self) -> None:
        """Checks the parameters."""
        _validate.positive_finite("l2_norm", self.l2_norm)
        if self.noise_multiplier is not None:
            _validate.non_negative("noise_multiplier", self.noise_multiplier)
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 2, 10**6)
        if self.smoothing is not None:
            _validate.probability("smoothing", self.smoothing)
            if self.top_k is not None:
                expected = "None when `top_k` is given"
                raise _validate.invalid("smoothing", self.smoothing, expected)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of one release when its answer is zeroed out."""
        return self.l2_norm

    @property
    def is_calibrated(self) -> bool:
        """Whether `noise_multiplier` is fixed."""
        return self.noise_multiplier is not None

    def event(self) -> Event:
        """Gaussian of `noise_multiplier`, which is relative to the sensitivity."""
        return gaussian_event(self.noise_multiplier)

    def calibrated(
        self,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> NoisyAnswer:
        """A copy with the least noise multiplier that keeps the target."""
        return calibrated_gaussian(self, target_epsilon, delta, schedule, accountant)

    def check(self, num_classes: int) -> None:
        """Refuses a `top_k` above the number of classes."""
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 2, num_classes)

    def release(
        self, answers: tf.Tensor, prior: tf.Tensor, seed: tf.Tensor
    ) -> Released:
        """Noisy directions of the answers, zero outside of the candidates."""
        keep = top_candidates(prior, self._number_of_candidates(prior))
        count = tf.reduce_sum(keep, -1, keepdims=True)
        mean = tf.reduce_sum(answers * keep, -1, keepdims=True) / count
        bounded = normalized_rows((answers - mean) * keep) * self.l2_norm
        noise = standard_normal(tf.shape(answers), seed)
        return Released(bounded + noise * (self._stddev * keep), keep)

    def _number_of_candidates(self, prior: tf.Tensor) -> tf.Tensor | int | None:
        """How many classes every query keeps, `[batch]` or one number for all."""
        if self.smoothing is None:
            return self.top_k
        classes = prior.shape[-1]
        prior = (1.0 - self.smoothing) * prior + self.smoothing / classes
        mass = tf.cumsum(tf.sort(prior, direction="DESCENDING"), axis=-1)[:, 1:]
        k = tf.range(2, classes + 1, dtype=tf.float32)
        return tf.argmax(mass * k / (k - 1.0), -1) + 2

    def log_likelihood(self, released: Released) -> tf.Tensor:
        """Gaussian likelihood of the direction of each class.

        A class outside of the candidates points nowhere: its likelihood is that of
        the average candidate, so that no probability is moved to or from it.
        """
        keep = released.candidates
        count = tf.reduce_sum(keep, -1, keepdims=True)
        scale = self.l2_norm * tf.sqrt(count / (count - 1.0))
        mean = tf.reduce_sum(released.answers, -1, keepdims=True) / count
        variance = max(self._stddev, MIN_STDDEV * self.l2_norm) ** 2
        return (released.answers - mean) * keep * scale / variance

    def estimates(self, released: Released) -> tf.Tensor:
        """Unbiased estimates of one-hot answers, `[batch, classes]`."""
        classes = float(released.answers.shape[-1])
        length = math.sqrt(1.0 - 1.0 / classes)
        return released.answers * (length / self.l2_norm) + 1.0 / classes

    @property
    def _stddev(self) -> float:
        return gaussian_stddev(self.noise_multiplier, self.sensitivity)


# Below this noise the likelihood is taken as if it were noisier: an answer that is
# not one-hot lies between two directions, and a sharp likelihood would pick one.
MIN_STDDEV = math.sqrt(0.1)
