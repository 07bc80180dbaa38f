"""Per-example gradients written out by `tf.vectorized_map`: general, and slow."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.bound import Bound, ClippedSum, zero_rows
from dp_transcribe.mechanisms.clipping.per_example import to_float32

logger = logging.getLogger(__name__)

# What is not vectorised over examples. Products of matrices: on CPU, TensorFlow 2.21
# with oneDNN corrupts memory in one over batch axes like `[5, 1]` and `[]`, which is
# what vectorising makes of these. Loops: gradients of recurrent layers cannot be.
_UNSAFE = {"BatchMatMulV2", "Einsum", "While", "StatelessWhile"}

_warned: weakref.WeakSet[keras.Model] = weakref.WeakSet()


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
    Random layers draw for each example by itself, as in a batch. A model that cannot be
    vectorised is computed one example after the other, with one warning.

    **Privacy**: each example contributes at most `bound.l2_norm` in L2 norm over all
    variables together. Computed from protected targets: nothing here is noisy yet.
    """

    def one(example: tuple[Any, Any], seeds: Iterable[Any] = ()) -> tuple[Any, _Draft]:
        batch = tf.nest.map_structure(lambda t: t[None], example)
        with _Draft(seeds) as draft:
            return _gradients(model, *batch, loss_fn=loss_fn, training=training), draft

    gradients, losses, outputs = _map(model, one, (inputs, targets))
    squared = [_row_sums(tf.square(g)) for g in gradients]
    squared_norms = tf.add_n(squared) if squared else tf.zeros_like(losses)
    factors = bound.factors(squared_norms, mask)
    finite = tf.math.is_finite(squared_norms)
    sums = [tf.tensordot(factors, zero_rows(finite, g), 1) for g in gradients]
    return ClippedSum(sums, tf.sqrt(squared_norms), losses, outputs)


class _Draft(keras.StatelessScope):
    """A scope in which nothing is assigned; it tells what would have been.

    Args:
        values: pairs of a variable and what stands in for it.
    """

    def __init__(self, values: Iterable[tuple[keras.Variable, tf.Tensor]]) -> None:
        super().__init__(list(values))
        self.assigned: list[keras.Variable] = []

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        """Keras calls it in the place of an assignment."""
        super().add_update(update)
        if not any(variable is update[0] for variable in self.assigned):
            self.assigned.append(update[0])


def _map(
    model: keras.Model,
    one: Callable[..., tuple[Any, _Draft]],
    batch: tuple[Any, Any],
) -> Any:
    """Maps over the batch; states of the model move once, by what one example does."""
    assigned: list[keras.Variable] = []

    def tried(example: tuple[Any, Any]) -> Any:
        result, draft = one(example)
        assigned.extend(draft.assigned)
        return result

    specs = tf.nest.map_structure(lambda t: tf.TensorSpec(t.shape[1:], t.dtype), batch)
    traced = tf.function(tried, autograph=False).get_concrete_function(specs)
    seeds = [v for v in assigned if v.name == "seed_generator_state"]
    states = [v for v in assigned if v.name != "seed_generator_state"]

    def each(element: tuple[Any, list[tf.Tensor]]) -> tuple[Any, list[tf.Tensor]]:
        example, values = element
        result, draft = one(example, zip(seeds, values, strict=True))
        return result, [draft.get_current_value(v) for v in states]

    made = tf.nest.map_structure(
        lambda t: tf.TensorSpec(t.shape, t.dtype), traced.structured_outputs
    )
    signature = (made, [tf.TensorSpec(v.shape, v.dtype) for v in states])
    count = tf.shape(tf.nest.flatten(batch)[0])[0]
    elements = (batch, [_seeds_of_rows(state, count) for state in seeds])
    kinds = {op.type for op in traced.graph.get_operations()}
    result, moved = _mapped(model, each, elements, signature, kinds & _UNSAFE)
    for state, values in zip(states, moved, strict=True):
        state.assign(values[0])
    return result


def _seeds_of_rows(state: keras.Variable, count: tf.Tensor) -> tf.Tensor:
    """Draws a seed for each row, `[count, 2]`, where Keras has one for the batch."""
    seed = tf.identity(state.value)
    state.assign(seed + tf.constant([0, 1], seed.dtype))
    # As Keras does it: 64 bits are not taken everywhere.
    seed = tf.cast(tf.math.floormod(seed, tf.int32.max - 1), tf.int32)
    rows = tf.random.stateless_uniform([count, 2], seed, None, None, tf.int32)
    return tf.cast(rows, state.dtype)


def _mapped(
    model: keras.Model,
    each: Callable[..., Any],
    elements: Any,
    signature: Any,
    unsafe: set[str],
) -> Any:
    """Maps over the first axis of `elements`, vectorised where that can be done."""
    why = ", ".join(sorted(unsafe))
    if not why:
        try:
            return tf.vectorized_map(each, elements, fallback_to_while_loop=False)
        except (NotImplementedError, TypeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            why = next((x for x in lines if "pfor" in x), type(error).__name__)
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "Model '%s' cannot be vectorised over examples (%s): they are computed one "
            "after the other, which is slower.",
            model.name,
            why,
        )
    return tf.map_fn(each, elements, fn_output_signature=signature)


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
