"""Canary audits of the unit RESPONSE: answers of a teacher made for the audit.

A transcription runs as for any user, with a teacher, queries and a student of the
auditor's own. Query i lights one pixel alone and the student is linear, so that
answer i moves one row of its weights: the worst case that the guarantee allows.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.evaluation.canaries import (
    AuditResult,
    audit_scores,
    flip_coins,
)
from dp_transcribe.generators.base import Draws, ProceduralGenerator
from dp_transcribe.mechanisms.base import AnswerMechanism, Mechanism
from dp_transcribe.privacy.units import Relation
from dp_transcribe.queries import CHUNK, FreshQueries, Queries, QueryPool
from dp_transcribe.teachers import Teacher
from dp_transcribe.transcriber import DPTranscriber
from dp_transcribe.transcriber.answer_learning import AnswerLearner

_CLASSES = 10
# What canaries answer; not neighbours, since sets of classes favour low numbers.
_IN, _OUT = 0, 5
# Bright enough that an answer whose gradient is not bounded stands out.
_BRIGHTNESS = 16.0
_CERTAIN = 30.0
# The student believes in the two classes that canaries answer, so that a mechanism
# which selects classes by the student keeps both.
_BELIEF = 3.0
# So small that the student, and with it every gradient's direction, hardly moves.
_RATE = 1e-4
_BATCHES_OF_ANSWERS = 8
# Steps after the last canary was stored, to see whether an answer is drawn again.
_LOOKS = 6


def audit_responses(
    mechanism: Mechanism,
    queries: Queries | None = None,
    *,
    target_epsilon: float | None = 1.0,
    delta: float = 1e-5,
    canaries: int = 4000,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits what a mechanism claims for one answer of the teacher.

    Each canary is one answer: under zero-out it is there or missing, under
    replace-one it is one class or another, by a fair coin. The auditor sees all that
    a transcription releases, step by step, and knows everything but coins and noise.

    Args:
        mechanism: calibrated here to `target_epsilon` unless it has its noise.
        queries: how the audited method draws queries. A pool is audited in a smaller
            size, with the same sampling probability and number of updates.
        target_epsilon: as in `DPTranscriber.fit`.
        delta: strictly between 0 and 1.
        canaries: number of canaries, rounded up to whole batches or pools.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the audited run's own ledger.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("canaries", canaries)
    if isinstance(mechanism, AnswerMechanism):
        # Several, so that noise which comes twice can be seen.
        size = max(min(canaries // _BATCHES_OF_ANSWERS, CHUNK), 1)
        queries = FreshQueries(batch_size=size)
    else:
        queries = _scaled(queries or FreshQueries(), canaries)
    run = _AuditedRun(mechanism, queries, canaries, seed)
    run.transcriber.fit(
        epochs=1,
        steps_per_epoch=run.steps,
        target_epsilon=target_epsilon,
        delta=delta,
        callbacks=[run],
        verbose=0,
    )
    return audit_scores(
        run.attacks(),
        np.ravel(run.coins),
        run.transcriber.ledger,
        unit=mechanism.unit,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )


def _scaled(queries: Queries, canaries: int) -> Queries:
    """The same cost for an answer, with as many queries as there can be canaries."""
    most = min(canaries, CHUNK)
    if isinstance(queries, FreshQueries):
        return FreshQueries(batch_size=most)
    probability = queries.sampling_probability
    batch_size = max(int(probability * most), 1)
    return QueryPool(
        size=max(int(batch_size / probability), 1),
        batch_size=batch_size,
        updates=queries.updates,
    )


class OnePixel(ProceduralGenerator):
    """Image i has pixel `first` + i alone, whatever the seed."""

    asked_once = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = tf.Variable(0, trainable=False)

    def draw(self, draws: Draws) -> tf.Tensor:
        """Images `[n, height, width, 1]`."""
        pixels = int(np.prod(self.image_shape))
        lit = tf.one_hot((self.first + tf.range(draws.n)) % pixels, pixels)
        return tf.reshape(lit, [-1, *self.image_shape])


class _AuditedRun(keras.callbacks.Callback):
    """A transcription whose answers are canaries, and what is seen of it.

    Attributes:
        coins: bool `[rounds, size]`. A round is a batch of fresh queries or a pool.
    """

    def __init__(
        self,
        mechanism: Mechanism,
        queries: Queries,
        canaries: int,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.size, self.steps_per_round = queries.batch_size, 1
        if isinstance(queries, QueryPool):
            self.size, self.steps_per_round = queries.size, queries.updates
        self.rounds = -(-canaries // self.size)
        self.by_answers = isinstance(mechanism, AnswerMechanism)
        self.replaces = mechanism.relation is Relation.REPLACE_ONE
        self.coins = flip_coins((self.rounds, self.size), seed)
        # Stored answers stay in sight, so each has a pixel of its own to the end.
        self.pixels = self.coins.size if self.by_answers else self.size
        self.steps = self.rounds * self.steps_per_round
        self.steps += _LOOKS if self.by_answers else 0
        self.table = tf.Variable(_one_hot_rows(np.full(self.pixels, _IN)))
        self.batch_size = queries.batch_size
        shape = (1, self.pixels, 1)
        self.generator = OnePixel(shape, output_range=(0.0, _BRIGHTNESS))
        self.transcriber = self._build(mechanism, queries, seed)
        self._weights = self._student_weights()
        self._seen: list[np.ndarray] = []

    def _build(
        self, mechanism: Mechanism, queries: Queries, seed: int | None
    ) -> DPTranscriber:
        shape, bounds = self.generator.image_shape, self.generator.output_range
        transcriber = DPTranscriber(
            Teacher(
                self._answer, outputs="logits", input_shape=shape, input_range=bounds
            ),
            _linear_student(shape),
            self.generator,
            mechanism=mechanism,
            queries=queries,
            replay_size=self.steps * self.size,
            replay_batch_size=min(self.size, 64),
            seed=seed,
        )
        transcriber.compile(student_optimizer=keras.optimizers.SGD(_RATE))
        return transcriber

    def _answer(self, images: Any) -> tf.Tensor:
        """The teacher: logits of the canary whose pixel is lit."""
        rows = tf.argmax(tf.reshape(images, [-1, self.pixels]), -1)
        return tf.gather(self.table, rows)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Puts the coins of a new round into the teacher."""
        number, step = divmod(batch, self.steps_per_round)
        if self.by_answers:
            self.generator.first.assign(batch * self.size)
        if step or number >= self.rounds:
            return
        coins = np.ravel(self.coins if self.by_answers else self.coins[number])
        rows = _one_hot_rows(np.where(coins, _IN, _OUT))
        if not self.replaces:
            rows[~coins] = np.nan  # no answer: counts as zero
        self.table.assign(rows)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes what the step released about each canary."""
        self._seen.append(self._answers() if self.by_answers else self._gradients())

    def _gradients(self) -> np.ndarray:
        """How far each row of the released sum points where its canary points."""
        before, self._weights = self._weights, self._student_weights()
        released = (before - self._weights) * (self.batch_size / _RATE)
        scores = _BRIGHTNESS * before
        exponent = np.exp(scores - scores.max(axis=1, keepdims=True))
        direction = exponent / exponent.sum(axis=1, keepdims=True)
        direction[:, _IN] -= 1.0
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        return np.sum(released * direction, axis=1)

    def _answers(self) -> np.ndarray:
        """How far all that is stored for each canary points to its class."""
        learner = self.transcriber._run.learner
        if not isinstance(learner, AnswerLearner):
            raise TypeError(f"No released answers are known of {learner!r}.")
        released = learner.replay.released.numpy()[: self.coins.size].sum(axis=1)
        rest = np.delete(released, _IN, axis=1).mean(axis=1)
        return released[:, _IN] - (released[:, _OUT] if self.replaces else rest)

    def _student_weights(self) -> np.ndarray:
        return self.transcriber.student.get_weights()[0].astype(np.float64)

    def attacks(self) -> dict[str, np.ndarray]:
        """Scores `[canaries]` by the name of the attack."""
        seen = np.stack(self._seen)
        if self.by_answers:
            # Every look at a stored answer is the same, unless it is drawn anew.
            born = np.repeat(np.arange(self.rounds), self.size)
            looks = np.arange(len(seen))[:, None] >= born
            stored = (seen * looks).sum(0) / looks.sum(0)
            by_round = stored.reshape(self.rounds, self.size)
            return {
                "stored answers": stored,
                "stored answers less their mean over batches": (
                    by_round - by_round.mean(axis=0)
                ).ravel(),
            }
        if self.steps_per_round == 1:
            centred = seen - seen.mean(axis=0)
            return {
                "sum": seen.ravel(),
                "sum less its mean over steps": centred.ravel(),
            }
        by_round = seen.reshape(self.rounds, self.steps_per_round, self.size)
        return {
            "sum over the pool's life": by_round.sum(axis=1).ravel(),
            "spread over the pool's life": by_round.std(axis=1).ravel(),
        }


def _one_hot_rows(classes: np.ndarray) -> np.ndarray:
    """Logits `[n, classes]` that are certain of one class."""
    return _CERTAIN * np.eye(_CLASSES, dtype=np.float32)[classes]


def _linear_student(shape: tuple[int, int, int]) -> keras.Model:
    """Logits without bias; row i of its weights meets query i alone."""
    student = keras.Sequential(
        [
            keras.layers.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(_CLASSES, use_bias=False),
        ]
    )
    weights = np.zeros((shape[1], _CLASSES), np.float32)
    weights[:, [_IN, _OUT]] = _BELIEF / _BRIGHTNESS
    student.set_weights([weights])
    return student
