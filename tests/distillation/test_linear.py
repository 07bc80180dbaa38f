"""The private linear model: sensitivity, sampling, ledger and learning."""

import copy
import pickle

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import LinearTraining, PrivateLinearModel
from dp_transcribe.distillation.linear import clipped_gradient_sum, clipped_sum
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.privacy import Unit

RNG = np.random.default_rng(0)


def toy(records=300, features=20, classes=3):
    centres = np.random.default_rng(1).normal(size=(classes, features))
    labels = np.random.default_rng(2).integers(0, classes, records)
    inputs = centres[labels] + 0.3 * np.random.default_rng(3).normal(
        size=(records, features)
    )
    inputs /= np.linalg.norm(inputs, axis=1, keepdims=True)
    return inputs.astype(np.float32), labels


@pytest.mark.parametrize("centred", [0.0, 1.0])
@pytest.mark.parametrize("l2_norm", [0.05, 1.0, 3.0])
def test_leaving_one_record_out_moves_the_sum_by_at_most_the_bound(l2_norm, centred):
    features = RNG.normal(size=(40, 6)).astype(np.float32)
    labels = RNG.integers(0, 4, 40)
    weights = tf.constant(RNG.normal(size=(6, 4)), tf.float32)
    centre = tf.constant(centred * RNG.normal(size=6), tf.float32)
    whole = clipped_gradient_sum(features, labels, weights, centre, l2_norm=l2_norm)
    moved = []
    for left_out in range(40):
        keep = np.arange(40) != left_out
        rest = clipped_gradient_sum(
            features[keep], labels[keep], weights, centre, l2_norm=l2_norm
        )
        moved.append(np.linalg.norm(whole - rest))
    assert max(moved) <= l2_norm * (1 + 1e-4)
    assert max(moved) > 0.99 * min(l2_norm, max(moved))


def test_without_clipping_it_is_the_gradient_of_the_cross_entropy():
    features, labels = toy()
    weights = tf.Variable(tf.random.stateless_normal([20, 3], [1, 2]))
    centre = tf.zeros([20])
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
            labels, tf.matmul(features, weights)
        )
        total = tf.reduce_sum(losses)
    summed = clipped_gradient_sum(features, labels, weights, centre, l2_norm=1e6)
    np.testing.assert_allclose(summed, tape.gradient(total, weights), atol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
def test_a_record_that_is_not_finite_counts_as_zero(bad):
    features, labels = toy(10)
    weights, centre = tf.zeros([20, 3]), tf.zeros([20])
    expected = clipped_gradient_sum(
        features[1:], labels[1:], weights, centre, l2_norm=1.0
    )
    features[0, 3] = bad
    summed = clipped_gradient_sum(features, labels, weights, centre, l2_norm=1.0)
    np.testing.assert_allclose(summed, expected, atol=1e-6)


def test_ledger_equals_dp_accounting_called_directly():
    features, labels = toy(50)
    plan = LinearTraining(
        steps=7, sampling_probability=0.3, mean_noise=4.0, accountant="rdp"
    )
    model = PrivateLinearModel(3, plan, seed=1)
    model.fit(features, labels, target_epsilon=2.0, delta=1e-5)
    statement = model.privacy_statement()
    accountant = dp_accounting.rdp.RdpAccountant()
    multiplier = statement.details["noise_multiplier"]
    gaussian = dp_accounting.GaussianDpEvent(multiplier)
    mean = dp_accounting.GaussianDpEvent(plan.mean_multiplier(multiplier))
    accountant.compose(mean)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.3, gaussian), 7)
    assert statement.unit is Unit.RECORD
    assert statement.epsilon == pytest.approx(accountant.get_epsilon(1e-5))
    assert 1.99 < statement.epsilon <= 2.0
    assert model.ledger.releases(Unit.RECORD) == 1 + 7


def test_it_learns_and_a_seed_repeats_it():
    features, labels = toy(3000)
    plan = LinearTraining(steps=30, learning_rate=4.0)

    def fitted(seed):
        model = PrivateLinearModel(3, plan, seed=seed)
        return model.fit(features, labels, target_epsilon=1.0, delta=1e-5)

    first, again, other = fitted(1), fitted(1), fitted(2)
    assert first.score(features, labels) > 0.95
    np.testing.assert_array_equal(first.weights, again.weights)
    assert not np.allclose(first.weights, other.weights)


def test_a_second_fit_is_refused():
    features, labels = toy(20)
    model = PrivateLinearModel(3, LinearTraining(steps=2), seed=1)
    model.fit(features, labels, target_epsilon=1.0, delta=1e-5)
    with pytest.raises(RuntimeError, match="second budget"):
        model.fit(features, labels, target_epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize(
    "labels", [np.full(20, 3), np.full(20, -1), np.zeros(19, int), np.zeros(20)]
)
def test_wrong_labels_are_refused_before_any_release(labels):
    features, _ = toy(20)
    model = PrivateLinearModel(3, seed=1)
    with pytest.raises(ValueError, match="labels"):
        model.fit(features, labels, target_epsilon=1.0, delta=1e-5)
    assert not model.ledger.entries


@pytest.mark.parametrize(
    ("features", "labels", "name"),
    [
        (np.zeros((0, 4)), np.zeros(0, int), "labels"),
        (np.zeros((6, 2, 2)), np.zeros(6, int), "features"),
    ],
)
def test_features_that_do_not_fit_are_refused_before_any_release(
    features, labels, name
):
    model = PrivateLinearModel(3, seed=1)
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.fit(features, labels, target_epsilon=1.0, delta=1e-5)
    assert not model.ledger.entries
    with pytest.raises(ValueError, match="`num_classes`"):
        PrivateLinearModel(1)


@pytest.mark.parametrize("shape", [(5, 1), (5, 19), (20,)])
def test_features_of_another_width_are_not_answered(shape):
    features, labels = toy(20)
    model = PrivateLinearModel(3, LinearTraining(steps=2, accountant="rdp"), seed=1)
    model.fit(features, labels, target_epsilon=1.0, delta=1e-5)
    with pytest.raises(ValueError, match=r"`features`.*\(n, 20\)"):
        model.predict(np.zeros(shape))


def test_sampler_takes_each_record_independently_with_its_probability():
    sums = RecordSums(
        mechanism="m", l2_norm=1.0, noise_multiplier=1.0,
        sampling_probability=0.2, seed=4,
    )  # fmt: skip
    counts, sizes = np.zeros(500), []
    for _ in range(400):
        sums.begin()
        chosen = sums.sample(500).numpy()
        sums.add_noise(tf.zeros([1]))
        counts[chosen] += 1
        sizes.append(len(chosen))
    # Binomial(400, 0.2) per record, Binomial(500, 0.2) per sample.
    assert abs(counts.mean() - 80.0) < 1.0
    assert 0.8 < counts.var() / 64.0 < 1.25
    assert 0.7 < np.var(sizes) / 80.0 < 1.4


def test_the_mean_moves_by_at_most_one():
    features = 5.0 * RNG.normal(size=(30, 6)).astype(np.float32)
    features[:5] *= 0.01
    whole = clipped_sum(features)
    for left_out in range(30):
        rest = clipped_sum(np.delete(features, left_out, axis=0))
        moved = np.linalg.norm(whole - rest)
        assert moved == pytest.approx(
            min(1.0, np.linalg.norm(features[left_out])), rel=1e-3
        )


def test_a_common_offset_of_all_features_does_no_harm():
    features, labels = toy(3000)
    offset = np.concatenate([features, np.full((3000, 1), 3.0)], axis=1) / 4.0
    plan = LinearTraining(steps=30, learning_rate=4.0)
    model = PrivateLinearModel(3, plan, seed=1)
    model.fit(offset.astype(np.float32), labels, target_epsilon=1.0, delta=1e-5)
    assert model.score(offset, labels) > 0.95


def test_an_empty_sample_is_recorded_and_noised():
    sums = RecordSums(
        mechanism="m", l2_norm=2.0, noise_multiplier=3.0,
        sampling_probability=1e-9, seed=4,
    )  # fmt: skip
    sums.begin()
    assert len(sums.sample(100)) == 0
    noisy = sums.add_noise(tf.zeros([20_000])).numpy()
    assert noisy.std() == pytest.approx(6.0, rel=0.03)
    assert sums.ledger.releases(Unit.RECORD) == 1


def test_noise_without_a_recorded_release_is_refused():
    sums = RecordSums(mechanism="m", l2_norm=1.0, noise_multiplier=1.0, seed=4)
    with pytest.raises(RuntimeError, match="begin"):
        sums.add_noise(tf.zeros([1]))


def test_sampling_and_noise_of_one_release_use_different_bits():
    sums = RecordSums(
        mechanism="m", l2_norm=1.0, noise_multiplier=1.0,
        sampling_probability=0.5, seed=4,
    )  # fmt: skip
    sums.begin()
    chosen = np.isin(np.arange(4000), sums.sample(4000).numpy())
    noise = sums.add_noise(tf.zeros([4000])).numpy()
    assert abs(np.corrcoef(chosen, noise)[0, 1]) < 0.06


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_copy_of_a_fitted_model_has_no_key_of_its_noise(duplicate):
    random = np.random.default_rng(0)
    rows = random.normal(size=(40, 6)).astype(np.float32)
    model = PrivateLinearModel(2, LinearTraining(steps=2, accountant="rdp"))
    model.fit(rows, np.arange(40) % 2, target_epsilon=1.0, delta=1e-5)
    copied = duplicate(model)
    np.testing.assert_array_equal(copied.predict(rows), model.predict(rows))
    assert copied.privacy_statement() == model.privacy_statement()
    with pytest.raises(RuntimeError, match="no key"):
        copied._releases.begin()
    assert copied.privacy_statement() == model.privacy_statement()
