"""How each kind of layer is computed with its pre-activations tapped.

A rule does what the layer's `call` does, in two steps: the part that is linear in
the weights, whose output is tapped, and the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import convolution
from dp_transcribe.mechanisms.clipping.per_example import (
    Explicit,
    PerExampleGradient,
    Rows,
    outer,
    to_float32,
)
from dp_transcribe.mechanisms.clipping.recording import Recording
from dp_transcribe.mechanisms.clipping.validate import UnsupportedStudentError

Pairs = list[tuple[keras.Variable, PerExampleGradient]]


def dense(
    layer: keras.layers.Dense, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Dense, on the last axis of inputs of any rank."""
    output = keras.ops.matmul(inputs, layer.kernel)
    if layer.bias is not None:
        output = keras.ops.add(output, layer.bias)

    def backward(delta: tf.Tensor) -> Pairs:
        kernel = outer(positions(inputs), positions(delta), tuple(layer.kernel.shape))
        return [(layer.kernel, kernel), *bias(layer, output, delta)]

    recording.tap([output], backward, [layer.kernel, layer.bias])
    return activated(layer, recording, output)


def conv(
    layer: keras.layers.Layer, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Conv1D and Conv2D with stride, padding, dilation and groups."""
    given = inputs
    inputs, padding = causally_padded(layer, given)
    spec = convolution.Spec.of(layer, layer.kernel, padding)
    output = keras.ops.conv(
        inputs,
        layer.kernel,
        strides=list(layer.strides),
        padding=padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )
    output = with_bias(layer, given, output)

    def backward(delta: tf.Tensor) -> Pairs:
        last = channels_last(layer, delta)
        kernel = convolution.gradient(spec, channels_last(layer, inputs), last)
        return [(layer.kernel, kernel), *bias(layer, output, delta)]

    recording.tap([output], backward, [layer.kernel, layer.bias])
    return activated(layer, recording, output)


def conv_transpose(
    layer: keras.layers.Layer, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Conv1DTranspose and Conv2DTranspose: a convolution with its ends swapped."""
    spec = convolution.Spec.of(layer, layer.kernel, layer.padding)
    output = keras.ops.conv_transpose(
        inputs,
        layer.kernel,
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )
    output = with_bias(layer, inputs, output)

    def backward(delta: tf.Tensor) -> Pairs:
        last = channels_last(layer, delta)
        kernel = convolution.gradient(spec, last, channels_last(layer, inputs))
        return [(layer.kernel, kernel), *bias(layer, output, delta)]

    recording.tap([output], backward, [layer.kernel, layer.bias])
    return activated(layer, recording, output)


def depthwise_conv(
    layer: keras.layers.Layer, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """DepthwiseConv1D and DepthwiseConv2D."""
    output = with_bias(layer, inputs, _depthwise(layer, inputs, layer.kernel))

    def backward(delta: tf.Tensor) -> Pairs:
        return [
            _depthwise_pair(layer, layer.kernel, inputs, delta),
            *bias(layer, output, delta),
        ]

    recording.tap([output], backward, [layer.kernel, layer.bias])
    return activated(layer, recording, output)


def separable_conv(
    layer: keras.layers.Layer, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """SeparableConv1D and SeparableConv2D: a depthwise, then a pointwise part."""
    middle = _depthwise(layer, inputs, layer.depthwise_kernel)
    recording.tap(
        [middle],
        lambda delta: [_depthwise_pair(layer, layer.depthwise_kernel, inputs, delta)],
        [layer.depthwise_kernel],
    )
    output = keras.ops.conv(
        middle, layer.pointwise_kernel, data_format=layer.data_format
    )
    output = with_bias(layer, inputs, output)

    def backward(delta: tf.Tensor) -> Pairs:
        last, point = channels_last(layer, delta), channels_last(layer, middle)
        shape = tuple(layer.pointwise_kernel.shape)
        kernel = outer(positions(point), positions(last), shape)
        return [(layer.pointwise_kernel, kernel), *bias(layer, output, delta)]

    recording.tap([output], backward, [layer.pointwise_kernel, layer.bias])
    return activated(layer, recording, output)


def embedding(
    layer: keras.layers.Embedding, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """Embedding: only the rows that an example looks up have a gradient."""
    output = layer(inputs)
    shape = tuple(layer.embeddings.shape)

    def backward(delta: tf.Tensor) -> Pairs:
        rows = tf.cast(inputs, tf.int32)
        rows = tf.where(rows < 0, rows + shape[0], rows)
        rows = tf.reshape(rows, [tf.shape(rows)[0], -1])
        deltas = tf.reshape(to_float32(delta), [*tf.unstack(tf.shape(rows)), shape[1]])
        return [(layer.embeddings, Rows(rows, deltas, shape))]

    recording.tap([output], backward, [layer.embeddings])
    return output


def prelu(
    layer: keras.layers.PReLU, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """PReLU: a weight for the negative part."""
    negative = keras.ops.relu(-inputs)
    output = keras.ops.relu(inputs) - layer.alpha * negative
    shape = tuple(layer.alpha.shape)
    recording.tap(
        [output],
        lambda delta: [(layer.alpha, summed(-to_float32(negative * delta), shape))],
        [layer.alpha],
    )
    return output


def positions(tensor: tf.Tensor) -> tf.Tensor:
    """Flattens the axes between batch and channels: `[batch, positions, channels]`."""
    channels = tensor.shape[-1]
    middle = tensor.shape[1:-1]
    if middle.is_fully_defined():
        return tf.reshape(tensor, [-1, middle.num_elements(), channels])
    shape = tf.shape(tensor)
    return tf.reshape(tensor, [shape[0], tf.reduce_prod(shape[1:-1]), channels])


def summed(values: tf.Tensor, shape: tuple[int, ...]) -> Explicit:
    """Sums `[batch, ...]` to a variable that was broadcast from the last axes."""
    first = values.shape.rank - len(shape)
    kept = {first + i for i, size in enumerate(shape) if size != 1}
    axes = [axis for axis in range(1, values.shape.rank) if axis not in kept]
    values = tf.reduce_sum(to_float32(values), axis=axes) if axes else values
    size = 1
    for length in shape:
        size *= length
    return Explicit(tf.reshape(to_float32(values), [-1, size]), shape)


def bias(layer: keras.layers.Layer, output: tf.Tensor, delta: tf.Tensor) -> Pairs:
    """The bias's gradients from `delta` at the output, for a layer that has one."""
    if layer.bias is None:
        return []
    shape = tuple(layer.bias.shape)
    channels_first = getattr(layer, "data_format", None) == "channels_first"
    spread = (*shape, *(1,) * layer.rank) if channels_first else shape
    gradient = summed(delta, added_along(spread, output.shape))
    return [(layer.bias, dataclasses.replace(gradient, shape=shape))]


def added_along(shape: tuple[int, ...], output: tf.TensorShape) -> tuple[int, ...]:
    """The shape that `keras.ops.add` gives a bias when it adds it to `output`.

    Not always its own: Keras takes one that is long along a single axis for a bias of
    the channels, and finds the axis of the channels by its size alone.

    Args:
        shape: the bias's, broadcast from the last axes.
        output: `[batch, ...]`.
    """
    own = [axis - len(shape) for axis, size in enumerate(shape) if size != 1]
    if len(own) != 1 or own == [-1]:
        return shape
    size, kept = shape[own[0]], (1 - output.rank, own[0], -1)
    sizes = [1] * (output.rank - 1)
    for axis in kept:
        sizes[axis] = size + 1 if output[axis] is None else output[axis]
    # Tried out, on other numbers at each place of the bias.
    with tf.init_scope():
        values = tf.reshape(tf.range(float(size)), shape)
        added = keras.ops.convert_to_numpy(
            keras.ops.add(tf.zeros([1, *sizes]), values)
        )[0]
    return tuple(
        length if length > 1 and np.ptp(added, axis=axis).any() else 1
        for axis, length in enumerate(sizes)
    )


def causally_padded(
    layer: keras.layers.Layer, inputs: tf.Tensor
) -> tuple[tf.Tensor, str]:
    """Returns a convolution's inputs and padding, "causal" done beforehand."""
    if layer.padding != "causal":
        return inputs, layer.padding
    paddings = [[0, 0]] * inputs.shape.rank
    axis = 1 if layer.data_format == "channels_last" else 2
    paddings[axis] = [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]
    return tf.pad(inputs, paddings), "valid"


def with_bias(
    layer: keras.layers.Layer, inputs: tf.Tensor, output: tf.Tensor
) -> tf.Tensor:
    """Adds a convolution's bias, for a layer that has one.

    Raises:
        UnsupportedStudentError: Keras may add it along another axis.
    """
    if layer.bias is None:
        return output
    if layer.data_format == "channels_last":
        return keras.ops.add(output, layer.bias)
    channels, side = layer.bias.shape[0], layer.compute_output_shape(inputs.shape)[-1]
    if channels == side > 1:
        # Keras finds the channels by their number, if the shape is known by then: the
        # same layer does one thing in a graph and another outside of it.
        raise UnsupportedStudentError(
            "Invalid value for argument `model`. Expected channels-first convolutions "
            "with another number of channels than the last side of their outputs, or "
            f"without bias. Received: layer '{layer.name}' with {channels} of both. "
            "Keras does not always add such a bias along the channels: use "
            '`data_format="channels_last"` or `use_bias=False`.'
        )
    shape = (1, -1) + (1,) * layer.rank
    return keras.ops.add(output, keras.ops.reshape(layer.bias, shape))


def channels_last(layer: keras.layers.Layer, tensor: tf.Tensor) -> tf.Tensor:
    """Moves the channels of a channels-first layer to the end."""
    if layer.data_format == "channels_last":
        return tensor
    return tf.transpose(tensor, [0, *range(2, tensor.shape.rank), 1])


def activated(
    layer: keras.layers.Layer, recording: Recording, output: tf.Tensor
) -> tf.Tensor:
    """Applies the layer's activation."""
    if layer.activation is None:
        return output
    with recording.within_a_rule():
        return layer.activation(output)


def _depthwise(layer: keras.layers.Layer, inputs: tf.Tensor, kernel: Any) -> tf.Tensor:
    """The depthwise part of a layer."""
    return keras.ops.depthwise_conv(
        inputs,
        kernel,
        strides=layer.strides,
        padding=layer.padding,
        data_format=layer.data_format,
        dilation_rate=layer.dilation_rate,
    )


def _depthwise_pair(
    layer: keras.layers.Layer,
    kernel: keras.Variable,
    inputs: tf.Tensor,
    delta: tf.Tensor,
) -> tuple[keras.Variable, PerExampleGradient]:
    """A depthwise kernel with its gradients."""
    spec = convolution.Spec.of(layer, kernel, layer.padding)
    inputs, delta = channels_last(layer, inputs), channels_last(layer, delta)
    return kernel, convolution.depthwise_gradient(spec, inputs, delta)
