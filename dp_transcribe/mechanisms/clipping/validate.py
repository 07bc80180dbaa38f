"""Which students per-example clipping can bound, and which it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import keras


class UnsupportedStudentError(ValueError):
    """The student does something that no clipping of single examples can bound."""


class BatchNormalizationError(UnsupportedStudentError):
    """The student normalises over the batch, so that examples mix."""


class RegularizationError(UnsupportedStudentError):
    """The student adds losses of its own to the batch's loss."""


class HalfPrecisionError(UnsupportedStudentError):
    """The student computes in float16, which needs loss scaling."""


def check_student(model: keras.Model) -> None:
    """Refuses a student whose per-example gradients cannot be bounded.

    Args:
        model: a built Keras model.

    Raises:
        ValueError: the model is not built.
        BatchNormalizationError: it has trainable batch normalisation.
        RegularizationError: it has weight or activity regularisation.
        HalfPrecisionError: a layer computes in float16.

    **Privacy**: with batch normalisation one example moves the gradients of all, so
    the bound on each contribution no longer bounds the sum; its moving statistics
    are a second way out.
    """
    if not model.built:
        raise ValueError(
            "Invalid value for argument `model`. Expected a built model. Received: "
            f"model={model.name}. Add an `Input` layer or call `model.build()`."
        )
    for layer in every_layer(model):
        _check_layer(layer)
    if model.losses:
        raise RegularizationError(_regularization_message(model))


def every_layer(layer: keras.layers.Layer) -> Iterator[keras.layers.Layer]:
    """Yields a layer and all layers inside it."""
    # Not public, but the only walk that also finds layers inside custom layers.
    yield from layer._flatten_layers()


def _check_layer(layer: keras.layers.Layer) -> None:
    """Refuses one layer."""
    if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable:
        raise BatchNormalizationError(
            "Invalid value for argument `model`. Expected a student without batch "
            f"normalisation. Received: layer '{layer.name}' (BatchNormalization). It "
            "lets one example move the gradients of all others: replace it by "
            "`keras.layers.GroupNormalization`, or freeze it."
        )
    if getattr(layer, "activity_regularizer", None) is not None:
        raise RegularizationError(_regularization_message(layer))
    if layer.compute_dtype == "float16":
        raise HalfPrecisionError(
            "Invalid value for argument `model`. Expected float32 or bfloat16 "
            f"computation. Received: layer '{layer.name}' computes in float16, whose "
            "loss scaling would be undone by clipping. Use the dtype policy "
            '"mixed_bfloat16".'
        )


def _regularization_message(layer: keras.layers.Layer) -> str:
    """Words the error for losses that are added to the batch's loss."""
    return (
        "Invalid value for argument `model`. Expected a student without regularisation "
        f"losses. Received: '{layer.name}' with a regularizer. Put regularisation "
        "inside the per-example loss, or use the optimizer's `weight_decay`."
    )
