"""GNMax and Confident-GNMax: noisy votes of teachers on disjoint shards."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import dp_accounting
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
from dp_transcribe.mechanisms.noise import ANSWERS, NoiseSource, standard_normal
from dp_transcribe.privacy.events import Event
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.units import Relation, Unit

RELEASES = ("votes", "label")
# Below this noise, relative to the number of teachers, the likelihood is taken as if
# the votes were noisier: a split vote lies between two classes.
_LEAST_NOISE = 0.25
# What tells the check's stream from that of the votes: the highest bit of a key's first
# word, which no part or purpose of `NoiseSource.stream` reaches.
_CHECK = 1 << 62


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyVotes(AnswerMechanism):
    """Releases the vote counts of an ensemble plus Gaussian noise, once per query.

    With `released="label"` only the class of the largest noisy count is kept, which
    is GNMax as published; the cost is the same, the student learns less.

    With a `threshold` this is Confident-GNMax: a query is answered only if its
    largest count plus noise of its own reaches the threshold.

    Args:
        num_teachers: K, the number of teachers in the ensemble.
        noise_multiplier: σ, the noise's standard deviation over the sensitivity √2.
            None lets `fit` compute it from `target_epsilon`.
        released: "votes" or "label".
        top_k: number of candidate classes, by the student's prediction; None is all.
            Votes for other classes are dropped.
        threshold: votes that the check asks for, above 1 and at most `num_teachers`;
            None for no check.
        threshold_ratio: noise multiplier of the check over `noise_multiplier`.
        margin: share of the teachers that is assumed to vote for the true class
            above any other; only the student's loss depends on it.

    **Privacy**: unit `RECORD`, replace-one (the number of records is public). A record
    is in one shard and decides about one teacher, which has one vote with or without
    the record. That vote may move from a class to another, so the counts move by √2 in
    L2 norm (by 1 only if the vote could be missing, which it cannot), and the largest
    count by 1. *Every* query is one Gaussian event, and all of them
    compose; with a threshold the check is one more for every query that is *asked*.
    Inside a transcription every query asked is counted as answered;
    `answer_confidently` counts a number fixed before. The accounting reads no vote:
    `evaluation.data_dependent_cost` does, and its epsilon is not private.

    References:
        Papernot et al. 2018, arXiv:1802.08908; PATE, arXiv:1610.05755. Releasing the
        counts instead of their largest is this library's.
    """

    unit: ClassVar[Unit] = Unit.RECORD
    relation: ClassVar[Relation] = Relation.REPLACE_ONE

    num_teachers: int
    noise_multiplier: float | None = None
    released: str = "votes"
    top_k: int | None = None
    threshold: float | None = None
    threshold_ratio: float = 2.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        """Checks the parameters."""
        _validate.in_range("num_teachers", self.num_teachers, 2, 10**6)
        _validate.one_of("released", self.released, RELEASES)
        if self.noise_multiplier is not None:
            _validate.non_negative("noise_multiplier", self.noise_multiplier)
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 2, 10**6)
        if self.threshold is not None:
            _check_threshold(self.threshold, self.num_teachers)
        _validate.positive_finite("threshold_ratio", self.threshold_ratio)
        _validate.positive_finite("margin", self.margin)

    @property
    def sensitivity(self) -> float:
        """L2 sensitivity of the counts when one teacher is replaced: √2."""
        return math.sqrt(2.0)

    @property
    def threshold_sensitivity(self) -> float:
        """Sensitivity of the largest count when one teacher is replaced."""
        return 1.0

    @property
    def stddev(self) -> float:
        """Standard deviation of the noise on every count, in votes."""
        return gaussian_stddev(self.noise_multiplier, self.sensitivity)

    @property
    def threshold_stddev(self) -> float:
        """Standard deviation of the check's noise, in votes."""
        alone = gaussian_stddev(self.noise_multiplier, self.threshold_sensitivity)
        return alone * self.threshold_ratio

    @property
    def is_calibrated(self) -> bool:
        """Whether `noise_multiplier` is fixed."""
        return self.noise_multiplier is not None

    def event(self) -> Event:
        """Of one query: the votes' Gaussian and, with a threshold, the check's."""
        votes = gaussian_event(self.noise_multiplier)
        if self.threshold is None:
            return votes
        return dp_accounting.ComposedDpEvent([self.threshold_event, votes])

    @property
    def threshold_event(self) -> Event:
        """Of the check alone, for a query that is asked and not answered."""
        if self.noise_multiplier is None:
            return gaussian_event(None)
        return gaussian_event(self.noise_multiplier * self.threshold_ratio)

    def calibrated(
        self,
        target_epsilon: float,
        delta: float,
        schedule: Callable[[Event], Event],
        accountant: str = "rdp",
    ) -> NoisyVotes:
        """A copy with the least noise multiplier that keeps the target."""
        return calibrated_gaussian(self, target_epsilon, delta, schedule, accountant)

    def check(self, num_classes: int) -> None:
        """Refuses a `top_k` above the number of classes."""
        if self.top_k is not None:
            _validate.in_range("top_k", self.top_k, 2, num_classes)

    def check_teacher(self, teacher: Any) -> None:
        """Refuses a teacher that is not an ensemble of `num_teachers`."""
        check_ensemble(self.num_teachers, teacher)

    def release(
        self, answers: tf.Tensor, prior: tf.Tensor, seed: tf.Tensor
    ) -> Released:
        """Noisy counts (or the class of the largest), zero outside the candidates.

        Args:
            answers: `[batch, classes]` shares of the teachers that vote for each
                class. Protected.
            prior: `[batch, classes]`, the student's prediction.
            seed: int64 `[2]`.

        Returns:
            Counts over the number of teachers, or one-hot labels. Where a check
            failed answer and candidates are zero and nothing was answered.
        """
        keep = top_candidates(prior, self.top_k)
        counts = tf.round(answers * float(self.num_teachers)) * keep
        noise = standard_normal(tf.shape(counts), seed)
        noisy = (counts + noise * self.stddev) * keep
        if self.released == "label":
            best = tf.argmax(tf.where(keep > 0, noisy, -math.inf), -1)
            noisy = tf.one_hot(best, counts.shape[-1]) * float(self.num_teachers)
        answered = self.passes(counts, check_seed(seed))[:, None]
        share = noisy / float(self.num_teachers)
        return Released(share * answered, keep * answered)

    def passes(self, counts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        """Which queries pass the noisy check of the threshold.

        Args:
            counts: `[batch, classes]` votes. Protected.
            seed: int64 `[2]`.

        Returns:
            float32 `[batch]`, 1 for a query that is answered.
        """
        if self.threshold is None:
            return tf.ones_like(counts[:, 0])
        noise = standard_normal(tf.shape(counts)[:1], seed)
        largest = tf.reduce_max(counts, -1) + noise * self.threshold_stddev
        return tf.cast(largest >= self.threshold, tf.float32)

    def log_likelihood(self, released: Released) -> tf.Tensor:
        """Gaussian likelihood of the counts if `margin` votes more are for a class.

        Of a label: how likely the noise leaves a class ahead that is `margin` ahead.
        A query that was not answered says nothing.
        """
        keep = released.candidates
        if self.released == "label":
            return self._log_likelihood_of_label(released)
        count = tf.maximum(tf.reduce_sum(keep, -1, keepdims=True), 1.0)
        mean = tf.reduce_sum(released.answers, -1, keepdims=True) / count
        variance = max(self.stddev / self.num_teachers, _LEAST_NOISE) ** 2
        return (released.answers - mean) * keep * (self.margin / variance)

    def _log_likelihood_of_label(self, released: Released) -> tf.Tensor:
        ahead = self.margin * self.num_teachers
        spread = max(self.stddev, _LEAST_NOISE * self.num_teachers) * math.sqrt(2.0)
        advantage = math.log(_above(ahead / spread) / _above(-ahead / spread))
        return released.answers * released.candidates * advantage


def check_seed(seed: tf.Tensor) -> tf.Tensor:
    """Seed of the check's noise, from that of the votes' noise.

    Args:
        seed: int64 `[2]`, as `NoiseSource.stream` returns it.

    Returns:
        int64 `[2]`, a stream that nothing else draws from.

    **Privacy**: as secret as the seed given, none of whose bits is lost. No draw of
    the votes' noise tells it.
    """
    return tf.bitwise.bitwise_xor(seed, tf.constant([_CHECK, 0], tf.int64))


def answer_confidently(
    mechanism: NoisyVotes,
    shares: tf.Tensor,
    ledger: Ledger,
    *,
    noise: NoiseSource,
    limit: int | None = None,
) -> Released:
    """Answers the first queries that pass the check of Confident-GNMax.

    Args:
        mechanism: calibrated, with a threshold. All classes are candidates.
        shares: `[batch, classes]` shares of votes. Protected.
        ledger: where the releases are recorded.
        noise: where the noise comes from.
        limit: how many queries are answered at most; None for all.

    Returns:
        What was released; answers and candidates are zero where the check failed, and
        from the limit on.

    **Privacy**: a check for every query asked, and votes for as many as may be
    answered. Both are recorded before the first check is made, and do not depend on how
    many pass: an epsilon that follows from that number would be known only after it.

    Raises:
        ValueError: the mechanism has no threshold, or the limit is not 1 or more.
            Nothing was spent.
    """
    if mechanism.threshold is None:
        raise _validate.invalid("threshold", None, "a number of votes")
    asked = int(shares.shape[0])
    limit = asked if limit is None else _validate.positive_int("limit", limit)
    unchecked = dataclasses.replace(mechanism, threshold=None, top_k=None)
    ledger.record(_spend(mechanism, mechanism.threshold_event, "check"), asked)
    votes = _spend(mechanism, unchecked.event(), "votes")
    ledger.record(votes, min(limit, asked))
    number = noise.advance()
    counts = tf.round(shares * float(mechanism.num_teachers))
    passed = mechanism.passes(counts, noise.stream(number, ANSWERS, part=1))
    within = tf.cast(tf.cumsum(passed) <= float(limit), tf.float32)
    answered = (passed * within)[:, None]
    seed = noise.stream(number, ANSWERS)
    released = unchecked.release(shares, tf.ones_like(shares), seed)
    return Released(released.answers * answered, released.candidates * answered)


def _check_threshold(threshold: float, num_teachers: int) -> None:
    """Refuses a share of the teachers, or more votes than there are."""
    _validate.positive_finite("threshold", threshold)
    if not 1 < threshold <= num_teachers:
        mend = "It counts votes: multiply a share of the teachers by their number."
        expected = f"above 1 and at most num_teachers={num_teachers}"
        raise _validate.invalid("threshold", threshold, expected, mend)


def _spend(mechanism: NoisyVotes, event: Event, part: str) -> Spend:
    return Spend(
        unit=mechanism.unit,
        relation=mechanism.relation,
        event=event,
        mechanism=f"{mechanism.name} ({part})",
    )


def _above(value: float) -> float:
    """Probability that a standard Gaussian is below `value`."""
    return 0.5 * math.erfc(-value / math.sqrt(2.0))


def check_ensemble(num_teachers: int, teacher: Any) -> None:
    """Refuses a teacher that is not an ensemble of so many teachers.

    Raises:
        ValueError: the noise would be scaled for another number of votes.
    """
    received = getattr(teacher, "num_teachers", None)
    if received != num_teachers:
        expected = f"a `TeacherEnsemble` of {num_teachers} teachers"
        mend = "Train one with `train_shard_teachers`, and pass its `num_teachers`."
        raise _validate.invalid("teacher", teacher, expected, mend)
