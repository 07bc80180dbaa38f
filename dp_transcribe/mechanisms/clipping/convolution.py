"""Per-example gradients of convolution kernels."""

from __future__ import annotations

import dataclasses

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import (
    Explicit,
    PerExampleGradient,
    outer,
    to_float32,
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A convolution's static facts, as two-dimensional.

    Attributes:
        shape: the kernel variable's shape.
        kernel: rows and columns of the kernel.
        strides: along rows and columns.
        dilations: along rows and columns.
        padding: "VALID", "SAME" or "CAUSAL".
        groups: number of groups of channels.
    """

    shape: tuple[int, ...]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilations: tuple[int, int]
    padding: str
    groups: int = 1

    @classmethod
    def of(cls, layer: keras.layers.Layer) -> Spec:
        """Reads the facts of a Keras convolution of one or two dimensions."""
        return cls(
            shape=tuple(layer.kernel.shape),
            kernel=two(layer.kernel_size),
            strides=two(layer.strides),
            dilations=two(layer.dilation_rate),
            padding=layer.padding.upper(),
            groups=getattr(layer, "groups", 1),
        )


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
    patches = extract_patches(spec, as_image(to_float32(inputs)))
    deltas = as_image(to_float32(deltas))
    count = deltas.shape[1:3].num_elements()
    columns = deltas.shape[-1]
    patches = tf.reshape(patches, [-1, count, patches.shape[-1]])
    deltas = tf.reshape(deltas, [-1, count, columns])
    if spec.groups == 1:
        return outer(patches, deltas, spec.shape)
    return grouped(spec, patches, deltas)


def grouped(spec: Spec, patches: tf.Tensor, deltas: tf.Tensor) -> Explicit:
    """Returns the gradients of a kernel with groups, written out."""
    count, groups = patches.shape[1], spec.groups
    taps = spec.kernel[0] * spec.kernel[1]
    patches = tf.reshape(patches, [-1, count, taps, groups, spec.shape[-2]])
    deltas = tf.reshape(deltas, [-1, count, groups, spec.shape[-1] // groups])
    values = tf.einsum("bpkgi,bpgo->bkigo", patches, deltas)
    size = taps * spec.shape[-2] * spec.shape[-1]
    return Explicit(tf.reshape(values, [-1, size]), spec.shape)


def extract_patches(spec: Spec, images: tf.Tensor) -> tf.Tensor:
    """Returns `[batch, rows, columns, kernel size times channels]`."""
    padding = spec.padding
    if padding == "CAUSAL":
        before = spec.dilations[1] * (spec.kernel[1] - 1)
        images = tf.pad(images, [[0, 0], [0, 0], [before, 0], [0, 0]])
        padding = "VALID"
    return tf.image.extract_patches(
        images,
        sizes=[1, *spec.kernel, 1],
        strides=[1, *spec.strides, 1],
        rates=[1, *spec.dilations, 1],
        padding=padding,
    )


def as_image(tensor: tf.Tensor) -> tf.Tensor:
    """Gives `[batch, columns, channels]` a row axis of one."""
    return tensor[:, None] if tensor.shape.rank == 3 else tensor
