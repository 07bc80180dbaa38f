"""What is refused, and what falls back."""

import gc
import logging
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.mechanisms.clipping import (
    BatchNormalizationError,
    Bound,
    HalfPrecisionError,
    PlaceError,
    RegularizationError,
    RowMixingError,
    UnsupportedStudentError,
    check_sampled,
    check_student,
    clipped_gradient_sum,
)
from tests.mechanisms.clipping.reference import (
    distance,
    make_data,
    one_by_one,
    squared_error,
)
from tests.mechanisms.clipping.students import (
    CONVOLUTIONS,
    OTHER_LAYERS,
    STUDENTS,
    L,
    attention,
    sequence,
)


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


def activation_that_learns():
    inner = L.PReLU()
    inner.build((None, 4))
    return sequence((6,), L.Dense(4, activation=inner), L.Dense(2))


FALL_BACK = {
    "custom": lambda: sequence((6,), L.Dense(4), Scale(), L.Dense(3)),
    "subclass": lambda: sequence((6,), Doubled(4), L.Dense(3)),
    "recurrent": lambda: sequence((2, 3), L.SimpleRNN(4, unroll=True), L.Dense(3)),
    "wrapper": lambda: sequence((4, 3), L.TimeDistributed(L.Dense(4))),
    "subclassed graph": subclassed_graph,
    "activation": activation_that_learns,
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


class OwnMask(L.Layer):
    """Attaches a mask of its own."""

    supports_masking = True

    def call(self, inputs):
        return inputs * 1.0

    def compute_mask(self, inputs, mask=None):
        return keras.ops.any(inputs > 0.5, axis=-1)


def test_attention_with_a_mask_of_a_layer_of_ones_own_falls_back():
    inputs = keras.Input((5, 6))
    x = OwnMask()(inputs)
    model = keras.Model(inputs, L.MultiHeadAttention(2, 3)(x, x))
    inputs, targets = make_data(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    result = clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)
    assert distance(result.gradients, expected) < 1e-5


def test_batch_normalization_is_refused_by_name():
    inner = sequence((4,), L.BatchNormalization(name="the_culprit"))
    with pytest.raises(BatchNormalizationError, match="the_culprit.*GroupNorm"):
        check_student(sequence((4,), L.Dense(4), inner))


def along_the_batch(function):
    return lambda: sequence((6,), L.Dense(8), L.Lambda(function), L.Dense(3))


def hidden_by_a_head_of_zeros():
    head = L.Dense(3, kernel_initializer="zeros")
    return sequence((6,), L.Dense(4), L.UnitNormalization(axis=0), head)


def with_codes_of_two_inputs():
    codes = keras.Input((3,), dtype="int32", name="codes")
    rest = keras.Input((4,), name="rest")
    mixed = L.UnitNormalization(axis=0)(L.Flatten()(L.Embedding(5, 2)(codes)))
    outputs = L.Dense(3)(L.Concatenate()([mixed, rest]))
    return keras.Model({"codes": codes, "rest": rest}, outputs)


def on_images(*layers):
    return sequence((8, 8, 3), *layers, L.Flatten(), L.Dense(3))


class RunningMean(keras.layers.Layer):
    """Takes away the mean of all rows that it ever saw."""

    def build(self, shape):
        self.mean = self.add_weight(
            shape=(shape[-1],), initializer="zeros", trainable=False
        )

    def call(self, inputs):
        outputs = inputs - keras.ops.convert_to_tensor(self.mean)
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(inputs, axis=0))
        return outputs


MIXING = {
    "centred": along_the_batch(lambda t: t - keras.ops.mean(t, axis=0)),
    "over the largest": along_the_batch(lambda t: t / tf.reduce_max(tf.abs(t))),
    "turned round": along_the_batch(lambda t: keras.ops.flip(t, axis=0)),
    "sorted": along_the_batch(lambda t: tf.sort(t, axis=0)),
    "less the first": along_the_batch(lambda t: t - t[:1]),
    "less the last": along_the_batch(lambda t: t - t[-1:]),
    "hardly": along_the_batch(lambda t: t + 1e-5 * keras.ops.mean(t, axis=0)),
    "without gradient": along_the_batch(
        lambda t: t + 0.01 * tf.stop_gradient(tf.reduce_mean(t, axis=0))
    ),
    "beside other draws": along_the_batch(
        lambda t: t * tf.random.uniform(tf.shape(t)) + tf.reduce_mean(t, axis=0)
    ),
    "unit normalisation": lambda: on_images(L.UnitNormalization(axis=0)),
    "behind zeros": hidden_by_a_head_of_zeros,
    "codes": with_codes_of_two_inputs,
    "behind dropout": lambda: sequence(
        (6,), L.Dropout(0.5), L.UnitNormalization(axis=0), L.Dense(3)
    ),
    "stateful": lambda: keras.Sequential(
        [L.Input((5, 4), batch_size=4), L.GRU(4, stateful=True), L.Dense(3)]
    ),
    "running mean": lambda: sequence((6,), RunningMean(), L.Dense(3)),
}


@pytest.mark.parametrize("name", MIXING)
def test_rows_that_mix_are_refused(name):
    model = MIXING[name]()
    with pytest.raises(RowMixingError, match="one by one.*Received.*axis 0"):
        check_student(model)


@pytest.mark.parametrize("layer", [L.CutMix, L.MixUp])
def test_layers_that_mix_in_some_draws_are_refused_by_name(layer):
    with pytest.raises(RowMixingError, match="the_culprit"):
        check_student(on_images(layer(seed=1, name="the_culprit")))


@pytest.mark.parametrize("compiles", [False, True])
def test_rows_that_mix_are_refused_in_a_graph_too(compiles):
    model = MIXING["centred"]()
    inputs, targets = make_data(model)
    with pytest.raises(RowMixingError):
        tf.function(
            lambda: clipped_gradient_sum(
                model, inputs, targets, squared_error, l2_norm=1.0
            ),
            autograph=False,  # which words errors anew
            jit_compile=compiles,
        )()


def frozen_normalization():
    return on_images(L.Conv2D(4, 3), L.BatchNormalization(trainable=False))


def in_bfloat16():
    return on_images(
        L.Conv2D(8, 3, activation="relu", dtype="mixed_bfloat16"),
        L.GroupNormalization(2, dtype="mixed_bfloat16"),
    )


def with_codes_as_numbers():
    return sequence((6,), L.Embedding(7, 4), L.Flatten(), L.Dense(3))


# Alone in every respect.
PLAIN = {
    **{name: OTHER_LAYERS[name] for name in ("nested", "attention", "embedding")},
    **{name: OTHER_LAYERS[name] for name in ("partly frozen", "shared embedding")},
    **{name: CONVOLUTIONS[name] for name in ("same", "groups", "unknown size")},
    "frozen batch normalisation": frozen_normalization,
    "bfloat16": in_bfloat16,
    "codes as numbers": with_codes_as_numbers,
    "recurrent": lambda: sequence((5, 4), L.Bidirectional(L.LSTM(3)), L.Dense(3)),
    "dropout of rate 0": lambda: sequence((6,), L.Dropout(0.0), L.Dense(3)),
    "spectral": lambda: sequence((6,), L.SpectralNormalization(L.Dense(3))),
    "of one batch size": lambda: keras.Sequential(
        [L.Input((5,), batch_size=6), L.Dense(3)]
    ),
    "of single rows": lambda: keras.Sequential(
        [L.Input((5,), batch_size=1), L.Dense(3)]
    ),
}
# One by one, though not alike at every place of the batch.
RANDOM = {
    "dropout": lambda: sequence((6,), L.Dropout(0.5), L.Dense(3)),
    "noise": lambda: sequence((6,), L.GaussianNoise(0.5), L.Dense(3)),
    "dropout of attention": lambda: attention(dropout=0.5),
    "recurrent dropout": lambda: sequence(
        (5, 4), L.GRU(3, recurrent_dropout=0.5), L.Dense(3)
    ),
    "mirrored": lambda: on_images(L.RandomFlip()),
    "moved": lambda: on_images(L.RandomTranslation(0.3, 0.3)),
    "brightness": lambda: on_images(L.RandomBrightness(0.5, value_range=(0, 1))),
    "without a seed": along_the_batch(lambda t: t * tf.random.uniform(tf.shape(t))),
    "by place": along_the_batch(
        lambda t: t + tf.range(tf.shape(t)[0], dtype=tf.float32)[:, None]
    ),
    "by batch size": along_the_batch(lambda t: t / tf.cast(tf.shape(t)[0], t.dtype)),
}


@pytest.mark.parametrize("name", [*PLAIN, *RANDOM])
def test_rows_one_by_one_are_accepted_and_the_student_is_left_alone(name):
    model = {**PLAIN, **RANDOM}[name]()
    before = [v.numpy() for v in model.variables]
    check_student(model)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable)


@pytest.mark.parametrize("name", [n for n in STUDENTS if n not in PLAIN])
def test_no_layer_of_keras_is_taken_for_mixing_or_random(name):
    check_sampled(STUDENTS[name](), "")


@pytest.mark.parametrize("name", PLAIN)
def test_rows_may_be_sampled_where_they_do_not_go_by_place(name):
    check_sampled(PLAIN[name](), "")


@pytest.mark.parametrize("name", RANDOM)
def test_rows_that_go_by_place_are_not_sampled(name):
    with pytest.raises(PlaceError, match="rows are sampled.*Received.*Do without"):
        check_sampled(RANDOM[name](), "Do without.")


def test_random_layers_are_named():
    model = sequence((6,), L.Dropout(0.5, name="the_culprit"), L.Dense(3))
    with pytest.raises(PlaceError, match=r"layer 'the_culprit' \(Dropout\)"):
        check_sampled(model, "")


def test_a_student_is_tried_once(monkeypatch):
    model = sequence((6,), L.Dense(3))
    check_student(model)
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: pytest.fail())
    check_student(model)


def test_a_student_that_is_made_anew_is_tried_anew():
    model = sequence((6,), L.Dense(4), L.Dense(3))
    check_student(model)
    model.pop()
    model.add(L.Lambda(lambda t: t - keras.ops.mean(t, axis=0)))
    with pytest.raises(RowMixingError):
        check_student(model)


def test_what_is_known_of_a_student_does_not_keep_it():
    model = sequence((6,), sequence((6,), L.Dense(4)), L.Dense(3))
    inputs, targets = make_data(model)
    clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=1.0)
    gone = weakref.ref(model)
    del model
    keras.backend.clear_session()
    gc.collect()
    assert gone() is None


def test_a_student_that_takes_no_random_rows_is_warned_of(caplog):
    words = keras.Input((1,), dtype="string")
    codes = L.StringLookup(vocabulary=["a", "b"])(words)
    model = keras.Model(words, L.Dense(3)(L.Embedding(3, 2)(codes)), name="of_words")
    with caplog.at_level(logging.WARNING, "dp_transcribe"):
        check_student(model)
    assert "'of_words' cannot be tried" in caplog.text


def test_replicas_students_are_tried_where_they_are_made():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        check_student(sequence((6,), L.Dropout(0.5), L.Dense(3)))
        mixing = MIXING["centred"]()
        with pytest.raises(RowMixingError):
            check_student(mixing)


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


def first(layer, shape, *arguments, **more):
    return sequence(shape, layer(*arguments, data_format="channels_first", **more))


CHANNELS_FIRST = {
    "conv": lambda **more: first(L.Conv2D, (3, 5, 5), 4, 2, **more),
    "conv 1-D": lambda **more: first(L.Conv1D, (3, 6), 4, 3, **more),
    "depthwise": lambda **more: first(L.DepthwiseConv2D, (4, 4, 5), 2, **more),
    "depthwise 1-D": lambda **more: first(L.DepthwiseConv1D, (4, 5), 2, **more),
    "separable": lambda **more: first(L.SeparableConv2D, (3, 5, 5), 4, 2, **more),
    "separable 1-D": lambda **more: first(L.SeparableConv1D, (3, 5), 4, 2, **more),
    "transposed": lambda **more: first(L.Conv2DTranspose, (3, 3, 3), 4, 2, **more),
    "transposed 1-D": lambda **more: first(L.Conv1DTranspose, (3, 3), 4, 2, **more),
}


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_a_bias_that_keras_may_add_along_another_axis_is_refused(name):
    model = CHANNELS_FIRST[name]()
    inputs, targets = make_data(model)
    with pytest.raises(UnsupportedStudentError, match="4 of both.*use_bias=False"):
        clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)


@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_channels_first_of_one_size_without_bias(name):
    model = CHANNELS_FIRST[name](use_bias=False)
    inputs, targets = make_data(model)
    expected, _ = one_by_one(model, inputs, targets, l2_norm=0.3)
    result = clipped_gradient_sum(model, inputs, targets, squared_error, l2_norm=0.3)
    assert distance(result.gradients, expected) < 1e-5
