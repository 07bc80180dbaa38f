"""What a model is made of: noticed when it is made anew, as by `Sequential.pop`."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import keras


class Structure:
    """The layers of a model and how they are put together, at one moment.

    Holds none of them: the model may go.

    Args:
        model: a built model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._parts = [weakref.ref(part) for part in _parts(model)]

    def is_of(self, model: keras.Model) -> bool:
        """Whether `model` is made as it was at that moment."""
        parts = list(_parts(model))
        return len(parts) == len(self._parts) and all(
            known() is part for known, part in zip(self._parts, parts, strict=True)
        )


def inputs_of(model: keras.Model) -> Any:
    """A graph's inputs in its own structure; Keras puts a Sequential's into a list."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def outputs_of(model: keras.Model) -> Any:
    """A graph's outputs in its own structure, as `inputs_of`."""
    return model.outputs[0] if isinstance(model, keras.Sequential) else model.output


def _parts(model: keras.Model) -> Iterator[Any]:
    """Yields all layers inside, and the outputs of all graphs, which are made anew."""
    yield from getattr(model, "outputs", None) or ()
    # Not public, but the only walk that also finds layers inside custom layers.
    for layer in model._flatten_layers(include_self=False):
        yield layer
        yield from getattr(layer, "outputs", None) or ()
