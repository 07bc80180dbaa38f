"""What is bounded: each example's contribution, whatever it does."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from tests.mechanisms.clipping.reference import (
    distance,
    make_data,
    one_by_one,
    squared_error,
    total_norm,
)
from tests.mechanisms.clipping.students import L, lenet, residual, sequence

PATHS = ["ghost", "vectorized", "tf_privacy"]
BOUND = 1.0 + 1e-5


def run(model, inputs, targets, **arguments):
    arguments = {"l2_norm": 0.5, "normalize": True, **arguments}
    return clipped_gradient_sum(model, inputs, targets, squared_error, **arguments)


def difference(one, other):
    pairs = zip(one.gradients, other.gradients, strict=True)
    return total_norm([np.float64(a) - np.float64(b) for a, b in pairs])


@pytest.mark.parametrize(
    ("clipping", "normalize"),
    [
        ("ghost", False),
        ("ghost", True),
        ("vectorized", True),
        pytest.param("tf_privacy", True, marks=pytest.mark.slow),
    ],
)
def test_zeroing_out_or_replacing_one_example_moves_the_sum_by_the_bound(
    clipping, normalize
):
    model = (
        residual() if clipping == "ghost" else sequence((6,), L.Dense(4), L.Dense(3))
    )
    inputs, targets = make_data(model, count=6)
    arguments = {"clipping": clipping, "normalize": normalize, "l2_norm": 0.25}
    step = tf.function(lambda t, mask: run(model, inputs, t, mask=mask, **arguments))
    whole = step(targets, tf.ones([6]))
    outlier = tf.tensor_scatter_nd_update(targets, [[2]], [1e4 * tf.ones([3])])
    kept = tf.one_hot(range(6), 6, on_value=0.0, off_value=1.0)
    moved = [difference(whole, step(targets, mask)) for mask in kept]
    assert max(moved) <= 0.25 * BOUND
    assert max(moved) > 0.25 * 0.99  # The bound is reached: sensitivity is not less.
    assert difference(whole, step(outlier, tf.ones([6]))) <= 0.5 * BOUND


def test_dropout_is_the_same_for_norms_and_sums():
    """With a mask for norms and another for sums, a batch of one breaks its bound."""
    keras.utils.set_random_seed(0)
    dropout = L.Dropout(0.5)
    model = sequence((20,), L.Dense(30, activation="relu"), dropout, L.Dense(3))
    inputs, targets = make_data(model, count=1)
    sums = [run(model, inputs, targets).gradients for _ in range(10)]
    norms = [total_norm(gradients) for gradients in sums]
    np.testing.assert_allclose(norms, 0.5, rtol=1e-5)
    assert distance(sums[0], [g.numpy() for g in sums[1]]) > 1e-3


def test_attention_dropout_is_in_the_one_pass():
    inputs = keras.Input((4, 6))
    attention = L.MultiHeadAttention(2, 3, dropout=0.5, seed=3)
    model = keras.Model(inputs, attention(inputs, inputs))
    inputs, targets = make_data(model, count=1)
    sums = [run(model, inputs, targets).gradients for _ in range(4)]
    np.testing.assert_allclose([total_norm(g) for g in sums], 0.5, rtol=1e-5)
    assert distance(sums[0], [g.numpy() for g in sums[1]]) > 1e-3


def test_attention_with_dropout_learns_in_graphs_of_several_shapes():
    inputs = keras.Input((4, 6))
    attention = L.MultiHeadAttention(2, 3, dropout=0.5, seed=3)
    model = keras.Model(inputs, attention(inputs, inputs))
    step = tf.function(lambda x, y: run(model, x, y).gradients)
    seed = next(v for v in model.variables if "seed" in v.path)
    before = seed.numpy()
    for count in (1, 2):
        assert total_norm(step(*make_data(model, count=count))) > 0.0
    # The masks are the layer's own draws, so a saved model goes on with others.
    assert not np.array_equal(seed.numpy(), before)


def test_a_mask_may_be_a_list():
    model = sequence((4,), L.Dense(3))
    inputs, targets = make_data(model, count=3)
    whole = run(model, inputs, targets, mask=tf.constant([1.0, 0.0, 1.0]))
    for mask in ([1, 0, 1], [True, False, True]):
        for parts in (1, 2):
            found = run(model, inputs, targets, mask=mask, microbatches=parts)
            wanted = [g.numpy() for g in whole.gradients]
            assert distance(found.gradients, wanted) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["inputs", "targets"])
@pytest.mark.parametrize("clipping", PATHS)
def test_an_example_that_is_not_finite_counts_as_zero(clipping, where, value):
    model = sequence((6, 6, 4), L.Conv2D(4, 3), L.Flatten(), L.Dense(3))
    inputs, targets = make_data(model, count=4)
    keep = [0, 1, 3]
    expected, _ = one_by_one(
        model,
        tf.gather(inputs, keep),
        tf.gather(targets, keep),
        l2_norm=0.5,
        normalize=True,
    )
    if where == "inputs":
        inputs = tf.tensor_scatter_nd_update(inputs, [[2, 0, 0, 0]], [value])
    else:
        targets = tf.tensor_scatter_nd_update(targets, [[2, 0]], [value])
    result = run(model, inputs, targets, clipping=clipping)
    assert distance(result.gradients, expected) < 1e-5
    assert list(np.isfinite(result.norms)) == [True, True, False, True]


@pytest.mark.parametrize("clipping", ["ghost", "vectorized"])
def test_a_zero_gradient_stays_zero_when_normalised(clipping):
    model = sequence((4,), L.Dense(3))
    inputs, _ = make_data(model, count=3)
    result = run(model, inputs, model(inputs), clipping=clipping)
    assert total_norm(result.gradients) == 0.0
    np.testing.assert_array_equal(result.norms, 0.0)


@pytest.mark.parametrize("clipping", PATHS)
def test_padding_and_empty_batches_give_zeros(clipping):
    model = lenet() if clipping == "ghost" else sequence((4,), L.Dense(3))
    inputs, targets = make_data(model, count=2)
    masked = run(model, inputs, targets, mask=tf.zeros([2]), clipping=clipping)
    empty = run(model, inputs[:0], targets[:0], clipping=clipping)
    for result in (masked, empty):
        shapes = [tuple(g.shape) for g in result.gradients]
        assert shapes == [tuple(v.shape) for v in model.trainable_variables]
        assert total_norm(result.gradients) == 0.0
    assert empty.norms.shape == (0,) and empty.losses.shape == (0,)
    assert empty.outputs.shape[0] == 0


def test_a_masked_example_that_is_not_finite_counts_as_zero():
    model = residual()
    inputs, targets = make_data(model, count=3)
    clean = run(model, inputs, targets, mask=[1, 0, 1])
    broken = tf.tensor_scatter_nd_update(inputs, [[1, 0, 0, 0]], [float("nan")])
    result = run(model, broken, targets, mask=[1, 0, 1])
    assert difference(clean, result) < 1e-6
