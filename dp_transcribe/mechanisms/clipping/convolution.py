"""Per-example gradients of convolution kernels.

A kernel's gradient is the sum over output positions of patch times delta. Writing the
patches out costs more than the product itself, so the product is arranged to move
little memory: the offset along columns is expanded on the inputs and the offset along
rows on the deltas, strides are folded into channels first, and the batch is taken in
parts that stay in the processor's cache. Everything is decided from static shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import (
    Explicit,
    Factored,
    PerExampleGradient,
    after,
    outer,
    to_float32,
)

# Floats that one part of the batch may expand to, 32 MB: about a processor's cache.
PART = 2**23


@dataclasses.dataclass(frozen=True)
class Spec:
    """A convolution's static facts, as two-dimensional and channels last.

    Attributes:
        shape: the kernel variable's shape, `(..., in channels / groups, out channels)`.
        kernel: rows and columns of the kernel.
        strides: along rows and columns.
        dilations: along rows and columns.
        padding: "VALID" or "SAME".
        groups: number of groups of channels.
    """

    shape: tuple[int, ...]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: str
    groups: int = 1

    @classmethod
    def of(
        cls, layer: keras.layers.Layer, kernel: keras.Variable, padding: str
    ) -> Spec:
        """Reads the facts of a Keras convolution of one or two dimensions."""
        return cls(
            shape=tuple(kernel.shape),
            kernel=two(layer.kernel_size),
            strides=two(layer.strides),
            dilations=two(layer.dilation_rate),
            padding=padding.upper(),
            groups=getattr(layer, "groups", 1),
        )

    def span(self, axis: int, count: int) -> int:
        """How many padded inputs `count` outputs look at, in whole strides."""
        reach = (self.kernel[axis] - 1) * self.dilations[axis]
        return (count + reach // self.strides[axis]) * self.strides[axis]

    def before(self, axis: int, size: int, count: int) -> int:
        """How much padding comes before `size` inputs that give `count` outputs."""
        reach = (self.kernel[axis] - 1) * self.dilations[axis]
        needed = (count - 1) * self.strides[axis] + reach + 1
        return max(needed - size, 0) // 2 if self.padding == "SAME" else 0

    def pad(self, images: tf.Tensor, counts: tuple[int, int]) -> tf.Tensor:
        """Pads or crops `images` to exactly the span of `counts` outputs."""
        ends, paddings = [], [[0, 0]]
        for axis in (0, 1):
            size, span = images.shape[axis + 1], self.span(axis, counts[axis])
            before = self.before(axis, size, counts[axis])
            ends.append(min(size, span - before))
            paddings.append([before, max(span - before - size, 0)])
        images = images[:, : ends[0], : ends[1]]
        if any(sum(p) for p in paddings):
            images = tf.pad(images, [*paddings, [0, 0]])
        return images

    def shifted(self, images: tf.Tensor, axis: int, at: int, count: int) -> tf.Tensor:
        """The padded inputs that offset `at` of `axis` meets, for `count` outputs.

        A slice with a step is slow; the step is made an axis of its own instead.
        """
        stride = self.strides[axis]
        start, phase = divmod(at * self.dilations[axis], stride)
        if stride == 1:
            chosen = slice(start, start + count)
            return images[:, chosen] if axis == 0 else images[:, :, chosen]
        shape = images.shape.as_list()
        shape[axis + 1 : axis + 2] = [shape[axis + 1] // stride, stride]
        images = tf.reshape(images, [-1, *shape[1:]])
        if axis == 0:
            return images[:, start : start + count, phase]
        return images[:, :, start : start + count, phase]


def two(values: tuple[int, ...]) -> tuple[int, int]:
    """Puts a row axis of one before the values of a 1-D layer."""
    return (1, *values) if len(values) == 1 else tuple(values)  # type: ignore


def gradient(spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor) -> PerExampleGradient:
    """Returns the per-example gradients of a convolution kernel.

    Args:
        spec: the convolution.
        inputs: `[batch, ..., in channels]`, channels last.
        deltas: `[batch, ..., out channels]`, gradient at the pre-activation.
    """
    inputs, deltas = as_image(to_float32(inputs)), as_image(to_float32(deltas))
    shapes = inputs.shape[1:3].as_list() + deltas.shape[1:3].as_list()
    if None in shapes:
        return _of_unknown_size(spec, inputs, deltas)
    count, columns = deltas.shape[1:3].num_elements(), deltas.shape[-1]
    rows = spec.kernel[0] * spec.kernel[1] * inputs.shape[-1]
    if spec.groups > 1:
        return _grouped(spec, _patches(spec, inputs, deltas), deltas)
    if count == 1 or 2 * count * (rows + columns) <= rows * columns:
        patches = tf.reshape(_patches(spec, inputs, deltas), [-1, count, rows])
        return Factored(patches, tf.reshape(deltas, [-1, count, columns]), spec.shape)
    return _direct(spec, inputs, deltas)


def _direct(spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor) -> Explicit:
    """Returns the gradients written out, by the arrangement that moves least."""
    counts = tuple(deltas.shape[1:3])
    whole, stride = spec, spec.strides[0]
    fold = spec.strides == (stride, stride) and stride > 1
    if fold and spec.kernel[0] % stride == 0 and spec.kernel[1] % stride == 0:
        spec = dataclasses.replace(
            spec,
            kernel=(spec.kernel[0] // stride, spec.kernel[1] // stride),
            strides=(1, 1),
            padding="VALID",
        )
    else:
        stride = 1
    (rows, columns), outputs = spec.kernel, deltas.shape[-1]
    channels = inputs.shape[-1] * stride**2
    # Floats to move for each position: both sides expanded, or the inputs alone.
    left = 2 * columns * channels
    both, alone = left + 2 * rows * outputs, left + rows * columns * channels
    split = spec.strides[0] == 1 and both < alone
    swap = columns * channels > (rows * outputs if split else outputs)

    def product(x: tf.Tensor, d: tf.Tensor) -> tf.Tensor:
        # Padded here, part by part: no padded copy of the whole batch is held.
        x = whole.pad(x, counts)
        x = tf.nn.space_to_depth(x, stride) if stride > 1 else x
        return (_product_of_both if split else _product)(spec, x, d, swap)

    values = _in_parts(
        product,
        inputs,
        deltas,
        floats=whole.span(0, counts[0]) // stride * counts[1] * min(both, alone),
        size=rows * columns * channels * outputs,
    )
    folds = (stride, stride, channels // stride**2)
    if swap:
        layout, order = (rows, outputs, columns, *folds), (0, 3, 2, 4, 5, 1)
    elif split:
        layout, order = (columns, *folds, rows, outputs), (4, 1, 0, 2, 3, 5)
    else:
        layout, order = (rows, columns, *folds, outputs), (0, 2, 1, 3, 4, 5)
    return Explicit(values, spec.shape, layout, order)


def _product_of_both(
    spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor, swap: bool
) -> tf.Tensor:
    """Expands columns on the inputs and rows on the deltas, for a stride of one.

    Args:
        spec: the convolution.
        inputs: `[batch, rows, columns, channels]`, padded.
        deltas: `[batch, out rows, out columns, out channels]`.
        swap: multiply deltas by inputs, which is faster when they are the narrower.

    Returns:
        `[batch, ...]` ordered as columns, channels, rows, out channels of the kernel;
        as rows, out channels, columns, channels when swapped.
    """
    height, (count, width) = inputs.shape[1], deltas.shape[1:3]
    left = _columns(spec, inputs, width)
    starts = [i * spec.dilations[0] for i in range(spec.kernel[0])]
    right = [
        tf.pad(deltas, [[0, 0], [start, height - count - start], [0, 0], [0, 0]])
        for start in starts
    ]
    product = _matmul(left, tf.concat(right, -1), swap)
    return tf.reshape(product, [-1, product.shape[1] * product.shape[2]])


def _product(spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor, swap: bool) -> tf.Tensor:
    """Expands columns on the inputs and takes the rows one after the other.

    Args:
        spec: the convolution.
        inputs: `[batch, rows, columns, channels]`, padded.
        deltas: `[batch, out rows, out columns, out channels]`.
        swap: multiply deltas by inputs, which is faster when they are the narrower.

    Returns:
        `[batch, ...]` ordered as rows, columns, channels, out channels of the kernel;
        as rows, out channels, columns, channels when swapped.
    """
    count, width = deltas.shape[1:3]
    left = _columns(spec, inputs, width)
    rows = [spec.shifted(left, 0, i, count) for i in range(spec.kernel[0])]
    product = tf.stack([_matmul(row, deltas, swap) for row in rows], axis=1)
    return tf.reshape(product, [-1, product.shape[1:].num_elements()])


def _columns(spec: Spec, inputs: tf.Tensor, width: int) -> tf.Tensor:
    """Puts what the offsets along columns meet side by side, as channels."""
    return tf.concat(
        [spec.shifted(inputs, 1, j, width) for j in range(spec.kernel[1])], -1
    )


def _matmul(left: tf.Tensor, right: tf.Tensor, swap: bool) -> tf.Tensor:
    """Sums the outer products of channels over positions: `[batch, left, right]`."""
    if swap:
        left, right = right, left
    positions = left.shape[1] * left.shape[2]
    left = tf.reshape(left, [-1, positions, left.shape[-1]])
    right = tf.reshape(right, [-1, positions, right.shape[-1]])
    return tf.matmul(left, right, transpose_a=True)


def _shifts(spec: Spec, inputs: tf.Tensor, counts: tuple[int, int]) -> tf.Tensor:
    """Patches of padded inputs: `[batch, *counts, kernel size times channels]`."""
    left = _columns(spec, inputs, counts[1])
    return tf.concat(
        [spec.shifted(left, 0, i, counts[0]) for i in range(spec.kernel[0])], -1
    )


def _patches(spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor) -> tf.Tensor:
    """Patches of inputs not yet padded, for the output positions of `deltas`."""
    counts = tuple(deltas.shape[1:3])
    return _shifts(spec, spec.pad(inputs, counts), counts)


def _in_parts(
    product: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    inputs: tf.Tensor,
    deltas: tf.Tensor,
    *,
    floats: int,
    size: int,
) -> tf.Tensor:
    """Computes `[batch, size]` by parts of the batch that expand to `PART` floats."""
    part = max(1, PART // floats)
    batch = inputs.shape[0]
    if (batch is not None and batch <= part) or tf.config.list_logical_devices("GPU"):
        return product(inputs, deltas)
    count = tf.maximum(1, (tf.shape(inputs)[0] + part - 1) // part)
    array = tf.TensorArray(
        tf.float32, size=count, infer_shape=False, element_shape=[None, size]
    )

    def body(i: tf.Tensor, array: tf.TensorArray) -> tuple[tf.Tensor, tf.TensorArray]:
        rows = slice(i * part, (i + 1) * part)
        return i + 1, array.write(i, product(inputs[rows], deltas[rows]))

    # Or the loop would begin in the forward pass with what needs the inputs alone.
    first = (after([deltas], tf.constant(0)), array)
    _, array = tf.while_loop(lambda i, _: i < count, body, first, parallel_iterations=1)
    return tf.ensure_shape(array.concat(), [batch, size])


def _grouped(spec: Spec, patches: tf.Tensor, deltas: tf.Tensor) -> Explicit:
    """Returns the gradients of a kernel with groups, written out."""
    count, groups = deltas.shape[1:3].num_elements(), spec.groups
    taps = spec.kernel[0] * spec.kernel[1]
    patches = tf.reshape(patches, [-1, count, taps, groups, spec.shape[-2]])
    deltas = tf.reshape(deltas, [-1, count, groups, spec.shape[-1] // groups])
    values = tf.einsum("bpkgi,bpgo->bkigo", patches, deltas)
    size = taps * spec.shape[-2] * spec.shape[-1]
    return Explicit(tf.reshape(values, [-1, size]), spec.shape)


def depthwise_gradient(spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor) -> Explicit:
    """Returns the per-example gradients of a depthwise kernel.

    Args:
        spec: the convolution; the kernel's shape ends in channels and multiplier.
        inputs: `[batch, ..., channels]`, channels last.
        deltas: `[batch, ..., channels times multiplier]`.
    """
    inputs, deltas = as_image(to_float32(inputs)), as_image(to_float32(deltas))
    counts = deltas.shape[1:3]
    patches = _patches(spec, inputs, deltas)
    channels, multiplier = spec.shape[-2:]
    deltas = tf.reshape(deltas, [-1, *counts, channels, multiplier])
    parts = [
        tf.reduce_sum(patch[..., None] * deltas, axis=(1, 2))
        for patch in tf.split(patches, spec.kernel[0] * spec.kernel[1], axis=-1)
    ]
    size = len(parts) * channels * multiplier
    return Explicit(tf.reshape(tf.stack(parts, axis=1), [-1, size]), spec.shape)


def _of_unknown_size(
    spec: Spec, inputs: tf.Tensor, deltas: tf.Tensor
) -> PerExampleGradient:
    """Returns the gradients for images whose size is not known beforehand."""
    patches = tf.image.extract_patches(
        inputs,
        sizes=[1, *spec.kernel, 1],
        strides=[1, *spec.strides, 1],
        rates=[1, *spec.dilations, 1],
        padding=spec.padding,
    )
    rows = spec.kernel[0] * spec.kernel[1] * inputs.shape[-1]
    shape = tf.shape(deltas)
    count = shape[1] * shape[2]
    patches = tf.reshape(patches, [shape[0], count, rows])
    deltas = tf.reshape(deltas, [shape[0], count, deltas.shape[-1]])
    return outer(patches, deltas, spec.shape).explicit()


def as_image(tensor: tf.Tensor) -> tf.Tensor:
    """Gives `[batch, columns, channels]` a row axis of one."""
    return tensor[:, None] if tensor.shape.rank == 3 else tensor
