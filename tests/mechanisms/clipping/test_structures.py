"""Models of several inputs and outputs: what is given goes where Keras puts it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import clipped_gradient_sum
from tests.mechanisms.clipping.reference import distance, squared_error
from tests.mechanisms.clipping.students import L, sequence

PATHS = ["ghost", "vectorized", "tf_privacy"]
VALUES = {"b": np.full((3, 2), 2.0), "a": np.full((3, 2), -1.0)}
ROWS = {
    k: tf.constant(v * np.arange(1, 4)[:, None], "float32") for k, v in VALUES.items()
}


def plain(model, inputs, targets, loss_fn):
    """The gradient of the sum, of what the model makes of its inputs by itself."""
    variables = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loss_fn(targets, model(inputs, training=True)))
    return [g.numpy() for g in tape.gradient(loss, variables)]


def check(model, inputs, targets, loss_fn=squared_error, **arguments):
    expected = plain(model, inputs, targets, loss_fn)
    result = clipped_gradient_sum(
        model, inputs, targets, loss_fn, l2_norm=float("inf"), **arguments
    )
    assert distance(result.gradients, expected) < 1e-5
    outputs = model(inputs)
    tf.nest.assert_same_structure(result.outputs, outputs)
    for made, wanted in zip(
        tf.nest.flatten(result.outputs), tf.nest.flatten(outputs), strict=True
    ):
        np.testing.assert_allclose(made, wanted, rtol=1e-5)


def of_two(structure):
    """A model in which it matters which input is which."""
    leaves = {name: keras.Input((2,), name=name) for name in ("b", "a")}
    x = L.Concatenate()([leaves["b"], L.Dense(2, activation="tanh")(leaves["a"])])
    return keras.Model(structure(leaves), L.Dense(3)(x))


BUILT_OF = {
    "list": lambda x: [x["b"], x["a"]],
    "tuple": lambda x: (x["b"], x["a"]),
    "dict": lambda x: {"b": x["b"], "a": x["a"]},
}


@pytest.mark.parametrize("clipping", PATHS)
@pytest.mark.parametrize(
    ("built_of", "given"),
    [("list", "list"), ("list", "dict"), ("tuple", "dict"), ("dict", "dict")],
)
def test_inputs_go_where_keras_puts_them(built_of, given, clipping):
    model = of_two(BUILT_OF[built_of])
    inputs = BUILT_OF[given](ROWS)
    check(model, inputs, tf.ones([3, 3]), clipping=clipping)


def test_what_keras_refuses_is_refused():
    model = of_two(BUILT_OF["dict"])
    with pytest.raises(ValueError, match="structure of `inputs`"):
        clipped_gradient_sum(
            model, BUILT_OF["list"](ROWS), tf.ones([3, 3]), squared_error, l2_norm=1.0
        )


def test_a_single_input_may_be_named():
    inputs = keras.Input((2,), name="a")
    check(keras.Model(inputs, L.Dense(3)(inputs)), {"a": ROWS["a"]}, tf.ones([3, 3]))
    check(keras.Model([inputs], L.Dense(3)(inputs)), ROWS["a"], tf.ones([3, 3]))


def of_heads(structure):
    inputs = keras.Input((2,))
    x = L.Dense(4, activation="tanh")(inputs)
    return keras.Model(inputs, structure(L.Dense(3)(x), L.Dense(1)(x)))


HEADS = {
    "dict": lambda first, second: {"z": first, "y": second},
    "list": lambda first, second: [first, second],
    "nested": lambda first, second: {"z": [first], "y": (second,)},
    "list of one": lambda first, second: [first],
}


def over_heads(targets, outputs):
    """Another weight for each head, by its place in Keras' own structure."""
    errors = [
        (place + 1.0) * tf.reduce_sum((leaf - targets) ** 2, axis=1)
        for place, leaf in enumerate(keras.tree.flatten(outputs))
    ]
    return tf.add_n(errors)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("clipping", PATHS)
@pytest.mark.parametrize("heads", HEADS)
def test_outputs_have_the_structure_of_the_model(heads, clipping, microbatches):
    model = of_heads(HEADS[heads])
    arguments = {"clipping": clipping, "microbatches": microbatches}
    check(model, ROWS["a"], tf.ones([3, 1]), over_heads, **arguments)


def test_heads_are_taken_by_name():
    model = of_heads(HEADS["dict"])

    def loss_fn(targets, outputs):
        return squared_error(targets, outputs["z"]) + tf.abs(outputs["y"][:, 0])

    check(model, ROWS["a"], tf.ones([3, 3]), loss_fn)


def test_a_nested_model_of_named_inputs():
    inner = of_two(BUILT_OF["dict"])
    inputs = keras.Input((4,))
    outputs = inner({"a": inputs[:, :2], "b": inputs[:, 2:]})
    model = keras.Model(inputs, sequence((3,), L.Dense(2))(outputs))
    check(model, tf.random.normal([3, 4]), tf.ones([3, 2]))
