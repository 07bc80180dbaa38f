"""Canary audits of the unit RECORD: records of a private data set made for the audit.

Record i has a feature of its own, so that its gradient points where no other record's
does. Left out, it is replaced by a record that counts as zero, which is the
neighbouring relation of the library's releases over records.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import keras
import numpy as np
from scipy import special

from dp_transcribe import _validate
from dp_transcribe.distillation.class_means import (
    PublicDirections,
    release_class_means,
)
from dp_transcribe.distillation.distill import Distillation
from dp_transcribe.distillation.kernels import Kernel, RBFKernel
from dp_transcribe.distillation.kip import DPKIP, KIPTraining
from dp_transcribe.distillation.linear import LinearTraining, PrivateLinearModel
from dp_transcribe.distillation.matching import MeanMatching
from dp_transcribe.evaluation.canaries import (
    AuditResult,
    audit_scores,
    audit_statement,
    flip_coins,
)
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit
from dp_transcribe.private_teachers.descent import (
    PrivateTraining,
    fit_private_teacher,
)

_CLASSES = 10
# As in `distill`, but so slow that no record is ever learnt and stops to contribute.
LINEAR_TRAINING = dataclasses.replace(
    Distillation().training, learning_rate=1e-2, accountant="rdp"
)
TEACHER_TRAINING = PrivateTraining(epochs=4, learning_rate=1e-2, accountant="rdp")
# Of records that are bright in a pixel of their own, and of DP-KIP's two support
# images, bright and dark in a pixel that no record has.
_BRIGHTNESS = 10.0
_SUPPORT = 3.0
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
        verbose=0,
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
    attacks = _sums_attacks(_beside_centre(sums, centre), expected)
    if plan.mean_noise is not None:
        attacks["mean of the features"] = centre
    return attacks


def _sums_attacks(found: np.ndarray, expected: np.ndarray) -> dict[str, np.ndarray]:
    """Scores from each canary's part of the sums and its gradient.

    Args:
        found: of the noisy sums, `[steps, canaries, classes]`.
        expected: of the canaries' gradients, alike.

    Returns:
        Scores `[canaries]` by the name of the attack.
    """
    varying = (found - found.mean(axis=0)) * (expected - expected.mean(axis=0))
    agreement = np.sum(found * expected, axis=2)
    return {
        "sums": agreement.sum(axis=0),
        "sums less their mean over steps": np.sum(varying, axis=(0, 2)),
        "spread over steps": agreement.std(axis=0),
    }


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


def audit_class_means(
    settings: MeanMatching | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 2000,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits the class means of `distill_means`.

    Every record has a direction of its own. The auditor sees the means and counts. They
    are one release, so there is no other in which its noise could come again.

    Args:
        settings: bound, share of the counts and accountant are read.
        target_epsilon: per record.
        delta: strictly between 0 and 1.
        canaries: number of records, every one a canary.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the released means' own statement.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("canaries", canaries)
    settings = settings or MeanMatching(accountant="rdp")
    included = flip_coins(canaries, seed)
    records = _BRIGHTNESS * np.eye(canaries, dtype=np.float32)
    records[~included] = np.nan  # counts as zero
    labels = np.arange(canaries, dtype=np.int32) % _CLASSES
    centre, variances = np.zeros(canaries, np.float32), np.ones(canaries, np.float32)
    basis = np.eye(canaries, dtype=np.float32)
    released = release_class_means(
        records,
        labels,
        PublicDirections(RBFKernel(), centre, variances, basis),
        num_classes=_CLASSES,
        target_epsilon=target_epsilon,
        delta=delta,
        l2_norm=settings.l2_norm,
        count_share=settings.count_share,
        accountant=settings.accountant,
        seed=seed,
    )
    sums = released.means * released.counts[:, None]
    return audit_statement(
        {"sums": sums[labels, np.arange(canaries)]},
        included,
        released.statement,
        confidence=confidence,
        seed=seed,
    )


def audit_private_teacher(
    training: PrivateTraining | None = None,
    *,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 2000,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `fit_private_teacher`.

    The teacher is linear. The auditor sees its weights after every step, not averaged,
    and works out each step's noisy sum from them.

    Args:
        training: how it is trained; by default a step takes a tenth of the canaries.
        target_epsilon: per record.
        delta: strictly between 0 and 1.
        canaries: number of records, every one a canary.
        confidence: of the bounds.
        seed: for coins and noise; None for secret ones.

    Returns:
        The result; its claim is that of the trained teacher's own statement.

    Raises:
        ValueError: an argument is out of range.
    """
    _validate.positive_int("canaries", canaries)
    tenth = -(-canaries // 10)
    plan = training or dataclasses.replace(TEACHER_TRAINING, batch_size=tenth)
    included = flip_coins(canaries, seed)
    records = _BRIGHTNESS * np.eye(canaries, dtype=np.float32)
    records[~included] = np.nan  # counts as zero
    labels = np.arange(canaries) % _CLASSES
    linear = keras.layers.Dense(_CLASSES, use_bias=False, kernel_initializer="zeros")
    seen: list[np.ndarray] = [np.zeros((canaries, _CLASSES), np.float32)]
    teacher = fit_private_teacher(
        keras.Sequential([keras.layers.Input((canaries,)), linear]),
        records,
        labels,
        target_epsilon=target_epsilon,
        delta=delta,
        training=plan,
        on_step=lambda step, weights: seen.append(weights[0]),
        seed=seed,
        verbose=0,
    )
    return audit_statement(
        _teacher_attacks(plan, np.stack(seen).astype(np.float64), labels),
        included,
        cast(PrivacyStatement, teacher.statement),
        confidence=confidence,
        seed=seed,
    )


def _teacher_attacks(
    plan: PrivateTraining, weights: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of all canaries from the weights `[steps + 1, features, classes]`."""
    moves = weights[1:] - weights[:-1]
    before = np.concatenate([np.zeros_like(moves[:1]), moves[:-1]])
    rates = np.array(plan.rates(len(moves))(np.arange(len(moves))), np.float64)
    sums = (plan.momentum * before - moves) / rates[:, None, None]
    # A canary's gradient is its residual in its own row, cut off at the bound.
    residuals = special.softmax(_BRIGHTNESS * weights[:-1], axis=-1)
    residuals -= np.eye(_CLASSES)[labels]
    residuals /= np.linalg.norm(residuals, axis=-1, keepdims=True)
    attacks = _sums_attacks(sums, residuals)
    # Batches cut from the records as they lie would take a record where it lies.
    each = plan.steps_per_epoch(len(labels))
    place = np.arange(len(labels)) * each // len(labels)
    agreement = np.sum(sums * residuals, axis=2).reshape(plan.epochs, each, -1)
    own = agreement.sum(axis=0)[place, np.arange(len(labels))]
    attacks["sums of the records' place in an epoch"] = own
    return attacks


def audit_dpkip(
    training: KIPTraining | None = None,
    *,
    kernel: Kernel | None = None,
    target_epsilon: float = 1.0,
    delta: float = 1e-5,
    canaries: int = 500,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Audits `DPKIP`.

    The auditor sees the support images after every step and the state of the
    optimizer, which is computed from them, and works out each step's noisy sum. Noise
    that comes twice is seen where steps take samples, not where they take all records:
    canaries then add nearly the same to every sum.

    Args:
        training: how it is run; every step takes a sample of the canaries.
        kernel: one that compares pixels as they are, such as `RBFKernel`, the default;
            an inner product takes the closed forms of the gradient.
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
    model = _ObservedKIP(
        kernel or RBFKernel(), support, 2, training or KIP_TRAINING, seed=seed
    )
    model.first = first
    model.fit(records, labels, target_epsilon=target_epsilon, delta=delta, verbose=0)
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
