"""Private centroids: blurred images of each class that train convolutional networks.

Each class is cut into clusters. Every round, each record adds its image, reduced to
the directions in which *public* images vary, to the cluster whose centre is nearest;
the noisy sums and counts give the next centres. No round looks at the records in any
other way, and the first centres come from the noisy class means and public images.
"""

from __future__ import annotations

import dataclasses
import math

import dp_accounting
import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import DistilledDataset, balanced_labels
from dp_transcribe.distillation.linear import check_labels
from dp_transcribe.distillation.releases import RELATION, RecordSums
from dp_transcribe.distillation.synthesis import ImageSource
from dp_transcribe.privacy.calibration import noise_multiplier_for
from dp_transcribe.privacy.ledger import Ledger
from dp_transcribe.privacy.statement import PrivacyStatement

_BATCH = 250
# Float64 values that the sums of one release may take, 1 GiB.
_LARGEST = 2**27
# Least count of a cluster, relative to clusters of equal size.
_LEAST = 0.15


@dataclasses.dataclass(frozen=True)
class CentroidTraining:
    """How centroids are found; public, chosen without the private data.

    Attributes:
        images_per_class: number of clusters of each class.
        directions: number of principal directions of public images that are kept.
        mean_share: share of the budget for the class means, relative to `shares`.
        shares: of the budget, one for each round.
        count_weight: what a record adds to the count of its cluster, relative to the
            bound of its image.
        spread: how far the first centres are from the class mean, in units of
            the deviations of public images.
        public_images: number of public images for the directions and the first
            centres.
        accountant: `"pld"` or `"rdp"`.
    """

    images_per_class: int = 50
    directions: int = 100
    mean_share: float = 0.1
    shares: tuple[float, ...] = (1.0, 1.0, 2.0)
    count_weight: float = 0.4
    spread: float = 0.5
    public_images: int = 4000
    accountant: str = "pld"

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for name in ("images_per_class", "directions", "public_images"):
            _validate.positive_int(name, getattr(self, name))
        for name in ("mean_share", "count_weight", "spread"):
            _validate.positive_finite(name, getattr(self, name))
        if not self.shares:
            raise _validate.invalid("shares", self.shares, "at least one share")
        for share in self.shares:
            _validate.positive_finite("shares", share)
        _validate.one_of("accountant", self.accountant, ("rdp", "pld"))

    def multipliers(self, multiplier: float) -> list[float]:
        """Noise of the means' release and of each round's, for that of all together."""
        shares = (self.mean_share, *self.shares)
        return [multiplier * math.sqrt(sum(shares) / share) for share in shares]

    def event(self, multiplier: float) -> dp_accounting.DpEvent:
        """Everything that a fit releases with this noise multiplier."""
        return dp_accounting.ComposedDpEvent(
            [dp_accounting.GaussianDpEvent(m) for m in self.multipliers(multiplier)]
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _PublicFrame:
    """What is known of images without the private data.

    Attributes:
        offset: float64 `[pixels]`, the mean of public images.
        basis: float64 `[directions, pixels]`, orthonormal.
        deviations: float64 `[public, directions]`, of public images.
        bound: length to which deviations are clipped.
    """

    offset: np.ndarray
    basis: np.ndarray
    deviations: np.ndarray
    bound: float

    @classmethod
    def of(cls, source: ImageSource, plan: CentroidTraining, seed: int) -> _PublicFrame:
        parts = [
            np.asarray(source.sample(_BATCH, tf.constant([seed, part], tf.int32)))
            for part in range(-(-plan.public_images // _BATCH))
        ]
        images = np.concatenate(parts)[: plan.public_images].astype(np.float64)
        flat = images.reshape(len(images), -1)
        offset = flat.mean(axis=0)
        covariance = (flat - offset).T @ (flat - offset)
        basis = np.linalg.eigh(covariance)[1][:, ::-1][:, : plan.directions].T
        deviations = (flat - offset) @ basis.T
        norms = np.linalg.norm(deviations, axis=1)
        bound = max(float(np.percentile(norms, 90)), 1e-6)
        return cls(offset, basis, deviations, bound)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Deviations of images, `[n, directions]`, clipped; NaN where an image is."""
        out = np.empty((len(images), len(self.basis)))
        for start in range(0, len(images), 2000):
            rows = np.asarray(images[start : start + 2000], np.float64)
            found = (rows.reshape(len(rows), -1) - self.offset) @ self.basis.T
            norms = np.linalg.norm(found, axis=1, keepdims=True)
            found *= np.minimum(1.0, self.bound / np.maximum(norms, 1e-12))
            out[start : start + 2000] = found
        return out

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Images from deviations, float32 `[n, pixels]` in 0..1."""
        return np.clip(codes @ self.basis + self.offset, 0, 1).astype(np.float32)


class PrivateCentroids:
    """Noisy centroids of each class, found by a private k-means.

    Args:
        num_classes: number of classes.
        source: public images, in 0..1, of the shape of the private ones.
        training: how the centroids are found.
        seed: None for secret noise; an int makes runs repeatable, for tests.

    **Privacy**: unit `RECORD`, zero-out, the number of records of each class being
    released with noise as well. In a release each record adds one vector of norm at
    most one (its clipped image and its count) to one place, so the sums move by at
    most one. An image that is not finite adds nothing.

    References:
        Su et al.: Differentially Private K-Means Clustering, arXiv:1504.05998.
    """

    def __init__(
        self,
        num_classes: int,
        source: ImageSource,
        training: CentroidTraining | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self.num_classes = _validate.positive_int("num_classes", num_classes)
        self.source = source
        self.training = training or CentroidTraining()
        self.seed = _validate.optional_seed("seed", seed)
        self._check_memory()
        self._ledger: Ledger | None = None
        self._last: RecordSums | None = None
        self._images: np.ndarray | None = None
        self._delta = 0.0

    def fit(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        target_epsilon: float,
        delta: float,
    ) -> PrivateCentroids:
        """Finds the centroids and spends the whole budget.

        Args:
            images: float `[records, height, width, colours]` in 0..1.
            labels: int `[records]`.
            target_epsilon: the epsilon per record that is not passed.
            delta: strictly between 0 and 1.

        Returns:
            The centroids.

        Raises:
            ValueError: an argument is out of range or the labels do not fit.
            RuntimeError: `fit` was called before.
        """
        if self._ledger is not None:
            raise RuntimeError(
                "These centroids were fitted before, and a second fit would spend a "
                "second budget on the same records. Make new ones."
            )
        plan = self.training
        labels = check_labels(labels, len(images), self.num_classes)
        multiplier = noise_multiplier_for(
            target_epsilon, delta, plan.event, RELATION, plan.accountant
        )
        self._delta, self._ledger = delta, Ledger()
        frame = _PublicFrame.of(self.source, plan, self.seed or 0)
        codes = frame.encode(images)
        multipliers = plan.multipliers(multiplier)
        means, _ = self._release(codes, labels, None, frame.bound, multipliers[0], 0)
        centres = self._first_centres(means, frame)
        for number, noise in enumerate(multipliers[1:], start=1):
            sums = self._release(codes, labels, centres, frame.bound, noise, number)
            centres = _shrunk(*sums, means)
        flat = frame.decode(centres.reshape(-1, codes.shape[1]))
        self._images = flat.reshape(len(flat), *np.shape(images)[1:])
        return self

    def distilled(self) -> DistilledDataset:
        """The centroids as images with their guarantee.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if self._images is None:
            raise RuntimeError("There are no centroids yet. Call `fit` first.")
        return DistilledDataset(
            images=self._images,
            labels=balanced_labels(self.training.images_per_class, self.num_classes),
            num_classes=self.num_classes,
            statement=self.privacy_statement(),
        )

    @property
    def ledger(self) -> Ledger:
        """What was released."""
        return Ledger() if self._ledger is None else self._ledger

    def privacy_statement(self) -> PrivacyStatement:
        """The guarantee of the centroids.

        Raises:
            RuntimeError: `fit` was not called.
        """
        if self._last is None:
            raise RuntimeError("Nothing was released yet. Call `fit` first.")
        return self._last.statement(
            delta=self._delta,
            accountant=self.training.accountant,
            covered=("distilled data set",),
            rounds=len(self.training.shares),
        )

    def _release(
        self,
        codes: np.ndarray,
        labels: np.ndarray,
        centres: np.ndarray | None,
        bound: float,
        multiplier: float,
        number: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One release: noisy means of the clusters, and their noise's variance.

        Returns:
            Means `[classes, clusters, directions]` and variances
            `[classes, clusters, 1]`; without `centres` one cluster for each class.
        """
        releases = RecordSums(
            mechanism="PrivateCentroids",
            l2_norm=1.0,
            noise_multiplier=multiplier,
            seed=None if self.seed is None else self.seed + number,
            ledger=self._ledger,
        )
        releases.begin()
        clusters = 1 if centres is None else centres.shape[1]
        weight = self.training.count_weight
        scale = bound * math.hypot(1.0, weight)
        total = _cluster_sums(codes, labels, centres, self.num_classes, weight * bound)
        noisy = releases.add_noise(tf.constant(total / scale, tf.float32)).numpy()
        self._last = releases
        sums, counts = noisy[..., :-1] * scale, noisy[..., -1:] * scale
        least = _LEAST * len(codes) / (self.num_classes * clusters)
        counts = np.maximum(counts / (weight * bound), max(least, 1.0))
        return sums / counts, (multiplier * scale / counts) ** 2

    def _first_centres(self, means: np.ndarray, frame: _PublicFrame) -> np.ndarray:
        """Class means and public deviations, `[classes, clusters, directions]`."""
        rng = np.random.default_rng(self.seed or 0)
        shape = self.num_classes, self.training.images_per_class
        chosen = frame.deviations[rng.integers(0, len(frame.deviations), shape)]
        return means + self.training.spread * chosen

    def _check_memory(self) -> None:
        """Refuses more clusters than fit, naming the number that does."""
        per_image = self.num_classes * (self.training.directions + 1)
        largest = _LARGEST // per_image
        if self.training.images_per_class > largest:
            expected = f"at most {largest}, which take 1 GiB"
            value = self.training.images_per_class
            raise _validate.invalid("images_per_class", value, expected)


def _cluster_sums(
    codes: np.ndarray,
    labels: np.ndarray,
    centres: np.ndarray | None,
    num_classes: int,
    count: float,
) -> np.ndarray:
    """Sums over the records of each cluster, `[classes, clusters, directions + 1]`.

    Each record adds its code and `count` to the nearest centre of its class. A code
    that is not finite adds nothing.
    """
    parts = []
    finite = np.isfinite(codes).all(axis=1)
    for label in range(num_classes):
        own = codes[finite & (labels == label)]
        rows = np.concatenate([own, np.full((len(own), 1), count)], axis=1)
        if centres is None:
            parts.append(rows.sum(axis=0, keepdims=True))
            continue
        here = centres[label]
        nearest = ((here**2).sum(axis=1) - 2.0 * own @ here.T).argmin(axis=1)
        parts.append(np.eye(len(here))[nearest].T @ rows)
    return np.stack(parts)


def _shrunk(
    centres: np.ndarray, variances: np.ndarray, means: np.ndarray
) -> np.ndarray:
    """Draws noisy centres towards their class mean, most where noise prevails.

    Wiener's filter in each direction: how much the true centres vary is estimated by
    how much the noisy ones do beyond their noise.
    """
    deviations = centres - means
    signal = (deviations**2 - variances).mean(axis=1, keepdims=True)
    signal = np.maximum(signal, 0.0)
    return means + deviations * signal / (signal + variances + 1e-12)
