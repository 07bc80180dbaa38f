"""Whether a model treats the rows of a batch one by one: tried out on random rows."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.structure import Structure, inputs_of

_LOGGER = logging.getLogger(__name__)
_ROWS = 4
_SIDE = 32  # of inputs whose size is left open
_DRAWS = 3  # of the random layers, which may mix in some draws alone
# What rounding may change in outputs, and in gradients, as a share of the largest.
_OUTPUT_SHARE, _GRADIENT_SHARE = 1e-4, 1e-6
# Other sizes of the batch take other paths through the kernels.
_PLACE_SHARE, _PLACE_SHARE_OF_BFLOAT16 = 1e-2, 1e-1

_TREATS_ROWS_ALONE: weakref.WeakKeyDictionary[keras.Model, Structure] = (
    weakref.WeakKeyDictionary()
)


def mixing(model: keras.Model) -> str | None:
    """How a model in training lets rows meet, or None if it was not seen to.

    Tried once for each model and again when its layers are others, outside of the graph
    where it is asked for in one; not at all where the replicas of a strategy run, which
    ask one by one. The model's variables are neither changed nor drawn from.

    Args:
        model: a built model.

    Returns:
        A few words for an error, such as "other rows move its gradients".
    """
    in_replica = (
        tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context()
    )
    known = _TREATS_ROWS_ALONE.get(model)
    if in_replica or (known is not None and known.is_of(model)):
        return None
    with tf.init_scope():
        if not tf.executing_eagerly():
            return None
        found = _guarded(model, _mixing)
    if found is None:
        _TREATS_ROWS_ALONE[model] = Structure(model)
    return found


def depends_on_place(model: keras.Model) -> bool:
    """Whether what a model in training makes of a row depends on the row's place.

    Args:
        model: a built model; its variables are neither changed nor drawn from.

    Returns:
        True if a row's outputs change with its number or with the size of the batch.
    """
    return bool(_guarded(model, _place))


def _guarded(model: keras.Model, look: Callable[[_Trial], Any]) -> Any:
    """What `look` finds; None with a warning for a model that takes no random rows."""
    try:
        trial = _Trial(model)
    except (tf.errors.OpError, TypeError, ValueError) as error:
        _LOGGER.warning(
            "'%s' cannot be tried on random rows: that it treats the rows of a batch "
            "one by one is yours to see to. %s",
            model.name,
            error,
        )
        return None
    return look(trial)


def _mixing(trial: _Trial) -> str | None:
    for draw in range(_DRAWS if trial.is_random else 1):
        trial.draw = draw
        found = _seen_in_outputs(trial) or _seen_in_gradients(trial)
        if found is not None:
            return found
    return None


def _seen_in_outputs(trial: _Trial) -> str | None:
    """Changes some rows; outputs of the others must stay as they are."""
    base, kept = trial.run(trial.rows)
    again, _ = trial.run(trial.rows)
    for changed, others in trial.splits():
        for rows in trial.changes(changed):
            try:
                outputs, now_kept = trial.run(rows)
            except tf.errors.OpError:
                continue  # such values are no inputs of this model
            if any(
                _differ(kept[key], now_kept[key])
                for key in kept.keys() & now_kept.keys()
            ):
                return "it keeps something of its inputs in its variables"
            for old, repeated, new in zip(base, again, outputs, strict=True):
                if not _same(old[others], repeated[others], new[others]):
                    return "a row's output changes with other rows of its batch"
    return None


def _same(old: np.ndarray, repeated: np.ndarray, new: np.ndarray) -> bool:
    """Whether outputs are the same, but for rounding and what changes by itself."""
    if np.any(np.isfinite(old) & ~np.isfinite(new)):
        return False
    allowed = _OUTPUT_SHARE * _largest(old)
    itself = _largest(old - repeated)
    # One that draws numbers which nothing can hold still is left to its gradients.
    return itself > allowed or _largest(new - old) <= allowed + 10.0 * itself


def _seen_in_gradients(trial: _Trial) -> str | None:
    """Outputs of some rows must have no gradient with respect to the others."""
    for changed, others in trial.splits():
        try:
            gradients = trial.gradients(others)
        except (LookupError, tf.errors.OpError):
            return None  # not every operation has a gradient
        for gradient in gradients:
            allowed = _GRADIENT_SHARE * _largest(gradient[others])
            if _largest(gradient[changed]) > allowed:
                return "a row's output has a gradient by other rows of its batch"
    return None


def _place(trial: _Trial) -> bool:
    """Turns the batch round, and leaves out its last row."""
    whole, backwards, first = slice(None), slice(None, None, -1), slice(None, -1)
    share = _PLACE_SHARE_OF_BFLOAT16 if trial.is_rough else _PLACE_SHARE
    base, _ = trial.run(trial.rows)
    moves = [(backwards, backwards)]
    if not trial.is_fixed:
        moves.append((first, whole))
    for taken, back in moves:
        rows = keras.tree.map_structure(lambda leaf, t=taken: leaf[t], trial.rows)
        outputs, _ = trial.run(rows)
        for old, new in zip(base, outputs, strict=True):
            if _largest(new[back] - old[: len(new)]) > share * _largest(old):
                return True
    return False


class _Trial:
    """A model and random rows for it."""

    def __init__(self, model: keras.Model) -> None:
        self.model = model
        self.draw = 0
        self._random = np.random.default_rng(0)
        if not getattr(model, "inputs", None):
            raise TypeError(f"'{model.name}' does not state its inputs.")
        inputs = inputs_of(model)
        batches = {leaf.shape[0] for leaf in keras.tree.flatten(inputs)}
        self.is_fixed = batches != {None}
        self._count = max(batches) if self.is_fixed else _ROWS
        layers = list(model._flatten_layers())
        self.is_rough = any(layer.compute_dtype == "bfloat16" for layer in layers)
        tables = [x.input_dim for x in layers if isinstance(x, keras.layers.Embedding)]
        self._codes = min(tables, default=None)
        self.rows = keras.tree.map_structure(self._rows_for, inputs)
        seeds = [v for v in model.variables if "seed_generator" in v.path]
        self._seeds = [(v, keras.ops.convert_to_numpy(v)) for v in seeds]
        # Weights that start at zero would hide what comes before them.
        self._weights = [
            (v, 0.1 * self._random.normal(size=v.shape))
            for v in model.trainable_variables
            if not np.any(keras.ops.convert_to_numpy(v))
        ]
        _, kept = self.run(self.rows)
        self.is_random = any(
            np.any(keras.ops.convert_to_numpy(kept[id(v)]) != value)
            for v, value in self._seeds
        )

    def _rows_for(self, leaf: keras.KerasTensor) -> np.ndarray:
        """Random rows for one input: codes for integers, 0..1 for pixels."""
        shape = (self._count, *(side or _SIDE for side in leaf.shape[1:]))
        kind = tf.as_dtype(leaf.dtype)
        if kind.is_floating:
            rows: Any = self._random.uniform(0.0, self._codes or 1.0, shape)
        elif kind.is_integer or kind.is_bool:
            rows = self._random.integers(0, self._number_of_codes(kind), shape)
        else:
            raise TypeError(f"No random rows for inputs of type {kind.name}.")
        return rows.astype(kind.as_numpy_dtype)

    def _number_of_codes(self, kind: tf.DType) -> int:
        return self._codes or (256 if kind == tf.uint8 else 2)

    def splits(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Masks of the rows in two parts; any two rows are on both sides of one."""
        numbers = np.arange(self._count)
        for bit in range((self._count - 1).bit_length()):
            part = (numbers >> bit) % 2 == 1
            yield part, ~part
            yield ~part, part

    def changes(self, changed: np.ndarray) -> Iterator[Any]:
        """The rows with those marked replaced: other codes, or pixels of all sizes."""

        def replaced(old: np.ndarray, factor: float) -> np.ndarray:
            kind, rows = tf.as_dtype(old.dtype), old.copy()
            if kind.is_floating:
                new: Any = self._random.uniform(0.0, self._codes or 1.0, old.shape)
                new = factor * new
            else:
                new = (old.astype(np.int64) + 1) % self._number_of_codes(kind)
            rows[changed] = new[changed].astype(old.dtype)
            return rows

        for factor in (1.0, 10.0, np.nan):
            yield keras.tree.map_structure(
                lambda leaf, f=factor: replaced(leaf, f), self.rows
            )

    def run(self, rows: Any) -> tuple[list[np.ndarray], dict[int, Any]]:
        """Outputs in training, and what it would assign to variables, by their ids."""
        with keras.StatelessScope(self._state()) as scope:
            outputs = self.model(rows, training=True)
        count = len(keras.tree.flatten(rows)[0])
        values = [_as_float(leaf) for leaf in keras.tree.flatten(outputs)]
        return [v for v in values if v.ndim and len(v) == count], scope.state_mapping

    def gradients(self, of: np.ndarray) -> list[np.ndarray]:
        """Of a random sum of the outputs of some rows, by all rows of all inputs."""
        rows = keras.tree.map_structure(tf.constant, self.rows)
        leaves = [x for x in keras.tree.flatten(rows) if x.dtype.is_floating]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            with keras.StatelessScope(self._state()):
                outputs = keras.tree.flatten(self.model(rows, training=True))
            total = tf.zeros([])
            for leaf in outputs:
                if leaf.shape.rank and leaf.shape[0] == self._count:
                    weights = self._random.normal(size=leaf.shape).astype(np.float32)
                    weights[~of] = 0.0
                    total += tf.reduce_sum(tf.cast(leaf, tf.float32) * weights)
        found = tape.gradient(total, leaves)
        return [_as_float(gradient) for gradient in found if gradient is not None]

    def _state(self) -> list[tuple[Any, Any]]:
        """What stands in for some variables: all calls of a draw are alike."""
        step = np.array([self.draw, 0])
        seeds = [(v, value + step) for v, value in self._seeds]
        return [*seeds, *self._weights]


def _as_float(tensor: Any) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.cast(tensor, "float32"))


def _largest(values: np.ndarray) -> float:
    """The largest finite magnitude; 0 if there is none."""
    magnitudes = np.abs(values)
    return float(np.max(magnitudes, where=np.isfinite(magnitudes), initial=0.0))


def _differ(old: Any, new: Any) -> bool:
    old, new = _as_float(old), _as_float(new)
    allowed = _OUTPUT_SHARE * _largest(old)
    return not np.allclose(old, new, rtol=0.0, atol=allowed, equal_nan=True)
