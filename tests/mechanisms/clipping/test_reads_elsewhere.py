"""Weights that are read outside of their layer, and models that are made anew."""

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
from tests.mechanisms.clipping.students import STUDENTS, L, sequence


def tied():
    """The head is the first layer's kernel, turned round."""
    inputs = keras.Input((5,))
    first = L.Dense(4, activation="tanh")
    x = first(inputs)
    back = L.Lambda(lambda t: keras.ops.matmul(t, keras.ops.transpose(first.kernel)))
    return keras.Model(inputs, L.Dense(3)(back(x)))


def tied_table():
    inputs = keras.Input((3,), dtype="int32")
    table = L.Embedding(6, 4)
    x = L.Dense(4)(table(inputs))
    scores = L.Lambda(lambda t: t @ keras.ops.transpose(table.embeddings))
    return keras.Model(inputs, scores(x))


def tied_by_an_activation():
    first = L.Dense(4)
    second = L.Dense(4, activation=lambda t: t * first.bias)
    return sequence((5,), first, second)


def tied_in_a_nested_model():
    first = L.Dense(4)
    first.build((None, 5))
    inner = sequence((4,), L.Lambda(lambda t: t @ first.kernel[:4]), L.Dense(2))
    return sequence((5,), first, inner)


TIED = {
    "lambda": tied,
    "table": tied_table,
    "activation": tied_by_an_activation,
    "nested": tied_in_a_nested_model,
}


def warnings_of(caplog):
    messages = [r.getMessage() for r in caplog.records]
    return [m for m in messages if "falls back" in m]


def warnings_of_exact_sums(model, caplog):
    """What is said of a model whose sum is that of the definition, which is checked."""
    inputs, targets = make_data(model)
    expected, norms = one_by_one(model, inputs, targets, l2_norm=0.3)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        result = clipped_gradient_sum(
            model, inputs, targets, squared_error, l2_norm=0.3
        )
    assert distance(result.gradients, expected) < 1e-5
    np.testing.assert_allclose(result.norms, norms, rtol=1e-5)
    return warnings_of(caplog)


@pytest.mark.parametrize("name", TIED)
def test_weights_read_by_another_layer_fall_back(name, caplog):
    model = TIED[name]()
    inputs, targets = make_data(model)
    expected, norms = one_by_one(model, inputs, targets, l2_norm=0.3)
    run = compiled(
        lambda x, y: clipped_gradient_sum(model, x, y, squared_error, l2_norm=0.3),
        inputs,
        targets,
    )
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        result = run(inputs, targets)
    assert distance(result.gradients, expected) < 1e-5
    np.testing.assert_allclose(result.norms, norms, rtol=1e-5)
    (message,) = warnings_of(caplog)
    assert f"'{model.trainable_variables[name == 'activation'].path}'" in message


def test_weights_read_by_the_loss_fall_back(caplog):
    model = sequence((5,), L.Dense(4), L.Dense(3))
    inputs, targets = make_data(model)

    def decayed(targets, outputs):
        decay = tf.reduce_sum(tf.square(model.layers[1].kernel))
        return squared_error(targets, outputs) + 0.1 * decay

    arguments = {"l2_norm": 0.3, "normalize": True}
    expected, _ = one_by_one(model, inputs, targets, decayed, **arguments)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        result = clipped_gradient_sum(model, inputs, targets, decayed, **arguments)
    assert distance(result.gradients, expected) < 1e-5
    assert f"'{model.layers[1].kernel.path}' is also read" in warnings_of(caplog)[0]


def test_frozen_weights_may_be_read_anywhere(caplog):
    model = tied()
    model.layers[1].trainable = False
    assert not warnings_of_exact_sums(model, caplog)


def test_weights_read_elsewhere_are_seen_on_replicas(caplog):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = tied()
    inputs, targets = make_data(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)

    @tf.function
    def run():
        return strategy.run(
            lambda: clipped_gradient_sum(
                model, inputs, targets, squared_error, l2_norm=0.3
            )
        )

    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        result = run()
    assert distance(result.gradients, expected) < 1e-5
    assert warnings_of(caplog)


@pytest.mark.parametrize("name", STUDENTS)
def test_no_layer_of_keras_is_taken_for_reading_elsewhere(name, caplog):
    model = STUDENTS[name]()
    shape = [2, *(6 if side is None else side for side in model.inputs[0].shape[1:])]
    inputs = tf.zeros(shape, model.inputs[0].dtype)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        clipped_gradient_sum(model, inputs, model(inputs), squared_error, l2_norm=0.3)
    assert not warnings_of(caplog)


def shortened(model):
    model.pop()
    model.add(L.Dense(3, activation="tanh"))


def shortened_inside(model):
    model.layers[0].pop()
    model.layers[0].add(L.Dense(4, activation="tanh"))


@pytest.mark.parametrize("change", [shortened, shortened_inside])
def test_a_model_that_is_made_anew_is_recorded_anew(change):
    inner = sequence((5,), L.Dense(4), L.Dense(4))
    model = sequence((5,), inner, L.Dense(3))
    inputs, targets = make_data(model)
    clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)
    change(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    result = clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)
    assert distance(result.gradients, expected) < 1e-5
    np.testing.assert_allclose(result.outputs, model(inputs), rtol=1e-5)


@pytest.mark.parametrize("name", ["value_mask", "key_mask"])
def test_masks_given_to_attention_fall_back(name, caplog):
    inputs = keras.Input((5, 6))
    mask = keras.ops.sum(inputs, axis=2) > 0.0
    layer = L.MultiHeadAttention(2, 3)
    model = keras.Model(inputs, layer(inputs, inputs, **{name: mask}))
    assert f"of layer '{layer.name}'" in warnings_of_exact_sums(model, caplog)[0]
