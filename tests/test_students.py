import keras
import numpy as np
import pytest

from dp_transcribe.ensembles import TeacherEnsemble
from dp_transcribe.students import (
    batch_norm_layers,
    check_ends_in_logits,
    check_student,
    conv_student,
    lenet_student,
    mlp_student,
    replace_batch_norm,
    split_frozen,
)
from dp_transcribe.teachers import Teacher
from dp_transcribe.wavelets import wavelet_student

layers = keras.layers
SHAPE = (12, 12, 1)


def _batch_norm_model():
    block = keras.Sequential(
        [
            layers.Input((10, 10, 12)),
            layers.Conv2D(6, 3),
            layers.BatchNormalization(name="inner_norm"),
        ],
        name="block",
    )
    inputs = keras.Input(SHAPE)
    hidden = layers.Conv2D(12, 3)(inputs)
    hidden = layers.BatchNormalization(scale=False, name="outer_norm")(hidden)
    hidden = layers.Flatten()(block(hidden))
    return keras.Model(inputs, layers.Dense(4)(hidden))


@pytest.fixture(scope="module")
def teacher():
    return Teacher(mlp_student(SHAPE, 4, units=[8]))


@pytest.mark.parametrize("build", [lenet_student, mlp_student, conv_student])
@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3)])
def test_students_end_in_logits_and_pass_the_check(build, shape):
    student = build(shape, 7)
    assert student.output_shape == (None, 7)
    check_student(student, Teacher(mlp_student(shape, 7, units=[4])))


def test_lenet_is_the_small_network_of_the_paper():
    assert lenet_student((28, 28, 1), 10).count_params() == 26010


def test_conv_student_without_normalisation_has_none():
    kinds = {type(layer) for layer in conv_student((28, 28, 1), 10, groups=None).layers}
    assert layers.GroupNormalization not in kinds


def test_replace_batch_norm_keeps_the_other_weights_and_the_old_model():
    keras.utils.set_random_seed(0)
    model = _batch_norm_model()
    before = model.get_weights()
    copy = replace_batch_norm(model, groups=8)
    assert batch_norm_layers(model) == ["outer_norm", "inner_norm"]
    assert batch_norm_layers(copy) == []
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    old = {v.path: v.numpy() for v in model.variables if "norm" not in v.path}
    new = {v.path: v.numpy() for v in copy.variables if "norm" not in v.path}
    assert old.keys() == new.keys()
    for path in old:
        np.testing.assert_array_equal(old[path], new[path])
    assert not {id(v) for v in model.variables} & {id(v) for v in copy.variables}


def test_replaced_layers_use_groups_that_divide_and_keep_their_options():
    copy = replace_batch_norm(_batch_norm_model(), groups=8)
    outer, block = copy.get_layer("outer_norm"), copy.get_layer("block")
    inner = block.get_layer("inner_norm")
    assert (outer.groups, inner.groups) == (6, 6)  # of 12 and 6 channels
    assert not outer.scale
    assert inner.scale


def test_a_replaced_model_treats_examples_one_by_one():
    copy = replace_batch_norm(_batch_norm_model())
    images = np.random.default_rng(0).random((5, *SHAPE), np.float32)
    together = copy(images, training=True)
    alone = copy(images[2:3], training=True)
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


def test_batch_norm_is_refused_by_name(teacher):
    with pytest.raises(ValueError, match="inner_norm.*replace_batch_norm"):
        check_student(_batch_norm_model(), teacher)
    check_student(replace_batch_norm(_batch_norm_model()), teacher)


def test_shapes_must_match_the_teachers(teacher):
    with pytest.raises(ValueError, match="input shape"):
        check_student(mlp_student((14, 14, 1), 4), teacher)
    with pytest.raises(ValueError, match="4 logits"):
        check_student(mlp_student(SHAPE, 5), teacher)
    with pytest.raises(ValueError, match="built Functional or Sequential"):
        check_student(keras.Sequential([layers.Dense(4)]), teacher)


def test_a_student_that_ends_in_probabilities_is_refused(teacher):
    softmax = layers.Dense(4, activation="softmax")
    student = keras.Sequential([layers.Input(SHAPE), layers.Flatten(), softmax])
    with pytest.raises(ValueError, match="ending in logits"):
        check_student(student, teacher)
    student = keras.Sequential([mlp_student(SHAPE, 4), layers.Softmax()])
    with pytest.raises(ValueError, match="ending in logits"):
        check_student(student, teacher)


def test_shared_weights_are_refused(teacher):
    inputs = keras.Input(SHAPE)
    flat = layers.Flatten()(inputs)
    shared = teacher.model.layers[1](flat)
    student = keras.Model(inputs, layers.Dense(4)(shared))
    with pytest.raises(ValueError, match="shares no weights"):
        check_student(student, teacher)
    with pytest.raises(ValueError, match="shares no weights"):
        check_student(teacher.model, teacher)


def _copy(model):
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def test_copies_of_the_teachers_weights_are_refused(teacher):
    with pytest.raises(ValueError, match="not the teacher's.*dense"):
        check_student(_copy(teacher.model), teacher)
    inputs = keras.Input(SHAPE)
    hidden = layers.Dense(8, trainable=False)
    student = keras.Model(inputs, layers.Dense(4)(hidden(layers.Flatten()(inputs))))
    check_student(student, teacher)
    hidden.set_weights(teacher.model.layers[1].get_weights())
    with pytest.raises(ValueError, match="Start it anew"):
        check_student(student, teacher)


def test_a_student_made_of_the_teacher_by_replace_batch_norm_is_refused():
    model = _batch_norm_model()
    with pytest.raises(ValueError, match="not the teacher's"):
        check_student(replace_batch_norm(model), Teacher(model))
    fresh = keras.models.clone_model(model)
    check_student(replace_batch_norm(fresh), Teacher(model))


def test_a_teacher_that_is_frozen_as_a_whole_is_compared_all_the_same():
    model = mlp_student(SHAPE, 4, units=[8])
    model.trainable = False
    with pytest.raises(ValueError, match="not the teacher's"):
        check_student(_copy(model), Teacher(model))


def test_a_copy_in_bfloat16_is_known():
    model = mlp_student(SHAPE, 4, units=[8])
    parts = [layers.Flatten(), *(layers.Dense(n, dtype="bfloat16") for n in (8, 4))]
    student = keras.Sequential([layers.Input(SHAPE), *parts])
    check_student(student, Teacher(model))
    student.set_weights(model.get_weights())
    with pytest.raises(ValueError, match="not the teacher's"):
        check_student(student, Teacher(model))


def test_copies_of_one_member_of_an_ensemble_are_refused():
    members = [mlp_student(SHAPE, 4, units=[8]) for _ in range(3)]
    weights = zip(*(member.get_weights() for member in members), strict=True)
    ensemble = TeacherEnsemble(members[0], [np.stack(one) for one in weights])
    check_student(mlp_student(SHAPE, 4, units=[8]), ensemble)
    with pytest.raises(ValueError, match="not the teacher's"):
        check_student(_copy(members[2]), ensemble)


def test_constants_and_frozen_filters_may_be_equal():
    """Wavelets and whitening of public images, scales of 1 and offsets of 0."""
    shape = (16, 16, 1)
    images = np.random.default_rng(0).random((30, *shape), np.float32)

    def made():
        return wavelet_student(shape, 4, public_images=images, directions=20)

    student, teacher = made(), made()
    pairs = zip(student.get_weights(), teacher.get_weights(), strict=True)
    assert sum(np.array_equal(own, private) for own, private in pairs) >= 8
    check_student(student, Teacher(teacher))
    check_student(conv_student(shape, 4), Teacher(conv_student(shape, 4)))


def test_variables_of_a_function_of_tensors_are_found_of_arrays_not():
    model = mlp_student(SHAPE, 4, units=[8])
    with pytest.raises(ValueError, match="not the teacher's"):
        check_student(_copy(model), Teacher(lambda x: model(x), input_shape=SHAPE))
    of_arrays = Teacher(lambda x: model(x.numpy()), input_shape=SHAPE)
    assert of_arrays.read_variables() == []
    check_student(_copy(model), of_arrays)


def test_float16_is_refused_and_bfloat16_allowed(teacher):
    def build(policy):
        return keras.Sequential(
            [
                layers.Input(SHAPE),
                layers.Flatten(),
                layers.Dense(8, dtype=policy, name="hidden"),
                layers.Dense(4),
            ]
        )

    for policy in ("mixed_float16", "float16"):
        with pytest.raises(ValueError, match="float16.*hidden"):
            check_student(build(policy), teacher)
    check_student(build("mixed_bfloat16"), teacher)


def _two_part(*front):
    inputs = layers.Input((6,))
    x = inputs
    for layer in front:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Dense(5, "relu")(x)))


def _frozen(units=4):
    return layers.Dense(units, "tanh", trainable=False)


def test_split_gives_two_models_that_follow_one_another():
    student = _two_part(_frozen(), _frozen(7))
    front, head = split_frozen(student)
    rows = np.random.default_rng(0).normal(size=(9, 6)).astype("float32")
    np.testing.assert_allclose(head(front(rows)), student(rows), rtol=1e-6)
    assert front.output_shape == (None, 7)
    assert {id(v) for v in head.trainable_variables} == {
        id(v) for v in student.trainable_variables
    }


def test_split_of_a_sequential_student_shares_its_weights():
    student = keras.Sequential([layers.Input((6,)), _frozen(), layers.Dense(3)])
    _, head = split_frozen(student)
    student.layers[-1].set_weights([np.ones((4, 3)), np.ones(3)])
    np.testing.assert_allclose(head(np.ones((1, 4), "float32")), [[5.0, 5.0, 5.0]])


@pytest.mark.parametrize(
    "student",
    [
        lambda: lenet_student((28, 28, 1), 4),
        lambda: _two_part(),
        lambda: _two_part(layers.Dense(4), _frozen()),
        lambda: _two_part(_frozen(), layers.Dropout(0.5)),
        lambda: keras.Sequential([layers.Input((6,)), _frozen()]),
    ],
)
def test_nothing_is_split_that_is_not_frozen_alike_for_every_update(student):
    assert split_frozen(student()) is None


def test_nothing_is_split_where_two_tensors_pass():
    inputs = layers.Input((6,))
    frozen = _frozen()(inputs)
    both = layers.Concatenate()([layers.Dense(4)(frozen), inputs])
    assert split_frozen(keras.Model(inputs, layers.Dense(3)(both))) is None


def test_a_softmax_is_found_inside_and_as_an_operation():
    def linear():
        stack = [layers.Input(SHAPE), layers.Flatten(), layers.Dense(4)]
        return keras.Sequential(stack)

    inputs = layers.Input(SHAPE)
    inner = keras.Sequential([linear(), layers.Softmax()])
    nested = keras.Model(inputs, keras.Sequential([inner])(inputs))
    operation = keras.Model(inputs, keras.ops.softmax(linear()(inputs)))
    for student in (nested, operation):
        with pytest.raises(ValueError, match="ending in logits"):
            check_ends_in_logits("student", student)
    check_ends_in_logits("student", keras.Sequential([linear()]))
