import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation.kernels import ScatteringKernel
from dp_transcribe.generators import PowerLawNoise
from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from dp_transcribe.students import check_student, mlp_student
from dp_transcribe.teachers import Teacher
from dp_transcribe.wavelets import wavelet_student

GREY, COLOUR = (28, 28, 1), (16, 20, 3)


def _images(shape, count=60):
    return PowerLawNoise(shape).sample(count, tf.constant([1, 2])).numpy()


def _student(shape=GREY, classes=5, **kwargs):
    settings = {"public_images": _images(shape), "directions": 20, **kwargs}
    return wavelet_student(shape, classes, **settings)


def _whitened(student, images):
    cut = keras.Model(student.input, student.get_layer("whitening").output)
    return cut(images).numpy()


@pytest.mark.parametrize("shape", [GREY, COLOUR, (15, 13, 1)])
def test_ends_in_logits_and_only_the_head_learns(shape):
    student = _student(shape, 7)
    assert student.output_shape == (None, 7)
    check_student(student, Teacher(mlp_student(shape, 7, units=[4])))
    assert [v.shape for v in student.trainable_variables] == [(20, 7), (7,)]


def test_features_are_those_of_a_scattering_transform():
    # Averages are taken over squares instead of bells: alike, not equal.
    images = _images(GREY, 300)
    ours = _student(units=())
    front = keras.Model(ours.input, ours.get_layer("whitening").input)
    features = front(images).numpy()
    truth = ScatteringKernel(GREY).embed(images).numpy()
    assert features.shape == truth.shape
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    kernels = [f @ f.T for f in (features, truth)]
    upper = np.triu_indices(300, 1)
    assert np.corrcoef(*(kernel[upper] for kernel in kernels))[0, 1] > 0.97


def test_public_images_are_centred_and_evened_out():
    images = _images(GREY, 200)
    student = _student(public_images=images, directions=150)
    features = _whitened(student, images)
    np.testing.assert_allclose(features.mean(0), 0.0, atol=2e-3)
    variances = features.var(axis=0)
    assert np.all(variances < 1.0)
    # Damped at the hundredth direction, whose variance is halved by that.
    np.testing.assert_allclose(variances[99], 0.5, rtol=0.02)
    correlations = np.corrcoef(features[:, :50].T) - np.eye(50)
    assert np.abs(correlations).max() < 0.02


def test_private_step_is_exact_and_needs_no_fallback(recwarn):
    student = _student(units=(8,))
    images, labels = _images(GREY, 6), tf.constant([0, 1, 2, 3, 4, 0])

    def total(clipping):
        return clipped_gradient_sum(
            student,
            images,
            labels,
            lambda y, logits: tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits),
            l2_norm=1.0,
            normalize=True,
            clipping=clipping,
        ).gradients

    for ours, reference in zip(total("ghost"), total("vectorized"), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-6)
    assert not [w for w in recwarn if "fall" in str(w.message)]


def test_saved_student_needs_nothing_of_this_library(tmp_path):
    student = _student(units=(8,))
    student.save(tmp_path / "student.keras")
    config = student.to_json()
    assert "dp_transcribe" not in config
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    images = _images(GREY, 5)
    np.testing.assert_allclose(loaded(images), student(images), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("public_images", {"public_images": np.zeros((30, 28, 28, 3))}),
        ("public_images", {"public_images": np.zeros((30, 28, 28))}),
        ("input_shape", {"shape": (7, 28, 1)}),
        ("directions", {"directions": 60}),
        ("directions", {"directions": 0}),
        ("orientations", {"orientations": 0}),
        ("num_classes", {"classes": 0}),
    ],
)
def test_bad_input_is_refused_by_name(name, kwargs):
    with pytest.raises(ValueError, match=name):
        _student(**kwargs)
