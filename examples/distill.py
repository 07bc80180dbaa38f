"""Distils a private data set into a few images that may be released.

    python examples/distill.py --dataset=mnist --epsilon=1

writes report.json, statement.txt, distilled.npz, statement.json and images.png. The
guarantee is for people: unit RECORD.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

from dp_transcribe import _validate
from dp_transcribe.data import DATASETS, ImageDataset, load_dataset
from dp_transcribe.distillation import (
    DPKIP,
    Distillation,
    DistilledDataset,
    Kernel,
    KernelRidgeClassifier,
    KIPTraining,
    NTKKernel,
    RBFKernel,
    ScatteringKernel,
    Synthesis,
    distill,
    embed_in_batches,
)
from dp_transcribe.generators import DeadLeaves, RandomStrokes, Silhouettes
from dp_transcribe.students import conv_student

_LOGGER = logging.getLogger(__name__)
PUBLIC_SOURCES = {
    "mnist": RandomStrokes,
    "fashion_mnist": Silhouettes,
    "cifar10": DeadLeaves,
}
ROUTES = ("linear", "dpkip")
KERNELS = ("scattering", "ntk", "rbf")
NOTE = (
    "Accuracies were measured on test images for this report; nothing was chosen by "
    "them in this run. The statement covers the images, not this report."
)

FLAGS = flags.FLAGS
flags.DEFINE_enum("dataset", "mnist", DATASETS, "Private data set.")
flags.DEFINE_integer("images_per_class", 10, "Images of each class.", lower_bound=1)
flags.DEFINE_enum("kernel", "scattering", KERNELS, "Kernel.")
flags.DEFINE_enum("route", "linear", ROUTES, "How private information enters.")
flags.DEFINE_float("epsilon", 1.0, "Epsilon per record.")
flags.DEFINE_float("delta", 1e-5, "Delta.")
flags.DEFINE_integer("steps", None, "Noisy steps, if not the route's own.")
flags.DEFINE_integer("synthesis_steps", 200, "Steps on the images.", lower_bound=1)
flags.DEFINE_integer("convnet_epochs", 200, "Epochs of the ConvNet.", lower_bound=0)
flags.DEFINE_string("data_dir", None, "Folder prepared by tensorflow-datasets.")
flags.DEFINE_string("output_dir", None, "Where the results go.")
flags.DEFINE_string(
    "cache_dir",
    None,
    "Where to keep the features of the private images between runs; as private as "
    "the images. Not kept by default.",
)
flags.DEFINE_integer("seed", None, "Makes the run repeatable; not for a release.")


class Stopwatch:
    """Seconds of each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 2)
        self._since = now
        _LOGGER.info("%s: %.1f s", name, self.seconds[name])


def private_features(
    dataset: ImageDataset, kernel: Kernel, cache_dir: str | None
) -> np.ndarray:
    """Features of the private images, from the cache if they are there."""
    if cache_dir is None:
        return embed_in_batches(kernel, dataset.train_images)
    folder = _validate.writable_dir("cache_dir", cache_dir)
    path = folder / f"{dataset.name}-{dataset.source}-{FLAGS.kernel}.npy"
    if not path.exists():
        np.save(path, embed_in_batches(kernel, dataset.train_images))
    return np.load(path, mmap_mode="r")


def make_kernel(image_shape: tuple[int, ...]) -> Kernel:
    """The kernel that the flags say."""
    if FLAGS.kernel == "scattering":
        height, width, colours = image_shape
        return ScatteringKernel((height, width, colours))
    if FLAGS.route == "linear":
        mend = "Take the scattering kernel, or --route=dpkip."
        expected = "'scattering' for the route 'linear'"
        raise _validate.invalid("kernel", FLAGS.kernel, expected, mend)
    return NTKKernel() if FLAGS.kernel == "ntk" else RBFKernel()


def settings() -> Distillation:
    """The settings of the linear route that the flags say."""
    training = Distillation().training
    if FLAGS.steps is not None:
        training = dataclasses.replace(training, steps=FLAGS.steps)
    return Distillation(
        training=training,
        synthesis=Synthesis(
            images_per_class=FLAGS.images_per_class, steps=FLAGS.synthesis_steps
        ),
    )


def by_linear_model(
    dataset: ImageDataset, kernel: Kernel, cache_dir: str | None, watch: Stopwatch
) -> DistilledDataset:
    """Through a private linear model; the images are made from it at no cost."""
    features = private_features(dataset, kernel, cache_dir)
    watch.lap("features")
    return distill(
        dataset.train_images,
        dataset.train_labels,
        num_classes=dataset.num_classes,
        kernel=kernel,
        source=PUBLIC_SOURCES[dataset.name](dataset.image_shape),
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        settings=settings(),
        features=features,
        seed=FLAGS.seed,
    )[0]


def by_dpkip(
    dataset: ImageDataset, kernel: Kernel, cache_dir: str | None, watch: Stopwatch
) -> DistilledDataset:
    """DP-KIP from public images of no class in particular."""
    count = FLAGS.images_per_class * dataset.num_classes
    source = PUBLIC_SOURCES[dataset.name](dataset.image_shape)
    initial = source.sample(count, tf.constant([FLAGS.seed or 0, 0])).numpy()
    plan = KIPTraining()
    if FLAGS.steps is not None:
        plan = dataclasses.replace(plan, steps=FLAGS.steps)
    model = DPKIP(kernel, initial, dataset.num_classes, plan, seed=FLAGS.seed)
    features = private_features(dataset, kernel, cache_dir)
    watch.lap("features")
    model.fit(
        dataset.train_images,
        dataset.train_labels,
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        embedded=features,
    )
    return model.distilled()


def convnet_accuracy(distilled: DistilledDataset, dataset: ImageDataset) -> float:
    """Test accuracy of a small ConvNet that saw the distilled images alone."""
    keras.utils.set_random_seed(FLAGS.seed or 0)
    shape = distilled.images.shape[1:]
    network = conv_student(shape, distilled.num_classes, filters=(32, 64), units=64)
    augment = [
        keras.layers.RandomTranslation(0.07, 0.07, fill_mode="constant"),
        keras.layers.RandomRotation(0.04, fill_mode="constant"),
        keras.layers.RandomZoom(0.1, 0.1, fill_mode="constant"),
    ]
    if dataset.name != "mnist":
        augment.append(keras.layers.RandomFlip("horizontal"))
    model = keras.Sequential([keras.layers.Input(shape), *augment, network])
    steps = FLAGS.convnet_epochs * -(-len(distilled) // 50)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        distilled.images,
        distilled.labels,
        batch_size=50,
        epochs=FLAGS.convnet_epochs,
        verbose=0,
    )
    test = (dataset.test_images, dataset.test_labels)
    return float(model.evaluate(*test, batch_size=500, verbose=0)[1])


def run() -> dict[str, Any]:
    """Distils as the flags say and writes the results.

    Returns:
        The report, as it is in report.json.
    """
    _validate.positive_finite("epsilon", FLAGS.epsilon)
    _validate.fraction_open("delta", FLAGS.delta)
    default = f"output/distill-{FLAGS.dataset}-epsilon{FLAGS.epsilon:g}"
    folder = _validate.writable_dir("output_dir", FLAGS.output_dir or default)
    watch = Stopwatch()
    dataset = load_dataset(FLAGS.dataset, FLAGS.data_dir)
    kernel = make_kernel(dataset.image_shape)
    route = by_linear_model if FLAGS.route == "linear" else by_dpkip
    distilled = route(dataset, kernel, FLAGS.cache_dir, watch)
    watch.lap("distillation")
    distilled.save(folder)
    distilled.save_grid(folder / "images.png")
    accuracy = measure(distilled, dataset, kernel, watch)
    return write_report(folder, distilled, accuracy, watch.seconds)


def measure(
    distilled: DistilledDataset,
    dataset: ImageDataset,
    kernel: Kernel,
    watch: Stopwatch,
) -> dict[str, float]:
    """Test accuracies of classifiers that saw the distilled images alone."""
    ridge = KernelRidgeClassifier(kernel).fit(distilled.images, distilled.labels)
    accuracy = {"krr": ridge.score(dataset.test_images, dataset.test_labels)}
    watch.lap("krr")
    if FLAGS.convnet_epochs:
        accuracy["convnet"] = convnet_accuracy(distilled, dataset)
        watch.lap("convnet")
    return accuracy


def write_report(
    folder: Path,
    distilled: DistilledDataset,
    accuracy: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Writes report.json."""
    report = {
        "dataset": FLAGS.dataset,
        "route": FLAGS.route,
        "kernel": FLAGS.kernel,
        "images_per_class": FLAGS.images_per_class,
        "accuracy": accuracy,
        "statement": distilled.statement.to_dict(),
        "seconds": seconds,
        "note": NOTE,
    }
    text = json.dumps(report, indent=2, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    return report


def main(argv: list[str]) -> None:
    """Runs the example; complaints about what was given are one line."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = run()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(str(error))
    for name, value in report["accuracy"].items():
        _LOGGER.info("accuracy.%s: %.4f", name, value)


if __name__ == "__main__":
    app.run(main)
