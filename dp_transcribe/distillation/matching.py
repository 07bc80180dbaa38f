"""Images that have the class means of the private images in random ConvNets.

The means are released once; images are then moved until theirs are the same, at no
cost. Networks learn from such images; for kernel ridge regression, `distill` is better.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.class_means import (
    ClassMeans,
    PublicDirections,
    release_class_means,
)
from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.kernels import LARGEST, embed_in_batches
from dp_transcribe.distillation.linear import check_labels
from dp_transcribe.distillation.random_networks import RandomConvNets
from dp_transcribe.distillation.releases import handing_over
from dp_transcribe.distillation.synthesis import (
    ImageSource,
    check_images,
    draw_images,
    margins,
    move_images,
)

_LOGGER = logging.getLogger(__name__)
_CHUNK = 500
# float32 values per pixel and filter that are kept to go back through a network.
_KEPT_PER_FILTER = 8
# What the seed of the order begins with, so that no other public draw repeats it.
_ORDER = 2


@dataclasses.dataclass(frozen=True)
class MeanMatching:
    """Settings of `distill_means`; public, chosen without the private data.

    Attributes:
        images_per_class: number of images of each class.
        networks: number of random ConvNets.
        filters: channels of each of their blocks.
        public_images: number of public images that the directions are made from.
        directions: number of directions in which means are released, the principal
            ones of the public images.
        l2_norm: bound of one record's features in these directions; those of one
            image have norm one before the mean of the public images is taken off.
        count_share: part of the squared bound that tells how large the classes are.
        candidates: number of public images from which the first ones are chosen.
        damping_rank: directions from this rank on hardly count for telling classes
            apart in that choice.
        herded: number of public images of each class, the surest, that it is made of.
        steps: number of steps of Adam on the images.
        learning_rate: of Adam, in units of the pixels.
        pixel_range: lowest and highest value of a pixel.
        accountant: `"pld"` or `"rdp"`.
    """

    images_per_class: int = 50
    networks: int = 10
    filters: int = 64
    public_images: int = 3000
    directions: int = 1500
    l2_norm: float = 0.6
    count_share: float = 0.01
    candidates: int = 20_000
    damping_rank: int = 100
    herded: int = 2000
    steps: int = 300
    learning_rate: float = 0.02
    pixel_range: tuple[float, float] = (0.0, 1.0)
    accountant: str = "pld"

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for name in ("networks", "filters", "candidates", "herded", "steps"):
            _validate.positive_int(name, getattr(self, name))
        for name in ("l2_norm", "learning_rate"):
            _validate.positive_finite(name, getattr(self, name))
        _validate.fraction_open("count_share", self.count_share)
        _validate.in_range("directions", self.directions, 2, self.public_images)
        _validate.in_range("damping_rank", self.damping_rank, 1, self.directions - 1)
        _validate.pixel_range("pixel_range", self.pixel_range)
        _validate.one_of("accountant", self.accountant, ("rdp", "pld"))
        for name in ("images_per_class", "public_images"):
            _validate.in_range(name, getattr(self, name), 1, self.candidates)


def distill_means(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    settings: MeanMatching | None = None,
    on_release: Callable[[ClassMeans], None] | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> DistilledDataset:
    """Distils private images by the means of their classes in random ConvNets.

    The noisy means, released once, choose the public images to start from and are what
    these are then moved to have themselves.

    Args:
        images: private images, float `[records, height, width, colours]`.
        labels: their labels, int `[records]`.
        num_classes: number of classes.
        source: public images.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        settings: further settings.
        on_release: called with what is paid for, before images are made of it, for
            example to `save` it: `images_of_means` makes other ones at no cost.
        seed: None for secret noise; an int makes runs repeatable, for tests.
        verbose: 1 shows a bar, 0 nothing.

    Returns:
        The distilled data set.

    Raises:
        ValueError: an argument is out of range. Nothing was spent.

        Whatever is raised while images are made, an interruption too, has an attribute
        `released`: the noisy `ClassMeans`, of which `images_of_means` makes images at
        no further cost.

    **Privacy**: unit `RECORD`, zero-out; the statement is in the result.

    References:
        Zhao, Bilen: Dataset Condensation with Distribution Matching,
        arXiv:2110.04181. Harder et al.: Pre-trained Perceptual Features Improve
        Differentially Private Image Generation, arXiv:2205.12900, for means that are
        released once.
    """
    settings = settings or MeanMatching()
    public_seed = _validate.optional_seed("seed", seed) or 0
    _validate.num_classes("num_classes", num_classes)
    _validate.optional_callable("on_release", on_release)
    labels = check_labels(labels, len(images), num_classes)
    public = draw_images(source, settings.candidates, public_seed)
    check_images(images, public, settings.pixel_range)
    _check_memory(public.shape[1:], num_classes, settings)
    kernel, directions = _public_side(public, settings, public_seed)
    released = release_class_means(
        images,
        labels,
        directions,
        num_classes=num_classes,
        target_epsilon=target_epsilon,
        delta=delta,
        l2_norm=settings.l2_norm,
        count_share=settings.count_share,
        accountant=settings.accountant,
        seed=seed,
    )
    _LOGGER.info("The means are released; nothing private is read any more.")
    with handing_over(released):
        if on_release is not None:
            on_release(released)
        return _moved(released, public, kernel, directions, settings, seed, verbose)


def images_of_means(
    released: ClassMeans,
    source: ImageSource,
    *,
    settings: MeanMatching | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> DistilledDataset:
    """Makes images that have released means.

    Args:
        released: by `distill_means`.
        source: public images, the same as for `distill_means`.
        settings: those of `distill_means`, but for the number of images and what is
            done to them.
        seed: that of `distill_means`, for the same networks and public images.
        verbose: 1 shows a bar, 0 nothing.

    Returns:
        The distilled data set, with the statement of `released`.

    Raises:
        ValueError: the means are along other directions, public pixels are out of
            range, or the images do not fit into memory.

    **Privacy**: post-processing: reads no private record and costs nothing.
    """
    settings = settings or MeanMatching()
    public_seed = _validate.optional_seed("seed", seed) or 0
    _validate.instance_of("released", released, ClassMeans)
    _validate.instance_of("settings", settings, MeanMatching)
    public = draw_images(source, settings.candidates, public_seed)
    check_images(public, public, settings.pixel_range)
    _check_memory(public.shape[1:], len(released.means), settings)
    kernel, directions = _public_side(public, settings, public_seed)
    released.check_kernel(directions, public.shape[1:])
    return _moved(released, public, kernel, directions, settings, seed, verbose)


def _public_side(
    public: np.ndarray, settings: MeanMatching, seed: int
) -> tuple[RandomConvNets, PublicDirections]:
    """Networks, and the directions of public images in them."""
    height, width, colours = public.shape[1:]
    kernel = RandomConvNets(
        (height, width, colours),
        networks=settings.networks,
        filters=settings.filters,
        seed=seed,
    )
    directions = PublicDirections.from_public(
        kernel, public[: settings.public_images], settings.directions
    )
    return kernel, directions


def _moved(
    released: ClassMeans,
    public: np.ndarray,
    kernel: RandomConvNets,
    directions: PublicDirections,
    settings: MeanMatching,
    seed: int | None,
    verbose: int,
) -> DistilledDataset:
    """Public images, moved until they have the released means."""
    classes = len(released.means)
    start = public[first_images(released, directions, public, settings)]
    return DistilledDataset(
        images=_match(
            start, kernel, directions, released.means, settings, seed or 0, verbose
        ),
        labels=balanced_labels(settings.images_per_class, classes),
        num_classes=classes,
        statement=released.statement,
    )


def first_images(
    released: ClassMeans,
    directions: PublicDirections,
    images: np.ndarray,
    settings: MeanMatching,
) -> np.ndarray:
    """Chooses public images whose means are near to the given ones.

    Linear discriminants say which images are surest of a class; of these, kernel
    herding takes one after the other.

    Args:
        released: the noisy means.
        directions: those of the means.
        images: public images, float32 `[n, height, width, colours]`.
        settings: numbers of images, and the discriminants' damping.

    Returns:
        int `[classes * images_per_class]`, the classes in order, no image twice in one.

    **Privacy**: post-processing of the means.

    References:
        Chen, Welling, Smola: Super-Samples from Kernel Herding, arXiv:1203.3472.
    """
    coordinates = embed_in_batches(directions, images, batch_size=_CHUNK)
    weights, offsets = discriminants(
        released.means, directions.variances, settings.damping_rank
    )
    surest = margins(coordinates @ weights - offsets)
    among = max(settings.herded, settings.images_per_class)
    chosen = []
    for label, mean in enumerate(released.means):
        candidates = np.argsort(-surest[:, label])[:among]
        # Of a class that few public images belong to, others are taken when all are.
        own = (surest[candidates, label] > 0.0).sum()
        candidates = candidates[: max(own, settings.images_per_class)]
        picked = herd(coordinates[candidates], mean, settings.images_per_class)
        chosen.append(candidates[picked])
    return np.concatenate(chosen)


def discriminants(
    means: np.ndarray, variances: np.ndarray, damping_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminants of classes that vary alike.

    Args:
        means: float `[classes, directions]`.
        variances: float `[directions]`, to all of which that of rank `damping_rank` is
            added.
        damping_rank: see above.

    Returns:
        Weights `[directions, classes]` and what is taken off the scores, `[classes]`.
    """
    centre = means.mean(axis=0)
    weights = (means - centre) / (variances + variances[damping_rank])
    return weights.T, (weights * (means + centre) / 2.0).sum(axis=1)


def herd(rows: np.ndarray, mean: np.ndarray, count: int) -> np.ndarray:
    """Takes rows one after the other, so that their mean is nearest to a given one.

    Args:
        rows: float `[n, features]`.
        mean: float `[features]`.
        count: how many, at most n; no row is taken twice.

    Returns:
        int `[count]`.
    """
    squares, towards = np.sum(rows**2, axis=1), rows @ mean
    total, free = np.zeros(rows.shape[1], rows.dtype), np.ones(len(rows), bool)
    chosen = []
    for number in range(1, count + 1):
        # The squared distance of the new mean, up to what all rows share.
        cost = (2.0 * (rows @ total) + squares) / number**2 - 2.0 * towards / number
        best = int(np.argmin(np.where(free, cost, np.inf)))
        free[best] = False
        total += rows[best]
        chosen.append(best)
    return np.array(chosen)


def _match(
    start: np.ndarray,
    kernel: RandomConvNets,
    directions: PublicDirections,
    means: np.ndarray,
    settings: MeanMatching,
    seed: int,
    verbose: int,
) -> np.ndarray:
    """Moves images, in the order of their classes, until their means are the given.

    Outside of the directions the means stay those of the first images.

    Returns:
        float32, of the shape of `start`.
    """
    classes = len(means)
    embedded = embed_in_batches(kernel, start, batch_size=_CHUNK)
    first = embedded.reshape(classes, -1, embedded.shape[1]).mean(axis=1)
    found = (first - directions.mean) @ directions.basis
    targets = first + (means - found) @ directions.basis.T
    parts = tf.split(tf.cast(targets, tf.float32), len(kernel.networks), axis=1)
    gradients = [
        _distance_gradient(functools.partial(kernel.by_network, number), start, part)
        for number, part in enumerate(parts)
    ]
    order = np.random.default_rng((seed, _ORDER))

    def gradient_of_one(images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        chosen = int(order.integers(len(parts)))
        return gradients[chosen](images, parts[chosen])

    return move_images(
        start,
        gradient_of_one,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        pixel_range=settings.pixel_range,
        verbose=verbose,
    )


def _check_memory(
    shape: tuple[int, ...], num_classes: int, settings: MeanMatching
) -> None:
    """Refuses images that could not be moved: one network sees all of them at once.

    Raises:
        ValueError: they would take more than 4 GiB.
    """
    height, width, colours = shape
    per_image = height * width * (colours + _KEPT_PER_FILTER * settings.filters)
    largest = LARGEST // per_image // num_classes
    if settings.images_per_class > largest:
        expected = f"at most {largest}, which take 4 GiB"
        mend = "Ask for fewer, or for networks with fewer filters."
        asked = settings.images_per_class
        raise _validate.invalid("images_per_class", asked, expected, mend)


def _distance_gradient(
    embed: Callable[[tf.Tensor], tf.Tensor], images: np.ndarray, means: tf.Tensor
) -> Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Squared distance of the classes' means in one network, and its gradient.

    Args:
        embed: the network.
        images: float32 `[n, height, width, colours]`; their shape is read.
        means: float32 `[classes, features]`; their shape is read.

    Returns:
        A function of such images and means.
    """

    @tf.function
    def gradient(images: tf.Tensor, means: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        classes, features = means.shape
        with tf.GradientTape() as tape:
            tape.watch(images)
            embedded = tf.reshape(embed(images), [classes, -1, features])
            distance = tf.reduce_sum((tf.reduce_mean(embedded, axis=1) - means) ** 2)
        return distance, tape.gradient(distance, images)

    # Traced here: one function for each network is not a function traced too often.
    return gradient.get_concrete_function(
        tf.TensorSpec(images.shape), tf.TensorSpec(means.shape)
    )
