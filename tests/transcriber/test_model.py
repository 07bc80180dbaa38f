"""What a transcriber shows, asks and states."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.mechanisms import (
    NoisyAnswer,
    NormalizedGradient,
    RandomizedResponse,
)
from dp_transcribe.queries import FreshQueries
from tests import tiny
from tests.tiny import epsilon, fit, releases


def test_metrics_of_gradients_come_from_the_noisy_release_alone():
    """Same queries, student and teacher: only the noise tells two runs apart."""

    def first_logs(seed, noise):
        model = tiny.transcriber(
            NormalizedGradient(noise_multiplier=noise),
            generator=tiny.SinglePixels(tiny.IMAGE),
            seed=seed,
        )
        history = fit(model).history
        assert set(history) == {"agreement", "student_loss", "epsilon"}
        return np.array([history["agreement"][0], history["student_loss"][0]])

    assert np.array_equal(first_logs(1, 0.0), first_logs(2, 0.0))
    assert np.all(np.abs(first_logs(1, 4.0) - first_logs(2, 4.0)) > 1e-3)


def test_agreement_with_answers_is_with_the_released_ones():
    """At a tiny epsilon even a perfect student agrees with one answer in ten."""
    model = tiny.transcriber(
        RandomizedResponse(epsilon=1e-3),
        queries=FreshQueries(batch_size=512),
        optimizer=keras.optimizers.SGD(0.0),
    )
    # Put in afterwards: a student that begins with the teacher's weights is refused.
    model.student.set_weights(tiny.linear_model(5).get_weights())
    assert 0.05 < fit(model).history["agreement"][0] < 0.16


def test_validation_evaluates_the_student():
    model = tiny.transcriber(compile_arguments={"metrics": ["accuracy"]}, eager=False)
    images = np.random.default_rng(0).random((20, *tiny.IMAGE)).astype(np.float32)
    labels = np.argmax(model.student.predict(images, verbose=0), -1)
    results = model.evaluate(images, labels, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy"} and results["accuracy"] == 1.0
    history = fit(model, 2, validation_data=(images, labels)).history
    assert {"val_loss", "val_accuracy"} <= set(history)
    np.testing.assert_allclose(
        model.predict(images, verbose=0), model.student.predict(images, verbose=0)
    )


def test_the_teacher_is_never_trained_or_listed():
    teacher = tiny.linear_teacher()
    before = [w.copy() for w in teacher.get_weights()]
    model = tiny.transcriber(teacher=teacher)
    fit(model, 3)
    for old, new in zip(before, teacher.get_weights(), strict=True):
        assert np.array_equal(old, new)
    ours = {id(v) for v in model.variables}
    assert not ours & {id(v) for v in teacher.model.variables}


def test_the_generator_learns_from_the_student_and_never_asks_the_teacher():
    asked = []

    def answer(images):
        asked.append(len(images))
        return tiny.linear_model(5)(images)

    teacher = dpt.Teacher(answer, input_shape=tiny.IMAGE, outputs="logits")
    model = tiny.transcriber(
        teacher=teacher,
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        generator_updates=3,
        generator_batch_size=24,
    )
    asked.clear()
    before = tiny.flat_weights(model.generator)
    history = fit(model, 2).history
    assert asked == [16, 16]
    assert not np.array_equal(before, tiny.flat_weights(model.generator))
    assert np.all(np.isfinite(history["generator_loss"]))
    assert releases(model) == 2


def test_a_public_prior_makes_its_share_of_the_queries():
    model = tiny.transcriber(
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        public_prior=tiny.SinglePixels(tiny.IMAGE),
        public_share=0.75,
    )
    images = model.draw_queries(16, tf.constant([1, 2])).numpy()
    assert images.shape == (16, *tiny.IMAGE)
    assert np.sum(images.sum((1, 2, 3)) == 1) == 12
    fit(model)


def test_averaged_weights_take_the_students_place_at_the_end():
    optimizer = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5)
    model = tiny.transcriber(optimizer=optimizer)
    plain = tiny.transcriber(optimizer=keras.optimizers.SGD(1.0))
    fit(model, 4)
    fit(plain, 4)
    average = optimizer._model_variables_moving_average[0].numpy()
    np.testing.assert_allclose(model.student.get_weights()[0], average)
    assert not np.allclose(average, plain.student.get_weights()[0])


# What the teacher may be.


def test_a_saved_model_teacher_and_export_of_the_student(tmp_path):
    teacher = tiny.linear_model(5)
    module = tf.Module()
    module.model = teacher
    serve = tf.function(
        lambda image: {"logits": teacher(image)},
        input_signature=[tf.TensorSpec((None, *tiny.IMAGE), tf.float32, "image")],
    )
    tf.saved_model.save(module, str(tmp_path / "teacher"), {"serving_default": serve})
    model = tiny.transcriber(teacher=str(tmp_path / "teacher"), eager=False)
    same = tiny.transcriber(teacher=teacher, eager=False)
    for each in (model, same):
        fit(each, 3)
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(same.student), atol=1e-5
    )
    folder = dpt.export_student(model, tmp_path / "served" / "1")
    images = np.random.default_rng(0).random((5, *tiny.IMAGE)).astype(np.float32)
    served = tf.saved_model.load(str(folder)).signatures["serving_default"]
    out = served(image=tf.constant(images))
    np.testing.assert_allclose(out["logits"], model.predict(images, verbose=0), 1e-5)
    written = json.loads((folder / "assets.extra" / "statement.json").read_text())
    assert written["unit"] == "RESPONSE"
    assert written["epsilon"] == pytest.approx(epsilon(model))


def test_a_callable_teacher_of_probabilities():
    def answer(images):
        return tf.nn.softmax(tiny.linear_model(5)(images))

    teacher = dpt.Teacher(answer, input_shape=tiny.IMAGE)
    model, same = tiny.transcriber(teacher=teacher), tiny.transcriber()
    for each in (model, same):
        fit(each, 2)
    np.testing.assert_allclose(
        tiny.flat_weights(model.student), tiny.flat_weights(same.student), atol=1e-4
    )
    with pytest.raises(ValueError, match="Keras model"):
        model.get_config()


def test_a_bfloat16_student_gets_float32_noise():
    student = keras.Sequential(
        [
            keras.layers.Input(tiny.IMAGE),
            keras.layers.Flatten(),
            keras.layers.Dense(tiny.CLASSES, dtype="mixed_bfloat16"),
        ]
    )
    model = tiny.transcriber(student=student)
    fit(model, 2)
    assert np.all(np.isfinite(tiny.flat_weights(model.student)))


# Statement.


def test_the_statement_covers_the_student_and_names_the_seed():
    model = tiny.transcriber(seed=77)
    fit(model)
    statement = model.privacy_statement()
    assert "student" in statement.covered and "generator" in statement.covered
    assert any("teacher" in name for name in statement.not_covered)
    assert statement.noise_seed == 77 and "77" in statement.to_text()
    assert "fresh" in statement.sampling
    assert tiny.transcriber(seed=None).privacy_statement().noise_seed is None


def test_a_generator_the_teacher_guided_is_not_covered_and_not_exported(tmp_path):
    model = tiny.transcriber(generator_covered=False)
    fit(model)
    assert "generator" in model.privacy_statement().not_covered
    with pytest.raises(ValueError, match="guided by the teacher"):
        dpt.export_generator(model, tmp_path / "g")


def test_a_statement_before_any_release_says_zero():
    assert tiny.transcriber().privacy_statement().epsilon == 0.0


# What Keras users expect of `compile`, `fit` and `save`.


@pytest.mark.parametrize("kind", [NormalizedGradient, NoisyAnswer])
def test_embeddings_and_idle_layers_may_be_in_the_student(kind):
    inputs = keras.layers.Input(tiny.IMAGE)
    codes = keras.layers.Flatten()(keras.ops.cast(inputs * 7.0, "int32"))
    flat = keras.layers.Flatten()(keras.layers.Embedding(8, 3)(codes))
    idle = keras.layers.Dense(10)(flat)
    logits = keras.layers.Dense(10)(flat) + keras.ops.stop_gradient(idle)
    student = keras.Model(inputs, logits)
    before = [w.copy() for w in student.get_weights()]
    model = tiny.transcriber(kind(noise_multiplier=2.0), student=student)
    fit(model, 2)
    assert not np.array_equal(student.get_weights()[0], before[0])


def test_a_conditional_generator_learns():
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,), num_classes=10)
    before = tiny.flat_weights(generator)
    model = tiny.transcriber(generator=generator, generator_batch_size=8)
    fit(model, 2)
    assert not np.array_equal(tiny.flat_weights(generator), before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"loss": "categorical_crossentropy"},
        {"metrics": [keras.metrics.F1Score()]},
        {"loss": keras.losses.CategoricalCrossentropy(from_logits=True)},
    ],
)
def test_losses_and_metrics_of_one_hot_labels(arguments):
    model = tiny.transcriber(compile_arguments=arguments)
    images = np.zeros((4, *tiny.IMAGE), np.float32)
    one_hot = np.eye(10, dtype=np.float32)[[1, 2, 3, 4]]
    data = {} if "metrics" in arguments else {"validation_data": (images, one_hot)}
    history = fit(model, 2, **data).history
    assert ("val_loss" in history) == ("loss" in arguments)
    assert releases(model) == 2


@pytest.mark.parametrize(
    "mechanism",
    [NormalizedGradient(noise_multiplier=2.0), NoisyAnswer(noise_multiplier=2.0)],
)
def test_layers_thawed_before_compile_learn(mechanism):
    student = tiny.frozen_front_model()
    model = tiny.transcriber(mechanism, student=student)
    fit(model, 2)
    before = student.layers[0].get_weights()[0]
    student.layers[0].trainable = True
    model.compile(keras.optimizers.SGD(1.0), run_eagerly=True)
    fit(model, 2)
    assert not np.array_equal(student.layers[0].get_weights()[0], before)
    assert releases(model) == 4


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.SGD(0.1, loss_scale_factor=1024.0),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)),
    ],
)
def test_optimizers_that_scale_losses_are_refused(optimizer):
    with pytest.raises(ValueError, match="`student_optimizer`.*loss scaling"):
        tiny.transcriber(optimizer=optimizer)


def test_what_keras_has_under_another_name_is_named():
    model = tiny.transcriber()
    with pytest.raises(ValueError, match="`student_optimizer`"):
        model.compile(optimizer="adam")
    with pytest.raises(ValueError, match="`class_weight, x`.*its own queries"):
        model.fit(x=np.zeros(3), class_weight={0: 1.0})
    with pytest.raises(ValueError, match=r"ends in \.keras"):
        model.save("student.h5")
    with pytest.raises(ValueError, match="`delta`"):
        model.privacy_statement(delta=0)


def test_a_student_in_which_nothing_learns_is_refused():
    student = tiny.linear_model()
    student.trainable = False
    with pytest.raises(ValueError, match="weights that learn"):
        tiny.transcriber(student=student)
    model = tiny.transcriber()
    model.student.trainable = False
    with pytest.raises(ValueError, match="weights that learn"):
        fit(model, 1)
    assert releases(model) == 0
