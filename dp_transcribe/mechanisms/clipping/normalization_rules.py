"""Rules for layers that normalise each example and then scale and shift it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import Explicit, to_float32
from dp_transcribe.mechanisms.clipping.recording import Recording
from dp_transcribe.mechanisms.clipping.rules import Pairs


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
        """Normalises, then scales and shifts with the result tapped."""
        scale = getattr(layer, "scale" if is_rms(layer) else "gamma", None)
        offset = None if is_rms(layer) else layer.beta
        axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
        axes = sorted(axis % inputs.shape.rank for axis in axes)
        normalized = output = self._normalize(to_float32(inputs))
        if scale is not None:
            output = output * _along(scale, axes, inputs.shape)
        if offset is not None:
            output = output + _along(offset, axes, inputs.shape)

        def backward(delta: tf.Tensor) -> Pairs:
            pairs = [(scale, normalized * delta), (offset, delta)]
            return [(v, _summed(t, axes, v)) for v, t in pairs if v is not None]

        recording.tap(output, backward, [scale, offset])
        return tf.cast(output, layer.compute_dtype)


def group_normalization(layer: keras.layers.GroupNormalization) -> Affine:
    """Makes the rule of GroupNormalization."""
    return Affine(_without_weights(layer))


def layer_normalization(layer: keras.layers.LayerNormalization) -> Affine:
    """Makes the rule of LayerNormalization."""
    return Affine(_without_weights(layer))


def rms_normalization(layer: keras.layers.RMSNormalization) -> Affine:
    """Makes the rule of RMSNormalization."""
    return Affine(
        lambda x: keras.ops.rms_normalization(
            x, scale=None, axis=layer.axis, epsilon=layer.epsilon
        )
    )


def is_rms(layer: keras.layers.Layer) -> bool:
    """Whether a layer is RMSNormalization, whose weight has a name of its own."""
    return isinstance(layer, keras.layers.RMSNormalization)


def _without_weights(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Returns a float32 copy of a normalisation layer, without scale and offset."""
    config = layer.get_config()
    config.update(scale=False, center=False, dtype="float32")
    return type(layer).from_config(config)


def _along(
    variable: keras.Variable, axes: list[int], shape: tf.TensorShape
) -> tf.Tensor:
    """Reshapes a variable so that it broadcasts along `axes` of `shape`."""
    sizes = [shape[i] if i in axes else 1 for i in range(shape.rank)]
    return tf.reshape(to_float32(tf.convert_to_tensor(variable)), sizes)


def _summed(values: tf.Tensor, axes: list[int], variable: keras.Variable) -> Explicit:
    """Sums `[batch, ...]` over all axes but the batch and `axes`."""
    others = [i for i in range(1, values.shape.rank) if i not in axes]
    values = tf.reduce_sum(values, axis=others) if others else values
    shape = tuple(variable.shape)
    size = values.shape[1:].num_elements()
    return Explicit(tf.reshape(values, [-1, size]), shape)
