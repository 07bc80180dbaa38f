"""Which students per-example clipping can bound, and which it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import keras

from dp_transcribe.mechanisms.clipping import rows


class UnsupportedStudentError(ValueError):
    """The student does something that no clipping of single examples can bound."""


class BatchNormalizationError(UnsupportedStudentError):
    """The student normalises over the batch, so that examples mix."""


class RowMixingError(UnsupportedStudentError):
    """The student lets one row of a batch change what it makes of another."""


class PlaceError(UnsupportedStudentError):
    """What the student makes of a row depends on where it is in the batch."""


class RegularizationError(UnsupportedStudentError):
    """The student adds losses of its own to the batch's loss."""


class HalfPrecisionError(UnsupportedStudentError):
    """The student computes in float16, which needs loss scaling."""


def check_student(model: keras.Model) -> None:
    """Refuses a student whose per-example gradients cannot be bounded.

    Besides looking at its layers, it is tried once on random rows, some of which are
    replaced: outputs of the others must not change, nor have gradients by them.

    Args:
        model: a built Keras model.

    Raises:
        ValueError: the model is not built.
        BatchNormalizationError: it has trainable batch normalisation.
        RowMixingError: it mixes rows in another way, or keeps something of them in
            its variables.
        RegularizationError: it has weight or activity regularisation.
        HalfPrecisionError: a layer computes in float16.

    **Privacy**: with batch normalisation one example moves the gradients of all, so
    the bound on each contribution no longer bounds the sum; its moving statistics
    are a second way out. A trial is no proof: a layer that mixes rows only now and
    then, or only rows of some values, may pass.
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
    how = rows.mixing(model)
    if how is not None:
        raise RowMixingError(_mixing_message(f"'{model.name}': {how}"))


def check_sampled(model: keras.Model, mend: str) -> None:
    """Refuses a student whose rows must not be drawn by Poisson sampling.

    Args:
        model: a built Keras model.
        mend: a sentence on what else can be used.

    Raises:
        UnsupportedStudentError: see `check_student`.
        PlaceError: it has random layers, or depends on a row's place otherwise.

    **Privacy**: sampling hides a row only if the others show nothing of it. They move
    up when a row is left out, and a random layer's draws go by the place: whoever
    knows the seed sees by the masks of the others who was sampled.
    """
    check_student(model)
    culprits = [
        f"layer '{layer.name}' ({type(layer).__name__})"
        for layer in every_layer(model)
        if layer._seed_generators and not _never_draws(layer)
    ]
    if not culprits and rows.depends_on_place(model):
        culprits = [f"'{model.name}', whose outputs move with the place of a row"]
    if culprits:
        raise PlaceError(
            "Invalid value for argument `model`. Expected a student without random "
            "layers, since its rows are sampled: what it draws for a row depends on "
            "the row's place in the batch, so on which others were sampled. Received: "
            f"{', '.join(culprits)}. {mend}"
        )


def _never_draws(layer: keras.layers.Layer) -> bool:
    """Whether it is recurrent without dropout; those have a seed that is never used."""
    cell = getattr(layer, "cell", layer)
    rates = [getattr(cell, name, None) for name in ("dropout", "recurrent_dropout")]
    return rates == [0.0, 0.0]


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
    if isinstance(layer, (keras.layers.CutMix, keras.layers.MixUp)):
        received = f"layer '{layer.name}' ({type(layer).__name__})"
        raise RowMixingError(_mixing_message(received))
    if getattr(layer, "activity_regularizer", None) is not None:
        raise RegularizationError(_regularization_message(layer))
    if layer.compute_dtype == "float16":
        raise HalfPrecisionError(
            "Invalid value for argument `model`. Expected float32 or bfloat16 "
            f"computation. Received: layer '{layer.name}' computes in float16, whose "
            "loss scaling would be undone by clipping. Use the dtype policy "
            '"mixed_bfloat16".'
        )


def _mixing_message(received: str) -> str:
    """Words the error for rows that are not treated one by one."""
    return (
        "Invalid value for argument `model`. Expected a student that treats the rows "
        f"of a batch one by one. Received: {received}. One example would move the "
        "gradients of others: leave out what works along the batch, axis 0, such as "
        "means over it, and states that last from batch to batch."
    )


def _regularization_message(layer: keras.layers.Layer) -> str:
    """Words the error for losses that are added to the batch's loss."""
    return (
        "Invalid value for argument `model`. Expected a student without regularisation "
        f"losses. Received: '{layer.name}' with a regularizer. Put regularisation "
        "inside the per-example loss, or use the optimizer's `weight_decay`."
    )
