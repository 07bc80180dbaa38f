"""What is refused, and what falls back."""

import logging

import keras
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import (
    BatchNormalizationError,
    Bound,
    HalfPrecisionError,
    RegularizationError,
    check_student,
    clipped_gradient_sum,
)
from tests.mechanisms.clipping.reference import (
    distance,
    make_data,
    one_by_one,
    squared_error,
)
from tests.mechanisms.clipping.students import L, sequence


class Scale(keras.layers.Layer):
    """A layer of somebody else's."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, inputs):
        return inputs * self.scale


class Doubled(L.Dense):
    """A known layer that computes something else."""

    def call(self, inputs, training=None):
        return 2.0 * super().call(inputs)


class Squared(keras.Sequential):
    """A Sequential model that is more than its graph."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training) ** 2


def subclassed_graph():
    inner = Squared([keras.Input((6,)), L.Dense(4)])
    return sequence((6,), inner, L.Dense(3))


FALL_BACK = {
    "custom": lambda: sequence((6,), L.Dense(4), Scale(), L.Dense(3)),
    "subclass": lambda: sequence((6,), Doubled(4), L.Dense(3)),
    "recurrent": lambda: sequence((2, 3), L.SimpleRNN(4, unroll=True), L.Dense(3)),
    "wrapper": lambda: sequence((4, 3), L.TimeDistributed(L.Dense(4))),
    "subclassed graph": subclassed_graph,
}


@pytest.mark.parametrize("name", FALL_BACK)
def test_an_unknown_layer_falls_back_with_one_warning(name, caplog):
    model = FALL_BACK[name]()
    inputs, targets = make_data(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        for _ in range(2):
            result = clipped_gradient_sum(
                model, inputs, targets, squared_error, l2_norm=0.3
            )
    assert distance(result.gradients, expected) < 1e-5
    warnings = [
        r.getMessage() for r in caplog.records if "falls back" in r.getMessage()
    ]
    assert len(warnings) == 1
    assert f"'{model.layers[1 if name == 'custom' else 0].name}'" in warnings[0]


def test_attention_with_a_mask_of_an_embedding_falls_back():
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(4, 6, mask_zero=True)(inputs)
    model = keras.Model(inputs, L.MultiHeadAttention(2, 3)(x, x))
    inputs, targets = make_data(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    result = clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)
    assert distance(result.gradients, expected) < 1e-5


def test_batch_normalization_is_refused_by_name():
    inner = sequence((4,), L.BatchNormalization(name="the_culprit"))
    with pytest.raises(BatchNormalizationError, match="the_culprit.*GroupNorm"):
        check_student(sequence((4,), L.Dense(4), inner))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Dense(3, kernel_regularizer="l2"),
        lambda: L.Dense(3, activity_regularizer="l2"),
    ],
)
def test_regularisation_over_the_batch_is_refused(layer):
    with pytest.raises(RegularizationError, match="inside the per-example loss"):
        check_student(sequence((4,), layer()))


def test_float16_is_refused():
    with pytest.raises(HalfPrecisionError, match="mixed_bfloat16"):
        check_student(sequence((4,), L.Dense(3, dtype="mixed_float16")))


def test_a_student_that_is_not_built_is_refused():
    with pytest.raises(ValueError, match="built"):
        check_student(keras.Sequential([L.Dense(3)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"l2_norm": 0.0}, "l2_norm"),
        ({"l2_norm": -1.0}, "l2_norm"),
        ({"l2_norm": float("nan")}, "l2_norm"),
        ({"l2_norm": float("inf"), "normalize": True}, "l2_norm"),
        ({"l2_norm": 1.0, "clipping": "fast"}, "clipping"),
        ({"l2_norm": 1.0, "microbatches": 0}, "microbatches"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    model = sequence((4,), L.Dense(3))
    inputs, targets = make_data(model)
    with pytest.raises(ValueError, match=f"Invalid value for argument `{message}`"):
        clipped_gradient_sum(model, inputs, targets, squared_error, **arguments)


def test_grouped_convolutions_are_refused_by_the_tf_privacy_path():
    model = sequence((4, 4, 4), L.Conv2D(4, 3, groups=2))
    inputs, targets = make_data(model)
    with pytest.raises(ValueError, match="groups"):
        clipped_gradient_sum(
            model, inputs, targets, squared_error, l2_norm=1.0, clipping="tf_privacy"
        )


def test_factors_bound_every_norm():
    norms = tf.constant([0.0, 1e-30, 1e-6, 0.5, 1.0, 3.0, 1e18, float("inf")])
    squared = tf.square(norms)
    for bound in (Bound(l2_norm=0.7), Bound(l2_norm=0.7, normalize=True)):
        bounded = tf.math.multiply_no_nan(norms, bound.factors(squared))
        assert float(tf.reduce_max(bounded)) <= 0.7 * (1 + 1e-6)
