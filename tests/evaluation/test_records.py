"""Canary audits of unit RECORD: no false alarm, and every planted bug is flagged."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe import shards
from dp_transcribe.distillation import (
    KIPTraining,
    LinearTraining,
    class_means,
    kip,
    linear,
)
from dp_transcribe.distillation.kernels import InnerProductKernel
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.ensembles import ShardPlan
from dp_transcribe.evaluation import (
    audit_class_means,
    audit_dpkip,
    audit_ensemble_gradient,
    audit_linear_model,
    audit_private_teacher,
    audit_votes,
)
from dp_transcribe.mechanisms import (
    EnsembleGradient,
    NoisyVotes,
    ensemble_gradient,
    noise,
    noisy_votes,
)
from dp_transcribe.mechanisms.noise import NoiseSource
from dp_transcribe.privacy import Unit
from dp_transcribe.private_teachers import PrivateTraining, descent
from dp_transcribe.transcriber import gradient_learning
from dp_transcribe.transcriber.gradient_learning import GradientLearner

SAMPLED = LinearTraining(
    steps=20,
    learning_rate=1e-2,
    l2_norm=0.3,
    sampling_probability=0.2,
    accountant="rdp",
)
WHOLE = LinearTraining(steps=8, learning_rate=1e-2, l2_norm=0.3, accountant="rdp")
LINEAR = {"canaries": 3000, "seed": 2}
VOTES = {"canaries": 8192, "seed": 2}
TEACHER_RECORDS = 2000
# Ten steps an epoch, or all records in every step.
TEACHER_SAMPLED = PrivateTraining(
    epochs=8, batch_size=200, learning_rate=1e-2, accountant="rdp"
)
TEACHER_WHOLE = PrivateTraining(
    epochs=8, batch_size=TEACHER_RECORDS, learning_rate=1e-2, accountant="rdp"
)
TEACHER = {"canaries": TEACHER_RECORDS, "seed": 2}
KIP_WHOLE = KIPTraining(steps=8, learning_rate=1e-3, sampling_probability=1.0)
KIP_SAMPLED = KIPTraining(steps=20, learning_rate=1e-3, sampling_probability=0.2)
# A bound far below a contribution's norm of 0.7: without it the claim is far off.
GRADIENT = EnsembleGradient(num_teachers=4096, l2_norm=0.1)


def scale_noise(monkeypatch, factor):
    drawn = noise.standard_normal
    for module in (noise, noisy_votes, gradient_learning):
        monkeypatch.setattr(module, "standard_normal", lambda *a: factor * drawn(*a))


def without_noise(monkeypatch):
    scale_noise(monkeypatch, 0.0)


def weak_noise(monkeypatch):
    scale_noise(monkeypatch, 0.3)


def without_clipping(monkeypatch):
    for module in (linear, descent):
        bounded = module.clipped_gradient_sum

        def unbounded(*arguments, _bounded=bounded, l2_norm, **kwargs):
            return _bounded(*arguments, l2_norm=1e9, **kwargs)

        monkeypatch.setattr(module, "clipped_gradient_sum", unbounded)
    class_sums = class_means.class_sums
    monkeypatch.setattr(
        class_means,
        "class_sums",
        lambda *rows, l2_norm, **kwargs: class_sums(*rows, l2_norm=10.0, **kwargs),
    )
    for name in ("pixel_gradient_sum", "feature_gradient_sum"):
        summed = getattr(kip, name)

        def unclipped(*arguments, _summed=summed, l2_norm, **kwargs):
            return _summed(*arguments, l2_norm=1e9, **kwargs)

        monkeypatch.setattr(kip, name, unclipped)
    for module, name in ((kip, "_sum_clipped"), (ensemble_gradient, "_clipped_sum")):
        bounded = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda rows, bound, _bounded=bounded: _bounded(rows, 1e9)
        )


def batches_in_order(monkeypatch):
    """The records as they lie, cut into batches that come around every epoch."""

    def sample(self, num_records):
        size = round(self.sampling_probability * num_records)
        first = (self.ledger.releases(Unit.RECORD) - 1) * size % num_records
        return tf.range(first, first + size, dtype=tf.int64)

    monkeypatch.setattr(RecordSums, "sample", sample)


def reused_noise(monkeypatch):
    drawn = NoiseSource.normal_like
    first = tf.zeros([], tf.int64)
    monkeypatch.setattr(
        NoiseSource,
        "normal_like",
        lambda self, tensors, *, number: drawn(self, tensors, number=first),
    )
    of_rows = GradientLearner._row_noise
    monkeypatch.setattr(
        GradientLearner, "_row_noise", lambda self, number: of_rows(self, first)
    )


def reused_stream(monkeypatch):
    drawn, first = NoiseSource.stream, tf.zeros([], tf.int64)
    monkeypatch.setattr(
        NoiseSource,
        "stream",
        lambda self, number, *a, **kwargs: drawn(self, first, *a, **kwargs),
    )


def overlapping_shards(monkeypatch, others):
    """A shard holds more than its own records: those that `others` gives it, too."""
    own = ShardPlan.indices

    def indices(self, shard):
        shards = [own(self, number % self.shards) for number in (shard, shard + 1)]
        return np.concatenate([shards[0], others(self, shard, *shards)])

    monkeypatch.setattr(ShardPlan, "indices", indices)


def every_record_in_two_shards(monkeypatch):
    overlapping_shards(monkeypatch, lambda plan, shard, own, after: after)


def every_record_in_three_shards(monkeypatch):
    every_record_in_two_shards(monkeypatch)
    every_record_in_two_shards(monkeypatch)


def one_record_in_two_shards(monkeypatch):
    overlapping_shards(monkeypatch, lambda plan, shard, own, after: after[: shard == 5])


def some_records_in_two_shards(monkeypatch):
    overlapping_shards(
        monkeypatch, lambda plan, shard, own, after: after[after % 8 == 3]
    )


def one_record_in_all_shards(monkeypatch):
    overlapping_shards(monkeypatch, lambda plan, shard, own, after: np.array([0]))


def longer_shards_end_too_late(monkeypatch):
    """An overlap where the number of records is no multiple of that of shards alone."""
    overlapping_shards(
        monkeypatch, lambda plan, shard, own, after: after[: len(own) > len(after)]
    )


def labels_of_other_shards_in_training(monkeypatch):
    """The plan is right; every teacher also learns the first record's label."""
    run = shards._Job.run

    def leaking(self, numbers):
        def fit(model, inputs, labels):
            self.fit(model, inputs, np.append(self.labels[:1], labels[1:]))

        run(dataclasses.replace(self, fit=fit), numbers)

    monkeypatch.setattr(shards._Job, "run", leaking)


OVERLAPS = [
    every_record_in_two_shards,
    every_record_in_three_shards,
    one_record_in_two_shards,
    some_records_in_two_shards,
    one_record_in_all_shards,
    longer_shards_end_too_late,
    labels_of_other_shards_in_training,
]


@pytest.mark.parametrize("training", [WHOLE, SAMPLED])
def test_the_linear_model_is_not_flagged_and_its_bound_is_not_zero(training):
    result = audit_linear_model(training, target_epsilon=8.0, **LINEAR)
    assert not result.flagged, result
    assert result.unit is Unit.RECORD
    assert 7.9 < result.claimed_epsilon <= 8.0
    assert result.gaussian_lower_bound > (1.5 if training is WHOLE else 0.3)


@pytest.mark.parametrize(
    ("training", "mutant"),
    [
        (WHOLE, without_noise),
        (WHOLE, weak_noise),
        (WHOLE, without_clipping),
        (WHOLE, reused_noise),
        (SAMPLED, without_noise),
        (SAMPLED, reused_noise),
    ],
)
def test_a_bug_planted_in_the_linear_model_is_flagged(training, mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit_linear_model(training, target_epsilon=2.0, **LINEAR)
    assert result.claimed_epsilon <= 2.0
    assert result.flagged, result


def test_noise_missing_from_the_mean_alone_is_flagged(monkeypatch):
    noisy = linear.RecordSums.add_noise

    def forgets_the_mean(self, total):
        if self.spend.mechanism != "NoisyMean":
            return noisy(self, total)
        noisy(self, total)
        return total

    monkeypatch.setattr(linear.RecordSums, "add_noise", forgets_the_mean)
    assert audit_linear_model(WHOLE, target_epsilon=1.0, **LINEAR).flagged


def test_class_means_are_not_flagged_and_their_bound_is_not_zero():
    result = audit_class_means(target_epsilon=8.0, **LINEAR)
    assert not result.flagged, result
    assert result.unit is Unit.RECORD
    assert 7.9 < result.claimed_epsilon <= 8.0
    assert result.gaussian_lower_bound > 2.5


@pytest.mark.parametrize("mutant", [without_noise, weak_noise, without_clipping])
def test_a_bug_planted_in_the_class_means_is_flagged(mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit_class_means(target_epsilon=2.0, **LINEAR)
    assert result.claimed_epsilon <= 2.0
    assert result.flagged, result


@pytest.mark.parametrize("training", [TEACHER_WHOLE, TEACHER_SAMPLED])
def test_a_private_teacher_is_not_flagged_and_its_bound_is_not_zero(training):
    result = audit_private_teacher(training, target_epsilon=8.0, **TEACHER)
    assert not result.flagged, result
    assert result.unit is Unit.RECORD
    assert 7.9 < result.claimed_epsilon <= 8.0
    assert result.gaussian_lower_bound > (2.5 if training is TEACHER_WHOLE else 0.5)


@pytest.mark.parametrize(
    ("training", "mutant"),
    [
        (TEACHER_WHOLE, without_noise),
        (TEACHER_WHOLE, weak_noise),
        (TEACHER_WHOLE, without_clipping),
        (TEACHER_WHOLE, reused_noise),
        (TEACHER_SAMPLED, without_noise),
        (TEACHER_SAMPLED, weak_noise),
        (TEACHER_SAMPLED, without_clipping),
        (TEACHER_SAMPLED, reused_noise),
        (TEACHER_SAMPLED, batches_in_order),
    ],
)
def test_a_bug_planted_in_a_private_teacher_is_flagged(training, mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit_private_teacher(training, target_epsilon=2.0, **TEACHER)
    assert result.claimed_epsilon <= 2.0
    assert result.flagged, result


@pytest.mark.parametrize(("released", "power"), [("votes", 0.8), ("label", 0.6)])
def test_votes_of_disjoint_shards_are_not_flagged(released, power):
    mechanism = NoisyVotes(num_teachers=512, released=released)
    result = audit_votes(mechanism, target_epsilon=4.0, **VOTES)
    assert not result.flagged, result
    assert result.shards_of_a_record == 1
    assert result.unit is Unit.RECORD
    assert result.gaussian_lower_bound > power


@pytest.mark.parametrize(
    ("released", "mutant"),
    [
        ("votes", without_noise),
        ("votes", weak_noise),
        ("votes", reused_stream),
        ("votes", every_record_in_three_shards),
        ("label", without_noise),
        ("label", weak_noise),
        ("label", reused_stream),
    ],
)
def test_a_bug_planted_in_the_votes_is_flagged(released, mutant, monkeypatch):
    mutant(monkeypatch)
    mechanism = NoisyVotes(num_teachers=512, released=released)
    result = audit_votes(mechanism, target_epsilon=1.0, **VOTES)
    assert result.claimed_epsilon <= 1.0
    assert result.gaussian_lower_bound > result.claimed_epsilon, result


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_shards_that_overlap_in_any_way_are_flagged(overlap, monkeypatch):
    overlap(monkeypatch)
    result = audit_votes(target_epsilon=1.0, canaries=64, seed=2)
    assert result.shards_of_a_record > 1
    assert result.flagged, result


def test_the_audit_of_gradients_flags_an_overlap_of_two_shards_too(monkeypatch):
    one_record_in_two_shards(monkeypatch)
    mechanism = EnsembleGradient(num_teachers=64)
    result = audit_ensemble_gradient(mechanism, canaries=8, seed=2)
    assert result.shards_of_a_record == 2
    assert result.flagged, result


def test_gradients_of_disjoint_shards_are_not_flagged():
    result = audit_ensemble_gradient(
        GRADIENT, target_epsilon=4.0, canaries=4096, seed=2
    )
    assert not result.flagged, result
    assert result.unit is Unit.RECORD
    assert 3.9 < result.claimed_epsilon <= 4.0
    assert result.canaries == 4096
    assert result.gaussian_lower_bound > 1.2


@pytest.mark.parametrize(
    "mutant",
    [
        without_noise,
        weak_noise,
        without_clipping,
        reused_noise,
        every_record_in_three_shards,
    ],
)
def test_a_bug_planted_in_the_gradients_is_flagged(mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit_ensemble_gradient(
        GRADIENT, target_epsilon=2.0, canaries=2048, seed=2
    )
    assert result.claimed_epsilon <= 2.0
    assert result.gaussian_lower_bound > result.claimed_epsilon, result


@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_gradients_of_the_weights_are_flagged_without_their_noise_alone(
    factor, monkeypatch
):
    scale_noise(monkeypatch, factor)
    of_weights = EnsembleGradient(num_teachers=512, space="weights")
    result = audit_ensemble_gradient(
        of_weights, target_epsilon=1.0, canaries=256, seed=2
    )
    assert result.claimed_epsilon <= 1.0
    assert result.flagged == (factor == 0.0), result


@pytest.mark.parametrize("training", [KIP_WHOLE, KIP_SAMPLED])
def test_dpkip_is_not_flagged_and_its_bound_is_not_zero(training):
    result = audit_dpkip(training, target_epsilon=8.0, canaries=1000, seed=2)
    assert not result.flagged, result
    assert 7.9 < result.claimed_epsilon <= 8.0
    assert result.gaussian_lower_bound > (1.5 if training is KIP_WHOLE else 0.3)


@pytest.mark.parametrize(
    ("training", "mutant"),
    [
        (KIP_WHOLE, without_noise),
        (KIP_WHOLE, weak_noise),
        (KIP_WHOLE, without_clipping),
        (KIP_SAMPLED, without_noise),
        (KIP_SAMPLED, without_clipping),
        (KIP_SAMPLED, reused_noise),
    ],
)
def test_a_bug_planted_in_dpkip_is_flagged(training, mutant, monkeypatch):
    mutant(monkeypatch)
    result = audit_dpkip(training, target_epsilon=2.0, canaries=1000, seed=2)
    assert result.claimed_epsilon <= 2.0
    assert result.flagged, result


class Pixels(InnerProductKernel):
    """Products of pixels, for which DP-KIP has its gradients in closed form."""

    def embed(self, inputs):
        return tf.cast(inputs, tf.float32)


@pytest.mark.parametrize("bounded", ["pixels", "features"])
@pytest.mark.parametrize(
    ("mutant", "flagged"),
    [(None, False), (without_noise, True), (without_clipping, True)],
)
def test_dpkip_with_an_inner_product_is_flagged_by_its_bugs_alone(
    bounded, mutant, flagged, monkeypatch
):
    if mutant is not None:
        mutant(monkeypatch)
    training = dataclasses.replace(KIP_WHOLE, steps=4, bounded=bounded)
    result = audit_dpkip(
        training, kernel=Pixels(), target_epsilon=2.0, canaries=400, seed=2
    )
    assert result.claimed_epsilon <= 2.0
    assert result.flagged == flagged, result


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.0])
def test_dpkip_is_flagged_without_its_noise_alone(factor, monkeypatch):
    scale_noise(monkeypatch, factor)
    result = audit_dpkip(target_epsilon=1.0, canaries=400, confidence=0.99, seed=2)
    assert result.claimed_epsilon <= 1.0
    assert result.flagged == (factor == 0.0), result
