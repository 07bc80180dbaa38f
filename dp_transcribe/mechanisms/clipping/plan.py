"""The recording copy of a student: its graph, with the layers that need it wrapped."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.recording import AttentionRecorder, Recorder
from dp_transcribe.mechanisms.clipping.registry import has_rule, rule_of
from dp_transcribe.mechanisms.clipping.structure import Structure, inputs_of, outputs_of

_copies: weakref.WeakKeyDictionary[keras.Model, tuple[Structure, keras.Model]] = (
    weakref.WeakKeyDictionary()
)


def unsupported_layer(model: keras.Model) -> keras.layers.Layer | None:
    """Returns the first layer that one-pass clipping has no rule for, if any."""
    if not is_graph(model):
        return model
    layers = list(leaves(model))
    masked = any(makes_mask(layer) for layer in layers)
    return next((x for x in layers if not is_supported(x, masked)), None)


def recording_copy(model: keras.Model) -> keras.Model:
    """Returns a model that shares `model`'s layers and can be recorded.

    Built once for each model, and again when its layers are others. Layers without a
    rule are used as they are; the others are wrapped, and so read the current values of
    the variables.
    """
    structure, copy = _copies.get(model, (None, None))
    if structure is None or not structure.is_of(model):
        with tf.init_scope():
            # Structures are the model's own: what is given goes by them, as in Keras.
            view = keras.Model(inputs_of(model), outputs_of(model))
            copy = keras.models.clone_model(view, clone_function=wrap, recursive=True)
        _copies[model] = Structure(model), copy
    return copy


def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Wraps a layer that a rule is known for; returns any other as it is."""
    if not isinstance(layer, keras.layers.Layer) or not layer.weights:
        return layer
    rule = rule_of(layer)
    if rule is None:
        return layer
    attends = isinstance(layer, keras.layers.MultiHeadAttention)
    return AttentionRecorder(layer, rule) if attends else Recorder(layer, rule)


def leaves(model: keras.Model) -> Iterator[keras.layers.Layer]:
    """Yields the layers of a graph, going into nested graphs."""
    for layer in model.layers:
        if is_graph(layer):
            yield from leaves(layer)
        else:
            yield layer


def is_graph(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a Functional or Sequential model that keeps their `call`."""
    return any(type(layer).call is graph.call for graph in _graph_types())


def makes_mask(layer: keras.layers.Layer) -> bool:
    """Whether a layer attaches a Keras mask to what it returns; one's own may."""
    kind = type(layer)
    own = kind.compute_mask is not keras.layers.Layer.compute_mask
    return (
        isinstance(layer, keras.layers.Masking)
        or bool(getattr(layer, "mask_zero", False))
        or (own and not kind.__module__.startswith("keras."))
    )


def is_supported(layer: keras.layers.Layer, masked: bool) -> bool:
    """Whether a layer needs no rule, or has one; attention has none with masks."""
    if isinstance(layer, _graph_types()):
        return False
    if not layer.trainable_variables:
        return True
    if masked and isinstance(layer, keras.layers.MultiHeadAttention):
        return False
    # What an activation learns is no variable that the layer's rule knows.
    inner = getattr(layer, "activation", None)
    if isinstance(inner, keras.layers.Layer) and inner.trainable_variables:
        return False
    return has_rule(layer)


@functools.cache
def _graph_types() -> tuple[type[keras.Model], ...]:
    """Sequential, and the type that `keras.Model(inputs, outputs)` makes."""
    tensor = keras.Input((1,))
    return keras.Sequential, type(keras.Model(tensor, tensor))
