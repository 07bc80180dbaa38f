"""Images that have the class means of the private images in random ConvNets.

The means are released once; images are then moved until theirs are the same, at no
cost. Networks learn from such images; for kernel ridge regression, `distill` is better.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable

import dp_accounting
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe._principal import principal_directions
from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.kernels import (
    InnerProductKernel,
    Kernel,
    embed_in_batches,
)
from dp_transcribe.distillation.linear import check_labels
from dp_transcribe.distillation.random_networks import RandomConvNets
from dp_transcribe.distillation.releases import RELATION, RecordSums
from dp_transcribe.distillation.synthesis import (
    ImageSource,
    draw_images,
    margins,
    move_images,
)
from dp_transcribe.mechanisms.clipping.bound import Bound, zero_rows
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.statement import PrivacyStatement

_LOGGER = logging.getLogger(__name__)
_CHUNK = 500
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
        _validate.one_of("accountant", self.accountant, ("rdp", "pld"))
        for name in ("images_per_class", "public_images"):
            _validate.in_range(name, getattr(self, name), 1, self.candidates)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMeans:
    """Noisy means of the classes' features, along public directions.

    Attributes:
        means: float32 `[classes, directions]`, relative to the public images' mean and
            shrunk where noise outweighs how much public images vary.
        counts: float32 `[classes]`, noisy numbers of records.
        statement: the guarantee of both and of all that is made of them.
    """

    means: np.ndarray
    counts: np.ndarray
    statement: PrivacyStatement


@dataclasses.dataclass(frozen=True, eq=False)
class PublicDirections(InnerProductKernel):
    """A kernel's embeddings along the directions in which public images vary most.

    Attributes:
        kernel: embeds the images.
        mean: float32 `[features]`, of the public images.
        variances: float32 `[directions]`, from the largest on.
        basis: float32 `[features, directions]`, orthonormal.
    """

    kernel: Kernel
    mean: np.ndarray
    variances: np.ndarray
    basis: np.ndarray

    @classmethod
    def from_public(
        cls, kernel: Kernel, images: np.ndarray, rank: int
    ) -> PublicDirections:
        """The principal directions of public images.

        Args:
            kernel: embeds the images.
            images: public images, float `[n, height, width, colours]`.
            rank: number of directions, at most n.
        """
        features = embed_in_batches(kernel, images, batch_size=_CHUNK)
        parts = principal_directions(features, rank)
        return cls(kernel, *(part.astype(np.float32) for part in parts))

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Coordinates of images, float32 `[n, directions]`."""
        return (self.kernel.embed(inputs) - self.mean) @ self.basis


def distill_means(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    settings: MeanMatching | None = None,
    seed: int | None = None,
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
        seed: None for secret noise; an int makes runs repeatable, for tests.

    Returns:
        The distilled data set.

    Raises:
        ValueError: an argument is out of range. Nothing was spent.

    **Privacy**: unit `RECORD`, zero-out; the statement is in the result.

    References:
        Zhao, Bilen: Dataset Condensation with Distribution Matching,
        arXiv:2110.04181. Harder et al.: Pre-trained Perceptual Features Improve
        Differentially Private Image Generation, arXiv:2205.12900, for means that are
        released once.
    """
    settings = settings or MeanMatching()
    public_seed = _validate.optional_seed("seed", seed) or 0
    labels = check_labels(labels, len(images), num_classes)
    shape = tuple(np.shape(images)[1:])
    if len(shape) != 3:
        expected = "images of shape (records, height, width, colours)"
        raise _validate.invalid("images", np.shape(images), expected)
    kernel = RandomConvNets(
        shape,
        networks=settings.networks,
        filters=settings.filters,
        seed=public_seed,
    )
    public = draw_images(source, settings.candidates, public_seed)
    if public.shape[1:] != shape:
        expected = f"public images of shape {shape}, as the private ones"
        raise _validate.invalid("source", public.shape[1:], expected)
    directions = PublicDirections.from_public(
        kernel, public[: settings.public_images], settings.directions
    )
    released = release_class_means(
        images,
        labels,
        directions,
        num_classes=num_classes,
        target_epsilon=target_epsilon,
        delta=delta,
        settings=settings,
        seed=seed,
    )
    _LOGGER.info("The means are released; nothing private is read any more.")
    start = public[first_images(released, directions, public, settings)]
    support = _match(start, kernel, directions, released.means, settings, public_seed)
    return DistilledDataset(
        images=support,
        labels=balanced_labels(settings.images_per_class, num_classes),
        num_classes=num_classes,
        statement=released.statement,
    )


def release_class_means(
    images: np.ndarray,
    labels: np.ndarray,
    directions: PublicDirections,
    *,
    num_classes: int,
    target_epsilon: float,
    delta: float,
    settings: MeanMatching,
    seed: int | None = None,
) -> ClassMeans:
    """The one use of the private images: one Gaussian release of sums and counts.

    Args:
        images: private images, float `[records, height, width, colours]`.
        labels: their labels, int32 `[records]`, checked.
        directions: public.
        num_classes: number of classes.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        settings: bound, share of the counts and accountant are read.
        seed: as in `distill_means`.

    Returns:
        What was released, and its statement.

    **Privacy**: unit `RECORD`, zero-out. A record adds its clipped coordinates and
    its part of the count to the row of its class, see `class_sums`: together of norm
    `l2_norm` at most.
    """
    multiplier = noise_multiplier_for(
        target_epsilon,
        delta,
        dp_accounting.GaussianDpEvent,
        RELATION,
        settings.accountant,
    )
    releases = RecordSums(
        mechanism="ClassMeans",
        l2_norm=settings.l2_norm,
        noise_multiplier=multiplier,
        seed=seed,
    )
    releases.begin()
    total = tf.zeros([num_classes, len(directions.variances) + 1])
    for start in range(0, len(images), _CHUNK):
        rows = slice(start, start + _CHUNK)
        batch = tf.constant(np.asarray(images[rows], np.float32))
        total += class_sums(
            directions.embed(batch),
            tf.constant(labels[rows]),
            num_classes=num_classes,
            l2_norm=settings.l2_norm,
            count_share=settings.count_share,
        )
    noisy = releases.add_noise(total).numpy()
    unit = settings.l2_norm * math.sqrt(settings.count_share)
    # A class that is hardly there is taken for one of the size of the noise.
    least = max(1.0, multiplier / math.sqrt(settings.count_share))
    scale = math.sqrt(1.0 - settings.count_share)
    counts = np.maximum(noisy[:, -1] / unit, least)
    deviations = multiplier * settings.l2_norm / (scale * counts[:, None])
    means = noisy[:, :-1] / (scale * counts[:, None])
    # What a class's mean is expected to be, if directions vary as in public images.
    means *= directions.variances / (directions.variances + deviations**2)
    statement = releases.statement(
        delta=delta,
        accountant=settings.accountant,
        covered=("class means", "distilled data set"),
    )
    return ClassMeans(means, counts, statement)


@tf.function(reduce_retracing=True)
def class_sums(
    coordinates: tf.Tensor,
    labels: tf.Tensor,
    *,
    num_classes: int,
    l2_norm: float,
    count_share: float,
) -> tf.Tensor:
    """Sums of clipped coordinates by class, and beside them the counts.

    Args:
        coordinates: float32 `[n, directions]`.
        labels: int32 `[n]`.
        num_classes: number of classes.
        l2_norm: bound C of what one record adds.
        count_share: m.

    Returns:
        float32 `[classes, directions + 1]`: each record adds its coordinates, clipped
        to C, times the root of 1 - m, and C times the root of m.

    **Privacy**: moves by at most C if one record is left out. A record whose norm is
    not finite in float32 adds nothing.
    """
    squares = tf.reduce_sum(tf.square(coordinates), axis=1)
    usable = tf.math.is_finite(squares)
    factors = Bound(l2_norm).factors(squares)[:, None]
    clipped = factors * zero_rows(usable, coordinates)
    counted = tf.cast(usable, tf.float32)[:, None] * l2_norm
    parts = [math.sqrt(1.0 - count_share) * clipped, math.sqrt(count_share) * counted]
    return tf.math.unsorted_segment_sum(tf.concat(parts, axis=1), labels, num_classes)


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
    )


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
