"""The private linear model of scattering features as a Keras teacher."""

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    Distillation,
    InterceptKernel,
    LinearTraining,
    MirroredKernel,
    PrivateLinearModel,
    PublicWhitening,
    ScatteringKernel,
    embed_in_batches,
)
from dp_transcribe.generators import SmoothNoise
from dp_transcribe.privacy.units import Unit
from dp_transcribe.private_teachers import fit_scattering_teacher
from dp_transcribe.private_teachers.scattering import scattering_classifier
from dp_transcribe.teachers import load_teacher

SHAPE = (8, 8, 1)
KERNEL = ScatteringKernel(SHAPE)
MIRRORED = MirroredKernel(KERNEL)
SETTINGS = Distillation(
    training=LinearTraining(steps=10, learning_rate=20.0, accountant="rdp"),
    public_images=60,
    damping_rank=10,
)


def images(count, seed=0):
    random = np.random.default_rng(seed)
    return random.uniform(size=(count, *SHAPE)).astype(np.float32)


def striped(count, seed=0):
    """Stripes along rows or columns, and which."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    waves = np.sin(np.arange(8) * 1.6 + random.uniform(0, 6, (count, 1))) / 2 + 0.5
    rows = np.repeat(waves[:, :, None], 8, axis=2)
    stripes = np.where(labels[:, None, None] == 0, rows, rows.transpose(0, 2, 1))
    return stripes[..., None].astype(np.float32), labels


def fit(pixels, labels, **kwargs):
    arguments = {"target_epsilon": 2.0, "delta": 1e-5, "seed": 4, **kwargs}
    return fit_scattering_teacher(
        pixels,
        labels,
        num_classes=2,
        source=SmoothNoise(SHAPE),
        settings=SETTINGS,
        **arguments,
    )


@pytest.fixture(scope="module")
def teacher():
    return fit(*striped(1500))


@pytest.fixture(scope="module")
def mirrored():
    return fit(*striped(1500), kernel=MIRRORED)


@pytest.mark.parametrize("kernel", [KERNEL, MIRRORED])
def test_it_answers_as_the_linear_model_it_is_made_of(kernel):
    features = embed_in_batches(kernel, images(40))
    whitening = PublicWhitening.from_public(features, damping_rank=5)
    training = LinearTraining(steps=3, mean_noise=1.0, accountant="rdp")
    model = PrivateLinearModel(2, training, seed=1)
    white = whitening.apply(features)
    model.fit(white, np.arange(40) % 2, target_epsilon=50.0, delta=1e-5)
    classifier = scattering_classifier(kernel, whitening, model)
    # More than one block of images, and no whole number of them.
    pixels = images(150, seed=1)
    expected = model.logits(whitening.apply(embed_in_batches(kernel, pixels)))
    np.testing.assert_allclose(classifier(pixels), expected, atol=1e-3)


def test_it_learns_and_says_what_it_costs(teacher):
    assert teacher.accuracy(*striped(300, seed=1)) > 0.95
    statement = teacher.statement
    assert statement.unit is Unit.RECORD and 1.9 < statement.epsilon <= 2.0
    assert statement.covered == ("teacher",)


def test_it_is_saved_with_its_statement(teacher, tmp_path):
    teacher.save(tmp_path / "teacher.keras")
    loaded = load_teacher(tmp_path / "teacher.keras")
    pixels, _ = striped(20, seed=2)
    np.testing.assert_allclose(
        loaded.predict(pixels), teacher.predict(pixels), atol=1e-6
    )
    assert loaded.statement.to_json() == teacher.statement.to_json()


def test_a_mirrored_teacher_answers_alike_wherever_it_is_loaded(mirrored, tmp_path):
    pixels, _ = striped(20, seed=2)
    answers = mirrored.predict(pixels)
    np.testing.assert_allclose(mirrored.predict(pixels[:, :, ::-1]), answers, atol=1e-3)
    mirrored.save(tmp_path / "teacher.keras")
    mirrored.model.export(tmp_path / "exported", verbose=False)
    for name in ("teacher.keras", "exported"):
        loaded = load_teacher(tmp_path / name, outputs="logits")
        np.testing.assert_allclose(loaded.predict(pixels), answers, atol=1e-4)


def test_a_mirrored_teacher_passes_gradients_to_the_images(mirrored):
    pixels = tf.constant(images(3))
    with tf.GradientTape() as tape:
        tape.watch(pixels)
        total = tf.reduce_sum(mirrored.model(pixels)[:, 0])
    assert np.abs(tape.gradient(total, pixels)).max() > 0.0


@pytest.mark.parametrize(
    "kernel", [InterceptKernel(KERNEL), ScatteringKernel((12, 12, 1))]
)
def test_a_kernel_that_does_not_fit_is_refused(kernel):
    with pytest.raises(ValueError, match="`kernel`"):
        fit(*striped(20), kernel=kernel)


def test_features_may_be_there_already():
    pixels, labels = striped(200)
    features = embed_in_batches(KERNEL, pixels)
    one, two = fit(pixels, labels), fit(pixels, labels, features=features)
    np.testing.assert_allclose(one.predict(pixels), two.predict(pixels), atol=1e-4)
    with pytest.raises(ValueError, match="features"):
        fit(pixels, labels, features=features[1:])
