"""The result of a distillation: a few synthetic images with a guarantee."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.kept import StatedFile
from dp_transcribe.distillation.provenance import remember_released
from dp_transcribe.privacy.statement import PrivacyStatement

_DISTILLED = StatedFile(
    "distilled.npz",
    "statement.json",
    "distilled_sha256",
    "statement.txt",
    takes_undigested=True,
)
_BYTES = 255


@dataclasses.dataclass(frozen=True, eq=False)
class DistilledDataset:
    """Synthetic examples that stand for a private data set.

    Attributes:
        images: float32 `[n, height, width, colours]`, or `[n, columns]` for tables.
        labels: int32 `[n]`.
        num_classes: number of classes.
        statement: the guarantee of the images and labels.

    **Privacy**: as private as the statement says, whatever is done with it.

    Raises:
        ValueError: there is no image, a pixel is not finite, there is not one label per
            image, or a label is no class.
    """

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    statement: PrivacyStatement

    def __post_init__(self) -> None:
        """Checks that images and labels belong together."""
        _validate.num_classes("num_classes", self.num_classes)
        _validate.instance_of("statement", self.statement, PrivacyStatement)
        if np.ndim(self.images) not in (2, 4) or not np.size(self.images):
            expected = "(n, height, width, colours) or (n, columns), not empty"
            raise _validate.invalid("images", np.shape(self.images), expected)
        if not np.all(np.isfinite(self.images)):
            expected = "finite numbers"
            raise _validate.invalid("images", "NaN or infinite ones", expected)
        if np.shape(self.labels) != (len(self.images),):
            expected = f"one label for each of {len(self.images)} images"
            raise _validate.invalid("labels", np.shape(self.labels), expected)
        whole = np.issubdtype(np.asarray(self.labels).dtype, np.integer)
        if not whole or np.any((self.labels < 0) | (self.labels >= self.num_classes)):
            expected = f"whole numbers from 0 to {self.num_classes - 1}"
            raise _validate.invalid("labels", self.labels, expected)
        remember_released(self.images)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def to_tf_dataset(self) -> tf.data.Dataset:
        """Pairs of image and label, unbatched and in order."""
        return tf.data.Dataset.from_tensor_slices((self.images, self.labels))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `distilled.npz`, `statement.json` and `statement.txt`.

        `statement.json` names the SHA-256 of the file that it is of.

        Args:
            folder: made if it is missing.

        Raises:
            ValueError: the folder cannot be written to.
        """
        _DISTILLED.write(
            folder,
            self.statement,
            images=self.images,
            labels=self.labels,
            num_classes=self.num_classes,
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DistilledDataset:
        """Reads what `save` wrote.

        Args:
            folder: the folder.

        Returns:
            The data set.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the statement is malformed or of other images.
        """
        statement, arrays = _DISTILLED.read(folder)
        return cls(
            images=arrays["images"],
            labels=arrays["labels"],
            num_classes=int(arrays["num_classes"]),
            statement=statement,
        )

    def save_grid(self, path: str | os.PathLike[str], *, columns: int = 10) -> None:
        """Writes the images as one PNG, the classes below each other.

        Each image is brought to the range 0 to 1 by itself, since distilled images
        may leave the range of real ones.

        Args:
            path: of the PNG.
            columns: most images of a class that are shown.

        Raises:
            ValueError: the examples are no images.
        """
        if self.images.ndim != 4:
            expected = "images of shape (n, height, width, colours)"
            raise _validate.invalid("images", self.images.shape, expected)
        rows = [
            self._row(label, _validate.positive_int("columns", columns))
            for label in range(self.num_classes)
        ]
        grid = np.concatenate(rows, axis=0)
        png = tf.io.encode_png((grid * _BYTES).round().astype(np.uint8))
        Path(path).write_bytes(png.numpy())

    def _row(self, label: int, columns: int) -> np.ndarray:
        """The first images of a class beside each other, blank where there is none."""
        height, width, colours = self.images.shape[1:]
        row = np.zeros((height, columns, width, colours), np.float32)
        for column, image in enumerate(self.images[self.labels == label][:columns]):
            span = max(float(np.ptp(image)), 1e-12)
            row[:, column] = (image - image.min()) / span
        return row.reshape(height, columns * width, colours)


def balanced_labels(images_per_class: int, num_classes: int) -> np.ndarray:
    """Labels 0, 0, …, 1, 1, … of a balanced set, int32 `[n]`."""
    per_class = _validate.positive_int("images_per_class", images_per_class)
    return np.repeat(np.arange(num_classes, dtype=np.int32), per_class)
