"""How each kind of layer is computed with its pre-activations tapped.

A rule does what the layer's `call` does, in two steps: the part that is linear in
the weights, whose output is tapped, and the rest. `RULES` is looked up by exact
type, since a subclass may compute something else.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import convolution
from dp_transcribe.mechanisms.clipping.per_example import (
    Explicit,
    PerExampleGradient,
    outer,
    to_float32,
)
from dp_transcribe.mechanisms.clipping.recording import Recording, Rule

Pairs = list[tuple[keras.Variable, PerExampleGradient]]


def dense(
    layer: keras.layers.Dense, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Dense, on the last axis of inputs of any rank."""
    output = keras.ops.matmul(inputs, layer.kernel)
    if layer.use_bias:
        output = keras.ops.add(output, layer.bias)

    def backward(delta: tf.Tensor) -> Pairs:
        kernel = outer(positions(inputs), positions(delta), tuple(layer.kernel.shape))
        return [(layer.kernel, kernel), *bias(layer, delta)]

    recording.tap(output, backward, [layer.kernel, layer.bias])
    return activated(layer, output)


def conv(
    layer: keras.layers.Layer, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Conv1D and Conv2D with stride, padding, dilation and groups."""
    spec = convolution.Spec.of(layer, layer.kernel)
    output = layer.convolution_op(inputs, layer.kernel)
    if layer.use_bias:
        output = keras.ops.add(output, channel_vector(layer, layer.bias))

    def backward(delta: tf.Tensor) -> Pairs:
        delta = channels_last(layer, delta)
        kernel = convolution.gradient(spec, channels_last(layer, inputs), delta)
        return [(layer.kernel, kernel), *bias(layer, delta)]

    recording.tap(output, backward, [layer.kernel, layer.bias])
    return activated(layer, output)


def positions(tensor: tf.Tensor) -> tf.Tensor:
    """Flattens the axes between batch and channels: `[batch, positions, channels]`."""
    channels = tensor.shape[-1]
    middle = tensor.shape[1:-1]
    if middle.is_fully_defined():
        return tf.reshape(tensor, [-1, middle.num_elements(), channels])
    shape = tf.shape(tensor)
    return tf.reshape(tensor, [shape[0], tf.reduce_prod(shape[1:-1]), channels])


def bias(layer: keras.layers.Layer, delta: tf.Tensor) -> Pairs:
    """The bias's gradients from channels-last `delta`, for a layer that has one."""
    if layer.bias is None:
        return []
    axes = list(range(1, delta.shape.rank - 1))
    values = to_float32(delta)
    values = tf.reduce_sum(values, axis=axes) if axes else values
    return [(layer.bias, Explicit(values, tuple(layer.bias.shape)))]


def channel_vector(layer: keras.layers.Layer, vector: Any) -> tf.Tensor:
    """Reshapes a vector over channels so that it broadcasts over the outputs."""
    if layer.data_format == "channels_last":
        return vector
    return keras.ops.reshape(vector, (1, -1) + (1,) * layer.rank)


def channels_last(layer: keras.layers.Layer, tensor: tf.Tensor) -> tf.Tensor:
    """Moves the channels of a channels-first layer to the end."""
    if layer.data_format == "channels_last":
        return tensor
    return tf.transpose(tensor, [0, *range(2, tensor.shape.rank), 1])


def activated(layer: keras.layers.Layer, output: tf.Tensor) -> tf.Tensor:
    """Applies the layer's activation."""
    return output if layer.activation is None else layer.activation(output)


RULES: dict[type, Rule] = {
    keras.layers.Dense: dense,
    keras.layers.Conv1D: conv,
    keras.layers.Conv2D: conv,
}
