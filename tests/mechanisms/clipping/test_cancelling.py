"""Positions of an example that cancel: what rounding leaves is never scaled up."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping.step import clipped_gradient_sum

WIDTH = 32


def squared_error(targets, outputs):
    return tf.reduce_sum(tf.square(outputs - targets), axis=[1, 2]) / 2.0


def dense():
    inputs = keras.Input((2, WIDTH))
    return keras.Model(inputs, keras.layers.Dense(WIDTH)(inputs))


def pointwise():
    inputs = keras.Input((2, WIDTH))
    return keras.Model(inputs, keras.layers.Conv1D(WIDTH, 1)(inputs))


def einsum():
    inputs = keras.Input((2, WIDTH))
    layer = keras.layers.EinsumDense("abc,cd->abd", (None, WIDTH), bias_axes="d")
    return keras.Model(inputs, layer(inputs))


def length(gradients):
    return np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("make", [dense, pointwise, einsum])
def test_opposite_gradients_of_like_positions_stay_within_the_bound(make, normalize):
    random, model = np.random.default_rng(0), make()
    for nearness in 10.0 ** random.uniform(-7, 0, 40):
        value = random.normal(size=WIDTH)
        inputs = np.float32([np.stack([value, value * (1.0 + nearness)])])
        residual = 1e4 * random.normal(size=WIDTH)
        targets = model(inputs).numpy() - np.float32([residual, -residual])
        summed = clipped_gradient_sum(
            model,
            tf.constant(inputs),
            tf.constant(np.float32(targets)),
            squared_error,
            l2_norm=1.0,
            normalize=normalize,
        )
        assert length(summed.gradients) <= 1.0 + 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_a_table_looked_up_twice_with_opposite_gradients_stays_within(normalize):
    inputs = keras.Input((2,), dtype="int32")
    table = keras.layers.Embedding(5, WIDTH)
    model, random = keras.Model(inputs, table(inputs)), np.random.default_rng(0)
    for nearness in 10.0 ** random.uniform(-7, 0, 40):
        residual = 1e4 * random.normal(size=WIDTH)
        rows = tf.constant([[3, 3]])
        targets = model(rows).numpy() - np.float32(
            [residual, -residual * (1.0 + nearness)]
        )
        summed = clipped_gradient_sum(
            model,
            rows,
            tf.constant(np.float32(targets)),
            squared_error,
            l2_norm=1.0,
            normalize=normalize,
        )
        assert length(summed.gradients) <= 1.0 + 1e-5


def test_where_nothing_cancels_the_norm_is_exact():
    random, model = np.random.default_rng(1), dense()
    inputs = random.normal(size=(8, 2, WIDTH)).astype(np.float32)
    targets = random.normal(size=(8, 2, WIDTH)).astype(np.float32)
    for row in range(8):
        summed = clipped_gradient_sum(
            model,
            tf.constant(inputs[row : row + 1]),
            tf.constant(targets[row : row + 1]),
            squared_error,
            l2_norm=1.0,
            normalize=True,
        )
        assert length(summed.gradients) == pytest.approx(1.0, abs=2e-6)
