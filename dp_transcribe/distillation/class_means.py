"""One Gaussian release: the means of the classes' features, and their sizes."""

from __future__ import annotations

import dataclasses
import math

import dp_accounting
import numpy as np
import tensorflow as tf

from dp_transcribe._principal import principal_directions
from dp_transcribe.distillation.kept import KeptRelease, probe_of
from dp_transcribe.distillation.kernels import (
    InnerProductKernel,
    Kernel,
    embed_in_batches,
)
from dp_transcribe.distillation.releases import RELATION, RecordSums
from dp_transcribe.mechanisms.clipping.bound import Bound, zero_rows
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.statement import PrivacyStatement

_ROWS = 500  # that are embedded at once


@dataclasses.dataclass(frozen=True, eq=False)
class ClassMeans(KeptRelease):
    """Noisy means of the classes' features, along public directions.

    Attributes:
        means: float32 `[classes, directions]`, relative to the public images' mean and
            shrunk where noise outweighs how much public images vary.
        counts: float32 `[classes]`, noisy numbers of records.
        probe: of the `PublicDirections`, see `KeptRelease`.
        statement: the guarantee of both and of all that is made of them.
    """

    means: np.ndarray
    counts: np.ndarray
    probe: np.ndarray
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
        features = embed_in_batches(kernel, images, batch_size=_ROWS)
        parts = principal_directions(features, rank)
        return cls(kernel, *(part.astype(np.float32) for part in parts))

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Coordinates of images, float32 `[n, directions]`."""
        return (self.kernel.embed(inputs) - self.mean) @ self.basis


def release_class_means(
    images: np.ndarray,
    labels: np.ndarray,
    directions: PublicDirections,
    *,
    num_classes: int,
    target_epsilon: float,
    delta: float,
    l2_norm: float,
    count_share: float,
    accountant: str = "pld",
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
        l2_norm: bound C of what one record adds.
        count_share: part of the squared bound that tells how large the classes are.
        accountant: `"pld"` or `"rdp"`.
        seed: None for secret noise; an int makes runs repeatable, for tests.

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
        accountant,
    )
    probe = probe_of(directions, images.shape[1:])
    releases = RecordSums(
        mechanism="ClassMeans",
        l2_norm=l2_norm,
        noise_multiplier=multiplier,
        seed=seed,
    )
    releases.begin()
    total = tf.zeros([num_classes, len(directions.variances) + 1])
    for start in range(0, len(images), _ROWS):
        rows = slice(start, start + _ROWS)
        batch = tf.constant(np.asarray(images[rows], np.float32))
        total += class_sums(
            directions.embed(batch),
            tf.constant(labels[rows]),
            num_classes=num_classes,
            l2_norm=l2_norm,
            count_share=count_share,
        )
    noisy = releases.add_noise(total).numpy()
    unit = l2_norm * math.sqrt(count_share)
    # A class that is hardly there is taken for one of the size of the noise.
    least = max(1.0, multiplier / math.sqrt(count_share))
    scale = math.sqrt(1.0 - count_share)
    counts = np.maximum(noisy[:, -1] / unit, least)
    deviations = multiplier * l2_norm / (scale * counts[:, None])
    means = noisy[:, :-1] / (scale * counts[:, None])
    # What a class's mean is expected to be, if directions vary as in public images.
    means *= directions.variances / (directions.variances + deviations**2)
    statement = releases.statement(
        delta=delta,
        accountant=accountant,
        covered=("class means", "distilled data set"),
    )
    return ClassMeans(means, counts, probe, statement)


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
