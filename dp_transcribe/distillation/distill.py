"""From private images to a distilled data set, private information entering once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from dp_transcribe import _validate
from dp_transcribe.distillation.dataset import DistilledDataset
from dp_transcribe.distillation.kept import KeptRelease, probe_of
from dp_transcribe.distillation.kernels import (
    InterceptKernel,
    Kernel,
    MirroredKernel,
    ScatteringKernel,
    embed_in_batches,
)
from dp_transcribe.distillation.linear import (
    LinearTraining,
    PrivateLinearModel,
    check_labels,
)
from dp_transcribe.distillation.releases import handing_over
from dp_transcribe.distillation.synthesis import (
    ImageSource,
    Synthesis,
    check_images,
    check_support,
    draw_images,
    synthesize,
)
from dp_transcribe.distillation.whitening import PublicWhitening
from dp_transcribe.generators.priors import DOMAINS
from dp_transcribe.privacy.statement import PrivacyStatement

_LOGGER = logging.getLogger(__name__)
# The part of the seed that keeps whitening's images apart from synthesis'.
_WHITENING_PART = 1_000_000
# Public images whose shape and range are compared with the private ones'.
_EXAMPLES = 100


@dataclasses.dataclass(frozen=True)
class Distillation:
    """Settings of `distill`; public, chosen without the private data.

    Attributes:
        training: of the private linear model.
        synthesis: of the support images.
        public_images: number of public images that the whitening is made from.
        damping_rank: see `PublicWhitening.from_public`.
    """

    training: LinearTraining = LinearTraining(steps=80, learning_rate=40.0, l2_norm=0.3)
    synthesis: Synthesis = Synthesis()
    public_images: int = 3000
    damping_rank: int = 100

    @classmethod
    def for_domain(cls, domain: str) -> Distillation:
        """Settings for images like those that `default_prior` draws for a domain.

        Photographs ("natural") teach more slowly. `kernel_for_domain` has the kernel.

        Raises:
            ValueError: the domain is not known.
        """
        _validate.one_of("domain", domain, DOMAINS)
        if domain != "natural":
            return cls()
        return cls(training=LinearTraining(steps=60, learning_rate=20.0, l2_norm=0.3))


@dataclasses.dataclass(frozen=True, eq=False)
class LinearRelease(KeptRelease):
    """The private linear model of `distill`, as one of plain embeddings.

    Attributes:
        weights: float32 `[features, classes]`.
        offset: float32 `[classes]`.
        probe: of the kernel without the constant, see `KeptRelease`.
        statement: the guarantee of both and of all that is made of them.
    """

    weights: np.ndarray
    offset: np.ndarray
    probe: np.ndarray
    statement: PrivacyStatement

    @classmethod
    def of(
        cls,
        model: PrivateLinearModel,
        whitening: PublicWhitening,
        probe: np.ndarray,
    ) -> LinearRelease:
        """What a model of whitened embeddings releases.

        Args:
            model: fitted.
            whitening: of its embeddings.
            probe: the `probe_of` their kernel.

        Raises:
            RuntimeError: the model was not fitted.
        """
        weights, offset = whitening.plain_weights(model)
        return cls(weights, offset, probe, model.privacy_statement())


def kernel_for_domain(
    domain: str, image_shape: Sequence[int]
) -> ScatteringKernel | MirroredKernel:
    """The kernel for images like those that `default_prior` draws for a domain.

    Photographs ("natural") may be mirrored, so theirs is a `MirroredKernel`. Private
    records, support images and what is to be classified are embedded by one kernel.

    Args:
        domain: as in `default_prior`.
        image_shape: `(height, width, colours)`.

    Returns:
        The kernel; for `distill`, wrap it in an `InterceptKernel`.

    Raises:
        ValueError: the domain is not known.
    """
    _validate.one_of("domain", domain, DOMAINS)
    height, width, colours = image_shape
    kernel = ScatteringKernel((height, width, colours))
    return MirroredKernel(kernel) if domain == "natural" else kernel


def distill(
    images: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int,
    kernel: InterceptKernel,
    source: ImageSource,
    target_epsilon: float,
    delta: float,
    settings: Distillation | None = None,
    features: np.ndarray | None = None,
    on_release: Callable[[LinearRelease], None] | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> tuple[DistilledDataset, PrivateLinearModel]:
    """Distils private images through a private linear model of their features.

    The private images are used in one place only, the fit of the linear model. The
    support images are then made from it and from public images, at no cost.

    The model has an offset, since its features are centred, and so has kernel ridge
    regression with an `InterceptKernel`. Give `KernelRidgeClassifier` the same kernel:
    with another one the images stand for another model.

    Args:
        images: private images, float `[records, height, width, colours]`.
        labels: their labels, int `[records]`.
        num_classes: number of classes.
        kernel: around an inner product of embeddings, such as
            `InterceptKernel(ScatteringKernel(image_shape))`. The private fit takes
            the embeddings without the constant.
        source: public images.
        target_epsilon: the epsilon per record that is not passed.
        delta: strictly between 0 and 1.
        settings: further settings.
        features: the embeddings of `images` by `kernel.kernel`, without the constant,
            if they are there already.
        on_release: called with what is paid for, before images are made of it, for
            example to `save` it: `images_of_model` makes other ones at no cost.
        seed: None for secret noise; an int makes runs repeatable, for tests.
        verbose: 1 shows bars with the epsilon so far, 0 nothing.

    Returns:
        The distilled data set, and the linear model of whitened features, which is
        as private.

    Raises:
        ValueError: an argument is out of range. Nothing was spent.

        Whatever is raised while images are made, an interruption too, has an attribute
        `released`: the `LinearRelease`, of which `images_of_model` makes images at no
        further cost.

    **Privacy**: unit `RECORD`, zero-out; the statement is in the result.
    """
    settings = settings or Distillation()
    mend = "Wrap it: `InterceptKernel(kernel)`, for `KernelRidgeClassifier` too."
    _validate.instance_of("kernel", kernel, InterceptKernel, mend)
    _validate.optional_callable("on_release", on_release)
    check_support(kernel, source, settings.synthesis, num_classes=num_classes)
    public = draw_images(source, _EXAMPLES, seed or 0)
    check_images(images, public, settings.synthesis.pixel_range)
    probe = probe_of(kernel.kernel, public.shape[1:])
    model, whitening = fit_linear_model(
        images,
        labels,
        num_classes=num_classes,
        kernel=kernel.kernel,
        source=source,
        target_epsilon=target_epsilon,
        delta=delta,
        settings=settings,
        features=features,
        seed=seed,
        verbose=verbose,
    )
    _LOGGER.info("The linear model is fitted; nothing private is read any more.")
    released = LinearRelease.of(model, whitening, probe)
    with handing_over(released):
        if on_release is not None:
            on_release(released)
        distilled = images_of_model(
            released,
            kernel,
            source,
            settings=settings.synthesis,
            seed=seed,
            verbose=verbose,
        )
    return distilled, model


def images_of_model(
    released: LinearRelease,
    kernel: InterceptKernel,
    source: ImageSource,
    *,
    settings: Synthesis | None = None,
    seed: int | None = None,
    verbose: int = 1,
) -> DistilledDataset:
    """Makes images of which kernel ridge regression is a released linear model.

    Args:
        released: by `distill`; of the same kernel.
        kernel: as for `distill`.
        source: public images.
        settings: how many images, and how they are made.
        seed: of the public images; None for that of a `distill` without a seed.
        verbose: 1 shows a bar, 0 nothing.

    Returns:
        The distilled data set, with the statement of `released`.

    Raises:
        ValueError: the model is one of other embeddings than the kernel's, or public
            pixels are out of range.

    **Privacy**: post-processing: reads no private record and costs nothing.
    """
    public_seed = _validate.optional_seed("seed", seed) or 0
    settings = settings or Synthesis()
    _validate.instance_of("released", released, LinearRelease)
    _validate.instance_of("kernel", kernel, InterceptKernel)
    _validate.instance_of("settings", settings, Synthesis)
    public = draw_images(source, _EXAMPLES, public_seed)
    check_images(public, public, settings.pixel_range)
    released.check_kernel(kernel.kernel, public.shape[1:])
    images, labels = synthesize(
        kernel.weights(released.weights, released.offset),
        kernel,
        source,
        settings=settings,
        seed=public_seed,
        verbose=verbose,
    )
    return DistilledDataset(
        images=images,
        labels=labels,
        num_classes=len(released.offset),
        statement=released.statement,
    )


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
    verbose: int,
) -> tuple[PrivateLinearModel, PublicWhitening]:
    """The one use of the private images: a linear model of whitened embeddings.

    Arguments and errors are those of `distill`, but the kernel has no intercept:
    centred features leave nothing of a constant.

    Returns:
        The model, which is private, and the whitening, which is public.

    **Privacy**: unit `RECORD`, zero-out; spends all of `target_epsilon`.
    """
    labels = check_labels(labels, len(images), num_classes)
    whitening = public_whitening(kernel, source, settings, seed=seed)
    if features is None:
        features = embed_in_batches(kernel, images, verbose=verbose)
    expected_shape = (len(images), whitening.basis.shape[1])
    if np.shape(features) != expected_shape:
        expected = f"None or the kernel's embeddings, of shape {expected_shape}"
        raise _validate.invalid("features", np.shape(features), expected)
    model = PrivateLinearModel(num_classes, settings.training, seed=seed)
    model.fit(
        whitening.apply(features),
        labels,
        target_epsilon=target_epsilon,
        delta=delta,
        verbose=verbose,
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
    images = draw_images(
        source, settings.public_images, seed or 0, first_part=_WHITENING_PART
    )
    public = embed_in_batches(kernel, images)
    return PublicWhitening.from_public(public, damping_rank=settings.damping_rank)
