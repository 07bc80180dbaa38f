"""Rules for layers that normalise each example and then scale and shift it.

Scale and offset are copied for each example, and the copies are tapped: their
gradients are the per-example gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import Explicit, to_float32
from dp_transcribe.mechanisms.clipping.recording import Recording
from dp_transcribe.mechanisms.clipping.rules import Pairs


def group_normalization(
    layer: keras.layers.GroupNormalization,
    recording: Recording,
    inputs: tf.Tensor,
    **_: Any,
) -> tf.Tensor:
    """GroupNormalization, with a backward pass that reuses its own sums."""
    last = inputs.shape.rank - 1
    order = [axis for axis in range(last + 1) if axis != layer.axis % (last + 1)]
    order.append(layer.axis % (last + 1))
    moved = tf.transpose(inputs, order) if order[-1] != last else inputs
    channels = moved.shape[-1]
    values = tf.reshape(to_float32(moved), [tf.shape(moved)[0], -1, channels])
    shape = (channels,)
    scale = _copies(layer.gamma, 1.0, values, shape)
    offset = _copies(layer.beta, 0.0, values, shape)
    _tap(recording, [(layer.gamma, scale), (layer.beta, offset)])
    output = _normalized_in_groups(layer.groups, layer.epsilon, values, scale, offset)
    output = tf.reshape(output, tf.shape(moved))
    if order[-1] != last:
        output = tf.transpose(output, [order.index(axis) for axis in range(last + 1)])
    return tf.cast(tf.ensure_shape(output, inputs.shape), layer.compute_dtype)


def _normalized_in_groups(
    groups: int, epsilon: float, values: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor
) -> tf.Tensor:
    """Normalises groups of channels, then scales and shifts, in float32.

    Written with its own gradient: the two sums that the gradients of scale and offset
    are made of also give the gradient of the inputs.

    Args:
        groups: number of groups.
        epsilon: added to the variance.
        values: `[batch, positions, channels]`.
        scale: `[batch, channels]`.
        offset: `[batch, channels]`.
    """
    channels = values.shape[-1]
    count = to_float32(tf.shape(values)[1] * (channels // groups))

    def mean_in_groups(sums: tf.Tensor) -> tf.Tensor:
        sums = tf.reshape(sums, [-1, groups, channels // groups])
        mean = tf.reduce_sum(sums, axis=2, keepdims=True) / count
        return tf.reshape(tf.broadcast_to(mean, tf.shape(sums)), [-1, channels])

    @tf.custom_gradient
    def normalized(values: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> Any:
        mean = mean_in_groups(tf.reduce_sum(values, axis=1))
        centred = values - mean[:, None]
        variance = mean_in_groups(tf.reduce_sum(tf.square(centred), axis=1))
        inverse = tf.math.rsqrt(variance + epsilon)

        def gradient(delta: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
            to_offset = tf.reduce_sum(delta, axis=1)
            to_scale = tf.reduce_sum(delta * centred, axis=1) * inverse
            along = mean_in_groups(scale * to_scale) * tf.square(inverse)
            level = mean_in_groups(scale * to_offset) * inverse
            to_values = delta * (scale * inverse)[:, None] - (
                centred * along[:, None] + level[:, None]
            )
            return to_values, to_scale, to_offset

        return centred * (scale * inverse)[:, None] + offset[:, None], gradient

    return normalized(values, scale, offset)


class Affine:
    """The rule of a layer that normalises, then scales and shifts some axes.

    Args:
        normalize: the layer without its weights, in float32.
    """

    def __init__(self, normalize: Callable[[tf.Tensor], tf.Tensor]) -> None:
        self._normalize = normalize

    def __call__(
        self,
        layer: keras.layers.Layer,
        recording: Recording,
        inputs: tf.Tensor,
        **_: Any,
    ) -> tf.Tensor:
        """Normalises, then scales and shifts by copies of the weights."""
        if isinstance(layer, keras.layers.RMSNormalization):
            scale, offset = layer.scale, None
        else:
            scale, offset = layer.gamma, layer.beta
        given = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        rank = inputs.shape.rank
        axes = {axis % rank for axis in given}
        shape = tuple(inputs.shape[i] if i in axes else 1 for i in range(1, rank))
        output = self._normalize(to_float32(inputs))
        copies = []
        if scale is not None:
            copies.append((scale, _copies(scale, 1.0, inputs, shape)))
        if offset is not None:
            copies.append((offset, _copies(offset, 0.0, inputs, shape)))
        _tap(recording, copies)
        for variable, copy in copies:
            output = output * copy if variable is scale else output + copy
        return tf.cast(output, layer.compute_dtype)


def layer_normalization(layer: keras.layers.LayerNormalization) -> Affine:
    """Makes the rule of LayerNormalization."""
    config = layer.get_config()
    config.update(scale=False, center=False, dtype="float32")
    return Affine(keras.layers.LayerNormalization.from_config(config))


def rms_normalization(layer: keras.layers.RMSNormalization) -> Affine:
    """Makes the rule of RMSNormalization."""
    return Affine(
        lambda x: keras.ops.rms_normalization(
            x, scale=None, axis=layer.axis, epsilon=layer.epsilon
        )
    )


def _copies(
    variable: keras.Variable | None,
    default: float,
    inputs: tf.Tensor,
    shape: tuple[int, ...],
) -> tf.Tensor:
    """Copies a variable for each example, `[batch, *shape]` float32."""
    value = tf.fill(shape, default)
    if variable is not None:
        value = tf.reshape(to_float32(tf.convert_to_tensor(variable)), shape)
    return tf.broadcast_to(value, [tf.shape(inputs)[0], *shape])


def _tap(
    recording: Recording,
    copies: list[tuple[keras.Variable | None, tf.Tensor]],
) -> None:
    """Taps the copies of variables; those of None are constants."""
    kept = [(variable, copy) for variable, copy in copies if variable is not None]

    def backward(*deltas: tf.Tensor) -> Pairs:
        return [
            (variable, Explicit(_flat(delta), tuple(variable.shape)))
            for (variable, _), delta in zip(kept, deltas, strict=True)
        ]

    recording.tap([c for _, c in kept], backward, [v for v, _ in kept])


def _flat(tensor: tf.Tensor) -> tf.Tensor:
    """Flattens `[batch, ...]` to `[batch, n]`."""
    return tf.reshape(tensor, [-1, tensor.shape[1:].num_elements()])
