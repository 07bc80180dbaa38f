"""The sum of bounded per-example gradients, by any path and in micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe import _validate
from dp_transcribe.mechanisms.clipping import ghost, tf_privacy, vectorized
from dp_transcribe.mechanisms.clipping.bound import Bound, ClippedSum
from dp_transcribe.mechanisms.clipping.per_example import after
from dp_transcribe.mechanisms.clipping.validate import check_student

PATHS: dict[str, Callable[..., ClippedSum]] = {
    "ghost": ghost.clipped_gradient_sum,
    "vectorized": vectorized.clipped_gradient_sum,
    "tf_privacy": tf_privacy.clipped_gradient_sum,
}


@tf.autograph.experimental.do_not_convert
def clipped_gradient_sum(
    model: keras.Model,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], tf.Tensor],
    *,
    l2_norm: float,
    normalize: bool = False,
    mask: tf.Tensor | None = None,
    clipping: str = "ghost",
    microbatches: int = 1,
    training: bool = True,
) -> ClippedSum:
    """Bounds each example's weight gradient and sums over the batch.

    Meant to be called inside a `tf.function`; the batch size may be dynamic, and an
    empty batch gives zeros.

    Args:
        model: a built student.
        inputs: `[batch, ...]`, or a nest of such tensors.
        targets: what `loss_fn` takes, a nest of `[batch, ...]` tensors.
        loss_fn: `loss_fn(targets, outputs)` returns per-example losses `[batch]`,
            not reduced; the loss of one example must not depend on another.
        l2_norm: the clip norm C of one example's gradient over all variables;
            `float("inf")` leaves gradients as they are.
        normalize: scale every gradient to C instead of clipping it down to C.
        mask: `[batch]`, 1 for an example that counts and 0 for padding.
        clipping: "ghost" (one pass, the default), "vectorized" or "tf_privacy".
        microbatches: number of parts that are computed one after the other. Less
            memory, the same result.
        training: passed to the model.

    Returns:
        A `ClippedSum`; gradients are sums, in float32.

    Raises:
        UnsupportedStudentError: the student mixes examples, adds losses of its own
            or computes in float16.
        ValueError: an argument is out of range.

    **Privacy**: the L2 sensitivity of `gradients` is `l2_norm` when one example is
    zeroed out and twice that when it is replaced, up to float32 rounding. An example
    whose gradient is not finite counts as zero. `norms`, `losses` and `outputs` are
    not bounded and not noisy.
    """
    check_student(model)
    bound = Bound(l2_norm=l2_norm, normalize=normalize)
    path = PATHS[_validate.one_of("clipping", clipping, PATHS)]
    _validate.positive_int("microbatches", microbatches)

    def part(inputs: Any, targets: Any, mask: tf.Tensor | None) -> ClippedSum:
        return path(
            model, inputs, targets, loss_fn, bound=bound, mask=mask, training=training
        )

    batch = tf.nest.map_structure(tf.convert_to_tensor, (inputs, targets))
    mask = None if mask is None else tf.cast(mask, tf.float32)
    count = tf.nest.flatten(batch)[0].shape[0]
    if count:
        return _sum(part, (*batch, mask), microbatches)
    count, batch, mask = _without_empty(batch, mask)
    total = _sum(part, (*batch, mask), microbatches)
    rows = tf.nest.map_structure(lambda t: t[:count], tuple(total[1:]))
    return ClippedSum(total.gradients, *rows)


def _without_empty(
    batch: tuple[Any, Any], mask: tf.Tensor | None
) -> tuple[tf.Tensor, tuple[Any, Any], tf.Tensor]:
    """Gives an empty batch one masked row: not every kernel takes a batch of none."""
    count = tf.shape(tf.nest.flatten(batch)[0])[0]

    def one_row(tensor: tf.Tensor) -> tf.Tensor:
        shape = tf.concat([[1], tf.shape(tensor)[1:]], 0)
        rows = tf.cond(count > 0, lambda: tensor, lambda: tf.zeros(shape, tensor.dtype))
        return tf.ensure_shape(rows, [None, *tensor.shape[1:]])

    mask = tf.ones([count]) if mask is None else mask
    return count, *tf.nest.map_structure(one_row, (batch, mask))


def _sum(
    part: Callable[..., ClippedSum], batch: tuple[Any, Any, Any], microbatches: int
) -> ClippedSum:
    """Sums `part` over the batch, at once or in micro-batches."""
    if microbatches == 1:
        return part(*batch)
    return _accumulate(part, batch, microbatches)


def _accumulate(
    part: Callable[..., ClippedSum], batch: tuple[Any, Any, Any], microbatches: int
) -> ClippedSum:
    """Sums `part` over equal parts of the batch, one at a time.

    What is missing from the last part are masked rows, and every size is known where
    the batch's is: XLA compiles it.
    """
    inputs, targets, mask = batch
    count = tf.shape(tf.nest.flatten(inputs)[0])[0]
    size = (count + microbatches - 1) // microbatches
    mask = tf.ones([count]) if mask is None else mask

    def in_parts(tensor: tf.Tensor) -> tf.Tensor:
        missing = microbatches * size - count
        tensor = tf.pad(tensor, [[0, missing]] + [[0, 0]] * (tensor.shape.rank - 1))
        return tf.reshape(tensor, [microbatches, size, *tensor.shape[1:]])

    parts = tf.nest.map_structure(in_parts, (inputs, targets, mask))

    def part_at(number: tf.Tensor) -> ClippedSum:
        return part(*tf.nest.map_structure(lambda t: tf.gather(t, number), parts))

    def body(
        number: tf.Tensor, gradients: list[tf.Tensor], arrays: list[tf.TensorArray]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.TensorArray]]:
        new = part_at(number)
        gradients = [a + b for a, b in zip(gradients, new.gradients, strict=True)]
        rows = tf.nest.flatten(tuple(new[1:]))
        arrays = [a.write(number, r) for a, r in zip(arrays, rows, strict=True)]
        # Or the next part would begin while this one is still held.
        return after(gradients, number + 1), gradients, arrays

    first = part_at(tf.constant(0))
    arrays = [
        tf.TensorArray(r.dtype, microbatches, element_shape=r.shape).write(0, r)
        for r in tf.nest.flatten(tuple(first[1:]))
    ]
    _, gradients, arrays = tf.while_loop(
        lambda number, *_: number < microbatches,
        body,
        (after(first.gradients, tf.constant(1)), first.gradients, arrays),
        parallel_iterations=1,
    )
    rows = [_joined(array.stack(), count) for array in arrays]
    return ClippedSum(gradients, *tf.nest.pack_sequence_as(tuple(first[1:]), rows))


def _joined(parts: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Rows `[parts, size, ...]` as `[count, ...]`, without those that were added."""
    return tf.reshape(parts, [-1, *parts.shape[2:]])[:count]
