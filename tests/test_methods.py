"""The published methods as one call each."""

import functools

import keras
import pytest
import tensorflow as tf

import dp_transcribe as dpt
from dp_transcribe import methods
from dp_transcribe.export import GeneratorNotPrivateError
from dp_transcribe.generators import MLPGenerator, SmoothNoise
from dp_transcribe.mechanisms import (
    NoisyAnswer,
    NormalizedGradient,
    SelectiveRandomizedResponse,
)
from dp_transcribe.privacy.units import Unit
from dp_transcribe.teachers import Teacher
from tests import tiny
from tests.privacy.test_inheritance import STATEMENT

CALLS = {
    "dpdfd": dpt.dpdfd,
    "srr": dpt.srr,
    "dpsd_data": functools.partial(dpt.dpsd, protect="data"),
    "dpsd_label": functools.partial(dpt.dpsd, protect="label"),
}
MECHANISMS = {
    "dpdfd": NormalizedGradient,
    "srr": SelectiveRandomizedResponse,
    "dpsd_data": NoisyAnswer,
    "dpsd_label": SelectiveRandomizedResponse,
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(methods, "PRETRAINING_STEPS", 2)
    monkeypatch.setattr(methods, "REPLAY_SIZE", 2**13)


def _call(name, **kwargs):
    shape = tiny.IMAGE
    return CALLS[name](
        tiny.linear_teacher(),
        SmoothNoise(shape),
        student=tiny.linear_model(),
        generator=MLPGenerator(shape, latent_dim=4, units=(8,)),
        epochs=1,
        steps_per_epoch=1,
        **kwargs,
    )


def with_hidden(layer):
    flatten, logits = keras.layers.Flatten(), keras.layers.Dense(tiny.CLASSES)
    return keras.Sequential([keras.Input(tiny.IMAGE), flatten, layer, logits])


def test_every_method_has_its_call():
    assert set(methods.METHODS) == set(CALLS)


@pytest.mark.parametrize("name", ["srr", "dpsd_data", "dpsd_label"])
def test_a_call_gives_a_transcriber_that_fits_by_its_own_schedule(name):
    transcriber = _call(name)
    assert isinstance(transcriber.mechanism, MECHANISMS[name])
    history = transcriber.fit(target_epsilon=1.0, delta=1e-5, verbose=0)
    assert len(history.history["epsilon"]) == 1
    statement = transcriber.privacy_statement()
    assert statement.unit is Unit.RESPONSE
    assert 0.99 < statement.epsilon <= 1.0
    assert ("generator" in statement.covered) == (name != "srr")


@pytest.mark.slow
def test_dpdfd_fits_by_its_own_schedule():
    transcriber = _call("dpdfd")
    transcriber.fit(target_epsilon=1.0, delta=1e-5, verbose=0)
    assert isinstance(transcriber.mechanism, NormalizedGradient)
    statement = transcriber.privacy_statement()
    assert 0.0 < statement.epsilon <= 1.0
    assert "generator" in statement.covered


def test_the_head_of_dpdfd_has_the_width_asked_for():
    transcriber = dpt.dpdfd(
        Teacher(tiny.linear_model(classes=3), outputs="logits"),
        SmoothNoise(tiny.IMAGE),
        generator=MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,)),
        units=(7, 5),
    )
    learnt = [tuple(w.shape) for w in transcriber.student.trainable_weights]
    assert [s[1] for s in learnt if len(s) == 2] == [7, 5, 3]


def test_a_generator_that_read_the_teacher_is_not_exported(tmp_path):
    transcriber = _call("srr")
    transcriber.fit(target_epsilon=1.0, delta=1e-5, verbose=0)
    with pytest.raises(GeneratorNotPrivateError):
        dpt.export_generator(transcriber, tmp_path / "generator")
    assert not (tmp_path / "generator").exists()


def test_unknown_protection_is_refused():
    with pytest.raises(ValueError, match="protect"):
        dpt.dpsd(tiny.linear_teacher(), SmoothNoise(tiny.IMAGE), protect="both")


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (None, "the method `sample`"),
        ("strokes", "the method `sample`"),
        (SmoothNoise, "image_shape="),
        (SmoothNoise((9, 9, 1)), "image_shape="),
        (SmoothNoise(tiny.IMAGE, output_range=(-1.0, 1.0)), "output_range="),
    ],
)
@pytest.mark.parametrize("method", [dpt.dpdfd, dpt.srr, dpt.dpsd])
def test_a_prior_that_makes_no_images_of_the_teacher_is_refused(method, prior, message):
    with pytest.raises(ValueError, match=f"`prior`.*{message}"):
        method(tiny.linear_teacher(), prior)


@pytest.mark.parametrize("name", ["epochs", "steps_per_epoch", "pool_size"])
def test_a_run_of_no_steps_or_queries_is_refused(name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        dpt.dpdfd(tiny.linear_teacher(), SmoothNoise(tiny.IMAGE), **{name: 0})


def test_srr_refuses_a_generator_or_teacher_that_cannot_be_guided():
    prior, student = SmoothNoise(tiny.IMAGE), tiny.linear_model()
    with pytest.raises(ValueError, match="`generator`.*`draw_inputs`"):
        dpt.srr(tiny.linear_teacher(), prior, student=student, generator=prior)
    blind = Teacher(
        lambda x: tf.round(tf.reshape(x, (-1, tiny.PIXELS))[:, :10]),
        input_shape=tiny.IMAGE,
        outputs="logits",
    )
    generator = MLPGenerator(tiny.IMAGE, latent_dim=4, units=(8,))
    with pytest.raises(ValueError, match="`teacher`.*gradient"):
        dpt.srr(blind, prior, student=student, generator=generator)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: tiny.linear_model(classes=7), "7"),
        (lambda: with_hidden(keras.layers.BatchNormalization()), "BatchNorm"),
        (lambda: "lenet", "`Model`"),
    ],
)
def test_a_student_that_is_refused_is_so_before_any_pretraining(
    name, student, message, monkeypatch
):
    def pretrain(*_, **__):
        pytest.fail("It was pretrained first.")

    monkeypatch.setattr(methods, "pretrain", pretrain)
    monkeypatch.setattr(methods, "pretrain_by_teacher", pretrain)
    with pytest.raises(ValueError, match=f"`student`.*{message}"):
        CALLS[name](tiny.linear_teacher(), SmoothNoise(tiny.IMAGE), student=student())


def test_dpdfd_refuses_random_layers_before_any_pretraining(monkeypatch):
    monkeypatch.setattr(methods, "pretrain", lambda *_, **__: pytest.fail("too late"))
    student = with_hidden(keras.layers.Dropout(0.5))
    with pytest.raises(ValueError, match="random"):
        dpt.dpdfd(tiny.linear_teacher(), SmoothNoise(tiny.IMAGE), student=student)


def test_a_private_teacher_is_transcribed_under_its_own_statement():
    teacher = Teacher(tiny.linear_model(5), statement=STATEMENT)
    transcriber = dpt.transcribe_private_teacher(
        teacher, SmoothNoise(tiny.IMAGE), student=tiny.linear_model(), epochs=1
    )
    transcriber.fit(target_epsilon=1.0, steps_per_epoch=2, verbose=0)
    statement = transcriber.privacy_statement()
    assert (statement.unit, statement.epsilon) == (Unit.RECORD, STATEMENT.epsilon)
    assert {"student", "generator"} <= set(statement.covered)


def test_a_teacher_that_is_not_private_is_not_transcribed_as_one():
    with pytest.raises(ValueError, match="statement"):
        dpt.transcribe_private_teacher(tiny.linear_teacher(), SmoothNoise(tiny.IMAGE))


def test_rests_of_short_runs_meet_and_never_overlap():
    pace = methods.Pace(rests=((0.0, 0.4), (0.45, 0.8)), uniform=0.5)
    for steps in range(1, 60):
        flat = [step for turn in methods._turns(pace, steps) for step in turn]
        assert flat == sorted(set(flat)) and max(flat, default=0) <= 0.8 * steps
    assert methods._turns(pace, 5) == [(0, 4)]
    assert methods._turns(pace, 100) == [(0, 40), (45, 80)]
