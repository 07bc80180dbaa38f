"""How every pixel of an image moves its scattering transform.

The wavelets are linear, so what they make of every single pixel is the same for all
images and is computed once. What depends on the image are the phases of the wavelet
transforms, which turn these responses into changes of their moduli: all that is left
are large matrix products.
"""

from __future__ import annotations

import dataclasses
import functools

import tensorflow as tf

from dp_transcribe.distillation.scattering import (
    FilterBank,
    Scattering,
    filter_bank,
    modulus,
    spectrum_of,
)

# Real and imaginary part.
_Parts = tuple[tf.Tensor, tf.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class PixelResponses:
    """What the linear parts of a transform make of single pixels, float32.

    Attributes:
        mean: `[pixels, outputs]`, the coefficients of order zero.
        waves: by scale of the wavelets, real and imaginary part
            `[orientations, pixels, positions]`.
        inner: by scales of the first and second wavelets, real and imaginary part
            `[orientations, positions, smaller positions]`: the same for one position
            of a modulus of order one.
        averages: by resolution, `[outputs, positions]`: the last low-pass.
    """

    mean: tf.Tensor
    waves: list[_Parts]
    inner: dict[tuple[int, int], _Parts]
    averages: list[tf.Tensor]


def scattering_jacobian(transform: Scattering, image: tf.Tensor) -> tf.Tensor:
    """Jacobian of the transform of one image of one colour.

    Args:
        transform: the scattering transform.
        image: float32 `[height, width]`.

    Returns:
        float32 `[pixels, channels * outputs]`, the coefficients in the transform's
        order. A modulus of zero counts as constant, as it does in back-propagation.
    """
    responses = pixel_responses(transform)
    bank, angles = filter_bank(transform), transform.orientations
    spectrum = spectrum_of(transform.padded(image[None])[:, None])
    order_zero, order_one, order_two = [responses.mean], [], []
    for first, waves in enumerate(responses.waves):
        wave = bank.filtered(spectrum, 0, first)[0]
        # [orientations, pixels, positions]: how the moduli change.
        change = _along(_phase(wave), waves)
        average = responses.averages[first]
        order_one.append(_by_pixel(tf.matmul(change, average, transpose_b=True)))
        if first == transform.scale - 1:
            continue
        inner = spectrum_of(modulus(wave))[:, None]
        # Per orientation of the first wavelets: what reads their change.
        readers = [
            _reader(
                _phase(bank.filtered(inner, first, second)),
                responses.inner[first, second],
                responses.averages[second],
            )
            for second in range(first + 1, transform.scale)
        ]
        reader = tf.concat(readers, axis=1)
        reader = tf.reshape(reader, [angles, -1, change.shape[2]])
        order_two.append(_by_pixel(tf.matmul(change, reader, transpose_b=True)))
    return tf.concat([*order_zero, *order_one, *order_two], axis=1)


@functools.cache
def pixel_responses(transform: Scattering) -> PixelResponses:
    """Computes what the linear parts of a transform make of single pixels.

    Args:
        transform: which transform.

    Returns:
        The responses: about 110 MB for images of 28x28, J = 2 and L = 8.
    """
    with tf.init_scope():
        bank, pixels = filter_bank(transform), transform.height * transform.width
        eye = tf.reshape(tf.eye(pixels), [pixels, transform.height, transform.width])
        padded = transform.padded(eye)[:, None]
        spectrum = spectrum_of(padded)
        sizes = [padded.shape[2] >> j for j in range(transform.scale)]
        others = [padded.shape[3] >> j for j in range(transform.scale)]
        positions = [a * b for a, b in zip(sizes, others, strict=True)]
        waves, inner = [], {}
        for first in range(transform.scale):
            waves.append(_parts(bank.filtered(spectrum, 0, first)))
            count = positions[first]
            if first + 1 < transform.scale:
                eye = tf.reshape(tf.eye(count), [count, 1, sizes[first], others[first]])
                single = spectrum_of(eye)
            for second in range(first + 1, transform.scale):
                inner[first, second] = _parts(bank.filtered(single, first, second))
        averages = [_average(bank, j, n) for j, n in enumerate(positions)]
        mean = tf.matmul(
            tf.reshape(padded, [pixels, positions[0]]), averages[0], transpose_b=True
        )
        return PixelResponses(mean, waves, inner, averages)


def _parts(waves: tf.Tensor) -> _Parts:
    """Complex `[n, orientations, rows, columns]` as `[orientations, n, positions]`."""
    flat = tf.reshape(waves, [*waves.shape[:2], -1])
    flat = tf.transpose(flat, [1, 0, 2])
    return tf.math.real(flat), tf.math.imag(flat)


def _average(bank: FilterBank, resolution: int, positions: int) -> tf.Tensor:
    """The last low-pass as one matrix, float32 `[outputs, positions]`."""
    even, odd = (
        tf.einsum("ux,vy->uvxy", rows, columns)
        for rows, columns in bank.averages[resolution]
    )
    return tf.reshape(even - odd, [-1, positions])


def _phase(wave: tf.Tensor) -> _Parts:
    """Real and imaginary part of `wave` over its modulus, `[..., positions]`."""
    flat = tf.reshape(wave, [*wave.shape[:-2], -1])
    size = modulus(flat)
    return tuple(  # type: ignore[return-value]
        tf.math.divide_no_nan(part, size)
        for part in (tf.math.real(flat), tf.math.imag(flat))
    )


def _along(phase: _Parts, response: _Parts) -> tf.Tensor:
    """The part of responses `[angles, pixels, positions]` that changes the modulus."""
    return phase[0][:, None] * response[0] + phase[1][:, None] * response[1]


def _reader(phase: _Parts, inner: _Parts, average: tf.Tensor) -> tf.Tensor:
    """The linear map from a change of order one to coefficients of order two.

    Args:
        phase: of the second wavelets, `[first angles, second angles, smaller]`.
        inner: their responses, `[second angles, positions, smaller]`.
        average: the last low-pass, `[outputs, smaller]`.

    Returns:
        float32 `[first angles, second angles, outputs, positions]`.
    """
    firsts, seconds, smaller = phase[0].shape
    total = 0.0
    for turn, response in zip(phase, inner, strict=True):
        rows = tf.transpose(turn, [1, 0, 2])[:, :, None] * average
        rows = tf.reshape(rows, [seconds, -1, smaller])
        total += tf.matmul(rows, response, transpose_b=True)
    out = tf.reshape(total, [seconds, firsts, average.shape[0], -1])
    return tf.transpose(out, [1, 0, 2, 3])


def _by_pixel(moves: tf.Tensor) -> tf.Tensor:
    """`[orientations, pixels, n]` as `[pixels, orientations * n]`."""
    return tf.reshape(tf.transpose(moves, [1, 0, 2]), [moves.shape[1], -1])
