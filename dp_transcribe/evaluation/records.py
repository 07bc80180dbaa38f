"""Canary audits of the unit RECORD: records of a private data set made for the audit.

Record i has a feature of its own, so that its gradient points where no other record's
does. Left out, it is replaced by a record that counts as zero, which is the
neighbouring relation of the library's releases over records.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import dp_accounting
import numpy as np
import tensorflow as tf
from scipy import special
from scipy.linalg import hadamard

from dp_transcribe import _validate
from dp_transcribe.distillation.distill import Distillation
from dp_transcribe.distillation.kernels import RBFKernel
from dp_transcribe.distillation.kip import DPKIP, KIPTraining
from dp_transcribe.distillation.linear import LinearTraining, PrivateLinearModel
from dp_transcribe.ensembles import ShardPlan
from dp_transcribe.evaluation.canaries import (
    AuditResult,
    audit_scores,
    flip_coins,
)
from dp_transcribe.mechanisms.noise import ANSWERS, NoiseSource
from dp_transcribe.mechanisms.noisy_votes import NoisyVotes
from dp_transcribe.privacy.ledger import Ledger, Spend
from dp_transcribe.privacy.units import Unit

_CLASSES = 10
# As in `distill`, but so slow that no record is ever learnt and stops to contribute.
LINEAR_TRAINING = dataclasses.replace(
    Distillation().training, learning_rate=1e-2, accountant="rdp"
)
# Of DP-KIP's records, each bright in a pixel of its own, and of its two support
# images, bright and dark in a pixel that no record has.
_BRIGHTNESS = 10.0
_SUPPORT = 3.0
# An ensemble's shards hold a record each, few of them canaries, so that a canary that
# gets into another shard is seldom met by another one there.
_RECORDS_PER_CANARY = 8
KIP_TRAINING = KIPTraining(steps=40, learning_rate=1e-3, sampling_probability=0.1)


def audit_linear_model(
    training: LinearTraining | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 2000,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `PrivateLinearModel`, the private part of `distill`.

    The auditor sees the noisy mean and the weights after every step and works out
    each step's noisy sum from them.

    Args:
        training: how the model is fitted.
        target_epsilon: per record.
        delta: strictly between 0 and 1.
        canaries: number of records, every one a canary.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the fitted model's own ledger.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("canaries", canaries)
    plan = training or LINEAR_TRAINING
    included = flip_coins(canaries, seed)
    features = np.eye(canaries, dtype=np.float32)
    features[~included] = np.nan  # counts as zero
    labels = np.arange(canaries) % _CLASSES
    seen: list[np.ndarray] = [np.zeros((canaries, _CLASSES), np.float32)]
    model = PrivateLinearModel(_CLASSES, plan, seed=seed)
    model.fit(
        features,
        labels,
        target_epsilon=target_epsilon,
        delta=delta,
        on_step=lambda step, weights: seen.append(weights),
    )
    attacks = _linear_attacks(model, np.stack(seen), labels)
    return audit_scores(
        attacks,
        included,
        model.ledger,
        unit=Unit.RECORD,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )


def _linear_attacks(
    model: PrivateLinearModel, weights: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of all canaries from the weights `[steps + 1, features, classes]`."""
    if model.centre is None:
        raise RuntimeError("The model was not fitted.")
    plan, centre = model.training, model.centre.astype(np.float64)
    moves = (weights[:-1] - weights[1:]).astype(np.float64) / plan.learning_rate
    before = np.concatenate([np.zeros_like(moves[:1]), moves[:-1]])
    sums = moves - plan.momentum * before
    lengths = np.sqrt(np.maximum(1.0 - 2.0 * centre + centre @ centre, 1e-12))
    scales = 1.0 / lengths if centre.any() else np.ones_like(lengths)
    logits = _against_offsets(weights[:-1].astype(np.float64), centre)
    residuals = special.softmax(logits * scales[:, None], axis=-1)
    residuals -= np.eye(_CLASSES)[labels]
    # A canary's gradient is its offset times its residual, cut off at the bound.
    norms = (scales * lengths) * np.linalg.norm(residuals, axis=-1)
    factors = scales * np.minimum(1.0, plan.l2_norm / np.maximum(norms, 1e-12))
    expected = residuals * factors[..., None]
    found = _beside_centre(sums, centre)
    varying = (found - found.mean(axis=0)) * (expected - expected.mean(axis=0))
    agreement = np.sum(found * expected, axis=2)
    attacks = {
        "sums": agreement.sum(axis=0),
        "sums less their mean over steps": np.sum(varying, axis=(0, 2)),
        "spread over steps": agreement.std(axis=0),
    }
    if plan.mean_noise is not None:
        attacks["mean of the features"] = centre
    return attacks


def _against_offsets(matrices: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rows of `[steps, features, classes]` along each canary's centred features."""
    return matrices - np.einsum("f,sfc->sc", centre, matrices)[:, None]


def _beside_centre(sums: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Rows of `[steps, features, classes]` without what all centred records share."""
    length = centre @ centre
    if length == 0.0:
        return sums
    shared = np.einsum("f,sfc->sc", centre, sums) / length
    return sums - np.einsum("f,sc->sfc", centre, shared)


def audit_dpkip(
    training: KIPTraining | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 500,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `DPKIP`.

    The auditor sees the support images after every step and the state of the
    optimizer, which is computed from them, and works out each step's noisy sum.

    Args:
        training: how it is run; every step takes a sample of the canaries.
        target_epsilon: per record.
        delta: strictly between 0 and 1.
        canaries: number of records, every one a canary.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the fitted model's own ledger.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("canaries", canaries)
    included = flip_coins(canaries, seed)
    records = _BRIGHTNESS * np.eye(canaries, canaries + 1, dtype=np.float32)
    first = records[:1].copy()
    records[~included] = np.nan  # counts as zero
    labels = np.zeros(canaries, np.int32)
    support = np.zeros((2, canaries + 1))
    support[:, -1] = _SUPPORT, -_SUPPORT
    model = _ObservedKIP(RBFKernel(), support, 2, training or KIP_TRAINING, seed=seed)
    model.first = first
    model.fit(records, labels, target_epsilon=target_epsilon, delta=delta)
    seen = np.stack(model.seen)
    attacks = {"sums": seen.sum(axis=0), "spread over steps": seen.std(axis=0)}
    return audit_scores(
        attacks,
        included,
        model.ledger,
        unit=Unit.RECORD,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )


class _ObservedKIP(DPKIP):
    """DP-KIP whose every released sum is compared with the canaries' gradients.

    Attributes:
        first: float32 `[1, pixels]`, the first canary, included or not.
        seen: for each step float `[canaries]`, how far the sum points to each canary.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first = np.zeros((1, self.support.shape[1]), np.float32)
        self.seen: list[np.ndarray] = []

    def train_step(self, data: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
        """As `DPKIP.train_step`, then notes what was released."""
        # Canaries differ in their pixel alone, so one stands for all of them.
        label = np.zeros(1, np.int32)
        direction = self.clipped_gradient_sum(self.first, label).numpy()[:, 0]
        before = self._momentum()
        logs = super().train_step(data)
        decay = self.optimizer.beta_1
        released = (self._momentum() - decay * before) / (1.0 - decay)
        self.seen.append(direction @ released[:, :-1])
        return logs

    def _momentum(self) -> np.ndarray:
        """Adam's moving average of the released gradients."""
        found = [v for v in self.optimizer.variables if "momentum" in v.path]
        return np.asarray(found[0], np.float64)


def audit_votes(
    mechanism: NoisyVotes | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 4096,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `NoisyVotes` on shards as `ShardPlan` makes them.

    Teachers are the auditor's: one that was trained on a canary votes on every query
    as the canary's coin and a pattern of the canary's own tell it. Every
    eighth record is a canary, and every shard holds one record; there are several
    ensembles on records of their own.

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
        The result; its claim is that of a ledger of all queries.

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
    scores = []
    for coins in included.reshape(ensembles, per_ensemble):
        answers = _canary_votes(shards, coins)
        stream = noise.stream(noise.advance(), ANSWERS)
        released = calibrated.release(answers, tf.ones_like(answers), stream)
        scores.append(np.einsum("cqk,qk->c", patterns, released.answers.numpy()))
    ledger = Ledger()
    spend = Spend(
        unit=mechanism.unit,
        relation=mechanism.relation,
        event=calibrated.event(),
        mechanism=mechanism.name,
    )
    ledger.record(spend, per_ensemble)
    return audit_scores(
        {"votes": np.concatenate(scores)},
        included,
        ledger,
        unit=mechanism.unit,
        delta=delta,
        confidence=confidence,
        seed=seed,
    )


def _canaries_of_shards(shards: int) -> list[np.ndarray]:
    """Canaries among the records of each shard; every eighth record is one."""
    plan = ShardPlan(records=shards, shards=shards)
    records = [plan.indices(shard) for shard in range(shards)]
    return [r[r % _RECORDS_PER_CANARY == 0] // _RECORDS_PER_CANARY for r in records]


def _canary_votes(shards: list[np.ndarray], coins: np.ndarray) -> tf.Tensor:
    """Shares of votes `[queries, 2]` of one teacher for each shard."""
    told = np.where(coins[:, None], 1, -1) * hadamard(len(coins))
    votes = np.ones((len(shards), len(coins)))  # no canary, no opinion
    for vote, canaries in zip(votes, shards, strict=True):
        if len(canaries):
            vote[:] = np.where(told[canaries].sum(axis=0) >= 0, 1, -1)
    counts = np.stack([(votes > 0).sum(axis=0), (votes < 0).sum(axis=0)], axis=1)
    return tf.constant(counts / len(shards), tf.float32)
