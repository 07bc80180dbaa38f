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
    """Sums `part` over consecutive slices of the batch, one at a time."""
    count = tf.shape(tf.nest.flatten(batch)[0])[0]
    size = (count + microbatches - 1) // microbatches

    def slice_at(start: tf.Tensor) -> ClippedSum:
        rows = tf.nest.map_structure(
            lambda t: t if t is None else t[start : start + size], batch
        )
        return part(*rows)

    def body(start: tf.Tensor, total: ClippedSum) -> tuple[tf.Tensor, ClippedSum]:
        new = slice_at(start)
        gradients = [a + b for a, b in zip(total.gradients, new.gradients, strict=True)]
        rows = tf.nest.map_structure(
            lambda a, b: tf.concat([a, b], 0), tuple(total[1:]), tuple(new[1:])
        )
        # Or the next slice would begin while this one is still held.
        return after(gradients, start + size), ClippedSum(gradients, *rows)

    first = slice_at(tf.constant(0))
    invariants = tf.nest.map_structure(
        lambda t: tf.TensorShape([None]).concatenate(t.shape[1:]), tuple(first[1:])
    )
    shapes = ClippedSum([g.shape for g in first.gradients], *invariants)
    return tf.while_loop(
        lambda start, _: start < count,
        body,
        (after(first.gradients, size), first),
        shape_invariants=(tf.TensorShape([]), shapes),
        parallel_iterations=1,
    )[1]
