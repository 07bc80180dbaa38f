"""The recording copy of a student: its graph, with the layers that need it wrapped."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import keras

from dp_transcribe.mechanisms.clipping.recording import Recorder
from dp_transcribe.mechanisms.clipping.rules import RULES

_copies: weakref.WeakKeyDictionary[keras.Model, keras.Model] = (
    weakref.WeakKeyDictionary()
)


def unsupported_layer(model: keras.Model) -> keras.layers.Layer | None:
    """Returns the first layer that one-pass clipping has no rule for, if any."""
    if not is_graph(model):
        return model
    return next((x for x in leaves(model) if not is_supported(x)), None)


def recording_copy(model: keras.Model) -> keras.Model:
    """Returns a model that shares `model`'s layers and can be recorded.

    Built once for each model. Layers without weights are used as they are; those
    that hold weights are wrapped, and so read the current values of the variables.
    """
    if model not in _copies:
        view = keras.Model(model.inputs, model.outputs)
        _copies[model] = keras.models.clone_model(
            view, clone_function=wrap, recursive=True
        )
    return _copies[model]


def wrap(layer: keras.layers.Layer) -> keras.layers.Layer:
    """Wraps a layer that a rule is known for; returns any other as it is."""
    rule = RULES.get(type(layer))
    return layer if rule is None else Recorder(layer, rule)


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


def is_supported(layer: keras.layers.Layer) -> bool:
    """Whether a layer has no trainable weights, or has a rule."""
    if not layer.trainable_variables:
        return not isinstance(layer, keras.Model) or not layer.layers
    plain = not getattr(layer, "lora_enabled", False)
    return plain and layer.quantization_mode is None and type(layer) in RULES


def _graph_types() -> tuple[type, type]:
    """Sequential, and the type that `keras.Model(inputs, outputs)` makes."""
    tensor = keras.Input((1,))
    return keras.Sequential, type(keras.Model(tensor, tensor))
