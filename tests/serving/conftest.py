"""One exported student, shared by every consumer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.export import export_student
from dp_transcribe.generators import PowerLawNoise
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import statement_from_ledger
from dp_transcribe.privacy.units import Unit
from dp_transcribe.wavelets import wavelet_student

layers = keras.layers
SERVING = Path(__file__).parents[2] / "serving"


@dataclass(frozen=True)
class Served:
    """An exported student and what it must answer to the images of the request."""

    folder: Path
    request: dict[str, Any]
    images: np.ndarray  # [batch, 28, 28, 1]
    logits: np.ndarray  # [batch, classes], by `student.predict`

    def check(self, answer: dict[str, Any]) -> None:
        """Compares one consumer's named outputs with `predict`."""
        assert set(answer) == {"logits", "probabilities", "class"}
        probabilities = tf.nn.softmax(self.logits)
        np.testing.assert_allclose(answer["logits"], self.logits, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            answer["probabilities"], probabilities, rtol=0, atol=1e-5
        )
        np.testing.assert_array_equal(answer["class"], self.logits.argmax(-1))


def _layers() -> keras.Model:
    """Every kind of layer that the package recommends."""
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(8, 5, strides=2, activation="tanh"),
            layers.GroupNormalization(4),
            layers.MaxPooling2D(),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(16, activation="relu"),
            layers.Dense(10),
        ]
    )


def _wavelets() -> keras.Model:
    shape = (28, 28, 1)
    images = PowerLawNoise(shape).sample(50, tf.constant([1, 2]))
    return wavelet_student(shape, 10, public_images=images, directions=20, units=(8,))


@pytest.fixture(scope="session", params=[_layers, _wavelets])
def served(request, tmp_path_factory) -> Served:
    """An exported student."""
    keras.utils.set_random_seed(1)
    student = request.param()
    statement = statement_from_ledger(Ledger(), unit=Unit.RESPONSE, delta=1e-5)
    folder = tmp_path_factory.mktemp("student") / "1"
    export_student(student, folder, statement=statement)
    sent = json.loads((SERVING / "request.json").read_text(encoding="utf-8"))
    images = np.array([row["image"] for row in sent["instances"]], np.float32)
    return Served(folder, sent, images, student.predict(images, verbose=0))
