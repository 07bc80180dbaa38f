"""One-pass ghost clipping: one forward pass, one backward pass, exact sums.

The forward pass keeps every trainable layer's input and pre-activation, the backward
pass stops at the pre-activations. Per-example norms follow from those two, and so
does the weighted sum of per-example weight gradients: there is no second backward
pass, and dropout or any other randomness is the same for norms and sums.

References:
    Li et al. 2021, arXiv:2110.05679; Bu et al. 2022, arXiv:2210.00038.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import per_example, plan, vectorized
from dp_transcribe.mechanisms.clipping.bound import Bound, ClippedSum, zero_rows
from dp_transcribe.mechanisms.clipping.per_example import PerExampleGradient
from dp_transcribe.mechanisms.clipping.recording import Recording

logger = logging.getLogger(__name__)

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
    """Bounds and sums per-example gradients in one pass.

    Falls back to the vectorized path, with one warning for each model, where a
    layer or an argument of it has no rule, and where weights are read outside of
    their layer, such as by a `Lambda` that ties them or by the loss.

    Args:
        model: a Functional or Sequential model.
        inputs: `[batch, ...]`, or a nest of such tensors.
        targets: what `loss_fn` takes, a nest of `[batch, ...]` tensors.
        loss_fn: `loss_fn(targets, outputs)` returns per-example losses `[batch]`.
        bound: the clip norm and how it is applied.
        mask: `[batch]`, 1 for an example that counts and 0 for padding, or None.
        training: passed to the model.

    **Privacy**: each example contributes at most `bound.l2_norm` in L2 norm over all
    variables together. Computed from protected targets: nothing here is noisy yet.
    """

    def fall_back(why: str) -> ClippedSum:
        _warn_once(model, why)
        return vectorized.clipped_gradient_sum(
            model,
            inputs,
            targets,
            loss_fn,
            bound=bound,
            mask=mask,
            training=training,
        )

    unknown = plan.unsupported_layer(model)
    if unknown is not None:
        kind = type(unknown).__name__
        return fall_back(f"has no rule for layer '{unknown.name}' ({kind})")
    copy = plan.recording_copy(model)
    with Recording(model.trainable_variables) as recording:
        outputs = copy(inputs, training=training)
        losses = per_example.to_float32(loss_fn(targets, outputs))
    if recording.unknown is not None:
        return fall_back(f"has no rule for {recording.unknown}")
    read = recording.read_outside()
    if read is not None:
        return fall_back(
            f"follows weights through their own layer alone; '{read.path}' is also "
            "read elsewhere, by another layer, an activation or the loss"
        )
    gradients = _by_variable(model, recording.gradients(losses))
    squared_norms = _squared_norms(gradients, losses)
    factors = bound.factors(squared_norms, mask)
    gradients = _without_dropped(gradients, tf.math.is_finite(squared_norms))
    sums = _weighted_sums(model, gradients, factors)
    return ClippedSum(sums, tf.sqrt(squared_norms), losses, outputs)


def _by_variable(
    model: keras.Model,
    pairs: Sequence[tuple[keras.Variable, PerExampleGradient]],
) -> list[PerExampleGradient | None]:
    """Adds up the gradients of each variable; None for one that was not used."""
    found: dict[int, list[PerExampleGradient]] = {}
    for variable, gradient in pairs:
        found.setdefault(id(variable), []).append(gradient)
    return [
        per_example.add(found[id(v)]) if id(v) in found else None
        for v in model.trainable_variables
    ]


def _squared_norms(
    gradients: Sequence[PerExampleGradient | None], losses: tf.Tensor
) -> tf.Tensor:
    """Returns each example's squared norm over all variables, `[batch]` float32."""
    norms = [g.squared_norms() for g in gradients if g is not None]
    return tf.add_n(norms) if norms else tf.zeros_like(losses)


def _without_dropped(
    gradients: Sequence[PerExampleGradient | None], finite: tf.Tensor
) -> list[PerExampleGradient | None]:
    """Zeroes the rows of dropped examples: a factor of zero does not remove a NaN."""
    tensors: list[tf.Tensor] = []
    for gradient in gradients:
        if gradient is not None:
            gradient.map(lambda t: tensors.append(t) or t)  # type: ignore
    kept = iter(
        tf.cond(
            tf.reduce_all(finite),
            lambda: tensors,
            lambda: [zero_rows(finite, t) for t in tensors],
        )
    )
    return [g and g.map(lambda _: next(kept)) for g in gradients]


def _weighted_sums(
    model: keras.Model,
    gradients: Sequence[PerExampleGradient | None],
    factors: tf.Tensor,
) -> list[tf.Tensor]:
    """Returns the bounded sums, zeros for a variable that was not used."""
    pairs = zip(model.trainable_variables, gradients, strict=True)
    return [
        tf.zeros(v.shape) if g is None else g.weighted_sum(factors) for v, g in pairs
    ]


def _warn_once(model: keras.Model, why: str) -> None:
    """Names what one-pass clipping cannot take."""
    if model not in _warned:
        _warned.add(model)
        logger.warning(
            "One-pass clipping %s: model '%s' falls back to the vectorized path, which "
            "is slower and takes more memory.",
            why,
            model.name,
        )
