"""Private centroids: sensitivity, ledger, the empty and the broken, and use."""

import numpy as np
import pytest
import tensorflow as tf
from dp_accounting import pld

from dp_transcribe.distillation import CentroidTraining, PrivateCentroids
from dp_transcribe.distillation.centroids import _cluster_sums, _shrunk
from dp_transcribe.privacy import Unit

RNG = np.random.default_rng(0)
PLAN = CentroidTraining(images_per_class=3, directions=10, public_images=200)


class Blobs:
    """A bright spot on the left (class 0) or on the right (class 1), or anywhere."""

    def draw(self, n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        column = np.where(labels, 5, 1) + rng.integers(0, 2, n)
        row = rng.integers(0, 8, n)
        images = np.zeros((n, 8, 8, 1), np.float32)
        images[np.arange(n), row, column] = 1.0
        blurred = sum(np.roll(images, s, axis=1) for s in (-1, 0, 1))
        return blurred.astype(np.float32) / 2.0, labels

    def sample(self, n, seed):
        return tf.constant(self.draw(n, np.asarray(seed))[0])


def fit(images, labels, epsilon=4.0, plan=PLAN):
    model = PrivateCentroids(2, Blobs(), plan, seed=3)
    return model.fit(images, labels, target_epsilon=epsilon, delta=1e-5)


@pytest.mark.parametrize("clusters", [1, 4])
def test_leaving_one_record_out_moves_the_sums_by_at_most_the_bound(clusters):
    codes = RNG.normal(size=(30, 5))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    labels = RNG.integers(0, 3, 30)
    centres = None if clusters == 1 else RNG.normal(size=(3, clusters, 5))
    whole = _cluster_sums(codes, labels, centres, 3, 0.4)
    for left_out in range(30):
        keep = np.arange(30) != left_out
        rest = _cluster_sums(codes[keep], labels[keep], centres, 3, 0.4)
        moved = np.linalg.norm(whole - rest)
        assert moved == pytest.approx(np.hypot(1.0, 0.4))


def test_a_record_adds_to_the_nearest_centre_of_its_class_alone():
    codes = np.array([[0.0, 1.0], [1.0, 0.0]])
    centres = np.array([[[0.0, 2.0], [2.0, 0.0]]] * 2)
    sums = _cluster_sums(codes, np.array([1, 0]), centres, 2, 0.5)
    expected = [[[0, 0, 0], [1, 0, 0.5]], [[0, 1, 0.5], [0, 0, 0]]]
    np.testing.assert_allclose(sums, expected)


def test_noise_alone_is_drawn_back_to_the_class_mean():
    means = np.zeros((1, 1, 3))
    noise = RNG.normal(size=(1, 400, 3))
    assert np.abs(_shrunk(noise, np.ones((1, 400, 1)), means)).mean() < 0.2
    signal = 30.0 * noise
    kept = _shrunk(signal, np.ones((1, 400, 1)), means)
    np.testing.assert_allclose(kept, signal, rtol=0.01)


def test_centroids_tell_the_classes_apart():
    distilled = fit(*Blobs().draw(4000, seed=1)).distilled()
    assert distilled.images.shape == (6, 8, 8, 1)
    np.testing.assert_array_equal(distilled.labels, [0, 0, 0, 1, 1, 1])
    assert distilled.images.min() >= 0.0 and distilled.images.max() <= 1.0
    images, labels = Blobs().draw(200, seed=2)
    flat, centres = images.reshape(200, -1), distilled.images.reshape(6, -1)
    nearest = ((flat[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert np.mean(distilled.labels[nearest] == labels) > 0.9


def test_the_ledger_equals_dp_accounting():
    model = fit(*Blobs().draw(400, seed=1), epsilon=1.0)
    statement = model.privacy_statement()
    accountant = pld.PLDAccountant()
    for entry in model.ledger.entries:
        accountant.compose(entry.spend.event, entry.count)
    assert statement.unit is Unit.RECORD
    assert model.ledger.releases(Unit.RECORD) == 4
    assert statement.epsilon == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert 0.95 < statement.epsilon <= 1.0


def test_an_image_of_nan_and_an_empty_class_do_no_harm():
    images, labels = Blobs().draw(400, seed=1)
    images[3] = np.nan
    distilled = fit(images[labels == 0], labels[labels == 0]).distilled()
    assert np.isfinite(distilled.images).all()


def test_labels_outside_the_range_are_refused_before_any_release():
    model = PrivateCentroids(2, Blobs(), PLAN)
    with pytest.raises(ValueError, match="`labels`"):
        model.fit(
            np.zeros((2, 8, 8, 1)), np.array([0, 2]), target_epsilon=1.0, delta=1e-5
        )
    assert model.ledger.releases(Unit.RECORD) == 0


def test_more_images_than_fit_into_memory_are_refused_with_the_number():
    plan = CentroidTraining(images_per_class=10**7)
    with pytest.raises(ValueError, match="at most 132888"):
        PrivateCentroids(10, Blobs(), plan)


def test_a_second_fit_is_refused():
    images, labels = Blobs().draw(50, seed=1)
    model = fit(images, labels)
    with pytest.raises(RuntimeError, match="second budget"):
        model.fit(images, labels, target_epsilon=1.0, delta=1e-5)
