"""Kernels: a public embedding of each input, and a product between embeddings."""

from __future__ import annotations

import abc
import dataclasses
import math

import numpy as np
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.distillation.jacobians import EmbeddingJacobian
from dp_transcribe.distillation.progress import counted
from dp_transcribe.distillation.scattering import Scattering
from dp_transcribe.distillation.scattering_jacobian import scattering_jacobian

_EPSILON = 1e-5
# Squared norms below it are not brought to one; `tf.math.l2_normalize` has the same.
_SMALLEST_SQUARE = 1e-12
# float32 values that a distillation may take for its support images, 4 GiB.
LARGEST = 2**30
# float32 values per pixel that are kept to go back through a scattering embedding.
KEPT_PER_PIXEL = 1000


class Kernel(abc.ABC):
    """A positive semi-definite function of two inputs.

    The work is split in two, so that the part that concerns a private record alone
    is done once: `embed` maps each input by itself, `between` compares embeddings.

    **Privacy**: `embed` must be a public function of each input alone. Statistics
    over private data have no place in it.
    """

    @property
    def embeds_identically(self) -> bool:
        """Whether an embedding is the flattened input itself."""
        return False

    @property
    def is_inner_product(self) -> bool:
        """Whether `between` is the inner product of embeddings."""
        return False

    @abc.abstractmethod
    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Maps inputs `[n, ...]` to embeddings, float32 `[n, features]`."""

    def jacobian(self, example: tf.Tensor) -> EmbeddingJacobian:
        """Jacobian of the embedding of one input."""
        pixels = math.prod(example.shape)
        repeated = tf.repeat(example[None], pixels, axis=0)
        directions = tf.reshape(tf.eye(pixels), [pixels, *example.shape])
        with tf.autodiff.ForwardAccumulator(repeated, directions) as accumulator:
            embedded = self.embed(repeated)
        return EmbeddingJacobian.dense(accumulator.jvp(embedded))

    @abc.abstractmethod
    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Kernel matrix of embeddings, float32 `[left, right]`."""

    def __call__(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Kernel matrix of inputs, float32 `[left, right]`."""
        return self.between(self.embed(left), self.embed(right))


class InnerProductKernel(Kernel):
    """A kernel that is the inner product of its embeddings."""

    @property
    def is_inner_product(self) -> bool:
        """True."""
        return True

    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Inner products."""
        return tf.matmul(left, right, transpose_b=True)


@dataclasses.dataclass(frozen=True)
class ScatteringKernel(InnerProductKernel):
    """Inner product of normalised scattering coefficients.

    Each group of channels is brought to mean zero and variance one within each image,
    and the whole vector to norm one.

    Attributes:
        image_shape: height, width and number of colours.
        groups: number of groups of channels, a divisor of their number (81 per colour
            by default); None takes 27 for grey images and every channel by itself
            for colour.
        scale: J of the transform.
        orientations: L of the transform.
    """

    image_shape: tuple[int, int, int]
    groups: int | None = None
    scale: int = 2
    orientations: int = 8

    def __post_init__(self) -> None:
        """Checks that the groups divide the channels."""
        if self.channels % self.num_groups:
            expected = f"None or a divisor of {self.channels} channels"
            raise _validate.invalid("groups", self.groups, expected)

    @property
    def transform(self) -> Scattering:
        """The scattering transform."""
        height, width, _ = self.image_shape
        return Scattering(height, width, self.scale, self.orientations)

    @property
    def channels(self) -> int:
        """Channels of the transform, over all colours."""
        return self.transform.channels * self.image_shape[2]

    @property
    def num_groups(self) -> int:
        """Groups that are normalised, each by itself."""
        if self.groups is not None:
            return _validate.positive_int("groups", self.groups)
        grey = self.image_shape[2] == 1
        return self.channels // 3 if grey and self.channels % 3 == 0 else self.channels

    @property
    def num_features(self) -> int:
        """Length of an embedding: 3969 for images of 28x28x1."""
        return self.channels * math.prod(self.transform.output_size)

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Normalised scattering coefficients, float32 `[n, features]` of norm 1.

        Raises:
            ValueError: the images have another shape than `image_shape`.
        """
        inputs = tf.cast(inputs, tf.float32)
        self._check_shape("inputs", inputs.shape[1:])
        return _scattering_embedding(self, inputs)

    def jacobian(self, example: tf.Tensor) -> EmbeddingJacobian:
        """As in `Kernel`, the image itself being transformed only once."""
        example = tf.cast(example, tf.float32)
        self._check_shape("example", example.shape)
        return _scattering_jacobian(self, example)

    def _check_shape(self, name: str, shape: tf.TensorShape) -> None:
        """Refuses other images: with as many values they would be cut up wrongly."""
        if not shape.is_compatible_with(self.image_shape):
            expected = f"images of shape {tuple(self.image_shape)}"
            raise _validate.invalid(name, shape, expected)


@tf.function(jit_compile=True, reduce_retracing=False)
def _scattering_embedding(kernel: ScatteringKernel, images: tf.Tensor) -> tf.Tensor:
    """Compiled per kernel and batch size."""
    return _normalised(kernel, kernel.transform(images))


@tf.function(jit_compile=True, reduce_retracing=False)
def _scattering_jacobian(
    kernel: ScatteringKernel, image: tf.Tensor
) -> EmbeddingJacobian:
    """Compiled per kernel."""
    colours = kernel.image_shape[2]
    moves = [
        scattering_jacobian(kernel.transform, image[:, :, colour])
        for colour in range(colours)
    ]
    if kernel.num_groups % colours:  # a group is of several colours
        moves = [_of_all_colours(moves)]
    groups = kernel.num_groups // len(moves)
    coefficients = tf.reshape(kernel.transform(image[None]), [len(moves), -1])
    blocks, normal = [], []
    for row, move in zip(tf.unstack(coefficients), moves, strict=True):
        repeated = tf.repeat(row[None], move.shape[0], axis=0)
        with tf.autodiff.ForwardAccumulator(repeated, move) as accumulator:
            grouped = _grouped(groups, repeated)
        blocks.append(accumulator.jvp(grouped))
        normal.append(grouped[0])
    embedding = tf.concat(normal, axis=0)
    square = tf.reduce_sum(embedding**2)
    scale = tf.math.rsqrt(tf.maximum(square, _SMALLEST_SQUARE))
    unit = tf.where(square > _SMALLEST_SQUARE, scale * embedding, 0.0)
    return EmbeddingJacobian(scale * tf.stack(blocks), unit)


def _of_all_colours(moves: list[tf.Tensor]) -> tf.Tensor:
    """`[pixels * colours, colours * features]`; one colour moves its features alone."""
    colours = len(moves)
    blocks = tf.stack(moves, axis=1)[:, :, None] * tf.eye(colours)[None, :, :, None]
    return tf.reshape(blocks, [-1, colours * moves[0].shape[1]])


def _normalised(kernel: ScatteringKernel, coefficients: tf.Tensor) -> tf.Tensor:
    """Normalises each group of coefficients `[n, ...]`, then each image."""
    rows = tf.reshape(coefficients, [-1, kernel.num_features])
    return tf.math.l2_normalize(
        _grouped(kernel.num_groups, rows), axis=1, epsilon=_SMALLEST_SQUARE
    )


def _grouped(groups: int, rows: tf.Tensor) -> tf.Tensor:
    """Brings consecutive groups of `[n, features]` to mean zero and variance one."""
    flat = tf.reshape(rows, [-1, groups, rows.shape[1] // groups])
    mean, variance = tf.nn.moments(flat, axes=[-1], keepdims=True)
    normal = (flat - mean) * tf.math.rsqrt(variance + _EPSILON)
    return tf.reshape(normal, [-1, rows.shape[1]])


@dataclasses.dataclass(frozen=True)
class RBFKernel(Kernel):
    """Gaussian kernel `exp(-gamma * squared distance)` of flattened inputs.

    Attributes:
        gamma: one over twice the squared width, above 0.
    """

    gamma: float = 1e-2

    def __post_init__(self) -> None:
        """Checks the width."""
        _validate.positive_finite("gamma", self.gamma)

    @property
    def embeds_identically(self) -> bool:
        """True: inputs are compared as they are."""
        return True

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """The flattened input."""
        return _flatten(inputs)

    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """The kernel of all pairs."""
        squares = tf.reduce_sum(left**2, axis=1)[:, None] + tf.reduce_sum(
            right**2, axis=1
        )
        distances = squares - 2.0 * tf.matmul(left, right, transpose_b=True)
        return tf.exp(-self.gamma * tf.maximum(distances, 0.0))


@dataclasses.dataclass(frozen=True)
class NTKKernel(Kernel):
    """Neural tangent kernel of an infinitely wide ReLU network.

    Attributes:
        hidden_layers: number of hidden layers, 1 or more.
        weight_std: standard deviation of the weights, times the root of the fan-in.
        bias_std: standard deviation of the biases.

    References:
        Jacot, Gabriel, Hongler: Neural Tangent Kernel, arXiv:1806.07572.
        Lee et al.: Wide Neural Networks of Any Depth, arXiv:1902.06720.
    """

    hidden_layers: int = 1
    weight_std: float = math.sqrt(2.0)
    bias_std: float = 0.1

    def __post_init__(self) -> None:
        """Checks the attributes."""
        _validate.positive_int("hidden_layers", self.hidden_layers)
        _validate.positive_finite("weight_std", self.weight_std)
        _validate.non_negative("bias_std", self.bias_std)

    @property
    def embeds_identically(self) -> bool:
        """True: inputs are compared as they are."""
        return True

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """The flattened input."""
        return _flatten(inputs)

    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """The tangent kernel of all pairs.

        It is worked out in double precision: near an angle of zero, in the diagonal
        above all, float32 knows the angle to three digits only.
        """
        left, right = tf.cast(left, tf.float64), tf.cast(right, tf.float64)
        weight, bias = self.weight_std**2, self.bias_std**2
        width = left.shape[1]
        covariance = weight * tf.matmul(left, right, transpose_b=True) / width + bias
        left_variance = weight * tf.reduce_mean(left**2, axis=1)[:, None] + bias
        right_variance = weight * tf.reduce_mean(right**2, axis=1)[None] + bias
        tangent = covariance
        for _ in range(self.hidden_layers):
            scale = tf.sqrt(left_variance * right_variance)
            mean, slope = _relu_moments(covariance, scale)
            covariance = weight * mean + bias
            tangent = covariance + weight * tangent * slope
            left_variance = weight * left_variance / 2.0 + bias
            right_variance = weight * right_variance / 2.0 + bias
        return tf.cast(tangent, tf.float32)


def _relu_moments(
    covariance: tf.Tensor, scale: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Means of the product of two ReLUs and of their derivatives.

    Args:
        covariance: of the two Gaussian pre-activations, float64.
        scale: the product of their standard deviations.

    Returns:
        E[relu(u) relu(v)] and E[relu'(u) relu'(v)].
    """
    limit = 1.0 - 1e-12  # the angle's derivative is infinite at 1; it is 1e-6 here
    cosine = tf.clip_by_value(tf.math.divide_no_nan(covariance, scale), -limit, limit)
    angle = tf.acos(cosine)
    sine = tf.sqrt(1.0 - cosine**2)
    mean = scale * (sine + (np.pi - angle) * cosine) / (2.0 * np.pi)
    return mean, (np.pi - angle) / (2.0 * np.pi)


def _flatten(inputs: tf.Tensor) -> tf.Tensor:
    """Inputs `[n, ...]` as float32 `[n, size]`."""
    inputs = tf.cast(inputs, tf.float32)
    return tf.reshape(inputs, [tf.shape(inputs)[0], math.prod(inputs.shape[1:])])


@dataclasses.dataclass(frozen=True)
class MirroredKernel(Kernel):
    """Embeds an image as the mean of what a kernel makes of it and of its mirror image.

    For images whose mirror images mean the same. A model of these embeddings answers
    by them alone: given the kernel's own embeddings it is less accurate.

    Attributes:
        kernel: the kernel.

    **Privacy**: still a public function of each record alone, and no longer than the
    kernel's own embeddings.
    """

    kernel: Kernel

    @property
    def is_inner_product(self) -> bool:
        """Whether the kernel's own products are."""
        return self.kernel.is_inner_product

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """Mean embeddings of images `[n, height, width, colours]` and their mirrors."""
        mirrored = tf.reverse(inputs, [2])
        return (self.kernel.embed(inputs) + self.kernel.embed(mirrored)) / 2.0

    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """The kernel's own products."""
        return self.kernel.between(left, right)


@dataclasses.dataclass(frozen=True)
class InterceptKernel(Kernel):
    """Appends one constant coordinate to every embedding.

    Kernel ridge regression with this kernel has an intercept: the offset of each class
    is the weight of the constant times its length.

    Attributes:
        kernel: the kernel.
        length: the constant, above 0. The longer it is, the less the regularisation
            holds the intercept back.

    **Privacy**: the constant says nothing of a record, but makes embeddings longer.
    Private sums take the embeddings of `kernel`, as `distill` does.
    """

    kernel: Kernel
    length: float = 1.0

    def __post_init__(self) -> None:
        """Checks the length."""
        _validate.positive_finite("length", self.length)

    @property
    def is_inner_product(self) -> bool:
        """Whether the kernel's own products are."""
        return self.kernel.is_inner_product

    def embed(self, inputs: tf.Tensor) -> tf.Tensor:
        """The kernel's embeddings and the constant, float32 `[n, features + 1]`."""
        embedded = self.kernel.embed(inputs)
        return tf.pad(embedded, [[0, 0], [0, 1]], constant_values=self.length)

    def between(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """The kernel's own products plus the square of the constant."""
        return self.kernel.between(left[:, :-1], right[:, :-1]) + self.length**2

    def weights(self, weights: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """A linear model with an offset as weights of these embeddings.

        Args:
            weights: float `[features, classes]`, of the kernel's own embeddings.
            offset: float `[classes]`.

        Returns:
            float `[features + 1, classes]`.
        """
        return np.concatenate([weights, offset[None] / self.length])


def embed_in_batches(
    kernel: Kernel, inputs: np.ndarray, *, batch_size: int = 200, verbose: int = 0
) -> np.ndarray:
    """Embeds many inputs, each by itself.

    Args:
        kernel: the kernel.
        inputs: float `[n, ...]`.
        batch_size: inputs that are embedded at once.
        verbose: 1 shows a bar.

    Returns:
        float32 `[n, features]`.

    Raises:
        ValueError: there are no inputs.
    """
    if not len(inputs):
        raise _validate.invalid("inputs", np.shape(inputs), "at least one input")
    out: np.ndarray | None = None
    batches = -(-len(inputs) // batch_size)
    for number in counted(batches, verbose=verbose, unit="batch"):
        start = number * batch_size
        batch = _padded(inputs[start : start + batch_size], batch_size)
        rows = kernel.embed(tf.constant(batch)).numpy()
        if out is None:
            out = np.empty((len(inputs), rows.shape[1]), np.float32)
        out[start : start + batch_size] = rows[: len(out) - start]
    return out  # type: ignore[return-value]


def pull_back_in_batches(
    kernel: Kernel, inputs: np.ndarray, upstream: np.ndarray, *, batch_size: int
) -> np.ndarray:
    """Carries a gradient from embeddings back to the inputs.

    Every batch is embedded anew, so that what is kept for the way back is that of one
    batch.

    Args:
        kernel: the kernel.
        inputs: float `[n, ...]`.
        upstream: float `[n, features]`, the gradient with respect to the embeddings.
        batch_size: inputs that are treated at once.

    Returns:
        float32, of the inputs' shape.
    """
    out = np.empty(np.shape(inputs), np.float32)
    for start in range(0, len(inputs), batch_size):
        batch, gradient = (
            tf.constant(_padded(values[start : start + batch_size], batch_size))
            for values in (inputs, upstream)
        )
        rows = _pulled_back(kernel, batch, gradient).numpy()
        out[start : start + batch_size] = rows[: len(out) - start]
    return out


@tf.function
def _pulled_back(kernel: Kernel, inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """The vector-Jacobian product of the embedding, compiled per kernel and shape."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        embedded = kernel.embed(inputs)
    return tape.gradient(embedded, inputs, output_gradients=upstream)


def _padded(rows: np.ndarray, count: int) -> np.ndarray:
    """Rows as float32 with zeros appended: one shape is compiled once."""
    rows = np.asarray(rows, np.float32)
    return np.pad(rows, [(0, count - len(rows))] + [(0, 0)] * (rows.ndim - 1))
