"""DP-KIP: per-record gradients, their bound, the ledger and learning."""

import dataclasses
from unittest import mock

import dp_accounting
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    DPKIP,
    DistilledDataset,
    Kernel,
    KernelRidgeClassifier,
    KIPTraining,
    NTKKernel,
    RBFKernel,
    ScatteringKernel,
    provenance,
)
from dp_transcribe.distillation.kip import _sum_clipped
from dp_transcribe.distillation.provenance import holds_record
from dp_transcribe.distillation.ridge import centred_one_hot, ridge_solve
from dp_transcribe.privacy import Unit

RNG = np.random.default_rng(0)
SCATTERING = ScatteringKernel((4, 4, 1), groups=1, scale=1, orientations=2)
KERNELS = {
    "scattering": (SCATTERING, (4, 4, 1)),
    "ntk": (NTKKernel(2), (5,)),
    "rbf": (RBFKernel(0.3), (5,)),
}


def make(name, l2_norm=1.0, **plan):
    kernel, shape = KERNELS[name]
    initial = RNG.random((4, *shape)).astype(np.float32)
    model = DPKIP(kernel, initial, 2, KIPTraining(l2_norm=l2_norm, **plan), seed=1)
    records = RNG.random((9, *shape)).astype(np.float32)
    return model, kernel.embed(records).numpy(), RNG.integers(0, 2, 9)


def naive_gradient(model, embedded, label):
    """Back-propagates through everything for one record, `[support, pixels]`."""
    target = centred_one_hot(np.array([label]), 2)
    with tf.GradientTape() as tape:
        outputs = model(tf.constant(embedded[None]))
        loss = 0.5 * tf.reduce_mean((outputs - target) ** 2)
    return tape.gradient(loss, model.support.value).numpy().reshape(4, -1)


def naive_feature_gradient(model, embedded, label):
    """As `naive_gradient`, with respect to the features of the support."""
    target = tf.constant(centred_one_hot(np.array([label]), 2))
    features = model.kernel.embed(model.support.value)
    penalty = model.training_plan.penalty
    with tf.GradientTape() as tape:
        tape.watch(features)
        gram = features @ tf.transpose(features)
        targets = tf.constant(centred_one_hot(model.labels, 2))
        solution = ridge_solve(gram, targets, penalty)
        outputs = embedded[None] @ tf.transpose(features) @ solution
        loss = 0.5 * tf.reduce_mean((outputs - target) ** 2)
    return tape.gradient(loss, features).numpy()


@pytest.mark.parametrize(
    ("name", "l2_norm"),
    [
        ("scattering", 1e-3),
        ("scattering", 1e6),
        ("ntk", 1e-3),
        ("ntk", 1e6),
        ("rbf", 1e-3),
        ("rbf", 1e6),
    ],
)
def test_sum_equals_one_by_one_back_propagation(name, l2_norm):
    model, embedded, labels = make(name, l2_norm)
    expected = 0.0
    for record, label in zip(embedded, labels, strict=True):
        gradient = naive_gradient(model, record, label)
        expected += gradient * min(1.0, l2_norm / np.linalg.norm(gradient))
    summed = model.clipped_gradient_sum(embedded, labels).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(summed / scale, expected / scale, atol=2e-3)


@pytest.mark.parametrize("l2_norm", [1e-3, 1e6])
def test_sum_of_feature_gradients_equals_one_by_one_back_propagation(l2_norm):
    model, embedded, labels = make("scattering", l2_norm, bounded="features")
    expected = 0.0
    for record, label in zip(embedded, labels, strict=True):
        gradient = naive_feature_gradient(model, record, label)
        expected += gradient * min(1.0, l2_norm / np.linalg.norm(gradient))
    summed = model.clipped_gradient_sum(embedded, labels).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(summed / scale, expected / scale, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "bounded"),
    [
        ("ntk", "pixels"),
        ("rbf", "pixels"),
        ("scattering", "pixels"),
        ("scattering", "features"),
    ],
)
def test_leaving_one_record_out_moves_the_sum_by_at_most_the_bound(name, bounded):
    model, embedded, labels = make(name, l2_norm=1e-3, bounded=bounded)
    whole = model.clipped_gradient_sum(embedded, labels).numpy()
    moved = []
    for left_out in range(len(labels)):
        keep = np.arange(len(labels)) != left_out
        rest = model.clipped_gradient_sum(embedded[keep], labels[keep]).numpy()
        moved.append(np.linalg.norm(whole - rest))
    assert max(moved) <= 1e-3 * (1 + 1e-3)
    assert max(moved) > 0.9e-3


# A penalty so large that each term of the gradient's norm is of weight.
@pytest.mark.parametrize("bounded", ["pixels", "features"])
@pytest.mark.parametrize("penalty", [1e-3, 0.5, 5.0])
def test_a_clipped_gradient_is_as_long_as_the_bound(bounded, penalty):
    model, embedded, labels = make(
        "scattering", l2_norm=1e-3, bounded=bounded, penalty=penalty
    )
    for record in range(len(labels)):
        one = slice(record, record + 1)
        summed = model.clipped_gradient_sum(embedded[one], labels[one]).numpy()
        assert np.linalg.norm(summed) == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e7])
@pytest.mark.parametrize(
    ("name", "bounded"),
    [("rbf", "pixels"), ("scattering", "pixels"), ("scattering", "features")],
)
def test_a_record_that_is_not_finite_counts_as_zero(name, bounded, bad):
    model, embedded, labels = make(name, bounded=bounded)
    expected = model.clipped_gradient_sum(embedded[1:], labels[1:])
    embedded[0, 2] = bad
    summed = model.clipped_gradient_sum(embedded, labels)
    np.testing.assert_allclose(summed, expected, atol=1e-6)


@dataclasses.dataclass(frozen=True)
class Powers(Kernel):
    """A user's kernel, which overflows for large records."""

    embeds_identically = True

    def embed(self, inputs):
        return tf.cast(inputs, tf.float32)

    def between(self, left, right):
        return (tf.matmul(left, right, transpose_b=True) + 1.0) ** 8


@pytest.mark.parametrize("size", [1.0, 1e3, 1e4, 1e5, 1e6])
def test_a_record_that_overflows_a_kernel_leaves_the_others_alone(size):
    rng, plan = np.random.default_rng(0), KIPTraining(l2_norm=0.01)
    model = DPKIP(Powers(), rng.normal(size=(4, 5)), 2, plan)
    records = np.repeat(rng.normal(size=(1, 5)), 64, axis=0).astype(np.float32)
    labels = np.zeros(64, int)
    without = model.clipped_gradient_sum(records[:63], labels[:63]).numpy()
    assert np.linalg.norm(without) > 0.1
    records[63] = size
    whole = model.clipped_gradient_sum(records, labels).numpy()
    assert np.linalg.norm(whole - without) <= 0.01 * (1 + 1e-3)


@pytest.mark.parametrize("size", [1e-3, 4.0, 1e10, 1e19, 1e38, 3e38, np.inf, np.nan])
def test_a_large_gradient_is_clipped_or_dropped(size):
    gradients = np.full((2, 3, 4), 0.1, np.float32)
    rest = _sum_clipped(tf.constant(gradients[1:]), 5.0)
    gradients[0, 0, 0] = size
    moved = np.linalg.norm(_sum_clipped(tf.constant(gradients), 5.0) - rest)
    assert moved <= 5.0 * (1 + 1e-5)
    if 5.0 < size < 1e19:
        assert moved == pytest.approx(5.0, rel=1e-5)


def test_no_records_give_a_zero_sum():
    model, embedded, labels = make("scattering")
    summed = model.clipped_gradient_sum(embedded[:0], labels[:0]).numpy()
    np.testing.assert_array_equal(summed, np.zeros((4, 16)))


def test_it_learns_and_the_ledger_equals_dp_accounting():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 2000)
    records = rng.normal(size=(2000, 5)) + 1.5 * np.where(labels, 1, -1)[:, None]
    plan = KIPTraining(
        steps=30, learning_rate=0.2, sampling_probability=0.1, l2_norm=0.1
    )
    initial = rng.normal(size=(2, 5))
    model = DPKIP(RBFKernel(0.1), initial, 2, plan, seed=2)
    model.fit(records, labels, target_epsilon=2.0, delta=1e-5)
    distilled = model.distilled()
    ridge = KernelRidgeClassifier(RBFKernel(0.1)).fit(
        distilled.images, distilled.labels
    )
    assert ridge.score(records, labels) > 0.95
    accountant = dp_accounting.rdp.RdpAccountant()
    noise = dp_accounting.GaussianDpEvent(
        distilled.statement.details["noise_multiplier"]
    )
    accountant.compose(dp_accounting.PoissonSampledDpEvent(0.1, noise), 30)
    assert distilled.statement.unit is Unit.RECORD
    assert distilled.statement.epsilon == pytest.approx(accountant.get_epsilon(1e-5))
    assert model.ledger.releases(Unit.RECORD) == 30
    with pytest.raises(RuntimeError, match="second budget"):
        model.fit(records, labels, target_epsilon=2.0, delta=1e-5)


def test_empty_samples_are_counted_and_noised():
    plan = KIPTraining(steps=3, sampling_probability=1e-9)
    start = np.zeros((2, 5), np.float32)
    model = DPKIP(RBFKernel(), start, 2, plan, seed=1)
    model.fit(np.ones((4, 5)), np.array([0, 1, 0, 1]), target_epsilon=1.0, delta=1e-5)
    assert model.ledger.releases(Unit.RECORD) == 3
    assert not np.array_equal(model.support.numpy(), start)


def test_labels_outside_the_range_are_refused():
    model, _, _ = make("rbf")
    with pytest.raises(ValueError, match="labels"):
        model.fit(np.ones((2, 5)), np.array([0, 2]), target_epsilon=1.0, delta=1e-5)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"x": np.ones((4, 6))}, "x"),
        ({"x": np.ones((0, 5)), "y": np.zeros(0, int)}, "labels"),
        ({"embedded": np.ones((4, 1))}, "embedded"),
        ({"embedded": np.ones((3, 5))}, "embedded"),
    ],
)
def test_records_that_do_not_fit_are_refused_before_any_release(changed, name):
    model, _, _ = make("rbf")
    records = {"x": np.ones((4, 5)), "y": np.arange(4) % 2, **changed}
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.fit(**records, target_epsilon=1.0, delta=1e-5)
    assert model.ledger.releases(Unit.RECORD) == 0


def test_a_single_class_is_refused():
    with pytest.raises(ValueError, match="`num_classes`"):
        DPKIP(RBFKernel(), np.zeros((2, 5)), 1)


def test_a_support_that_does_not_divide_by_the_classes_is_refused():
    with pytest.raises(ValueError, match="each of 2 classes"):
        DPKIP(RBFKernel(), np.zeros((3, 5)), 2)


def test_more_images_than_fit_into_memory_are_refused_with_the_number():
    kernel = ScatteringKernel((28, 28, 1))
    with pytest.raises(ValueError, match="at most 314 support images"):
        DPKIP(kernel, np.zeros((500, 28, 28, 1), np.float32), 10)


def test_private_records_in_the_support_are_refused_before_any_release():
    records = RNG.normal(size=(6, 5)).astype(np.float32)
    initial = np.concatenate([np.zeros((3, 5), np.float32), records[4:5]])
    model = DPKIP(RBFKernel(), initial, 2, KIPTraining(steps=1))
    with pytest.raises(ValueError, match="`initial`.*private"):
        model.fit(records, np.arange(6) % 2, target_epsilon=1.0, delta=1e-5)
    assert model.ledger.releases(Unit.RECORD) == 0


GUISES = {
    "bytes": lambda image: np.round(255 * image).astype(np.uint8),
    "other range": lambda image: 2.0 * image - 1.0,
    "inverted": lambda image: 1.0 - image,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "turned": lambda image: np.rot90(image),
}


@pytest.mark.parametrize("guise", GUISES)
def test_private_records_in_a_guise_are_refused_before_any_release(guise):
    records = np.random.default_rng(8).random((6, 4, 4, 1)).astype(np.float32)
    initial = np.random.default_rng(9).random((4, 4, 4, 1))
    initial[2] = GUISES[guise](records[4])
    model = DPKIP(SCATTERING, initial, 2, KIPTraining(steps=1))
    with pytest.raises(ValueError, match="`initial`.*private"):
        model.fit(records, np.arange(6) % 2, target_epsilon=1.0, delta=1e-5)
    assert model.ledger.releases(Unit.RECORD) == 0


def test_private_records_are_known_by_their_embeddings():
    records = np.random.default_rng(8).random((6, 4, 4, 1)).astype(np.float32)
    model = DPKIP(SCATTERING, records[:4], 2, KIPTraining(steps=1))
    arguments = {"embedded": SCATTERING.embed(records).numpy(), "delta": 1e-5}
    with pytest.raises(ValueError, match="`initial`.*private"):
        model.fit(
            np.zeros_like(records), np.arange(6) % 2, target_epsilon=1.0, **arguments
        )
    assert model.ledger.releases(Unit.RECORD) == 0


def test_images_that_only_resemble_a_record_are_none():
    rng = np.random.default_rng(8)
    records = rng.random((6, 4, 4, 1)).astype(np.float32)
    assert not holds_record(records[:2] + 0.03 * rng.random((2, 4, 4, 1)), records)
    # Few values are alike by chance: of three, these are one record rescaled.
    assert not holds_record(np.array([[0.0, 0.5, 1.0]]), np.array([[0.0, 1.0, 2.0]]))
    blank = np.zeros((1, 4, 4, 1))
    assert holds_record(blank, blank) and not holds_record(blank + 1.0, blank)


def fitted_rbf(steps=2):
    """A model with little noise, and its records."""
    rng = np.random.default_rng(3)
    records, labels = rng.normal(size=(40, 5)), np.arange(40) % 2
    model = DPKIP(RBFKernel(), rng.normal(size=(2, 5)), 2, KIPTraining(steps=steps))
    return model.fit(records, labels, target_epsilon=1.0, delta=1e-5), records, labels


def test_a_step_more_than_was_planned_is_refused():
    model, records, labels = fitted_rbf()
    before = model.support.numpy()
    with pytest.raises(RuntimeError, match="budget is spent"):
        model.train_step((records.astype(np.float32), labels))
    assert model.ledger.releases(Unit.RECORD) == 2
    assert model.privacy_statement().epsilon <= 1.0
    np.testing.assert_array_equal(model.support, before)


def test_steps_that_an_interrupted_fit_left_stay_within_the_target(monkeypatch):
    rng = np.random.default_rng(3)
    data = rng.normal(size=(40, 5)).astype(np.float32), np.arange(40) % 2
    model = DPKIP(RBFKernel(), rng.normal(size=(2, 5)), 2, KIPTraining(steps=3))
    with monkeypatch.context() as broken:
        broken.setattr(DPKIP, "_to_pixels", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.fit(*data, target_epsilon=1.0, delta=1e-5)
    for _ in range(2):
        model.train_step(data)
    with pytest.raises(RuntimeError, match="budget is spent"):
        model.train_step(data)
    assert model.privacy_statement().epsilon <= 1.0


@pytest.mark.parametrize("carry", ["load_weights", "set_weights"])
def test_weights_of_another_fit_are_refused_by_fit_and_statement(tmp_path, carry):
    first, records, labels = fitted_rbf()
    first.save_weights(tmp_path / "kip.weights.h5")

    def take_over(model):
        if carry == "load_weights":
            model.load_weights(tmp_path / "kip.weights.h5")
        else:
            model.set_weights(first.get_weights())
        np.testing.assert_array_equal(model.support, first.support)

    second = DPKIP(RBFKernel(), np.zeros((2, 5)), 2, KIPTraining(steps=2))
    take_over(second)
    with pytest.raises(RuntimeError, match="another model's"):
        second.fit(records, labels, target_epsilon=1.0, delta=1e-5)
    assert second.ledger.releases(Unit.RECORD) == 0
    third = fitted_rbf()[0]
    take_over(third)
    with pytest.raises(RuntimeError, match="another model's"):
        third.distilled()
    assert first.distilled().statement.epsilon <= 1.0


@pytest.mark.parametrize("way", ["support", "data set", "file"])
def test_images_that_were_distilled_before_are_no_start(tmp_path, way):
    model, _, _ = fitted_rbf()
    model.distilled().save(tmp_path)
    images = {
        "support": lambda: model.support.numpy(),
        "data set": lambda: model.distilled().images,
        "file": lambda: DistilledDataset.load(tmp_path).images,
    }[way]()
    if way == "file":
        provenance._released.clear()
        DistilledDataset.load(tmp_path)
    with pytest.raises(ValueError, match="`initial`.*statement"):
        DPKIP(RBFKernel(), images.astype(np.float64), 2)


def test_feature_gradients_want_a_kernel_that_is_an_inner_product():
    plan = KIPTraining(bounded="features")
    with pytest.raises(ValueError, match="bounded"):
        DPKIP(RBFKernel(), np.zeros((2, 5)), 2, plan)


def test_feature_gradients_learn():
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, 1500)
    records = 0.3 * rng.random((1500, 4, 4, 1))
    records += 0.3 * np.sin(np.arange(4) * 3.0)[:, None, None]
    records[labels == 1] = records[labels == 1].transpose(0, 2, 1, 3)
    plan = KIPTraining(steps=20, bounded="features", sampling_probability=0.2)
    initial = rng.random((4, 4, 4, 1))
    model = DPKIP(SCATTERING, initial, 2, plan, seed=4)
    model.fit(records, labels, target_epsilon=3.0, delta=1e-5)
    ridge = KernelRidgeClassifier(SCATTERING)
    ridge.fit(model.support.numpy(), model.labels)
    assert ridge.score(records, labels) > 0.9
