"""A student whose first layers are fixed wavelets: it knows images before it learns."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe._principal import principal_directions
from dp_transcribe._validate import in_range, invalid, positive_int

# Widths of the filters at the two scales, in pixels of the image, and what remains of
# the second after halving the resolution.
_FINE, _COARSE, _HALVED = 9, 13, 7
SMALLEST = 8
# Of a prior, to whiten the features by.
PUBLIC_IMAGES = 4000
_DAMPING_RANK = 100
_ROWS = 250


def wavelet_student(
    input_shape: Sequence[int],
    num_classes: int,
    *,
    public_images: Any,
    directions: int = 600,
    units: Sequence[int] = (),
    orientations: int = 8,
    activation: str = "relu",
    dropout: float = 0.0,
) -> keras.Model:
    """Two scales of wavelet moduli, public whitening, and a small head that learns.

    A student that learns its filters from random images sees with them in real ones
    what it saw in those. Fixed wavelets see the same in both, so what the head learns
    from public queries carries over, and only the head's weights need noise: 6,010
    of them by default for 10 classes.

    Only standard Keras layers and operations are used, so the student loads without
    this library.

    Args:
        input_shape: `(height, width, channels)`.
        num_classes: Number of logits.
        public_images: float `[n, *input_shape]` of the public prior, from which mean
            and principal directions of the features are computed. Never private ones.
        directions: Principal directions of the features that the head sees, below n.
        units: Widths of hidden layers of the head.
        orientations: Of the wavelets.
        activation: Of hidden layers of the head.
        dropout: Rate after each hidden layer of the head. A `QueryPool` takes no
            student with dropout.

    Returns:
        A model `[batch, h, w, c] -> logits [batch, num_classes]`; wavelets and
        whitening are frozen.

    Raises:
        ValueError: the public images do not fit, or are too few.

    **Privacy**: nothing in it comes from private data.

    References:
        Scattering networks, arXiv:1203.1513; as features for private training,
        arXiv:2011.11660.
    """
    images = np.asarray(public_images, np.float32)
    shape = tuple(input_shape)
    if len(shape) != 3 or min(shape[:2]) < SMALLEST:
        expected = f"(height, width, channels) of at least {SMALLEST} pixels a side"
        raise invalid("input_shape", shape, expected)
    if images.shape[1:] != shape:
        expected = f"images [n, height, width, channels] of input_shape={shape}"
        raise invalid("public_images", images.shape, expected)
    in_range("directions", directions, 1, len(images) - 1)
    layers = keras.layers
    inputs = layers.Input(shape, name="image")
    features = _scattering(inputs, positive_int("orientations", orientations))
    front = keras.Model(inputs, features, name="wavelets")
    whitening = layers.Dense(directions, name="whitening", trainable=False)
    outputs = whitening(features)
    whitening.set_weights(_whitening(front, images, directions))
    for width in units:
        outputs = layers.Dense(width, activation=activation)(outputs)
        if dropout:
            outputs = layers.Dropout(dropout)(outputs)
    logits = layers.Dense(positive_int("num_classes", num_classes), name="logits")
    return keras.Model(inputs, logits(outputs), name="student")


def whitening_images(prior: Any) -> Any:
    """Public images for `wavelet_student`, always the same ones of a prior.

    So a teacher and a student that are whitened by them see the same.

    Args:
        prior: a `ProceduralGenerator`.

    Returns:
        float32 `[4000, h, w, c]`.
    """
    return prior.sample(PUBLIC_IMAGES, tf.constant([0, PUBLIC_IMAGES], tf.int32))


def _scattering(images: Any, orientations: int) -> Any:
    """Order 0 to 2 of a scattering transform of two scales, normalised, flat."""
    layers = keras.layers
    halve = functools.partial(layers.AveragePooling2D, 2, padding="same")
    fine = _moduli(images, _bank(_FINE, 0, orientations), 1, "fine")
    coarse = _moduli(images, _bank(_COARSE, 1, orientations), 2, "coarse")
    fine = halve()(fine)
    # The coarse wavelets again, on maps of half the resolution.
    second = _moduli(fine, _bank(_HALVED, 1, orientations, step=2), 1, "second")
    low = halve()(images)
    maps = layers.Concatenate()([low, fine, coarse, second])
    maps = halve()(maps)
    channels = maps.shape[-1]
    groups = channels // 3 if images.shape[-1] == 1 and channels % 3 == 0 else channels
    normalise = layers.GroupNormalization(
        groups, epsilon=1e-5, center=False, scale=False
    )
    return layers.Flatten()(normalise(maps))


def _moduli(maps: Any, bank: np.ndarray, strides: int, name: str) -> Any:
    """Absolute values of every map's complex wavelet coefficients."""
    size, filters = bank.shape[0], bank.shape[-1]
    margin = ((size - 1) // 2,) * 2
    # Mirrored, since an edge of zeros would be the strongest thing in the image.
    maps = keras.ops.pad(maps, ((0, 0), margin, margin, (0, 0)), mode="reflect")
    squares = []
    for part, values in (("real", bank.real), ("imaginary", bank.imag)):
        convolve = keras.layers.DepthwiseConv2D(
            size,
            strides,
            depth_multiplier=filters,
            use_bias=False,
            trainable=False,
            name=f"{name}_{part}",
        )
        squares.append(keras.ops.square(convolve(maps)))
        kernel = np.repeat(values[:, :, None, :], maps.shape[-1], axis=2)
        convolve.set_weights([kernel])
    return keras.ops.sqrt(squares[0] + squares[1] + 1e-6)


def _bank(size: int, scale: int, orientations: int, step: int = 1) -> np.ndarray:
    """Morlet wavelets, complex `[size, size, orientations]`.

    Args:
        size: of the filters.
        scale: the wavelets are `2**scale` times as wide as the narrowest.
        orientations: their number.
        step: distance of the samples, in pixels of the image.
    """
    half = (size - 1) / 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    sigma, slant = 0.8 * 2**scale / step, 4 / orientations
    frequency = 3 * math.pi / 4 / 2**scale * step
    waves = []
    for angle in np.pi * np.arange(orientations) / orientations:
        along = x * np.cos(angle) + y * np.sin(angle)
        across = (y * np.cos(angle) - x * np.sin(angle)) * slant
        envelope = np.exp(-(along**2 + across**2) / (2 * sigma**2))
        wave = envelope * np.exp(1j * frequency * along)
        wave -= envelope * (wave.sum() / envelope.sum())
        waves.append(wave * slant / (2 * np.pi * sigma**2))
    return np.stack(waves, -1)


def _whitening(
    front: keras.Model, images: np.ndarray, directions: int
) -> list[np.ndarray]:
    """Kernel and bias that centre features and even out their variances.

    Variances below that of the hundredth direction are not raised to the others'.
    """
    features = np.asarray(front.predict(images, batch_size=_ROWS, verbose=0))
    mean, variances, basis = principal_directions(features, directions, least=1e-9)
    damping = variances[min(_DAMPING_RANK, directions) - 1]
    kernel = basis / np.sqrt(variances + damping)
    return [kernel.astype(np.float32), (-mean @ kernel).astype(np.float32)]
