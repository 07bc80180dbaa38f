"""One forward pass that remembers every trainable layer's pre-activation.

The student's graph is cloned once with each layer that holds weights wrapped in a
`Recorder`. Inside a `Recording`, a recorder computes its layer by the layer's rule,
which taps the pre-activation; outside of one it calls the layer as it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.per_example import PerExampleGradient

# From the gradients at what was tapped to (variable, its per-example gradients).
Backward = Callable[..., list[tuple[keras.Variable, PerExampleGradient]]]
Rule = Callable[..., Any]

_active = threading.local()


class Recording:
    """The taps of one forward pass; a context manager, one per thread.

    Args:
        variables: the variables whose gradients are wanted.

    Attributes:
        unknown: what was met that no rule knows, None if nothing: the taps say nothing
            of it.
    """

    def __init__(self, variables: Iterable[keras.Variable]) -> None:
        self._variables = list(variables)
        self._wanted = {id(v) for v in self._variables}
        self._tape = tf.GradientTape(watch_accessed_variables=False)
        # Never asked for a gradient, so it adds nothing to the graph.
        self._reads = tf.GradientTape()
        self._read: list[tf.Variable] = []
        self.unknown: str | None = None
        self._taps: list[tuple[list[tf.Tensor], Backward]] = []

    def wants(self, variable: keras.Variable | None) -> bool:
        """Whether the gradient of `variable` is wanted."""
        return variable is not None and id(variable) in self._wanted

    def tap(
        self,
        tensors: Sequence[tf.Tensor],
        backward: Backward,
        variables: Sequence[keras.Variable | None],
    ) -> None:
        """Remembers tensors, and what turns their gradients into the variables'.

        Args:
            tensors: `[batch, ...]` each; usually one, a pre-activation.
            backward: takes the gradients of the losses at `tensors`.
            variables: those whose gradients `backward` gives.
        """
        if any(self.wants(v) for v in variables):
            self._tape.watch(tensors)
            self._taps.append((list(tensors), backward))

    def by_rule(self) -> contextlib.AbstractContextManager[None]:
        """A context in which a rule reads its layer's variables and taps them."""
        return self._reads.stop_recording()

    @contextlib.contextmanager
    def within_a_rule(self) -> Iterator[None]:
        """A context for what a rule calls without knowing what that reads."""
        with tf.GradientTape() as reads:
            yield
        self._read += reads.watched_variables()

    def read_outside(self) -> keras.Variable | None:
        """The first wanted variable that was read where no rule taps it, if any."""
        read = {id(v) for v in (*self._read, *self._reads.watched_variables())}
        return next((v for v in self._variables if read & _ids(v)), None)

    def gradients(
        self, losses: tf.Tensor
    ) -> list[tuple[keras.Variable, PerExampleGradient]]:
        """Goes back from `losses` `[batch]` to what was tapped, once."""
        deltas = self._tape.gradient(
            losses,
            [tensors for tensors, _ in self._taps],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return [
            (variable, gradient)
            for delta, (_, backward) in zip(deltas, self._taps, strict=True)
            for variable, gradient in backward(*delta)
            if self.wants(variable)
        ]

    def __enter__(self) -> Recording:
        """Starts recording in this thread."""
        self._outer = getattr(_active, "recording", None)
        _active.recording = self
        self._tape.__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Stops recording."""
        self._reads.__exit__(*exception)
        self._tape.__exit__(*exception)
        _active.recording = self._outer


class Recorder(keras.layers.Layer):
    """Calls a layer, by its rule when a recording is under way.

    Args:
        layer: the layer to call.
        rule: `rule(layer, recording, *args, training=..., **kwargs)` returns the
            layer's outputs and taps its pre-activations.
    """

    def __init__(self, layer: keras.layers.Layer, rule: Rule) -> None:
        super().__init__(
            name=layer.name, dtype=layer.dtype_policy, autocast=layer.autocast
        )
        self.layer = layer
        self.rule = rule
        self.supports_masking = layer.supports_masking
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Calls the layer."""
        return self.recorded(inputs, training=training)

    def recorded(self, *args: Any, training: bool | None, **kwargs: Any) -> Any:
        """Calls the layer, by its rule when a recording is under way."""
        recording = getattr(_active, "recording", None)
        if recording is None:
            return self.layer(*args, **kwargs)
        with recording.by_rule():
            return self.rule(self.layer, recording, *args, training=training, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """Returns the layer's mask."""
        return self.layer.compute_mask(inputs, previous_mask)


class AttentionRecorder(Recorder):
    """Calls MultiHeadAttention, whose arguments Keras wants to see by name."""

    def call(  # type: ignore[override]
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
    ) -> Any:
        """Calls the layer."""
        masks = {"query_mask": query_mask, "value_mask": value_mask}
        masks["key_mask"] = key_mask
        arguments: dict[str, Any] = {
            "attention_mask": attention_mask,
            "return_attention_scores": return_attention_scores,
            "use_causal_mask": use_causal_mask,
        }
        if given := [name for name, mask in masks.items() if mask is not None]:
            recording = getattr(_active, "recording", None)
            if recording is not None:
                recording.unknown = f"`{given[0]}` of layer '{self.layer.name}'"
            return self.layer(
                query, value, key, training=training, **masks, **arguments
            )
        return self.recorded(query, value, key, training=training, **arguments)


def _ids(variable: keras.Variable) -> set[int]:
    """Ids of the variable that TensorFlow reads, and of its copies on replicas."""
    value = variable.value
    return {id(v) for v in (value, *getattr(value, "values", ()))}
