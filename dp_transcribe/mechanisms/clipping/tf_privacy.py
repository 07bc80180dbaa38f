"""TensorFlow Privacy's per-example clipping: the reference for the other paths."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.bound import (
    Bound,
    ClippedSum,
    zero_rows,
)
from dp_transcribe.mechanisms.clipping.per_example import to_float32
from dp_transcribe.mechanisms.clipping.validate import every_layer


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
    """Bounds and sums per-example gradients with `clip_and_aggregate_gradients`.

    Arguments are those of the one-pass path. An example whose inputs or loss are not
    finite counts as zero. Cost grows with the square of the batch.

    Raises:
        ModuleNotFoundError: TensorFlow Privacy is not installed.
        ValueError: the model has a convolution with groups, whose gradient
            TensorFlow vectorises wrongly.

    **Privacy**: each example contributes at most `bound.l2_norm` in L2 norm over all
    variables together. Computed from protected targets: nothing here is noisy yet.
    """
    _refuse_groups(model)
    clip_and_aggregate = _import_clip_and_aggregate()
    losses = to_float32(loss_fn(targets, model(inputs, training=training)))
    keep = _finite_rows((inputs, targets, losses))
    if mask is not None:
        keep = keep & tf.cast(mask, tf.bool)
    inputs, targets = tf.nest.map_structure(
        lambda t: zero_rows(keep, tf.convert_to_tensor(t)), (inputs, targets)
    )
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(variables)
        outputs = model(inputs, training=training)
        kept = tf.where(keep, to_float32(loss_fn(targets, outputs)), 0.0)
    sums = clip_and_aggregate(
        tape,
        kept,
        variables,
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
        normalize=bound.normalize,
        l2_norm_clip=None if bound.l2_norm == float("inf") else bound.l2_norm,
        aggregate_method="sum",
        keep_sparse_threshold=-1,
    )
    norms = tf.where(keep, _norms(tape, kept, variables), float("nan"))
    return ClippedSum([to_float32(s) for s in sums], norms, losses, outputs)


def _import_clip_and_aggregate() -> Callable[..., Any]:
    """Imports TensorFlow Privacy's function, past what its root no longer imports.

    Its root reaches for estimators, which TensorFlow 2.16 removed; the switch is its
    own way of leaving them out.
    """
    sys.skip_tf_privacy_import = True  # type: ignore[attr-defined]
    from tensorflow_privacy.privacy.optimizers import clip_and_aggregate_gradients

    return clip_and_aggregate_gradients.clip_and_aggregate_gradients


def _refuse_groups(model: keras.Model) -> None:
    """Refuses what this path would sum without an error, and wrongly."""
    for layer in every_layer(model):
        if getattr(layer, "kernel_size", None) and getattr(layer, "groups", 1) > 1:
            raise ValueError(
                "Invalid value for argument `clipping`. Expected a path that can take "
                f"groups in convolution '{layer.name}'. Received: "
                'clipping=tf_privacy. Use "ghost" or "vectorized".'
            )


def _finite_rows(tensors: Any) -> tf.Tensor:
    """Returns `[batch]` bool: every floating-point value of the row is finite."""
    rows = [
        tf.reduce_all(tf.math.is_finite(t), axis=list(range(1, t.shape.rank)))
        for t in map(tf.convert_to_tensor, tf.nest.flatten(tensors))
        if t.dtype.is_floating
    ]
    return tf.reduce_all(tf.stack(rows), axis=0)


def _norms(
    tape: tf.GradientTape, losses: tf.Tensor, variables: list[tf.Variable]
) -> tf.Tensor:
    """Returns gradient norms before bounding, `[batch]` float32."""
    jacobians = tape.jacobian(
        losses, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO
    )
    squares = [
        tf.reduce_sum(tf.square(to_float32(j)), axis=list(range(1, j.shape.rank)))
        for j in jacobians
    ]
    return tf.sqrt(tf.add_n(squares))
