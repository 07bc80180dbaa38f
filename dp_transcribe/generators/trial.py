"""Whether a source asks new queries in every step: tried out in a graph."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import tensorflow as tf

from dp_transcribe._validate import invalid

_ROWS = 32
_SEEDS = ((0, 1), (2, 3))
# Of the width of the range, what rounding may add to it.
_ROUNDING = 1e-4
_MEND = "Draw with `tf.random.stateless_*` from the seed, nothing with NumPy."

_ASKS_ANEW: weakref.WeakSet[Any] = weakref.WeakSet()


def check_draws(name: str, source: Any, *, trained: bool = False) -> None:
    """Refuses a source of queries that would ask the same ones again and again.

    A step is traced once. What NumPy or Python draws in it is drawn then and never
    again, while every step is accounted as if it asked about new images. Tried once
    for each source.

    Args:
        name: the argument, for the error.
        source: has `sample(n, seed)`, `image_shape` and `output_range`.
        trained: whether `draw_inputs` is used, too.

    Raises:
        ValueError: it does not run in a graph, its images are not of its shape or out
            of its range, or hardly differ from seed to seed. Nothing was spent.

    **Privacy**: a query that is asked twice has two responses, and both count. A source
    that repeats itself now and then is not noticed, and one that sets `asked_once` is
    not tried.
    """
    if source in _ASKS_ANEW or getattr(source, "asked_once", False):
        return
    with tf.init_scope():
        try:
            if trained:
                _check_inputs(name, source)
            images = _two_draws(source)
        except (TypeError, AttributeError, RuntimeError, tf.errors.OpError) as error:
            expected = "a generator whose `sample(n, seed)` runs in a TensorFlow graph"
            raise invalid(name, source, expected, f"{_MEND} {error}") from error
    _check_images(name, source, images)
    _ASKS_ANEW.add(source)


def _check_inputs(name: str, source: Any) -> None:
    """The inputs of a generator that learns; called eagerly, which builds it."""
    inputs = source.draw_inputs(2, tf.constant(_SEEDS[0], tf.int32))
    if not isinstance(inputs, tuple):
        expected = "a generator whose `draw_inputs` returns a tuple, of what it takes"
        raise invalid(name, type(inputs).__name__, expected)
    source(*inputs)


def _two_draws(source: Any) -> np.ndarray:
    """Images by two seeds from one graph, float `[2 * rows, *image_shape]`."""
    source.sample(1, tf.constant(_SEEDS[0], tf.int32))  # weights are made outside
    # A concrete function, since TensorFlow takes the tries of several sources for one
    # function that is traced again and again, and warns.
    draw = tf.function(
        lambda n, seed: source.sample(n, seed), autograph=False
    ).get_concrete_function(tf.TensorSpec([], tf.int32), tf.TensorSpec([2], tf.int32))
    count = tf.constant(_ROWS)
    parts = [draw(count, tf.constant(seed, tf.int32)) for seed in _SEEDS]
    return tf.concat([tf.cast(part, tf.float32) for part in parts], 0).numpy()


def _check_images(name: str, source: Any, images: np.ndarray) -> None:
    wanted = (2 * _ROWS, *source.image_shape)
    if images.shape != wanted:
        expected = f"a generator whose `sample` of {wanted[0]} has the shape {wanted}"
        raise invalid(name, images.shape, expected)
    low, high = source.output_range
    slack = _ROUNDING * (high - low)
    if not np.all((images >= low - slack) & (images <= high + slack)):
        expected = f"a generator of finite images within {low}..{high}"
        raise invalid(name, f"{images.min()}..{images.max()}", expected)
    # As they are asked about: in 256 levels.
    codes = np.round((images - low) / (high - low) * 255.0).reshape(len(images), -1)
    distinct = len(np.unique(codes, axis=0))
    if distinct <= _ROWS:
        expected = "a generator whose images differ from each other and from seed to "
        expected += "seed, also where TensorFlow traces it once"
        received = f"{distinct} different images of {len(images)}"
        raise invalid(name, received, expected, _MEND)
