"""From private images to a distilled data set, private information entering once."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import DistilledDataset
from dp_transcribe.distillation.kernels import Kernel, MirroredKernel, embed_in_batches
from dp_transcribe.distillation.linear import (
    LinearTraining,
    PrivateLinearModel,
    check_labels,
)
from dp_transcribe.distillation.synthesis import ImageSource, Synthesis, synthesize
from dp_transcribe.distillation.whitening import PublicWhitening

_LOGGER = logging.getLogger(__name__)
# The part of the seed that keeps whitening's images apart from synthesis'.
_WHITENING_PART = 1_000_000
_PUBLIC_BATCH = 250


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of `distill`; public, chosen without the private data.

    Attributes:
        training: of the private linear model.
        synthesis: of the support images.
        public_images: number of public images that the whitening is made from.
        damping_rank: see `PublicWhitening.from_public`.
        mirrored: whether records are embedded by a `MirroredKernel`.
    """

    training: LinearTraining = LinearTraining(steps=80, learning_rate=40.0, l2_norm=0.3)
    synthesis: Synthesis = Synthesis()
    public_images: int = 3000
    damping_rank: int = 100
    mirrored: bool = False

    @classmethod
    def for_domain(cls, domain: str) -> Distillation:
        """Settings for images like those that `default_prior` draws for a domain.

        Photographs ("natural") may be mirrored and teach more slowly.
        """
        if domain != "natural":
            return cls()
        training = LinearTraining(steps=60, learning_rate=20.0, l2_norm=0.3)
        return cls(training=training, mirrored=True)

    def record_kernel(self, kernel: Kernel) -> Kernel:
        """What embeds the private records, given what embeds the support images."""
        return MirroredKernel(kernel) if self.mirrored else kernel


def distill(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    kernel: Kernel,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    settings: Distillation | None = None,
    features: np.ndarray | None = None,
    seed: int | None = None,
) -> tuple[DistilledDataset, PrivateLinearModel]:
    """Distils private images through a private linear model of their features.

    The private images are used in one place only, the fit of the linear model. The
    support images are then made from it and from public images, at no cost.

    Args:
        images: private images, float `[records, height, width, colours]`.
        labels: their labels, int `[records]`.
        num_classes: number of classes.
        kernel: an inner product of embeddings, such as `ScatteringKernel`.
        source: public images.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        settings: further settings.
        features: the embeddings of `images` by `settings.record_kernel(kernel)`, if
            they are there already.
        seed: None for secret noise; an int makes runs repeatable, for tests.

    Returns:
        The distilled data set, and the linear model of whitened features, which is
        as private.

    Raises:
        ValueError: an argument is out of range.

    **Privacy**: unit `RECORD`, zero-out; the statement is in the result.
    """
    settings = settings or Distillation()
    model, whitening = fit_linear_model(
        images,
        labels,
        num_classes=num_classes,
        kernel=kernel,
        source=source,
        target_epsilon=target_epsilon,
        delta=delta,
        settings=settings,
        features=features,
        seed=seed,
    )
    _LOGGER.info("The linear model is fitted; nothing private is read any more.")
    support, support_labels = synthesize(
        whitening.plain_weights(model),
        kernel,
        source,
        settings=settings.synthesis,
        seed=seed or 0,
    )
    distilled = DistilledDataset(
        images=support,
        labels=support_labels,
        num_classes=num_classes,
        statement=model.privacy_statement(),
    )
    return distilled, model


def fit_linear_model(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    kernel: Kernel,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    settings: Distillation,
    features: np.ndarray | None,
    seed: int | None,
) -> tuple[PrivateLinearModel, PublicWhitening]:
    """The one use of the private images: a linear model of whitened embeddings.

    Arguments and errors are those of `distill`.

    Returns:
        The model, which is private, and the whitening, which is public.

    **Privacy**: unit `RECORD`, zero-out; spends all of `target_epsilon`.
    """
    labels = check_labels(labels, len(images), num_classes)
    kernel = settings.record_kernel(kernel)
    whitening = public_whitening(kernel, source, settings, seed=seed)
    if features is None:
        features = embed_in_batches(kernel, images)
    if len(features) != len(images):
        expected = f"None or one row for each of {len(images)} images"
        raise _validate.invalid("features", np.shape(features), expected)
    model = PrivateLinearModel(num_classes, settings.training, seed=seed)
    model.fit(
        whitening.apply(features), labels, target_epsilon=target_epsilon, delta=delta
    )
    return model, whitening


def public_whitening(
    kernel: Kernel,
    source: ImageSource,
    settings: Distillation,
    *,
    seed: int | None = None,
) -> PublicWhitening:
    """Whitening of a kernel's embeddings by images of a public source.

    Args:
        kernel: embeds the images.
        source: public images.
        settings: how many images, and how strongly they whiten.
        seed: of the public images.

    Returns:
        The map.
    """
    batches = -(-settings.public_images // _PUBLIC_BATCH)
    parts = [
        kernel.embed(source.sample(_PUBLIC_BATCH, _public_seed(seed, part))).numpy()
        for part in range(batches)
    ]
    public = np.concatenate(parts)[: settings.public_images]
    return PublicWhitening.from_public(public, damping_rank=settings.damping_rank)


def _public_seed(seed: int | None, part: int) -> tf.Tensor:
    return tf.constant([seed or 0, _WHITENING_PART + part], tf.int32)
