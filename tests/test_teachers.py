import keras
import numpy as np
import pytest
import tensorflow as tf

from dp_transcribe.reference_teachers import ConvRecipe, conv_teacher
from dp_transcribe.teachers import Teacher, load_teacher

TINY = ConvRecipe(filters=(8,), units=8, epochs=1, min_steps=1)


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return conv_teacher((28, 28, 1), 10, recipe=TINY)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((20, 28, 28, 1), np.float32)


def _softmax_of(model):
    return lambda images: tf.nn.softmax(model(images, training=False))


def test_logits_and_probabilities_are_told_apart(model, images):
    from_logits = Teacher(model)
    from_probabilities = Teacher(_softmax_of(model), input_shape=(28, 28, 1))
    assert from_logits.outputs == "logits"
    assert from_probabilities.outputs == "probabilities"
    expected = tf.nn.softmax(model(images, training=False))
    for teacher in (from_logits, from_probabilities):
        answers = teacher.probabilities(images)
        np.testing.assert_allclose(answers, expected, atol=1e-5)
        np.testing.assert_allclose(
            tf.nn.log_softmax(teacher.logits(images)), tf.math.log(expected), atol=1e-4
        )


def test_logits_that_happen_to_lie_in_0_to_1_stay_logits(images):
    teacher = Teacher(lambda x: 0.3 * tf.ones([len(x), 4]), input_shape=(28, 28, 1))
    assert teacher.outputs == "logits"
    np.testing.assert_allclose(teacher.probabilities(images), 0.25, rtol=1e-6)


def test_stated_outputs_win_over_detection(images):
    uniform = Teacher(
        lambda x: tf.one_hot(tf.zeros(len(x), tf.int32), 3),
        outputs="logits",
        input_shape=(28, 28, 1),
    )
    expected = np.exp([1.0, 0.0, 0.0]) / np.exp([1.0, 0.0, 0.0]).sum()
    np.testing.assert_allclose(uniform.probabilities(images)[0], expected, rtol=1e-6)


def test_teacher_runs_in_inference_mode_and_is_left_alone(model, images):
    before = [variable.numpy() for variable in model.variables]
    trainable = [variable.path for variable in model.trainable_variables]
    teacher = Teacher(model)
    first, second = teacher.probabilities(images), teacher.probabilities(images)
    np.testing.assert_array_equal(first, second)  # no dropout
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, variable.numpy())  # no moving statistics
    assert [variable.path for variable in model.trainable_variables] == trainable
    assert model.trainable


def test_answers_carry_no_gradient_but_logits_do(model, images):
    teacher = Teacher(model)
    inputs = tf.constant(images)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        answers = tf.reduce_sum(teacher.probabilities(inputs)[:, 0])
        scores = tf.reduce_sum(teacher.logits(inputs)[:, 0])
    assert tape.gradient(answers, inputs) is None
    assert tape.gradient(answers, model.trainable_variables[0]) is None
    assert float(tf.norm(tape.gradient(scores, inputs))) > 0.0


def test_teacher_joins_no_models_variables(model):
    class Holder(keras.Model):
        def __init__(self):
            super().__init__()
            self.teacher = Teacher(model)
            self.own = keras.layers.Dense(2)

        def call(self, inputs):
            return self.own(inputs)

    holder = Holder()
    holder(tf.zeros([1, 3]))
    assert len(holder.variables) == 2


def test_predict_batches_and_accuracy_agree(model, images):
    teacher = Teacher(model)
    probabilities = teacher.predict(images.astype(np.float64), batch_size=7)
    np.testing.assert_allclose(probabilities, teacher.probabilities(images), atol=1e-6)
    labels = probabilities.argmax(-1)
    assert teacher.accuracy(images, labels) == 1.0
    assert teacher.accuracy(images, (labels + 1) % 10) == 0.0
    assert teacher.predict(images[:0]).shape == (0, 10)


@pytest.mark.parametrize("kind", ["keras", "export", "saved_model"])
def test_saved_teachers_answer_as_before(kind, model, images, tmp_path):
    path = tmp_path / ("teacher.keras" if kind == "keras" else "teacher")
    if kind == "keras":
        model.save(path)
    elif kind == "export":
        model.export(path, verbose=False)
    else:
        spec = tf.TensorSpec((None, 28, 28, 1), tf.float32, name="image")

        @tf.function(input_signature=[spec])
        def serve(image):
            logits = model(image, training=False)
            return {"logits": logits, "class": tf.argmax(logits, -1)}

        tf.saved_model.save(model, path, signatures={"serving_default": serve})
    teacher = load_teacher(path)
    assert teacher.input_shape == (28, 28, 1)
    assert teacher.num_classes == 10
    expected = Teacher(model).probabilities(images)
    np.testing.assert_allclose(teacher.probabilities(images), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["keras", "saved_model"])
def test_a_saved_teacher_of_any_size_is_told_its_size(kind, tmp_path):
    inputs = keras.layers.Input((None, None, 1))
    pooled = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 3)(inputs))
    model = keras.Model(inputs, pooled)
    path = tmp_path / ("teacher.keras" if kind == "keras" else "teacher")
    model.save(path) if kind == "keras" else model.export(path, verbose=False)
    with pytest.raises(ValueError, match="`input_shape`"):
        load_teacher(path)
    with pytest.raises(ValueError, match="`input_shape`.*own input shape"):
        load_teacher(path, input_shape=(9, 9, 3))
    teacher = load_teacher(path, input_shape=(9, 9, 1))
    assert (teacher.input_shape, teacher.num_classes) == ((9, 9, 1), 3)


def test_missing_and_damaged_files_are_named(model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.keras"):
        load_teacher(tmp_path / "nowhere.keras")
    path = tmp_path / "broken.keras"
    model.save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="broken.keras.*damaged"):
        load_teacher(path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder.*damaged"):
        load_teacher(tmp_path / "folder")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: tf.zeros(tf.shape(x)[:1]), "batch, classes"),
        (lambda x: x[:, 0, 0, :1], "two classes"),
        (lambda x: tf.zeros([1, 10]), "batch, classes"),
        (lambda x: x[:, 0, :3, 0] * np.nan, "finite"),
    ],
)
def test_what_is_no_classifier_is_refused(output, message):
    with pytest.raises(ValueError, match=message):
        Teacher(output, input_shape=(28, 28, 1))


def test_bad_arguments_are_refused(model):
    with pytest.raises(ValueError, match="`outputs`"):
        Teacher(model, outputs="scores")
    with pytest.raises(ValueError, match="`input_shape`"):
        Teacher(lambda x: x)
    with pytest.raises(ValueError, match="teacher's own input shape"):
        Teacher(model, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="`input_range`"):
        Teacher(model, input_range=(1.0, 0.0))
    with pytest.raises(ValueError, match="`model`"):
        Teacher(42)


def test_scores_in_a_dict_are_refused():
    with pytest.raises(ValueError, match="`model`.*picks its class scores"):
        Teacher(lambda x: {"logits": tf.zeros([32, 3])}, input_shape=(8, 8, 2))


def test_functions_of_arrays_are_for_eager_runs_alone():
    teacher = Teacher(
        lambda x: np.asarray(x).mean(axis=(1, 2))[:, :2], input_shape=(8, 8, 2)
    )
    with pytest.raises(ValueError, match="`teacher`.*numpy_function"):
        teacher.check_in_graph()


def test_a_function_of_arrays_may_be_wrapped():
    def forward(images):
        scores = tf.numpy_function(
            lambda x: np.stack([x.mean((1, 2, 3)), x.max((1, 2, 3))], 1),
            [images],
            tf.float32,
        )
        return tf.ensure_shape(scores, (None, 2))

    teacher = Teacher(forward, input_shape=(8, 8, 2))
    teacher.check_in_graph()
    assert teacher.num_classes == 2


def test_whole_number_pixels_need_their_range(tmp_path):
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 1), tf.uint8)])
    def serve(images):
        mean = tf.reduce_mean(tf.cast(images, tf.float32), [1, 2, 3])
        return {"logits": tf.stack([mean, -mean], 1)}

    path = str(tmp_path / "whole")
    tf.saved_model.save(module, path, signatures={"serving_default": serve})
    with pytest.raises(ValueError, match="`input_range`.*uint8.*255"):
        load_teacher(path)
    teacher = load_teacher(path, input_range=(0, 255))
    logits = teacher.logits(tf.fill([1, 4, 4, 1], 199.7))
    np.testing.assert_allclose(logits, [[200.0, -200.0]])


def test_keras_models_of_whole_number_pixels_need_their_range():
    inputs = keras.layers.Input((4, 4, 1), dtype="uint8")
    model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))
    for wrong in ((0.0, 1.0), (-255.0, 255.0)):
        with pytest.raises(ValueError, match="`input_range`.*uint8"):
            Teacher(model, input_range=wrong)
    assert Teacher(model, input_range=(0.0, 255.0)).num_classes == 3


def test_a_shape_lost_in_numpy_is_found_again():
    def forward(images):
        return tf.numpy_function(lambda x: x[:, 0, 0, :3], [images], tf.float32)

    teacher = Teacher(forward, input_shape=(4, 4, 3))
    traced = tf.function(teacher.probabilities).get_concrete_function(
        tf.TensorSpec((None, 4, 4, 3))
    )
    assert traced.output_shapes.as_list() == [None, 3]
