"""Rules for layers whose weights enter by an einsum: EinsumDense and attention."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import (
    Explicit,
    PerExampleGradient,
    outer,
    to_float32,
)
from dp_transcribe.mechanisms.clipping.recording import Recording
from dp_transcribe.mechanisms.clipping.rules import Pairs, activated, bias
from dp_transcribe.mechanisms.clipping.validate import every_layer


def einsum_dense(
    layer: keras.layers.EinsumDense, recording: Recording, inputs: tf.Tensor, **_: Any
) -> tf.Tensor:
    """EinsumDense with any equation whose first input axis is the batch."""
    output = keras.ops.einsum(layer.equation, inputs, layer.kernel)
    if layer.bias is not None:
        output = keras.ops.add(output, layer.bias)

    def backward(delta: tf.Tensor) -> Pairs:
        labels = axis_labels(layer.equation, inputs.shape.rank)
        shape = tuple(layer.kernel.shape)
        kernel = einsum_gradient(labels, inputs, delta, shape)
        return [(layer.kernel, kernel), *bias(layer, output, delta)]

    recording.tap([output], backward, [layer.kernel, layer.bias])
    return activated(layer, recording, output)


def axis_labels(equation: str, rank: int) -> tuple[str, str, str]:
    """Returns the labels of inputs, kernel and outputs, ellipsis written out."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    unused = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    dots = "".join(unused[: rank - len(inputs.replace("...", ""))])
    return inputs.replace("...", dots), kernel, outputs.replace("...", dots)


def is_batched(layer: keras.layers.EinsumDense) -> bool:
    """Whether the batch axis comes first and the kernel meets only known axes."""
    left, outputs = layer.equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    first = inputs[0]
    return (
        outputs[0] == first
        and first not in kernel
        and "." not in kernel
        and set(kernel) <= set(inputs) | set(outputs)
        and set(inputs) <= set(kernel) | set(outputs)
        and all(
            len(set(x)) == len(x) for x in (inputs, kernel, outputs) if "." not in x
        )
    )


def einsum_gradient(
    labels: tuple[str, str, str],
    inputs: tf.Tensor,
    delta: tf.Tensor,
    shape: tuple[int, ...],
) -> PerExampleGradient:
    """Returns the per-example gradients of an einsum's kernel.

    Args:
        labels: axis labels of inputs, kernel and outputs.
        inputs: `[batch, ...]`.
        delta: `[batch, ...]`, gradient at the output.
        shape: the kernel's shape.
    """
    given, kernel, made = labels
    inputs, delta = to_float32(inputs), to_float32(delta)
    rows = "".join(c for c in kernel if c not in made)
    columns = "".join(c for c in kernel if c not in given)
    if kernel != rows + columns:
        values = tf.einsum(f"{given},{made}->{given[0]}{kernel}", inputs, delta)
        return Explicit(tf.reshape(values, [-1, math.prod(shape)]), shape)
    between = "".join(c for c in given[1:] if c in made)
    left = _arranged(inputs, given, between, rows, shape[: len(rows)])
    right = _arranged(delta, made, between, columns, shape[len(rows) :])
    return outer(left, right, shape)


def _arranged(
    tensor: tf.Tensor,
    labels: str,
    between: str,
    channels: str,
    sizes: tuple[int, ...],
) -> tf.Tensor:
    """Arranges a tensor as `[batch, positions, channels]`."""
    order = [labels.index(c) for c in labels[0] + between + channels]
    tensor = tf.transpose(tensor, order)
    middle = tensor.shape[1 : 1 + len(between)]
    last = math.prod(sizes)
    if middle.is_fully_defined():
        return tf.reshape(tensor, [-1, middle.num_elements(), last])
    shape = tf.shape(tensor)
    count = tf.reduce_prod(shape[1 : 1 + len(between)])
    return tf.reshape(tensor, [shape[0], count, last])


class Attention:
    """The rule of MultiHeadAttention on `[batch, length, features]`.

    Args:
        layer: a built layer with its default attention axes.
    """

    def __init__(self, layer: keras.layers.MultiHeadAttention) -> None:
        self._softmax = keras.layers.Softmax(dtype=layer.dtype_policy)
        # The layer's own, whose state is saved with the model.
        inner = (x for x in every_layer(layer) if isinstance(x, keras.layers.Dropout))
        self._dropout = next(inner) if layer.dropout else None

    def __call__(
        self,
        layer: keras.layers.MultiHeadAttention,
        recording: Recording,
        query: tf.Tensor,
        value: tf.Tensor,
        key: tf.Tensor | None = None,
        *,
        attention_mask: tf.Tensor | None = None,
        return_attention_scores: bool = False,
        use_causal_mask: bool = False,
        training: bool | None = None,
    ) -> Any:
        """Computes attention with its four projections tapped."""
        key = value if key is None else key
        query = einsum_dense(layer.query_dense, recording, query)
        key = einsum_dense(layer.key_dense, recording, key)
        value = einsum_dense(layer.value_dense, recording, value)
        scores = keras.ops.einsum("btnd,bsnd->bnts", query, key)
        scores = scores / math.sqrt(layer.key_dim)
        mask = _mask(scores, attention_mask, use_causal_mask)
        scores = self._softmax(scores, mask=mask)
        if self._dropout is not None:
            dropped = self._dropout(scores, training=training)
        else:
            dropped = scores
        mixed = keras.ops.einsum("bnts,bsnd->btnd", dropped, value)
        output = einsum_dense(layer.output_dense, recording, mixed)
        return (output, scores) if return_attention_scores else output


def _mask(
    scores: tf.Tensor, attention_mask: tf.Tensor | None, causal: bool
) -> tf.Tensor | None:
    """Joins the given mask with the causal one, to `[.., .., target, source]`."""
    mask = None
    if attention_mask is not None:
        mask = keras.ops.cast(attention_mask, "bool")
        while mask.shape.rank < 4:
            mask = tf.expand_dims(mask, -3)
    if causal:
        shape = tf.shape(scores)[2:]
        ones = tf.linalg.band_part(tf.ones(shape, tf.bool), -1, 0)
        mask = ones[None, None] if mask is None else mask & ones
    return mask


def is_plain_attention(layer: keras.layers.MultiHeadAttention) -> bool:
    """Whether attention is the usual one, over one axis, without extras."""
    config = layer.get_config()
    parts = (layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense)
    return (
        tuple(layer.attention_axes) == (1,)
        and not config.get("use_gate")
        and config.get("sliding_window") is None
        and all(p.equation.index(",") == 3 for p in parts[:3])
        and not any(p.lora_enabled for p in parts)
    )
