"""Canary audits of the unit RECORD: ensembles of teachers made for the audit.

A record is in one shard and decides about one teacher. Every canary has a pattern of
its own over the queries, orthogonal to the others', and its coin turns it around: the
worst case of replacing a record.

Which records a shard holds is public, so overlaps are counted and not guessed. Bounds
alone pass a record that is in two shards: it doubles what one record moves, and a bound
from one run is about half of the truth or less.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import dp_accounting
import keras
import numpy as np
import tensorflow as tf
from scipy.linalg import hadamard

from dp_transcribe import _validate
from dp_transcribe.ensembles import ShardPlan, TeacherEnsemble
from dp_transcribe.evaluation.canaries import (
    AuditResult,
    audit_scores,
    flip_coins,
)
from dp_transcribe.evaluation.responses import OnePixel
from dp_transcribe.mechanisms.ensemble_gradient import EnsembleGradient
from dp_transcribe.mechanisms.noise import ANSWERS, NoiseSource
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.queries import FreshQueries
from dp_transcribe.shards import linear_member, train_shard_teachers
from dp_transcribe.transcriber import DPTranscriber

# An ensemble's shards hold a record each, few of them canaries, so that a canary that
# gets into another shard is seldom met by another one there.
_RECORDS_PER_CANARY = 8
# Of the training that is watched; the shards are of unequal sizes.
_WATCHED_SHARDS, _WATCHED_RECORDS = 8, 29
# Of a transcription from gradients; every step has queries of its own.
_STEPS = 8
# Bright enough that gradients of the weights, too, are cut off at the bound.
_BRIGHTNESS = 16.0
_CERTAIN = 30.0
# So small that the student, and with it every gradient's direction, hardly moves.
_RATE = 1e-4


def audit_votes(
    mechanism: NoisyVotes | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 4096,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `NoisyVotes` on shards as `ShardPlan` makes them, and these shards.

    Teachers are the auditor's: one that was trained on a canary votes on every query
    as the canary's coin and a pattern of the canary's own tell it. Every
    eighth record is a canary, and every shard holds one record; there are several
    ensembles on records of their own. The mechanism is asked once for each query: that
    a transcription stores its answers and never draws them again is what
    `audit_responses` looks at, and the same code stores votes.

    Args:
        mechanism: calibrated here to `target_epsilon` over all queries. Its
            `num_teachers` is the number of shards, eight times a power of two; by
            default 512 teachers.
        target_epsilon: per record.
        delta: strictly between 0 and 1.
        canaries: number of canaries, rounded up to whole ensembles.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of a ledger of all queries. It is flagged, too, if
        a record is in two shards, or gets to two teachers as they are trained.

    Raises:
        ValueError: an argument is out of range.
    """
    mechanism = mechanism or NoisyVotes(num_teachers=512)
    per_ensemble = mechanism.num_teachers // _RECORDS_PER_CANARY
    patterns = hadamard(per_ensemble)[:, :, None] * np.array([1.0, -1.0])
    calibrated = mechanism.calibrated(
        target_epsilon,
        delta,
        lambda event: dp_accounting.SelfComposedDpEvent(event, per_ensemble),
    )
    ensembles = -(-_validate.positive_int("canaries", canaries) // per_ensemble)
    included = flip_coins(ensembles * per_ensemble, seed)
    noise = NoiseSource(seed)
    shards = _canaries_of_shards(mechanism.num_teachers)
    released = []
    for coins in included.reshape(ensembles, per_ensemble):
        answers = _canary_votes(shards, coins)
        stream = noise.stream(noise.advance(), ANSWERS)
        release = calibrated.release(answers, tf.ones_like(answers), stream)
        released.append(release.answers.numpy())
    seen = np.stack(released)
    ledger = Ledger()
    spend = Spend(
        unit=mechanism.unit,
        relation=mechanism.relation,
        event=calibrated.event(),
        mechanism=mechanism.name,
    )
    ledger.record(spend, per_ensemble)
    result = audit_scores(
        {
            name: np.einsum("cqk,eqk->ec", patterns, votes).ravel()
            for name, votes in {
                "votes": seen,
                "votes less their mean over ensembles": seen - seen.mean(axis=0),
            }.items()
        },
        included,
        ledger,
        unit=mechanism.unit,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )
    return _with_overlap(result, mechanism.num_teachers)


def audit_ensemble_gradient(
    mechanism: EnsembleGradient | None = None,
    *,
    target_epsilon: float | None = 1.0,
    delta: float = 1e-5,
    canaries: int = 4096,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `EnsembleGradient` on shards as `ShardPlan` makes them, and these shards.

    A transcription runs as for any user, with teachers, one-pixel queries and a linear
    student of the auditor's, who sees the student's weights after every step and works
    out each step's noisy sum from them. Of the teachers one in eight was trained on a
    canary; the others doubt as much as the student does.

    Args:
        mechanism: calibrated here to `target_epsilon` unless it has its noise. Its
            `num_teachers` is the number of shards, eight times a power of two and 64
            or more; by default 4,096 teachers.
        target_epsilon: as in `DPTranscriber.fit`, per record.
        delta: strictly between 0 and 1.
        canaries: number of canaries, rounded up to whole ensembles.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the ledger of one ensemble's transcription. It
        is flagged, too, if a record is in two shards, or gets to two teachers as they
        are trained.

    Raises:
        ValueError: an argument is out of range.
    """
    mechanism = mechanism or EnsembleGradient(num_teachers=4096)
    per_ensemble = mechanism.num_teachers // _RECORDS_PER_CANARY
    ensembles = -(-_validate.positive_int("canaries", canaries) // per_ensemble)
    included = flip_coins(ensembles * per_ensemble, seed)
    shards = _canaries_of_shards(mechanism.num_teachers)
    scores = []
    for number, coins in enumerate(included.reshape(ensembles, per_ensemble)):
        own_seed = None if seed is None else seed + number
        run = _AuditedEnsemble(mechanism, _opinions(shards, coins), own_seed)
        run.transcriber.fit(
            epochs=1,
            steps_per_epoch=_STEPS,
            target_epsilon=target_epsilon,
            delta=delta,
            callbacks=[run],
            verbose=0,
        )
        scores.append(run.attacks())
    result = audit_scores(
        {name: np.concatenate([s[name] for s in scores]) for name in scores[0]},
        included,
        run.transcriber.ledger,
        unit=mechanism.unit,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )
    return _with_overlap(result, mechanism.num_teachers)


class _AuditedEnsemble(keras.callbacks.Callback):
    """A transcription of teachers made of canaries, and what is seen of it."""

    def __init__(
        self, mechanism: EnsembleGradient, opinions: np.ndarray, seed: int | None
    ) -> None:
        super().__init__()
        self.pixels = opinions.shape[1]
        self.size = self.pixels // _STEPS
        shape, bounds = (1, self.pixels, 1), (0.0, _BRIGHTNESS)
        self.generator = OnePixel(shape, output_range=bounds)
        certain = _CERTAIN / _BRIGHTNESS
        weights = np.stack([opinions, -opinions], axis=-1) * certain
        self.transcriber = DPTranscriber(
            TeacherEnsemble(
                _linear_model(shape), [weights.astype(np.float32)], input_range=bounds
            ),
            _linear_model(shape),
            self.generator,
            mechanism=mechanism,
            queries=FreshQueries(batch_size=self.size),
            seed=seed,
        )
        self.transcriber.compile(student_optimizer=keras.optimizers.SGD(_RATE))
        self._weights = self._student_weights()
        self._seen: list[np.ndarray] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Lights the pixels of this step's queries."""
        self.generator.first.assign(batch * self.size)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes which class the step's noisy sum favours for each of its queries."""
        before, self._weights = self._weights, self._student_weights()
        moved = (self._weights - before)[batch * self.size :][: self.size]
        self._seen.append(moved[:, 0] - moved[:, 1])

    def _student_weights(self) -> np.ndarray:
        return self.transcriber.student.get_weights()[0].astype(np.float64)

    def attacks(self) -> dict[str, np.ndarray]:
        """Scores `[canaries]` by the name of the attack."""
        seen, patterns = np.stack(self._seen), hadamard(self.pixels)
        return {
            "sums": patterns @ seen.ravel(),
            "sums less their mean over steps": patterns
            @ (seen - seen.mean(axis=0)).ravel(),
        }


def _linear_model(shape: tuple[int, int, int]) -> keras.Model:
    """Logits of two classes without bias, zero; row i meets query i alone."""
    return keras.Sequential(
        [
            keras.layers.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(2, use_bias=False, kernel_initializer="zeros"),
        ]
    )


def _with_overlap(result: AuditResult, shards: int) -> AuditResult:
    """The result with the most shards, of plans and in training, of one record."""
    # A record for each shard, as the canaries lie; then half of the shards are longer.
    plans = [ShardPlan(n, shards) for n in (shards, 2 * shards + shards // 2)]
    counts = [plan.shards_of_records() for plan in plans]
    most = max(int(c.max()) for c in [*counts, _teachers_of_records()])
    return dataclasses.replace(result, shards_of_a_record=most)


def _teachers_of_records() -> np.ndarray:
    """How many teachers are trained on each record's inputs or label, `[records]`."""
    counts = np.zeros(_WATCHED_RECORDS, np.int64)

    def watch(model: keras.Model, inputs: np.ndarray, labels: np.ndarray) -> None:
        counts[np.union1d(inputs[:, 0], labels)] += 1

    numbers = np.arange(_WATCHED_RECORDS)
    train_shard_teachers(
        lambda: linear_member(1, 2),
        (numbers[:, None], numbers),
        shards=_WATCHED_SHARDS,
        fit=watch,
    )
    return counts


def _canaries_of_shards(shards: int) -> list[np.ndarray]:
    """Canaries among the records of each shard; every eighth record is one."""
    plan = ShardPlan(records=shards, shards=shards)
    records = [plan.indices(shard) for shard in range(shards)]
    return [r[r % _RECORDS_PER_CANARY == 0] // _RECORDS_PER_CANARY for r in records]


def _opinions(shards: list[np.ndarray], coins: np.ndarray) -> np.ndarray:
    """What the teacher of each shard says to each query: 1, -1, or 0 without canary."""
    told = np.where(coins[:, None], 1, -1) * hadamard(len(coins))
    opinions = np.zeros((len(shards), len(coins)))
    for opinion, canaries in zip(opinions, shards, strict=True):
        opinion[:] = np.sign(told[canaries].sum(axis=0))
    return opinions


def _canary_votes(shards: list[np.ndarray], coins: np.ndarray) -> tf.Tensor:
    """Shares of votes `[queries, 2]` of one teacher for each shard.

    Half of those without a canary vote for either class: a label, too, turns with few.
    """
    opinions = _opinions(shards, coins)
    undecided = opinions == 0
    votes = (opinions > 0) | (undecided & (np.cumsum(undecided, axis=0) % 2 == 0))
    counts = np.stack([votes.sum(axis=0), (~votes).sum(axis=0)], axis=1)
    return tf.constant(counts / len(shards), tf.float32)
