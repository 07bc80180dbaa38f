"""A private teacher's answers, handed on without noise."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe.generators import MLPGenerator
from dp_transcribe.losses.objective import GeneratorObjective
from dp_transcribe.mechanisms import Inherited
from dp_transcribe.privacy.statement import PrivacyStatement
from dp_transcribe.privacy.units import Unit
from dp_transcribe.teachers import Teacher, load_teacher
from tests import tiny
from tests.privacy.test_inheritance import STATEMENT
from tests.tiny import fit

MECHANISM = Inherited(STATEMENT)


def private_teacher(statement=STATEMENT):
    return Teacher(tiny.linear_model(5), statement=statement)


def transcriber(mechanism=MECHANISM, **kwargs):
    kwargs = {"teacher": private_teacher(), **kwargs}
    return tiny.transcriber(mechanism, **kwargs)


def test_answers_are_released_as_they_are():
    answers = tf.nn.softmax(tf.random.stateless_normal([5, 10], (1, 2)))
    released = MECHANISM.release(answers, answers, tf.zeros([2], tf.int64))
    np.testing.assert_array_equal(released.answers, answers)


def test_an_answer_that_is_not_finite_says_nothing():
    answers = tf.constant([[np.nan, 0.5], [0.25, 0.75]])
    released = MECHANISM.release(answers, answers, tf.zeros([2], tf.int64))
    np.testing.assert_allclose(released.answers, [[0.5, 0.5], [0.25, 0.75]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_loss_is_least_where_the_student_agrees(temperature):
    mechanism = Inherited(STATEMENT, temperature)
    logits = tf.random.stateless_normal([6, 10], (3, 4)) * 3.0
    answers = tf.nn.softmax(logits)
    released = mechanism.release(answers, answers, tf.zeros([2], tf.int64))
    np.testing.assert_allclose(mechanism.loss(released, logits), 0.0, atol=1e-5)
    assert np.all(mechanism.loss(released, logits[::-1]).numpy() > 0.01)
    # By hand for one row.
    target = np.exp(np.log(answers[0]) / temperature)
    target /= target.sum()
    other = tf.nn.softmax(logits[1] / temperature).numpy()
    expected = temperature**2 * np.sum(target * np.log(target / other))
    loss = mechanism.loss(released, tf.stack([logits[1]] * 6))[0]
    np.testing.assert_allclose(loss, expected, rtol=1e-3)


def test_the_students_statement_is_the_teachers():
    model = transcriber()
    fit(model, 3, target_epsilon=1.0)
    statement = model.privacy_statement()
    assert not model.ledger.entries
    assert statement.inherited_from == "the teacher"
    assert statement.covered == ("teacher", "student", "generator")
    for name in ("unit", "relation", "epsilon", "delta", "accountant", "sampling"):
        assert getattr(statement, name) == getattr(STATEMENT, name)
    assert statement.noise_seed is None, "the teacher's, not the transcription's"


def test_the_progress_shows_the_teachers_epsilon():
    watch = tiny.Watch()
    fit(transcriber(), 2, epochs=2, callbacks=[watch])
    assert [shown for shown, _ in watch.batches + watch.epochs] == [0.75] * 6


def test_the_student_learns_the_teacher():
    model = transcriber(
        student_updates=4, replay_size=4096, replay_batch_size=64, eager=False
    )
    images = np.random.default_rng(0).uniform(size=(500, *tiny.IMAGE))
    by_teacher = model.teacher.predict(images).argmax(-1)
    before = np.mean(model.predict(images, verbose=0).argmax(-1) == by_teacher)
    fit(model, 150)
    after = np.mean(model.predict(images, verbose=0).argmax(-1) == by_teacher)
    assert before < 0.3 < 0.75 < after


@pytest.mark.parametrize(
    ("target", "delta"), [(0.7499, 1e-5), (1e-3, 1e-5), (0.75, 1e-7)]
)
def test_a_target_that_the_teacher_has_passed_is_refused_before_a_step(target, delta):
    model = transcriber()
    weights = tiny.flat_weights(model.student)
    with pytest.raises(dpt.BudgetExceededError, match="RECORD"):
        fit(model, 1, target_epsilon=target, delta=delta)
    assert np.array_equal(weights, tiny.flat_weights(model.student))


@pytest.mark.parametrize("target", [0.75, 1.0, 100.0, None])
def test_a_target_that_the_teacher_keeps_is_fine(target):
    model = transcriber()
    fit(model, 1, target_epsilon=target)
    assert model.privacy_statement().epsilon == 0.75


def test_a_teacher_that_is_not_known_to_be_private_is_refused():
    other = dataclasses.replace(STATEMENT, epsilon=0.5)
    for teacher in (tiny.linear_teacher(), private_teacher(other)):
        with pytest.raises(ValueError, match="teacher"):
            transcriber(teacher=teacher)


def test_another_delta_is_not_made_up():
    model = transcriber()
    assert model.privacy_statement(delta=1e-6).delta == 1e-6
    with pytest.raises(ValueError, match="delta"):
        model.privacy_statement(delta=1e-9)


def test_the_private_teacher_alone_may_guide_the_generator():
    objective = GeneratorObjective(adversarial=1.0)
    parts = {
        "generator": MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        "objective": objective,
    }
    with pytest.raises(ValueError, match="adversarial"):
        tiny.transcriber(**parts)
    model = transcriber(**parts)
    before = tiny.flat_weights(model.generator)
    fit(model, 2)
    assert not np.array_equal(before, tiny.flat_weights(model.generator))


def test_a_checkpoint_keeps_mechanism_and_statement(tmp_path):
    model = transcriber(Inherited(STATEMENT, 2.0), eager=False)
    fit(model, 2)
    model.save_checkpoint(tmp_path / "checkpoint.keras")
    loaded = keras.saving.load_model(tmp_path / "checkpoint.keras")
    assert loaded.mechanism == model.mechanism
    assert loaded.privacy_statement() == model.privacy_statement()
    fit(loaded, 1)


def test_a_saved_teacher_brings_its_statement(tmp_path):
    teacher, path = private_teacher(), tmp_path / "teacher.keras"
    teacher.save(path)
    assert (tmp_path / "teacher.statement.json").is_file()
    loaded = load_teacher(path)
    assert loaded.statement == STATEMENT
    transcriber(teacher=loaded)


def test_a_statement_is_not_taken_for_another_teacher(tmp_path):
    path = tmp_path / "teacher.keras"
    private_teacher().save(path)
    tiny.linear_model(6).save(path)
    with pytest.raises(ValueError, match="overwritten"):
        load_teacher(path)
    Teacher(tiny.linear_model(6)).save(path)
    assert load_teacher(path).statement is None


def test_a_statement_that_names_another_file_is_refused_as_an_object_too(tmp_path):
    private_teacher().save(tmp_path / "teacher.keras")
    text = (tmp_path / "teacher.statement.json").read_text()
    tiny.linear_model(6).save(tmp_path / "other.keras")
    stated = PrivacyStatement.from_json(text)
    with pytest.raises(ValueError, match="statement of .*other.keras"):
        load_teacher(tmp_path / "other.keras", statement=stated)
    loaded = load_teacher(tmp_path / "teacher.keras", statement=stated)
    assert loaded.statement == STATEMENT


def test_a_statement_beside_that_names_no_file_is_not_taken_unasked(tmp_path):
    tiny.linear_model(6).save(tmp_path / "teacher.keras")
    beside = tmp_path / "teacher.statement.json"
    beside.write_text(STATEMENT.to_json())
    with pytest.raises(ValueError, match="pass the file as `statement`"):
        load_teacher(tmp_path / "teacher.keras")
    teacher = load_teacher(tmp_path / "teacher.keras", statement=beside)
    assert teacher.statement == STATEMENT


def test_a_statement_file_may_be_given(tmp_path):
    tiny.linear_model(6).save(tmp_path / "teacher.keras")
    (tmp_path / "mine.json").write_text(STATEMENT.to_json())
    teacher = load_teacher(tmp_path / "teacher.keras", statement=tmp_path / "mine.json")
    assert teacher.statement == STATEMENT
    (tmp_path / "mine.json").write_text(
        STATEMENT.to_json().replace("RECORD", Unit.RESPONSE.value)
    )
    with pytest.raises(ValueError, match="RECORD"):
        load_teacher(tmp_path / "teacher.keras", statement=tmp_path / "mine.json")
