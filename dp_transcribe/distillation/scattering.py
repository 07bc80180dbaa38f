"""The wavelet scattering transform: fixed, public features of an image.

The filters are those of kymatio, computed here in NumPy, and the output equals
kymatio's. It is faster because the oriented filters of one scale are applied as one
batched product, the last low-pass (a Gaussian, which is separable) is two small
matrix products that compute only the values that are kept, and XLA fuses the rest.

References:
    Bruna, Mallat: Invariant Scattering Convolution Networks, arXiv:1203.1513.
    Andreux et al.: Kymatio: Scattering Transforms in Python, arXiv:1812.11214.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate

# Filters are periodised over this many copies of the image on each side.
_COPIES = 2
# kymatio normalises its Gaussians with this value of pi; kept for equality.
_KYMATIO_PI = 3.1415


@dataclasses.dataclass(frozen=True)
class Scattering:
    """Scattering transform of order two.

    Attributes:
        height: height of an image in pixels.
        width: width of an image in pixels.
        scale: J, the logarithm to base two of the averaging window; the output is
            smaller by `2**scale` in each direction.
        orientations: L, number of orientations of the wavelets.

    Raises:
        ValueError: an attribute is no whole number of 1 or more, or the image is not
            larger than the averaging window.
    """

    height: int
    width: int
    scale: int = 2
    orientations: int = 8

    def __post_init__(self) -> None:
        """Checks the attributes."""
        for name in ("height", "width", "scale", "orientations"):
            _validate.positive_int(name, getattr(self, name))
        if 2**self.scale >= min(self.height, self.width):
            expected = f"a scale with 2**scale below {min(self.height, self.width)}"
            mend = "Lower the scale, or enlarge the images."
            raise _validate.invalid("scale", self.scale, expected, mend)

    @property
    def channels(self) -> int:
        """Output channels per input channel: 81 for J = 2 and L = 8."""
        scales, angles = self.scale, self.orientations
        return 1 + scales * angles + angles**2 * scales * (scales - 1) // 2

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        rows, columns = self._padded
        return (rows >> self.scale) - 2, (columns >> self.scale) - 2

    @property
    def _padded(self) -> tuple[int, int]:
        step = 2**self.scale
        return tuple(  # type: ignore[return-value]
            ((size + step) // step + 1) * step for size in (self.height, self.width)
        )

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Transforms a batch; differentiable almost everywhere.

        Args:
            images: float32 `[n, height, width, colours]`.

        Returns:
            float32 `[n, channels * colours, output height, output width]`. The
            channels of a colour are consecutive and in kymatio's order: the mean,
            order one by scale and angle, order two by the two scales and angles.

        Raises:
            ValueError: the images have another height or width.
        """
        images = tf.convert_to_tensor(images)
        if not images.shape.is_compatible_with([None, self.height, self.width, None]):
            expected = f"of shape (n, {self.height}, {self.width}, colours)"
            raise _validate.invalid("images", images.shape, expected)
        shape = tf.shape(images)
        planes = tf.reshape(
            tf.transpose(images, [0, 3, 1, 2]), [-1, self.height, self.width]
        )
        out = _compiled(self, planes)
        channels = self.channels * shape[3]
        return tf.reshape(out, [shape[0], channels, *self.output_size])

    def padded(self, planes: tf.Tensor) -> tf.Tensor:
        """Planes `[n, height, width]` with the reflected margins of the transform."""
        rows, columns = self._padded
        height, width = rows - self.height, columns - self.width
        margins = [
            [height // 2, (height + 1) // 2],
            [width // 2, (width + 1) // 2],
        ]
        return tf.pad(planes, [[0, 0], *margins], "REFLECT")

    def _transform(self, planes: tf.Tensor) -> tf.Tensor:
        """`[n, height, width]` to `[n, channels, output height, output width]`."""
        bank = filter_bank(self)
        signal = self.padded(planes)
        order_zero = [bank.smooth(signal[:, None], 0)]
        order_one, order_two = [], []
        spectrum = spectrum_of(signal[:, None])
        for first in range(self.scale):
            envelope = bank.envelope(spectrum, 0, first)
            order_one.append(bank.smooth(envelope, first))
            if first == self.scale - 1:
                continue
            # One axis more: every orientation again under every orientation.
            inner = spectrum_of(envelope)[:, :, None]
            order_two.append(
                [
                    bank.smooth(bank.envelope(inner, first, second), second)
                    for second in range(first + 1, self.scale)
                ]
            )
        orders = [*order_zero, *order_one, *self._second_order(order_two)]
        return tf.concat(orders, axis=1)

    def _second_order(self, coefficients: list[list[tf.Tensor]]) -> list[tf.Tensor]:
        """Flattens to kymatio's order: first wavelet, then second wavelet."""
        ordered = [tf.concat(scales, axis=2) for scales in coefficients]
        return [
            tf.reshape(x, [-1, x.shape[1] * x.shape[2], *self.output_size])
            for x in ordered
        ]


# Not for speed alone: outside XLA, oneDNN's small batched products of TensorFlow 2.21
# write out of bounds for some sizes (seen with J = 1 at 28x28) and end the process.
@tf.function(jit_compile=True)
def _compiled(transform: Scattering, planes: tf.Tensor) -> tf.Tensor:
    """`Scattering._transform`, compiled per transform and shape."""
    return transform._transform(planes)


@dataclasses.dataclass(frozen=True, eq=False)
class FilterBank:
    """Filters in the Fourier domain, and the low-pass as matrices.

    Attributes:
        wavelets: by resolution of the input and scale of the wavelet, complex64
            `[orientations, rows, columns]` (real values).
        averages: by resolution of the input, pairs of matrices for rows and columns
            whose products, the first added and the second subtracted, smooth,
            subsample and crop.
    """

    wavelets: dict[tuple[int, int], np.ndarray]
    averages: list[list[tuple[np.ndarray, np.ndarray]]]

    def envelope(self, spectrum: tf.Tensor, source: int, scale: int) -> tf.Tensor:
        """Modulus of the wavelet transform at the resolution of the wavelet.

        Args:
            spectrum: complex64 `[..., 1, rows, columns]`, at resolution `source`.
            source: resolution of the input.
            scale: scale of the wavelets, `source` or coarser.

        Returns:
            float32 `[..., orientations, rows, columns]`, smaller by
            `2**(scale - source)`.
        """
        return modulus(self.filtered(spectrum, source, scale))

    def filtered(self, spectrum: tf.Tensor, source: int, scale: int) -> tf.Tensor:
        """The wavelet transform itself, complex64; arguments as in `envelope`."""
        product = spectrum * self.wavelets[source, scale]
        return tf.signal.ifft2d(_fold(product, 2 ** (scale - source)))

    def smooth(self, signal: tf.Tensor, resolution: int) -> tf.Tensor:
        """Low-pass, subsampled to the output's size without the padding."""
        (rows, columns), (odd_rows, odd_columns) = self.averages[resolution]
        even = tf.einsum("ux,...xy,vy->...uv", rows, signal, columns)
        odd = tf.einsum("ux,...xy,vy->...uv", odd_rows, signal, odd_columns)
        return even - odd


@functools.cache
def filter_bank(transform: Scattering) -> FilterBank:
    """Computes kymatio's Morlet filters and Gaussian low-pass.

    Args:
        transform: which transform.

    Returns:
        The filters.
    """
    shape = transform._padded
    wavelets = {}
    for scale in range(transform.scale):
        spectra = np.stack(
            [
                _morlet_spectrum(shape, scale, angle, transform.orientations)
                for angle in range(transform.orientations)
            ]
        )
        for source in range(scale + 1):
            wavelets[source, scale] = _crop(spectra, source).astype(np.complex64)
    averages = [_averages(transform, res) for res in range(transform.scale)]
    return FilterBank(wavelets, averages)


def _gabor(
    shape: tuple[int, int], sigma: float, theta: float, frequency: float, slant: float
) -> np.ndarray:
    """A Gaussian times a plane wave, periodised, complex `[rows, columns]`."""
    rows, columns = (
        np.arange(-_COPIES * size, (_COPIES + 1) * size)[:, None]
        if axis == 0
        else np.arange(-_COPIES * size, (_COPIES + 1) * size)[None]
        for axis, size in enumerate(shape)
    )
    along = rows * np.cos(theta) + columns * np.sin(theta)
    across = columns * np.cos(theta) - rows * np.sin(theta)
    exponent = -(along**2 + (slant * across) ** 2) / (2 * sigma**2)
    wave = np.exp(exponent + 1j * frequency * along)
    copies = 2 * _COPIES + 1
    folded = wave.reshape(copies, shape[0], copies, shape[1]).sum(axis=(0, 2))
    return folded / (2 * _KYMATIO_PI * sigma**2 / slant)


def _morlet_spectrum(
    shape: tuple[int, int], scale: int, angle: int, orientations: int
) -> np.ndarray:
    """Fourier transform of a Morlet wavelet of zero mean, float64."""
    theta = (int(orientations - orientations / 2 - 1) - angle) * np.pi / orientations
    sigma, frequency = 0.8 * 2**scale, 0.75 * np.pi / 2**scale
    wave = _gabor(shape, sigma, theta, frequency, 4.0 / orientations)
    bump = _gabor(shape, sigma, theta, 0.0, 4.0 / orientations)
    return np.fft.fft2(wave - wave.sum() / bump.sum() * bump).real


def _frequencies(size: int, resolution: int) -> np.ndarray:
    """The lower frequencies that are left of `size` at a resolution, int `[m]`."""
    left = size >> resolution
    return np.fft.fftfreq(left, 1 / left).astype(int)


def _crop(spectra: np.ndarray, resolution: int) -> np.ndarray:
    """Keeps the lower frequencies of `[..., rows, columns]`."""
    rows, columns = (_frequencies(n, resolution) for n in spectra.shape[-2:])
    return spectra[..., rows[:, None], columns[None]]


def _averages(
    transform: Scattering, resolution: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Low-pass matrices for rows and columns, from their real and odd parts."""
    rows, columns = (
        _average(size, transform.scale, resolution) for size in transform._padded
    )
    return [
        (rows.real.copy(), columns.real.copy()),
        (rows.imag.copy(), columns.imag.copy()),
    ]


def _average(size: int, scale: int, resolution: int) -> np.ndarray:
    """Complex64 `[output, size >> resolution]`: smooth, subsample and crop an axis."""
    sigma = 0.8 * 2 ** (scale - 1)
    # The one-dimensional factor of the separable Gaussian.
    spectrum = np.fft.fft2(_gabor((size, size), sigma, 0.0, 0.0, 1.0)).real
    factor = spectrum[:, 0] / np.sqrt(spectrum[0, 0])
    frequencies = _frequencies(size, resolution)
    left = size >> resolution
    kept = np.arange(1, (size >> scale) - 1) << (scale - resolution)
    shifts = kept[:, None, None] - np.arange(left)[None, :, None]
    waves = np.exp(2j * np.pi * frequencies * shifts / left)
    return ((factor[frequencies] * waves).sum(-1) / left).astype(np.complex64)


def spectrum_of(signal: tf.Tensor) -> tf.Tensor:
    """Fourier transform of real planes `[..., rows, columns]`, complex64."""
    return tf.signal.fft2d(tf.complex(signal, tf.zeros_like(signal)))


def _fold(spectrum: tf.Tensor, factor: int) -> tf.Tensor:
    """Subsamples by `factor` in space, which is a mean over aliases in frequency."""
    if factor == 1:
        return spectrum
    *batch, rows, columns = spectrum.shape
    batch[0] = -1
    split = [*batch, factor, rows // factor, factor, columns // factor]
    return tf.reduce_mean(tf.reshape(spectrum, split), axis=(-4, -2))


def modulus(values: tf.Tensor) -> tf.Tensor:
    """Absolute value whose gradient at zero is zero and not NaN."""
    squared = tf.math.real(values) ** 2 + tf.math.imag(values) ** 2
    safe = tf.where(squared > 0, squared, 1.0)
    return tf.where(squared > 0, tf.sqrt(safe), 0.0)
