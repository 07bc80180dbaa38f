"""Every path gives the sum that the definition gives, for every layer."""

import itertools
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import clipped_gradient_sum, convolution
from dp_transcribe.mechanisms.clipping.plan import unsupported_layer
from tests.mechanisms.clipping.reference import (
    compiled,
    distance,
    make_data,
    one_by_one,
    squared_error,
    total_norm,
)
from tests.mechanisms.clipping.students import (
    STUDENTS,
    lenet,
    nested,
    sequence,
)

L = keras.layers
TOLERANCE = 1e-5


def make(name):
    keras.utils.set_random_seed(1)
    model = STUDENTS[name]()
    if name != "unknown size":
        return model, *make_data(model)
    random = np.random.default_rng(0)
    inputs = tf.constant(random.normal(size=(5, 6, 7, 3)), tf.float32)
    return model, inputs, tf.constant(random.normal(size=(5, 4)), tf.float32)


def bounded_sum(model, **arguments):
    return lambda x, y: clipped_gradient_sum(model, x, y, squared_error, **arguments)


def check_against_the_definition(name, arguments):
    model, inputs, targets = make(name)
    expected, norms = one_by_one(model, inputs, targets, **arguments)
    run = compiled(bounded_sum(model, **arguments), inputs, targets)
    result = run(inputs, targets)
    assert distance(result.gradients, expected) < TOLERANCE
    np.testing.assert_allclose(result.norms, norms, rtol=TOLERANCE)
    return model, inputs, result


@pytest.mark.parametrize("name", STUDENTS)
def test_one_pass_is_the_sum_of_normalised_gradients(name):
    arguments = {"l2_norm": 0.7, "normalize": True}
    model, inputs, result = check_against_the_definition(name, arguments)
    assert unsupported_layer(model) is None
    np.testing.assert_allclose(result.outputs, model(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clipping", ["ghost", "vectorized", "tf_privacy"])
def test_only_gradients_above_the_clip_norm_are_scaled(clipping):
    model, inputs, targets = make("dense")
    _, norms = one_by_one(model, inputs, targets, l2_norm=1.0)
    arguments = {"l2_norm": float(np.median(norms)), "clipping": clipping}
    expected, _ = one_by_one(model, inputs, targets, l2_norm=arguments["l2_norm"])
    result = bounded_sum(model, **arguments)(inputs, targets)
    assert distance(result.gradients, expected) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["folded", "dense", "embedding", "attention", "residual"]
)
@pytest.mark.parametrize("clipping", ["vectorized", "tf_privacy"])
def test_reference_paths_agree(name, clipping):
    model, inputs, targets = make(name)
    arguments = {"l2_norm": 0.7, "normalize": True}
    expected, norms = one_by_one(model, inputs, targets, **arguments)
    run = compiled(bounded_sum(model, clipping=clipping, **arguments), inputs, targets)
    result = run(inputs, targets)
    assert distance(result.gradients, expected) < TOLERANCE
    np.testing.assert_allclose(result.norms, norms, rtol=TOLERANCE)


# TF-Privacy sums gradients of grouped convolutions wrongly; its path refuses them.
GROUPED = ["groups", "one dimension"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clipping", "name"),
    [
        *itertools.product(["vectorized"], STUDENTS),
        *itertools.product(["tf_privacy"], sorted({*STUDENTS} - {*GROUPED})),
    ],
)
def test_reference_paths_agree_on_every_layer(name, clipping):
    test_reference_paths_agree(name, clipping)


def test_infinite_clip_norm_gives_the_plain_gradient():
    model = lenet()
    inputs, targets = make_data(model, count=6)
    result = clipped_gradient_sum(
        model, inputs, targets, squared_error, l2_norm=float("inf")
    )
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(squared_error(targets, model(inputs, training=True)))
    expected = [g.numpy() for g in tape.gradient(loss, variables)]
    assert distance(result.gradients, expected) < TOLERANCE


def test_parts_of_the_batch_change_nothing(monkeypatch):
    model = lenet()
    inputs, targets = make_data(model, count=7)
    run = bounded_sum(model, l2_norm=0.5)
    whole = compiled(run, inputs, targets)(inputs, targets)
    monkeypatch.setattr(convolution, "PART", 2**17)
    parts = compiled(run, inputs, targets)(inputs, targets)
    assert distance(parts.gradients, whole.gradients) < TOLERANCE


@pytest.mark.parametrize(
    ("clipping", "microbatches"),
    [("ghost", 2), ("ghost", 3), ("ghost", 20), ("vectorized", 3)],
)
def test_microbatches_change_nothing(clipping, microbatches):
    model = sequence((4, 4, 2), L.Conv2D(3, 2), L.Flatten(), L.Dense(3))
    inputs, targets = make_data(model, count=7)
    mask = tf.constant([1, 1, 0, 1, 1, 1, 0])

    def run(parts):
        return clipped_gradient_sum(
            model,
            inputs,
            targets,
            squared_error,
            l2_norm=0.5,
            mask=mask,
            clipping=clipping,
            microbatches=parts,
        )

    whole, parts = run(1), tf.function(run)(microbatches)
    assert distance(parts.gradients, whole.gradients) < TOLERANCE
    for name in ("norms", "losses", "outputs"):
        np.testing.assert_allclose(
            getattr(parts, name), getattr(whole, name), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("microbatches", [2, 7])
def test_microbatches_under_xla(microbatches):
    model = sequence((6,), L.Dense(5, activation="tanh"), L.Dense(3))
    inputs, targets = make_data(model, count=5)
    expected, norms = one_by_one(model, inputs, targets, l2_norm=0.1)
    run = bounded_sum(model, l2_norm=0.1, microbatches=microbatches)
    result = tf.function(run, jit_compile=True)(inputs, targets)
    assert distance(result.gradients, expected) < TOLERANCE
    np.testing.assert_allclose(result.norms, norms, rtol=TOLERANCE)
    np.testing.assert_allclose(result.outputs, model(inputs), rtol=1e-4, atol=1e-5)


def test_a_microbatch_begins_when_the_one_before_it_is_done():
    # Otherwise the activations of both are held at once, and nothing is saved.
    model = sequence((8, 8, 2), L.Conv2D(4, 3), L.Flatten(), L.Dense(3))
    inputs, targets = make_data(model, count=6)
    seen = []

    def noted(event, tensor):
        def note(values):
            if event == "backward":
                time.sleep(0.02)  # room for the next one to begin too early
            seen.append(event)
            return values

        return tf.ensure_shape(
            tf.numpy_function(note, [tensor], tensor.dtype), tensor.shape
        )

    @tf.custom_gradient
    def marked(outputs):
        return noted("forward", outputs), lambda delta: noted("backward", delta)

    @tf.function
    def run():
        return clipped_gradient_sum(
            model,
            inputs,
            targets,
            lambda y, outputs: squared_error(y, marked(outputs)),
            l2_norm=0.5,
            microbatches=3,
        ).gradients

    for _ in range(3):
        run()
    assert seen == ["forward", "backward"] * 9


def test_a_batch_of_one_and_a_partial_batch():
    model = nested()
    inputs, targets = make_data(model, count=5)
    run = compiled(bounded_sum(model, l2_norm=0.1), inputs, targets)
    for count in (1, 3, 5):
        expected, _ = one_by_one(model, inputs[:count], targets[:count], l2_norm=0.1)
        gradients = run(inputs[:count], targets[:count]).gradients
        assert distance(gradients, expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDENTS)
def test_one_row_padding_and_rows_that_are_not_finite(name):
    model, inputs, targets = make(name)
    arguments = {"l2_norm": 0.5, "normalize": True}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, *inputs.shape[1:]], inputs.dtype),
            tf.TensorSpec([None, *targets.shape[1:]], targets.dtype),
            tf.TensorSpec([None]),
        ]
    )
    def run(x, y, mask):
        return bounded_sum(model, mask=mask, **arguments)(x, y).gradients

    def check(rows, x, y, mask):
        expected, _ = one_by_one(
            model, tf.gather(inputs, rows), tf.gather(targets, rows), **arguments
        )
        found = run(x, y, tf.constant(mask, tf.float32))
        assert distance(found, expected) < TOLERANCE

    check([2], inputs[2:3], targets[2:3], [1])
    check([0, 3], inputs, targets, [1, 0, 0, 1, 0])
    lost = np.where(np.arange(5) == 3, np.nan, 0.0).astype(np.float32)
    broken = targets + tf.reshape(lost, [5] + [1] * (targets.shape.rank - 1))
    check([0, 1, 2, 4], inputs, broken, [1, 1, 1, 1, 1])
    if inputs.dtype.is_floating:
        broken = inputs + tf.reshape(lost, [5] + [1] * (inputs.shape.rank - 1))
        check([0, 1, 2, 4], broken, targets, [1, 1, 1, 1, 1])


def test_weights_and_frozen_layers_are_read_at_each_call():
    model = sequence((6,), L.Dense(5, activation="tanh"), L.Dense(3))
    inputs, targets = make_data(model)
    clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.1)
    model.layers[0].trainable = False
    model.layers[1].kernel.assign(2.0 * model.layers[1].kernel)
    result = clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.1)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.1)
    assert len(result.gradients) == 2
    assert distance(result.gradients, expected) < TOLERANCE


def test_recording_leaves_the_student_as_it_was():
    model = nested()
    config, names = model.get_config(), [v.path for v in model.variables]
    inputs, targets = make_data(model)
    before = model(inputs)
    clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.1)
    np.testing.assert_array_equal(model(inputs), before)
    assert [v.path for v in model.variables] == names
    assert model.get_config() == config


BFLOAT16 = ["folded", "dense", "residual", "attention", "embedding"]


@pytest.mark.parametrize("name", BFLOAT16)
def test_bfloat16_sums_in_float32(name):
    """bfloat16 has 8 bits: sums agree to 1e-2 of their length, norms to 3e-2.

    The bound holds to float32, since norm and sum are made of the same numbers.
    """
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model, inputs, targets = make(name)
    finally:
        keras.config.set_dtype_policy(policy)
    arguments = {"l2_norm": 1.0, "normalize": True}
    expected, norms = one_by_one(model, inputs, targets, **arguments)
    for clipping in ("ghost", "vectorized"):
        run = bounded_sum(model, clipping=clipping, **arguments)
        result = run(inputs, targets)
        assert {t.dtype for t in (*result.gradients, *result[1:3])} == {tf.float32}
        pairs = zip(result.gradients, expected, strict=True)
        apart = total_norm([np.asarray(g) - e for g, e in pairs])
        assert apart < 1e-2 * total_norm(expected)
        np.testing.assert_allclose(result.norms, norms, rtol=3e-2)
    alone = bounded_sum(model, mask=[1, 0, 0, 0, 0], **arguments)(inputs, targets)
    assert total_norm(alone.gradients) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*STUDENTS} - {*BFLOAT16}))
def test_bfloat16_sums_in_float32_on_every_layer(name):
    test_bfloat16_sums_in_float32(name)
