"""Randomised response on the teacher's label, plain and selective."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.base import AnswerMechanism, Released
from dp_transcribe.mechanisms.candidates import top_candidates
from dp_transcribe.privacy.events import Event, PureDpEvent
from dp_transcribe.privacy.units import Relation


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomizedResponse(AnswerMechanism):
    """Releases the teacher's label by K-ary randomised response, once per query.

    The label is told with probability e^ε₀/(e^ε₀+K−1), any other class with
    1/(e^ε₀+K−1).

    Args:
        epsilon: ε₀; None lets `fit` take it from `target_epsilon`.

    **Privacy**: unit `RESPONSE`, replace-one, pure ε₀ (delta 0) per answer, which is
    memoised and never asked again.

    References:
        Warner 1965; Ghazi et al. 2021, arXiv:2102.06062, algorithm 1.
    """

    relation: ClassVar[Relation] = Relation.REPLACE_ONE

    epsilon: float | None = None

    def __post_init__(self) -> None:
        """Checks the parameters."""
        if self.epsilon is not None:
            _validate.positive_finite("epsilon", self.epsilon)

    @property
    def is_calibrated(self) -> bool:
        """Whether `epsilon` is fixed."""
        return self.epsilon is not None

    def event(self) -> Event:
        """A pure release of `epsilon`."""
        return PureDpEvent(self._epsilon)

    def calibrated(
        self,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> RandomizedResponse:
        """A copy whose epsilon is the target: an answer is released once."""
        _validate.fraction_open("delta", delta)
        target = _validate.positive_finite("target_epsilon", target_epsilon)
        return dataclasses.replace(self, epsilon=target)

    def check(self, num_classes: int) -> None:
        """Fits any number of classes."""

    def candidates(self, prior: tf.Tensor) -> tf.Tensor:
        """All classes, `[batch, classes]`; a subclass selects by the prior."""
        return tf.ones_like(prior)

    def release(
        self, answers: tf.Tensor, prior: tf.Tensor, seed: tf.Tensor
    ) -> Released:
        """One-hot private labels.

        An answer that is not finite counts as a label outside of the candidates.
        """
        keep = self.candidates(prior)
        label = tf.one_hot(tf.argmax(answers, -1), answers.shape[-1])
        finite = tf.reduce_all(tf.math.is_finite(answers), -1, keepdims=True)
        label = tf.where(finite, label, 0.0)
        scores = self._epsilon * label * keep
        drawn = _stateless_choice(tf.where(keep > 0, scores, -math.inf), seed)
        return Released(tf.one_hot(drawn, answers.shape[-1]), keep)

    def log_likelihood(self, released: Released) -> tf.Tensor:
        """The channel's log probabilities.

        For a class outside of the candidates the answer is uniform over them, which
        says nothing: 1/k.
        """
        keep = released.candidates
        count = tf.reduce_sum(keep, -1, keepdims=True)
        # e^ε₀ itself would overflow; relative to the truth nothing does.
        truth = -tf.math.log1p((count - 1.0) * math.exp(-self._epsilon))
        inside = self._epsilon * (released.answers - 1.0) + truth
        return tf.where(keep > 0, inside, -tf.math.log(count))

    def estimates(self, released: Released) -> tf.Tensor:
        """Unbiased estimates of the one-hot labels, `[batch, classes]`."""
        odds = math.exp(-self._epsilon)
        others = float(released.answers.shape[-1] - 1)
        truth, lie = 1.0 / (1.0 + others * odds), odds / (1.0 + others * odds)
        return (released.answers - lie) / (truth - lie)

    @property
    def _epsilon(self) -> float:
        if self.epsilon is None:
            raise ValueError(
                "The epsilon of the randomised response is not known yet. Pass "
                "`epsilon`, or `target_epsilon` to `fit`."
            )
        return self.epsilon


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveRandomizedResponse(RandomizedResponse):
    """Randomised response among the k classes that a prior holds likely.

    If the teacher's label y is among the candidates, it is told with probability
    e^ε₀/(e^ε₀+k−1) and each other candidate with 1/(e^ε₀+k−1); otherwise the answer
    is uniform over them. With fewer candidates the truth is told more often.

    Args:
        epsilon: ε₀; None lets `fit` take it from `target_epsilon`.
        top_k: number of candidates; None chooses for every query the k that is most
            likely to tell the truth, argmax_k e^ε₀/(e^ε₀+k−1)·Σ_{top k} prior.
        min_k: the least k of that choice. k = 1 tells what was known.
        smoothing: share of the uniform distribution mixed into the prior for that
            choice, since a student in training is surer than it is right.

    **Privacy**: unit `RESPONSE`, replace-one, pure ε₀ per answer, since the candidates
    come from the student (post-processing of other answers), never from the
    teacher's scores for this query.

    References:
        RRTop-k and RRWithPrior: Ghazi et al. 2021, arXiv:2102.06062, algorithms 2, 3;
        selective randomised response: arXiv:2409.12384; with the student as prior:
        DPSD, arXiv:2601.19090.
    """

    top_k: int | None = None
    min_k: int = 2
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Checks the parameters."""
        super().__post_init__()
        _validate.positive_int("min_k", self.min_k)
        _validate.probability("smoothing", self.smoothing)
        if self.top_k is not None:
            _validate.positive_int("top_k", self.top_k)

    def check(self, num_classes: int) -> None:
        """Refuses a k above the number of classes."""
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 1, num_classes)
        _validate.in_range("min_k", self.min_k, 1, num_classes)

    def candidates(self, prior: tf.Tensor) -> tf.Tensor:
        """The k likeliest classes under the prior, `[batch, classes]`."""
        if self.top_k is not None:
            return top_candidates(prior, self.top_k)
        uniform = self.smoothing / prior.shape[-1]
        prior = (1.0 - self.smoothing) * prior + uniform
        mass = tf.cumsum(tf.sort(prior, direction="DESCENDING"), axis=-1)
        k = tf.range(1, prior.shape[-1] + 1, dtype=tf.float32)
        truth = mass / (1.0 + (k - 1.0) * math.exp(-self._epsilon))
        best = tf.argmax(truth[:, self.min_k - 1 :], -1) + self.min_k
        return top_candidates(prior, best)


def _stateless_choice(logits: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """One class per row by the Gumbel trick, `[batch]` int64."""
    uniform = tf.random.stateless_uniform(
        tf.shape(logits), seed, minval=1e-30, maxval=1.0, dtype=tf.float64
    )
    gumbel = -tf.math.log(-tf.math.log(uniform))
    return tf.argmax(tf.cast(logits, tf.float64) + gumbel, -1)
