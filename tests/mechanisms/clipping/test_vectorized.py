"""The path that takes every model: random layers, states, and what is no vector."""

import logging

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from tests.mechanisms.clipping.reference import (
    compiled,
    distance,
    make_data,
    one_by_one,
    squared_error,
)
from tests.mechanisms.clipping.students import L, attention, lenet, sequence


def vectorized(model, **arguments):
    arguments = {"l2_norm": 0.3, "clipping": "vectorized", **arguments}
    return lambda x, y: clipped_gradient_sum(model, x, y, squared_error, **arguments)


class Unregistered(L.Layer):
    """Uses an operation that TensorFlow cannot vectorise."""

    def call(self, inputs):
        return tf.math.cumulative_logsumexp(inputs, axis=1)


RECURRENT = {
    "first": lambda: sequence((3, 4), L.GRU(4), L.Dense(2)),
    "after another layer": lambda: sequence((3, 4), L.Dense(4), L.GRU(4), L.Dense(2)),
    "long memory": lambda: sequence((3, 4), L.Dense(4), L.LSTM(4), L.Dense(2)),
    "both ways": lambda: sequence((3, 4), L.Dense(4), L.Bidirectional(L.GRU(4))),
    "with a mask": lambda: sequence(
        (3,), L.Embedding(4, 3, mask_zero=True), L.LSTM(4), L.Dense(2), dtype="int32"
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers(name):
    model = RECURRENT[name]()
    inputs, targets = make_data(model)
    expected, norms = one_by_one(model, inputs, targets, l2_norm=0.3)
    result = compiled(vectorized(model), inputs, targets)(inputs, targets)
    assert distance(result.gradients, expected) < 1e-5
    np.testing.assert_allclose(result.norms, norms, rtol=1e-5)


def dropped(rate=0.5, **arguments):
    """Its outputs show the masks of its rows."""
    return sequence((2000,), L.Dropout(rate, **arguments))


def masks_of(model, steps=1, **arguments):
    """Where each row is kept, `[steps, rows, features]`."""
    inputs = tf.ones([4, 2000])
    run = compiled(vectorized(model, **arguments), inputs, inputs)
    return np.stack([run(inputs, inputs).outputs.numpy() > 0 for _ in range(steps)])


def agreement(one, other):
    """Share of places where two masks are alike: 1/2 if they are independent."""
    return np.mean(one == other)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_dropout_draws_for_each_row_and_each_step(microbatches):
    masks = masks_of(dropped(seed=3), 3, microbatches=microbatches).reshape(12, 2000)
    for i in range(12):
        # 5 deviations, for 2,000 places.
        assert abs(masks[i].mean() - 0.5) < 0.056
        for j in range(i):
            assert abs(agreement(masks[i], masks[j]) - 0.5) < 0.056


def test_dropout_keeps_its_share_and_scale():
    model = dropped(0.2)
    inputs = tf.ones([4, 2000])
    outputs = vectorized(model)(inputs, inputs).outputs.numpy()
    np.testing.assert_allclose(np.unique(outputs), [0.0, 1.25])
    assert abs(np.mean(outputs == 0.0) - 0.2) < 5 * np.sqrt(0.16 / 8000)


def test_dropout_repeats_with_its_seed():
    np.testing.assert_array_equal(
        masks_of(dropped(seed=5), 2), masks_of(dropped(seed=5), 2)
    )


class Unseeded(L.Layer):
    """Draws from Keras' own generator."""

    def call(self, inputs):
        return inputs * keras.random.uniform(keras.ops.shape(inputs))


def test_draws_without_a_generator_of_the_layer():
    model = sequence((2000,), Unseeded())
    inputs = tf.ones([2, 2000])
    run = compiled(vectorized(model), inputs, inputs)
    rows = np.concatenate([run(inputs, inputs).outputs for _ in range(2)])
    assert np.abs(np.corrcoef(rows) - np.eye(4)).max() < 0.12


def test_states_move_once_for_a_batch():
    layer = L.SpectralNormalization(L.Dense(3))
    model = sequence((4,), layer)
    inputs, targets = make_data(model)
    before = [v.numpy() for v in model.non_trainable_variables]
    model(inputs[:1], training=True)
    expected = [v.numpy() for v in model.non_trainable_variables]
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        variable.assign(value)
    vectorized(model)(inputs, targets)
    for variable, value in zip(model.non_trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, value, rtol=1e-5)


def told(caplog):
    messages = [r.getMessage() for r in caplog.records]
    return [m for m in messages if "one after the other" in m]


SLOW = {
    "attention": (attention, "Einsum"),
    "recurrent": (RECURRENT["first"], "While"),
    "unregistered": (
        lambda: sequence((4,), L.Dense(3), Unregistered()),
        "No pfor vectorization defined for CumulativeLogsumexp",
    ),
}


@pytest.mark.parametrize("name", SLOW)
def test_what_is_not_vectorised_is_said_once(name, caplog):
    make, why = SLOW[name]
    model = make()
    inputs, targets = make_data(model)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        for _ in range(2):
            result = vectorized(model)(inputs, targets)
    (message,) = told(caplog)
    assert why in message and f"'{model.name}'" in message
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    assert distance(result.gradients, expected) < 1e-5


def test_what_is_vectorised_is_not_spoken_of(caplog):
    model = lenet()
    inputs, targets = make_data(model, count=2)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        vectorized(model)(inputs, targets)
    assert not told(caplog)
