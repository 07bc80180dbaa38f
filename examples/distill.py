"""Distils a private data set into a few images that may be released.

    python examples/distill.py --dataset=mnist --epsilon=1
    python examples/distill.py --epsilon=1 --resume --images_per_class=50
    python examples/distill.py --validate --learning_rate=20

writes report.json, statement.txt, distilled.npz, statement.json and images.png. The
guarantee is for people: unit RECORD. Route `linear` makes images for kernel ridge
regression, `means` makes images for networks to learn from, `dpkip` is the published
method. With --validate, the last training images take the place of the test images:
settings are to be chosen that way.

What the routes `linear` and `means` release is kept in released.npz as soon as it is
paid for. With --resume images are made of that, as many as are wanted, at no further
cost; no private image has a part in them. DP-KIP cannot go on: when it is interrupted,
the images as they are then are the result.
"""

import dataclasses
import functools
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

import dp_transcribe as dpt
from dp_transcribe import _validate, reporting
from dp_transcribe._files import digest_of, discard, replacing
from dp_transcribe.data import DATASETS, PRIOR_DOMAINS, ImageDataset, load_dataset
from dp_transcribe.distillation import (
    DPKIP,
    ClassMeans,
    Distillation,
    DistilledDataset,
    InterceptKernel,
    Kernel,
    KernelRidgeClassifier,
    KIPTraining,
    LinearRelease,
    MeanMatching,
    MirroredKernel,
    NTKKernel,
    RBFKernel,
    ScatteringKernel,
    Synthesis,
    distill,
    distill_means,
    embed_in_batches,
    images_of_means,
    images_of_model,
    kernel_for_domain,
)
from dp_transcribe.generators import Mixture
from dp_transcribe.generators.priors import default_prior
from dp_transcribe.programs import EXIT_INTERRUPTED, parse_flags, refuse
from dp_transcribe.students import conv_student

_LOGGER = logging.getLogger(__name__)
ROUTES = ("linear", "means", "dpkip")
KERNELS = ("scattering", "ntk", "rbf")
# Attributes of the routes' plans and the flags that give them.
OF_PLANS = {
    "steps": "steps",
    "learning_rate": "learning_rate",
    "l2_norm": "l2_norm",
    "damping_rank": "damping_rank",
    "bounded": "bounded",
    "sampling_probability": "sampling",
}
# Flags that some routes have no use for, and the routes that do.
OF_ROUTES = {
    "bounded": ("dpkip",),
    "sampling": ("dpkip",),
    "synthesis_steps": ("linear",),
    "damping_rank": ("linear", "means"),
    "cache_dir": ("linear", "dpkip"),
}
# What a release depends on, so that it is with --resume as it was.
OF_ANY_RELEASE = ("dataset", "route", "epsilon", "delta", "validate", "l2_norm", "seed")
OF_RELEASE = {
    "linear": (*OF_ANY_RELEASE, "steps", "learning_rate", "damping_rank"),
    "means": OF_ANY_RELEASE,  # whose steps are on the images
}
REPORT, PICTURE, RUN = "report.json", "images.png", "run.json"
HELD_OUT = 10_000
# A taught ConvNet asks so many batches of queries in an epoch.
TAUGHT_STEPS = 10
# A ConvNet sees this many batches in an epoch, if they hold ten images each.
CONVNET_BATCHES = 10
CONVNET_RATE = 3e-3
NOTE = (
    "Nothing was chosen by these accuracies in this run. The statement covers the "
    "images, not this report."
)

FLAGS = flags.FLAGS


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


def hold_out(dataset: ImageDataset) -> ImageDataset:
    """The data set with its last training images in place of the test images."""
    images, labels = dataset.train_images, dataset.train_labels
    kept = len(images) - min(HELD_OUT, len(images) // 5)
    return dataclasses.replace(
        dataset,
        train_images=images[:kept],
        train_labels=labels[:kept],
        test_images=images[kept:],
        test_labels=labels[kept:],
    )


def public_source(dataset: ImageDataset) -> Mixture:
    """Random processes that suit the data set."""
    return default_prior(dataset.image_shape, domain=PRIOR_DOMAINS[dataset.name])


def private_features(
    dataset: ImageDataset, kernel: Kernel, cache_dir: str | None
) -> np.ndarray:
    """Features of the private images, from the cache if they are there."""
    if cache_dir is None:
        return embed_in_batches(kernel, dataset.train_images, verbose=1)
    folder = _validate.writable_dir("cache_dir", cache_dir)
    tag = "-mirrored" if isinstance(kernel, MirroredKernel) else ""
    images = dataset.train_images
    name = f"{dataset.name}-{dataset.source}-{FLAGS.kernel}{tag}"
    path = folder / f"{name}-{digest_of(images)[:12]}.npy"
    if not path.exists():
        with replacing(path, secret=True) as partial:
            np.save(partial, embed_in_batches(kernel, images, verbose=1))
    return np.load(path, mmap_mode="r")


def check_flags() -> None:
    """Refuses, before anything is read, values out of range and flags without a use.

    Raises:
        ValueError: a flag does not fit; nothing was spent.
    """
    _validate.positive_finite("epsilon", FLAGS.epsilon)
    _validate.fraction_open("delta", FLAGS.delta)
    _validate.optional_seed("seed", FLAGS.seed)
    if FLAGS.route == "linear":
        mend = "Take the scattering kernel, or --route=dpkip."
        _validate.one_of("kernel", FLAGS.kernel, ("scattering",), mend)
    for name, routes in OF_ROUTES.items():
        if getattr(FLAGS, name) is not None and FLAGS.route not in routes:
            expected = f"None but for the route {' or '.join(routes)}"
            raise _validate.invalid(name, getattr(FLAGS, name), expected)
    if FLAGS.resume and FLAGS.route == "dpkip":
        mend = "Its images are what is released; begin anew, which costs anew."
        expected = "False for the route dpkip"
        raise _validate.invalid("resume", FLAGS.resume, expected, mend)
    if FLAGS.taught_epochs and FLAGS.kernel != "scattering":
        mend = "Only ridge regression on scattering features is made a teacher of."
        expected = "0 without the scattering kernel"
        raise _validate.invalid("taught_epochs", FLAGS.taught_epochs, expected, mend)


def make_kernel(dataset: ImageDataset) -> Kernel:
    """The kernel that the flags say; it distils and it classifies."""
    if FLAGS.route == "linear":
        domain = PRIOR_DOMAINS[dataset.name]
        return InterceptKernel(kernel_for_domain(domain, dataset.image_shape))
    if FLAGS.kernel == "scattering":
        height, width, colours = dataset.image_shape
        return ScatteringKernel((height, width, colours))
    return NTKKernel() if FLAGS.kernel == "ntk" else RBFKernel()


def asked_for(plan: Any) -> Any:
    """A route's own plan with the values that the flags give."""
    given = {
        name: getattr(FLAGS, flag)
        for name, flag in OF_PLANS.items()
        if hasattr(plan, name)
    }
    return dataclasses.replace(
        plan, **{name: value for name, value in given.items() if value is not None}
    )


def settings(dataset: ImageDataset) -> Distillation:
    """The settings of the linear route that the flags say, or the data set's own."""
    own = Distillation.for_domain(PRIOR_DOMAINS[dataset.name])
    synthesis = Synthesis(images_per_class=FLAGS.images_per_class)
    if FLAGS.synthesis_steps is not None:
        synthesis = dataclasses.replace(synthesis, steps=FLAGS.synthesis_steps)
    return dataclasses.replace(
        asked_for(own), training=asked_for(own.training), synthesis=synthesis
    )


def check_resumed(folder: Path) -> None:
    """Refuses to go on with a release of another run.

    Raises:
        ValueError: there is none, or flags that it depends on are others.
    """
    try:
        kept = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise nothing_kept(folder) from error
    if not isinstance(kept, dict):
        raise nothing_kept(folder)
    for name in OF_RELEASE[FLAGS.route]:
        if kept.get(name) != getattr(FLAGS, name):
            expected = f"{kept.get(name)!r}, as in the run that is resumed"
            raise _validate.invalid(name, getattr(FLAGS, name), expected)


def nothing_kept(folder: Path) -> ValueError:
    """Without a release there is nothing to go on with."""
    expected = f"a folder with {RUN} and released.npz"
    mend = "Without --resume a new run begins, which costs anew."
    return _validate.invalid("resume", str(folder), expected, mend)


def keep(folder: Path, released: LinearRelease | ClassMeans) -> None:
    """Keeps what is paid for before anything is made of it."""
    discard(folder, [RUN])
    released.save(folder)
    names = OF_RELEASE[FLAGS.route]
    reporting.write_json(folder / RUN, {name: getattr(FLAGS, name) for name in names})


def tell_what_is_kept(folder: Path, error: BaseException) -> None:
    """Says what an error or an interruption leaves of what was paid for."""
    goes_on = "What was paid for is kept: --resume goes on with it."
    if FLAGS.resume:
        if isinstance(error, (ValueError, OSError)):  # a refusal
            return
        text = goes_on
    elif hasattr(error, "released"):
        try:
            keep(folder, error.released)
            text = goes_on
        except OSError as failure:
            text = f"The budget is spent, and what it bought cannot be kept: {failure}"
    elif isinstance(error, KeyboardInterrupt):
        text = "Nothing was written."
    else:
        return
    print(f"\n{text}", file=sys.stderr)


def by_linear_model(
    dataset: ImageDataset, kernel: InterceptKernel, folder: Path, watch: Stopwatch
) -> DistilledDataset:
    """Through a private linear model; the images are made from it at no cost."""
    if FLAGS.resume:
        return images_of_model(
            LinearRelease.load(folder),
            kernel,
            public_source(dataset),
            settings=settings(dataset).synthesis,
            seed=FLAGS.seed,
        )
    features = private_features(dataset, kernel.kernel, FLAGS.cache_dir)
    watch.lap("features")
    return distill(
        dataset.train_images,
        dataset.train_labels,
        num_classes=dataset.num_classes,
        kernel=kernel,
        source=public_source(dataset),
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        settings=settings(dataset),
        features=features,
        on_release=functools.partial(keep, folder),
        seed=FLAGS.seed,
    )[0]


def by_means(
    dataset: ImageDataset, kernel: Kernel, folder: Path, watch: Stopwatch
) -> DistilledDataset:
    """By the class means in random ConvNets, which no other kernel has a part in."""
    del kernel, watch
    plan = asked_for(MeanMatching(images_per_class=FLAGS.images_per_class))
    if FLAGS.resume:
        return images_of_means(
            ClassMeans.load(folder),
            public_source(dataset),
            settings=plan,
            seed=FLAGS.seed,
        )
    return distill_means(
        dataset.train_images,
        dataset.train_labels,
        num_classes=dataset.num_classes,
        source=public_source(dataset),
        target_epsilon=FLAGS.epsilon,
        delta=FLAGS.delta,
        settings=plan,
        on_release=functools.partial(keep, folder),
        seed=FLAGS.seed,
    )


def by_dpkip(
    dataset: ImageDataset, kernel: Kernel, folder: Path, watch: Stopwatch
) -> DistilledDataset:
    """DP-KIP from public images of no class in particular."""
    count = FLAGS.images_per_class * dataset.num_classes
    source = public_source(dataset)
    initial = source.sample(count, tf.constant([(FLAGS.seed or 0) % 2**31, 0])).numpy()
    plan = asked_for(KIPTraining())
    model = DPKIP(kernel, initial, dataset.num_classes, plan, seed=FLAGS.seed)
    features = private_features(dataset, kernel, FLAGS.cache_dir)
    watch.lap("features")
    try:
        model.fit(
            dataset.train_images,
            dataset.train_labels,
            target_epsilon=FLAGS.epsilon,
            delta=FLAGS.delta,
            embedded=features,
        )
    except KeyboardInterrupt:
        if not model.ledger.entries:
            raise
        _LOGGER.warning(
            "Interrupted. The images as they are now are the result; a further run "
            "would cost anew."
        )
    return model.distilled()


def augmentation(name: str) -> list[keras.layers.Layer]:
    """What is done to the images of a data set while a ConvNet learns from them.

    Chosen on held-out images: strokes gain four points by it, clothes would lose some.
    """
    layers = keras.layers
    if name == "mnist":
        return [
            layers.RandomTranslation(0.1, 0.1, fill_mode="constant"),
            layers.RandomRotation(0.04, fill_mode="constant"),
            layers.RandomZoom(0.1, 0.1, fill_mode="constant"),
        ]
    return [layers.RandomFlip("horizontal")] if name == "cifar10" else []


def mixed(images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Each image with up to 40 % of another one, and its labels likewise."""
    share = tf.random.uniform([tf.shape(images)[0], 1], maxval=0.4)
    wide = share[:, :, None, None]
    images = (1.0 - wide) * images + wide * tf.reverse(images, [0])
    return images, (1.0 - share) * labels + share * tf.reverse(labels, [0])


def small_convnet(distilled: DistilledDataset) -> keras.Model:
    """The network that is usual in the field."""
    return conv_student(
        distilled.images.shape[1:],
        distilled.num_classes,
        filters=(64, 64, 64),
        units=None,
        groups=-1,
        pooling="average",
    )


def convnet_accuracy(distilled: DistilledDataset, dataset: ImageDataset) -> float:
    """Accuracy of a small ConvNet that saw the distilled images alone."""
    keras.utils.set_random_seed((FLAGS.seed or 0) % 2**32)
    shape = distilled.images.shape[1:]
    model = keras.Sequential(
        [
            keras.layers.Input(shape),
            *augmentation(dataset.name),
            small_convnet(distilled),
        ]
    )
    batch_size = max(10, -(-len(distilled) // CONVNET_BATCHES))
    steps = FLAGS.convnet_epochs * -(-len(distilled) // batch_size)
    # Without a warm-up some runs learn nothing at all.
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=CONVNET_RATE, warmup_steps=steps // 20
    )
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    labels = tf.one_hot(distilled.labels, distilled.num_classes)
    examples = tf.data.Dataset.from_tensor_slices((distilled.images, labels))
    examples = examples.shuffle(len(distilled), seed=FLAGS.seed).batch(batch_size)
    model.fit(
        examples.map(mixed), epochs=FLAGS.convnet_epochs, shuffle=False, verbose=0
    )
    labels = tf.one_hot(dataset.test_labels, distilled.num_classes)
    return float(
        model.evaluate(dataset.test_images, labels, batch_size=500, verbose=0)[1]
    )


def taught_accuracy(
    distilled: DistilledDataset, dataset: ImageDataset, kernel: Kernel
) -> float:
    """Accuracy of the same ConvNet, taught by ridge regression on the images.

    The regression answers random images, as many as are wanted: all of it is computed
    from the distilled images, and nothing more is spent.
    """
    keras.utils.set_random_seed((FLAGS.seed or 0) % 2**32)
    transcriber = dpt.transcribe_private_teacher(
        dpt.ridge_teacher(distilled, kernel),
        public_source(dataset),
        student=small_convnet(distilled),
        epochs=FLAGS.taught_epochs,
        steps_per_epoch=TAUGHT_STEPS,
        seed=FLAGS.seed,
    )
    transcriber.fit(verbose=2)
    answers = reporting.predict_classes(transcriber.student, dataset.test_images)
    return float(np.mean(answers == dataset.test_labels))


def run() -> dict[str, Any]:
    """Distils as the flags say and writes the results.

    Returns:
        The report, as it is in report.json.
    """
    check_flags()
    way = FLAGS.route + ("-validate" if FLAGS.validate else "")
    default = f"output/distill-{FLAGS.dataset}-{way}-epsilon{FLAGS.epsilon:g}"
    folder = _validate.writable_dir("output_dir", FLAGS.output_dir or default)
    watch = Stopwatch()
    dataset = load_dataset(FLAGS.dataset, FLAGS.data_dir)
    if FLAGS.validate:
        dataset = hold_out(dataset)
    kernel = make_kernel(dataset)
    if FLAGS.resume:
        check_resumed(folder)
    try:
        distilled = BY_ROUTE[FLAGS.route](dataset, kernel, folder, watch)
    except BaseException as error:
        tell_what_is_kept(folder, error)
        raise
    watch.lap("distillation")
    # An older run's would stand beside the new images if this one were interrupted.
    discard(folder, (REPORT, PICTURE))
    distilled.save(folder)
    distilled.save_grid(folder / PICTURE)
    try:
        accuracy = measure(distilled, dataset, kernel, watch)
    except KeyboardInterrupt:
        message = "Interrupted: the images are written, their accuracy is not."
        raise KeyboardInterrupt(message) from None
    return write_report(folder, distilled, accuracy, watch.seconds)


BY_ROUTE = {"linear": by_linear_model, "means": by_means, "dpkip": by_dpkip}


def measure(
    distilled: DistilledDataset,
    dataset: ImageDataset,
    kernel: Kernel,
    watch: Stopwatch,
) -> dict[str, float]:
    """Accuracies of classifiers that saw the distilled images alone."""
    ridge = KernelRidgeClassifier(kernel).fit(distilled.images, distilled.labels)
    accuracy = {"krr": ridge.score(dataset.test_images, dataset.test_labels)}
    watch.lap("krr")
    if FLAGS.convnet_epochs:
        accuracy["convnet"] = convnet_accuracy(distilled, dataset)
        watch.lap("convnet")
    if FLAGS.taught_epochs:
        accuracy["convnet_taught"] = taught_accuracy(distilled, dataset, kernel)
        watch.lap("convnet_taught")
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
        "measured_on": "held-out training images" if FLAGS.validate else "test",
        "accuracy": accuracy,
        "statement": distilled.statement.to_dict(),
        "seconds": seconds,
        "note": NOTE,
    }
    reporting.write_json(folder / REPORT, report)
    return report


def main(argv: list[str]) -> None:
    """Runs the example; complaints about what was given are one line."""
    del argv
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        report = run()
    except (ValueError, OSError) as error:
        refuse(error)
    except KeyboardInterrupt as error:
        print(f"\n{str(error) or 'Interrupted.'}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    for name, value in report["accuracy"].items():
        _LOGGER.info("accuracy.%s: %.4f", name, value)


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    switch = functools.partial(flags.DEFINE_bool, flag_values=values)
    one_of = functools.partial(flags.DEFINE_enum, flag_values=values)
    real = functools.partial(flags.DEFINE_float, flag_values=values)
    whole = functools.partial(flags.DEFINE_integer, flag_values=values)
    text = functools.partial(flags.DEFINE_string, flag_values=values)
    one_of("dataset", "mnist", DATASETS, "Private data set.")
    whole("images_per_class", 10, "Images of each class.", lower_bound=1)
    one_of("kernel", "scattering", KERNELS, "Kernel.")
    one_of("route", "linear", ROUTES, "How private information enters.")
    real("epsilon", 1.0, "Epsilon per record.")
    real("delta", 1e-5, "Delta.")
    switch("resume", False, "Make images of what an earlier run released.")
    switch("validate", False, "Measure on held-out training images.")
    whole(
        "steps",
        None,
        "Noisy steps (means: steps on the images), if not the route's own.",
    )
    real("learning_rate", None, "Of these steps, if not the route's.")
    real("l2_norm", None, "Bound of what a record adds, if not the route's.")
    whole("damping_rank", None, "Of the whitening, if not the route's.")
    one_of(
        "bounded",
        None,
        ("pixels", "features"),
        "What DP-KIP bounds and noises; by default pixels.",
    )
    real("sampling", None, "Probability of a record in a step of DP-KIP, if not 1/30.")
    whole(
        "synthesis_steps",
        None,
        "Steps on the images of the linear route, if not its own.",
        lower_bound=1,
    )
    whole("convnet_epochs", 80, "Epochs of the ConvNet.", lower_bound=0)
    whole(
        "taught_epochs",
        0,
        "Epochs of a ConvNet that ridge regression on the images teaches.",
        lower_bound=0,
    )
    text("data_dir", None, "Folder prepared by tensorflow-datasets.")
    text("output_dir", None, "Where the results go.")
    text(
        "cache_dir",
        None,
        "Where to keep the features of the private images between runs; as private as "
        "the images. Not kept by default.",
    )
    whole("seed", None, "Makes the run repeatable; not for a release.")


if __name__ == "__main__":
    define_flags(FLAGS)
    app.run(main, flags_parser=parse_flags)
