"""Fixtures shared by all tests."""

import os
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture(scope="session")
def data_dir() -> Path | None:
    """Where real data sets are prepared, or None where they are not.

    Set DP_TRANSCRIBE_DATA_DIR, or put them into `shared/tfds` beside the repository.
    """
    root = Path(__file__).resolve().parents[1]
    beside = root.parent / "shared" / "tfds"
    folder = Path(os.environ.get("DP_TRANSCRIBE_DATA_DIR", beside))
    return folder if (folder / "mnist").is_dir() else None


@pytest.fixture(scope="session")
def mnist_small():
    """The 5,000 real MNIST images that need no download, as an `ImageDataset`."""
    from dp_transcribe import data

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return data._embedded_mnist(reason=ConnectionError("not asked for"))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, mnist_small):
    """200 real images of each split, in the layout of tensorflow-datasets."""
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")

    def split(images, labels):
        pixels = np.round(images[:200] * 255).astype(np.uint8)
        examples = {"image": pixels, "label": labels[:200].astype(np.int64)}
        return tf.data.Dataset.from_tensor_slices(examples)

    tfds.dataset_builders.store_as_tfds_dataset(
        name="mnist",
        version="3.0.1",
        data_dir=folder,
        split_datasets={
            "train": split(mnist_small.train_images, mnist_small.train_labels),
            "test": split(mnist_small.test_images, mnist_small.test_labels),
        },
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(28, 28, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        ),
        disable_shuffling=True,
    )
    return folder
