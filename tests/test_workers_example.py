"""examples/distributed.py on logical devices and on two worker processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--epochs=1", "--steps_per_epoch=2", "--batch_size=32"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, mnist_small):
    """200 real images of each split, in the layout of tensorflow-datasets."""
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


def run(prepared, folder, *flags):
    """What the example prints."""
    done = subprocess.run(
        [sys.executable, "examples/distributed.py", *SMALL, *flags]
        + [f"--data_dir={prepared}", f"--output_dir={folder}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("kind", ["--replicas=2", "--workers=2"])
def test_one_student_one_statement_and_a_run_that_goes_on(prepared, tmp_path, kind):
    printed = run(prepared, tmp_path, kind)
    assert printed.count("student on 2 replicas") == 1
    names = {"checkpoint.keras", "statement.txt", "student"}
    assert {path.name for path in tmp_path.iterdir()} == names
    served = tf.saved_model.load(tmp_path / "student/1").signatures["serving_default"]
    assert served(image=tf.zeros([3, 28, 28, 1]))["logits"].shape == (3, 10)
    before = (tmp_path / "statement.txt").read_text()
    assert "RESPONSE" in before
    if kind == "--replicas=2":
        run(prepared, tmp_path, kind, "--resume", "--epochs=2")
        assert (tmp_path / "statement.txt").read_text() != before
