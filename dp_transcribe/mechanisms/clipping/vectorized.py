"""Per-example gradients written out by `tf.vectorized_map`: general, and slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.bound import Bound, ClippedSum, zero_rows
from dp_transcribe.mechanisms.clipping.per_example import to_float32

# On CPU, TensorFlow 2.21 with oneDNN corrupts memory in a product of matrices over
# batch axes like `[5, 1]` and `[]`, which is what vectorising over examples makes of
# these. A model that has one is mapped in a loop.
UNSAFE = {"BatchMatMulV2", "Einsum"}


def clipped_gradient_sum(
    model: keras.Model,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], tf.Tensor],
    *,
    bound: Bound,
    mask: tf.Tensor | None,
    training: bool,
) -> ClippedSum:
    """Bounds and sums per-example gradients, each computed on a batch of one.

    Arguments are those of the one-pass path. Memory grows with batch times weights.

    **Privacy**: each example contributes at most `bound.l2_norm` in L2 norm over all
    variables together. Computed from protected targets: nothing here is noisy yet.
    """

    def one(example: tuple[Any, Any]) -> tuple[list[tf.Tensor], tf.Tensor, Any]:
        batch = tf.nest.map_structure(lambda t: t[None], example)
        return _gradients(model, *batch, loss_fn=loss_fn, training=training)

    gradients, losses, outputs = _map(one, (inputs, targets))
    squared = [_row_sums(tf.square(g)) for g in gradients]
    squared_norms = tf.add_n(squared) if squared else tf.zeros_like(losses)
    factors = bound.factors(squared_norms, mask)
    finite = tf.math.is_finite(squared_norms)
    sums = [tf.tensordot(factors, zero_rows(finite, g), 1) for g in gradients]
    return ClippedSum(sums, tf.sqrt(squared_norms), losses, outputs)


def _map(one: Callable[..., Any], batch: tuple[Any, Any]) -> Any:
    """Maps over the batch, vectorised unless that would be unsafe."""
    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), batch)
    traced = tf.function(one, autograph=False).get_concrete_function(specs)
    if all(op.type not in UNSAFE for op in traced.graph.get_operations()):
        return tf.vectorized_map(one, batch)
    made = tf.nest.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs
    )
    return tf.map_fn(one, batch, fn_output_signature=made)


def _gradients(
    model: keras.Model,
    inputs: Any,
    targets: Any,
    *,
    loss_fn: Callable[[Any, Any], tf.Tensor],
    training: bool,
) -> tuple[list[tf.Tensor], tf.Tensor, Any]:
    """Returns gradients, loss and outputs of a batch of one, without its axis."""
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        outputs = model(inputs, training=training)
        loss = to_float32(loss_fn(targets, outputs))[0]
    gradients = tape.gradient(
        loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    gradients = [to_float32(tf.convert_to_tensor(g)) for g in gradients]
    return gradients, loss, tf.nest.map_structure(lambda t: t[0], outputs)


def _row_sums(tensor: tf.Tensor) -> tf.Tensor:
    """Sums each row of `[batch, ...]`: `[batch]`."""
    return tf.reduce_sum(tensor, axis=list(range(1, tensor.shape.rank)))
