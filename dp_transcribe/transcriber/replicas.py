"""What a step does on one replica of several."""

from __future__ import annotations

from typing import Any

import tensorflow as tf


def dense(gradients: list[Any], variables: list[Any]) -> list[tf.Tensor]:
    """Gradients as tensors: an embedding's come as slices, and none is zero."""
    return [
        tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(gradients, variables, strict=True)
    ]


def replica_index() -> tf.Tensor:
    """Index of the current replica, a scalar int64."""
    context = tf.distribute.get_replica_context()
    return tf.cast(context.replica_id_in_sync_group, tf.int64)


def all_reduce_sum(tensors: list[tf.Tensor]) -> list[tf.Tensor]:
    """Sums over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return tensors
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, tensors))


def as_int32(seed: tf.Tensor) -> tf.Tensor:
    """A seed int64 `[2]` as int32 `[2]`, for generators."""
    return tf.random.stateless_uniform([2], seed, None, None, tf.int32)
