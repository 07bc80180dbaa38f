"""From private images to distilled ones, end to end, and the result object."""

import dataclasses
import importlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.distillation import (
    ClassMeans,
    Distillation,
    DistilledDataset,
    InterceptKernel,
    Kernel,
    KernelRidgeClassifier,
    LinearRelease,
    LinearTraining,
    MeanMatching,
    MirroredKernel,
    PrivateLinearModel,
    PublicWhitening,
    RBFKernel,
    ScatteringKernel,
    Synthesis,
    distill,
    embed_in_batches,
    images_of_model,
    kernel_for_domain,
)
from dp_transcribe.distillation.distill import public_whitening
from dp_transcribe.distillation.releases import RecordSums
from dp_transcribe.privacy import PrivacyStatement, Unit
from tests.distillation.bars import Bars

KERNEL = ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=4)
INTERCEPT = InterceptKernel(KERNEL)
BARS = Bars(8)
SETTINGS = Distillation(
    training=LinearTraining(steps=20, learning_rate=4.0, accountant="rdp"),
    synthesis=Synthesis(images_per_class=2, steps=10, queries=200),
    public_images=200,
    damping_rank=20,
)


def distil(images, labels, kernel=INTERCEPT, **kwargs):
    arguments = {"source": BARS, "settings": SETTINGS, "seed": 3, **kwargs}
    arguments = {"num_classes": 2, **arguments}
    return distill(
        images,
        labels,
        kernel=kernel,
        target_epsilon=1.0,
        delta=1e-5,
        **arguments,
    )


@pytest.fixture(scope="module")
def distilled():
    images, labels = BARS.draw(4000, seed=1)
    images[7, 3, 3] = np.nan
    return distil(images, labels)[0]


def test_ridge_regression_on_the_distilled_images_classifies_real_ones(distilled):
    images, labels = BARS.draw(300, seed=2)
    ridge = KernelRidgeClassifier(INTERCEPT).fit(distilled.images, distilled.labels)
    assert ridge.score(images, labels) > 0.95
    np.testing.assert_array_equal(distilled.labels, [0, 0, 1, 1])
    assert distilled.images.min() >= 0.0 and distilled.images.max() <= 1.0


def test_statement_speaks_of_records_and_of_the_images(distilled):
    statement = distilled.statement
    assert statement.unit is Unit.RECORD
    assert 0.99 < statement.epsilon <= 1.0
    assert "distilled data set" in statement.covered
    assert statement.noise_seed == 3


def test_save_and_load_give_the_same(distilled, tmp_path):
    distilled.save(tmp_path)
    distilled.save_grid(tmp_path / "images.png")
    loaded = DistilledDataset.load(tmp_path)
    np.testing.assert_array_equal(loaded.images, distilled.images)
    np.testing.assert_array_equal(loaded.labels, distilled.labels)
    assert loaded.statement == distilled.statement
    grid = tf.io.decode_png((tmp_path / "images.png").read_bytes())
    assert grid.shape == (2 * 8, 10 * 8, 1)
    assert "RECORD" in (tmp_path / "statement.txt").read_text()
    assert len(list(loaded.to_tf_dataset())) == len(loaded) == 4


def other_release(distilled):
    """Other images under a weaker guarantee."""
    statement = dataclasses.replace(distilled.statement, epsilon=10.0)
    images = 1.0 - distilled.images
    return dataclasses.replace(distilled, images=images, statement=statement)


@pytest.mark.parametrize("write", ["os.replace", "write_text"])
def test_a_crash_leaves_no_images_beside_an_older_statement(
    distilled, tmp_path, monkeypatch, write
):
    distilled.save(tmp_path)

    def crash(*_, **__):
        raise KeyboardInterrupt

    if write == "write_text":
        monkeypatch.setattr(Path, write, crash)
    else:
        monkeypatch.setattr(f"dp_transcribe.distillation.dataset.{write}", crash)
    with pytest.raises(KeyboardInterrupt):
        other_release(distilled).save(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.glob("statement.*"))
    with pytest.raises(FileNotFoundError):
        DistilledDataset.load(tmp_path)
    other_release(distilled).save(tmp_path)
    assert DistilledDataset.load(tmp_path).statement.epsilon == 10.0


def test_a_statement_of_other_images_is_refused(distilled, tmp_path):
    distilled.save(tmp_path / "one")
    other_release(distilled).save(tmp_path / "two")
    content = (tmp_path / "two" / "distilled.npz").read_bytes()
    (tmp_path / "one" / "distilled.npz").write_bytes(content)
    with pytest.raises(ValueError, match="`folder`.*overwritten"):
        DistilledDataset.load(tmp_path / "one")


def test_a_folder_without_a_digest_is_loaded(distilled, tmp_path):
    distilled.save(tmp_path)
    path = tmp_path / "statement.json"
    saved = PrivacyStatement.from_json(path.read_text())
    assert len(saved.details["distilled_sha256"]) == 64
    path.write_text(distilled.statement.to_json())
    assert DistilledDataset.load(tmp_path).statement == distilled.statement


def test_a_mirrored_embedding_does_not_tell_left_from_right():
    images = tf.random.stateless_uniform([6, 8, 8, 1], [1, 2])
    mirrored = MirroredKernel(KERNEL)
    embedded = mirrored.embed(images)
    np.testing.assert_allclose(
        embedded, mirrored.embed(images[:, :, ::-1]), rtol=1e-5, atol=1e-6
    )
    assert np.all(np.linalg.norm(embedded, axis=1) < 1.0 + 1e-6)
    np.testing.assert_array_equal(
        mirrored.between(embedded, embedded), KERNEL.between(embedded, embedded)
    )


def test_photographs_are_mirrored_and_nothing_else_is():
    kernel = ScatteringKernel((32, 32, 3))
    assert kernel_for_domain("natural", (32, 32, 3)) == MirroredKernel(kernel)
    assert kernel_for_domain("clothes", (32, 32, 3)) == kernel


class Pixels(Kernel):
    """Inner products of pixels, of norm at most one."""

    is_inner_product = True

    def embed(self, inputs):
        return tf.reshape(inputs, [-1, 16]) / 4.0

    def between(self, left, right):
        return tf.matmul(left, right, transpose_b=True)


class Clouds:
    """Images of any brightness; class 1 is brighter below, class 0 above."""

    def draw(self, n, seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        images = rng.uniform(0.1, 0.7, (n, 1, 1)) + rng.uniform(-0.1, 0.1, (n, 4, 4))
        images[:, 2:] += 0.2 * labels[:, None, None]
        return images[..., None].astype(np.float32), labels

    def sample(self, n, seed):
        return tf.constant(self.draw(n, np.asarray(seed))[0])


def test_ridge_regression_answers_as_the_private_model_does():
    kernel = InterceptKernel(MirroredKernel(Pixels()))
    settings = Distillation(
        training=LinearTraining(steps=20, learning_rate=4.0, accountant="rdp"),
        synthesis=Synthesis(images_per_class=4, steps=100, queries=500),
        public_images=250,
        damping_rank=5,
    )
    images, labels = Clouds().draw(4000, seed=1)
    result, model = distil(images, labels, kernel, source=Clouds(), settings=settings)
    whitening = public_whitening(kernel.kernel, Clouds(), settings, seed=3)
    fresh, truth = Clouds().draw(500, seed=9)
    answers = model.predict(whitening.apply(embed_in_batches(kernel.kernel, fresh)))
    assert np.mean(answers == truth) > 0.9

    def agreement(kernel):
        ridge = KernelRidgeClassifier(kernel).fit(result.images, result.labels)
        return np.mean(ridge.predict(fresh) == answers)

    assert agreement(kernel) > 0.97
    assert agreement(kernel.kernel) < 0.95


@pytest.mark.parametrize("kernel", [KERNEL, InterceptKernel(RBFKernel())])
def test_kernels_without_intercept_or_inner_product_are_refused(kernel):
    images, labels = BARS.draw(20, seed=1)
    with pytest.raises(ValueError, match="`kernel`"):
        distil(images, labels, kernel)


def test_features_with_the_constant_are_refused():
    images, labels = BARS.draw(20, seed=1)
    features = embed_in_batches(INTERCEPT, images)
    width = features.shape[1] - 1
    with pytest.raises(ValueError, match=rf"`features`.*\(20, {width}\)"):
        distil(images, labels, features=features)


@pytest.mark.parametrize("inner", [KERNEL, RBFKernel(0.1)])
def test_an_intercept_adds_a_constant_to_the_kernel(inner):
    images = BARS.sample(5, [1, 2])
    kernel = InterceptKernel(inner, length=0.5)
    np.testing.assert_allclose(
        kernel(images, images[:3]), inner(images, images[:3]) + 0.25, atol=1e-5
    )
    assert kernel.is_inner_product is inner.is_inner_product
    with pytest.raises(ValueError, match="length"):
        InterceptKernel(inner, length=0.0)


def test_an_intercept_carries_the_offset():
    weights = np.random.default_rng(5).normal(size=(KERNEL.num_features, 2))
    offset = np.array([1.0, -3.0])
    kernel = InterceptKernel(KERNEL, length=0.5)
    images = BARS.sample(5, [1, 2])
    np.testing.assert_allclose(
        kernel.embed(images).numpy() @ kernel.weights(weights, offset),
        KERNEL.embed(images).numpy() @ weights + offset,
        atol=1e-4,
    )


def test_labels_that_are_no_classes_are_refused(distilled):
    with pytest.raises(ValueError, match="labels"):
        DistilledDataset(distilled.images, np.full(4, 2), 2, distilled.statement)


@pytest.mark.parametrize(
    ("images", "labels", "name"),
    [
        (np.zeros((0, 8, 8, 1)), np.zeros(0, int), "labels"),
        (np.zeros((2, 8, 8)), np.array([0, 1]), "images"),
        (np.zeros((2, 4, 16, 1)), np.array([0, 1]), "source"),
        (np.full((2, 8, 8, 1), 255), np.array([0, 1]), "pixel_range"),
        (np.full((2, 8, 8, 1), -1.0), np.array([0, 1]), "pixel_range"),
        (np.zeros((2, 8, 8, 1)), np.array([0, 2]), "labels"),
        (np.zeros((2, 8, 8, 1)), np.array([0]), "labels"),
    ],
)
def test_records_that_do_not_fit_are_refused_and_nothing_is_spent(
    monkeypatch, images, labels, name
):
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    with pytest.raises(ValueError, match=f"`{name}`"):
        distil(images, labels)
    spent.assert_not_called()


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_failure_after_the_fit_hands_the_model_over(monkeypatch, tmp_path, error):
    images, labels = BARS.draw(300, seed=1)
    with monkeypatch.context() as broken:
        # The package's attribute of that name is the function.
        module = importlib.import_module("dp_transcribe.distillation.distill")
        broken.setattr(module, "synthesize", mock.Mock(side_effect=error))
        with pytest.raises(error) as failed:
            distil(images, labels)
    failed.value.released.save(tmp_path)
    released = LinearRelease.load(tmp_path)
    assert 0.99 < released.statement.epsilon <= 1.0
    options = {"settings": SETTINGS.synthesis, "seed": 3}
    made = images_of_model(released, INTERCEPT, BARS, **options)
    whole, _ = distil(images, labels)
    np.testing.assert_array_equal(made.images, whole.images)
    np.testing.assert_array_equal(made.labels, whole.labels)
    assert made.statement == whole.statement == released.statement


def test_what_is_released_is_kept_before_images_are_made_of_it(monkeypatch):
    module = importlib.import_module("dp_transcribe.distillation.distill")
    make = mock.Mock(side_effect=MemoryError)
    monkeypatch.setattr(module, "synthesize", make)
    kept = mock.Mock(side_effect=lambda _: make.assert_not_called())
    with pytest.raises(MemoryError) as failed:
        distil(*BARS.draw(300, seed=1), on_release=kept)
    kept.assert_called_once_with(failed.value.released)


@pytest.fixture(scope="module")
def release():
    kept = []
    distil(*BARS.draw(300, seed=1), on_release=kept.append)
    return kept[0]


@pytest.mark.parametrize(
    "kernel",
    [
        MirroredKernel(KERNEL),
        ScatteringKernel((8, 8, 1), groups=5, scale=1, orientations=4),
        ScatteringKernel((8, 8, 1), groups=1, scale=1, orientations=2),
    ],
)
def test_a_release_of_another_kernel_is_refused(release, kernel):
    with pytest.raises(ValueError, match="`released`.*Take the kernel"):
        images_of_model(release, InterceptKernel(kernel), BARS)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"released": "folder"}, "released"),
        ({"kernel": KERNEL}, "kernel"),
        ({"settings": SETTINGS}, "settings"),
        ({"settings": Synthesis(pixel_range=(0.4, 0.6))}, "pixel_range"),
    ],
)
def test_images_of_what_does_not_fit_are_refused(release, change, name):
    arguments = {"released": release, "kernel": INTERCEPT, "source": BARS, **change}
    with pytest.raises(ValueError, match=f"`{name}`"):
        images_of_model(**arguments)


def test_a_hook_that_cannot_be_called_is_refused_and_nothing_is_spent(monkeypatch):
    spent = mock.Mock()
    monkeypatch.setattr(RecordSums, "begin", spent)
    with pytest.raises(ValueError, match="`on_release`"):
        distil(*BARS.draw(300, seed=1), on_release="folder")
    spent.assert_not_called()


def test_a_kept_release_of_another_kind_or_overwritten_is_refused(release, tmp_path):
    release.save(tmp_path)
    with pytest.raises(ValueError, match="a ClassMeans"):
        ClassMeans.load(tmp_path)
    content = (tmp_path / "released.npz").read_bytes()
    (tmp_path / "released.npz").write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="was overwritten"):
        LinearRelease.load(tmp_path)
    (tmp_path / "released.npz").write_bytes(content)
    statement = release.statement.to_json()  # of no file
    (tmp_path / "released.statement.json").write_text(statement)
    with pytest.raises(ValueError, match="was overwritten"):
        LinearRelease.load(tmp_path)


def test_a_full_disk_leaves_what_was_kept(release, distilled, tmp_path, monkeypatch):
    kept = (release, LinearRelease), (distilled, DistilledDataset)
    for held, _ in kept:
        held.save(tmp_path)
    full = mock.Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(np, "savez_compressed", full)
    for held in (release, other_release(distilled)):
        with pytest.raises(OSError, match="No space"):
            held.save(tmp_path)
    monkeypatch.undo()
    for held, kind in kept:
        assert kind.load(tmp_path).statement == held.statement


def test_public_images_out_of_range_and_a_single_class_are_refused():
    images, labels = BARS.draw(20, seed=1)
    synthesis = dataclasses.replace(SETTINGS.synthesis, pixel_range=(0.0, 0.5))
    settings = dataclasses.replace(SETTINGS, synthesis=synthesis)
    with pytest.raises(ValueError, match="`pixel_range`.*public images"):
        distil(images / 2.0, labels, settings=settings)
    with pytest.raises(ValueError, match="`num_classes`"):
        distil(images, np.zeros(20, int), num_classes=1)


@pytest.mark.parametrize("span", [(1.0, 0.0), (0.0, np.inf), (0.0, np.nan), (1.0,), 1])
@pytest.mark.parametrize("settings", [Synthesis, MeanMatching])
def test_a_range_that_is_none_is_refused(settings, span):
    with pytest.raises(ValueError, match="`pixel_range`"):
        settings(pixel_range=span)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"images": np.zeros((4, 8, 8))}, "images"),
        ({"images": np.zeros((0, 8, 8, 1)), "labels": np.zeros(0, int)}, "images"),
        ({"images": np.full((4, 8, 8, 1), np.nan)}, "images"),
        ({"labels": np.array([0.0, 0.0, 1.0, 1.0])}, "labels"),
        ({"labels": np.array([0, 1])}, "labels"),
        ({"num_classes": 1}, "num_classes"),
        ({"statement": None}, "statement"),
    ],
)
def test_a_data_set_that_does_not_fit_is_refused_by_name(distilled, changed, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        dataclasses.replace(distilled, **changed)


def test_whitening_never_lengthens_and_evens_out_variances():
    rng = np.random.default_rng(6)
    public = rng.normal(size=(400, 30)) * np.geomspace(10.0, 0.01, 30)
    whitening = PublicWhitening.from_public(public, damping_rank=15)
    others = rng.normal(size=(100, 30)).astype(np.float32)
    lengths = np.linalg.norm(whitening.apply(others), axis=1)
    assert np.all(lengths <= np.linalg.norm(others, axis=1) + 1e-5)
    deviations = whitening.apply(public).std(axis=0)[1:]
    assert deviations[:10].max() / deviations[:10].min() < 2.0


def test_plain_weights_and_offset_are_the_whitened_model():
    images, labels = BARS.draw(4000, seed=1)
    features = KERNEL.embed(images).numpy()
    public = KERNEL.embed(BARS.sample(200, [4, 4])).numpy()
    whitening = PublicWhitening.from_public(public, damping_rank=20)
    model = PrivateLinearModel(2, SETTINGS.training, seed=1)
    whitened = whitening.apply(features)
    model.fit(whitened, labels, target_epsilon=9.0, delta=1e-5)
    weights, offset = whitening.plain_weights(model)
    scores = features @ weights + offset
    lengths = np.linalg.norm(whitened - model.centre, axis=1, keepdims=True)
    np.testing.assert_allclose(scores / lengths, model.logits(whitened), atol=1e-3)
